"""How long a run trains, in what steps, and in what precision."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gist_train.config.fields import AboveOne, BatchTokens, Count, MisplacedError, Positive, Section, Seed


class SpikesConfig(Section):
    """Updates that are left out, since their gradient is far larger than those before: a bad row, or bad luck."""

    factor: AboveOne = 10.0
    """Largest norm of a gradient, in medians of the last 100 steps' norms; the first 20 steps are always taken."""
    at_most: Count = 20
    """Updates that are left out in a run; from then on all are taken."""


class TrainingConfig(Section):
    """Length, size and precision of the training."""

    batch_size: Count = 16
    """Triplets per optimizer step over all processes."""
    epochs: Count | None = 1
    """Passes over the data; sets the schedule; null where max_steps is given."""
    max_steps: Annotated[Count | None, Field(validate_default=True)] = None
    """Optimizer steps; sets the schedule, in place of epochs."""
    stop_at_step: Count | None = None
    """Optimizer step after which the run ends, the schedule untouched; null = the schedule's end."""
    precision: Literal["auto", "float32", "float64", "bf16", "fp16"] = "auto"
    """Number format of the encoder; auto = bf16 on a GPU that has it, else float32; fp16 is for CUDA devices without bf16.
    Float32 is whole: never TF32, whatever the environment says; so is the loss, which is float32 under bf16 and fp16 too. Under
    float64 all is float64, checkpoints and export included: 2.2 times as slow on a CPU, to tell rounding from a fault."""
    seed: Seed = 42
    """Seed of row order and dropout."""
    grad_clip: Positive | None = 1.0
    """Largest norm of the gradient; null = not clipped."""
    skip_spikes: SpikesConfig | None = None
    """Updates that are left out for the size of their gradient, before it is clipped; null = none."""
    max_tokens_per_forward: BatchTokens | None = None
    """Tokens that a process encodes at a time (padding counts only where a model needs it): for a larger batch the gradient is
    cached, at the price of one more forward pass; null = the whole batch at once. Changes speed and memory only, but that each
    chunk has dropout draws of its own."""
    gradient_checkpointing: bool = False
    """Whether each layer keeps its input alone, and is computed again in the backward pass; changes speed and memory only."""
    compile: bool = False
    """Whether torch.compile makes one graph of the encoder, at the start; on CUDA alone. Dropout draws other elements then, and
    bf16 is rounded elsewhere: as with precision, a run keeps to what it began with."""
    cuda_graph: bool = False
    """Whether whole steps are replayed from CUDA graphs, one for each size of batch: what a small batch on a fast GPU gains most
    by, with or without compile. On CUDA in bf16 or fp16, in one process; some 5 % more tokens are computed. A run keeps to it."""

    @model_validator(mode="before")
    @classmethod
    def _max_steps_replaces_default_epochs(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("max_steps") is not None and "epochs" not in given:
            return {**given, "epochs": None}
        return given

    # Checks of one field against another are on the later field: so they have a path, and run beside other fields' faults.
    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data:
            epochs = info.data["epochs"]
            if epochs is not None and max_steps is not None:
                fix = "both set the schedule: take one out, or set it to null (--set training.epochs=null)"
                raise MisplacedError(fix, path=(), found=str(max_steps), expected=f"null where epochs is {epochs}")
            if epochs is None and max_steps is None:
                raise ValueError("give epochs or max_steps: with neither the training has no end")
        return max_steps

    @field_validator("stop_at_step")
    @classmethod
    def _stops_within_schedule(cls, stop_at_step: int | None, info: ValidationInfo) -> int | None:
        max_steps = info.data.get("max_steps")  # absent where it is at fault itself
        if stop_at_step is not None and max_steps is not None and stop_at_step > max_steps:
            raise ValueError(f"training ends at max_steps ({max_steps}): lower stop_at_step or set it to null")
        return stop_at_step

    @field_validator("compile")
    @classmethod
    def _compiled_or_checkpointed(cls, compiled: bool, info: ValidationInfo) -> bool:
        if compiled and info.data.get("gradient_checkpointing"):  # absent where it is at fault itself
            raise ValueError("set this or gradient_checkpointing to false: a compiled graph chooses what it computes again")
        return compiled

    @field_validator("cuda_graph")
    @classmethod
    def _replayed_or_checkpointed(cls, replayed: bool, info: ValidationInfo) -> bool:
        if replayed and info.data.get("gradient_checkpointing"):
            raise ValueError(
                "set this or gradient_checkpointing to false: computing again reads the state of dropout from the host"
            )
        return replayed
