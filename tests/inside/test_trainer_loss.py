"""GuidedContrastiveLoss against GISTEmbedLoss and CachedGISTEmbedLoss: the same loss and gradients where theirs are right."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from support.trainers import assert_same, columns_of, loss_and_gradients, opened, their_cached_loss

from gist_train import GuidedContrastiveLoss, UserError, guided_contrastive_loss
from gist_train.inside import trainer_loss as loss_module
from gist_train.inside.gathering import Gathered
from gist_train.model.distillation import distillation_loss

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 10


@pytest.fixture
def student(make_model):
    """Without dropout."""
    return opened(make_model(dropout=0.0))


@pytest.fixture(params=["own", "same"])
def guide(request, make_model):
    """With a tokenizer of its own, for which tokens are decoded, or with the student's, whose tokens it is given."""
    if request.param == "same":
        return opened(make_model(width=48, layers=1, seed=1), training=False)
    return opened(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1), training=False)


@pytest.fixture
def ours(student, tmp_path):
    """Makes the loss over `student`."""
    return lambda guide, **options: GuidedContrastiveLoss(student, guide, cache_dir=tmp_path, **options)


OPTIONS = [
    {},
    {"temperature": 0.05, "margin": 0.02},
    {"margin": 0.05, "margin_strategy": "relative"},
    {"contrast_anchors": False},
    {"contrast_positives": False, "margin": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("columns", [2, 3])
def test_it_equals_gist_embed_loss(student, guide, ours, columns, options):
    """Who swaps the loss must train as before: the same masks, loss and gradients, for pairs and triplets."""
    texts = columns_of(ROWS, columns)
    expected = loss_and_gradients(GISTEmbedLoss(student, guide, **options), student, texts)
    assert_same(loss_and_gradients(ours(guide, **options), student, texts), expected)


@pytest.mark.parametrize("cut", [{}, {"mini_batch_size": 3}, {"mini_batch_num_tokens": 40}], ids=str)
@pytest.mark.parametrize("columns", [2, 4])
def test_it_equals_the_cached_loss(student, guide, ours, columns, cut):
    """Any number of negatives, and mini-batches by count or by tokens, which change memory alone."""
    texts = columns_of(ROWS, columns)
    expected = loss_and_gradients(their_cached_loss(student, guide, 4), student, texts)
    assert_same(loss_and_gradients(ours(guide, **cut), student, texts), expected)


@pytest.mark.parametrize("cut", [None, 3])
def test_it_equals_theirs_inside_matryoshka(student, guide, ours, cut):
    """MatryoshkaLoss shortens the student's embeddings and not the guide's, whichever way it reaches into the loss."""
    texts, dims = columns_of(ROWS, 3), [32, 16, 8]
    theirs = GISTEmbedLoss(student, guide) if cut is None else their_cached_loss(student, guide, cut)
    expected = loss_and_gradients(MatryoshkaLoss(student, theirs, dims, [1, 0.5, 0.25]), student, texts)
    around = MatryoshkaLoss(student, ours(guide, mini_batch_size=cut), dims, [1, 0.5, 0.25])
    assert_same(loss_and_gradients(around, student, texts), expected, 2e-5)
    inside = ours(guide, mini_batch_size=cut, dimensions=dims, dimension_weights=[1, 0.5, 0.25])
    assert_same(loss_and_gradients(inside, student, texts), expected, 2e-5)


def test_it_equals_theirs_inside_adaptive_layers(student, guide, ours):
    """AdaptiveLayerLoss asks for the loss once a layer, and hands the layers on in the features of the batch."""
    texts = columns_of(ROWS, 3)
    expected = loss_and_gradients(AdaptiveLayerLoss(student, GISTEmbedLoss(student, guide), n_layers_per_step=-1), student, texts)
    assert_same(loss_and_gradients(AdaptiveLayerLoss(student, ours(guide), n_layers_per_step=-1), student, texts), expected, 2e-5)


def test_the_model_itself_is_its_guide(student, ours):
    """GISTEmbedLoss(model, guide=model) reads the similarities of the moment: none of them may come from a store."""
    texts = columns_of(ROWS, 3)
    for _ in range(2):  # the second time with other weights
        expected = loss_and_gradients(GISTEmbedLoss(student, student), student, texts)
        assert_same(loss_and_gradients(ours(student), student, texts), expected)
        assert_same(loss_and_gradients(ours("self", mini_batch_size=4), student, texts), expected)
        with torch.no_grad():
            for weight in student.parameters():
                weight.mul_(1.1)


def test_a_row_is_never_its_own_negative(student, guide, ours):
    """Theirs leaves an anchor's similarity with itself among the candidates where the threshold is above 1; ours never does."""
    texts = columns_of(ROWS, 2)
    options = {"margin": -1.0, "temperature": 0.05}
    theirs, _ = loss_and_gradients(GISTEmbedLoss(student, guide, **options), student, texts)
    found, _ = loss_and_gradients(ours(guide, **options), student, texts)
    unguided, _ = loss_and_gradients(ours(None, temperature=0.05), student, texts)
    assert found == pytest.approx(unguided, abs=1e-5)
    assert theirs > found + 0.1


@pytest.mark.parametrize("cut", [None, 4])
def test_a_duplicate_is_no_negative(student, guide, ours, cut):
    """Theirs pushes an anchor from its own positive where another row has it too; ours masks it, unless that is asked for."""
    anchors, positives = columns_of(ROWS, 2)
    positives[4] = positives[1]
    anchors[7] = anchors[2]
    texts = [anchors, positives]
    theirs = loss_and_gradients(GISTEmbedLoss(student, guide, temperature=0.05), student, texts)
    kept = ours(guide, temperature=0.05, mask_duplicates=False, mini_batch_size=cut)
    masked = ours(guide, temperature=0.05, mini_batch_size=cut)
    assert_same(loss_and_gradients(kept, student, texts), theirs)
    embeddings = [student(student.preprocess(column))["sentence_embedding"] for column in texts]
    of_guide = [
        torch.from_numpy(
            guide.encode(student.tokenizer.batch_decode(student.preprocess(column)["input_ids"], skip_special_tokens=True))
        )
        for column in texts
    ]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(anchors + positives))}
    ids = [torch.tensor([numbers[text] for text in column]) for column in texts]
    expected = guided_contrastive_loss(
        *embeddings, None, guide_anchor=of_guide[0], guide_positive=of_guide[1], guide_negative=None, temperature=0.05,
        anchor_ids=ids[0], positive_ids=ids[1],
    ).loss.item()  # fmt: skip
    found, _ = loss_and_gradients(masked, student, texts)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found < theirs[0] - 1e-3


