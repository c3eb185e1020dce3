"""What a person sees of a plan: what `plan --json` has, in the order in which it is decided."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gist_train.config.errors import listed, shown
from gist_train.planning.findings import GuidePass, Plan

SHOWN_TASKS = 12
SHOWN_CHARACTERS = 100
"""Of a row's texts."""
BAR = 30
"""Characters of the longest bar."""
DROPPED = {
    "bad": "can't be used: skipped.jsonl of the corpus says why",
    "alone": "labelled, and the only one of their class",
    "same_text": "labelled, whose drawn positive or negative is the same text",
    "filtered": "left out by where",
    "excluded": "left out for their evaluation texts",
    "not_drawn": "left out by max_rows",
    "suspects": "dropped as suspects, or for too few hard negatives",
    "short_window": "at the end of the data, too few for a batch",
    "mixed_window": "in batches that would have held more than one task",
    "left_over": "left out of the first epoch, too few for a whole batch or by a weight below 1; others leave out other rows",
}


def plan_page(planned: Plan) -> RenderableType:
    """The page, a section each for data, steps, tokens, guide, resources and, where they were measured, times."""
    sections = [
        ("Data", _data(planned)),
        ("Steps", _steps(planned)),
        ("Tokens", _tokens(planned)),
        ("Guide", _guide(planned.guide)),
        ("Memory and disk, estimated", _resources(planned)),
        ("Time", _time(planned)),
    ]
    parts: list[RenderableType] = [Text(f"gist-train plan: {planned.name}", style="bold")]
    for title, rows in sections:
        table = Table.grid(padding=(0, 2, 0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for key, value in rows:
            table.add_row(key, value)
        parts += ["", Text(title, style="bold"), table]
    return Group(*parts)


Rows = Iterator[tuple[str, RenderableType]]


def _data(planned: Plan) -> Rows:
    for source, example in zip(planned.sources, planned.examples, strict=True):
        yield source.source, Text(source.path)
        yield "", str(source)
        if example is not None:
            for name, text in (("anchor", example.anchor), ("positive", example.positive), ("negative", example.negative)):
                if text is not None:
                    yield "", Text(f"{name:<8}  {shown(text, SHOWN_CHARACTERS)}", style="dim")
        if source.unread_columns:
            yield "", Text(f"columns that are not read: {listed(source.unread_columns)}", style="yellow")
    tasks = list(planned.tasks.items())
    over = f"{len(tasks):,} task{'s' if len(tasks) > 1 else ''}"
    yield "rows", f"{planned.rows:,} over {over}, {planned.unique_texts:,} unique texts"
    yield "dropped", f"{planned.dropped_rows:,}"
    for reason, count in planned.dropped.items():
        if count:
            yield "", f"{count:,} {DROPPED[reason]}"
    if planned.excluded_texts:
        yield "excluded", f"{planned.excluded_texts:,} texts that evaluation judges on"
    for leak in planned.leakage:
        if leak.shared:
            shared = f"{leak.shared:,} of {leak.texts:,} texts of {leak.task} ({leak.part})"
            yield "leaked", Text(f"{shared}, in {leak.rows:,} rows: see data.exclude_evaluation_texts", style="bold yellow")
    if planned.rows_beside_a_shared_text:
        yield (
            "sharing a text",
            f"{planned.rows_beside_a_shared_text:,} rows share a batch with a row of the same anchor or positive",
        )
    yield "rows by task", ""
    for name, rows in tasks[:SHOWN_TASKS]:
        yield f"{rows:>12,}", Text(name)
    if len(tasks) > SHOWN_TASKS:
        yield f"{sum(rows for _, rows in tasks[SHOWN_TASKS:]):>12,}", f"{len(tasks) - SHOWN_TASKS:,} more tasks"


def _steps(planned: Plan) -> Rows:
    chosen = planned.selected
    yield "per epoch", f"{planned.steps_per_epoch:,} batches of {planned.batch_size} ({planned.batching})"
    ends = "" if planned.stop_at_step == planned.total_steps else f"; this run ends at step {planned.stop_at_step:,}"
    yield "in all", f"{planned.total_steps:,}{ends}"
    yield "warm-up", f"{planned.warmup_steps:,}, to the peak learning rate {planned.peak_learning_rate:.4g}"
    yield (
        "selected" if chosen.chosen else "at the end",
        f"step {chosen.step:,}: epoch {chosen.epoch:.3f}, learning rate {chosen.learning_rate:.4e}, "
        f"{chosen.triplets_seen:,} triplets seen",
    )
    if not chosen.reached:
        yield "", Text("the run ends before it: raise training.stop_at_step, epochs or max_steps", style="bold yellow")
    elif not chosen.has_checkpoint:
        yield "", Text("no checkpoint is written at it: checkpoint.every does not divide it", style="bold yellow")
    if chosen.in_warmup:
        peak = "the peak is reached after it" if planned.peak_reached else "the peak learning rate is never reached"
        yield "", Text(f"inside warm-up: {peak}", style="bold yellow")
    if chosen.note:
        yield "", Text(chosen.note.strip(), style="yellow")
    if planned.evaluation_tasks:
        yield "evaluated on", Text(", ".join(planned.evaluation_tasks))
    else:
        yield (
            "evaluated on",
            Text(
                "nothing: name tasks in evaluation.tasks, or set evaluation.held_out, to see what training gains", style="yellow"
            ),
        )


def _tokens(planned: Plan) -> Rows:
    of_texts, epoch = planned.text_tokens, planned.epoch
    yield (
        "per text",
        f"mean {of_texts.mean:.1f}, median {of_texts.median:.0f}, 95 % up to {of_texts.p95:.0f}; "
        f"{of_texts.at_max_length:,} at the limit of {of_texts.max_length}",
    )
    largest = max(of_texts.texts_up_to.values())
    for edge, texts in of_texts.texts_up_to.items():
        yield f"{'up to ' + str(edge):>12}", f"{'█' * round(BAR * texts / largest):<{BAR}} {texts:,}"
    yield "per batch", f"mean {epoch.mean_batch_tokens:,.0f}, largest {epoch.largest_batch_tokens:,}"
    yield "per epoch", f"{epoch.tokens:,}"
    padded = {"the longest of each column": epoch.padded_to_longest, "the limit": epoch.padded_to_max_length}
    for limit, tokens in padded.items():
        yield "", f"{tokens:,} ({tokens / epoch.tokens:.2f} times) by a trainer that pads to {limit}"


def _guide(guide: GuidePass | None) -> Rows:
    if guide is None:
        yield "", "no store: no guide, or the student itself"
        return
    yield "model", Text(guide.name)
    about = "about " if guide.tokens_are_estimated and guide.texts_to_embed else ""
    yield "still to embed", f"{guide.texts_to_embed:,} texts, {about}{guide.tokens_to_embed:,} tokens, once for all runs"
    yield "store", f"{_size(guide.store_bytes)} on disk when it is whole, {_size(guide.store_bytes_now)} now"


def _resources(planned: Plan) -> Rows:
    memory, disk = planned.memory, planned.disk
    parts = (
        f"weights {_size(memory.weights)}, gradients {_size(memory.gradients)}, moments {_size(memory.moments)}, "
        f"activations {_size(memory.activations)}"
    )
    limit = memory.max_tokens_per_forward
    at_a_time = "" if limit is None else f" by {limit:,} tokens"
    yield (
        "per device",
        f"{_size(memory.total)} in {memory.precision}, the whole batch on one device{at_a_time}, largest batch: {parts}",
    )
    yield (
        "checkpoints",
        f"{_size(disk.checkpoints_bytes)}: {disk.checkpoints:,} of {_size(disk.checkpoint_bytes)} are kept, "
        "and one is being written, from a copy in the main memory",
    )
    yield "corpus", f"{_size(disk.corpus_bytes)}, with tokens"


def _time(planned: Plan) -> Rows:
    yield "to take a day", f"{planned.steps_per_second_for_a_day:.3g} steps a second would do"
    memory = planned.memory
    again = memory.max_tokens_per_forward is not None or memory.gradient_checkpointing
    on_top = ", without what is computed again to save memory" if again else ""
    yield "a step", f"{planned.flops_per_step / 1e12:.3g} TFLOP of matrix products over real tokens{on_top}"
    measured = planned.measured
    if measured is None:
        yield "", "--measure takes five steps here and says how long the run will take"
        return
    where = f"{measured.device}, {measured.threads} threads, {planned.memory.precision}"
    yield "measured", f"{measured.step_seconds:.3g} s a step, {measured.tokens_per_second:,.0f} tokens/s ({where})"
    if measured.guide_stood_in_for:
        yield "guide's pass", f"{_duration(measured.guide_pass_seconds)}, by some texts embedded here"
    yield "training", _duration(measured.training_seconds)
    yield "in all", f"{_duration(measured.total_seconds)}; checkpoints and evaluations come on top"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}" if unit != "bytes" else f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
