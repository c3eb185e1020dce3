"""Checkpoints: a model folder with the optimizer's moments beside the weights; whole, verified, without pickle.

A checkpoint is written beside its place, synced and renamed, so that it is whole or does not exist; data/manifests.py seals it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.schema import SelectionConfig
from gist_train.data.files import read_json, whole_folder
from gist_train.data.manifests import seal, verified_manifest
from gist_train.model.adapters import adapted, load_adapters
from gist_train.model.pretrained import Pretrained
from gist_train.progress import say
from gist_train.run_folder import MANIFEST, TRAINING_STATE, Run
from gist_train.training.distributed import send_from_first
from gist_train.training.update import UpdateState


@dataclass(frozen=True, slots=True)
class LogSums:
    """What a run knows besides weights and moments, as JSON in the manifest: sums since the last row of metrics.jsonl."""

    step: int
    """Updates so far."""
    loss_sum: float = 0.0
    """Of the losses of the steps since that row."""
    loss_steps: int = 0
    """How many these are."""
    tokens: int = 0
    """Real tokens of these steps."""
    computed_tokens: int = 0
    """Tokens that the student computed in these steps, padding included."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What tells whether a resume is the same mathematics over the same content, as JSON in the manifest."""

    config_sha256: str
    """Of the resolved YAML."""
    mathematics: dict[str, object]
    """Dotted key -> value of each field that alters the mathematics: `config.schema.mathematics`."""
    corpus: str
    """Fingerprint of its content."""
    guide: str | None
    """Fingerprint of its store; "self"; None for no guide."""
    precision: str
    """float32, bf16 or fp16."""
    student: tuple[str, str, bool]
    """Its tokenizer's fingerprint, its pooling, and whether its embeddings have length 1."""
    processes: int
    """Of the run; no resume compares it."""
    base: str | None = None
    """Fingerprint of the weights under adapters, which the checkpoint does not hold; None where it holds all."""


def sums_of(manifest: dict[str, Any]) -> LogSums:
    """The sums that a checkpoint's manifest holds."""
    return LogSums(**{field.name: manifest[field.name] for field in fields(LogSums)})


def save_checkpoint(run: Run, student: Pretrained, moments: dict[str, torch.Tensor], sums: LogSums, facts: Facts) -> Path:
    """Writes the checkpoint of `sums.step`.

    Args:
        student: the weights of that step, the live ones or a copy.
        moments: what `moments_of` gave at that step, or a copy.
        facts: what a resume compares, kept in the manifest.
    """
    folder = run.checkpoint(sums.step)
    with whole_folder(folder) as partial:
        student.save(partial)
        save_file(moments, partial / TRAINING_STATE)
        seal(partial, {**asdict(sums), **asdict(facts)})
    return folder


def moments_of(student: Pretrained, optimizer: torch.optim.Optimizer, state: UpdateState) -> dict[str, torch.Tensor]:
    """AdamW's two moments by the name of their weight, and what `state` holds: the live ones, where they are.

    AdamW's step count is the manifest's step, less the updates that were skipped.
    """
    moments = state.parts()
    for name, parameter in _trained(student):
        if parameter not in optimizer.state:  # no loss ever reached it: some models have such weights
            continue
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[f"{moment}.{name}"] = optimizer.state[parameter][moment].detach().contiguous()
    return moments


def _trained(student: Pretrained) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in student.encoder.transformer.named_parameters() if p.requires_grad]


def load_checkpoint(folder: Path, student: Pretrained, optimizer: torch.optim.Optimizer, state: UpdateState) -> None:
    """Puts what a verified checkpoint holds into `student`, `optimizer` and `state`, bit for bit.

    Raises:
        UserError: the checkpoint holds other weights than the student has.
    """
    transformer = student.encoder.transformer
    if adapted(transformer):
        load_adapters(transformer, folder)
    else:
        _load_weights(folder, transformer)
    with safe_open(folder / TRAINING_STATE, framework="pt") as moments:
        saved_names = set(moments.keys())
        for name, value in state.parts().items():
            value.copy_(moments.get_tensor(name))
        step = torch.tensor(float(read_json(folder / MANIFEST)["step"] - state.skipped()))
        for name, parameter in _trained(student):
            if f"exp_avg.{name}" not in saved_names:
                continue
            of_weight = {key: moments.get_tensor(f"{key}.{name}").to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            # Fused AdamW counts steps on the device of the weight.
            optimizer.state[parameter] = {"step": step.to(parameter.device, copy=True), **of_weight}


def _load_weights(folder: Path, transformer: Any) -> None:
    saved = type(transformer).from_pretrained(folder, dtype=transformer.dtype)
    with torch.no_grad():
        own, loaded = transformer.state_dict(), saved.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in loaded.items()}:
            raise UserError(
                Fault(
                    f"checkpoint {folder}",
                    "weights of another shape",
                    "those of model.name",
                    "resume with the model it was made of",
                )
            )
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def send_checkpoint(student: Pretrained, optimizer: torch.optim.Optimizer, state: UpdateState, step: int) -> None:
    """Gives all ranks what the first one loaded of the checkpoint of `step`: a host without a shared disk has none."""
    with torch.no_grad():
        for tensor in (*student.encoder.transformer.state_dict().values(), *state.parts().values()):
            send_from_first(tensor)
        trained = _trained(student)
        moved = torch.tensor([int(parameter in optimizer.state) for _, parameter in trained])
        send_from_first(moved)
        counted = torch.tensor(float(step - state.skipped()))
        for (_, parameter), has in zip(trained, moved.tolist(), strict=True):
            if has:
                of_weight = optimizer.state[parameter]
                for key in ("exp_avg", "exp_avg_sq"):
                    of_weight.setdefault(key, torch.zeros_like(parameter))
                    send_from_first(of_weight[key])
                of_weight["step"] = counted.to(parameter.device, copy=True)


