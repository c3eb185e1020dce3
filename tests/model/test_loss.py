"""The guided contrastive loss against a double loop, against sentence-transformers, and where both originals are wrong.

Legend: B rows, M negatives, D width of the student, G of the guide. Batches are drawn in float64 unless a test says otherwise.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MatryoshkaLoss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from gist_train.model.loss import BLOCKS, LossOutput, guided_contrastive_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SWITCHES = [(True, True), (True, False), (False, True), (False, False)]


@dataclass(frozen=True)
class Batch:
    """The tensors of one call, by the side that they belong to: anchor, positive, negative."""

    students: tuple[Tensor, Tensor, Tensor | None]
    guides: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    ids: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    labels: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of rows and of negatives, -1 for none."""
    alone: tuple[Tensor | None, Tensor | None] = (None, None)
    """Which rows keep to their own negatives, and the row of each negative."""

    def loss(self, **options: Any) -> LossOutput:
        names = ("guide_anchor", "guide_positive", "guide_negative", "anchor_ids", "positive_ids", "negative_ids")
        names += ("labels", "negative_labels", "own_negatives_only", "negative_rows")
        given = dict(zip(names, (*self.guides, *self.ids, *self.labels, *self.alone), strict=True))
        return guided_contrastive_loss(*self.students, **given, **options)

    @property
    def leaves(self) -> list[Tensor]:
        return [student for student in self.students if student is not None]

    def gradients(self, loss: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves, **options))

    def to(self, dtype: torch.dtype) -> "Batch":
        def cast(tensors, grad):
            return tuple(None if x is None else x.detach().to(dtype).requires_grad_(grad) for x in tensors)

        return replace(self, students=cast(self.students, True), guides=cast(self.guides, False))


def draw(rows: int = 5, pool: int | None = 7, *, guide: bool = True, ids: bool = False, seed: int = 0, dim: int = 4) -> Batch:
    """Random vectors of random length; positives lie near their anchors, in the student and in the guide, as in real data."""
    random = torch.Generator().manual_seed(seed)

    def three(width: int) -> list[Tensor | None]:
        def vectors(n):
            return torch.randn(n, width, dtype=torch.float64, generator=random) * (0.5 + torch.rand(n, 1, generator=random))

        anchor = vectors(rows)
        return [anchor, anchor + 0.8 * vectors(rows), None if pool is None else vectors(pool)]

    def texts(n: int | None) -> Tensor | None:
        return None if n is None else torch.randint(0, 9, (n,), generator=random, dtype=torch.int32)

    students = [None if x is None else x.requires_grad_() for x in three(dim)]
    guides = three(3) if guide else [None] * 3
    return Batch(tuple(students), tuple(guides), tuple(texts(n) for n in (rows, rows, pool)) if ids else (None,) * 3)


def units(angles: list[float]) -> Tensor:
    """Vectors in the plane by their angle in degrees: the similarity of two is the cosine of the angle between them."""
    radians = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def angle_of(similarity: float) -> float:
    return math.degrees(math.acos(similarity))


