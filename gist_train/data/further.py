"""Further columns of the files that rows are read from (ids, addresses, dates), for rows that are written again.

Training reads none of them and a corpus has none: they are read from the files a second time, beside the rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from gist_train.config.conditions import Condition
from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import Source, TableSource
from gist_train.data.corpus import Corpus
from gist_train.data.opening import checked, tables
from gist_train.data.rows import ALIASES, NUMBERED
from gist_train.data.scores import COLUMNS
from gist_train.data.tables import Field

FurtherCells = dict[str, object]
"""What a row has in further columns, by their names; None where it has nothing."""
_READ = {name for names in ALIASES.values() for name in names}


class FurtherColumns:
    """Names and cells of the columns that no text of a row is read from.

    Args:
        data: what the corpus was made of.
    """

    def __init__(self, corpus: Corpus, data: DataConfig):
        self._corpus, self._sources = corpus, data.train
        counts = corpus.meta["sources"]
        self._of_source = [_names(source, count["unread"]) for source, count in zip(data.train, counts, strict=True)]
        self._written: dict[str, str] = {}
        for name in dict.fromkeys(name for names in self._of_source for name in names):
            written = name
            while written in self._written.values() or written in _READ or NUMBERED.fullmatch(written):
                written = f"source_{written}"
            self._written[name] = written

    @property
    def names(self) -> list[str]:
        """As they are written, in the order in which they are met: one that is read as a text gets `source_` before it."""
        return [*self._written.values()]

    def of_rows(self, rows: Iterable[int]) -> Iterator[FurtherCells]:
        """For each of `rows`, which ascend: its cells, under all of `names`.

        Raises:
            UserError: a file has other rows than when the corpus was made of it.
        """
        corpus, nothing = self._corpus, dict.fromkeys(self.names)
        for index, of_source in groupby(rows, lambda row: int(corpus.source[row])):
            names = self._of_source[index]
            places = ((int(corpus.file[row]), int(corpus.number[row])) for row in of_source)
            for cells in cells_at(places, self._sources[index], f"data.train[{index}]", names):
                yield nothing | {self._written[name]: cell for name, cell in zip(names, cells, strict=True)}


def cells_at(places: Iterable[tuple[int, int]], source: Source, where: str, names: Sequence[str]) -> Iterator[Sequence[object]]:
    """The cells of columns, row by row; the files are read once, and not at all where no column is asked for.

    Args:
        places: the rows, each by its file and its number there; they ascend.
        where: the source's key in the YAML.
        names: of the columns; one that a file lacks gives None.

    Raises:
        UserError: a row is not there any more.
    """
    if not names:
        for _ in places:
            yield ()
        return
    fields = [Field(None, (name,), False, False, watched=True) for name in names]
    there = (
        ((table.place, table.row), cells[1])
        for table, rows in tables(source, where, fields)
        for cells in checked(table, rows)
        if not isinstance(cells, Fault)
    )
    for wanted in places:
        cells = next((cells for place, cells in there if place == wanted), None)
        if cells is None:
            found = "other rows than when they were first read"
            raise UserError(Fault(where, found, "files that stay as they are", "run it again once nothing writes to them"))
        yield cells


def _names(source: Source, unread: Sequence[str]) -> list[str]:
    """Columns that say something of a row: not the scores of several texts, nor what stands beside one text of two or three."""
    if not isinstance(source, TableSource):
        return []
    given = {} if source.columns is None else source.columns.model_dump(exclude_none=True)
    asked = [] if source.where is None else Condition(source.where).columns
    scores = [given.get(name, name) for name in (COLUMNS["pairs"] if source.scores == "pairs" else ())]
    texts = {name for key, names in ALIASES.items() for name in ([given[key]] if key in given else names)}
    own = [name for name in unread if name not in COLUMNS["texts"]]  # to negatives that are added they would say nothing
    return list(dict.fromkeys([*own, *scores, *(name for name in asked if name not in texts)]))
