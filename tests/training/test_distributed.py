"""Two processes of 8 against one of 16: in loss, in every weight's gradient and in what three steps of training make of them."""

import json
import os
import re
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.running import QUIET, gist, in_processes, metrics, training_of

from gist_train.config.loading import load_config
from gist_train.evaluation import measuring
from gist_train.model import encoder as encoders
from gist_train.model import pretrained
from gist_train.pulse import RankFailedError
from gist_train.run_folder import Run
from gist_train.training.distributed import gather_with_gradient, make_accelerator, share
from gist_train.training.loop import steps
from gist_train.training.runlog import RunLog
from gist_train.training.team import RankTeam
from gist_train.training_run import train

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 3
# A weight whose gradient is zero but for rounding, such as a key's bias, would move by the whole rate under the usual 1e-8.
CALM = {"lr": 1e-3, "eps": 1e-3}


def trained(path, overrides):
    """What three steps give: losses, norms, masked shares, tokens, gradients at step 1 before clipping, weights at the end."""
    config = load_config(path, overrides)
    training, student, adamw = training_of(config)
    named = dict(student.encoder.transformer.named_parameters())
    gradients = []
    adamw.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.numpy().copy() for name, p in named.items() if p.grad is not None})
    )
    records = list(steps(training, 0, STEPS))
    assert len(gradients) == STEPS
    return {
        "loss": [record.loss for record in records],
        "grad_norm": [record.grad_norm for record in records],
        "masked": [list(record.masked.values()) for record in records],
        "tokens": [record.tokens for record in records],
        "groups": [sum(count for count, _ in record.groups) for record in records],
        "gradients": gradients[0],
        "weights": {name: p.detach().numpy().copy() for name, p in named.items()},
    }


def groups_of(path):
    training, _, _ = training_of(load_config(path))
    return [record.groups for record in steps(training, 0, STEPS)]


def assert_same_training(found, expected):
    for key in ("loss", "grad_norm", "masked"):
        assert found[key][0] == pytest.approx(expected[key][0], rel=1e-5, abs=1e-5), key
        # From the second step on the weights are not quite the same, and 1 / temperature is 20.
        assert np.asarray(found[key]) == pytest.approx(np.asarray(expected[key]), rel=1e-4, abs=1e-4), key
    # Gradients of token types and biases sum over all tokens, in another order on other processors: 1.01e-5 apart was seen.
    for key, count, tolerance in (("gradients", 35, 1e-4), ("weights", 37, 1e-5)):
        assert len(found[key]) == len(expected[key]) >= count
        for name, values in expected[key].items():
            scale = max(1.0, float(np.abs(values).max()))
            assert np.abs(found[key][name] - values).max() <= tolerance * scale, (key, name)


def assert_same_over(processes, path, overrides):
    """Trains in one process and in `processes`, compares every rank's result, and returns the texts each rank read."""
    alone = trained(path, overrides)
    assert any(np.abs(values).max() > 1e-3 for values in alone["gradients"].values())
    found = in_processes(processes, trained, path, overrides)
    assert [size for size, _ in found] == [processes] * processes
    for _, rank in found:
        assert_same_training(rank, alone)
    return [rank["groups"] for _, rank in found], alone["groups"]


@pytest.fixture
def config_of(write_config, make_model):
    """Writes a run without dropout; `clip` off leaves the gradients as they were."""

    def write(batch_size=16, guide="store", **loss):
        sections = {} if guide == "store" else {"guide": guide}
        return write_config(
            model={"name": str(make_model(dropout=0.0))},
            training={"batch_size": batch_size, "max_steps": STEPS, "precision": "float32", "grad_clip": None},
            optimizer=CALM,
            schedule={"type": "constant", "warmup_ratio": 0.0},
            loss={"temperature": 0.05, **loss},
            **sections,
        )

    return write