def double_loop(
    batch: Batch,
    temperature: float = 0.01,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    negatives: str = "all",
    mask: str = "hard",
    softness: float = 0.05,
    votes: str = "any",
    guide_widths: tuple[int, ...] = (3,),
    hardness: float = 0.0,
) -> tuple[Tensor, dict[str, int], dict[str, int]]:
    """DESIGN.md, "The loss", one candidate of one row at a time: loss, masked and candidates of each block."""

    def cosine(x, y):
        return sum(u * v for u, v in zip(x, y, strict=True)) / math.sqrt(sum(u * u for u in x) * sum(v * v for v in y))

    def cosines(x, y):  # of each guide
        ends = list(itertools.accumulate(guide_widths)) if guide_widths != (3,) else [len(x)]
        return [cosine(x[a:b], y[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    a, p, n = ([] if x is None else [row / row.norm() for row in x.unbind()] for x in batch.students)
    guide_a, guide_p, guide_n = ([] if x is None else x.tolist() for x in batch.guides)
    id_a, id_p, id_n = ([] if x is None else x.tolist() for x in batch.ids)
    labels, label_n = ([] if x is None else x.tolist() for x in batch.labels)
    alone, row_n = ([] if x is None else x.tolist() for x in batch.alone)
    masked, candidates = dict.fromkeys(BLOCKS, 0), dict.fromkeys(BLOCKS, 0)
    losses = []
    for i in range(len(a)):
        own = torch.dot(a[i], p[i])
        if guide_a:
            owns = cosines(guide_a[i], guide_p[i])
            thresholds = [x - (margin if margin_strategy == "absolute" else abs(x) * margin) for x in owns]
            needed = {"any": 1, "majority": len(owns) // 2 + 1, "all": len(owns)}[votes]
        others = [j for j in range(len(a)) if j != i and not (alone and alone[i])]
        pool = [k for k in range(len(n)) if not (alone and alone[i]) or row_n[k] == i]
        # block, what looks and what it looks at, for the student and for the guide, texts, labels, columns
        looks = [("ap", a, p, guide_a, guide_p, id_p, labels, others)]
        looks += [("an", a, n, guide_a, guide_n, id_n, label_n, pool)]
        if contrast_anchors:
            looks += [("aa", a, a, guide_a, guide_a, id_a, labels, others)]
        if contrast_positives:
            looks += [("pp", p, p, guide_p, guide_p, id_p, labels, others)]
        stay = [own / temperature]
        for block, x, y, guide_x, guide_y, ids, labels_y, columns in looks:
            for j in columns:
                score = torch.dot(x[i], y[j])
                above = -math.inf
                if guide_a:
                    excess = [x - y for x, y in zip(cosines(guide_x[i], guide_y[j]), thresholds, strict=True)]
                    above = sorted(excess, reverse=True)[needed - 1]
                leaves = bool(id_a) and ids[j] in (id_a[i], id_p[i])
                leaves = leaves or (bool(labels) and labels[i] >= 0 and labels_y[j] == labels[i])
                leaves = leaves or (negatives == "hard" and score.item() < own.item())
                candidates[block] += 1
                masked[block] += leaves or above > 0
                if leaves or (mask == "hard" and above > 0):
                    continue
                weight = 1 / (1 + math.exp(above / softness)) if mask == "soft" else 1.0
                stay.append(score / temperature + hardness * score.item() + math.log(weight))
        losses.append(torch.logsumexp(torch.stack(stay), dim=0) - own / temperature)
    return torch.stack(losses).mean(), masked, candidates


def by_block(counts: Tensor) -> dict[str, int]:
    return dict(zip(BLOCKS, counts.tolist(), strict=True))


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], *, to: float) -> None:
    """Value and every gradient."""
    torch.testing.assert_close(found[0], expected[0], rtol=to, atol=to)
    assert len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=to, atol=to)


def assert_equals_loop(batch: Batch, *, to: float = 1e-9, **options: Any) -> LossOutput:
    found = batch.loss(**options)
    expected, masked, candidates = double_loop(batch, **options)
    # The loop never touches the negatives where all of them leave; ours must give them a gradient, of zero, all the same.
    gradients = batch.gradients(expected, materialize_grads=True)
    assert_same((found.loss, batch.gradients(found.loss)), (expected, gradients), to=to)
    assert (by_block(found.masked), by_block(found.candidates)) == (masked, candidates)
    return found


# Against a double loop


@pytest.mark.parametrize("pool", [None, 5, 7], ids=["M=0", "M=B", "M>B"])
@pytest.mark.parametrize("ids", [False, True], ids=["texts", "ids"])
@pytest.mark.parametrize("guide", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("switches", SWITCHES, ids=["aa+pp", "aa", "pp", "none"])
@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_equals_a_double_loop(strategy, margin, switches, negatives, guide, ids, pool):
    """A mask of the wrong block, side or sign, or a count that takes the row's own column in, still trains, only worse."""
    batch = draw(5, pool, guide=guide, ids=ids, seed=4)
    assert_equals_loop(
        batch,
        temperature=0.1,
        margin=margin,
        margin_strategy=strategy,
        contrast_anchors=switches[0],
        contrast_positives=switches[1],
        negatives=negatives,
    )


SOFT = {"mask": "soft"}
WEIGHED = [SOFT, {**SOFT, "softness": 0.4}, {"hardness": 5.0}, {**SOFT, "hardness": 2.0, "margin": 0.1}]


@pytest.mark.parametrize("block_size", [None, 2, 100])
@pytest.mark.parametrize("pool", [None, 7], ids=["M=0", "M=7"])
@pytest.mark.parametrize("guide", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("options", WEIGHED, ids=str)
def test_soft_masks_and_hardness_equal_a_double_loop(options, negatives, guide, pool, block_size):
    """What is added to a logit has no gradient of its own, and the row's own positive gets none of it."""
    batch = draw(5, pool, guide=guide, ids=True, seed=4)
    found = batch.loss(temperature=0.1, negatives=negatives, block_size=block_size, **options)
    expected, masked, candidates = double_loop(batch, temperature=0.1, negatives=negatives, **options)
    gradients = batch.gradients(expected, materialize_grads=True)
    assert_same((found.loss, batch.gradients(found.loss)), (expected, gradients), to=1e-9)
    assert (by_block(found.masked), by_block(found.candidates)) == (masked, candidates)


@pytest.mark.parametrize("block_size", [None, 2])
def test_soft_masks_and_hardness_over_dimensions_and_parts(block_size):
    """All dimensions share the guide's soft mask; hardness goes by the similarities of each."""
    batch = draw(5, 7, seed=4)
    options = {"mask": "soft", "hardness": 3.0, "temperature": 0.1}
    narrow = replace(batch, students=tuple(x[:, :2] for x in batch.students))
    expected = 2.0 * batch.loss(**options).loss + 0.5 * narrow.loss(**options).loss
    whole = {**options, "dimensions": [4, 2], "dimension_weights": [2.0, 0.5], "block_size": block_size}
    parts = sum(batch.loss(**whole, rows=rows).loss for rows in ((0, 2), (2, 2), (2, 5)))
    assert_same((parts, batch.gradients(parts)), (expected, batch.gradients(expected)), to=1e-9)


@pytest.mark.parametrize("block_size", [None, 2])
def test_the_hard_mask_is_the_limit_of_soft_ones(block_size):
    batch = draw(5, 7, seed=4)
    soft, hard = (batch.loss(mask=mask, softness=1e-6, block_size=block_size) for mask in ("soft", "hard"))
    assert_same((soft.loss, batch.gradients(soft.loss)), (hard.loss, batch.gradients(hard.loss)), to=1e-9)
    assert torch.equal(soft.masked, hard.masked)


VOTES = [{}, {"mask": "soft", "softness": 0.3}, {"margin": 0.1, "margin_strategy": "relative", "hardness": 2.0}]


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("pool", [None, 7], ids=["M=0", "M=7"])
@pytest.mark.parametrize("options", VOTES, ids=["hard", "soft", "margin"])
@pytest.mark.parametrize("votes", ["any", "majority", "all"])
def test_votes_of_guides_equal_a_double_loop(votes, options, pool, block_size):
    batch = of_three_guides(draw(6, pool, seed=3))
    found = batch.loss(guide_widths=(3, 2, 4), votes=votes, temperature=0.1, block_size=block_size, **options)
    expected, masked, _ = double_loop(batch, 0.1, guide_widths=(3, 2, 4), votes=votes, **options)
    assert_same((found.loss, batch.gradients(found.loss)), (expected, batch.gradients(expected)), to=1e-9)
    assert by_block(found.masked) == masked


def of_three_guides(batch: Batch) -> Batch:
    """With the embeddings of two more guides, of other lengths, beside those of the first."""
    random = torch.Generator().manual_seed(5)

    def beside(guide):
        others = torch.randn(len(guide), 6, dtype=torch.float64, generator=random) * 7
        return torch.cat([guide, others + 2 * guide.repeat(1, 2)], dim=1)

    return replace(batch, guides=tuple(None if guide is None else beside(guide) for guide in batch.guides))


def test_more_votes_needed_mask_fewer_candidates():
    batch = of_three_guides(draw(20, 30, seed=1))
    any_, most, all_ = (batch.loss(guide_widths=(3, 2, 4), votes=votes).masked for votes in ("any", "majority", "all"))
    assert (any_ > most).all()
    assert (most > all_).all()


def test_the_vote_of_one_guide_is_its_mask():
    batch = draw()
    one, voted = batch.loss(), batch.loss(guide_widths=(3,), votes="majority")
    assert torch.equal(one.loss, voted.loss)
    assert all(map(torch.equal, batch.gradients(one.loss), batch.gradients(voted.loss)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"votes": "any"}, "votes and guide_widths come together"),
        ({"guide_widths": (3,)}, "votes and guide_widths come together"),
        ({"votes": "some", "guide_widths": (3,)}, 'votes must be "any"'),
        ({"votes": "all", "guide_widths": (3, 2)}, "must add up to 3"),
    ],
)
def test_votes_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        draw().loss(**options)


@pytest.mark.parametrize("options", [{"mask": "fuzzy"}, {"softness": 0.0}, {"hardness": -1.0}, {"hardness": math.nan}])
def test_a_soft_mask_or_hardness_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        draw().loss(**options)


@pytest.mark.parametrize("options", [{}, {"negatives": "hard"}], ids=["all", "hard"])
@pytest.mark.parametrize("kind", ["guide", "ids"])
def test_the_batches_of_the_double_loop_bite(kind, options):
    """If nothing, or everything, were masked in a block, the comparison above would hold whatever the masks are."""
    masked, candidates = double_loop(draw(5, 7, guide=kind == "guide", ids=kind == "ids", seed=4), **options)[1:]
    assert all(0 < masked[block] < candidates[block] for block in BLOCKS)


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_double_loop_at_the_default_options(seed):
    """The defaults are the recipe's: temperature 0.01, margin 0, all blocks, all negatives."""
    found = assert_equals_loop(draw(6, 9, seed=seed, dim=16))
    assert found.row_losses.shape == (6,)
    assert not found.row_losses.requires_grad
    torch.testing.assert_close(found.row_losses.mean(), found.loss.detach())


def test_a_pool_of_none_and_an_empty_pool_are_one():
    """A data set of pairs must not need another call than one of triplets whose negatives ran out."""
    pairs = draw(5, None, ids=True)
    empty = Batch(*((x, y, x.detach()[:0]) for x, y, _ in (pairs.students, pairs.guides, pairs.ids)))
    assert torch.equal(pairs.loss().loss, empty.loss().loss)
    assert by_block(empty.loss().candidates)["an"] == 0


def test_negatives_are_one_flat_pool():
    """Every row contrasts with all negatives, whosever they are: seven of one row and none of the others is a pool of seven,
    and its order is of no account. A loss that pairs negative k with row k would differ, or refuse."""
    batch = draw(3, 7, ids=True)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    turned = Batch(*((x, y, z[order]) for x, y, z in (batch.students, batch.guides, batch.ids)))
    found = assert_equals_loop(batch)
    assert by_block(found.candidates)["an"] == 3 * 7
    torch.testing.assert_close(turned.loss().loss, found.loss)


# Labels, and rows that keep to their own negatives


def labelled(batch: Batch, *, some_without: bool = True) -> Batch:
    """Three labels over rows and negatives, and every fourth without one."""

    def of(count: int) -> Tensor:
        numbers = torch.arange(count)
        return torch.where((numbers % 4 == 3) & some_without, -1, numbers % 3)

    return replace(batch, labels=(of(len(batch.students[0])), None if batch.students[2] is None else of(len(batch.students[2]))))


def with_own_negatives(batch: Batch, *, all_rows: bool = False) -> Batch:
    """Every second row, or every row, keeps to its own negatives, of which some rows have none."""
    rows, pool = len(batch.students[0]), batch.students[2]
    alone = torch.arange(rows) % 2 == 0 if not all_rows else torch.ones(rows, dtype=torch.bool)
    return replace(batch, alone=(alone, None if pool is None else torch.arange(len(pool)) * 2 % (rows - 1)))


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("pool", [None, 7], ids=["M=0", "M=7"])
@pytest.mark.parametrize("guide", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("change", [labelled, with_own_negatives], ids=["labels", "own negatives"])
def test_labels_and_own_negatives_equal_a_double_loop(change, guide, pool, block_size):
    """A label of the wrong side, or a negative of the wrong row, masks what should teach and keeps what should not."""
    batch = change(draw(6, pool, guide=guide, ids=True, seed=7))
    plain = replace(batch, labels=(None, None), alone=(None, None))
    expected, masked, candidates = double_loop(batch, 0.1)
    found = batch.loss(temperature=0.1, block_size=block_size)
    gradients = batch.gradients(expected, materialize_grads=True)
    assert_same((found.loss, batch.gradients(found.loss)), (expected, gradients), to=1e-9)
    assert (by_block(found.masked), by_block(found.candidates)) == (masked, candidates)
    assert (masked, candidates) != double_loop(plain, 0.1)[1:]


def test_candidates_with_the_anchors_label_are_masked():
    """Three rows of one class: all that is left of a row is its own pair and the negative of another class."""
    batch = draw(3, 3, guide=False)
    batch = replace(batch, labels=(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0])))
    found = assert_equals_loop(batch, temperature=0.1)
    assert by_block(found.masked) == {"ap": 6, "an": 6, "aa": 6, "pp": 6}
    assert by_block(found.candidates) == {"ap": 6, "an": 9, "aa": 6, "pp": 6}


