"""What a training does at some steps besides the step: checkpoints, and evaluations that may end it."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from gist_train.config.errors import UserError
from gist_train.config.schema import Config
from gist_train.data.files import no_room
from gist_train.evaluation.measuring import Measuring, main_metrics, scores_line
from gist_train.progress import say
from gist_train.results.early_stopping import best_saved, out_of_patience
from gist_train.results.ranking import weighted_score
from gist_train.results.selected import selected_steps
from gist_train.run_folder import Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.checkpoint_writer import CheckpointWriter
from gist_train.training.display import Display
from gist_train.training.ranks import Ranks
from gist_train.training.runlog import RunLog
from gist_train.training.setup import Job
from gist_train.training.signals import Stopped, StopSignal
from gist_train.training.team import RankTeam


@dataclass(frozen=True, slots=True)
class Milestones:
    """What is done at some steps besides the step: checkpoints, which another thread writes, and evaluations."""

    config: Config
    ranks: Ranks
    run: Run
    job: Job
    measuring: Measuring
    log: RunLog
    writer: CheckpointWriter
    signals: StopSignal
    console: Console
    display: Display

    def save(self) -> None:
        """Copies what a checkpoint holds. It is whole after the next `settle`, and so are the metrics up to it."""
        self.settle()
        with self.log.waiting():
            after = partial(_retire, self.run, self.config, self.measuring)
            self.writer.save(self.log.sums(), before=self.log.sync, after=after)

    def settle(self) -> None:
        """Waits for the checkpoint under way. Where it could not be written, all ranks end.

        Raises:
            Exception: what kept the first process from writing it.
        """
        with self.log.waiting():
            if failure := self.writer.wait():
                raise failure
            self.ranks.first_says("")

    def measure(self, step: int) -> bool:
        """Whether the run ends here, for want of a rise: all measure, and the first process decides."""
        ends = False
        try:
            if self.measuring.tasks:
                ends = self._scored(step)
        except (Stopped, KeyboardInterrupt):  # noted, and asked for before the next step
            self.console.print(f"evaluation of step {step:,} left: it is done when the run goes on", highlight=False)
        return self.ranks.first_says("ends" if ends else "") == "ends"

    def _scored(self, step: int) -> bool:
        """This process' part in the evaluation; on the first one, whether patience ran out."""
        team = RankTeam(self.ranks, self.signals) if self.ranks.size > 1 else None
        if team is not None and team.rank != 0:
            self.measuring.help_with_step(self.job.student, team)
            return False
        try:
            # A checkpoint of the step is whole: one process has nothing to wait for, several leave together.
            with self.signals.noted(False) if team is None else nullcontext():
                scores = self.measuring.of_step(self.run, step, self.job.student, team)
        except OSError as error:
            if not no_room(error):
                raise
            # They are measured again when the run goes on, or by gist-train evaluate.
            say(self.console, f"warning: {error}. The scores of step {step:,} are not kept.")
            return False
        self.log.add_scores(step, scores)
        name = f"step {step:,}" if step else "base"
        base = self.measuring.known(self.run).get(0) if step else None
        self.console.print(scores_line(name, scores, base), highlight=False)
        metric = self.config.selection.metric or dict.fromkeys(main_metrics(scores), 1.0)
        known = base is not None and base.keys() >= metric.keys()
        self.display.judge(weighted_score(scores, metric), weighted_score(base, metric) if base and known else None)
        return out_of_patience(self.config, self.run, self.measuring, step)


def _retire(run: Run, config: Config, measuring: Measuring) -> None:
    try:
        kept = {*selected_steps(run), best_saved(config, run, measuring)}
    except UserError:  # selected.json was spoilt meanwhile: training continues, and deletes nothing
        return
    checkpoints.retire_checkpoints(
        run,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        kept=lambda step: step in kept or checkpoints.in_window(config.selection, step),
    )
