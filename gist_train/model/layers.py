"""Cutting a transformer down to some of its layers, so that what is saved opens as the same model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from gist_train.config.errors import Fault, UserError, shown
from gist_train.model.families import kin_of


def keep_layers(transformer: Any, keep: Sequence[int]) -> None:
    """Leaves `transformer` the layers `keep`, ascending numbers from 0, and has its config say so.

    Raises:
        UserError: it has no such layers, or is of a family whose layers nobody has tried to cut.
    """
    holder, name = _layer_list(transformer)
    if not name:
        kind = transformer.config.model_type
        raise UserError(Fault("model.layers", shown(list(keep)), f"null for a model of the family {kind}", "set it to null"))
    layers = holder.get_submodule(name)
    if max(keep) >= len(layers):
        raise UserError(
            Fault("model.layers", shown(list(keep)), f"layers 0 to {len(layers) - 1}", "name layers that the model has")
        )
    family = kin_of(transformer)
    if family is not None and family.first_layer_stays and keep[0] != 0:
        # ModernBERT's layer 0 alone has no norm before attention, and a saved model is built so again.
        raise UserError(Fault("model.layers", shown(list(keep)), "layer 0 first: no other can be the first", "add 0"))
    setattr(holder, name, nn.ModuleList(layers[i] for i in keep))
    config = transformer.config
    types = config.to_dict().get("layer_types")
    config.num_hidden_layers = len(keep)
    if types is not None:  # which of them are local
        config.layer_types = [types[i] for i in keep]


def _layer_list(transformer: Any) -> tuple[Any, str]:
    """The module that holds the layers and their name in it; "" where nobody has tried to cut them."""
    family = kin_of(transformer)
    try:
        path, _, name = (family.layers if family is not None else "encoder.layer").rpartition(".")
        holder = transformer.get_submodule(path)
        return holder, name if isinstance(holder.get_submodule(name), nn.ModuleList) else ""
    except AttributeError:
        return transformer, ""
