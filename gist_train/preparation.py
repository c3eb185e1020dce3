"""A config -> student, corpus, batch plan, tokens and guide: what every command needs of this, each part made once.

Any number of processes may call these functions at the same time. They share what a guide embeds and what is tokenised; of all
else one holds the lock and works, the others wait for it and find the work done. None waits in a collective operation, however
long the guide takes.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from gist_train.checks import check_device, check_student, report_device
from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.models import GuideConfig, StoredModelConfig
from gist_train.config.schema import Config, DataConfig, cache_folder, training_prompts
from gist_train.config.sources import ClassificationSource
from gist_train.data.building import SHOWN_FAULTS, build_corpus, labelled_texts, read_together, refuse_bad
from gist_train.data.caches import mark_used
from gist_train.data.corpus import Corpus, TokenTable, text_hashes
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint
from gist_train.data.held_out import held_out_texts
from gist_train.data.leases import locked
from gist_train.data.manifests import damage_in
from gist_train.data.overlap import Exclusion, normalized_hash
from gist_train.data.tokenising import tokenise_together
from gist_train.hard_negatives import folder_of, with_hard_negatives
from gist_train.model.guide import GuideStore, store_folder
from gist_train.model.loading import load_student
from gist_train.model.pretrained import Pretrained
from gist_train.progress import follow, say
from gist_train.pulse import waiting
from gist_train.suspects import Looked, without_suspects
from gist_train.training.batching import batch_plan, check_candidates
from gist_train.training.embedding import ALONE, Embedder, Processes, check_guide, guide_as_stored, prepare_guide
from gist_train.training.guides import StoredGuide, parts_of_all
from gist_train.training.setup import Prepared

SHOWN_SOURCES = 20
"""Sources whose rows are described before a training."""


def prepare(
    config: Config,
    device: torch.device,
    console: Console,
    processes: Processes = ALONE,
    *,
    trains_here: bool = False,
    fill_store: bool = True,
    refuse: Callable[[Corpus], None] | None = None,
) -> Prepared:
    """All that a run reads, made where no run has made it yet.

    Args:
        device: of this process; labelled texts and the guide's are embedded on it.
        processes: of this run. All of them call this, each with a device of its own.
        trains_here: whether steps are taken on this device: what it can't do is then refused, and said else.
        fill_store: whether the guide embeds what its store lacks. If not, the guide is None where it lacks something.
        refuse: raises UserError where a run can't go on with this corpus, before the guide is put to work on it.

    Raises:
        UserError: data or models are not what the config says.
    """
    student, corpus = student_and_corpus(config, device, console, processes, trains_here=trains_here)
    corpus = drop_suspects(config, corpus, student, device, console, processes, look=fill_store)
    corpus = add_hard_negatives(config, corpus, device, console, processes, look=fill_store)
    if refuse is not None:
        refuse(corpus)
    check_candidates(config, corpus)
    plan = batch_plan(config, corpus)  # refuses too few rows, before the guide is put to work
    tokens = prepare_tokens(corpus, student, console, processes)
    guide = prepare_guide(config, corpus, device, console, processes) if fill_store else guide_as_stored(config, corpus)
    if config.data.batching == "similar":
        plan = batch_plan(config, corpus, guide)
    prepared = Prepared(student, corpus, plan, tokens, guide)
    for folder in prepared.folders():
        mark_used(folder)
    return prepared


def student_and_corpus(
    config: Config, device: torch.device, console: Console, processes: Processes = ALONE, *, trains_here: bool = False
) -> tuple[Pretrained, Corpus]:
    """The student, checked, and the corpus as its sources have it; what both are is said.

    Arguments and errors are those of `prepare`.
    """
    with waiting():  # for another rank, where both fetch it from the hub
        student = load_student(config.model, training_prompts(config))
    check_student(config, student)
    for note in notes_on(student, training_prompts(config)):
        say(console, note)
    if trains_here:
        check_device(config, student, device, processes.count)
    else:
        report_device(config, student, device, console)
    check_guide(config)
    corpus = prepare_corpus(config, device, console, processes)
    for index, source in enumerate(rows_of_sources(config, corpus)[:SHOWN_SOURCES]):
        say(console, f"data.train[{index}] ({source.path}): {source}")
        if source.unread_columns:
            say(console, f"data.train[{index}]: columns that are not read: {listed(source.unread_columns)}")
    return student, corpus


@dataclass(frozen=True, slots=True)
class SourceRows:
    """An entry of data.train, and the rows that are trained of it."""

    source: str
    """Kind of the source."""
    path: str
    rows: int
    rows_by_negatives: dict[int, int]
    """Negatives of a row -> rows that have so many."""
    rows_with_several_positives: int
    unread_columns: list[str]

    def __str__(self) -> str:
        counts = sorted(self.rows_by_negatives.items())
        parts = [f"{rows:,} with {count or 'no'} negative{'' if count == 1 else 's'}" for count, rows in counts[:4]]
        if len(counts) > 4:
            parts.append(f"{sum(rows for _, rows in counts[4:]):,} with up to {counts[-1][0]:,}")
        if self.rows_with_several_positives:
            parts.append(f"{self.rows_with_several_positives:,} with several positives")
        return f"{self.rows:,} rows: {', '.join(parts)}"


def rows_of_sources(config: Config, corpus: Corpus) -> list[SourceRows]:
    """Each source's rows in the corpus."""
    negatives, positives = np.diff(corpus.negative_offsets), np.diff(corpus.positive_offsets)
    described = []
    for index, (source, counts) in enumerate(zip(config.data.train, corpus.meta["sources"], strict=True)):
        own = corpus.source == index
        numbers, rows = np.unique(negatives[own], return_counts=True)
        by_negatives = dict(zip(numbers.tolist(), rows.tolist(), strict=True))
        some = int((positives[own] > 1).sum())
        described.append(SourceRows(source.source, source.path, int(own.sum()), by_negatives, some, counts["unread"]))
    return described


