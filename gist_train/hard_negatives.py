"""Hard negatives for a corpus: looked for by all processes of a launch, and kept as a corpus of its own beside the first."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from gist_train.config.errors import Fault, UserError
from gist_train.config.hard_negatives import HardNegativesConfig
from gist_train.config.schema import Config
from gist_train.config.sources import TextsSource
from gist_train.data.collecting import with_negatives
from gist_train.data.corpus import Corpus
from gist_train.data.files import read_checked, read_json, whole_folder, write_checked, write_json
from gist_train.data.leases import locked
from gist_train.data.manifests import damage_in, seal
from gist_train.data.sharing import all_whole, missing_parts, shared_out
from gist_train.model.negatives import Counts, Guiding, Part, labels_of_texts, negatives_of, parts_of
from gist_train.progress import follow, say
from gist_train.training.guides import StoredGuide

VERSION = 1
"""Of the rules: another one finds other negatives."""
REPORT = "mined.json"


def with_rules(config: Config) -> Config:
    """The config with rules for hard negatives: its own, else the usual ones.

    Raises:
        UserError: no guide tells which texts are near, or rows are bare texts.
    """
    if config.data.hard_negatives is not None:
        return config
    if not config.guides:
        expected = "a guide, whose embeddings tell which texts are near"
        raise UserError(
            Fault("guide", str(config.guide or "null"), expected, "name a model, e.g. {name: WhereIsAI/UAE-Large-V1}")
        )
    if any(isinstance(source, TextsSource) for source in config.data.train):
        expected = "rows with a positive, which a negative is less similar than"
        raise UserError(Fault("data.train", "bare texts (source: texts)", expected, "leave them out here"))
    return config.model_copy(update={"data": config.data.model_copy(update={"hard_negatives": HardNegativesConfig()})})


def folder_of(corpus: Corpus, guide: StoredGuide, rules: HardNegativesConfig) -> Path:
    """Where the corpus is, or will be, whose rows have the negatives that `guide` finds for them."""
    # Documents are in the corpus' content, wherever they were read from.
    asked = [VERSION, corpus.content, guide.by_column, rules.model_dump(exclude={"documents"})]
    return corpus.folder.with_name(hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest())


def with_hard_negatives(
    corpus: Corpus, guide: StoredGuide, rules: HardNegativesConfig, device: torch.device, console: Console, *, shown: bool
) -> Corpus:
    """The corpus whose rows have the negatives that `guide` finds for them, made if no run has made it.

    Args:
        shown: whether this process says how far all of them are.
    """
    folder = folder_of(corpus, guide, rules)
    name = folder.name
    with locked(folder.parent, f".{name}.lock"):
        if (damage := damage_in(folder)) is not None:
            say(console, f"made anew: corpus {damage}")
            shutil.rmtree(folder)
    if not folder.exists():
        parts = list(parts_of(corpus, same_task=rules.same_task))
        done = folder.with_name(f".{name}.parts")
        work = _look(parts, done, folder, corpus, guide, rules, device)
        follow(work, "looking for hard negatives", corpus.row_count, console, shown=shown)
        with locked(folder.parent, f".{name}.lock"):
            if not folder.exists():
                _put_together(parts, done, folder, corpus, rules)
                shutil.rmtree(done)
    say(console, report(Corpus(folder)))
    return Corpus(folder)


def report(corpus: Corpus) -> str:
    """What the rules took and left, in a line."""
    mined = read_json(corpus.folder / REPORT)
    return counts_line(Counts(**mined["counts"]), HardNegativesConfig(**mined["rules"]))


def counts_line(counts: Counts, rules: HardNegativesConfig) -> str:
    """What became of candidates, in words."""
    first, last = rules.ranks
    taken = f"{counts.taken:,} for {counts.rows:,} rows, {counts.short:,} of which got fewer than {rules.per_row}"
    ruled = f"{counts.ahead:,} stood before rank {first}, {counts.near:,} were too near, {counts.left:,} were left"
    own = f"{counts.own:,} candidates were a row's own texts or had its label"
    return f"hard negatives: {taken}. Of the nearest {last} a row, {ruled}; {own}"


def _look(
    parts: list[Part],
    done: Path,
    folder: Path,
    corpus: Corpus,
    guide: StoredGuide,
    rules: HardNegativesConfig,
    device: torch.device,
) -> Iterator[int]:
    """Has all parts in `done`; yields how many rows are done by whomever."""
    labels, guiding = labels_of_texts(corpus), _guiding(guide, device)
    for number in shared_out(folder, done, len(parts), lambda: all_whole(done, len(parts))):
        yield corpus.row_count - sum(len(parts[other].rows) for other in missing_parts(folder, done, len(parts)))
        if number is not None:
            random = np.random.default_rng([rules.seed, number])
            chosen, counts = negatives_of(parts[number], corpus, guiding, labels, rules, random)
            content = io.BytesIO()
            np.savez(content, chosen=chosen, counts=astuple(counts))
            done.mkdir(parents=True, exist_ok=True)
            write_checked(done / str(number), content.getvalue())
    yield corpus.row_count


def _put_together(parts: list[Part], done: Path, folder: Path, corpus: Corpus, rules: HardNegativesConfig) -> None:
    chosen = np.full((corpus.row_count, rules.per_row), -1, np.int32)
    of_parts = []
    for number, part in enumerate(parts):
        arrays = np.load(io.BytesIO(read_checked(done / str(number)) or b""), allow_pickle=False)
        chosen[part.rows] = arrays["chosen"]
        of_parts.append(Counts(*arrays["counts"].tolist()))
    counts = Counts.of_all(of_parts)
    kept = np.flatnonzero(chosen[:, -1] >= 0) if rules.drop_short else np.arange(corpus.row_count)
    if not len(kept):
        none = f"true, and no row got {rules.per_row} negatives ({counts_line(counts, rules)})"
        fix = "lower margin or per_row, raise the last of ranks, or set same_task or drop_short to false"
        raise UserError(Fault("data.hard_negatives.drop_short", none, "true where rows are left", fix))
    with whole_folder(folder) as beside:
        with_negatives(corpus, beside, chosen, labels_of_texts(corpus), kept)
        write_json(beside / REPORT, {"rules": rules.model_dump(), "counts": asdict(counts), "of": corpus.content})
        seal(beside, {})


def _guiding(guide: StoredGuide, device: torch.device) -> Guiding:
    def candidates(ids: NDArray[np.int32]) -> Tensor:
        # A document that is a positive of some row was read after that prompt, else after the negatives'.
        there = guide.positive.hold(ids)
        if there.all():
            return guide.positive.embeddings(ids).to(device)
        vectors = torch.empty(len(ids), sum(guide.positive.widths))
        for chosen, texts in ((there, guide.positive), (~there, guide.negative)):
            if chosen.any():
                vectors[torch.from_numpy(chosen)] = texts.embeddings(ids[chosen])
        return vectors.to(device)

    return Guiding(
        lambda ids: guide.anchor.embeddings(ids).to(device), lambda ids: guide.positive.embeddings(ids).to(device), candidates
    )
