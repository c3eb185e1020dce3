"""A small model learns from a large one: half of its layers, under the whole as guide, whose similarities it copies too.

python examples/distill_small_model.py [MODEL [KEY=VALUE ...]]
"""

import sys
from pathlib import Path

import gist_train

name, overrides = (sys.argv[1:2] or ["sentence-transformers/all-MiniLM-L6-v2"])[0], sys.argv[2:]
texts = Path(gist_train.__file__).parent / "quickstart"
intents = {"source": "jsonl", "path": texts / "intents.train.jsonl", "columns": {"anchor": "text"}, "task": "intents"}
passages = {
    "source": "jsonl",
    "path": texts / "passages.train.jsonl",
    "columns": {"anchor": "question", "positive": "passage"},
    "task": "passages",
}
config = {
    "name": "small",
    "model": {"name": name, "layers": [0, 2, 4], "max_length": 128},  # three of six
    "guide": {"name": name, "max_length": 128},
    "data": {"train": [intents, passages]},
    "distillation": {"weight": 1.0},
    "training": {"batch_size": 32, "epochs": 2},
    "optimizer": {"lr": 1e-4},
    "evaluation": {"tasks": [{"type": "retrieval", "name": "passages", "path": texts / "passages_test"}]},
}
run = gist_train.train(gist_train.load_config(config, overrides))
print(run.evaluate())  # base: the three layers as they were; tuned; guide: all six
print("the model:", run.export("small-model"))
