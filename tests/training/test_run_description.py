"""run.json: what a run's folder says it was made of."""

import json

import pytest
from support.running import gist

from gist_train.config.loading import load_config
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_sources_have_the_names_of_the_runs_own_config(write_config, write_rows, triplets):
    """Report and card would name a file that the config does not have, of whoever built the corpus that it shares."""
    corpora = set()
    for name in ("first", "second"):
        data = {"train": [{"source": "jsonl", "path": str(write_rows(f"{name}.jsonl", triplets))}]}
        path = write_config(name, data=data, training={"batch_size": 8, "max_steps": 1, "precision": "float32"})
        assert gist("train", path).code == 0
        described = json.loads(Run.of(load_config(path)).description.read_text(encoding="utf-8"))
        assert described["data"] == [{"name": f"{name}.jsonl", "commit": None, "rows": len(triplets)}]
        corpora.add(described["corpus"])
    assert len(corpora) == 1
