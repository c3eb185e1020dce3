"""Rows that may be bad: their scores by kind, and a corpus without those that a config drops, kept beside the first."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config
from gist_train.data.collecting import with_rows
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.data.files import read_json, whole_folder, write_json
from gist_train.data.leases import locked
from gist_train.data.manifests import damage_in, seal
from gist_train.model.exact_scores import repeated_rows, times_repeated
from gist_train.model.folders import folder_prompt
from gist_train.model.guide import prompted
from gist_train.model.loading import load_guide
from gist_train.model.pair_scores import PairScores, Scores
from gist_train.model.pretrained import Pretrained
from gist_train.model.text_scores import AT_A_TIME, TextScores, largest_of_rows, share_cut
from gist_train.progress import follow, say
from gist_train.training.guides import Guide, GuidePart, StoredGuide

VERSION = 3
"""Of the scores: under another one other rows are dropped."""
REPORT = "dropped.json"
EXACT = ("duplicate", "repeated")
"""Kinds that go by which texts are the same; a guide has its say in them where there is one."""
BY_GUIDE = (*(kind for kind in PairScores.KINDS if kind not in EXACT), "guide_cut")
"""Kinds that need a guide whose embeddings are stored; the last one, which counts tokens, a guide that is a model."""
SPECIAL_TOKENS = 16
"""The most that a tokenizer adds to a text, by far."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What rows are judged by."""

    corpus: Corpus
    guide: Guide
    reads: Sequence[GuidePart]
    """What guides that are models read."""
    tokens: TokenTable
    student: Pretrained
    judged: Collection[bytes]
    """`overlap.normalized_hash` of each text that evaluation judges on."""
    in_files: bool = False
    """Whether rows are judged as they stand in files: a labelled text alone, without the positive and negative mined for it."""


def row_scores(by: Looked, kinds: Collection[str], console: Console) -> dict[str, Scores]:
    """(R,) by kind, the higher the worse. Without stored embeddings kinds that need a guide are not there."""
    scores: dict[str, Scores] = {}
    if "guide_cut" in kinds and by.reads:
        cuts = GuideCuts(by.corpus, by.reads, in_files=by.in_files)
        follow(cuts.look(), "counting the guide's tokens", None, console)
        scores["guide_cut"] = cuts.scores
    if {*kinds} - {*BY_GUIDE, *EXACT}:
        texts = TextScores(by.corpus, by.tokens, by.student, by.judged, in_files=by.in_files)
        follow(texts.look(), "reading texts", by.corpus.text_count, console)
        scores |= texts.scores
    unusual = None
    if {*kinds} & {*PairScores.KINDS, "repeated"} and isinstance(by.guide, StoredGuide):
        pairs = PairScores(by.corpus, *(column.embeddings for column in by.guide.columns))
        follow(pairs.look(), "comparing rows", by.corpus.row_count, console)
        scores |= pairs.scores
        unusual = pairs.unusual
    if "duplicate" in kinds:
        scores["duplicate"] = np.maximum(repeated_rows(by.corpus), scores.get("duplicate", np.float32(0)))
    if "repeated" in kinds:
        scores["repeated"] = times_repeated(by.corpus, unusual)
    return {kind: scores[kind] for kind in kinds if kind in scores}


def lacking_kinds(config: Config) -> set[str]:
    """Kinds that no row can be of: they need a guide whose embeddings are stored, `guide_cut` one that is a model."""
    if not config.guides:
        return {*BY_GUIDE}
    return set() if any(isinstance(guide, GuideConfig) for guide in config.guides.values()) else {"guide_cut"}


