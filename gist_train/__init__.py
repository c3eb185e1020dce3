"""Fine-tunes text-embedding models with GISTEmbed (Solatorio 2024, arXiv 2402.16829).

What is public is named below, and imported when it is first used: `import gist_train` itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gist_train.version import __version__ as __version__

if TYPE_CHECKING:
    from gist_train.config.errors import UserError
    from gist_train.config.loading import load_config
    from gist_train.config.schema import Config
    from gist_train.inside.loss import GuidedContrastiveLoss
    from gist_train.inside.packing import pack, unpack
    from gist_train.model.loss import LossOutput, guided_contrastive_loss
    from gist_train.planning.plan import plan
    from gist_train.run_folder import Run
    from gist_train.training.loop import NonFiniteError
    from gist_train.training_run import train

__all__ = [
    "Config",
    "GuidedContrastiveLoss",
    "LossOutput",
    "NonFiniteError",
    "Run",
    "UserError",
    "guided_contrastive_loss",
    "load_config",
    "pack",
    "plan",
    "train",
    "unpack",
]
# No module beside this file may have one of these names: once imported, it would take the function's place.
_HOMES = {
    "Config": "config.schema",
    "GuidedContrastiveLoss": "inside.loss",
    "LossOutput": "model.loss",
    "NonFiniteError": "training.loop",
    "Run": "run_folder",
    "UserError": "config.errors",
    "guided_contrastive_loss": "model.loss",
    "load_config": "config.loading",
    "pack": "inside.packing",
    "plan": "planning.plan",
    "train": "training_run",
    "unpack": "inside.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
