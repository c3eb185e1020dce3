"""What is known of each family of models that runs packed: one row each. Whoever adds a family adds a row here.

Classes and not the config's `model_type`: code from a model's repository may call itself bert and attend in ways of its own.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Family:
    """One class of transformers' models, whose tokens know each other only through attention and their position."""

    model: str
    """Its class: transformers itself takes seconds to import, and is there by the time that somebody has a model of it."""
    layers: str
    """Name of the list of its layers, from the model down."""
    positions_after_padding: bool = False
    """Whether positions are counted from the padding id on, so that as many can't be used, and one."""
    causal: bool = False
    """Whether a token sees those before it and itself only."""
    own_layers: bool = False
    """Whether it trains through layers of ours (`bert.py`)."""
    own_forward: bool = False
    """Whether its forward is ours (`mpnet.py`): attention adds what depends on distances, so flash attention can't run it."""
    first_layer_stays: bool = False
    """Whether no other layer can be its first."""
    norms_queries: bool = False
    """Whether queries and keys are normed, which keeps them twice for the backward pass."""


FAMILIES = (
    Family("BertModel", "encoder.layer", own_layers=True),
    Family("RobertaModel", "encoder.layer", positions_after_padding=True, own_layers=True),
    Family("XLMRobertaModel", "encoder.layer", positions_after_padding=True, own_layers=True),
    Family("CamembertModel", "encoder.layer", positions_after_padding=True, own_layers=True),
    Family("MPNetModel", "encoder.layer", positions_after_padding=True, own_forward=True),
    Family("DistilBertModel", "transformer.layer"),
    Family("ModernBertModel", "layers", first_layer_stays=True),
    Family("LlamaModel", "layers", causal=True),
    Family("MistralModel", "layers", causal=True),
    Family("Qwen2Model", "layers", causal=True),
    Family("Qwen3Model", "layers", causal=True, norms_queries=True),
)


def family_of(transformer: Any) -> Family | None:
    """The family that a model is of, by its very class; None for one that is not known to run packed."""
    return _of_class(type(transformer))


def kin_of(transformer: Any) -> Family | None:
    """The family that a model is of, or derived from."""
    return next((family for one in type(transformer).__mro__ if (family := _of_class(one)) is not None), None)


def _of_class(one: type[Any]) -> Family | None:
    # Code of a model's repository may name its class as it likes, but not the module that it came from.
    ours = one.__module__.startswith("transformers.models.")
    return next((family for family in FAMILIES if ours and one.__name__ == family.model), None)


def in_embedding(weight: str) -> bool:
    """Whether the weight of this name has a part in embeddings.

    BERT's pooler has none: a dense layer on the first token, made for next-sentence prediction.
    """
    return not weight.startswith("pooler.")


def product_shapes(transformer: Any) -> list[tuple[int, int]]:
    """(out, in) of every matrix that each token is multiplied by on its way to an embedding: what training costs goes by them."""
    from transformers.pytorch_utils import Conv1D

    shapes = []
    for name, module in transformer.named_modules():
        if in_embedding(name) and isinstance(module, nn.Linear):
            shapes.append((module.out_features, module.in_features))
        elif in_embedding(name) and isinstance(module, Conv1D):  # GPT-2's, whose matrix is the other way round
            shapes.append((module.nf, module.nx))
    # Of a model that multiplies in modules of its own nothing is known: one square, so that rates and estimates exist.
    return shapes or [(transformer.config.hidden_size, transformer.config.hidden_size)]
