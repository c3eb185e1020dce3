"""A SentenceTransformer that computes no padding: `pack` puts our packed forward in the place of its transformer's.

All else of the model stays: its tokens and prompts, its pooling whatever it is, the modules behind that, its weights and how they
are saved. Tokens come in padded and go out padded, and what lies between, which is nearly all that a step costs, runs on the real
ones.

Legend: N texts of a forward, L tokens of the longest, T real tokens, D width of a token's state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.model.attention import PackedLengths, make_known
from gist_train.model.encoder import Encoder, Pack, packed_family
from gist_train.model.families import FAMILIES

_WHERE = "pack"


def pack(model: SentenceTransformer) -> SentenceTransformer:
    """Has a model train and encode without padding, until `unpack`. Its outputs stay what they were.

    Dropout draws other numbers than before, at the same rates. A model that is packed already stays so.

    Returns:
        The same model.

    Raises:
        UserError: it is no model, has no transformer that runs packed, or gives states that only padded texts have.
    """
    refuse_no_model(model, _WHERE)
    modules = list(_transformers(model))
    if not modules:
        names = " -> ".join(type(module).__name__ for module in model)
        fix = "leave it as it is: where there is no attention, there is little padding to save"
        raise UserError(Fault(_WHERE, f"a model of {names}", "one with a Transformer module", fix))
    for module in modules:
        _refuse_what_cannot_run(module)
    for module in modules:
        if not isinstance(vars(module).get("forward"), PackedForward):
            module.forward = PackedForward(module)
    return model


def refuse_no_model(model: object, where: str) -> None:
    """Raises UserError where something else than a model is given, such as its name."""
    if not isinstance(model, SentenceTransformer):
        fix = f"open it first: SentenceTransformer({shown(model)})" if isinstance(model, str) else "give the model itself"
        raise UserError(Fault(f"{where}: model", shown(model), "a SentenceTransformer", fix))


def unpack(model: SentenceTransformer) -> SentenceTransformer:
    """Undoes `pack`: the model runs padded again, with the attention that it had.

    Returns:
        The same model.
    """
    for module in _transformers(model):
        packed = vars(module).get("forward")
        if isinstance(packed, PackedForward):
            del module.forward
            packed.undo(module)
    return model


def runs_packed(model: nn.Module) -> bool:
    """Whether all transformers of a model, or of what it is wrapped in, are packed."""
    packed = [isinstance(vars(module).get("forward"), PackedForward) for module in _transformers(model)]
    return bool(packed) and all(packed)


def _transformers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Transformer))


class PackedForward:
    """What a Transformer module's forward is while it is packed. A copy of the module has one of its own.

    Args:
        module: whose attention it sets.
    """

    def __init__(self, module: Any):
        self._attention: str = module.auto_model.config._attn_implementation
        self._flattened: bool = module.can_flatten_inputs
        module.can_flatten_inputs = False  # flash attention's own way without padding: it leaves no mask
        self._encoder = Encoder(module.auto_model, pooling="mean", normalized=False)
        self._output: str = module.module_output_name
        self._packed: str = module.auto_model.config._attn_implementation

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which may be in another process."""
        make_known()
        vars(self).update(state)

    def undo(self, module: Any) -> None:
        """Gives the module back what it had."""
        module.can_flatten_inputs = self._flattened
        if self._attention != module.auto_model.config._attn_implementation:
            module.auto_model.set_attn_implementation(self._attention)

    def __call__(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds the states (N, L, D) of the tokens to the features, 0 where there is none.

        Raises:
            UserError: the features are not those of single texts, lie on another device, or the states of all layers are wanted.
        """
        if (attention := self._encoder.transformer.config._attn_implementation) != self._packed:
            found = f"another attention ({attention}), set after the model was packed: it does not see where a text ends"
            raise UserError(
                Fault(_WHERE, found, "the attention that pack sets", "call gist_train.unpack(model), then pack(model)")
            )
        _refuse_features(features, self._encoder)
        laid = lay_out(features["input_ids"], features["attention_mask"])
        hidden = self._encoder.packed_hidden(laid.texts)
        padded = hidden.new_zeros(laid.count * laid.longest, hidden.shape[-1]).index_copy(0, laid.places, hidden)
        features[self._output] = padded.view(laid.count, laid.longest, -1)
        return features


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Padded texts, end to end."""

    texts: Pack
    places: Tensor
    """(T,) where in (N * L) each token of the pack was."""
    count: int
    """N."""
    longest: int
    """L."""


def lay_out(input_ids: Tensor, attention_mask: Tensor) -> LaidOut:
    """The real tokens of (N, L) padded ids, whichever side they are padded on. A text without any keeps its first one.

    Waits for the device once.
    """
    real = attention_mask.cpu().numpy().astype(bool)
    real[~real.any(axis=1), 0] = True
    lengths = real.sum(axis=1)
    order = np.argsort(lengths, kind="stable")  # texts of one length together, as attention takes them
    count, longest = real.shape
    rows, columns = np.nonzero(real[order])
    values, counts = np.unique(lengths, return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(lengths[order])])
    restore = np.empty(count, np.int64)
    restore[order] = np.arange(count)
    positions = np.arange(cumulative[-1]) - np.repeat(cumulative[:-1], lengths[order])
    device = input_ids.device
    places = torch.from_numpy(order[rows] * longest + columns).to(device, non_blocking=True)
    texts = Pack(
        input_ids=input_ids.flatten()[places][None],
        positions=torch.from_numpy(positions)[None].to(device, non_blocking=True),
        lengths=PackedLengths(
            tuple(zip(counts.tolist(), values.tolist(), strict=True)),
            torch.from_numpy(cumulative.astype(np.int32)).to(device, non_blocking=True),
        ),
        restore=torch.from_numpy(restore).to(device, non_blocking=True),
    )
    return LaidOut(texts, places, count, longest)