@pytest.mark.parametrize("guide", ["store", *(pytest.param(other, marks=pytest.mark.slow) for other in ("self", None))])
def test_two_processes_of_8_are_one_of_16(config_of, guide):
    """A rank offset that is forgotten masks the wrong positive and still trains, only worse; gradients that are averaged where
    they should be summed halve the learning rate. Rows have 0 to 3 negatives, so that the ranks' pools differ."""
    texts, alone = assert_same_over(2, config_of(guide=guide), [])
    assert [a + b for a, b in zip(*texts, strict=True)] == alone
    assert any(a != b for a, b in zip(*texts, strict=True))


def test_ranks_read_as_many_tokens(config_of):
    """Whoever is done first waits for the other; and yet the batch is the same."""
    path = config_of()
    tokens = [[sum(n * length for n, length in groups) for groups in rank] for _, rank in in_processes(2, groups_of, path)]
    assert all(abs(a - b) <= 0.05 * (a + b) for a, b in zip(*tokens, strict=True))


@pytest.mark.slow  # the matrix has it too, without the gradients
def test_rows_that_do_not_divide_are_shared_all_the_same(config_of):
    """7 rows are 3 + 4: a padded or repeated row would be its own false negative, a dropped one would go unseen."""
    texts, alone = assert_same_over(2, config_of(7), [])
    assert [a + b for a, b in zip(*texts, strict=True)] == alone


@pytest.mark.parametrize("guide", ["store", pytest.param(None, marks=pytest.mark.slow)])
def test_a_rank_without_rows_takes_part(config_of, guide):
    """A batch of 1 leaves rank 0 without a row: if it stayed away from a collective, both would wait for ever."""
    texts, alone = assert_same_over(2, config_of(1, guide, margin=-1.0), [])
    assert texts == [[1, 1, 1], alone]  # rank 0 reads one text of which nothing is used


@pytest.mark.slow  # the matrix has it too, without the gradients
def test_clipping_sees_the_whole_gradient(config_of):
    """A norm taken over one rank's share clips each rank by another factor."""
    assert_same_over(2, config_of(16), ["training.grad_clip=0.1"])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 1])
def test_three_processes_are_one(config_of, batch_size):
    """2 + 2 + 3 rows and 0 + 0 + 1: with more than two ranks an offset of one rank is no offset of all before."""
    assert_same_over(3, config_of(batch_size, margin=-0.05), [])


def gathered(sizes):
    accelerator, _ = make_accelerator("float32")
    rank, total = accelerator.process_index, sum(sizes)
    x = torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank
    x.requires_grad_(True)
    parts = gather_with_gradient(x, sizes)
    seen = torch.cat(parts)
    weights = torch.arange(total * 2.0).view(-1, 2) + 1000.0 * (rank + 1)
    (seen * weights).sum().backward()
    return seen.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("sizes", [[3, 2], [0, 2], [2, 0], [4, 1, 3]])
def test_a_gather_of_unlike_sizes_sums_gradients(sizes):
    """gloo and NCCL gather equal sizes alone, and torch's own backward averages or sums depending on who wraps it."""
    found = in_processes(len(sizes), gathered, sizes)
    assert [size for size, _ in found] == [len(sizes)] * len(sizes)
    expected = np.concatenate([np.arange(n * 2.0).reshape(-1, 2) + 100 * rank for rank, n in enumerate(sizes)])
    ranks = len(sizes)
    gradient = ranks * np.arange(sum(sizes) * 2.0).reshape(-1, 2) + 1000.0 * sum(range(1, ranks + 1))
    bounds = np.cumsum([0, *sizes])
    for rank, (_, (seen, own)) in enumerate(found):
        assert np.array_equal(seen, expected)
        assert np.array_equal(own, gradient[bounds[rank] : bounds[rank + 1]])


def test_one_process_gathers_itself():
    """Without a process group there is nothing to gather, and no copy to make."""
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(x, [2])[0] is x


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 16])
def test_every_row_is_computed_once(processes):
    """A row that two ranks compute counts twice; one that none computes is lost."""
    for count in range(40):
        shares = [share(count, rank, processes) for rank in range(processes)]
        assert [row for start, stop in shares for row in range(start, stop)] == list(range(count))
        assert max(stop - start for start, stop in shares) - min(stop - start for start, stop in shares) <= 1


