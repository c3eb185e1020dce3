"""Stage 6 of `check_gpu.sh`: the guide's pass, encoding with the student, and the loss of a very large batch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.gpu.models import be_quiet, free_memory, fresh_accelerator, model_folder, synchronise, training_texts
from benchmarks.gpu.report import Report, Setup
from gist_train.config.models import GuideConfig
from gist_train.data.corpus import text_hashes
from gist_train.model.guide import GuideStore
from gist_train.model.loading import load_finished, load_guide
from gist_train.model.loss import guided_contrastive_loss
from gist_train.model.pretrained import Pretrained
from gist_train.training.throughput import peak_memory

PEER_BATCHES = (32, 128)
WIDTH, GUIDE_WIDTH, TEMPERATURE = 384, 1024, 0.01
TOLERANCE = 1e-4
"""Of the vectors of both sides, in float32."""


def run(setup: Setup, report: Report) -> None:
    """Times all three, the loss first: it is done soonest."""
    be_quiet()
    device = fresh_accelerator(setup, "float32").device
    rows = 64 if setup.tiny else 32_768
    report.note(loss=(found := time_loss(rows, 16 if setup.tiny else 2048, device)))
    report.say(f"loss of {rows:,} triplets: {found['seconds']:.3f} s, {found['peak_gb']:.3f} GB")
    free_memory()
    texts = training_texts(setup, 20 if setup.tiny else 2_000)
    for name in ("bge-small", "uae-large"):
        folder = model_folder(setup, name)
        report.say(f"{name} made")
        found = time_encoding(folder, texts, device)
        report.note(**{name.replace("-", "_"): found})
        told = f"{found['ours_seconds']:.3f} s, {found['texts_a_second']:,.0f} texts/s, {found['tokens_a_second']:,.0f} tokens/s"
        report.say(f"{name}, {found['texts']:,} texts: {told}; theirs {found['theirs_seconds']:.3f} s: {found['ratio']:.2f}")
        if not found["largest_difference"] <= TOLERANCE:
            report.fail(f"{name}: vectors of the two sides are {found['largest_difference']:.1e} apart")
        free_memory()
    found = time_store(model_folder(setup, "uae-large"), texts, device, setup.work / "store")
    ratios = {key: found[key] for key in ("seconds", "texts_a_second")}
    report.note(guide_store=found, summary=f"the guide's pass: {ratios['texts_a_second']:,.0f} texts/s")
    report.say(f"the guide's pass into its store: {ratios['seconds']:.3f} s, {ratios['texts_a_second']:,.0f} texts/s")


def time_loss(rows: int, block_size: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of the loss in blocks, forward and backward, one negative a row."""
    random = torch.Generator(device).manual_seed(0)

    def three(width: int, noise: float) -> list[torch.Tensor]:
        anchor, positive, negative = (torch.randn(rows, width, generator=random, device=device) for _ in range(3))
        return [anchor, positive.mul_(noise).add_(anchor), negative]

    students = [x.requires_grad_() for x in three(WIDTH, 6.0)]
    guides = dict(zip(("guide_anchor", "guide_positive", "guide_negative"), three(GUIDE_WIDTH, 30.0), strict=True))
    took: list[float] = []
    for _ in range(2):  # the first warms up
        for student in students:
            student.grad = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronise(device)
        began = time.perf_counter()
        out = guided_contrastive_loss(*students, **guides, temperature=TEMPERATURE, block_size=block_size)
        out.loss.backward()
        synchronise(device)
        took.append(time.perf_counter() - began)
    return {
        "triplets": rows,
        "block_size": block_size,
        "seconds": took[-1],
        "first_seconds": took[0],
        "peak_gb": peak_memory(device) / 1e9,
        "loss": out.loss.item(),
    }


def time_encoding(folder: Path, texts: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Seconds of `encode` on both sides, in float32; the peer has the better of two sizes of batch."""
    ours_seconds, tokens, our_vectors = _our_encoding(folder, texts, device)
    free_memory()
    theirs = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": torch.float32})
    theirs.encode(list(texts[: len(texts) // 8]), show_progress_bar=False)
    by_size: dict[int, float] = {}
    for size in PEER_BATCHES:
        began = time.perf_counter()
        their_vectors = theirs.encode(list(texts), batch_size=size, show_progress_bar=False)
        by_size[size] = time.perf_counter() - began
    best = min(by_size, key=by_size.__getitem__)
    return {
        "texts": len(texts),
        "tokens": tokens,
        "ours_seconds": ours_seconds,
        "texts_a_second": len(texts) / ours_seconds,
        "tokens_a_second": tokens / ours_seconds,
        "theirs_seconds": by_size[best],
        "theirs_batch_size": best,
        "ratio": by_size[best] / ours_seconds,
        "largest_difference": float(np.abs(our_vectors - their_vectors).max()),
    }


def _our_encoding(folder: Path, texts: Sequence[str], device: torch.device) -> tuple[float, int, Any]:
    """Seconds of `encode`, tokens and vectors."""
    model = load_finished(str(folder))
    model.encoder.to(device)
    model.encode(texts[: len(texts) // 8])  # untimed: what a device makes when it is first asked
    began = time.perf_counter()
    vectors = model.encode(texts)
    return time.perf_counter() - began, sum(map(len, model.tokens(texts))), vectors


def time_store(folder: Path, texts: Sequence[str], device: torch.device, store_folder: Path) -> dict[str, Any]:
    """Seconds of the guide's pass over different texts into an empty store on disk."""
    different = list(dict.fromkeys(texts))
    config = GuideConfig(name=str(folder))
    guide: Pretrained = load_guide(config)
    guide.encoder.to(device)
    guide.encode(different[: len(different) // 8])
    for file in store_folder.glob("*"):
        file.unlink()
    store = GuideStore(store_folder)
    lengths = np.array([len(text.encode()) for text in different])

    began = time.perf_counter()
    for _ in store.fill(guide, config, text_hashes(different), lengths, lambda index: different[index]):
        pass
    seconds = time.perf_counter() - began
    return {"texts": len(different), "seconds": seconds, "texts_a_second": len(different) / seconds, "dtype": config.dtype}
