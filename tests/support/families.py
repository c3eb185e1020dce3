"""Tiny transformers with random weights, one of each family, and what the packed encoder is held against: padded texts, a mask,
transformers' own attention, plain pooling.

Legend: N texts, D the width of an embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from gist_train.model.encoder import Encoder

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, {"type_vocab_size": 2}),
    "roberta": (RobertaConfig, RobertaModel, {"type_vocab_size": 1}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, {"type_vocab_size": 1}),
    "camembert": (CamembertConfig, CamembertModel, {"type_vocab_size": 1}),
    "mpnet": (MPNetConfig, MPNetModel, {}),
    "distilbert": (DistilBertConfig, DistilBertModel, {}),
    # Windows shorter than the tests' texts; the first layer of ModernBERT and Qwen3 sees all.
    "modernbert": (ModernBertConfig, ModernBertModel, {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "llama": (LlamaConfig, LlamaModel, {}),
    "mistral": (MistralConfig, MistralModel, {"num_key_value_heads": 1, "sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2Model, {"num_key_value_heads": 2}),
    # The heads together are wider than the hidden states.
    "qwen3": (
        Qwen3Config,
        Qwen3Model,
        {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    # Its attention adds what the states say about distances: not packed.
    "deberta-v2": (DebertaV2Config, DebertaV2Model, {"type_vocab_size": 0, "relative_attention": True}),
}
"""Name -> class of the config, class of the model, and settings beyond `tiny_config`'s."""
PACKED_FAMILIES = [name for name in FAMILIES if name != "deberta-v2"]
DECODERS = ["llama", "mistral", "qwen2", "qwen3"]
VOCABULARY = 50


def tiny_config(
    family: str, *, vocabulary: int, width: int, layers: int, intermediate: int, positions: int, dropout: float, **given: Any
) -> Any:
    """A config with 4 heads, by the names that the family has for its settings; `given` replaces any."""
    config_class, _, own = FAMILIES[family]
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
    }
    rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    if family == "distilbert":
        renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        renamed["intermediate_size"] = "hidden_dim"
        settings = {renamed.get(name, name): value for name, value in settings.items()}
        rates = ["dropout", "attention_dropout"]
    elif family == "modernbert":
        rates = ["embedding_dropout", "attention_dropout", "mlp_dropout"]
        settings |= {"cls_token_id": 0, "sep_token_id": 0}
    elif family in DECODERS:
        rates = ["attention_dropout"]
    return config_class(**{**settings, **dict.fromkeys(rates, dropout), **own, **given})


def transformer_of(
    family: str, attention: str = "eager", *, pad: int = 1, dropout: float = 0.0, layers: int = 2, **given: Any
) -> Any:
    """A tiny transformer; the same arguments give the same weights whatever the attention."""
    torch.manual_seed(0)
    config = tiny_config(
        family,
        vocabulary=VOCABULARY,
        width=16,
        layers=layers,
        intermediate=24,
        positions=70,
        dropout=dropout,
        **{
            "pad_token_id": pad,
            "bos_token_id": 0,
            "eos_token_id": 0,
            # Weights of transformers' own scale leave attention all but uniform: errors in it would hide.
            "initializer_range": 0.3,
            **given,
        },
    )
    model = FAMILIES[family][1](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            if name.endswith("relative_attention_bias.weight"):
                parameter.normal_()
    if family not in ("mpnet", "deberta-v2"):  # which have their own attention only
        model.set_attn_implementation(attention)
    return model


def texts_of(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Random token ids, none of them a padding id."""
    draw = np.random.default_rng(seed)
    return [draw.integers(5, VOCABULARY, length).astype(np.int32) for length in lengths]


def padded_twin(transformer: Any, texts: Sequence[np.ndarray], pooling: str, normalized: bool, device: str = "cpu") -> Tensor:
    """(N, D): what everybody does, written out."""
    longest = max(map(len, texts))
    pad = transformer.config.pad_token_id
    ids = torch.tensor([text.tolist() + [pad] * (longest - len(text)) for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    hidden = transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = []
    for row, text in zip(hidden, texts, strict=True):
        mean = sum(row[i] for i in range(len(text))) / len(text)
        vector = {"cls": row[0], "mean": mean, "last": row[len(text) - 1]}[pooling]
        rows.append(vector / vector.norm() if normalized else vector)
    return torch.stack(rows)


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of a scalar in which every number of the embeddings has its own weight, by name of the transformer's weight."""
    transformer = module.transformer if isinstance(module, Encoder) else module
    transformer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(9)
    (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum().backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Every weight has one, and it differs by `tolerance` of the largest number in it at most."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    # The gradient of a key's bias is 0: what both give there is rounding of the others, in size like these.
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max().item(), 0.1, 0.02 * largest)
        assert (ours[name].cpu() - gradient.cpu()).abs().max().item() <= tolerance * scale, name
