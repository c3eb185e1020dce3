"""Whether steps teach anything: where no candidate is left the loss is 0, and a run of such steps ends well and is nothing."""

from collections.abc import Mapping

from gist_train.config.schema import Config
from gist_train.model.loss import BLOCKS

NEARLY_ALL = 0.95
"""Share of masked candidates from which on a step teaches hardly anything."""
ZEROS_IN_A_ROW = 50
"""Steps of a loss of exactly 0 after which that is said."""


class Teaching:
    """Counts steps that teach nothing, and says each kind of them once.

    Args:
        config: whose values are named among the causes.
    """

    def __init__(self, config: Config):
        self._config = config
        self._said: set[str] = set()
        self._notes: list[str] = []
        self._steps = self._empty = self._nearly = self._zeros = 0

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step in.

        Args:
            metrics: `METRICS` by name.
        """
        candidates, masked = (sum(metrics[f"{kind}_{block}"] for block in BLOCKS) for kind in ("candidates", "masked"))
        self._steps += 1
        self._zeros = self._zeros + 1 if metrics["loss"] == 0 else 0
        if not self._config.loss.weight or (self._config.distillation.on and not candidates):
            pass  # the guide teaches, or scores do, and nothing is masked
        elif masked >= candidates:
            self._empty += 1
            nothing = f"step {step:,}: no candidate is left in the batch, and the step teaches nothing"
            if candidates and self._config.loss.mask == "soft":
                nothing = f"step {step:,}: no candidate of the batch has half of its weight left, and the step teaches little"
            self._say("empty", f"{nothing}: {self._cause(candidates)}")
        elif masked > NEARLY_ALL * candidates:
            self._nearly += 1
            share = f"{masked / candidates:.1%} of {candidates:,.0f} candidates are masked"
            self._say("nearly", f"step {step:,}: {share}: {self._cause(candidates)}")
        if self._zeros >= ZEROS_IN_A_ROW:
            zeros = f"step {step:,}: the loss was exactly 0 for {ZEROS_IN_A_ROW} steps"
            self._say("zeros", f"{zeros}: there is nothing to learn from these rows")

    def notes(self) -> list[str]:
        """What is to be said and was not yet."""
        notes, self._notes = self._notes, []
        return notes

    def summary(self) -> str | None:
        """What the steps of this process came to; None where all of them had something to teach."""
        left = "no candidate had half of its weight left" if self._config.loss.mask == "soft" else "no candidate was left"
        kinds = {left: self._empty, f"over {NEARLY_ALL:.0%} of the candidates were masked": self._nearly}
        parts = [f"in {count:,} of {self._steps:,} steps {what}" for what, count in kinds.items() if count]
        return f"these taught little or nothing: {'; '.join(parts)}" if parts else None

    def _cause(self, candidates: float) -> str:
        if not candidates:
            size = self._config.training.batch_size
            return f"rows without negatives in batches of {size} (training.batch_size) have nothing to contrast with"
        own = "they have the text of the row's own anchor or positive"
        if self._config.guide is None:
            return f"{own}: look for rows that are all equal"
        return f"the guide takes them for positives (loss.margin: {self._config.loss.margin:g}), or {own}"

    def _say(self, kind: str, note: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._notes.append(f"warning: {note}")