def test_rows_without_a_label_mask_nothing():
    """-1 is no label: taken for one, all rows of unlabelled sources would lose each other as negatives."""
    batch = draw(4, 4)
    unlabelled = replace(batch, labels=(torch.full((4,), -1), torch.full((4,), -1)))
    assert torch.equal(unlabelled.loss().loss, batch.loss().loss)
    assert torch.equal(unlabelled.loss().masked, batch.loss().masked)


def test_rows_that_keep_to_themselves_are_a_loss_each():
    """`in_batch_negatives: false` for all rows is the mean of losses over one row at a time."""
    batch = with_own_negatives(draw(6, 9, seed=3), all_rows=True)
    a, p, n = batch.students
    rows = batch.alone[1]
    singly = []
    for i in range(6):
        own = (a[i : i + 1], p[i : i + 1], n[rows == i])
        guides = (batch.guides[0][i : i + 1], batch.guides[1][i : i + 1], batch.guides[2][rows == i])
        singly.append(Batch(own, guides).loss(temperature=0.1).loss)
    torch.testing.assert_close(batch.loss(temperature=0.1).loss, torch.stack(singly).mean())


@pytest.mark.parametrize("given", ["labels", "alone"])
def test_labels_or_rows_of_some_texts_only_are_refused(given):
    """Negatives without a label would be taken for negatives of another class."""
    batch = labelled(with_own_negatives(draw(4, 4)))
    with pytest.raises(ValueError, match="labels" if given == "labels" else "rows"):
        replace(batch, **{given: (getattr(batch, given)[0], None)}).loss()
    with pytest.raises(ValueError, match="labels" if given == "labels" else "rows"):
        replace(batch, **{given: (None, getattr(batch, given)[1])}).loss()