def notes_on(student: Pretrained, trained_with: Mapping[str, str]) -> Iterator[str]:
    """What the student's folder says that training does otherwise than `SentenceTransformer.encode`.

    Args:
        trained_with: the prompts of the rows, by side.
    """
    if (prompt := student.default_prompt) and prompt not in trained_with.values():
        yield (
            f"the model's folder sets the default prompt {shown(prompt)}: evaluation and whoever opens the export put it before "
            "every text; training rows have it where prompts of their source say so"
        )
    if (cut := student.truncate_dim) is not None and cut < student.width:
        yield (
            f"the model's folder cuts embeddings to {cut} of {student.width} dimensions: evaluation and whoever opens the export "
            f"do so too; the loss is taken over all of them, or with loss.dimensions: [{student.width}, {cut}] over both"
        )


def prepare_corpus(config: Config, device: torch.device, console: Console, processes: Processes = ALONE) -> Corpus:
    """The corpus of `config.data`, built if no other run has; texts that triplets are mined of are embedded on `device`.

    Args:
        processes: of this run. All of them call this, each with a device of its own.

    Raises:
        UserError: the sources can't be read, a row is bad, or the model for mining can't be loaded; or evaluation tasks, whose
            texts are to be left out, can't be read.
    """
    excluded = _evaluation_texts(config)
    stores = _mining_stores(config)
    fingerprint, files = _fingerprint(config, stores, excluded)
    corpora = cache_folder(config) / "corpora"
    folder = corpora / fingerprint

    def embeddings(index: int, texts: Sequence[str]) -> NDArray[np.float32]:
        store = GuideStore(stores[index].folder)
        positions = store.positions(text_hashes(texts))
        if (positions < 0).any():
            raise _changed(config)
        return store.read(positions)

    def settled() -> None:
        # Times too: a file that was cut and written again while it was read has its old content now.
        if _fingerprint(config, stores, excluded) != (fingerprint, files):
            raise _changed(config)

    with locked(corpora, f".{fingerprint}.lock"):
        if (damage := damage_in(folder)) is not None:
            say(console, f"made anew: corpus {damage}")
            shutil.rmtree(folder)
    if not folder.exists():
        _embed_labelled(config.data, stores, excluded, device, console, processes)
        parts = corpora / f".{fingerprint}.parts"
        if processes.count > 1 and len(config.data.train) > 1:
            counts = read_together(folder, config.data, embeddings, excluded, parts)
            follow(counts, "reading sources", None, console, shown=processes.shown)
        with locked(corpora, f".{fingerprint}.lock"):
            if not folder.exists():
                counts = build_corpus(folder, config.data, fingerprint, embeddings, settled, excluded, parts)
                follow(counts, "reading rows", None, console)
                shutil.rmtree(parts, ignore_errors=True)
    corpus = Corpus(folder)
    mark_used(folder)
    if skipped := corpus.meta["skipped_rows"]:
        console.print(f"{skipped:,} rows were skipped: {folder / 'skipped.jsonl'} says which and why")
    if corpus.excluded_texts:
        rows, texts = corpus.excluded_rows, corpus.excluded_texts
        console.print(f"left out: {texts:,} texts that evaluation judges on, and with them {rows:,} rows", highlight=False)
    return corpus


