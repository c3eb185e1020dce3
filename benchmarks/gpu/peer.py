"""sentence-transformers' side of stage 4 of `check_gpu.sh`."""

from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.gpu.models import free_memory
from benchmarks.sides import Bench, Peer, run_theirs


def time_peer(
    bench: Bench, guide: SentenceTransformer | None, *, untimed: int, flash: bool, cached: int | None
) -> dict[str, Any]:
    """Figures of the peer's step over all batches of `bench`, after `untimed` of them that are not timed.

    Args:
        guide: which runs in every step; None for MultipleNegativesRankingLoss.
        flash: whether the student takes flash attention; a guide has been loaded with it or not.
        cached: texts at a time of the loss with cached gradients; None for the usual one.
    """
    peer = Peer(cached={} if cached is None else {"mini_batch_size": cached}, attention="flash_attention_2" if flash else None)
    count = bench.plan.steps_per_epoch
    plan = replace(bench.plan, chosen=bench.plan.chosen[:untimed] + bench.plan.chosen)
    untimed = plan.steps_per_epoch - count
    whole = replace(bench, plan=plan, peer=peer, peer_guide=guide)
    name = "MultipleNegativesRankingLoss" if guide is None else "GISTEmbedLoss"
    row: dict[str, Any] = {"mode": name if cached is None else f"Cached{name} ({cached})"}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    try:
        seconds = run_theirs(whole, untimed + count, untimed=untimed)
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    except Exception as error:  # what fails here must not cost our own figures
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:1000]}"
    else:
        tokens = sum(int(bench.tokens.lengths(views).sum()) for batch in bench.batches for views in _views(batch))
        row |= {
            "milliseconds": 1000 * seconds / count,
            "steps": count,
            "tokens_a_step": tokens / count,
            "tokens_a_second": tokens / seconds,
            "triplets_a_second": count * bench.plan.triplets / seconds,
            "peak_gb": torch.cuda.max_memory_allocated(bench.device) / 1e9 if bench.device.type == "cuda" else None,
            "peak_reserved_gb": torch.cuda.max_memory_reserved(bench.device) / 1e9 if bench.device.type == "cuda" else None,
        }
    free_memory()
    return row


def _views(batch: Any) -> tuple[Any, Any, Any]:
    return batch.anchor_views, batch.positive_views, batch.negative_views