class GuideCuts:
    """What guides cut off of each row's texts, filled by `look`; `in_files` as `largest_of_rows` has it."""

    def __init__(self, corpus: Corpus, parts: Sequence[GuidePart], *, in_files: bool = False):
        self._corpus, self._parts, self._in_files = corpus, parts, in_files
        self.scores: Scores = np.zeros(corpus.row_count, np.float32)
        """(R,) of the text that most is cut off of, by whichever guide cuts most: the share."""

    def look(self) -> Iterator[int]:
        """Looks at all texts that may be longer than a guide reads; yields how many are done."""
        done, model, loaded = 0, None, ""
        for part in self._parts:
            prompt = folder_prompt(part.model.name, part.model.revision) if part.model.prompt is None else part.model.prompt
            # A token is a byte or more, special ones aside: most texts need not be tokenised, and many a guide not be loaded.
            most = part.lengths + len(prompt.encode()) + SPECIAL_TOKENS
            if part.model.max_length is not None and not (most > part.model.max_length).any():
                continue
            if model is None or loaded != part.where:
                model, loaded = load_guide(part.model, part.where), part.where
            ids, cut = part.texts[most > model.max_length], np.zeros(self._corpus.text_count, np.float32)
            for begin in range(0, len(ids), AT_A_TIME):
                some = ids[begin : begin + AT_A_TIME]
                cut[some] = share_cut(model, prompted(model, part.model, [self._corpus.text(int(i)) for i in some]))
                done += len(some)
                yield done
            np.maximum(self.scores, largest_of_rows(self._corpus, cut, part.roles, in_files=self._in_files), out=self.scores)


def without_suspects(by: Looked, thresholds: Mapping[str, float], console: Console) -> Corpus:
    """The corpus without the rows whose score of some kind is its threshold or more, made if no run has made it.

    Raises:
        UserError: no row is left, or a kind needs a guide whose embeddings are stored.
    """
    lacking = {*BY_GUIDE} if not isinstance(by.guide, StoredGuide) else set() if by.reads else {"guide_cut"}
    if without := sorted({*thresholds} & lacking):
        expected = "kinds that need no guide where no guide's embeddings are stored, and guide_cut where a guide is a model"
        raise UserError(Fault("data.drop_suspects", ", ".join(without), expected, "name a guide, or leave them out"))
    folder = _folder_of(by, thresholds)
    with locked(folder.parent, f".{folder.name}.lock"):
        damage = damage_in(folder)
        if damage is not None:
            say(console, f"made anew: corpus {damage}")
        if damage is not None or not folder.exists():
            _write(by, thresholds, folder, console)
    dropped = read_json(folder / REPORT)
    kinds = ", ".join(f"{rows:,} {kind}" for kind, rows in dropped["rows"].items())
    say(console, f"dropped as suspects: {dropped['dropped']:,} of {dropped['of']:,} rows ({kinds})")
    return Corpus(folder)


def _folder_of(by: Looked, thresholds: Mapping[str, float]) -> Path:
    guide = by.guide.by_column if isinstance(by.guide, StoredGuide) else None
    asked = [VERSION, by.corpus.content, guide, by.student.tokenizer_fingerprint(), sorted(thresholds.items())]
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=16)
    if "evaluation" in thresholds:
        digest.update(b"".join(sorted(by.judged)))
    return by.corpus.folder.with_name(digest.hexdigest())


def _write(by: Looked, thresholds: Mapping[str, float], folder: Path, console: Console) -> None:
    scores = row_scores(by, thresholds, console)
    suspect = {kind: scores[kind] >= threshold for kind, threshold in thresholds.items()}
    kept = kept_rows(by.corpus.row_count, suspect.values())
    if not len(kept):
        found = f"{dict(thresholds)}, and no row is left"
        fix = "raise them: gist-train audit shows scores"
        raise UserError(Fault("data.drop_suspects", found, "thresholds that leave rows", fix))
    with whole_folder(folder, replace=True) as beside:
        with_rows(by.corpus, beside, kept)
        rows = {kind: int(of_kind.sum()) for kind, of_kind in suspect.items()}
        dropped = by.corpus.row_count - len(kept)
        write_json(beside / REPORT, {"rows": rows, "dropped": dropped, "of": by.corpus.row_count, "content": by.corpus.content})
        seal(beside, {})


def kept_rows(rows: int, suspect: Iterable[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Ascending rows that are suspect in no way."""
    bad = np.zeros(rows, bool)
    for of_kind in suspect:
        bad |= of_kind
    return np.flatnonzero(~bad)
