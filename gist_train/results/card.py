"""A run and one of its checkpoints -> the model's card: README.md, with the scores in the hub's model-index format."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from gist_train.citations import citations
from gist_train.config.evaluation import HELD_OUT, HELD_OUT_LABELS, EvaluationConfig
from gist_train.config.secrets import hidden
from gist_train.data.files import read_json
from gist_train.evaluation.leakage import leaks_of
from gist_train.evaluation.metrics import metric_of, task_of
from gist_train.evaluation.score_file import Terms, read_scores
from gist_train.results.example import Example
from gist_train.results.licences import Licence, licence_of, on_hub
from gist_train.results.onnx import OnnxReport
from gist_train.results.selected import Selected
from gist_train.results.selection_table import Change, changes, chosen_by, counted
from gist_train.run_folder import Run
from gist_train.training.schedule import Schedule, make_schedule
from gist_train.version import __version__

TAGS = ["sentence-transformers", "feature-extraction", "sentence-similarity", "gist-embed"]
TASK_TYPES = {
    "sts": "semantic-similarity",
    "retrieval": "information-retrieval",
    "classification": "text-classification",
    "clustering": "clustering",
    "pair": "binary-classification",
    "triplet": "triplet",
}
"""Kind of a task -> its type in a model index: what sentence-transformers' evaluators write, and the hub's own names."""
METRICS = {"sts": "{}_cosine", "retrieval": "cosine_{}"}
"""Kind of a task -> what sentence-transformers calls its metrics."""

OF_THIS_MACHINE = ("output_dir", "cache_dir", "tracking")
"""Keys of a config that say where its maker works, and nothing of the model."""
FOLDERS = re.compile(r"""(?:(?<=://)//?|(?<![^\s"'`(\[{<=:;,|])/)(?!/)(?:[^/\s"'`()\[\]{}<>,;|]+/)+""")
"""The way from the root to a file, within a text: after a space or a sign that ends a word, or after a scheme without a host."""


def model_card(
    run: Run,
    manifest: dict[str, Any],
    *,
    evaluation: EvaluationConfig | None = None,
    selected: Selected | None = None,
    onnx: OnnxReport | None = None,
    example: Example | None = None,
) -> str:
    """The README.md of a model: what it was made of, by which config, and its scores against the base's, falls too.

    Args:
        manifest: the checkpoint's.
        evaluation: whose scores are shown where the model was not chosen; None: the run's own.
        selected: how the model was chosen, and by which scores; None where it was named by its step.
        onnx: what was found out about the model in ONNX; None where it was not made.
        example: of how it is used, with what that prints.
    """
    config_text = run.config.read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    described, step = read_json(run.description), manifest["step"]
    if selected is not None:  # under the tasks and terms that it was chosen by
        evaluation, leaks = selected.evaluation, selected.leakage
        before, after = selected.base, selected.scores
    else:
        evaluation = evaluation or EvaluationConfig.model_validate(config["evaluation"])
        scores = read_scores(run, Terms.of(evaluation))
        before, after = scores.get(0, {}), scores.get(step, {})
        leaks = leaks_of(run, evaluation)
    config["evaluation"] = evaluation.model_dump(mode="json")
    changed = sorted(changes(before, after), key=lambda change: change.key)
    sources = list(zip(config["data"]["train"], described["data"], strict=True))
    # A card is shown to everybody. What is asked below of the parts is asked under their own names.
    shown = _without_folders(config)
    public = {key: value for key, value in yaml.safe_load(config_text).items() if key not in OF_THIS_MACHINE}
    config_text = yaml.safe_dump(_without_folders(public), sort_keys=False, allow_unicode=True)
    base = config["model"]
    base_licence = licence_of(base["name"], base["revision"])
    metadata = card_metadata(config, sources, changed, base_licence)
    metadata["gist_train"] = {
        "version": described["gist_train"],
        "run": config["name"],
        "step": step,
        "corpus": described["corpus"],
    }
    environment = Environment(
        loader=PackageLoader("gist_train", "results"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": _code, "text": _text, "block": _block, "json": _json}
    body = environment.get_template("card.md.jinja").render(
        name=config["name"],
        example=example,
        examples=described.get("examples", []),
        citations=citations(config),
        base=shown["model"],
        base_licence=base_licence,
        itself=config["guide"] == "self",
        guides=_guides(config["guide"], shown["guide"]),
        config=config,
        config_text=config_text.strip(),
        step=step,
        triplets=step * config["training"]["batch_size"],
        pooling=manifest["student"][1],
        normalized=manifest["student"][2],
        schedule=_schedule(config, described),
        sources=[(source, origin, _data_licence(source, origin)) for source, origin in sources],
        changes=changed,
        counted=counted(changed),
        selected=selected,
        chosen_by=None if selected is None else chosen_by(selected),
        runners_up=[] if selected is None else [other for other in selected.candidates[1:4] if other.behind is not None],
        leaks=leaks,
        onnx=onnx,
        run=described,
        version=__version__,
    )
    return hidden(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _guides(guide: Any, shown: Any) -> list[dict[str, Any]]:
    """Of each guide whose embeddings are stored, what is shown of it, and what is known of the model."""
    pairs = zip(guide, shown, strict=True) if isinstance(guide, list) else [(guide, shown)] if isinstance(guide, dict) else []
    return [
        {**of_shown}
        if "name" not in one
        else {
            **of_shown,
            "on_hub": on_hub(one["name"]),
            "read_after": _guide_prompt(one),
            "licence": licence_of(one["name"], one["revision"]),
        }
        for one, of_shown in pairs
    ]


def _guide_prompt(guide: dict[str, Any]) -> str:
    """What the guide read before the texts, as JSON or as prompts by column; "" for nothing."""
    if by_column := guide.get("prompts"):
        return ", ".join(f"{column} {json.dumps(prompt, ensure_ascii=False)}" for column, prompt in by_column.items())
    return json.dumps(guide["prompt"], ensure_ascii=False) if guide["prompt"] else ""


def _without_folders(value: Any) -> Any:
    """The same config, paths from the root of this machine cut to their last part, within a longer text and an address too: they
    say who trained it, and help nobody."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if Path(value).is_absolute() else FOLDERS.sub("", value)


def card_metadata(
    config: Mapping[str, Any],
    sources: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    changed: Sequence[Change],
    base_licence: Licence | None,
) -> ModelCardData:
    """What a program reads of the card: the hub's metadata, scores included. Only what is known is in it.

    Args:
        config: the run's, as plain values.
        sources: (entry of `data.train`, its origin in run.json).
    """
    held_out = {HELD_OUT: {"type": "retrieval"}, HELD_OUT_LABELS: {"type": "classification"}}
    kinds = held_out | {task["name"]: task for task in config["evaluation"]["tasks"]}
    results = [_result(change, kinds.get(task_of(change.key), {})) for change in changed]
    base = config["model"]["name"]
    # A folder of this machine means nothing to the hub, which links a base_model.
    linked = on_hub(base)
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        base_model=base if linked else None,
        base_model_relation="finetune" if linked else None,
        # A source that was read from the hub has a commit.
        datasets=list(dict.fromkeys(source["path"] for source, origin in sources if origin["commit"])) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=config["name"],
        eval_results=results or None,
    )
    if base_licence is not None:
        metadata["license"], metadata["license_name"] = base_licence.id, base_licence.name
    return metadata


def _result(change: Change, task: Mapping[str, Any]) -> EvalResult:
    """A score in the model index, named by sentence-transformers' habits; `task` is empty where the config has no such task.

    Source: `format_eval_metrics` of sentence-transformers' model cards.
    """
    name, metric = task_of(change.key), metric_of(change.key)
    kind = task.get("type", "")
    task_type = TASK_TYPES.get(kind, "feature-extraction")
    metric_type = METRICS.get(kind, "{}").format(metric)
    return EvalResult(
        task_type=task_type,
        task_name=task_type.replace("-", " ").title(),
        dataset_type=name,
        dataset_name=name.replace("_", " ").replace("-", " "),
        dataset_split=task.get("split"),
        metric_type=metric_type,
        metric_name=metric_type.replace("_", " ").title(),
        metric_value=change.after,
    )


def _schedule(config: Mapping[str, Any], described: Mapping[str, Any]) -> Schedule | None:
    """The run's schedule; None for a run.json of the days when it did not name the total."""
    if "total_steps" not in described:
        return None
    kind, lr, share = config["schedule"]["type"], config["optimizer"]["lr"], config["schedule"]["warmup_ratio"]
    return make_schedule(kind, lr, share, steps_per_epoch=0, epochs=None, max_steps=described["total_steps"])


def _data_licence(source: Mapping[str, Any], origin: Mapping[str, Any]) -> Licence | None:
    """Of a data set of the hub at the commit that was read, or of a local folder of one."""
    if origin["commit"]:
        return licence_of(source["path"], origin["commit"], "dataset")
    # A file's name may look like an id of the hub's, where somebody else's data set may have it.
    return None if on_hub(source["path"]) else licence_of(source["path"], None, "dataset")


def _code(text: str) -> str:
    """Any text as a code span, in which nothing is Markdown or HTML; also in a cell of a table."""
    line = " ".join(text.split()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def _text(text: str) -> str:
    """Text as it is, or as code where it holds a sign that Markdown or HTML might take for its own."""
    return _code(text) if re.search(r"[<>&`|\\\[\]*~\n\r]", text) else text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _block(text: str, language: str = "yaml") -> str:
    """A block of code, whatever backquotes are in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
