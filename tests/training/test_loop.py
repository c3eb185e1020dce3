"""The loop against a slow twin: padded forward, live guide, one candidate after the other, torch's plain AdamW."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.running import gist, losses, metrics, tensors, training_of

from gist_train.config.loading import load_config
from gist_train.run_folder import Run
from gist_train.training.loop import NonFiniteError, dropout_seed, steps
from gist_train.training.throughput import PARTS

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 3
TEMPERATURE = 0.05
PROMPTS = {"anchor": "query: ", "positive": "answer: "}
# Under the usual 1e-8 a weight whose gradient is zero but for rounding, such as a key's bias, would move by the whole rate.
OPTIMIZER = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.01}


def cosine(x, y):
    return torch.dot(x, y) / (x.norm() * y.norm())


def twin_loss(students, guides, ids, owners, loss):
    """Mean loss and masked shares. `students` and `guides` are lists (anchors, positives, negatives) of vectors."""
    anchors, positives, negatives = students
    masked, candidates = dict.fromkeys(("ap", "an", "aa", "pp"), 0), dict.fromkeys(("ap", "an", "aa", "pp"), 0)
    losses = []
    assert len(owners) == len(negatives)
    for i in range(len(anchors)):
        looks = [("ap", 0, 1, j) for j in range(len(positives))] + [("an", 0, 2, k) for k in range(len(negatives))]
        if loss.contrast_anchors:
            looks += [("aa", 0, 0, j) for j in range(len(anchors)) if j != i]
        if loss.contrast_positives:
            looks += [("pp", 1, 1, j) for j in range(len(positives)) if j != i]
        if guides is not None:
            own = cosine(guides[0][i], guides[1][i])
            threshold = own - (loss.margin if loss.margin_strategy == "absolute" else abs(own) * loss.margin)
        logits, target = [], None
        for block, side, other, j in looks:
            if block == "ap" and j == i:
                target = len(logits)
            else:
                leaves = ids[other][j] in (ids[0][i], ids[1][i])
                leaves = leaves or (guides is not None and bool(cosine(guides[side][i], guides[other][j]) > threshold + 1e-6))
                candidates[block] += 1
                masked[block] += leaves
                if leaves:
                    continue
            logits.append(cosine(students[side][i], students[other][j]) / loss.temperature)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - logits[target])
    return torch.stack(losses).mean(), {block: masked[block] / max(1, candidates[block]) for block in masked}


def vectors_of(model, texts):
    """Vectors with their gradient, of texts padded to the longest: sentence-transformers' own forward pass."""
    return list(model(model.preprocess(texts))["sentence_embedding"])


def slow_twin(config, student, rows):
    """Trains `student` as the design says it, on texts and ids per step; yields loss, masked shares, norm and tokens."""
    student.train()
    live = None if config.guide in (None, "self") else SentenceTransformer(config.guide.name, device="cpu").eval()
    named = dict(student[0].auto_model.named_parameters())
    decayed = [p for p in named.values() if p.ndim > 1]
    others = [p for p in named.values() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.optimizer.lr,
        eps=config.optimizer.eps,
        foreach=False,
    )
    warmup, total = math.ceil(config.training.max_steps * 0.1), config.training.max_steps
    for step, (texts, ids, owners) in enumerate(rows, 1):
        prompts = ("query: ", "answer: ", "")
        read = [[prompt + text for text in side] for prompt, side in zip(prompts, texts, strict=True)]
        students = [vectors_of(student, side) if side else [] for side in read]
        guides = None
        if config.guide == "self":
            guides = [[x.detach() for x in side] for side in students]
        elif live is not None:
            guides = [list(live.encode(side, convert_to_tensor=True)) if side else [] for side in texts]
        whole = len(students[0][0])
        dimensions = config.loss.dimensions or [whole]
        parts = [twin_loss([[x[:d] for x in side] for side in students], guides, ids, owners, config.loss) for d in dimensions]
        weights = config.loss.dimension_weights or [1.0] * len(dimensions)
        loss = sum(weight * part[0] for weight, part in zip(weights, parts, strict=True))
        masked = parts[0][1]  # by ids and the guide alone: the same for all of them
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.training.grad_clip or math.inf)
        done = step - 1
        rate = config.optimizer.lr * (done / warmup if done < warmup else (total - done) / (total - warmup))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        tokens = sum(len(student.tokenizer(text)["input_ids"]) for side in read for text in side)
        yield loss.item(), masked, norm.item(), tokens