def drop_suspects(
    config: Config,
    corpus: Corpus,
    student: Pretrained,
    device: torch.device,
    console: Console,
    processes: Processes = ALONE,
    *,
    look: bool = True,
) -> Corpus:
    """The corpus without the rows that `data.drop_suspects` drops.

    Args:
        look: whether the guide embeds what its store lacks. If not, and something is lacking, the corpus is returned as it is.
    """
    thresholds = config.data.drop_suspects
    if thresholds is None:
        return corpus
    guide = prepare_guide(config, corpus, device, console, processes) if look else guide_as_stored(config, corpus)
    if guide is None and config.guides:
        say(console, "data.drop_suspects: not looked for yet, and left aside here: gist-train prepare looks for them")
        return corpus
    tokens = prepare_tokens(corpus, student, console, processes)
    judged = judged_hashes(config) if "evaluation" in thresholds else frozenset[bytes]()
    return without_suspects(Looked(corpus, guide, parts_of_all(config, corpus), tokens, student, judged), thresholds, console)


def add_hard_negatives(
    config: Config, corpus: Corpus, device: torch.device, console: Console, processes: Processes = ALONE, *, look: bool = True
) -> Corpus:
    """The corpus whose rows have the negatives that the guide finds for them, if the config asks for that.

    Args:
        look: whether they are looked for. If not, the corpus is returned as it is where no run has looked for them.
    """
    rules = config.data.hard_negatives
    if rules is None:
        return corpus
    guide = prepare_guide(config, corpus, device, console, processes) if look else guide_as_stored(config, corpus)
    if isinstance(guide, StoredGuide) and (look or folder_of(corpus, guide, rules).is_dir()):
        return with_hard_negatives(corpus, guide, rules, device, console, shown=processes.shown)
    say(console, "data.hard_negatives: not looked for yet, and left aside here: gist-train prepare looks for them")
    return corpus


def mined_corpus(config: Config, device: torch.device, console: Console, processes: Processes = ALONE) -> Corpus:
    """The corpus with the negatives that the guide finds by `data.hard_negatives`, and without what `data.drop_suspects` drops.

    Args:
        config: with rules for hard negatives.
    """
    corpus = prepare_corpus(config, device, console, processes)
    if config.data.drop_suspects is not None:
        corpus = drop_suspects(config, corpus, load_student(config.model), device, console, processes)
    return add_hard_negatives(config, corpus, device, console, processes)


def judged_hashes(config: Config) -> frozenset[bytes]:
    """Normalised hashes of the texts that evaluation.tasks judge on."""
    from gist_train.evaluation.tasks import load_tasks  # which brings scikit-learn along

    parts = [texts for task in load_tasks(config.evaluation.tasks) for texts in task.judged_texts().values()]
    return frozenset(normalized_hash(text) for texts in parts for text in texts)


