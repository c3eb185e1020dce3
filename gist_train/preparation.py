"""A config -> student, corpus, batch plan, tokens and guide: what every command needs of this, each part made once.

Any number of processes may call these functions at the same time. They share what a guide embeds and what is tokenised; of all
else one holds the lock and works, the others wait for it and find the work done. None waits in a collective operation, however
long the guide takes.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from gist_train.checks import check_device, check_student, report_device
from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.fields import FEWEST_TOKENS, SHORTEST
from gist_train.config.models import GuideConfig, GuideVectorsConfig, StoredModelConfig
from gist_train.config.schema import Config, DataConfig, cache_folder, training_prompts
from gist_train.config.sources import ClassificationSource
from gist_train.data.batches import BatchPlan
from gist_train.data.building import SHOWN_FAULTS, build_corpus, labelled_texts, read_together, refuse_bad
from gist_train.data.cells import Likeness
from gist_train.data.corpus import Corpus, TokenTable, text_hashes
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint
from gist_train.data.held_out import held_out_texts
from gist_train.data.leases import locked
from gist_train.data.manifests import damage_in
from gist_train.data.overlap import Exclusion, normalized_hash
from gist_train.data.tokenising import tokenise_together
from gist_train.hard_negatives import folder_of, with_hard_negatives
from gist_train.memory import lowered, naming_work
from gist_train.model.encoder import tokens_at_a_time
from gist_train.model.folders import identity
from gist_train.model.guide import GuideStore, seconds_to_embed, store_folder
from gist_train.model.loading import load_guide, load_student
from gist_train.model.pretrained import Pretrained
from gist_train.model.vectors import refuse_missing, vector_files, vector_store
from gist_train.model.whole import TextModel
from gist_train.progress import duration, follow, say
from gist_train.pulse import waiting
from gist_train.suspects import Looked, without_suspects
from gist_train.training.guides import Guide, GuidePart, SelfGuide, StoredGuide, TextsOfStore, guide_parts
from gist_train.training.setup import Prepared


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one run, which embed together."""

    count: int = 1
    shown: bool = True
    """Whether this one shows how far all of them are: one on each machine does."""


ALONE = Processes()
TIMED_FROM = 1000
"""Texts to embed from which on it is said how long that will take."""
SHOWN_SOURCES = 20
SHOWN_DAMAGED = 3
"""Texts that are named of those whose embeddings are damaged."""
"""Sources whose rows are described before a training."""