def stopped(path):
    """Trains until rank 1 alone gets SIGTERM after step 5; the launcher would send it to both, at two moments."""
    add = RunLog.add

    def add_and_be_told(log, record, *args):
        if dist.get_rank() == 1 and record.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(log, record, *args)

    with mock.patch.object(RunLog, "add", add_and_be_told):
        return train(load_config(path), resume="auto", timeout=60, console=QUIET)


def test_ranks_stop_at_the_same_step(write_config, tmp_path):
    """A rank that stops by itself leaves the others waiting in a collective, and no checkpoint."""
    path = write_config(training={"batch_size": 8, "max_steps": 12, "precision": "float32"})
    found = in_processes(2, stopped, path)
    assert [code for _, code in found] == [143, 143]
    assert json.loads((tmp_path / "runs" / "run" / "run.json").read_text())["processes"] == 2
    assert Run(tmp_path / "runs" / "run").saved_steps() == [4, 5]


def failing(path):
    """Trains while the evaluation of step 4 fails; returns what each process is told."""
    real = measuring.measure
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError("no route to host")
        return real(*args)

    with mock.patch.object(measuring, "measure", fail):
        try:
            train(load_config(path), resume="auto", timeout=60, console=QUIET)
        except (OSError, RankFailedError) as error:
            return str(error)
    return None


def test_an_evaluation_that_fails_ends_all_ranks(write_config, tmp_path, triplets):
    """The others would wait for the first process as long as an evaluation may take: hours. Nothing is lost either."""
    texts = [row["anchor"] for row in triplets]
    pairs = [f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip(texts[:9], texts[9:18], strict=True))]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    tasks = [{"type": "sts", "name": "pairs", "path": str(tmp_path / "pairs.tsv")}]
    training = {"batch_size": 8, "max_steps": 12, "precision": "float32"}
    path = write_config(training=training, evaluation={"every": 4, "tasks": tasks}, checkpoint={"every": 100})
    found = in_processes(2, failing, path)
    first, second = sorted(told for _, told in found)  # whichever was the first to fail
    assert first == "no route to host"
    assert re.fullmatch(r"rank [01] \(host \S+, process \d+\): no route to host", second)
    assert Run(tmp_path / "runs" / "run").saved_steps() == [4]


def evaluating(path, folder):
    """Trains a step with an evaluation before it, texts embedded a few at a time; which embeddings this process computed."""
    computed = []
    real = encoders.embed_batches

    def counted(encoder, texts, batches):
        computed.extend(len(batch) for batch in batches)
        return real(encoder, texts, batches)

    with mock.patch.object(encoders, "CPU_BATCH_TOKENS", 64), mock.patch.object(pretrained, "embed_batches", counted):
        train(load_config(path, [f"output_dir={folder}"]), console=QUIET)
    return sum(computed)


def test_ranks_evaluate_together(write_config, make_model, write_pairs, triplets, tmp_path):
    """Each embeds its share of the texts, and the scores are those of one process, to the bit."""
    texts = [row["anchor"] for row in triplets]
    model = {"name": str(make_model(dropout=0.0))}
    training = {"batch_size": 8, "max_steps": 1, "precision": "float32"}
    path = write_config(model=model, training=training, evaluation={**write_pairs(texts), "every": 1})
    scores, shares = [], []
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        shares.append([computed for _, computed in in_processes(processes, evaluating, path, folder)])
        rows = [json.loads(line) for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]
        scores.append({(row["step"], row["metric"]): row["value"] for row in rows})
    base = {key: value for key, value in scores[0].items() if key[0] == 0}
    assert base
    assert {key: value for key, value in scores[1].items() if key[0] == 0} == base
    assert scores[0].keys() == scores[1].keys()
    (whole,), parts = shares
    assert sum(parts) == whole
    assert min(parts) > whole / 4


def stopped_in_an_evaluation(path):
    """Trains until rank 1 alone gets SIGTERM while all embed the texts of the first evaluation."""
    real = RankTeam.exchanged

    def exchanged_and_told(team, *part):
        if team.rank == 1 and not team._signals.received():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(team, *part)

    with mock.patch.object(RankTeam, "exchanged", exchanged_and_told):
        return train(load_config(path), console=QUIET)


