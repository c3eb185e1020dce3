"""A config -> what training will do, in numbers. No step is taken and no guide put to work, but by `measure`."""

import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from gist_train.checks import check
from gist_train.config.models import GuideConfig, GuideVectorsConfig, OneGuide, StoredModelConfig
from gist_train.config.schema import Config, cache_folder
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.data.files import folder_bytes
from gist_train.evaluation.leakage import count_leaks
from gist_train.model.checksums import CHECK_BYTES
from gist_train.model.device import this_device
from gist_train.model.filling import HASH_BYTES
from gist_train.model.guide import GuideStore, prompted
from gist_train.model.loading import load_guide
from gist_train.model.pretrained import Pretrained
from gist_train.model.vectors import vector_store
from gist_train.planning.estimates import (
    EpochTokens,
    checkpoint_bytes,
    checkpoints_kept,
    epoch_tokens,
    memory,
)
from gist_train.planning.findings import (
    DiskEstimate,
    EpochTokenCounts,
    ExampleRow,
    GuidePass,
    Measured,
    MemoryEstimate,
    Plan,
    SelectedStep,
    TextTokens,
)
from gist_train.preparation import prepare, rows_of_sources
from gist_train.progress import terminal
from gist_train.training.distributed import make_accelerator, precision_on
from gist_train.training.guides import SelfGuide, guide_parts
from gist_train.training.loop import steps
from gist_train.training.schedule import Schedule
from gist_train.training.setup import Prepared, last_step, open_training, schedule_of
from gist_train.training.throughput import training_flops

EXACT_TEXTS = 4096
"""Texts that the guide's tokenizer reads at most: where more are missing, the total is estimated from so many drawn ones."""
MEASURED_STEPS = 5
MEASURED_GUIDE_TEXTS = 64
DAY = 86_400


def plan(config: Config, *, measure: bool = False, console: Console | None = None) -> Plan:
    """What training will do. Builds the corpus and the student's tokens where no run has built them yet.

    Args:
        measure: whether to take five steps on this machine, on weights that are thrown away, and to embed some texts with the
            guide, whose store is not touched.
        console: where a person reads what is going on; None for stderr.

    Raises:
        UserError: data, models or evaluation tasks are not what the config says.
    """
    tasks, device = check(config, console or terminal()).tasks, this_device()
    prepared = prepare(config, device, console or terminal(), trains_here=measure, fill_store=False)
    student, corpus, batches = prepared.student, prepared.corpus, prepared.plan
    schedule = schedule_of(config, batches.steps_per_epoch)
    stop = last_step(config, schedule)
    epoch = epoch_tokens(corpus, prepared.tokens, batches, 0, student.max_length)
    guide, dropped = _guide(config, corpus), _dropped(config, corpus, batches)
    of_task = np.bincount(corpus.task, minlength=len(corpus.tasks)).tolist()
    return Plan(
        name=config.name,
        sources=rows_of_sources(config, corpus),
        examples=[_example(corpus, source) for source in range(len(config.data.train))],
        batching=config.data.batching,
        batch_size=config.training.batch_size,
        rows=sum(count["read"] for count in corpus.meta["sources"]),
        dropped_rows=sum(dropped.values()),
        dropped=dropped,
        excluded_texts=corpus.excluded_texts,
        unique_texts=corpus.text_count,
        tasks=dict(sorted(zip(corpus.tasks, of_task, strict=True), key=lambda item: -item[1])),
        rows_beside_a_shared_text=batches.counts(0).shared_text,
        tokens=int(prepared.tokens.offsets[-1]),
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=schedule.total_steps,
        stop_at_step=stop,
        warmup_steps=schedule.warmup_steps,
        peak_learning_rate=schedule.lr,
        peak_reached=stop >= schedule.warmup_steps,
        selected=_selected(config, schedule, batches, stop),
        text_tokens=_text_tokens(prepared.tokens, student.max_length),
        epoch=_epoch(epoch),
        evaluation_tasks=[task.name for task in tasks],
        leakage=count_leaks(corpus, tasks),
        guide=guide,
        memory=_memory(config, student, epoch, device),
        disk=_disk(config, student, corpus, stop),
        flops_per_step=_mean_flops(student, epoch),
        steps_per_second_for_a_day=stop / DAY,
        measured=_measured(config, prepared, guide, stop) if measure else None,
    )