def test_distillation_and_soft_masks_are_ours(student, guide, ours):
    """What GISTEmbedLoss has not: each option reaches the mathematics under its name."""
    texts = columns_of(ROWS, 3)
    loss = ours(guide, mask="soft", softness=0.1, hardness=2.0, negatives="hard", weight=0.5, block_size=4,
                distillation={"weight": 2.0, "temperature": 0.1, "regression": 0.0})  # fmt: skip
    found, _ = loss_and_gradients(loss, student, texts)
    known = loss._known([student.preprocess(column) for column in texts])
    names = ("anchor", "positive", "negative")
    given = {f"guide_{name}": part for name, part in zip(names, known.guides, strict=True)}
    given |= {f"{name}_ids": part for name, part in zip(names, known.ids, strict=True)}
    given |= {name: student(student.preprocess(c))["sentence_embedding"] for name, c in zip(names, texts, strict=True)}
    contrast = guided_contrastive_loss(**given, mask="soft", softness=0.1, hardness=2.0, negatives="hard", temperature=0.01)
    apart = distillation_loss(**given, temperature=0.1)
    assert found == pytest.approx((0.5 * contrast.loss + 2 * apart.loss).item(), abs=1e-4)
    assert apart.loss.item() > 1e-3


def test_regression_follows_a_narrow_guide(student, ours, make_model):
    """A guide that is as wide as the student, or narrower, is followed; of a wider one that is refused."""
    texts = columns_of(ROWS, 2)
    narrow = opened(make_model(width=16, layers=1, seed=3), training=False)
    plain, _ = loss_and_gradients(ours(narrow), student, texts)
    found, _ = loss_and_gradients(ours(narrow, distillation={"regression": 3.0}), student, texts)
    of_guide = torch.from_numpy(narrow.encode(texts[0] + texts[1], normalize_embeddings=True))
    embeddings = torch.from_numpy(student.encode(texts[0] + texts[1], normalize_embeddings=True))
    cosines = (embeddings[:, :16] * of_guide).sum(dim=1)
    assert found - plain == pytest.approx(3 * (1 - cosines).mean().item(), abs=1e-4)
    wide = ours(opened(make_model(width=48, layers=1, seed=1), training=False), distillation={"regression": 1.0})
    with pytest.raises(UserError, match="no wider than the student"):
        loss_and_gradients(wide, student, texts)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("cut", [None, 2])
