"""Search: questions find passages. Each side is read after a prompt of its own, as E5's models want it.

python examples/search_with_prompts.py [MODEL [KEY=VALUE ...]]
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

import gist_train

name, overrides = (sys.argv[1:2] or ["intfloat/e5-small-v2"])[0], sys.argv[2:]
texts = Path(gist_train.__file__).parent / "quickstart"
query, passage = "query: ", "passage: "
pairs = {
    "source": "jsonl",
    "path": texts / "passages.train.jsonl",
    "columns": {"anchor": "question", "positive": "passage"},
    "prompts": {"anchor": query, "positive": passage},
}
config = {
    "name": "search",
    "model": {"name": name, "max_length": 128},
    "guide": {"name": name, "prompts": {"anchor": query, "positive": passage, "negative": passage}},
    "data": {"train": [pairs]},
    "training": {"batch_size": 32, "epochs": 3},
    "optimizer": {"lr": 5e-5},
    "evaluation": {"every": 13, "tasks": [{"type": "retrieval", "name": "passages", "path": texts / "passages_test"}]},
    "selection": {"metric": "passages/ndcg@10"},
}
run = gist_train.train(gist_train.load_config(config, overrides))
print(run.scores())
print("best step:", run.select().step)
model = SentenceTransformer(str(run.export("search-model")), device="cpu")  # it knows its prompts: query and document
passages = ["Hailstones grow in the updraughts of thunderclouds.", "Moist air chilled by the ground becomes fog."]
print(model.similarity(model.encode_query(["where does fog come from"]), model.encode_document(passages)))
