"""Means of weights, against the slow twin that adds the tensors of the files up."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.running import gist

from gist_train.config.errors import UserError
from gist_train.config.models import ModelConfig
from gist_train.data.manifests import verified_manifest
from gist_train.model.loading import load_finished, load_student
from gist_train.results.averaging import averaged, save_averaged
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def run(write_config, tmp_path, make_model):
    """Checkpoints at 4, 8 and 12 of a student of which one of two layers was kept."""
    ended = gist("train", write_config(model={"name": str(make_model(layers=2)), "layers": [1]}))
    assert ended.code == 0, ended.err
    return Run(tmp_path / "runs" / "run")


@pytest.mark.parametrize(("steps", "base_weight"), [((8,), 0.0), ((4, 8, 12), 0.0), ((12, 4, 8), 0.25), ((4,), 0.5)])
def test_weights_are_the_mean(run, make_model, steps, base_weight):
    """Weights of another share, of the uncut base, or of the newest checkpoint alone would still make a model that works."""
    base = ModelConfig(name=str(make_model(layers=2)), layers=[1])
    found = averaged(run, steps, base, base_weight)
    files = [load_file(run.checkpoint(step) / "model.safetensors") for step in steps]
    of_base = load_student(base).encoder.transformer.state_dict()
    weights = found.encoder.transformer.state_dict()
    assert len(files[0]) > 15
    for name in files[0]:
        mean = sum(file[name].double() for file in files) / len(files)
        expected = ((1 - base_weight) * mean + base_weight * of_base[name].double()).float()
        assert torch.allclose(weights[name], expected, rtol=0, atol=1e-7), name
    trained = "encoder.layer.0.output.dense.weight"
    assert torch.equal(weights[trained], files[0][trained]) == (steps == (8,))


def test_a_saved_mean_is_a_verified_model(run, make_model, quickstart_texts):
    """The export verifies what it copies, and a second choice takes the place of the first as a whole."""
    base = ModelConfig(name=str(make_model(layers=2)), layers=[1])
    for steps in ((4, 8), (8, 12)):
        mean = averaged(run, steps, base, 0.0)
        save_averaged(mean, run.folder / "averaged", {"step": steps[-1], "steps": steps})
    assert verified_manifest(run.folder / "averaged")["steps"] == [8, 12]
    opened = load_finished(str(run.folder / "averaged"))
    assert np.array_equal(opened.encode(quickstart_texts[:20]), mean.encode(quickstart_texts[:20]))


def test_what_does_not_fit_is_refused(run, make_model):
    """A damaged checkpoint in a mean would spoil it unseen, and another base has nothing to do with these weights."""
    other = ModelConfig(name=str(make_model(layers=2, width=48)))
    with pytest.raises(UserError, match="weights are of another shape"):
        averaged(run, (4,), other, 0.5)
    path = run.checkpoint(8) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256"):
        averaged(run, (4, 8), other, 0.0)
