"""Labelled texts: the guide mines triplets (a similar text of the class, one of another), and one class' texts are no negatives
of each other.

python examples/intents.py [MODEL [KEY=VALUE ...]]
"""

import sys
from pathlib import Path

import gist_train

name, overrides = (sys.argv[1:2] or ["sentence-transformers/all-MiniLM-L6-v2"])[0], sys.argv[2:]
texts = Path(gist_train.__file__).parent / "quickstart"  # lines of {"text": ..., "label": ...}
train, test = texts / "intents.train.jsonl", texts / "intents.test.jsonl"
config = {
    "name": "intents",
    "model": {"name": name, "max_length": 64},
    "guide": {"name": name},
    "data": {"train": [{"source": "classification", "path": train, "mask_same_label": True}]},
    "training": {"batch_size": 32, "epochs": 2},
    "optimizer": {"lr": 5e-5},
    "evaluation": {"every": 20, "tasks": [{"type": "classification", "name": "intents", "train": train, "test": test}]},
    "selection": {"metric": "intents/accuracy"},
}
run = gist_train.train(gist_train.load_config(config, overrides))
chosen = run.select()
print(f"accuracy {chosen.base['intents/accuracy']:.3f} -> {chosen.scores['intents/accuracy']:.3f} at step {chosen.step}")
print("the model:", run.export("intents-model"))
