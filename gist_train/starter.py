"""The user's own files -> a commented starter YAML: what each is good for is guessed, and the YAML says so."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.evaluation import (
    HELD_OUT,
    HELD_OUT_LABELS,
    HELD_OUT_METRICS,
    ClassificationTask,
    RetrievalTask,
    StsTask,
)
from gist_train.data.files import write_text
from gist_train.data.guessing import SAMPLED, SOURCES, GuessedFile, judged
from gist_train.data.hub import is_saved
from gist_train.data.tables import TableFile, encodable

GUIDE_POOLING = {"WhereIsAI/UAE-Large-V1": "mean"}
"""Of a guide whose folder is not to decide it."""
BATCH_SIZE = 32
ENDINGS = ".jsonl, .json, .csv or .tsv, each also with .gz, or .parquet"
TEST_NAME = re.compile(r"(?:^|[._ -])(test|dev|eval|val|valid|validation)$", re.IGNORECASE)
"""Names of files that a model is likely to be judged by."""
SPLIT = re.compile(rf"{TEST_NAME.pattern}|(?:^|[._ -])train(?:ing)?$", re.IGNORECASE)
SHARD = re.compile(r"[._ -]?\d{4,}(?:-of-\d+)?$")
OF_A_DATA_SET = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set and hold no rows."""
SAYS_NOTHING = {"", "data", "dataset", "default", "part"}
"""Names, beside those of splits, that files of any content have."""
METRICS = {"sts": StsTask.METRICS, "classification": ClassificationTask.METRICS, "retrieval": RetrievalTask.METRICS}
FEWEST_HELD_OUT, MOST_HELD_OUT = 10, 1000
"""Rows: with fewer a score says little, with more each evaluation takes long."""
NOT_IN_YAML = yaml.reader.Reader.NON_PRINTABLE


@dataclass(frozen=True, slots=True)
class Judge:
    """What an evaluation task is made of."""

    type: str
    """sts, classification or retrieval."""
    path: str
    """The file that judges, or a folder of documents, queries and judgements."""
    file: GuessedFile | None = None
    """The same, where it is a file."""
    fitted: GuessedFile | None = None
    """The file that a classifier of labelled texts is fitted on."""
    split: str = "test"
    """Whose queries and judgements of a folder are taken."""

    @property
    def metric(self) -> str:
        """What a checkpoint is chosen by."""
        return METRICS[self.type][0]


@dataclass(frozen=True, slots=True)
class Uses:
    """What is done with each of the files."""

    train: list[GuessedFile]
    tasks: dict[str, Judge]
    """By name."""
    left_out: list[tuple[str, str]]
    """Files, and why they do nothing."""


def starter_yaml(files: Sequence[Path], *, model: str, guide: str | None, to: Path) -> str:
    """A commented YAML that trains `model` on `files`, as `load_config` accepts it; a folder means its data files.

    Args:
        model: hub id or local folder of the student.
        guide: hub id or local folder, "self" for the student's own similarities, None for no guide.
        to: where the YAML will be: the commands in it name that file, and the run is called like it.

    Raises:
        UserError: all files that are missing, empty, of an unknown kind, or without columns that could be trained on.
    """
    faults: list[Fault] = []
    guessed: list[GuessedFile] = []
    of_folders: list[Fault] = []
    data_files, judges = _data_files(files, faults)
    for path in data_files:
        try:
            one = judged(path)
            _refuse_judged(one)
            guessed.append(one)
        except UserError as error:  # a file that was named must be of use; of a folder the others may be
            (faults if path in files else of_folders).extend(error.faults)
    uses = _uses(_shards_together(guessed), judges)
    if uses.train:
        uses.left_out.extend((fault.where, f"{fault.found}; {fault.fix}") for fault in of_folders)
    else:
        faults += of_folders
    faults += [fault for one in uses.train if one.use == "labelled" for fault in _labelled_faults(one, guide)]
    if not uses.train and not faults:
        scored, expected = (
            "pairs with a score: they judge a model and train none",
            "a file beside it, of pairs that belong together",
        )
        fix = "name such a file too, or keep the pairs of a high score"
        faults += [Fault(one.sample.path, scored, expected, fix) for one in guessed]
        judging = "documents, queries and judgements: they judge a model and train none"
        faults += [Fault(judge.path, judging, expected, "name such a file too") for judge in judges]
    if faults:
        raise UserError(*faults)
    loader = PackageLoader("gist_train", "")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"yaml": _written, "comment": _comment}
    return environment.get_template("init.yaml.jinja").render(
        name=run_name(to),
        here=_comment(shlex.quote(str(to)), 1000),
        model=model,
        guide=guide,
        pooling=GUIDE_POOLING.get(guide or ""),
        uses=uses,
        task_of=_task_of,
        as_written=_as_written,
        metric=next((f"{name}/{judge.metric}" for name, judge in uses.tasks.items()), _held_out_metric(uses)),
        rows_held_out=_rows_held_out(uses),
        says_nothing=_says_nothing,
        held_out=_held_out,
        on_bad_row="skip" if any(one.unusable for one in uses.train) else "fail",
        # A power of 2 of which the rows give one whole batch.
        batch_size=min(BATCH_SIZE, 1 << int(math.log2(max(1, sum(one.usable for one in uses.train))))),
    )