# Against sentence-transformers


class Column(nn.Module):
    """Stands for a SentenceTransformer whose embeddings are known: reads them from the features."""

    def __init__(self, key: str):
        super().__init__()
        self.key, self.max_seq_length = key, 8
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}

    def get_embedding_dimension(self) -> None:
        return None


def peer_loss(batch: Batch, dimensions: dict[int, float] | None = None, **options: Any) -> Tensor:
    columns = [
        {"student": student, "guide": guide}
        for student, guide in zip(batch.students, batch.guides, strict=True)
        if student is not None
    ]
    student = Column("student")
    loss: nn.Module = GISTEmbedLoss(student, Column("guide"), **options)
    if dimensions is not None:
        loss = MatryoshkaLoss(student, loss, list(dimensions), list(dimensions.values()))
    return loss(columns, torch.empty(0))


@pytest.mark.parametrize(("dtype", "temperature", "to"), [(torch.float64, 0.01, 1e-9), (torch.float32, 0.05, 1e-5)])
@pytest.mark.parametrize("switches", SWITCHES, ids=["aa+pp", "aa", "pp", "none"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("pool", [None, 12], ids=["pairs", "triplets"])
def test_equals_sentence_transformers(pool, strategy, margin, switches, dtype, temperature, to):
    """Who comes from there must find the loss that they left.

    Left out, because the peer is wrong there: negative margins and anchors equal to their positives. It has no mask for a row
    against itself, only guide(x, x) = 1 > threshold, which a threshold of 1 or more does not fulfil. See below for ours.
    """
    batch = draw(12, pool, seed=1, dim=16).to(dtype)
    options = {
        "temperature": temperature,
        "margin": margin,
        "margin_strategy": strategy,
        "contrast_anchors": switches[0],
        "contrast_positives": switches[1],
    }
    ours, theirs = batch.loss(**options), peer_loss(batch, **options)
    assert 0 < by_block(ours.masked)["ap"] < by_block(ours.candidates)["ap"]
    assert_same((ours.loss, batch.gradients(ours.loss)), (theirs, batch.gradients(theirs)), to=to)


# Finite differences


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("ids", [False, True], ids=["texts", "ids"])
def test_gradients_equal_finite_differences(ids, negatives, block_size):
    """A similarity that is detached, or a vector normalised twice, gives the right value and a wrong gradient.

    What the guide and the ids mask does not depend on the student; "hard" does, so no candidate may stand near its border.
    """
    batch = draw(4, 5, ids=ids, seed=2)
    a, p, n = (torch.nn.functional.normalize(x.detach()) for x in batch.leaves)
    own = (a * p).sum(dim=1, keepdim=True)
    distances = torch.cat([a @ p.T, a @ n.T, a @ a.T, p @ p.T], dim=1) - own
    assert distances[distances.abs() > 1e-12].abs().min() > 1e-3

    def loss(*students: Tensor) -> Tensor:
        return replace(batch, students=students).loss(temperature=0.1, negatives=negatives, block_size=block_size).loss

    assert torch.autograd.gradcheck(loss, batch.students, eps=1e-6, atol=1e-6)


# Where the originals are wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, -0.1])
def test_a_row_is_never_its_own_negative_even_as_one_text(margin, dtype):
    """There guide(x, x) > guide(q, p) is decided by rounding: the row stays as a negative at full score (0.22 -> 4.22)."""
    rows, width = 32, 24
    drawn = draw(rows, 8, seed=5, dim=width).to(dtype)
    wide = draw(rows, 8, seed=6, dim=width).to(dtype)
    guides = (wide.students[0].detach(), wide.students[0].detach().clone(), wide.students[2].detach())
    batch = replace(drawn, guides=guides)
    found = assert_equals_loop(batch, temperature=0.05, margin=margin, to=1e-9 if dtype == torch.float64 else 2e-5)
    assert by_block(found.masked) == dict.fromkeys(BLOCKS, 0)


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", -0.5), ("relative", -0.5), ("absolute", -3.0)])
def test_diagonals_leave_under_a_negative_margin(strategy, margin, block_size):
    """Threshold above 1: nothing that the guide says removes a row from its own negatives."""
    batch = draw(3, None, seed=0)
    batch = replace(batch, guides=(units([0, 120, 240]), units([20, 140, 260]), None))  # own similarity 0.94, t > 1
    found = batch.loss(temperature=0.1, margin=margin, margin_strategy=strategy, block_size=block_size)
    assert by_block(found.masked) == dict.fromkeys(BLOCKS, 0)
    assert by_block(found.candidates) == {"ap": 6, "an": 0, "aa": 6, "pp": 6}
    expected = double_loop(replace(batch, guides=(None,) * 3), temperature=0.1)[0]
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize(
    ("strategy", "similarity", "leaves"),
    [
        pytest.param("relative", -0.42, True, id="above -0.44"),
        pytest.param("relative", -0.46, False, id="below -0.44"),
        pytest.param("absolute", -0.48, True, id="above -0.5"),
        pytest.param("absolute", -0.52, False, id="below -0.5"),
    ],
)
def test_a_margin_lowers_a_negative_threshold(strategy, similarity, leaves):
    """g (1 - margin) raises a negative g from -0.4 to -0.36: the margin then keeps what it ought to remove."""
    batch = draw(1, 1)
    batch = replace(batch, guides=(units([0]), units([angle_of(-0.4)]), units([-angle_of(similarity)])))
    assert by_block(batch.loss(margin=0.1, margin_strategy=strategy).masked)["an"] == leaves


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_equal_to_the_threshold_is_not_above_it(strategy):
    """Strictly greater leaves, as in the originals. Along the axes similarities are 0 and 1 without rounding."""
    axes = torch.eye(3, dtype=torch.float64)
    batch = replace(draw(1, 3), guides=(axes[:1], axes[:1], axes))
    assert by_block(batch.loss(margin_strategy=strategy).masked)["an"] == 0
    batch = replace(batch, guides=(axes[:1], axes[1:2], axes))
    assert by_block(batch.loss(margin_strategy=strategy).masked)["an"] == 1


def with_duplicates(dtype: torch.dtype, width: int = 48) -> Batch:
    """24 rows, of which the last 12 have the positives of the first 12, and whose negatives are those positives again."""
    student, guide = (draw(24, None, seed=seed, dim=width) for seed in (8, 9))
    ids = torch.arange(36, dtype=torch.int32)

    def repeat(anchor, positive):
        twice = torch.cat([positive[:12], positive[:12]])
        return anchor, twice, twice[:12].clone()

    three = repeat(*(x.detach() for x in student.leaves))
    return Batch(three, repeat(*(x.detach() for x in guide.leaves)), repeat(ids[:24], ids[12:])).to(dtype)


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_remove_exact_duplicates_of_the_positive(dtype, block_size):
    """Their similarity equals the threshold, so that the guide keeps them: the row is pushed away from its own positive."""
    batch = with_duplicates(dtype)
    found = batch.loss(temperature=0.05, block_size=block_size)
    expected, masked, _ = double_loop(batch.to(torch.float64), temperature=0.05)
    assert by_block(found.masked) == masked
    assert masked["ap"] >= 24
    assert masked["an"] >= 24
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_ids_exact_duplicates_of_the_positive_stay(dtype, block_size):
    """Equal to the threshold is not above it: as in the originals, a duplicate stays, and not now and then by rounding."""
    batch = replace(with_duplicates(dtype), ids=(None,) * 3)
    _, positive, negative = batch.guides
    near = positive + 0.3 * batch.guides[0]  # so near to their positives that nothing but duplicates comes close to the threshold
    found = replace(batch, guides=(near, positive, negative)).loss(temperature=0.05, block_size=block_size)
    assert by_block(found.masked) == dict.fromkeys(BLOCKS, 0) | {"pp": 24}  # pp: s(p_i, p_j) of a twin is 1


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("pool", [None, 3])
def test_rows_without_candidates_have_loss_and_gradient_zero(pool, block_size):
    """Minus infinity against minus infinity is not a number, in the softmax or on the way back."""
    batch = draw(4, pool)
    a = torch.randn(4, 3, dtype=torch.float64)
    batch = replace(batch, guides=(a, -a, None if pool is None else torch.randn(3, 3, dtype=torch.float64)))
    found = batch.loss(block_size=block_size)
    assert by_block(found.masked) == by_block(found.candidates)
    assert found.loss.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in batch.gradients(found.loss))


def test_one_row_whose_candidates_all_leave_spoils_no_other():
    """A row of loss 0 counts in the mean and leaves the others' losses and gradients as they are."""
    batch = draw(4, 5)
    guides = [x.clone() for x in batch.guides]
    guides[1][2] = -guides[0][2]
    found = assert_equals_loop(replace(batch, guides=tuple(guides)), temperature=0.1)
    assert found.row_losses[2] == 0.0
    assert (found.row_losses[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("guide", [False, True], ids=["unguided", "guided"])
def test_a_batch_of_one_pair_has_loss_zero(guide):
    """There is nothing to contrast with: a diagonal that stays makes a loss out of the row itself."""
    batch = draw(1, None, guide=guide)
    found = batch.loss(margin=-0.1)
    assert found.loss.item() == 0.0
    assert found.candidates.tolist() == [0, 0, 0, 0]
    assert all(gradient.count_nonzero() == 0 for gradient in batch.gradients(found.loss))


def test_a_batch_of_one_triplet_contrasts_with_its_negatives():
    """Single rows come from small tasks, and from the last rank."""
    found = assert_equals_loop(draw(1, 3, guide=False), temperature=0.1)
    assert by_block(found.candidates) == {"ap": 0, "an": 3, "aa": 0, "pp": 0}


@pytest.mark.parametrize("switches", SWITCHES, ids=["aa+pp", "aa", "pp", "none"])
def test_without_negatives_the_rows_contrast_with_each_other(switches):
    """A switch that turns the wrong block off shows in the counts."""
    found = assert_equals_loop(draw(5, None), contrast_anchors=switches[0], contrast_positives=switches[1], temperature=0.1)
    assert by_block(found.candidates) == {"ap": 20, "an": 0, "aa": 20 * switches[0], "pp": 20 * switches[1]}


# Fast paths against slow twins


@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("pool", [None, 5])
@pytest.mark.parametrize("block_size", [1, 3, 7, 11, 100])
def test_blocks_of_rows_equal_the_whole(block_size, pool, negatives):
    """A block that forgets where it starts takes another row's positive for its own."""
    batch = draw(11, pool, ids=True)
    dense, blocks = (batch.loss(temperature=0.1, negatives=negatives, block_size=size) for size in (None, block_size))
    assert_same((blocks.loss, batch.gradients(blocks.loss)), (dense.loss, batch.gradients(dense.loss)), to=1e-12)
    assert torch.equal(blocks.masked, dense.masked)
    assert torch.equal(blocks.candidates, dense.candidates)
    torch.testing.assert_close(blocks.row_losses, dense.row_losses)


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and self.counts(x)]
        self.numel = max([self.numel, *sizes])
        return out

    def counts(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point()


@pytest.mark.parametrize(("block_size", "whole"), [(None, True), (2, False)])
def test_with_blocks_no_whole_matrix_is_in_memory(block_size, whole):
    """Blocks that are joined again, forward or backward, cost the memory that they are there to save."""
    rows = 64
    batch = draw(rows, rows)
    with Largest() as largest:
        batch.loss(block_size=block_size).loss.backward()
    assert (largest.numel >= rows * rows) == whole


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 2, 9), (0, 5, 5, 9), (0, 0, 9, 9), tuple(range(10))], ids=str)
def test_parts_of_the_rows_sum_to_the_whole(cuts, block_size):
    """Processes share a batch: a part that averages over its own rows, or takes column 0 for its first positive, gives another
    loss on two processes than on one. Rows per process may differ, and a process may have none."""
    batch = draw(9, 6, ids=True)
    whole = batch.loss(temperature=0.1)
    parts = [batch.loss(temperature=0.1, block_size=block_size, rows=rows) for rows in itertools.pairwise(cuts)]
    total = torch.stack([part.loss for part in parts]).sum()
    assert_same((total, batch.gradients(total)), (whole.loss, batch.gradients(whole.loss)), to=1e-12)
    assert torch.equal(sum(part.masked for part in parts), whole.masked)
    assert torch.equal(sum(part.candidates for part in parts), whole.candidates)
    torch.testing.assert_close(torch.cat([part.row_losses for part in parts]), whole.row_losses)


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_part_without_rows_gives_zero_and_a_gradient(start, block_size):
    """A rank without rows that has no backward pass lets all others wait for ever in the gradient's gather."""
    batch = draw(5, 4)
    found = batch.loss(rows=(start, start), block_size=block_size)
    assert found.loss.item() == 0.0
    assert found.row_losses.shape == (0,)
    assert found.masked.tolist() == found.candidates.tolist() == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(found.loss, batch.students[0])
    assert torch.equal(gradient, torch.zeros_like(gradient))


