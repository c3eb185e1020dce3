"""What a column beside pairs says of them: pairs that do not belong together must not be trained as if they did."""

from collections.abc import Sequence

from gist_train.config.errors import Fault, UserError, shown
from gist_train.data.tables import Table

JUDGES = (
    "label",
    "gold_label",
    "is_duplicate",
    "is_positive",
    "is_relevant",
    "relevant",
    "relevance",
    "clicked",
    "judgement",
    "judgment",
)
SCORES = ("score", "similarity", "similarity_score", "relevance_score")
COUNTS = ("clicks", "click_count")
WATCHED = (*JUDGES, *SCORES, *COUNTS)
"""Columns that may say of a pair whether it belongs together."""
ENTAILMENT = "entailment"
MOST_VALUES = 1000
"""Different values of a watched column that are remembered."""


class Judging:
    """What columns beside pairs say of them: pairs that do not belong together must not be trained as if they did.

    Args:
        names: of the columns that are watched.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._seen: list[set[object]] = [set() for _ in names]
        self._rows = 0

    def see(self, values: Sequence[object], *, has_negative: bool) -> None:
        """Takes in a row's cells. A row that has negatives of its own is no judged pair."""
        if has_negative:
            return
        self._rows += 1
        for value, seen in zip(values, self._seen, strict=True):
            if value is not None and len(seen) <= MOST_VALUES:
                seen.add(_number(value))

    def verdict(self) -> tuple[str, str] | None:
        """The column that says that some of the pairs do not belong together, and a condition that chooses the others."""
        for name, seen in zip(self._names, self._seen, strict=True):
            if name in JUDGES and ENTAILMENT in seen and len(seen) > 1:
                return name, f'{name} == "{ENTAILMENT}"'
            values = {value for value in seen if isinstance(value, float)}
            if len(values) < len(seen) or not values:  # texts, lists: something else than a judgement
                continue
            least, most = min(values), max(values)
            if name in JUDGES and least <= 0.0 and values <= {-1.0, 0.0, 1.0, 2.0}:
                # Three classes are those of NLI: 0 is entailment, and -1 what the annotators disagreed on.
                return name, f"{name} == 0" if name == "label" and most == 2.0 else f"{name} == 1"
            if name in COUNTS and least == 0.0 < most:
                return name, f"{name} > 0"
            if name in SCORES and least < most:
                return name, f"{name} >= {least + 0.8 * (most - least):g}"
        return None

    def refuse(self, table: Table) -> None:
        """Raises UserError where a column says that some of the pairs do not belong together."""
        if (verdict := self.verdict()) is not None:
            name, condition = verdict
            found = "numbers beside pairs that differ: some of these do not belong together"
            fix = f"set where: {shown(condition)} on the source, or another condition on {name}"
            expected = "pairs that belong together, or a condition that chooses them"
            raise UserError(Fault(f"{table.label}: column {shown(name)}", found, expected, fix))


def _number(value: object) -> object:
    """A number, truth or numeric text as a float; anything else as something that is none: NLI's word is kept."""
    try:
        return float(value) if isinstance(value, int | float | str) else type(value)
    except ValueError:
        word = str(value).strip().lower()
        return word if word == ENTAILMENT else {"true": 1.0, "false": 0.0}.get(word, "text")