def rows_of(training, step):
    """Texts, ids and the negatives' owners of a step's rows, from the corpus' texts."""
    rows = training.plan.batch(step)
    corpus = training.corpus
    positives = training.plan.positives(rows, training.plan.epoch_of(step))
    negatives, owners = [], []
    for row in rows:
        own = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
        negatives += own.tolist()
        owners += [int(row)] * len(own)
    ids = [corpus.anchor[rows].tolist(), positives.tolist(), negatives]
    return [[corpus.text(i) for i in side] for side in ids], ids, owners


@pytest.fixture
def config_of(write_config, make_model, tmp_path):
    """Loads the config of a run without dropout, with prompts."""

    def load(guide="store", loss=None, dropout=0.0, **training):
        path = write_config(
            model={"name": str(make_model(dropout=dropout))},
            data={"train": [{"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "prompts": PROMPTS}]},
            training={"batch_size": 8, "max_steps": 12, "precision": "float32", **training},
            optimizer=OPTIMIZER,
            loss={"temperature": TEMPERATURE, **(loss or {})},
            **({} if guide == "store" else {"guide": guide}),
        )
        return load_config(path)

    return load


TWINS = {
    "guided": ("store", {}, {}),
    "lenient": ("store", {"margin": -0.02, "contrast_anchors": False}, {"grad_clip": None}),
    "relative": ("store", {"margin": -0.05, "margin_strategy": "relative", "block_size": 3}, {"grad_clip": 0.05}),
    "self": ("self", {"contrast_positives": False}, {}),
    "dimensions": ("store", {"dimensions": [8, 32, 16], "dimension_weights": [0.5, 1.0, 2.0], "block_size": 3}, {}),
    "dimensions, self": ("self", {"dimensions": [16, 8]}, {}),
    "unguided": (None, {}, {"batch_size": 5}),
}


@pytest.mark.parametrize("case", TWINS)
def test_three_steps_are_those_of_the_slow_twin(config_of, case):
    """Whatever is fast - packed texts, stored float32 guide, loss in blocks, fused AdamW - changes neither loss nor weights:
    a prompt that the guide reads too, a rate one step off or a norm clipped twice would show here and nowhere else."""
    guide, loss, options = TWINS[case]
    config = config_of(guide, loss, **options)
    training, student, _ = training_of(config)
    rows = [rows_of(training, step) for step in range(1, STEPS + 1)]
    records = list(steps(training, 0, STEPS))
    assert [record.step for record in records] == [1, 2, 3]
    twin, base = (SentenceTransformer(config.model.name, device="cpu") for _ in range(2))
    for record, (expected, masked, norm, tokens) in zip(records, slow_twin(config, twin, rows), strict=True):
        assert record.loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert record.masked == pytest.approx(masked)
        assert record.grad_norm == pytest.approx(norm, rel=1e-3)
        assert record.tokens == record.computed_tokens == tokens
    moved = 0.0
    found = student.encoder.transformer.state_dict()
    expected_weights, before = twin[0].auto_model.state_dict(), base[0].auto_model.state_dict()
    assert found.keys() == expected_weights.keys()
    for name, weight in found.items():
        assert torch.allclose(weight, expected_weights[name], rtol=0, atol=1e-5), name
        moved = max(moved, float((weight - before[name]).abs().max()))
    assert moved > 1e-4
    if guide == "store":
        assert 0 < sum(records[0].masked.values()) < 4


def test_update_s_uses_the_rate_after_s_minus_1_updates(config_of):
    """The first update under warm-up has rate 0, and records give the rate after the update, as transformers logs it."""
    training, _, adamw = training_of(config_of())
    used = []
    adamw.register_step_pre_hook(lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups]))
    told = [record.lr for record in steps(training, 0, 12)]
    expected = [1e-3 * rate for rate in [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]]
    assert used == [pytest.approx([rate, rate]) for rate in expected[:-1]]
    assert told == pytest.approx(expected[1:])


def test_records_count_epochs_and_rows(config_of):
    """Epochs are passes so far: 96 rows in batches of 8 are 12 steps an epoch."""
    training, _, _ = training_of(config_of(max_steps=14))
    records = list(steps(training, 11, 14))
    assert [record.epoch for record in records] == pytest.approx([1.0, 13 / 12, 14 / 12])
    assert all(sum(count * length for count, length in record.groups) == record.tokens for record in records)
    assert all(record.seconds > 0 for record in records)


def test_a_step_knows_nothing_of_what_was_drawn_before(config_of):
    """Dropout draws from generators that are set anew each step: what ran before, or in between, changes nothing."""

    def losses(noise):
        training, _, _ = training_of(config_of(dropout=0.1))
        found = []
        for record in steps(training, 0, 3):
            torch.rand(noise)
            np.random.rand(noise)
            found.append(record.loss)
        return found

    torch.manual_seed(1)
    first = losses(0)
    torch.manual_seed(2)
    assert losses(17) == first
    training, _, _ = training_of(config_of(dropout=0.0))
    assert next(iter(steps(training, 0, 1))).loss != first[0]  # there was dropout


def test_dropout_seeds_are_all_different():
    """Two ranks with one seed drop the same elements; seed + step would give step 2 of seed 1 the draws of step 1 of seed 2."""
    told = list(itertools.product(range(4), range(1, 200), range(4), range(4)))
    seeds = {dropout_seed(*each) for each in told}
    assert len(seeds) == len(told) == 4 * 199 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(42, 1, 0, 0) == dropout_seed(42, 1, 0, 0)


@pytest.mark.parametrize("guide", ["self", None])
def test_it_learns_without_a_guide_model(config_of, guide):
    """An unguided baseline and self-guidance need no store and no guide. Batches differ from each other by more than twelve steps
    teach: so it takes a few dozen."""
    training, _, _ = training_of(config_of(guide, dropout=0.1, max_steps=60))
    records = list(steps(training, 0, 60))
    assert len(records) == 60
    assert all(math.isfinite(record.loss) for record in records)
    assert sum(record.loss for record in records[-12:]) < 0.95 * sum(record.loss for record in records[:12])


def spoil_weight(student):
    with torch.no_grad():
        student.encoder.transformer.encoder.layer[0].output.dense.weight[0, 0] = math.nan


def spoil_gradient(student):
    weight = student.encoder.transformer.encoder.layer[0].output.dense.weight
    return weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_gradient])