def run_name(to: Path) -> str:
    """The name of the run that the YAML `to` describes: a plain folder name."""
    return _folder_name(to.stem) or "my-model"


def write_starter(to: Path, text: str, *, force: bool = False) -> None:
    """Writes `text` to `to`, whole or not at all; UserError where something is there, or there is no such folder.

    Args:
        force: whether a file that is there is replaced.
    """
    if os.path.lexists(to) and not (force and to.is_file()):
        fix = "name another file, or add --force to replace it"
        raise UserError(Fault("--to", f"{shown(str(to))}, which exists", "a new file", fix))
    if not to.parent.is_dir():
        raise UserError(Fault("--to", f"{shown(str(to))}, in no folder", "a file in a folder that exists", "make the folder"))
    write_text(to, text)


def _data_files(given: Iterable[Path], faults: list[Fault]) -> tuple[list[Path], list[Judge]]:
    """The files given and those of the folders given, each once, and the folders that judge; adds a fault for what is neither."""
    files: list[Path] = []
    judges: list[Judge] = []
    for path in given:
        there, name = Path(os.path.expanduser(path)), str(path).encode("utf-8", "backslashreplace").decode()
        if not encodable(str(path)):
            faults.append(Fault(name, "a name that is not UTF-8", "a name that a YAML file can hold", "rename it"))
        elif is_saved(there):
            fix = f"leave it out here and write into the YAML: - {{source: hub, path: {_written(str(path))}}}"
            faults.append(Fault(name, "a folder that save_to_disk wrote", "files, or a folder of files", fix))
        elif there.is_dir():
            # Below it too: data sets of the hub have their files in data/.
            judging = {folder: split for folder in (there, *there.rglob("*")) if (split := _split(folder)) is not None}
            judges += [
                Judge("retrieval", str(path / folder.relative_to(there)), split=judging[folder]) for folder in sorted(judging)
            ]
            data = [file for file in there.rglob("*") if _is_data(there, file) and not judging.keys() & {*file.parents}]
            files += sorted(path / file.relative_to(there) for file in data)
            if not data and not judging:
                faults.append(Fault(name, "a folder without data files", f"files that end in {ENDINGS}", "name the files"))
        elif not there.exists():
            fix = f"correct the path: it starts from {Path.cwd()}"
            faults.append(Fault(name, "no such file", "a file or a folder that exists", fix))
        elif _suffix(there) not in SOURCES:
            faults.append(Fault(name, f"the ending {shown(_suffix(there))}", ENDINGS, "write it in one of these formats"))
        else:
            files.append(path)
    return list(dict.fromkeys(files)), judges


def _split(folder: Path) -> str | None:
    """Whose judgements are taken of a folder in BEIR's or the flat layout, test before others; None of any other folder."""
    if not any((folder / f"corpus.jsonl{ending}").is_file() for ending in ("", ".gz")):
        return None
    names = [path.name.split(".tsv")[0].removeprefix("qrels.") for path in sorted(folder.glob("qrels*.tsv*"))]
    names += [path.name.split(".tsv")[0] for path in sorted(folder.glob("qrels/*.tsv*"))]
    return next((name for name in ("test", "dev", *names) if name in names), None)