# Dimensions


DIMENSIONS = {3: 0.5, 5: 1.0, 2: 2.0}
WEIGHTED = {"dimensions": list(DIMENSIONS), "dimension_weights": list(DIMENSIONS.values())}


def cut(batch: Batch, dimension: int) -> Batch:
    """The first numbers of the student's embeddings; the guide's stay whole."""
    return replace(batch, students=tuple(None if x is None else x[:, :dimension] for x in batch.students))


def double_loop_over_dimensions(batch: Batch, **options: Any) -> tuple[Tensor, dict[str, int], dict[str, int]]:
    """A double loop for each dimension; the counts are those of the largest."""
    loops = {dimension: double_loop(cut(batch, dimension), **options) for dimension in DIMENSIONS}
    loss = torch.stack([weight * loops[dimension][0] for dimension, weight in DIMENSIONS.items()]).sum()
    return loss, *loops[max(DIMENSIONS)][1:]


def guided_by_itself(batch: Batch) -> Batch:
    """The student's own similarities as guide: those of the whole embedding."""
    return replace(batch, guides=tuple(None if x is None else x.detach() for x in batch.students))


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("pool", [None, 7], ids=["M=0", "M=7"])
@pytest.mark.parametrize("guide", ["unguided", "guided", "self"])
def test_dimensions_equal_a_double_loop_for_each(guide, pool, negatives, block_size):
    """A cut that is not normalised again, a guide that is cut too, a weight of another dimension, or hard negatives of the
    largest dimension for all of them: each still trains, only worse."""
    batch = draw(5, pool, guide=guide == "guided", ids=True, seed=4, dim=6)
    batch = with_own_negatives(labelled(guided_by_itself(batch) if guide == "self" else batch))
    found = batch.loss(temperature=0.1, negatives=negatives, block_size=block_size, **WEIGHTED)
    expected, masked, candidates = double_loop_over_dimensions(batch, temperature=0.1, negatives=negatives)
    gradients = batch.gradients(expected, materialize_grads=True)
    assert_same((found.loss, batch.gradients(found.loss)), (expected, gradients), to=1e-9)
    assert (by_block(found.masked), by_block(found.candidates)) == (masked, candidates)
    torch.testing.assert_close(found.row_losses.mean(), found.loss.detach())


