"""A config from a program: of a dict as of a YAML."""

from pathlib import Path

import pytest

from gist_train import Config, UserError, load_config


def test_a_config_is_made_of_values(write_config):
    """Of a dict as of a YAML; Path objects are paths."""
    config = load_config(write_config())
    values = config.model_dump()
    assert load_config(values) == Config(**values) == config
    values["model"]["name"] = Path(values["model"]["name"])
    values["data"]["train"][0]["path"] = Path(values["data"]["train"][0]["path"])
    assert load_config(values) == Config(**values) == config
    assert load_config(values, ["training.max_steps=3"]).training.max_steps == 3
    assert values["training"]["max_steps"] == 12


def test_faults_of_values_are_told_as_those_of_a_yaml(write_config):
    """pydantic's own words name types of Python and an address on the web."""
    values = load_config(write_config()).model_dump()
    values["training"] |= {"batch_size": "8", "epoch": 3}
    with pytest.raises(UserError) as told:
        load_config(values)
    assert 'config: training.batch_size\n  found     "8"\n  expected  a whole number' in str(told.value)
    assert 'fix       did you mean "epochs"?' in str(told.value)