def retire_checkpoints(run: Run, *, keep_last: int, keep_every: int | None, kept: Callable[[int], bool]) -> list[int]:
    """Deletes the checkpoints that nothing keeps, after the newest is whole, and returns their steps.

    Args:
        keep_last: newest checkpoints that stay, at least one.
        keep_every: multiples of this many steps stay; None for no such rule.
        kept: what else stays: the window around a selection, and what was selected.
    """
    steps = run.saved_steps()
    staying = steps_to_keep(steps, keep_last=keep_last, keep_every=keep_every, kept=kept)
    retired = [step for step in steps if step not in staying]
    for step in retired:
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        folder = run.checkpoint(step)
        going = folder.with_name(f".{folder.name}.going")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)
    return retired


def steps_to_keep(steps: Sequence[int], *, keep_last: int, keep_every: int | None, kept: Callable[[int], bool]) -> list[int]:
    """Of the ascending `steps` that have a checkpoint, those that `retire_checkpoints` leaves."""
    newest = steps[-keep_last:]
    return [step for step in steps if step in newest or (keep_every and step % keep_every == 0) or kept(step)]


def in_window(selection: SelectionConfig, step: int) -> bool:
    """Whether a checkpoint of this step is near enough to the step to choose around."""
    return selection.around is not None and abs(step - selection.around) <= selection.window


def sweep(run: Run) -> None:
    """Deletes what processes that were killed left half written or half deleted. The caller is the run's only writer."""
    for leftover in run.unfinished_checkpoints():
        shutil.rmtree(leftover)


def set_aside_later(run: Run, step: int) -> Path | None:
    """Moves the checkpoints after `step`, from which a run that goes back to it parts, to a folder beside them.

    What is named like a checkpoint and is none goes with them: one will be written there. The newest goes first: whatever has
    moved when this is interrupted, the run is at its newest checkpoint. Returns that folder; None where there is nothing later.
    """
    later = [entry for saved, entry in run.named_as_checkpoints() if saved > step]
    if not later:
        return None
    aside = run.set_aside(time.time_ns())
    aside.mkdir()
    for entry in reversed(later):
        entry.rename(aside / entry.name)
    return aside


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint every file of which has been read and is as it was written."""

    folder: Path
    manifest: dict[str, Any]


def checkpoint_to_resume(run: Run, step: int | None, console: Console) -> Checkpoint | None:
    """The checkpoint of `step`, or the newest whole one for None; None where the run has none yet.

    Args:
        console: where it is said which ones are passed over, and why.

    Raises:
        UserError: no checkpoint of that step, in which case the nearest ones are named; or a damaged one; or none is whole.
    """
    steps = run.saved_steps()
    if step is not None:
        if step not in steps:
            raise no_such_step(run, step, steps)
        return Checkpoint(run.checkpoint(step), verified_manifest(run.checkpoint(step)))
    faults: list[Fault] = []
    for number, entry in reversed(run.named_as_checkpoints()):
        if number not in steps:
            say(console, f"passed over: {entry}: no checkpoint, for it has no {MANIFEST}")
            continue
        try:
            whole = Checkpoint(entry, verified_manifest(entry))
        except UserError as error:
            faults += error.faults
        else:
            for fault in faults:
                say(console, f"passed over: {fault.where}: {fault.found}; it should be {fault.expected}")
            return whole
    if faults:
        raise UserError(*faults)
    return None


def no_such_step(run: Run, step: int, steps: Sequence[int]) -> UserError:
    """The error that names the checkpoints nearest to a step that has none."""
    nearest = sorted(sorted(steps, key=lambda s: abs(s - step))[:3])
    expected = (
        f"a step with a checkpoint, such as {', '.join(map(str, nearest))}" if nearest else "none: the run has no checkpoint"
    )
    return UserError(Fault(f"{run}: step {step}", shown(step), expected, "name one of these" if nearest else "train first"))


def no_checkpoint(run: Run) -> UserError:
    """The error of a run that was never trained up to a checkpoint."""
    return UserError(Fault(str(run.checkpoints), "no checkpoint", "one at least", "train first"))