def test_hard_negatives_differ_by_dimension():
    """If they did not, the comparison above would hold whichever dimension decides about them."""
    masked = [double_loop(cut(draw(5, 7, ids=True, seed=4, dim=6), d), negatives="hard")[1] for d in DIMENSIONS]
    assert len({tuple(counts.values()) for counts in masked}) == len(DIMENSIONS)


@pytest.mark.parametrize("switches", [(True, True), (False, False)], ids=["aa+pp", "none"])
@pytest.mark.parametrize("pool", [None, 12], ids=["pairs", "triplets"])
def test_dimensions_equal_sentence_transformers(pool, switches):
    """Who comes from MatryoshkaLoss(GISTEmbedLoss) must find the loss that they left: the sum of the dimensions, and no mean."""
    batch = draw(12, pool, seed=1, dim=16)
    options = {"temperature": 0.05, "contrast_anchors": switches[0], "contrast_positives": switches[1]}
    dimensions = {16: 1.0, 8: 0.5, 3: 2.0}
    ours = batch.loss(dimensions=list(dimensions), dimension_weights=list(dimensions.values()), **options)
    theirs = peer_loss(batch, dimensions, **options)
    assert_same((ours.loss, batch.gradients(ours.loss)), (theirs, batch.gradients(theirs)), to=1e-9)
    unweighted = peer_loss(batch, dict.fromkeys(dimensions, 1), **options)
    torch.testing.assert_close(batch.loss(dimensions=list(dimensions), **options).loss, unweighted)


