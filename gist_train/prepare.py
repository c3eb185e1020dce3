"""Sources -> corpus, tokens and guide store: what every command does of this by itself, each part once.

Any number of processes may call these functions at the same time: one holds the lock and works, the others wait for it and find
the work done. So no process waits in a collective operation, however long the guide takes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config, GuideConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Corpus, TokenTable, build_corpus, corpus_fingerprint
from gist_train.data.files import locked
from gist_train.model.guide import GuideStore, store_folder
from gist_train.model.pretrained import Pretrained, load_guide
from gist_train.training.loop import GuideLookup


def cache_folder(config: Config) -> Path:
    """Where corpora and guide stores are."""
    return Path(config.cache_dir) if config.cache_dir is not None else Path(config.output_dir) / ".cache"


def check_folders(config: Config) -> None:
    """Makes the folders that a run writes to.

    Raises:
        UserError: they can't be made or written to.
    """
    for key, folder in (("output_dir", Path(config.output_dir)), ("cache_dir", cache_folder(config))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            found = f'"{folder}": {error.strerror}'
        else:
            found = f'"{folder}", which can\'t be written to'
            if writable:
                continue
        raise UserError(Fault(key, found, "a folder that can be made and written to", f"name another folder in {key}"))


def prepare_corpus(config: Config, console: Console) -> Corpus:
    """The corpus of `config.data`, built if no other run has.

    Raises:
        UserError: the sources can't be read, or a row is bad.
    """
    fingerprint = corpus_fingerprint(config.data)
    corpora = cache_folder(config) / "corpora"
    folder = corpora / fingerprint
    if not folder.exists():
        with locked(corpora):
            if not folder.exists():
                _follow(build_corpus(folder, config.data, fingerprint), "reading rows", None, console)
    corpus = Corpus(folder)
    if skipped := corpus.meta["skipped_rows"]:
        console.print(f"{skipped:,} rows were skipped: {folder / 'skipped.jsonl'} says which and why")
    return corpus


def prepare_tokens(corpus: Corpus, student: Pretrained, console: Console) -> TokenTable:
    """The student's token ids of every view of the corpus, made if no other run has."""
    fingerprint = student.tokenizer_fingerprint()
    if not corpus.has_tokens(fingerprint):
        with locked(corpus.folder):
            if not corpus.has_tokens(fingerprint):
                counts = corpus.add_tokens(student.tokens, student.vocabulary_size(), fingerprint)
                _follow(counts, "tokenising texts", corpus.view_count, console)
    return corpus.tokens(fingerprint)


def prepare_guide(config: Config, corpus: Corpus, device: torch.device, console: Console) -> GuideLookup | str | None:
    """The guide's embeddings of the corpus' texts; those that no run has embedded yet are embedded on `device`.

    Raises:
        UserError: the guide can't be loaded, or its store is damaged.
    """
    if not isinstance(config.guide, GuideConfig):
        return config.guide
    folder = store_folder(cache_folder(config), config.guide)
    store = GuideStore(folder)
    positions = store.positions(corpus.hashes)
    if (positions < 0).any():
        with locked(folder):
            store = GuideStore(folder)  # somebody else may have filled it while this process waited
            missing = int((store.positions(corpus.hashes) < 0).sum())
            if missing:
                guide = load_guide(config.guide)
                guide.encoder.to(device)
                counts = store.fill(guide, config.guide, corpus.hashes, corpus.text_lengths(), corpus.text)
                _follow(counts, "embedding with the guide", missing, console)
        positions = store.positions(corpus.hashes)
    return GuideLookup(store, positions)


def batch_plan(config: Config, corpus: Corpus) -> BatchPlan:
    """The batch plan of `config` over `corpus`.

    Raises:
        UserError: the rows give no whole batch.
    """
    try:
        return BatchPlan(
            task=corpus.task,
            anchor=corpus.anchor,
            positive=corpus.positive,
            positive_offsets=corpus.positive_offsets,
            batching=config.data.batching,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
        )
    except ValueError as error:
        raise UserError(
            Fault(
                "training.batch_size",
                f"{config.training.batch_size}; {error} from {', '.join(source.path for source in config.data.train)}",
                "a size of which the data has one whole batch at least",
                "lower training.batch_size or add rows",
            )
        ) from None


def _follow(counts: Iterator[int], what: str, total: int | None, console: Console) -> None:
    """Runs `counts` to its end behind a progress bar, or between two lines where there is no terminal to draw one on.

    Also on a process whose console is quiet: whoever got the lock and works is the only one that can show it.
    """
    quiet, console.quiet = console.quiet, False
    if not console.is_terminal:
        console.print(what if total is None else f"{what}: {total:,} to do")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        done = 0
        for done in counts:
            bar.update(task, completed=done)
        bar.update(task, total=done, completed=done)
    if not console.is_terminal:
        console.print(f"{what}: {done:,} done", highlight=False)
    console.quiet = quiet