def prepare(
    config: Config,
    device: torch.device,
    console: Console,
    processes: Processes = ALONE,
    *,
    trains_here: bool = False,
    fill_store: bool = True,
) -> Prepared:
    """All that a run reads, made where no run has made it yet.

    Args:
        device: of this process; labelled texts and the guide's are embedded on it.
        processes: of this run. All of them call this, each with a device of its own.
        trains_here: whether steps are taken on this device: what it can't do is then refused, and said else.
        fill_store: whether the guide embeds what its store lacks. If not, the guide is None where it lacks something.

    Raises:
        UserError: data or models are not what the config says.
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
    corpus = drop_suspects(config, corpus, student, device, console, processes, look=fill_store)
    corpus = add_hard_negatives(config, corpus, device, console, processes, look=fill_store)
    check_candidates(config, corpus)
    plan = batch_plan(config, corpus)  # refuses too few rows, before the guide is put to work
    tokens = prepare_tokens(corpus, student, console, processes)
    guide = prepare_guide(config, corpus, device, console, processes) if fill_store else guide_as_stored(config, corpus)
    if config.data.batching == "similar":
        plan = batch_plan(config, corpus, guide)
    return Prepared(student, corpus, plan, tokens, guide)


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
    return without_suspects(Looked(corpus, guide, tokens, student, judged), thresholds, console)


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


@dataclass(frozen=True, slots=True)
class _Embedder:
    """A model and the store of what it has embedded: the guide, or what triplets of labelled texts are mined with."""

    model: StoredModelConfig
    where: str
    """The model's key in the YAML."""
    folder: Path
    """Of its store."""

    def embed(
        self,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        text: Callable[[int], str],
        device: torch.device,
        console: Console,
        processes: Processes,
    ) -> tuple[GuideStore, NDArray[np.int64]]:
        """The store, and (N,) where it has each of N texts; those that no run has embedded yet are embedded."""

        @cache
        def load() -> TextModel:
            with waiting():  # for another rank, where both fetch it from the hub
                model = load_guide(self.model, self.where)
            named = {name: prompt for name, prompt in model.prompts.items() if prompt}
            if self.model.prompt is None and named and not model.default_prompt:
                several = ", ".join(f"{name}: {shown(prompt)}" for name, prompt in named.items())
                unset = f"{self.where}.prompt is not set: {self.model.name} reads texts without the prompts of its folder"
                line = f"{unset} ({several})"
                say(console, line)
            return model.to(device)

        store = GuideStore(self.folder)
        positions = store.positions(hashes)
        if len(damaged := np.flatnonzero(store.damaged(positions))):
            texts = ", ".join(shown(text(int(index))) for index in damaged[:SHOWN_DAMAGED])
            found = f"{self.folder / 'embeddings.bin'}: {len(damaged):,} damaged embeddings, of {texts}"
            say(console, f"{found}{', ...' if len(damaged) > SHOWN_DAMAGED else ''}: made anew")
            store.forget(positions[damaged])
            positions = store.positions(hashes)
        if missing := int((positions < 0).sum()):
            if missing >= TIMED_FROM and processes.shown:
                seconds = seconds_to_embed(load(), self.model, np.flatnonzero(positions < 0), lengths, text) / processes.count
                took = f"{missing:,} texts to embed with {self.model.name}: about {duration(seconds)}"
                say(console, took)
            what = "embedding with the guide" if self.where == "guide" else f"embedding with {self.model.name}"
            with naming_work(lambda: (what, self._lowering(load(), device))):
                counts = store.fill_together(load, self.model, hashes, lengths, text, processes.count, missing)
                follow(counts, what, missing, console, shown=processes.shown)
            positions = store.positions(hashes)
        return store, positions

    def _lowering(self, model: TextModel, device: torch.device) -> list[str]:
        """Settings that lower what embedding takes, in the order in which to try them."""
        at_a_time = tokens_at_a_time(self.model.batch_tokens, device)
        lowering = [
            lowered(f"{self.where}.batch_tokens", at_a_time, None, FEWEST_TOKENS),
            lowered(f"{self.where}.max_length", model.max_length, None, SHORTEST),
        ]
        return [setting for setting in lowering if setting is not None]


def _mining_stores(config: Config) -> dict[int, _Embedder]:
    """By source of labelled texts."""
    folders: dict[StoredModelConfig, Path] = {}  # a model's identity is a hash over all of its weights: asked once
    stores: dict[int, _Embedder] = {}
    for index, source in enumerate(config.data.train):
        if isinstance(source, ClassificationSource):
            named = source.mining.model
            model, where = named, f"data.train[{index}].mining.model"
            if model is None:  # the schema refuses a source without a model
                where, guide = next((where, one) for where, one in config.guides.items() if isinstance(one, GuideConfig))
                model = guide.of_roles[0]
            if model not in folders:
                folders[model] = store_folder(cache_folder(config), model, where)
            stores[index] = _Embedder(model, where, folders[model])
    return stores