class Products(TorchDispatchMode):
    """Counts matrix products by the width of the vectors that are multiplied."""

    def __init__(self):
        super().__init__()
        self.of_width: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            width = args[-1].shape[0]
            self.of_width[width] = self.of_width.get(width, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("block_size", "tiles"), [(None, 4), (4, 3 * (3 + 2 + 3 + 3))])
def test_the_guides_masks_serve_all_dimensions(block_size, tiles):
    """A guide of 1,024 numbers costs more than the student's 384 + 256 + 128 + 64: asked for each it is most of the work."""
    batch = draw(11, 7, ids=True, dim=6)  # the guide's width is 3
    with torch.no_grad(), Products() as products:
        batch.loss(dimensions=[6, 5, 4, 2], block_size=block_size)
    assert products.of_width == dict.fromkeys((3, 6, 5, 4, 2), tiles)


@pytest.mark.parametrize("block_size", [None, 2])
def test_parts_of_the_rows_sum_to_the_whole_over_dimensions(block_size):
    """Processes share a batch with dimensions as without; one may have no row, and its loss needs a gradient all the same."""
    batch = draw(9, 6, ids=True, dim=6)
    whole = batch.loss(temperature=0.1, **WEIGHTED)
    cuts = (0, 0, 4, 9)
    parts = [batch.loss(temperature=0.1, block_size=block_size, rows=rows, **WEIGHTED) for rows in itertools.pairwise(cuts)]
    assert parts[0].loss.item() == 0.0
    assert torch.autograd.grad(parts[0].loss, batch.students[0], retain_graph=True)[0].count_nonzero() == 0
    total = torch.stack([part.loss for part in parts]).sum()
    assert_same((total, batch.gradients(total)), (whole.loss, batch.gradients(whole.loss)), to=1e-12)
    assert torch.equal(sum(part.masked for part in parts), whole.masked)


