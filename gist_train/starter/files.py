"""The files that a user names, those in folders, and folders that judge."""

import os
from collections.abc import Iterable
from pathlib import Path

from gist_train.config.errors import Fault, shown
from gist_train.data.hub import is_saved
from gist_train.data.tables import TableFile, encodable
from gist_train.starter.guessing import SOURCES
from gist_train.starter.uses import Judge
from gist_train.starter.yaml_text import written

ENDINGS = ".jsonl, .json, .csv or .tsv, each also with .gz, .parquet or .xlsx"
OF_A_DATA_SET = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set and hold no rows."""


def data_files(given: Iterable[Path], faults: list[Fault]) -> tuple[list[Path], list[Judge]]:
    """The files given and those of the folders given, each once, and the folders that judge; adds a fault for what is neither."""
    files: list[Path] = []
    judges: list[Judge] = []
    for path in given:
        there, name = Path(os.path.expanduser(path)), str(path).encode("utf-8", "backslashreplace").decode()
        if not encodable(str(path)):
            faults.append(Fault(name, "a name that is not UTF-8", "a name that a YAML file can hold", "rename it"))
        elif is_saved(there):
            fix = f"leave it out here and write into the YAML: - {{source: hub, path: {written(str(path))}}}"
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


def _is_data(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and _suffix(file) in SOURCES and file.name not in OF_A_DATA_SET


def _suffix(path: Path) -> str:
    return TableFile(path, "").suffix
