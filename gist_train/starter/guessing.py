"""What a user's file is good for, guessed from its first rows: triplets, labelled texts or scored pairs, and in which columns."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from gist_train.config.conditions import Condition, UnlikeError
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.evaluation import StsColumns
from gist_train.config.sources import LabelColumns
from gist_train.data.formats import json_records, jsonl_cells, reader_of
from gist_train.data.judging import WATCHED, Judging
from gist_train.data.medi import medi_pairs
from gist_train.data.rows import ALIASES, NUMBERED
from gist_train.data.tables import BadRow, Columns, Field, TableFile, content_of, encodable, read_errors, several

SAMPLED = 200
"""Rows of a file that are looked at."""
MOSTLY = 0.8
"""Share of these that a column must fill to be taken."""
WORDS_OF_A_TEXT = 5
"""From so many words on, what stands in a header is a text and no name."""
SOURCES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".xlsx": "xlsx"}
# In the order they are looked for: before all, what the readers know by themselves.
NAMES = {
    "anchor": "question question1 sentence1 text1 premise instruction prompt title input source",
    "positive": "positive_passage answer answers response output target passage document context abstract "
    "body question2 sentence2 text2 entailment hypothesis summary text",
    "negative": "negative_passage sentence3 text3 contradiction distractor distractors",
    "task": "dataset subset",
}
LABELS = ("label", "labels", "intent", "category", "class", "label_text")
SCORES = ("score", "similarity", "similarity_score", "relatedness_score")
LIKE_TEXTS = ("question1", "sentence1", "text1", "premise")
"""Anchors whose partner is a text of the same kind: a score beside them, or one of JUDGES, judges the pair."""
JUDGES = (*LABELS, "gold_label", "is_duplicate")
TRIPLET = ("anchor", "positive", "negative")
"""The order of the columns of triplets without a header, as MS MARCO's are."""
Kind = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """The first rows of a file: `path` as given, `name` without endings, `source` as the YAML calls its format."""

    path: str
    name: str
    source: str
    columns: list[str]
    rows: list[dict[str, object]]
    """Column -> value; what is null, blank or [] is left out."""
    bad: int
    """Rows that can't be read."""
    whole: bool
    """Whether the file has no more rows."""
    delimiter: str | None = None
    """Between the columns of a CSV file, where that is no comma."""
    header: bool = True
    """Whether the first row of a CSV file names its columns; else they are called 1, 2, ..."""

    def values(self, column: str) -> list[object]:
        """Of the rows that fill the column."""
        return [row[column] for row in self.rows if column in row]

    def holds(self, column: str, kind: Kind, least: float = MOSTLY) -> bool:
        """Whether that share of the rows at least, and one, fills the column, always with that kind of value."""
        values = self.values(column)
        return len(values) >= max(1, least * len(self.rows)) and all(map(kind, values))

    def mostly(self, column: str, kind: Kind) -> bool:
        """Whether nearly all that fills the column is of that kind: a bad value or two are bad rows, and not another column."""
        values = self.values(column)
        return sum(map(kind, values)) >= max(1, MOSTLY * len(self.rows))

    def named(self, names: Iterable[str], kind: Kind, least: float = MOSTLY) -> str | None:
        """The first column by these names that holds that kind; the very name goes before one such as "Hard Negative"."""
        plain = {_plain(column): column for column in self.columns} | {column: column for column in self.columns}
        return next((plain[name] for name in names if name in plain and self.holds(plain[name], kind, least)), None)

    def fault(self, found: str, expected: str, fix: str) -> UserError:
        """What is wrong with the file."""
        return UserError(Fault(self.path, found, expected, fix))


@dataclass(frozen=True, slots=True)
class GuessedFile:
    """What a file is good for: `use` is medi, pairs, labelled or scored."""

    sample: Sample
    use: str
    roles: dict[str, str]
    """Anchor, text1, label, ... -> column."""
    columns: dict[str, str]
    """What of `roles` the YAML must name."""
    usable: int = 0
    """Rows looked at that are surely trained on."""
    guessed: bool = False
    """Whether a text got its role without a name that says so."""
    where: str | None = None
    """The condition that chooses the pairs that belong together, where a column says that some do not."""

    @property
    def unusable(self) -> int:
        """Rows looked at that can't be read, or lack a text or label."""
        needed = [self.roles[role] for role in ("anchor", "positive", "text", "label") if role in self.roles]
        kinds = {self.roles[role]: _is_texts for role in ("anchor", "positive", "negative") if role in self.roles}
        return self.sample.bad + sum(
            not all(column in row for column in needed)
            or not all(kind(row[column]) for column, kind in kinds.items() if column in row)
            for row in self.sample.rows
        )

    @property
    def text_columns(self) -> list[str]:
        """Columns that hold texts."""
        return [column for role, column in self.roles.items() if role not in ("label", "score", "task")] + self.numbered

    @property
    def numbered(self) -> list[str]:
        """Columns that hold one negative each, which the reader takes by their names."""
        if self.use != "pairs" or "negative" in self.columns:
            return []
        return [column for column in self.sample.columns if NUMBERED.fullmatch(column)]

    @property
    def negatives(self) -> list[int]:
        """Fewest and most negatives of a row, one number where they are the same."""
        columns = [*([self.roles["negative"]] if "negative" in self.roles else []), *self.numbered]
        counts = {len(several(row.get(column) for column in columns)) for row in self.sample.rows}
        return sorted({min(counts), max(counts)})