def test_the_order_of_dimensions_is_of_no_account():
    """A weight must stay with its dimension, and the counts with the largest."""
    batch = draw(6, 6, ids=True, dim=6)
    one = batch.loss(dimensions=[5, 3], dimension_weights=[1.0, 2.0], negatives="hard")
    other = batch.loss(dimensions=[3, 5], dimension_weights=[2.0, 1.0], negatives="hard")
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.masked, other.masked)


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_whole_embedding_as_the_one_dimension_changes_no_bit(block_size):
    """Without dimensions nothing may be cut, weighed or added up otherwise than with this one."""
    batch = draw(9, 9, ids=True, dim=6).to(torch.float32)
    plain, one = batch.loss(block_size=block_size), batch.loss(block_size=block_size, dimensions=[6])
    assert torch.equal(plain.loss, one.loss)
    for ours, theirs in zip(batch.gradients(one.loss), batch.gradients(plain.loss), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dimensions", "weights", "told"),
    [
        ([], None, "dimensions"),
        ([2, 2], None, "dimensions"),
        ([4, 0], None, "dimensions"),
        ([4, 7], None, "1 to 6"),
        ([4, 2], [1.0], "2 numbers"),
        ([4, 2], [1.0, 0.0], "above 0"),
        (None, [1.0], "need dimensions"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(dimensions, weights, told):
    """A slice past the end is the whole embedding and no error: the loss would count it twice in silence."""
    with pytest.raises(ValueError, match=told):
        draw(dim=6).loss(dimensions=dimensions, dimension_weights=weights)


# Precision and length


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_of_half_precision_are_float32(dtype, block_size):
    """At temperature 0.01 a bf16 similarity near 1 is a logit that is off by 0.4."""
    batch = draw(8, 8, seed=4, dim=32).to(dtype)
    exact = batch.to(torch.float32)
    found, expected = batch.loss(block_size=block_size), exact.loss()
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.masked, expected.masked)
    for half, full in zip(batch.gradients(found.loss), exact.gradients(expected.loss), strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half, full.to(dtype))


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autocast_around_the_loss_changes_nothing(dtype, block_size):
    """The student runs under autocast, and the loss may be called there: its matmul would be bf16, backward's too."""
    batch = draw(8, 8, seed=4, dim=32).to(dtype)
    expected = batch.loss(block_size=block_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = batch.loss(block_size=block_size)
    assert found.loss.dtype == expected.loss.dtype
    assert torch.equal(found.loss, expected.loss)
    for ours, theirs in zip(batch.gradients(found.loss), batch.gradients(expected.loss), strict=True):
        assert torch.equal(ours, theirs)


def test_float64_stays_float64():
    """Tests of gradients need it: a cast to float32 in between shows only in the digits."""
    batch = draw(8, 8, seed=4)
    found = batch.loss()
    assert found.loss.dtype == found.row_losses.dtype == torch.float64
    assert abs(found.loss.item() - batch.to(torch.float32).loss().loss.item()) > 1e-12
    assert_equals_loop(batch, to=1e-12)


@pytest.mark.parametrize("what", ["students", "guides"])
def test_length_of_a_vector_is_of_no_account(what):
    """Embeddings come unnormalised from a model without a Normalize module, and similarities are cosines all the same."""
    batch = draw(6, 6)
    unit = replace(batch, **{what: tuple(torch.nn.functional.normalize(x) for x in getattr(batch, what))})
    longer = replace(batch, **{what: tuple(7.0 * x for x in getattr(batch, what))})
    for other in (unit, longer):
        torch.testing.assert_close(other.loss().loss, batch.loss().loss)
        assert torch.equal(other.loss().masked, batch.loss().masked)


# What is refused


def swapped(three: tuple, at: int, value: Any) -> tuple:
    return tuple(value if i == at else x for i, x in enumerate(three))


@pytest.mark.parametrize("field", ["guides", "ids"])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["anchor", "positive", "negative"])
def test_a_guide_or_ids_for_some_texts_only_are_refused(at, field):
    """Taken for "no guide", a forgotten tensor would train unguided without a word."""
    batch = draw(4, 4, ids=True)
    with pytest.raises(ValueError, match="guide" if field == "guides" else "ids"):
        replace(batch, **{field: swapped(getattr(batch, field), at, None)}).loss()


@pytest.mark.parametrize("field", ["guides", "ids"])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["anchor", "positive", "negative"])
def test_a_guide_or_ids_of_another_length_are_refused(at, field):
    """A guide of another batch broadcasts where it has one row, and masks by the wrong texts."""
    batch = draw(4, 4, ids=True)
    with pytest.raises(ValueError, match=("anchor", "positive", "negative")[at]):
        replace(batch, **{field: swapped(getattr(batch, field), at, getattr(batch, field)[at][:1])}).loss()


@pytest.mark.parametrize(
    ("at", "shape"),
    [
        pytest.param(1, (3, 4), id="fewer positives"),
        pytest.param(1, (4, 5), id="wider positives"),
        pytest.param(2, (4, 5), id="wider negatives"),
        pytest.param(2, (4, 1, 4), id="negatives by row"),
    ],
)
def test_embeddings_of_other_shapes_are_refused(at, shape):
    """Rows and widths that do not fit must be named, not met as a broadcast."""
    batch = draw(4, 4, guide=False)
    with pytest.raises(ValueError, match=("anchor", "positive", "negative")[at]):
        replace(batch, students=swapped(batch.students, at, torch.randn(shape, dtype=torch.float64))).loss()


@pytest.mark.parametrize("temperature", [0.0, -0.01])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    """Zero divides, and a negative one trains the model to put its positives last."""
    with pytest.raises(ValueError, match="temperature"):
        draw().loss(temperature=temperature)


def test_an_unknown_margin_strategy_is_refused():
    """A slip of the pen must not fall back to the other strategy."""
    with pytest.raises(ValueError, match="margin_strategy"):
        draw().loss(margin_strategy="percent")