def _example(corpus: Corpus, source: int) -> ExampleRow | None:
    rows = np.flatnonzero(corpus.source == source)
    if not len(rows):
        return None
    row = int(rows[0])
    prompts = [corpus.prompts[prompt] for prompt in corpus.row_prompts[row].tolist()]
    negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
    return ExampleRow(
        corpus.tasks[int(corpus.task[row])],
        prompts[0] + corpus.text(int(corpus.anchor[row])),
        prompts[1] + corpus.text(int(corpus.positive[corpus.positive_offsets[row]])),
        prompts[2] + corpus.text(int(negatives[0])) if len(negatives) else None,
    )


def _dropped(config: Config, corpus: Corpus, batches: BatchPlan) -> dict[str, int]:
    counts = corpus.meta["sources"]
    size, rows = config.training.batch_size, corpus.row_count
    dropped = {key: sum(count[key] for count in counts) for key in ("bad", "alone", "same_text", "filtered", "not_drawn")}
    dropped["excluded"] = corpus.excluded_rows
    came = sum(count["read"] for count in counts) - sum(dropped.values())
    dropped["suspects"] = came - rows
    if config.data.batching == "reference":
        dropped["short_window"] = rows % size
        dropped["mixed_window"] = rows - rows % size - batches.steps_per_epoch * size
    else:
        dropped["left_over"] = batches.counts(0).left_out
    return dropped


def _selected(config: Config, schedule: Schedule, batches: BatchPlan, stop: int) -> SelectedStep:
    around = config.selection.around
    step = stop if around is None else around
    return SelectedStep(
        step=step,
        chosen=around is not None,
        reached=step <= stop,
        has_checkpoint=step == stop or step % config.checkpoint.every == 0,
        epoch=step / batches.steps_per_epoch,
        learning_rate=schedule.learning_rate(step),
        triplets_seen=step * config.training.batch_size,
        in_warmup=step < schedule.warmup_steps,
        note=config.selection.note,
    )


def _text_tokens(tokens: TokenTable, max_length: int) -> TextTokens:
    lengths = np.diff(tokens.offsets)
    edges = [2**power for power in range(3, 20) if 2**power < max_length] + [max_length]
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges)).tolist()
    return TextTokens(
        max_length=max_length,
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p95=float(np.percentile(lengths, 95)),
        at_max_length=int((lengths == max_length).sum()),
        texts_up_to=dict(zip(edges, counts, strict=True)),
    )


def _epoch(epoch: EpochTokens) -> EpochTokenCounts:
    return EpochTokenCounts(
        tokens=epoch.real,
        padded_to_longest=epoch.padded_to_longest,
        padded_to_max_length=epoch.padded_to_max,
        mean_batch_tokens=float(epoch.by_step.mean()),
        largest_batch_tokens=int(epoch.by_step.max()),
    )


def _guide(config: Config, corpus: Corpus) -> GuidePass | None:
    passes = [_one_guide(config, guide, corpus, where) for where, guide in config.guides.items()]
    if not passes:
        return None
    return GuidePass(
        name=", ".join(one.name for one in passes),
        texts_to_embed=sum(one.texts_to_embed for one in passes),
        tokens_to_embed=sum(one.tokens_to_embed for one in passes),
        tokens_are_estimated=any(one.tokens_are_estimated for one in passes),
        store_bytes=sum(one.store_bytes for one in passes),
        store_bytes_now=sum(one.store_bytes_now for one in passes),
    )


def _one_guide(config: Config, guide: OneGuide, corpus: Corpus, where: str) -> GuidePass:
    if isinstance(guide, GuideVectorsConfig):
        stored = folder_bytes(vector_store(cache_folder(config), guide, where).folder)
        return GuidePass(guide.vectors, 0, 0, tokens_are_estimated=False, store_bytes=stored, store_bytes_now=stored)
    width = missing_texts = tokens = sampled = stored_texts = bytes_now = 0
    for part in guide_parts(config, guide, corpus, where):
        store = GuideStore(part.folder)
        missing = part.texts[store.positions(part.hashes) < 0]
        width = width or store.width
        stored_texts += len(store) + len(missing)
        bytes_now += folder_bytes(part.folder)
        if len(missing):
            model = load_guide(part.model, where)
            sample = _drawn_texts(missing, EXACT_TEXTS)
            read = model.tokens(prompted(model, part.model, [corpus.text(i) for i in sample.tolist()]))
            width = model.dimensions
            sampled += len(sample)
            missing_texts += len(missing)
            tokens += round(sum(map(len, read)) * len(missing) / len(sample))
    number = np.dtype(guide.dtype).itemsize
    return GuidePass(
        name=guide.name,
        texts_to_embed=missing_texts,
        tokens_to_embed=tokens,
        tokens_are_estimated=sampled < missing_texts,
        store_bytes=stored_texts * (width * number + CHECK_BYTES + HASH_BYTES),
        store_bytes_now=bytes_now,
    )


