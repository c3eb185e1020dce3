"""Which texts count as the same, and how many texts and rows a corpus shares with an evaluation set."""

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.corpora import ROWS, built, data_of, read_back

from gist_train.data import overlap
from gist_train.data.corpus import Corpus
from gist_train.data.overlap import Overlap, count_overlaps, normalized, normalized_hash, normalized_hashes


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("How do I reset my password?", "how do I reset my  password"),
        ("How do I reset\nmy\tpassword ?", " how do i reset my password."),
        ("It’s “free”…", 'it\'s "free"'),
        ("``free'' of charge", '"free" of charge'),
        ("ＡＢＣ１！", "abc1"),
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),
        ("cafe\u0301", "café"),
        ("pass\u00adword\u200b", "\ufeffpassword"),
        ("well-known", "well known"),
        ("日本語。", "日本語"),
        ("non\u00a0breaking", "non breaking"),
    ],
)
def test_copies_are_the_same(text, other):
    """What copies of a data set differ in must not hide that a text was trained on."""
    assert normalized(text) == normalized(other)
    assert normalized_hash(text) == normalized_hash(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("C++", "C"),
        ("2 + 2", "2 - 2"),
        ("$5", "€5"),
        ("password", "pass word"),
        ("well-known", "wellknown"),
        ("resume", "résumé"),
        ("कि", "की"),  # they differ in a vowel sign, which is neither letter nor digit
        ("ab", "ba"),
        ("?", "!"),
        ("?", "..."),
        ("?", "\u200b"),
        ("👍", "👎"),
    ],
)
def test_other_texts_are_not(text, other):
    """Texts of another meaning must not leave the training; those of punctuation alone must not all be one."""
    assert normalized(text) != normalized(other)
    assert normalized_hash(text) != normalized_hash(other)


@pytest.mark.parametrize("text", ["?", "...", "\u200b", "«»", "- -"])
def test_punctuation_alone_stays_as_it_is(text):
    """Empty, it would be equal to every other."""
    assert normalized(text) == text


def slowly(text: str) -> str:
    """`normalized`, character by character."""
    words = [""]
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind in ("Cc", "Sk", "Zs", "Zl", "Zp", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"):
            words.append("")
        else:
            words[-1] += character
    return " ".join(filter(None, words)) or text


def test_the_twin_normalises_alike(quickstart_texts):
    """The table of characters is filled as they come: what came before must not decide."""
    draw = random.Random(0)
    drawn = ["".join(chr(draw.choice((draw.randrange(128), draw.randrange(0xD800)))) for _ in range(20)) for _ in range(2_000)]
    for text in [*quickstart_texts, *drawn]:
        assert normalized(text) == slowly(text)
        assert normalized(normalized(text)) == normalized(text)


def counted(corpus: Corpus, part: Sequence[str]) -> Overlap:
    """The twin of `count_overlaps`: Python's sets over the rows as they are read back."""
    wanted = {normalized(text) for text in part}
    rows = [{normalized(t) for t in (row["anchor"], *row["positive"], *row["negative"])} for row in read_back(corpus)]
    return Overlap(len(wanted), len(wanted & set().union(*rows)), sum(bool(wanted & row) for row in rows))


def drawn_rows(seed: int, count: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def text() -> str:
        return draw.choice(("text {}", "Text  {}!", "TEXT-{}", "other {}")).format(draw.randrange(40))

    return [
        {"anchor": text(), "positive": [text() for _ in range(draw.randint(1, 3))], "negative": [text() for _ in range(i % 3)]}
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_sets(tmp_path, write_rows, seed):
    """A count that is off by the offsets of positives or negatives would acquit rows that were trained on."""
    corpus = built(
        tmp_path / "corpus",
        data_of(
            write_rows("rows.jsonl", drawn_rows(seed, 120)),
        ),
    )
    draw = random.Random(seed + 100)
    parts = [[f"text {draw.randrange(80)}" for _ in range(size)] for size in (1, 5, 30, 60)]
    parts += [["Other, 3", "other 3", "?"], ["nowhere"], []]
    assert count_overlaps(corpus, parts) == [counted(corpus, part) for part in parts]
    assert any(found.shared for found in count_overlaps(corpus, parts))


def test_every_column_counts(tmp_path, write_rows):
    """A test text among the negatives was read by the student too."""
    rows = [
        {"anchor": "A?", "positive": ["p", "b"], "negative": ["n", "c"]},
        {"anchor": "q", "positive": "a", "negative": []},
        {"anchor": "q", "positive": "p"},
        {"anchor": "a", "positive": "A", "negative": "a."},
    ]
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", rows)))
    assert count_overlaps(corpus, [["a"], ["B"], ["c!"], ["d"], ["a", "b", "c", "d"]]) == [
        Overlap(1, 1, 3),
        Overlap(1, 1, 1),
        Overlap(1, 1, 1),
        Overlap(1, 0, 0),
        Overlap(4, 3, 3),
    ]


def test_nothing_to_look_for_reads_nothing(tmp_path, write_rows, monkeypatch):
    """A run without tasks must not pay for a pass over four million texts."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    monkeypatch.setattr(Corpus, "texts", lambda *_: pytest.fail("the texts were read"))
    assert count_overlaps(corpus, []) == []
    assert count_overlaps(corpus, [[]]) == [Overlap(0, 0, 0)]


def test_texts_are_normalised_once(tmp_path, write_rows, monkeypatch):
    """Each resume and each plan would pay for it again; and hashes of another rule would find nothing."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    hashes = normalized_hashes(corpus)
    assert [row.tobytes() for row in hashes] == [normalized_hash(text) for text in corpus.texts()]
    read: list[Path] = []
    real = Corpus.texts
    monkeypatch.setattr(Corpus, "texts", lambda self: (read.append(self.folder), real(self))[1])
    assert (normalized_hashes(Corpus(corpus.folder)) == hashes).all()
    assert read == []
    monkeypatch.setattr(overlap, "NORMALIZATION", overlap.NORMALIZATION + 1)
    normalized_hashes(corpus)
    assert read == [corpus.folder]


def test_an_interrupted_pass_leaves_nothing(tmp_path, write_rows, monkeypatch):
    """The hashes of some texts, taken for those of all, would acquit the others."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    real = overlap.np.save

    def interrupted(path, values):
        real(path, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(overlap.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        normalized_hashes(corpus)
    monkeypatch.undo()
    assert not list(corpus.folder.glob("*normalized*"))
    assert len(normalized_hashes(corpus)) == corpus.text_count