def _refuse_what_cannot_run(module: Any) -> None:
    if module.backend != "torch":
        fix = "load the model with backend torch"
        raise UserError(Fault(_WHERE, f"a model that {module.backend} runs", "one that torch runs", fix))
    transformer = module.auto_model
    if packed_family(transformer) is None:
        families = listed(sorted(family.model for family in FAMILIES))
        fix = "leave it padded: the loss runs with it all the same"
        raise UserError(Fault(_WHERE, f"a {type(transformer).__name__}", f"one of {families}", fix))
    if transformer.config.output_hidden_states:
        raise _all_layers()


def _refuse_features(features: dict[str, Any], encoder: Encoder) -> None:
    if encoder.transformer.config.output_hidden_states:  # AdaptiveLayerLoss sets it
        raise _all_layers()
    if (there := features["input_ids"].device) != (here := encoder.transformer.device):
        # torch.nn.DataParallel copies a model to every GPU that it sees, and what was put in its forward's place is not copied.
        found = f"texts on {there}, and weights on {here}"
        fix = "launch a process for each GPU with accelerate or torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
        raise UserError(Fault(_WHERE, found, "a process that uses one device", fix))
    if not isinstance(features.get("attention_mask"), Tensor) or features["input_ids"].ndim != 2:
        fix = "tokenize with the model's preprocess"
        raise UserError(Fault(_WHERE, f"features {listed(sorted(features))}", "input_ids and attention_mask, padded", fix))
    segments = features.get("token_type_ids")
    if isinstance(segments, Tensor) and bool(segments.any()):
        fix = "call gist_train.unpack(model) first, or join the two texts into one"
        raise UserError(Fault(_WHERE, "texts in two segments (token_type_ids)", "texts of one segment", fix))


def _all_layers() -> UserError:
    fix = "call gist_train.unpack(model), or take a loss over the last layer"
    return UserError(Fault(_WHERE, "output_hidden_states: the states of all layers", "those of the last layer alone", fix))
