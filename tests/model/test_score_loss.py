"""What is learned of scores, against a loop over rows.

Legend: B rows, M negatives, D width.
"""

import math

import pytest
import torch

from gist_train.model.scores import score_loss

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan
# Two rows with scored negatives, one with a negative that has none, three scored pairs, one row without any score.
POSITIVE = [3.0, -1.5, 4.0, 0.0, 5.0, 2.5, NAN]
NEGATIVE = [(0, 2.0), (0, -4.0), (1, -1.0), (2, NAN), (6, 1.0)]


def batch(width=4, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(n, width, generator=random, dtype=torch.float64) for n in (7, 7, 5))
    students = [x.requires_grad_() for x in drawn]
    scores = {
        "positive_scores": torch.tensor(POSITIVE),
        "negative_scores": torch.tensor([score for _, score in NEGATIVE]),
        "negative_rows": torch.tensor([row for row, _ in NEGATIVE]),
    }
    return students, scores


def loop(students, temperature, score_temperature):
    anchor, positive, negative = ([x / x.norm() for x in side] for side in students)

    def apart(scores, similarities):
        target = torch.softmax(torch.tensor(scores, dtype=torch.float64) / score_temperature, 0)
        found = torch.log_softmax(torch.stack(similarities) / temperature, 0)
        return (target * (target.log() - found)).sum()

    total, pairs = torch.zeros((), dtype=torch.float64), []
    for i, score in enumerate(POSITIVE):
        own = [(k, of_negative) for k, (row, of_negative) in enumerate(NEGATIVE) if row == i and not math.isnan(of_negative)]
        if math.isnan(score):
            continue
        if not own:
            pairs.append(i)
            continue
        similarities = [anchor[i] @ positive[i], *(anchor[i] @ negative[k] for k, _ in own)]
        total = total + apart([score, *(of_negative for _, of_negative in own)], similarities)
    of_pairs = apart([POSITIVE[i] for i in pairs], [anchor[i] @ positive[i] for i in pairs])
    return (total + len(pairs) * of_pairs) / len(POSITIVE)


@pytest.mark.parametrize("temperatures", [(0.05, 1.0), (1.0, 0.3)])
def test_equals_a_loop(temperatures):
    students, scores = batch()
    options = dict(zip(("temperature", "score_temperature"), temperatures, strict=True))
    found, expected = score_loss(*students, **scores, **options), loop(students, *temperatures)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, students) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    assert found > 0.1


def test_parts_of_the_rows_sum_to_the_whole():
    students, scores = batch()
    parts = [score_loss(*students, **scores, rows=rows) for rows in ((0, 2), (2, 2), (2, 5), (5, 7))]
    torch.testing.assert_close(sum(parts), score_loss(*students, **scores), rtol=1e-12, atol=1e-12)


def test_dimensions_are_a_weighted_sum():
    students, scores = batch()
    found = score_loss(*students, **scores, dimensions=[4, 2], dimension_weights=[1.0, 0.5])
    cut = [student[:, :2] for student in students]
    torch.testing.assert_close(found, score_loss(*students, **scores) + 0.5 * score_loss(*cut, **scores))


def test_what_is_learnt_or_has_no_score_teaches_nothing():
    """Where the student's similarities are the scores' logarithms to the same base, nothing is left to learn."""
    students, scores = batch()
    none = {**scores, "positive_scores": torch.full((7,), NAN)}
    loss = score_loss(*students, **none)
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, students))
    anchor, positive, negative = (torch.nn.functional.normalize(x, dim=1) for x in students)
    learnt = {
        "positive_scores": (anchor * positive).sum(dim=1) / 0.05,
        "negative_scores": (anchor[scores["negative_rows"]] * negative).sum(dim=1) / 0.05,
        "negative_rows": scores["negative_rows"],
    }
    learnt = {name: x.detach() for name, x in learnt.items()}
    assert score_loss(*students, **learnt).item() == pytest.approx(0, abs=1e-12)


def test_pairs_alone_and_half_precision():
    """Without negatives; of bfloat16 embeddings all is computed in float32, whatever scores there are."""
    students, scores = batch()
    pairs = {"negative_scores": torch.empty(0), "negative_rows": torch.empty(0, dtype=torch.int64)}
    big = torch.tensor([1e4, -1e4, 0.0, 3.0, 2.0, 1.0, NAN])
    half = [student.detach().bfloat16().requires_grad_() for student in students[:2]]
    loss = score_loss(*half, None, positive_scores=big, **pairs)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, half))
    with pytest.raises(ValueError, match="greater than 0"):
        score_loss(*students, **scores, score_temperature=0.0)
