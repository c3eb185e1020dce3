"""docs/inside-their-trainer.md: what it shows can be run, and what it names is there."""

import inspect
import re

import pytest
from conftest import ROOT
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

from gist_train import GuidedContrastiveLoss

PAGE = (ROOT / "docs" / "inside-their-trainer.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("on_cpu")
def test_the_first_example_runs(make_model, tmp_path, monkeypatch):
    """Who copies it has a training: only the names of the models are others here."""
    code = re.search(r"```python\n(.+?)```", PAGE, re.DOTALL)[1]
    names = {"BAAI/bge-small-en-v1.5": make_model(), "WhereIsAI/UAE-Large-V1": make_model(width=48, layers=1, cased=True, seed=1)}
    for name, folder in names.items():
        assert name in code
        code = code.replace(name, str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(compile(code, "inside-their-trainer.md", "exec"), {"__name__": "__main__"})
    assert SentenceTransformer("out/final", device="cpu").encode(["a text"]).shape == (1, 32)
    assert list((tmp_path / "cache" / "gist-train" / "guides").iterdir())


def test_every_argument_is_named():
    """The table says where each argument of theirs is, and which are ours alone; a word elsewhere on the page is no help."""
    ours = {*inspect.signature(GuidedContrastiveLoss).parameters}
    theirs = {*inspect.signature(GISTEmbedLoss).parameters} | {*inspect.signature(CachedGISTEmbedLoss).parameters}
    assert theirs <= ours
    table = re.search(r"^\| their argument \| here \|\n\|---\|---\|\n((?:\|.+\n)+)", PAGE, re.MULTILINE)[1]
    rows = [[re.findall(r"`(\w+)[`=]", cell) for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert sorted(name for left, _ in rows for name in left) == sorted(theirs)
    assert sorted(name for left, right in rows if not left for name in right) == sorted(ours - theirs)
