"""Rows with wrong positives are found before anything is trained, and left out.

python examples/clean_data.py [MODEL [KEY=VALUE ...]]
"""

import json
import sys
from pathlib import Path

import pandas

import gist_train

model, overrides = (sys.argv[1:2] or ["sentence-transformers/all-MiniLM-L6-v2"])[0], sys.argv[2:]
texts = Path(gist_train.__file__).parent / "quickstart"
rows = [json.loads(line) for line in (texts / "passages.train.jsonl").open(encoding="utf-8")]
for number in range(0, len(rows), 20):  # every twentieth row gets the passage of another one, as when columns slip
    rows[number]["passage"] = rows[number - len(rows) // 2]["passage"]
Path("dirty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(name: str, **columns: str) -> gist_train.Config:
    source = {"source": "jsonl", "path": f"{name}.jsonl", "columns": columns}
    task = {"type": "retrieval", "name": "passages", "path": texts / "passages_test"}
    run = {"name": name, "model": {"name": model}, "guide": {"name": model}, "data": {"train": [source]}}
    more = {"training": {"batch_size": 32}, "optimizer": {"lr": 5e-5}, "evaluation": {"tasks": [task]}}
    return gist_train.load_config(run | more, overrides)


audited = gist_train.audit(config("dirty", anchor="question", positive="passage"), write_clean="clean.jsonl")
suspects = pandas.DataFrame(audited.lines())
print(suspects.groupby("kind").size())
wrong = suspects[suspects.kind == "unrelated"]
print(f"{(wrong.row % 20 == 1).sum()} of the {len(range(0, len(rows), 20))} wrong rows are among the {len(wrong)} unrelated ones")
run = gist_train.train(config("clean"))
print(run.evaluate())