def test_ranks_leave_an_evaluation_together(write_config, write_pairs, tmp_path):
    """One that left alone would leave the others waiting for its share of the texts."""
    training = {"batch_size": 8, "max_steps": 12, "precision": "float32"}
    path = write_config(training=training, evaluation={**write_pairs(["one", "two", "three"]), "every": 4})
    assert [code for _, code in in_processes(2, stopped_in_an_evaluation, path)] == [143, 143]
    run = Run(tmp_path / "runs" / "run")
    assert run.saved_steps() == []  # it was the base model's: there is nothing to save yet
    assert not run.evaluations.exists()


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.usefixtures("on_cpu")
def test_a_launcher_that_would_compile_is_refused(write_config, monkeypatch):
    """What accelerate's configuration compiles is no longer the encoder that the loop knows: it ended in a traceback."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    done = gist("train", write_config(training={"batch_size": 8, "max_steps": 1}))
    assert done.code == 2
    assert "dynamo backend EAGER" in done.err
    assert "training.compile" in done.err


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("flag", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_a_launcher_that_would_shard_is_refused(write_config, monkeypatch, flag, name):
    """On a CPU accelerate takes no notice of FSDP, and without its package DeepSpeed ends in a traceback."""
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    done = gist("train", write_config(training={"batch_size": 8, "max_steps": 1}))
    assert done.code == 2
    assert f"found     {name}" in done.err
    assert "plain data parallelism" in done.err


@pytest.mark.usefixtures("on_cpu")
def test_a_launcher_that_does_not_say_how_many_is_refused(write_config, monkeypatch):
    """mpirun alone: accelerate makes one run of its processes, which then would not know of each other's failures."""
    counted = mock.PropertyMock(return_value=2)
    monkeypatch.setattr("gist_train.training_run.Accelerator.num_processes", counted, raising=False)
    done = gist("train", write_config(training={"batch_size": 8, "max_steps": 1}))
    assert done.code == 2
    assert "2 processes, and no WORLD_SIZE" in done.err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="torchrun would start two on the accelerator")
@pytest.mark.parametrize(
    ("launch", "told_cpu"),
    [(ACCELERATE, "true"), pytest.param(TORCHRUN, None, marks=pytest.mark.slow)],
    ids=["accelerate", "torchrun"],
)
def test_a_launcher_starts_two(write_config, make_model, tmp_path, launch, told_cpu):
    """`accelerate launch --cpu` starts one process and says nothing, and accelerate under torchrun makes two that know nothing of
    each other unless it is told that they are on CPUs: what was started is told first, and written down."""
    model = {"name": str(make_model()), "dropout": 0.0}
    training = {"batch_size": 16, "max_steps": 8, "precision": "float32"}
    two = write_config("two", model=model, training=training, optimizer=CALM)
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    ended = subprocess.run(
        [sys.executable, *launch, "-m", "gist_train", "train", str(two)],
        env={**environment, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": told_cpu} if told_cpu else {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("gist-train ")]
    assert len(told) == 1
    assert told[0].endswith(": train by 2 processes")
    assert ended.stderr.count("2 processes on cpu") == 1
    assert ended.stderr.count("8 steps of 16 rows") == 1
    assert ended.stderr.count("done: step 8 of 8") == 1
    assert "Warning" not in ended.stderr
    run = tmp_path / "runs" / "two"
    assert json.loads((run / "run.json").read_text())["processes"] == 2

    assert gist("train", write_config("one", model=model, training=training, optimizer=CALM)).code == 0
    alone = metrics(tmp_path / "runs" / "one")
    assert [row["step"] for row in alone] == list(range(1, 9))
    for found, expected in zip(metrics(run), alone, strict=True):
        # 35 of its 37 tensors are trained. What is gathered of 16 rows depends on their negatives.
        assert found.pop("gradient_bytes") > 100_000
        assert found.pop("embedding_bytes") % (32 * 4) == 0
        assert found.pop("task") == expected.pop("task")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
