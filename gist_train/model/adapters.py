"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) inside a transformer, by peft: trained in place of its weights.

A matrix W (out, in) acts as W + alpha / rank * B A, with A (rank, in) and B (out, rank); B begins as zeros. Checkpoints hold A
and B alone, in peft's format; what is exported is merged.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.models import LoraConfig
from gist_train.data.files import read_json
from gist_train.run_folder import MANIFEST

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of a folder of adapters, as peft calls them."""
SEED = 0
"""Of the first values of A: the same for all processes, and for every command that opens the model."""


def add_adapters(transformer: Any, config: LoraConfig) -> None:
    """Gives the transformer's matrices adapters, which are then all that is trained of it.

    Raises:
        UserError: peft is not there, or no matrix has such a name.
    """
    try:
        import peft  # an extra
    except ImportError:
        fix = 'pip install "gist-train[lora]", or leave model.lora out'
        raise UserError(Fault("model.lora", "given, and peft is not installed", "peft", fix)) from None
    targets = targets_of(transformer, config.targets)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, task_type="FEATURE_EXTRACTION"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformer.add_adapter(settings)


def targets_of(transformer: Any, asked: list[str] | None) -> list[str]:
    """The full names of the matrices that get adapters: those whose last part is asked for, or all.

    Raises:
        UserError: one that was asked for is not there.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if not name.startswith("pooler.")]  # no embedding goes through it
    last = {name: name.rsplit(".", 1)[-1] for name in linear}
    if unknown := sorted({*(asked or [])} - {*last.values()}):
        expected = f"names among {listed(sorted({*last.values()}))}"
        raise UserError(Fault("model.lora.targets", listed(map(shown, unknown)), expected, "correct them, or leave them out"))
    return [name for name in linear if asked is None or last[name] in asked]


def adapted(transformer: Any) -> bool:
    """Whether the transformer has adapters that are not merged."""
    return hasattr(transformer, "peft_config")


def adapter_weights(transformer: Any) -> dict[str, Tensor]:
    """A and B of each matrix, the live ones, by the names that peft's files have for them."""
    weights = {name: weight for name, weight in transformer.named_parameters() if ".lora_" in name}
    return {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in weights.items()}


def load_adapters(transformer: Any, folder: Path) -> None:
    """Puts the adapters of a checkpoint into those that the transformer has.

    Raises:
        UserError: these are adapters of other matrices, or of another rank.
    """
    settings, mine = read_json(folder / CONFIG), transformer.peft_config["default"]
    if (settings["r"], settings["lora_alpha"]) != (mine.r, mine.lora_alpha):
        found = f"adapters of rank {settings['r']} and alpha {settings['lora_alpha']}"
        expected = f"rank {mine.r} and alpha {mine.lora_alpha}, as model.lora says"
        raise UserError(Fault(f"checkpoint {folder}", found, expected, "open it with what it was made of"))
    own, saved = adapter_weights(transformer), load_file(folder / WEIGHTS)
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in saved.items()}:
        expected = "those of model.name and model.lora"
        raise UserError(Fault(f"checkpoint {folder}", "adapters of another shape", expected, "open it with what it was made of"))
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(saved[name])


def base_fingerprint(transformer: Any) -> str:
    """32 hex digits over the weights under the adapters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in transformer.named_parameters():
        if ".lora_" not in name:
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_other_base(transformer: Any, folder: Path) -> None:
    """Raises UserError where a checkpoint's adapters were trained on other weights than the transformer has."""
    trained_on = read_json(folder / MANIFEST).get("base")
    if trained_on not in (None, base_fingerprint(transformer)):
        fix = "name that model, or its revision: a branch on the hub may have moved"
        raise UserError(Fault(f"checkpoint {folder}", "adapters of other weights", "those of model.name", fix))


def merge_adapters(transformer: Any) -> None:
    """Adds what the adapters do to the matrices, and takes the adapters away: the model is as if it had been trained whole."""
    for name, module in list(transformer.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, module.get_base_layer())
    del transformer.peft_config
    transformer._hf_peft_config_loaded = False
