"""`gist-train extend`: more epochs for a run that has ended."""

import pytest
import torch
from safetensors.torch import load_file
from support.running import assert_same_run, gist, metrics

from gist_train import Run, UserError, load_config, train
from gist_train.data.leases import held
from gist_train.run_folder import Run as RunFolder

pytestmark = pytest.mark.usefixtures("on_cpu")
LENGTH = {"batch_size": 8, "epochs": 1, "precision": "float32"}


@pytest.fixture
def path(write_config, write_pairs):
    """The YAML of a run of one epoch, trained to its end."""
    evaluation = {**write_pairs(["how are you", "turn it off", "and now", "the last"]), "every": 4}
    path = write_config(training=LENGTH, evaluation=evaluation, selection={"metric": "pairs/spearman"})
    assert gist("train", path).code == 0
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_gets_more_epochs(path, tmp_path):
    """It goes on from the first one's weights, with a schedule and batches of its own; the first one is left alone."""
    first, more = tmp_path / "runs" / "run", tmp_path / "runs" / "run-more"
    before = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    ended = gist("extend", path, "--epochs", "2", "--set", "tracking.log_rows=true")
    assert ended.code == 0, ended.err
    assert {file: file.read_bytes() for file in first.rglob("*") if file.is_file()} == before
    steps, started = Run(first).steps[-1], load_config(more / "config.yaml")
    assert Run(more).steps[-1] == 2 * steps
    origin, begun = RunFolder(first).checkpoint(steps), RunFolder(more).start(f"step-{steps:09d}")
    assert started.model.name == str(begun)
    assert all(torch.equal(weight, weights(begun)[name]) for name, weight in weights(origin).items())
    assert Run(more).scores().loc[0].equals(Run(first).scores().loc[steps])
    assert (started.training.epochs, started.training.seed, started.tracking.log_rows) == (2, 43, True)
    assert metrics(more)[0]["lr"] < metrics(more)[2]["lr"]  # it warms up
    assert metrics(more)[0]["loss"] != metrics(first)[0]["loss"]


def test_the_same_command_resumes(path, tmp_path):
    """Stopped in the middle it is the same run as one that was not."""
    assert gist("extend", path, "--epochs", "2", "--set", "training.stop_at_step=5").code == 0
    assert gist("extend", path, "--epochs", "2").code == 0
    assert gist("extend", tmp_path / "runs" / "run", "--epochs", "2", "--name", "whole").code == 0
    step = Run(tmp_path / "runs" / "whole").steps[-1]
    assert_same_run(tmp_path / "runs" / "run-more", tmp_path / "runs" / "whole", step)


def test_it_begins_with_what_was_selected(path, tmp_path):
    """The newest is not always the best; a step may be named too."""
    run = Run(path)
    run.select(around=4)
    assert run.extend(1).config.model.name == str(tmp_path / "runs" / "run-more" / "start-step-000000004")
    other = run.extend(1, name="other", step=8, overrides=["optimizer.lr=1e-5"])
    assert other.config.model.name.endswith("start-step-000000008")
    assert (other.config.optimizer.lr, other.folder.name) == (1e-5, "other")
    assert other.steps


def test_layers_that_were_cut_are_not_cut_again(write_config, make_model):
    """The checkpoint of one layer has no second one to choose from."""
    config = load_config(write_config(training=LENGTH, model={"name": str(make_model()), "layers": [1]}))
    assert train(config).extend(1).steps


def test_adapters_are_merged_first(write_config, make_model):
    """A checkpoint of adapters is no model that others are trained on top of."""
    pytest.importorskip("peft")
    config = load_config(write_config(training=LENGTH, model={"name": str(make_model()), "lora": {"rank": 2}}))
    assert train(config).extend(1).steps


def test_a_run_is_not_its_own_extension(path):
    """It would write over what it begins with."""
    with pytest.raises(UserError, match="another name than the first run's"):
        Run(path).extend(1, name="run")


def test_a_run_without_a_checkpoint_has_nothing_to_extend(write_config, tmp_path):
    """Nothing is left behind."""
    ended = gist("extend", write_config(), "--epochs", "1")
    assert ended.code == 2
    assert "no checkpoint" in ended.err
    assert not (tmp_path / "runs" / "run-more").exists()


def test_raising_epochs_names_the_command(path):
    """It is what most try first."""
    ended = gist("train", path, "--set", "training.epochs=3")
    assert ended.code == 2
    assert f"to give a run that has ended more epochs: gist-train extend {Run(path).folder}" in ended.err


def test_another_selection_meanwhile_changes_nothing(path):
    """A run that has begun goes on with what it began with, whatever is selected of the first one by now."""
    run = Run(path)
    assert gist("extend", path, "--epochs", "1", "--set", "training.stop_at_step=3").code == 0
    start = load_config(run.folder.with_name("run-more") / "config.yaml").model.name
    run.select(around=4)
    assert run.extend(1).config.model.name == start
    ended = gist("extend", path, "--epochs", "1", "--step", "8")
    assert ended.code == 2
    assert "has begun with" in ended.err


def test_overrides_name_the_folder_too(path, tmp_path):
    """What the run begins with would lie in a folder that is no run, and be cleared by somebody."""
    assert gist("extend", path, "--epochs", "1", "--set", "name=second").code == 0
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir() if folder.name[0] != ".") == ["run", "second"]
    assert gist("extend", path, "--epochs", "1", "--set", "name=run").code == 2
    ended = gist("extend", path, "--epochs", "1", "--name", "third", "--set", "training.epochs=4")
    assert ended.code == 2
    assert "--epochs" in ended.err
    assert not (tmp_path / "runs" / "third").exists()


def test_a_run_in_training_is_not_extended(path, tmp_path):
    """It has no last checkpoint yet."""
    with held(RunFolder(tmp_path / "runs" / "run").writer_lock):
        ended = gist("extend", path, "--epochs", "1")
    assert ended.code == 2
    assert "a run that has ended" in ended.err
