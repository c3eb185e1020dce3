"""How many mask decisions a float16 guide store changes against a float32 one, on a run's own batches.

usage: python -m benchmarks.float16_decisions CONFIG [--set key=value ...] [--steps 200]

Reads the run's float32 guide store (guide.dtype: float32), rounds its embeddings to float16 as a float16 store would, and
compares guide similarity > threshold over all four blocks of the loss. Prints one JSON object.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from gist_train.config.loading import load_config
from gist_train.model.loss import BLOCKS
from gist_train.model.masks import similarity_tolerance
from gist_train.preparation import prepare_corpus
from gist_train.training.batching import batch_plan
from gist_train.training.embedding import prepare_guide
from gist_train.training.guides import StoredGuide


def decisions(anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> list[torch.Tensor]:
    """Which candidates leave, for each of `BLOCKS`: (B, B), (B, M), (B, B), (B, B) bool."""
    own = (anchor * positive).sum(dim=1, keepdim=True)
    threshold = own + similarity_tolerance(own)
    looks = ((anchor, positive), (anchor, negative), (anchor, anchor), (positive, positive))
    return [a @ b.T > threshold for a, b in looks]


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=200)
    told = parser.parse_args()
    config = load_config(told.config, [*told.set, "guide.dtype=float32"])
    console = Console(stderr=True)
    corpus = prepare_corpus(config, torch.device("cpu"), console)
    guide = prepare_guide(config, corpus, torch.device("cpu"), console)
    if not isinstance(guide, StoredGuide):
        parser.error("the config has no guide")
    plan = batch_plan(config, corpus)
    candidates, masked, changed = (np.zeros(4, np.int64) for _ in range(3))
    for step in range(1, told.steps + 1):
        rows = plan.batch(step)
        batch = corpus.batch(rows, plan.positives(rows, plan.epoch_of(step)))
        exact = [guide.anchor.embeddings(ids) for ids in (batch.anchor, batch.positive, batch.negative)]
        rounded = [torch.nn.functional.normalize(vectors.half().float(), dim=1) for vectors in exact]
        for block, (one, other) in enumerate(zip(decisions(*exact), decisions(*rounded), strict=True)):
            own = torch.eye(*one.shape, dtype=torch.bool) if BLOCKS[block] != "an" else torch.zeros_like(one)
            candidates[block] += int((~own).sum())
            masked[block] += int((one & ~own).sum())
            changed[block] += int(((one ^ other) & ~own).sum())
    shares = {
        "steps": told.steps,
        "candidates": int(candidates.sum()),
        "masked_share": float(masked.sum() / candidates.sum()),
        "changed_share": float(changed.sum() / candidates.sum()),
        "changed_share_by_block": dict(zip(BLOCKS, (changed / candidates).tolist(), strict=True)),
    }
    print(json.dumps(shares, indent=2))


if __name__ == "__main__":
    main()