def _evaluation_texts(config: Config) -> frozenset[bytes]:
    """Normalised hashes of the texts that no row may hold: of rows that are held out and, where asked for, of the tasks."""
    excluded = frozenset[bytes]()
    # Imported here, since they bring scikit-learn along, which nothing else of the preparation needs.
    if config.evaluation.held_out is not None:
        from gist_train.evaluation.held_out import held_out_folder

        excluded |= held_out_texts(held_out_folder(config, config.evaluation.held_out))
    if config.data.exclude_evaluation_texts:
        excluded |= judged_hashes(config)
    return excluded


def _mining_stores(config: Config) -> dict[int, Embedder]:
    """By source of labelled texts."""
    folders: dict[StoredModelConfig, Path] = {}  # a model's identity is a hash over all of its weights: asked once
    stores: dict[int, Embedder] = {}
    for index, source in enumerate(config.data.train):
        if isinstance(source, ClassificationSource):
            named = source.mining.model
            model, where = named, f"data.train[{index}].mining.model"
            if model is None:  # the schema refuses a source without a model
                where, guide = next((where, one) for where, one in config.guides.items() if isinstance(one, GuideConfig))
                model = guide.of_roles[0]
            if model not in folders:
                folders[model] = store_folder(cache_folder(config), model, where)
            stores[index] = Embedder(model, where, folders[model])
    return stores


def _fingerprint(
    config: Config, stores: Mapping[int, Embedder], excluded: Collection[bytes]
) -> tuple[str, dict[str, list[object]]]:
    """The corpus' fingerprint, and size, times and inode of the files that it was made of."""
    hashes = ContentHashes(cache_folder(config) / "content-hashes.json")
    mined_with = {index: store.folder.name for index, store in stores.items()}
    fingerprint = corpus_fingerprint(config.data, hashes, mined_with, excluded)
    return fingerprint, hashes.seen


def _changed(config: Config) -> UserError:
    changed = f"content that changed while it was read: {', '.join(source.path for source in config.data.train)}"
    return UserError(Fault("data.train", changed, "files that stay as they are", "wait until they are written, and start again"))


def _embed_labelled(
    data: DataConfig,
    stores: Mapping[int, Embedder],
    excluded: Collection[bytes],
    device: torch.device,
    console: Console,
    processes: Processes,
) -> None:
    """Has all labelled texts in their stores; refuses bad rows of all sources before a model is put to work."""
    texts: dict[Path, dict[str, None]] = {}  # by store, each text once
    faults: list[Fault] = []
    rows = left_out = 0
    exclusion = Exclusion(excluded)
    for index, store in stores.items():
        source = data.train[index]
        assert isinstance(source, ClassificationSource)
        good, bad, out = labelled_texts(source, f"data.train[{index}]", exclusion)
        texts.setdefault(store.folder, {}).update(dict.fromkeys(row.text for row in good))
        faults += bad
        rows += len(good)
        left_out += out
    if stores:
        others = len(data.train) - len(stores)  # which may have usable rows where these have none
        read = rows + len(faults) + left_out
        refuse_bad(data, faults[:SHOWN_FAULTS], read, len(faults), rows + others, left_out)
    for store in {store.folder: store for store in stores.values()}.values():
        of_store = list(texts[store.folder])
        lengths = np.array([len(text.encode()) for text in of_store])
        store.embed(text_hashes(of_store), lengths, of_store.__getitem__, device, console, processes)


def prepare_tokens(corpus: Corpus, student: Pretrained, console: Console, processes: Processes = ALONE) -> TokenTable:
    """The student's token ids of every view of the corpus, made if no other run has.

    Args:
        processes: of this run. All of them call this, and each tokenises its share.
    """
    fingerprint = student.tokenizer_fingerprint()
    with locked(corpus.folder):
        if (damage := corpus.damage_in_tokens(fingerprint)) is not None:
            say(console, f"made anew: tokens {damage}")
            corpus.drop_tokens(fingerprint)
    if not corpus.has_tokens(fingerprint):
        counts = tokenise_together(corpus, student.tokens, student.vocabulary_size(), fingerprint)
        follow(counts, "tokenising texts", corpus.view_count, console, shown=processes.shown)
    return corpus.tokens(fingerprint)
