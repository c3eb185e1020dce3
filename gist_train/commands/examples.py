"""An example of each command, for the end of its help."""

import typer

EXAMPLES = {
    "init": "gist-train init data/*.jsonl --to my.yaml",
    "prepare": "gist-train prepare my.yaml",
    "plan": "gist-train plan my.yaml --measure",
    "train": "gist-train train my.yaml --set training.epochs=3",
    "mine": "gist-train mine my.yaml --to mined.jsonl",
    "audit": "gist-train audit my.yaml --write-clean clean.jsonl",
    "evaluate": "gist-train evaluate my.yaml --steps 500,1000",
    "select": "gist-train select runs/my-model --metric stsb/spearman --average 3",
    "report": "gist-train report runs/my-model runs/other --to both.html",
    "export": "gist-train export runs/my-model --format onnx",
    "explain": "gist-train explain loss.margin",
    "extend": "gist-train extend runs/my-model --epochs 2 --set optimizer.lr=1e-5",
    "cache": "gist-train cache my.yaml --unused-for 30 --clear all",
}
"""Command -> what a person may type."""
FIRST = f"{EXAMPLES['init']}, then plan, train, export"
"""For the end of the help of all: a first run."""


def add_examples(*apps: typer.Typer) -> None:
    """Has the help of each command end with its example."""
    for command in (info for app in apps for info in app.registered_commands):
        assert command.callback is not None
        command.epilog = f"Example: {EXAMPLES[command.callback.__name__]}"