def _drawn_texts(texts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the texts, or all where there are fewer."""
    return texts if len(texts) <= count else np.random.default_rng(0).choice(texts, count, replace=False)


def _memory(config: Config, student: Pretrained, epoch: EpochTokens, device: torch.device) -> MemoryEstimate:
    size, training = config.training.batch_size, config.training
    negatives = (len(epoch.lengths) - 2 * size * len(epoch.by_step)) / len(epoch.by_step)
    precision = precision_on(training.precision, device)
    blocks = 1 + config.loss.contrast_anchors + config.loss.contrast_positives
    contrasted = blocks * size + negatives if config.loss.weight else 0
    distilled = 2 * size + negatives if config.distillation.weight else 0
    used = memory(
        student.encoder,
        epoch,
        candidates=int(size * (contrasted + distilled)),
        dimensions=len(config.loss.dimensions or [student.width]),
        half=precision != "float32",
        dense=device.type == "cpu",
        limit=training.max_tokens_per_forward,
        checkpointed=training.gradient_checkpointing,
    )
    return MemoryEstimate(
        precision=precision,
        max_tokens_per_forward=training.max_tokens_per_forward,
        gradient_checkpointing=training.gradient_checkpointing,
        weights=used.weights,
        gradients=used.gradients,
        moments=used.moments,
        activations=used.activations,
        total=used.total,
    )


def _disk(config: Config, student: Pretrained, corpus: Corpus, stop: int) -> DiskEstimate:
    kept = checkpoints_kept(config.checkpoint, config.selection, config.evaluation.every, stop)
    one = checkpoint_bytes(student.encoder)
    return DiskEstimate(
        checkpoints=len(kept),
        checkpoint_bytes=one,
        checkpoints_bytes=(len(kept) + 1) * one,  # while one more is written, none is deleted yet
        corpus_bytes=folder_bytes(corpus.folder),
    )


def _mean_flops(student: Pretrained, epoch: EpochTokens) -> float:
    lengths, counts = np.unique(epoch.lengths, return_counts=True)
    groups = list(zip(counts.tolist(), lengths.tolist(), strict=True))
    return training_flops(student.encoder, groups) / len(epoch.by_step)


def _measured(config: Config, prepared: Prepared, guide: GuidePass | None, stop: int) -> Measured:
    """Seconds of a step, of the guide's pass and of the whole run on this machine, of one process."""
    accelerator, _ = make_accelerator(config.training.precision)
    models = {where: one for where, one in config.guides.items() if isinstance(one, GuideConfig)}
    stand_in = bool(models) and prepared.guide is None
    pass_seconds = 0.0
    if guide is not None and stand_in:
        # Without a whole store: the student's own similarities, which cost a step as much as the guide's.
        prepared = replace(prepared, guide=SelfGuide())
        for where, one in models.items():
            tokens = _one_guide(config, one, prepared.corpus, where).tokens_to_embed
            pass_seconds += tokens / _guide_rate(one.of_roles[0], prepared.corpus, accelerator.device)
    job = open_training(config, accelerator, prepared)
    records = list(steps(job.training, 0, min(1 + MEASURED_STEPS, job.training.schedule.total_steps)))
    timed = records[1:] or records  # the first one also sets up what the others use
    seconds = [sum(record.clock.seconds().values()) for record in timed]
    step = statistics.median(seconds)
    return Measured(
        device=accelerator.device.type,
        threads=torch.get_num_threads(),
        steps=len(timed),
        step_seconds=step,
        tokens_per_second=sum(record.tokens for record in timed) / sum(seconds),
        guide_pass_seconds=pass_seconds,
        guide_stood_in_for=stand_in,
        training_seconds=step * stop,
        total_seconds=pass_seconds + step * stop,
    )


def _guide_rate(config: StoredModelConfig, corpus: Corpus, device: torch.device) -> float:
    """Tokens that the guide embeds in a second on this machine, measured on texts drawn from the corpus."""
    guide = load_guide(config).to(device)
    texts = _drawn_texts(np.arange(corpus.text_count), MEASURED_GUIDE_TEXTS)
    read = prompted(guide, config, [corpus.text(i) for i in texts.tolist()])
    for _ in guide.embed(read[:1], config.batch_tokens):
        pass
    began = time.perf_counter()
    for _ in guide.embed(read, config.batch_tokens):  # brings each batch back from the device
        pass
    return sum(map(len, guide.tokens(read))) / (time.perf_counter() - began)