def _shards_together(guessed: Sequence[GuessedFile]) -> list[GuessedFile]:
    """Files that are parts of one, named by their numbers, as one file whose path is a pattern of them."""
    groups: dict[tuple[object, ...], list[GuessedFile]] = {}
    for one in guessed:
        path = Path(one.sample.path)
        name = path.name[: len(path.name) - len("".join(path.suffixes))]
        stem = SHARD.sub("", name)
        key = (path.parent, stem, path.suffixes, one.use, tuple(one.roles.items())) if stem != name else (path,)
        groups.setdefault(tuple(map(str, key)), []).append(one)
    together = []
    for parts in groups.values():
        first = Path(parts[0].sample.path)
        name = first.name[: len(first.name) - len("".join(first.suffixes))]
        pattern = first.with_name(SHARD.sub("", name) + "*" + "".join(first.suffixes))
        matched = {*map(str, Path(os.path.expanduser(pattern.parent)).glob(pattern.name))}
        if len(parts) > 1 and matched == {os.path.expanduser(part.sample.path) for part in parts}:
            sample = replace(parts[0].sample, path=str(pattern), whole=False)
            together.append(replace(parts[0], sample=sample))
        else:
            together += parts
    return together


def _is_data(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and _suffix(file) in SOURCES and file.name not in OF_A_DATA_SET


def _uses(guessed: Sequence[GuessedFile], judges: Sequence[Judge]) -> Uses:
    """Files whose names say test judge, a labelled one beside its training file; they train only where there are no others."""
    given = [one for one in guessed if one.use != "scored"]
    train = [one for one in given if not _held_out(one)] or given
    tasks: dict[str, Judge] = {}
    for judge in judges:
        tasks[_free_name(Path(os.path.abspath(os.path.expanduser(judge.path))).name, tasks)] = judge
    for one in guessed:
        if one.use == "scored":
            tasks[_free_name(_task_of(one), tasks)] = Judge("sts", one.sample.path, one)
    left_out: list[tuple[str, str]] = []
    held_out = [(one, _fitted_on(one, train)) for one in given if one not in train]
    for one, fitted in sorted(held_out, key=_judging_order):  # so the best judge of a training file comes first
        better = next((judge for judge in tasks.values() if fitted is not None and judge.fitted is fitted), None)
        if one.use == "pairs":
            tasks[_free_name(_task_of(one), tasks)] = Judge("retrieval", one.sample.path, one)
        elif one.use == "medi":
            left_out.append((one.sample.path, "a file in MEDI's format judges nothing"))
        elif fitted is None:
            left_out.append((one.sample.path, "no file above has its columns and labels"))
        elif better is not None:
            left_out.append((one.sample.path, f"{Path(better.path).name} judges in its place"))
        else:
            tasks[_free_name(_set_of(one), tasks)] = Judge("classification", one.sample.path, one, fitted)
    return Uses(train, tasks, left_out)


def _refuse_judged(one: GuessedFile) -> None:
    """Raises UserError where a column judges the pairs: which of them belong together, the user must say."""
    if one.where is None:
        return
    keys = [
        f"source: {one.sample.source}",
        f"path: {_written(one.sample.path)}",
        *_as_written(one),
        f"where: {_written(one.where)}",
    ]
    line = f"- {{{', '.join(keys)}}}"
    found = f"pairs beside a column that judges them; they seem to belong together where {one.where}"
    fix = f"check that, leave the file out here and write into the YAML: {line}"
    raise UserError(Fault(one.sample.path, found, "pairs of texts that belong together", fix))


def _fitted_on(one: GuessedFile, train: Iterable[GuessedFile]) -> GuessedFile | None:
    """The training file that a classifier judged by `one` is fitted on: of its columns, with labels that it has too."""
    fit = [other for other in train if other.use == one.use == "labelled" and other.roles == one.roles]
    fit = [other for other in fit if _labels(other) & _labels(one) and _written_alike(other, one)]
    return max(fit, key=lambda other: (_set_of(other) == _set_of(one), _folders(other)[0] == _folders(one)[0]), default=None)


def _written_alike(one: GuessedFile, other: GuessedFile) -> bool:
    """Whether a task can name both: it says once how its files are written."""
    return (one.sample.delimiter, one.sample.header) == (other.sample.delimiter, other.sample.header)


def _judging_order(judge: tuple[GuessedFile, GuessedFile | None]) -> tuple[bool, bool]:
    """False, which is first: of a file called like its training file, and of a test file before dev and the like."""
    one, fitted = judge
    return fitted is None or _set_of(fitted) != _set_of(one), _held_out(one) != "test"


def _labels(one: GuessedFile) -> set[str]:
    return set(map(str, one.sample.values(one.roles["label"])))


def _labelled_faults(one: GuessedFile, guide: str | None) -> Iterator[Fault]:
    """Why triplets can't be mined from the labelled texts of a file."""
    if guide in (None, "self"):
        unmined = "labelled texts, and no guide that triplets could be mined with"
        yield Fault(one.sample.path, unmined, "a guide model beside labelled texts", "name one: --guide")
    labels = sorted(_labels(one))
    if one.sample.whole and len(labels) == 1:
        found = f"only {shown(labels[0])} under {shown(one.roles['label'])}"
        yield Fault(one.sample.path, found, "two labels or more", "add rows of another class: negatives are of these")


def _suffix(path: Path) -> str:
    return TableFile(path, "").suffix


def _folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _folders(one: GuessedFile) -> list[Path]:
    """The folders that the file is in, the nearest first."""
    return list(Path(os.path.expanduser(one.sample.path)).absolute().parents)


def _stem(one: GuessedFile) -> str:
    """The file's name without endings and the number of a part; of a file that is called by its number, its folder's."""
    return SHARD.sub("", one.sample.name) or _folders(one)[0].name


def _held_out(one: GuessedFile) -> str:
    """The word in the file's name that says so: test, dev, ...; "" where none does."""
    split = TEST_NAME.search(_stem(one))
    return split[1].lower() if split else ""


def _set_of(one: GuessedFile) -> str:
    """What a training file and its test file are both called: banking77 of banking77_test.jsonl and of banking77/test.jsonl."""
    names = [SPLIT.sub("", name) for name in (_stem(one), *(folder.name for folder in _folders(one))) if encodable(name)]
    return next((name for name in names if name.lower() not in SAYS_NOTHING), one.sample.name)


def _as_written(one: GuessedFile) -> list[str]:
    """The keys that say how the file is written, each as in the YAML; none of them where it is as usual."""
    columns = ", ".join(f"{role}: {_written(column)}" for role, column in one.columns.items())
    keys = [f"columns: {{{columns}}}"] if columns else []
    if one.sample.delimiter is not None:
        keys.append(f"delimiter: {_written(one.sample.delimiter)}")
    return keys if one.sample.header else [*keys, "header: false"]


def _rows_held_out(uses: Uses) -> float | int | None:
    """What `evaluation.held_out` is to be where no file judges: a share, fewer of many rows; None where there are too few."""
    rows = sum(map(_estimated_rows, uses.train))
    if uses.tasks or rows < 2 * FEWEST_HELD_OUT:
        return None
    share = 0.05 if 0.05 * rows >= FEWEST_HELD_OUT else 0.2
    return MOST_HELD_OUT if share * rows > MOST_HELD_OUT else share


def _estimated_rows(one: GuessedFile) -> int:
    """Its rows; of a file that was not read to its end by its size, in which a row is as long as those looked at."""
    if one.sample.whole:
        return len(one.sample.rows)
    path = Path(os.path.expanduser(one.sample.path))
    size = sum(part.stat().st_size for part in ([path] if path.exists() else path.parent.glob(path.name)))
    return max(SAMPLED, size * len(one.sample.rows) // max(1, len(json.dumps(one.sample.rows, default=str))))


def _held_out_metric(uses: Uses) -> str | None:
    if _rows_held_out(uses) is None:
        return None
    name = HELD_OUT_LABELS if all(one.use == "labelled" for one in uses.train) else HELD_OUT
    return f"{name}/{HELD_OUT_METRICS[name][0]}"


def _says_nothing(one: GuessedFile) -> bool:
    """Whether files of any content have that name."""
    return SPLIT.sub("", SHARD.sub("", one.sample.name)).lower() in SAYS_NOTHING


def _task_of(one: GuessedFile) -> str:
    """The file's own name, or that of a folder above it, where its own says nothing."""
    return _set_of(one) if _says_nothing(one) else one.sample.name


def _free_name(name: str, taken: Iterable[str]) -> str:
    """A plain folder name that is not taken yet."""
    plain = _folder_name(name) or "texts"
    return next(free for free in chain([plain], (f"{plain}-{number}" for number in count(2))) if free not in taken)


def _written(text: str) -> str:
    """`text` as a YAML scalar for any place: bare where that is safe, else in double quotes with escapes."""
    bare = re.fullmatch(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*", text)
    if bare and text.lower() not in ("true", "false", "null", "yes", "no", "on", "off", "y", "n", "self"):
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def _comment(value: object, characters: int = 60) -> str:
    """A cell's text, or the first of its texts, as it may be in a YAML comment."""
    first, more = (value[0], len(value) - 1) if isinstance(value, list) else (value, 0)
    line = " ".join(str(first).split())
    line = line if len(line) <= characters else line[: characters - 1] + "…"
    return NOT_IN_YAML.sub("\ufffd", line) + (f" (and {more} more)" if more else "")
