"""What pydantic finds wrong with a config, in the user's words: where it was written, what was found, what is allowed."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gist_train.config.errors import Fault, shown
from gist_train.config.fields import MisplacedError
from gist_train.config.schema import Config

KeyPath: TypeAlias = tuple[str | int, ...]
# Where the value at a path was written: the file and the line in it, or the `--set`.
Origins: TypeAlias = dict[KeyPath, tuple[str, int | None]]


def fault_of(error: ErrorDetails, origins: Origins) -> Fault:
    """One error of pydantic in the user's words."""
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        path, hint, _ = _trace(error["loc"][:-1])
        key, keys = str(error["loc"][-1]), list(models_in(hint)[0].model_fields)
        return Fault(where_written((*path, key), origins), f'an unknown key, "{key}"', joined(keys), _fix_key(key, keys))
    path, hint, about = _trace(error["loc"])
    words = allowed_words(hint)
    if kind.startswith("union_tag_") and isinstance(given, dict):
        tag_key = tag_field(models_in(hint)[0])
        path, words, about = (
            (*path, tag_key),
            [tag_of(model) for model in models_in(hint)],
            "it decides which other keys there are",
        )
        kind, given = ("literal_error", given[tag_key]) if tag_key in given else ("missing", None)
    found = "nothing" if kind == "missing" else found_words(given)
    fix = f"give what is expected. The field: {about}"
    if kind == "missing":
        fix = f"add the key {path[-1]}: {about}"
    elif kind == "value_error":
        wrong = error["ctx"]["error"]
        fix = str(wrong)
        if isinstance(wrong, MisplacedError):  # the fault is deeper down than the key that pydantic judged, or under another
            path = wrong.path if wrong.from_top else (*path, *wrong.path)
            found, words = wrong.found, [wrong.expected]
    elif isinstance(given, str) and given.lower() == "none" and "null" in words:
        fix = "did you mean null?"
    elif isinstance(given, str) and (close := get_close_matches(given.lower(), words, 1)):
        fix = f'did you mean "{close[0]}"?'
    elif isinstance(given, str) and any("name" in model.model_fields for model in models_in(hint)):
        fix = f"write {{name: {shown(given, 300)}}}"
    elif (
        kind in ("int_type", "float_type") and isinstance(given, str) and re.fullmatch(r"[-+]?[0-9_.,]+([eE][-+]?[0-9]+)?", given)
    ):
        fix = "write the number without quotes, underscores and commas"
    elif kind == "string_type" and isinstance(given, int | float):
        fix = "put the text in quotes"
    return Fault(where_written(path, origins), found, joined(words), fix)


ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size, of all devices together",
    "train_batch_size": "training.batch_size",
    "mini_batch_size": "training.max_tokens_per_forward, in tokens",
    "gradient_accumulation_steps": "training.max_tokens_per_forward, which gives the whole batch's loss",
    "max_grad_norm": "training.grad_clip",
    "bf16": "training.precision: bf16",
    "fp16": "training.precision: fp16",
    "torch_compile": "training.compile",
    "batch_sampler": "data.batching",
    "warmup_ratio": "schedule.warmup_ratio",
    "warmup_steps": "schedule.warmup_ratio, a share of all steps",
    "lr_scheduler_type": "schedule.type",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "guide_model": "guide.name",
    "max_seq_length": "model.max_length",
    "temp": "loss.temperature",
    "scale": "loss.temperature, which is 1 / scale",
    "matryoshka_dims": "loss.dimensions",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "evaluation.every",
    "logging_steps": "tracking.log_every",
    "report_to": "tracking.wandb, tracking.tensorboard, tracking.mlflow or tracking.trackio",
    "metric_for_best_model": "selection.metric",
    "load_best_model_at_end": "selection.metric: the best checkpoint by it is kept, and gist-train select chooses it",
    "train_file": "data.train",
    "dataset": "data.train",
    "datasets": "data.train",
    "prompts": "prompts of each source of data.train, and of each task of evaluation.tasks",
}
"""Keys of sentence-transformers, transformers and FlagEmbedding -> where it is set here."""


