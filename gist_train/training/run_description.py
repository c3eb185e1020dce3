"""A run described in its own folder: config.yaml and run.json."""

import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from gist_train.config.loading import resolved_yaml
from gist_train.config.schema import Config
from gist_train.data.corpus import Corpus
from gist_train.data.files import whole_folder, write_json, write_text
from gist_train.data.opening import origin_of
from gist_train.evaluation.held_out import held_out_folder
from gist_train.evaluation.leakage import Leak
from gist_train.run_folder import Run
from gist_train.training.setup import Job
from gist_train.version import __version__

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")

EXAMPLES, SHOWN = 3, 200
"""Rows that a description has of the data, and characters of each of their texts."""


def describe(run: Run, config: Config, accelerator: Accelerator, job: Job, leakage: Sequence[Leak]) -> None:
    """Writes config.yaml and run.json of a run folder, which is made where there is none.

    Args:
        leakage: what the training rows share with evaluation tasks.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if config.evaluation.held_out is not None:
        drawn = held_out_folder(config, config.evaluation.held_out)
        if drawn != run.held_out:  # the data may have changed when the run is evaluated
            with whole_folder(run.held_out, replace=True) as beside:
                shutil.copytree(drawn, beside, dirs_exist_ok=True)
    write_text(run.config, resolved_yaml(config))
    described = {
        "gist_train": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": job.facts.precision,
        "corpus": job.facts.corpus,
        "data": _sources(config, job.training.corpus),
        "examples": _examples(job.training.corpus),
        "excluded": {"rows": job.training.corpus.excluded_rows, "texts": job.training.corpus.excluded_texts},
        "leakage": [asdict(leak) for leak in leakage],
        "guide": job.facts.guide,
        "total_steps": job.training.schedule.total_steps,
        "stop": job.stop,
        "started": time.time(),
        "command": sys.argv,
    }
    write_json(run.description, described)


def _examples(corpus: Corpus) -> list[dict[str, str]]:
    """Rows to show: `EXAMPLES`, or fewer, at even distances, each text cut to `SHOWN` characters."""
    count = min(EXAMPLES, corpus.row_count)
    return [_row(corpus, corpus.row_count * number // count) for number in range(count)]


def _row(corpus: Corpus, row: int) -> dict[str, str]:
    texts = {"anchor": int(corpus.anchor[row]), "positive": int(corpus.positive[corpus.positive_offsets[row]])}
    if corpus.negative_offsets[row] < corpus.negative_offsets[row + 1]:
        texts["negative"] = int(corpus.negative[corpus.negative_offsets[row]])
    cut = {part: text if len(text := corpus.text(number)) <= SHOWN else f"{text[: SHOWN - 1]}…" for part, number in texts.items()}
    return {"task": corpus.tasks[int(corpus.task[row])], **cut}


def _sources(config: Config, corpus: Corpus) -> list[dict[str, Any]]:
    """`name`, `commit` and `rows` of each source; rows are those that were left to train on.

    Names are this config's: the corpus may be one that another built of files with the same content and other names.
    """
    rows = np.bincount(corpus.source, minlength=len(config.data.train)).tolist()
    origins = [origin_of(source, f"data.train[{index}]") for index, source in enumerate(config.data.train)]
    return [{**origin, "rows": left} for origin, left in zip(origins, rows, strict=True)]