def test_the_positive_of_a_later_process_stays(monkeypatch, margin, cut):
    """Its column counts the rows of the processes before: a mask that forgets them takes it away under a margin."""
    draw = torch.Generator().manual_seed(7)
    before, anchors, positives = (torch.randn(count, 16, generator=draw) for count in (6, 3, 3))

    def gather(embeddings, *_, **__):
        texts = [before, torch.cat(list(embeddings))]
        return Gathered(texts, [text.detach() for text in texts], None, [(3, 0), (3, 0)], 1)

    monkeypatch.setattr(loss_module, "gather", gather)
    options = {"margin": margin, "mini_batch_size": cut, "mask_duplicates": False, "gather_across_devices": True}
    loss = GuidedContrastiveLoss(carrying(), None, **options)
    found = loss([{"sentence_embedding": anchors}, {"sentence_embedding": positives}])
    pool = torch.cat([before[:3], anchors]), torch.cat([before[3:], positives])
    guides = {"guide_anchor": pool[0], "guide_positive": pool[1], "guide_negative": None}
    expected = 2 * guided_contrastive_loss(*pool, None, **guides, margin=margin, rows=(3, 6)).loss
    assert torch.isfinite(found)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("cut", [None, 1])
def test_a_relative_margin_lowers_a_negative_threshold(cut):
    """Below 0, 95 % of a similarity are more than it: a threshold that rose would keep what is nearer than the positive."""
    near = torch.tensor([[-0.49, 0.0, (1 - 0.49**2) ** 0.5]])
    far = torch.tensor([[-0.5, (1 - 0.5**2) ** 0.5, 0.0]])
    features = [torch.cat([torch.tensor([[1.0, 0.0, 0.0]]), near]), torch.cat([far, near])]
    options = {"contrast_anchors": False, "contrast_positives": False, "mask_duplicates": False, "temperature": 1.0}
    loss = GuidedContrastiveLoss(carrying(), "self", margin=0.05, margin_strategy="relative", mini_batch_size=cut, **options)
    found = loss([{"sentence_embedding": column.clone()} for column in features])
    # The first row has no candidate left, the second one that is far: cos(near, far).
    expected = torch.log1p(torch.exp((near * far).sum() - 1)) / 2
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def carrying():
    """A model whose features are its embeddings."""

    class Carried(torch.nn.Module):
        def forward(self, features):
            return features

    return SentenceTransformer(modules=[Carried()], device="cpu")


def test_two_forwards_may_come_before_one_backward(student, guide, ours):
    """Each forward's gradients are its own: a shared cache would hand the second's to the first's texts."""
    texts = columns_of(ROWS, 3)
    halves = [[column[:5] for column in texts], [column[5:] for column in texts]]
    loss = ours(guide, mini_batch_size=2)
    features = [[student.preprocess(column) for column in half] for half in halves]
    student.zero_grad()
    (loss(features[0]) + loss(features[1])).backward()
    found = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    parts = [loss_and_gradients(ours(guide), student, half) for half in halves]
    expected = {name: gradient + parts[1][1][name] for name, gradient in parts[0][1].items()}
    assert_same((0.0, found), (0.0, expected))


def test_dropout_is_drawn_alike_in_both_passes(make_model, guide, tmp_path):
    """The second pass hands on gradients of the first one's embeddings: under other dropout they belong to others."""
    student = opened(make_model(dropout=0.2))
    loss, seen = GuidedContrastiveLoss(student, guide, mini_batch_size=4, cache_dir=tmp_path), []
    student.register_forward_hook(lambda *given: seen.append(given[2]["sentence_embedding"].detach().clone()))
    value = loss([student.preprocess(column) for column in columns_of(ROWS, 2)])
    first = list(seen)
    value.backward()
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, seen[6:], strict=True))
    student.eval()
    assert not torch.equal(first[0], student(student.preprocess(columns_of(ROWS, 2)[0][:4]))["sentence_embedding"])


