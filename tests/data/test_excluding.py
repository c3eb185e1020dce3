"""What is left of a row without the texts that it may not hold."""

import random

import pytest

from gist_train.data.overlap import Exclusion, normalized, normalized_hash
from gist_train.data.rows import Row


def excluding(*texts: str) -> Exclusion:
    return Exclusion({normalized_hash(text) for text in texts})


def row(anchor: str, positives: str, negatives: str = "", labels: str = "") -> Row:
    """A row whose texts are single letters."""
    return Row(anchor, tuple(positives), tuple(negatives), "t", ("a: ", "", ""), "x", tuple(labels))


@pytest.mark.parametrize(
    ("given", "rest"),
    [
        (row("a", "bc", "d"), row("a", "bc", "d")),
        (row("Z", "bc", "d"), None),
        (row("a", "bz", "d"), row("a", "b", "d")),
        (row("a", "zZy", "d"), None),
        (row("a", "b", "zd"), row("a", "b", "d")),
        (row("a", "b", "zy"), row("a", "b")),
        (row("a", "b"), row("a", "b")),
        (row("a", "b", "dzezf", "12345"), row("a", "b", "def", "135")),
        (row("a", "zb", "dz", "12"), row("a", "b", "d", "1")),
    ],
)
def test_rest_of_a_row(given, rest):
    """Texts of an evaluation set go, whole rows only where nothing can be learnt without them; labels stay with their texts."""
    assert excluding("z", "y").rest_of(given, in_batch_negatives=True) == rest


def test_a_row_of_own_negatives_goes_with_its_last_one():
    """It would contrast with nothing, and the whole run would be refused for it; one that came without is refused as ever."""
    exclusion = excluding("z")
    assert exclusion.rest_of(row("a", "b", "zz"), in_batch_negatives=False) is None
    assert exclusion.rest_of(row("a", "b", "zd"), in_batch_negatives=False) == row("a", "b", "d")
    assert exclusion.rest_of(row("a", "b"), in_batch_negatives=False) == row("a", "b")
    assert exclusion.rest_of(row("a", "bz"), in_batch_negatives=False) == row("a", "b")


def test_what_was_met_is_counted_once():
    """The count that the user reads is of texts of their files, not of places, nor of evaluation texts that nobody trains on."""
    exclusion = excluding("z", "y", "nowhere")
    for given in (row("Z", "yb"), row("z", "b"), row("a", "bz", "Y"), row("a", "b")):
        exclusion.rest_of(given, in_batch_negatives=True)
    assert exclusion.met == {"Z", "z", "y", "Y"}
    assert exclusion
    assert not Exclusion(())


def test_no_text_slips_through():
    """The twin: filtered by hand, over rows of any shape."""
    draw = random.Random(1)
    for _ in range(500):
        banned = set(draw.sample("abcdefgh", 3))
        given = row(
            draw.choice("abcdefgh"), "".join(draw.choices("abCDEfgh", k=draw.randint(1, 4))), "abcDefgh"[: draw.randint(0, 8)]
        )
        kept = [[text for text in texts if normalized(text) not in banned] for texts in (given.positives, given.negatives)]
        rest = excluding(*banned).rest_of(given, in_batch_negatives=True)
        if given.anchor in banned or not kept[0]:
            assert rest is None
        else:
            assert rest is not None
            assert (rest.anchor, list(rest.positives), list(rest.negatives)) == (given.anchor, *kept)
            assert (rest.task, rest.prompts, rest.label) == (given.task, given.prompts, given.label)