def test_no_update_follows_a_value_that_is_not_finite(config_of, spoil):
    """One NaN in a gradient that is applied is a run that is lost, and its moments with it. The loss alone may look well. The
    loop does not look: it goes on, and whoever reads the losses hears of the first such step."""
    training, student, adamw = training_of(config_of())
    running = steps(training, 0, 12)
    records = [next(running), next(running)]
    assert losses(records, training.corpus) == [record.loss for record in records]
    hook = spoil(student)
    weights = {name: p.detach().clone() for name, p in student.encoder.named_parameters()}
    moments = {p: {key: value.clone() for key, value in state.items()} for p, state in adamw.state.items()}
    assert moments
    records.append(next(running))
    if hook is not None:
        hook.remove()  # the steps that follow would be well
    records += [next(running), next(running)]
    with pytest.raises(NonFiniteError) as raised:
        losses(records, training.corpus)
    message = str(raised.value)
    assert message.startswith("step 3: loss ")
    assert ", ".join(map(str, training.plan.batch(3).tolist())) in message
    assert "lower optimizer.lr" in message
    if spoil is spoil_gradient:
        assert "loss nan" not in message
        assert all(math.isfinite(record.loss) and math.isfinite(record.grad_norm) for record in records[3:])
    for name, parameter in student.encoder.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), weights[name].nan_to_num(7)), name
        assert parameter.grad is None
    for parameter, state in adamw.state.items():
        assert all(torch.equal(value, moments[parameter][key]) for key, value in state.items())


def test_what_the_next_batch_runs_into_reaches_the_loop(config_of):
    """An error in the thread that makes batches ready would be lost there, and the loop would wait for ever."""
    training, _, _ = training_of(config_of())
    running = steps(replace(training, tokens=replace(training.tokens, offsets=training.tokens.offsets[:1])), 0, 3)
    with pytest.raises(IndexError):
        next(running)


def test_the_clock_accounts_for_the_step(config_of):
    """A part that is left out, or is counted twice, makes the others look like all there is."""
    training, _, _ = training_of(config_of())
    for record in steps(training, 0, 4):
        parts = record.clock.seconds()
        assert list(parts) == list(PARTS)
        assert 0.9 * record.seconds < sum(parts.values()) <= record.seconds
        assert min(parts["forward"], parts["backward"], parts["loss"], parts["optimizer"]) > 0


def test_a_run_that_diverges_ends_with_1_and_keeps_a_checkpoint(write_config, tmp_path):
    """A rate of 1e30 spoils the weights at the second update: the third step says so, and writes nothing of it."""
    path = write_config(checkpoint={"every": 1, "keep_last": 10})
    ended = gist("train", path, "--set", "optimizer.lr=1e30")
    run = tmp_path / "runs" / "run"
    assert ended.code == 1
    assert "step 3: loss nan" in ended.err
    assert "Traceback" not in ended.err
    assert Run(run).saved_steps() == [1, 2]
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert tensors(run, 1)
