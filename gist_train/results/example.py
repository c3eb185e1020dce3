"""The first lines that a model's user runs, and what they print: run on the very files that are handed on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_train.data.files import read_json
from gist_train.model.folders import PROMPTS_FILE

LARGEST = 4 * 2**30
"""Bytes of weights above which an export does not load the model to run the example: it may be too large for this machine."""
ROWS = ({"anchor": "How do I reset my password?", "positive": "Choose Forgot password on the login page."},)
"""Of an example where the run kept no rows of its data."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a card shows of using a model."""

    code: str
    output: str | None
    """What the code prints; None where it was not run."""
    prompts: Mapping[str, str]
    """By name, those of the model's folder that are not empty."""


def example_of(folder: Path, rows: Sequence[Mapping[str, str]], address: str, *, trust_remote_code: bool) -> Example:
    """An example with the first of some training rows, run on the model in `folder`.

    Args:
        rows: with an anchor, a positive and maybe a negative; none for a row of ours.
        address: what the code loads: a repository of the hub, or a path.
    """
    first = [*rows, *ROWS][0]
    documents = [text for text in (first["positive"], first.get("negative")) if text is not None]
    if len(documents) == 1:
        documents.append("The weather is nice today.")
    trusting = ", trust_remote_code=True" if trust_remote_code else ""
    lines = [
        "from sentence_transformers import SentenceTransformer",
        "",
        f"model = SentenceTransformer({json.dumps(address)}{trusting})",
        f"queries = {_listed([first['anchor']])}",
        f"documents = {_listed(documents)}",
        "print(model.similarity(model.encode_query(queries), model.encode_document(documents)))",
    ]
    prompts = read_json(folder / PROMPTS_FILE).get("prompts", {}) if (folder / PROMPTS_FILE).is_file() else {}
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    output = None if weights > LARGEST else _printed(folder, [first["anchor"]], documents, trust_remote_code)
    return Example("\n".join(lines), output, {name: prompt for name, prompt in prompts.items() if prompt})


def _listed(texts: Sequence[str]) -> str:
    return f"[{', '.join(json.dumps(text, ensure_ascii=False) for text in texts)}]"


def _printed(folder: Path, queries: list[str], documents: list[str], trust_remote_code: bool) -> str:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    return str(model.similarity(model.encode_query(queries), model.encode_document(documents)))