def judged(path: Path, named: Mapping[str, str] = MappingProxyType({})) -> GuessedFile:
    """What the file is good for, by its first rows.

    Args:
        named: anchor, positive, text, label, ... -> the column that the user says it is, of files that have all of these.

    Raises:
        UserError: it can neither train nor evaluate.
    """
    sample = _sample(path)
    if named and all(column in sample.columns for column in named.values()):
        return _as_named(sample, dict(named))
    return _judged(sample)


class _File(TableFile):
    """A file that notes its columns where its reader looks for fields among them."""

    columns: Sequence[str] = ()
    medi = False
    """Whether its rows are pairs of instruction and text."""

    def refuse_missing(self, _f: Sequence[Field], _c: Columns, present: Iterable[str], *, named_too: bool = True) -> None:  # noqa: ARG002
        self.columns = self.columns or list(present)


def _sample(path: Path) -> Sample:
    """The first rows of the file; UserError where none can be read."""
    file = _File(Path(os.path.expanduser(path)), str(path))
    with read_errors(file):
        file.delimiter = _delimiter(file)
        read = list(islice(_rows(file), SAMPLED + 1))
        if file.suffix in (".csv", ".tsv", ".xlsx") and _is_row(file.columns):
            file.columns, file.row, file.header = (), 0, False
            read = list(islice(_rows(file), SAMPLED + 1))
    bad = [row for row in read[:SAMPLED] if isinstance(row, BadRow)]
    rows = [
        {name: content_of(row[name]) for name in row if _fills(row[name])}
        for row in read[:SAMPLED]
        if not isinstance(row, BadRow)
    ]
    if not rows:
        file.row = 0
        if not bad:
            raise file.broken("no rows", "one row or more", "fill the file, or leave it out")
        raise file.broken(f"no row that can be read: {bad[0].what}, {bad[0].found}", bad[0].expected, "fix the rows")
    columns = [name for name in dict.fromkeys(file.columns) if name and encodable(name)]
    source = "medi" if file.medi else SOURCES[file.suffix]
    return Sample(str(path), file.name, source, columns, rows, len(bad), len(read) <= SAMPLED, file.delimiter, file.header)


def _is_row(header: Sequence[str]) -> bool:
    """Whether a header is the first row of data: names of columns are short."""
    return 2 * sum(len(name.split()) >= WORDS_OF_A_TEXT for name in header) >= max(2, len(header))


def _delimiter(file: TableFile) -> str | None:
    """What the header of a .csv file has between its columns, where it has no comma; None for a comma, and all else."""
    if file.suffix != ".csv":
        return None
    with file.open() as lines:
        header = lines.readline().decode("utf-8-sig")
    counts = {character: header.count(character) for character in ";\t|"}
    most = max(counts, key=lambda character: counts[character])
    return most if counts[most] and "," not in header else None


def _rows(file: _File) -> Iterator[dict[str, object] | BadRow]:
    """Column -> value, by the format's own reader."""
    reader = reader_of(file)
    if reader is jsonl_cells:  # rows may have keys that the first has not
        records = [record for record in islice(json_records(file), SAMPLED) if isinstance(record, dict)]
        file.row = 0
        file.columns = [key for record in records for key in record]
        file.medi = file.suffix == ".json" and bool(records) and isinstance(records[0].get("query"), list)
        if file.medi:
            file.columns = ("query", "pos", "neg", "task_name")
            for row in medi_pairs(file):
                texts = [] if isinstance(row, BadRow) else [text for _, text in row[0]]
                yield row if isinstance(row, BadRow) else {**dict(zip(file.columns, texts, strict=False)), "task_name": row[1]}
            return
    else:
        next(reader(file, [Field("", (), False, False)]), None)
        file.row = 0
    names = list(dict.fromkeys(file.columns))
    for cells in reader(file, [Field(name, (name,), False, False) for name in names]):
        yield cells if isinstance(cells, BadRow) else dict(zip(names, cells[1], strict=True))