def _fix_key(key: str, keys: list[str]) -> str:
    if key in ("device", "no_cuda", "use_cpu"):
        return "remove the key: CUDA_VISIBLE_DEVICES chooses GPUs, ACCELERATE_USE_CPU=true the CPU"
    if key in ELSEWHERE:
        return f"here it is {ELSEWHERE[key]}"
    if close := get_close_matches(key, keys, 1):
        return f'did you mean "{close[0]}"?'
    sections = [
        name for name in Config.model_fields if any(key in model.model_fields for model in models_in(hints_of(Config)[name]))
    ]
    return f"did you mean {joined([f'{section}.{key}' for section in sections])}?" if sections else "remove the key"


def _trace(loc: tuple[int | str, ...]) -> tuple[KeyPath, Any, str]:
    """Path, type and docstring of what pydantic's `loc` points at; the path leaves out unions' tags, which no user wrote."""
    path: KeyPath = ()
    hint: Any = Config
    about = ""
    for part in loc:
        if isinstance(part, int):
            path = (*path, part)
            hint = next(get_args(option)[0] for option in options_of(hint) if get_origin(option) is list)
            continue
        models = models_in(hint)
        mapping = next((option for option in options_of(hint) if get_origin(option) is dict), None)
        if not models and mapping is not None:  # a key of the user's own
            path, hint = (*path, part), get_args(mapping)[1]
        elif len(models) > 1:
            # Else it is the tag of a list, in which the next part counts.
            hint = next((model for model in models if part in (tag_of(model), model.__name__)), hint)
        elif part in models[0].model_fields:
            path = (*path, part)
            hint, about = hints_of(models[0])[part], models[0].model_fields[part].description or ""
        else:  # the tag of a union with one model in it
            hint = models[0]
    return path, hint, about


def hints_of(model: type[BaseModel]) -> dict[str, Any]:
    return get_type_hints(model, include_extras=True)


def options_of(hint: Any) -> list[Any]:
    """The alternatives of a type."""
    if get_origin(hint) is Annotated:
        return options_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [option for alternative in get_args(hint) for option in options_of(alternative)]
    return [hint]


def models_in(hint: Any) -> list[type[BaseModel]]:
    return [option for option in options_of(hint) if isinstance(option, type) and issubclass(option, BaseModel)]


def tag_field(model: type[BaseModel]) -> str:
    """The field that tells the models of a union apart: it comes first."""
    return next(iter(model.model_fields))


def tag_of(model: type[BaseModel]) -> str:
    return str(model.model_fields[tag_field(model)].default)


def allowed_words(hint: Any) -> list[str]:
    """What a type allows, one entry an alternative."""
    if get_origin(hint) is Annotated:
        return [extra for extra in get_args(hint)[1:] if isinstance(extra, str)] or allowed_words(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [word for alternative in get_args(hint) for word in allowed_words(alternative)]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if models := models_in(hint):
        return [f"a mapping (keys: {', '.join(models[0].model_fields)})"]
    return {bool: ["true", "false"], int: ["a whole number"], float: ["a finite number"], str: ["text"], type(None): ["null"]}[
        hint
    ]


def joined(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def found_words(value: object) -> str:
    """`value` as YAML writes it, in characters that any terminal takes."""
    words = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else shown(value)
    return words.encode(errors="backslashreplace").decode()


def dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def where_written(path: KeyPath, origins: Origins) -> str:
    """File or `--set`, path and line: those of the nearest level above where the path itself was not written."""
    written = next(path[:length] for length in range(len(path), -1, -1) if path[:length] in origins)
    source, line = origins[written]
    return f"{source}: {dotted(path)}" + (f" (line {line})" if line else "")
