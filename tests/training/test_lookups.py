"""Labels and `in_batch_negatives: false`, from the YAML to the loss of a step."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.running import training_of

from gist_train.config.loading import load_config
from gist_train.training.loop import steps

pytestmark = pytest.mark.usefixtures("on_cpu")
TEMPERATURE = 0.05


def labelled(prefix: str, count: int) -> list[dict[str, object]]:
    words = ["my card is lost", "when is my loan due", "close the account", "a new card please", "the rate of the loan"]
    return [{"text": f"{prefix} {words[i % 5]} number {i}", "label": i % 3} for i in range(count)]


def test_labels_and_own_negatives_reach_the_loss(write_config, write_rows, make_model, triplets):
    """Three sources in mixed batches: rows that keep to themselves, labelled rows that mask their label, and labelled rows that
    do not. A rule that is taken from another source's index trains all the same."""
    alone = [{**row, "negative": row["negative"] or ["nothing of the kind"], "task": "t"} for row in triplets[:30]]
    paths = [
        write_rows("alone.jsonl", alone),
        write_rows("masked.jsonl", labelled("bank", 24)),
        write_rows("plain.jsonl", labelled("shop", 24)),
    ]

    def mining() -> dict[str, object]:
        return {"model": {"name": str(make_model(width=48, layers=1, seed=1))}}

    sources = [
        {"source": "jsonl", "path": str(paths[0]), "in_batch_negatives": False},
        {"source": "classification", "path": str(paths[1]), "mining": mining(), "mask_same_label": True},
        {"source": "classification", "path": str(paths[2]), "mining": mining()},
    ]
    path = write_config(
        guide=None,
        model={"name": str(make_model()), "dropout": 0},
        data={"train": sources, "batching": "mixed"},
        loss={"temperature": TEMPERATURE, "mask_duplicates": False},
        optimizer={"lr": 1e-9},
        training={"batch_size": 9, "max_steps": 6, "precision": "float32"},
    )
    config = load_config(path)
    training, _, _ = training_of(config)
    corpus = training.corpus
    model = SentenceTransformer(config.model.name, device="cpu")
    label = {row["text"]: row["label"] for row in labelled("bank", 24)}
    masked_pairs = 0
    for record in steps(training, 0, 6):
        rows = training.plan.batch(record.step)
        batch = corpus.batch(rows, training.plan.positives(rows, training.plan.epoch_of(record.step)))
        texts = [[corpus.text(i) for i in ids] for ids in (batch.anchor, batch.positive, batch.negative)]
        a, p, n = (torch.nn.functional.normalize(torch.tensor(model.encode(of)), dim=1) for of in texts)
        owner = np.repeat(np.arange(len(rows)), np.diff(batch.negative_offsets))
        losses = []
        for i, source in enumerate(corpus.source[rows].tolist()):
            others = [] if source == 0 else [j for j in range(len(rows)) if j != i]
            pool = [k for k in range(len(n)) if source != 0 or owner[k] == i]
            of_class = label.get(texts[0][i])
            same = {text for of in texts for text in of if source == 1 and label.get(text) == of_class}
            masked_pairs += len(same) - 2 if source == 1 else 0
            scores = [a[i] @ p[i]]
            scores += [a[i] @ p[j] for j in others if texts[1][j] not in same]
            scores += [a[i] @ n[k] for k in pool if texts[2][k] not in same]
            scores += [a[i] @ a[j] for j in others if texts[0][j] not in same]
            scores += [p[i] @ p[j] for j in others if texts[1][j] not in same]
            losses.append(torch.logsumexp(torch.stack(scores) / TEMPERATURE, 0) - scores[0] / TEMPERATURE)
        assert record.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert masked_pairs > 20
    assert {0, 1, 2} == set(corpus.source[training.plan.epoch(0).ravel()].tolist())