def _judged(sample: Sample) -> GuessedFile:
    """What the file is good for; UserError where it can neither train nor evaluate."""
    if sample.source == "medi":
        return GuessedFile(sample, "medi", {"anchor": "query", "positive": "pos", "negative": "neg"}, {}, len(sample.rows))
    roles = _roles(sample)
    others = [column for column in sample.columns if column not in roles.values() and _is_prose(sample, column)]
    label = sample.named(LABELS, _is_label)
    if "positive" not in roles:
        texts = [*others, *([roles["anchor"]] if "anchor" in roles else [])]
        text = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
        named = frozenset(texts)
        classes = [column for column in sample.columns if column not in named and _is_classes(sample, column)]
        guess = label is None and len(texts) == len(classes) == 1
        label = classes[0] if guess else label
        if text is not None and label is not None and (labelled := _labelled(sample, text, label)):
            return replace(labelled, guessed=guess)
    missing = [role for role in ("anchor", "positive") if role not in roles]
    if not sample.header and not roles and len(others) == len(TRIPLET):
        roles, missing = dict(zip(TRIPLET, others, strict=True)), list(TRIPLET)
    roles |= dict(zip(missing, others, strict=False)) if len(missing) == len(others) else {}
    if not ("anchor" in roles and "positive" in roles and sample.mostly(roles["anchor"], _is_string)):
        anchors, positives = (", ".join([*ALIASES[role], *NAMES[role].split()]) for role in ("anchor", "positive"))
        called = {*anchors.split(", "), *positives.split(", ")}
        columns = ", ".join(shown(column) + _why_not(sample, column, called) for column in sample.columns[:20])
        raise sample.fault(
            f"the columns {columns or '(none)'}, and no telling which are a pair of texts",
            f"a column of anchors ({anchors}) and one of positives ({positives}), or texts and labels ({', '.join(LABELS)})",
            "fill them with texts, or say which they are: gist-train init --columns anchor=...,positive=...",
        )
    alike = len(missing) >= 2 or _plain(roles["anchor"]) in LIKE_TEXTS
    score = sample.named(SCORES, _is_number)
    if alike and score is not None:
        return _scored(sample, {"text1": roles["anchor"], "text2": roles["positive"], "score": score})
    if (where := _condition(sample, roles)) is not None:
        return _pairs(sample, roles, guessed=bool(missing), where=where)
    judge = sample.named(JUDGES, _fills)
    if alike and not missing and judge is not None and _plain(roles["positive"]) != "entailment":
        fix = f"keep the rows of which {shown(judge)} says so, and leave that column out"
        raise sample.fault(f"pairs that a column {shown(judge)} judges", "pairs of texts that belong together", fix)
    return _pairs(sample, roles, guessed=bool(missing))


def _as_named(sample: Sample, named: dict[str, str]) -> GuessedFile:
    """What the file is good for, by what the user says of its columns: the other roles are guessed by their names."""
    for column in (column for role, column in named.items() if role not in ("label", "score")):
        if not sample.mostly(column, _is_texts):
            value = shown(next(iter(sample.values(column)), None))
            raise sample.fault(f"{shown(column)} with {value}", "a column of texts", "name another column: --columns")
    if "text1" in named:
        return _scored(sample, named)
    if "text" in named:
        if (labelled := _labelled(sample, named["text"], named["label"])) is None:
            found = f"labels under {shown(named['label'])} that hardly repeat, or the same texts over and over"
            raise sample.fault(found, "classes of several texts each", "name another column: --columns")
        return labelled
    roles = {role: column for role, column in _roles(sample).items() if column not in named.values()} | named
    return _pairs(sample, roles, where=_condition(sample, roles))


def _roles(sample: Sample) -> dict[str, str]:
    """Role -> the column that has a name for it and holds what the reader takes there."""
    roles: dict[str, str] = {}
    for role, names in NAMES.items():
        known = [*ALIASES[role], *names.split()]
        if "anchor" not in roles:  # "text" is a positive only beside something that is surely the anchor
            known = [name for name in known if name != "text"]
        kind, least = _is_string if role in ("anchor", "task") else _is_texts, MOSTLY if role in ("anchor", "positive") else 0
        usual = next((name for name in ALIASES[role] if name in sample.columns and sample.mostly(name, kind)), None)
        column = usual or sample.named(known, kind, least)
        if column is not None and (role != "anchor" or _varies(sample, column)):
            roles[role] = column
    return roles