def test_evaluation_takes_no_gradient(student, guide, ours):
    """The trainer evaluates its loss without gradients: no backward pass may be looked for."""
    texts = columns_of(ROWS, 3)
    expected, _ = loss_and_gradients(ours(guide), student, texts)
    with torch.no_grad():
        for cut in (None, 4):
            found = ours(guide, mini_batch_size=cut)([student.preprocess(column) for column in texts])
            assert found.item() == pytest.approx(expected, abs=1e-5)
            assert not found.requires_grad


def test_the_guide_is_no_part_of_the_loss(student, guide, ours):
    """Its weights would be moved to the device, saved, and handed to the optimizer, as theirs are."""
    loss = ours(guide)
    loss_and_gradients(loss, student, columns_of(ROWS, 2))
    own = {f"model.{name}" for name in student.state_dict()}
    assert {*loss.state_dict()} == own
    assert {name for name, _ in loss.named_parameters()} == {f"model.{name}" for name, _ in student.named_parameters()}
    assert any(name.startswith("guide.") for name in GISTEmbedLoss(student, guide).state_dict())


def test_the_card_names_what_was_chosen(guide, ours):
    """The trainer writes these into the model's card: a guide must be a name there, and no print of a model."""
    config = ours(guide, margin=0.1, mini_batch_size=4, distillation={"weight": 2.0, "temperature": 0.1}).get_config_dict()
    assert config["guide"].startswith("SentenceTransformer-")
    assert (config["margin"], config["mini_batch_size"], config["temperature"]) == (0.1, 4, 0.01)
    assert config["distillation"] == {"weight": 2.0, "temperature": 0.1}
    assert ours(None).get_config_dict()["guide"] is None
    assert "2402.16829" in ours(None).citation


WRONG = [
    ({"temperature": 0.0}, "loss.temperature"),
    ({"margin_strategy": "both"}, '"both"'),
    ({"mini_batch_size": 0}, "mini_batch_size"),
    ({"mini_batch_num_tokens": -1}, "mini_batch_num_tokens"),
    ({"mini_batch_size": "8"}, "a whole number of 1 or more"),
    ({"gather_across_devices": "yes"}, "True or False"),
    ({"dimensions": 16}, "loss.dimensions"),
    ({"dimensions": [9999]}, "no more than the model has"),
    ({"distillation": 2.0}, "a dict of its keys"),
    ({"distillation": {"wait": 1.0}}, 'did you mean "weight"'),
    ({"distillation": {"scores": 1.0}}, "distillation.scores"),
    ({"weight": 0.0}, "something to learn"),
    ({"guide": None, "distillation": {"weight": 1.0}}, "a guide to learn from"),
    ({"guide": "self", "guide_prompts": "query: "}, "guide_prompts"),
    ({"guide": {"name": "x", "prompt": "a", "prompts": {"anchor": "b"}}}, "guide.prompt"),
    ({"guide": {"nam": "x"}}, 'did you mean "name"'),
    ({"guide": 3}, "a int"),
    ({"guide": "./nowhere"}, "./nowhere"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_option_is_told(ours, options, words):
    """Where, found, expected, fix, when the loss is made, and not a traceback at the first step."""
    with pytest.raises(UserError) as raised:
        ours(**{"guide": "self", **options})
    assert words in str(raised.value)


def test_one_column_is_told(student, ours):
    """A data set without positives has nothing to learn from."""
    with pytest.raises(UserError, match="1 columns of texts"):
        ours(None)([student.preprocess(["one"])])
    with pytest.raises(UserError, match="columns of 1, 2 texts"):
        ours(None)([student.preprocess(["one"]), student.preprocess(["one", "two"])])
    with pytest.raises(UserError, match="a SentenceTransformer"):
        GuidedContrastiveLoss("a/name", None)


def test_mini_batches_of_static_embeddings_are_told(make_model, tmp_path):
    """Their features have no row for each text: cutting them by rows would mix texts up, also behind a router."""
    words = StaticEmbedding(opened(make_model()).tokenizer, embedding_dim=8)
    for model in (
        SentenceTransformer(modules=[words]),
        SentenceTransformer(modules=[Router.for_query_document([words], [words])]),
    ):
        with pytest.raises(UserError, match="StaticEmbedding"):
            GuidedContrastiveLoss(model, "self", mini_batch_size=4, cache_dir=tmp_path)
