"""A file with a line for a step: cut where a run goes back, and no end of a training where there is no room for it."""

from pathlib import Path

from gist_train.data.files import append_text, json_row, lines_from_the_end, sync


class RowFile:
    """Of a run. Lines that can't be written are kept in memory, and written when there is room.

    Args:
        path: None on ranks that write nothing.
        step: lines after it are cut off.
        notes: where it is said that there is no room, and that there is again.
    """

    def __init__(self, path: Path | None, step: int, notes: list[str]):
        self.last = -1
        """The last step that had a line before the file was cut; -1 where none had."""
        self._path, self._notes = path, notes
        self._unwritten, self._refused = "", False
        if path is not None:
            self.last = _cut(path, step)
            path.touch()

    def add(self, text: str) -> None:
        """Takes lines in; they are written by `write`."""
        if self._path is not None:
            self._unwritten += text

    def write(self) -> None:
        """Appends what is not on disk yet."""
        if self._path is None or not self._unwritten:
            return
        try:
            append_text(self._path, self._unwritten)
        except OSError as error:
            if not self._refused:
                self._notes.append(f"warning: {error}. The rows are kept in memory, and written when there is room.")
            self._refused = True
        else:
            if self._refused:
                self._notes.append(f"{self._path}: the rows that were kept in memory are written")
            self._unwritten, self._refused = "", False

    def sync(self) -> None:
        """Has what there is put on the disk."""
        self.write()
        if self._path is not None and self._path.exists():
            sync(self._path)


def _cut(path: Path, step: int) -> int:
    """Leaves the rows up to `step`, and returns the last step that had one; -1 where none had.

    A last line that was cut short when the power went is dropped too.
    """
    if not path.exists():
        return -1
    end, last = 0, -1
    for place, line in lines_from_the_end(path):  # of a long run's file the last rows alone are read
        row = json_row(line)
        if row is None or not isinstance(row.get("step"), int):
            continue
        last = max(last, row["step"])
        if row["step"] <= step:
            end = place + len(line)
            break
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(b"\n" if end else b"")
    sync(path)
    return last