def _pairs(sample: Sample, roles: dict[str, str], *, guessed: bool = False, where: str | None = None) -> GuessedFile:
    usual = {role: next((name for name in names if name in sample.columns), None) for role, names in ALIASES.items()}
    for role in ("negative", "task"):
        column = usual[role]
        if column is not None and role not in roles and sample.values(column):  # the reader would take it all the same
            kind = _is_texts if role == "negative" else _is_string
            bad = next((value for value in sample.values(column) if not kind(value)), sample.values(column)[0])
            found, fix = f"{shown(column)} with {shown(bad)}", "rename the column, or make it text"
            raise sample.fault(found, f"text in a column of that name, which is the {role}", fix)
    usable = sum(roles["anchor"] in row and roles["positive"] in row and _holds(where, row) for row in sample.rows)
    roles = {role: roles[role] for role in ALIASES if role in roles}
    columns = {role: column for role, column in roles.items() if column != usual[role]}
    return GuessedFile(sample, "pairs", roles, columns, usable, guessed, where)


def _condition(sample: Sample, roles: dict[str, str]) -> str | None:
    """The condition that `Judging` finds in the rows."""
    names = [name for name in WATCHED if name in sample.columns and name not in roles.values()]
    judging = Judging(names)
    negatives = [column for column in sample.columns if column == roles.get("negative") or NUMBERED.fullmatch(column)]
    for row in sample.rows:
        judging.see([row.get(name) for name in names], has_negative=any(column in row for column in negatives))
    verdict = judging.verdict()
    return None if verdict is None else verdict[1]


def _holds(where: str | None, row: Mapping[str, object]) -> bool:
    try:
        return where is None or Condition(where).holds(row)
    except UnlikeError:
        return False


def _labelled(sample: Sample, text: str, label: str) -> GuessedFile | None:
    """None where labels hardly repeat, or texts do: then these are no classes."""
    texts, labels = Counter(map(str, sample.values(text))), Counter(map(str, sample.values(label)))
    if 4 * len(labels) > 3 * len(sample.values(label)) or 2 * len(texts) < len(sample.values(text)):
        return None
    # A text that is there once is not mined as its own positive or negative.
    once = Counter(str(row[label]) for row in sample.rows if label in row and texts[str(row.get(text))] == 1)
    roles, usual = {"text": text, "label": label}, LabelColumns().model_dump()
    columns = {role: column for role, column in roles.items() if column != usual[role]}
    return GuessedFile(sample, "labelled", roles, columns, sum(count for count in once.values() if count > 1))


def _scored(sample: Sample, roles: dict[str, str]) -> GuessedFile:
    usual = StsColumns().model_dump()
    return GuessedFile(sample, "scored", roles, {role: column for role, column in roles.items() if column != usual[role]})


def _plain(name: str) -> str:
    return re.sub(r"[ -]+", "_", name.strip()).lower()


def _fills(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [])


def _why_not(sample: Sample, column: str, called: Collection[str]) -> str:
    """Why a column is not taken for one of texts, in brackets; "" where nothing is said of it.

    Args:
        called: what columns of texts are called: of others it is no wonder that they hold none.
    """
    values, rows = sample.values(column), len(sample.rows)
    if len(values) < MOSTLY * rows:
        return f" (filled in {len(values)} of {rows} rows looked at)"
    if _plain(column) in called and (others := [value for value in values if not _is_texts(value)]):
        return f" ({len(others)} of {rows} rows looked at hold no text, such as {shown(others[0])})"
    return ""


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return all(_is_string(one) and _fills(one) for one in value) if isinstance(value, list) else _is_string(value)


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str | int | float) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _is_classes(sample: Sample, column: str) -> bool:
    """Whether the column holds a few words over and over, as labels that somebody gave."""
    values = Counter(map(str, sample.values(column)))
    return sample.holds(column, _is_string) and 1 < len(values) <= len(sample.rows) / 4


def _varies(sample: Sample, column: str) -> bool:
    """False of a mark that many rows share, such as source: wikipedia."""
    return 20 * len(set(map(str, sample.values(column)))) >= len(sample.rows)


def _is_prose(sample: Sample, column: str) -> bool:
    """Whether the column holds texts that nobody named: words, no numbers, ids, addresses or classes."""
    if _plain(column) in (*JUDGES, *SCORES, *WATCHED, *NAMES["task"].split()) or not sample.holds(column, _is_texts):
        return False
    texts = [str(text).strip() for value in sample.values(column) for text in (value if isinstance(value, list) else [value])]
    words = [text for text in texts if re.search(r"[^\W\d_]", text) and not re.fullmatch(r"[!-~]*[\d/_:@][!-~]*", text)]
    return len(words) >= MOSTLY * len(texts) and _varies(sample, column)
