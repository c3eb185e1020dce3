"""Fine-tunes text-embedding models with GISTEmbed (Solatorio 2024, arXiv 2402.16829).

What is public is named below, and imported when it is first used: `import gist_train` itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gist_train.version import __version__ as __version__

if TYPE_CHECKING:
    from gist_train.api.calls import audit, evaluate, mine, plan, train
    from gist_train.api.run import Run
    from gist_train.auditing.audit import Audit
    from gist_train.config.errors import UserError
    from gist_train.config.loading import load_config
    from gist_train.config.schema import Config
    from gist_train.inside.packing import pack, unpack
    from gist_train.inside.trainer_loss import GuidedContrastiveLoss
    from gist_train.model.loss import LossOutput, guided_contrastive_loss
    from gist_train.planning.findings import Plan
    from gist_train.results.selected import Selected
    from gist_train.training.loop import NonFiniteError
    from gist_train.training.signals import Stopped

__all__ = [
    "Audit",
    "Config",
    "GuidedContrastiveLoss",
    "LossOutput",
    "NonFiniteError",
    "Plan",
    "Run",
    "Selected",
    "Stopped",
    "UserError",
    "audit",
    "evaluate",
    "guided_contrastive_loss",
    "load_config",
    "mine",
    "pack",
    "plan",
    "train",
    "unpack",
]
# No module beside this file may have one of these names: once imported, it would take the function's place.
_HOMES = {
    "Audit": "auditing.audit",
    "Config": "config.schema",
    "GuidedContrastiveLoss": "inside.trainer_loss",
    "LossOutput": "model.loss",
    "NonFiniteError": "training.loop",
    "Plan": "planning.findings",
    "Run": "api.run",
    "Selected": "results.selected",
    "Stopped": "training.signals",
    "UserError": "config.errors",
    "audit": "api.calls",
    "evaluate": "api.calls",
    "guided_contrastive_loss": "model.loss",
    "load_config": "config.loading",
    "mine": "api.calls",
    "pack": "inside.packing",
    "plan": "api.calls",
    "train": "api.calls",
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