def _fingerprint(
    config: Config, stores: Mapping[int, _Embedder], excluded: Collection[bytes]
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
    stores: Mapping[int, _Embedder],
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


def prepare_guide(config: Config, corpus: Corpus, device: torch.device, console: Console, processes: Processes = ALONE) -> Guide:
    """The guide's embeddings of the corpus' texts; those that no run has embedded yet are embedded on `device`.

    Args:
        processes: of this run. All of them call this, each with a device of its own, and each embeds its share.

    Raises:
        UserError: the guide can't be loaded, or its store is damaged.
    """

    def embedded(part: GuidePart, where: str) -> TextsOfStore:
        embedder = _Embedder(part.model, where, part.folder)
        return part.stored(*embedder.embed(part.hashes, part.lengths, part.text, device, console, processes))

    return _guide_of(config, corpus, embedded)


def guide_as_stored(config: Config, corpus: Corpus) -> Guide:
    """The guide where nothing is left to embed; None where its store lacks a text."""

    def as_stored(part: GuidePart, _: str) -> TextsOfStore | None:
        store = GuideStore(part.folder)
        places = store.positions(part.hashes)
        return None if (places < 0).any() else part.stored(store, places)

    return _guide_of(config, corpus, as_stored)


def _guide_of(config: Config, corpus: Corpus, stored: Callable[[GuidePart, str], TextsOfStore | None]) -> Guide:
    """The guides whose embeddings are stored in one, else the student itself, or none; None where one lacks a text."""
    guides = []
    for where, guide in config.guides.items():
        if isinstance(guide, GuideVectorsConfig):
            guides.append(_guide_of_vectors(config, guide, corpus, where))
            continue
        parts = guide_parts(config, guide, corpus, where)
        texts = [one for part in parts if (one := stored(part, where)) is not None]
        if len(texts) < len(parts):
            return None
        guides.append(StoredGuide.of_parts(parts, texts))
    if guides:
        return StoredGuide.of_all(guides, corpus)
    return None if config.guide is None else SelfGuide()


def check_candidates(config: Config, corpus: Corpus) -> None:
    """Raises UserError where no step can teach anything: each batch is one row, and no row has a negative."""
    if config.training.batch_size == 1 and not len(corpus.negative):
        found, expected = "1, and rows without negatives", "2 or more: the other rows of its batch serve a row as negatives"
        raise UserError(Fault("training.batch_size", found, expected, "raise it; 16 to 128 is usual"))


def check_guide(config: Config) -> None:
    """Raises UserError where there is no such guide: millions of rows need not be read before."""
    for where, guide in config.guides.items():
        match guide:
            case GuideConfig():
                identity(guide.name, guide.revision, where, lambda _: "")  # is it there: its content is read later
            case GuideVectorsConfig():
                vector_files(guide, where)


def _guide_of_vectors(config: Config, guide: GuideVectorsConfig, corpus: Corpus, where: str) -> StoredGuide:
    """Vectors that were computed elsewhere; UserError where these lack a text."""
    store = vector_store(cache_folder(config), guide, where)
    positions = store.positions(corpus.hashes)
    refuse_missing(store, [corpus.text(int(i)) for i in np.flatnonzero(positions < 0)], corpus.text_count, where)
    return StoredGuide.alike(store, positions)


def batch_plan(config: Config, corpus: Corpus, guide: Guide = None) -> BatchPlan:
    """The batch plan of `config` over `corpus`.

    Args:
        guide: what similar rows are found by; without one they are not, and counts are right all the same.

    Raises:
        UserError: the rows give no whole batch.
    """
    _refuse_rows_without_candidates(config, corpus)
    try:
        return BatchPlan(
            task=corpus.task,
            anchor=corpus.anchor,
            positive=corpus.positive,
            positive_offsets=corpus.positive_offsets,
            batching=config.data.batching,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
            source=corpus.source,
            weights=[source.weight for source in config.data.train],
            likeness=_likeness(config, corpus, guide),
        )
    except ValueError as error:
        if config.data.batching == "reference" and corpus.row_count >= config.training.batch_size:
            fix = "put the rows of a task together in the file, or set data.batching: task"
            setting = f"reference; no {config.training.batch_size} neighbouring rows, counted from the first, are of one task"
            raise UserError(Fault("data.batching", setting, "windows of rows of one task", fix)) from None
        raise UserError(
            Fault(
                "training.batch_size",
                f"{config.training.batch_size}; {error} from {', '.join(source.path for source in config.data.train)}",
                "a size of which the data has one whole batch at least",
                "lower training.batch_size or add rows",
            )
        ) from None


def _likeness(config: Config, corpus: Corpus, guide: Guide) -> Likeness | None:
    """What tells how alike rows are; None where batches don't go by it."""
    if config.data.batching != "similar" or not isinstance(guide, StoredGuide):
        return None
    anchors = guide.anchor
    return Likeness(config.data.similarity_depth, lambda rows: anchors.embeddings(corpus.anchor[rows]).numpy())


def _refuse_rows_without_candidates(config: Config, corpus: Corpus) -> None:
    """UserError where rows that keep to their own negatives have none: they would contrast with nothing, and teach nothing."""
    bare = np.bincount(corpus.source[np.diff(corpus.negative_offsets) == 0], minlength=len(config.data.train))
    faults = [
        Fault(
            f"data.train[{index}].in_batch_negatives",
            f"false, and {count:,} rows of {source.path} without a negative",
            "false where every row has a negative of its own",
            "set it to true, or give these rows negatives",
        )
        for index, (source, count) in enumerate(zip(config.data.train, bare.tolist(), strict=True))
        if count and not source.in_batch_negatives
    ]
    if faults:
        raise UserError(*faults)
