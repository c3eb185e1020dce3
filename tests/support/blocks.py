"""Blocks of code in README and docs/, and the folder that they run in: small models by the names that pages use, small files."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from accelerate.state import AcceleratorState

from support.running import gist

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "gist_train" / "quickstart"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = 64
BASE = {
    "model": {"name": "BAAI/bge-small-en-v1.5"},
    "guide": {"name": "WhereIsAI/UAE-Large-V1"},
    "data": {"train": [{"source": "jsonl", "path": "data/*.jsonl"}]},
    "training": {"batch_size": 2},
}
"""What a fragment of a YAML is put into."""


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str | None
    """Why it is not run; None where it is."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Those of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], m[3], m[1]) for m in BLOCK.finditer(text)]


def prepare(folder: Path, make_model: Callable[..., Path]) -> None:
    """Fills a folder with what pages name, and trains `my.yaml` there: 30 steps, three checkpoints, measured and unselected."""
    models = {
        "BAAI/bge-small-en-v1.5": make_model(width=384, layers=1, length=496, pooling="cls", normalize=True),
        "WhereIsAI/UAE-Large-V1": make_model(width=256, layers=1, cased=True, vocabulary=300, seed=1),
        "intfloat/e5-large-v2": make_model(width=32, layers=1, seed=2),
        "sentence-transformers/all-MiniLM-L6-v2": make_model(layers=6, length=112),
        "Qwen/Qwen3-Embedding-0.6B": make_model("qwen3", pooling="lasttoken"),
    }
    for name, built in models.items():
        shutil.copytree(built, folder / name)
    for name in ("examples", "configs", "benchmarks", "gist_train"):
        (folder / name).symlink_to(ROOT / name)
    _write_rows(folder)
    for name in ("train", "test"):
        lines = [json.loads(line) for line in (QUICKSTART / f"intents.{name}.jsonl").open(encoding="utf-8")]
        few = sorted({line["label"] for line in lines})[:6]
        labelled = [{"text": line["text"], "label": line["label"]} for line in lines if line["label"] in few]
        _write_json(folder / f"{name}.jsonl", labelled)
    shutil.copytree(QUICKSTART / "passages_test", folder / "scifact")
    shutil.copy(ROOT / "examples" / "rows" / "medi.json", folder / "medi-data.json")
    tasks = [
        {"type": "sts", "name": "stsb", "path": "stsb_dev.tsv"},
        {"type": "classification", "name": "b77", "train": "train.jsonl", "test": "test.jsonl"},
    ]
    config = {
        "name": "my-model",
        **BASE,
        "training": {"batch_size": 8, "max_steps": 30},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": 10},
        "evaluation": {"every": 10, "tasks": tasks},
        "selection": {"metric": {"stsb/spearman": 1.0}},
        "tracking": {"log_every": 5},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"), contextlib.chdir(folder):
        AcceleratorState._reset_state(reset_partial_state=True)
        ended = gist("train", "my.yaml")
        AcceleratorState._reset_state(reset_partial_state=True)
    assert ended.code == 0, ended.err


def _write_rows(folder: Path) -> None:
    """Rows in the shapes that pages have, all of the quickstart's texts."""
    lines = [json.loads(line) for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")]
    texts = [(line["text"], line["positive"][0]) for line in lines[: ROWS * 20 : 20]]
    negatives = [texts[(i + 7) % len(texts)][1] for i in range(len(texts))]
    pairs = [{"anchor": a, "positive": p} for a, p in texts]
    flag = [{"query": a, "pos": [p], "neg": [n]} for (a, p), n in zip(texts, negatives, strict=True)]
    _write_json(folder / "data" / "pairs.jsonl", pairs)
    _write_json(folder / "pairs.jsonl", pairs)
    _write_json(folder / "mined.jsonl", flag)
    _write_json(folder / "reranked.jsonl", [{**row, "pos_scores": [6.5], "neg_scores": [-2.0]} for row in flag])
    faq = [[a, p, n, i % 3 + 1, "en"] for i, ((a, p), n) in enumerate(zip(texts, negatives, strict=True))]
    _write_table(folder / "faq.csv", ["question", "answer", "negative", "clicks", "lang"], faq)
    _write_table(folder / "graded.csv", ["sentence1", "sentence2", "score"], [[a, p, i % 6] for i, (a, p) in enumerate(texts)])
    (folder / "texts.txt").write_text("".join(f"{a}\n" for a, _ in texts), encoding="utf-8")
    scored = "".join(f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip((a for a, _ in texts), negatives, strict=True)))
    (folder / "stsb_dev.tsv").write_text(f"sentence1\tsentence2\tscore\n{scored}", encoding="utf-8")
    every = sorted({text for pair in texts for text in pair})
    vectors = np.random.default_rng(0).normal(size=(len(every), 16)).astype(np.float32)
    pq.write_table(pa.table({"input": every, "text": every, "embedding": list(vectors)}), folder / "openai.parquet")


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell's block, which may go on behind a backslash or within quotes."""
    whole = ""
    for line in text.replace("\\\n", " ").splitlines():
        whole += line
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # a quote is open
            whole += "\n"
            continue
        if words:
            yield words
        whole = ""
