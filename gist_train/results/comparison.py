"""Several models on the same tasks, side by side: models that are named, or the checkpoints of a run as they are written."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, zip_longest

from rich.console import Console, Group
from rich.table import Table

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config, cache_folder, training_prompts
from gist_train.evaluation.measuring import Measuring, Scores, on_this_device, scores_line, values
from gist_train.evaluation.metrics import metric_of, task_of
from gist_train.model.loading import load_finished, load_guide, load_student, load_trained
from gist_train.model.whole import TextModel
from gist_train.progress import in_points, say
from gist_train.results.selected import Selected, read_selected
from gist_train.run_folder import Run
from gist_train.training.checkpoint import checkpoint_to_resume, no_checkpoint, no_such_step

BASE, TUNED = "base", "tuned"
ROLE = re.compile(rf"{BASE}|{TUNED}|guide(\[\d+\])?")
"""What models are called that are no run's own."""
SIDE_BY_SIDE = 5
"""Models that a table has room for as columns."""
POLL_SECONDS = 2.0
"""Between two looks at the run folder."""
Subject = tuple[str, Callable[[Measuring], Scores | None]]
"""A model's name, and its scores on tasks: None where it is gone."""


def compare(
    config: Config,
    run: Run,
    *,
    models: Sequence[str],
    steps: str | None,
    dimensions: Sequence[int],
    console: Console,
    share: tuple[int, int] = (0, 1),
    tuned: str = TUNED,
    beside: str | None = "",
) -> Iterator[tuple[str, Scores]]:
    """Evaluates models on `config.evaluation.tasks` and yields (name, scores) of each.

    Args:
        models: folders or hub ids to evaluate.
        steps: checkpoints of the run to evaluate: "all", "selected" or "N,N". With neither: base, the selected or else the
            newest, and the guide.
        dimensions: besides the embeddings as the config has them, cut to each of these.
        share: (number, count) of a process of several, which takes its part of the tasks: `joined` puts them together.
        tuned: what the run's model is called where neither models nor steps are given.
        beside: what stands before the names of base and guide then; None: they are left out.

    Raises:
        UserError: no tasks, or a model, checkpoint or file that is not there.
    """
    measuring = Measuring.of_some(config, console)
    number, processes = share
    measuring = measuring.only([task.name for task in measuring.tasks][number::processes])
    if dimensions:
        load_student(config.model).with_truncation(max(dimensions))  # refuses what it can't give before anything is measured
    if models or steps is not None:
        subjects = _named(config, run, models, steps, console)
    else:
        subjects = _side_by_side(config, run, console, tuned, beside)
    for model, scores_on in subjects:
        for dimension in (None, *dimensions):
            name = model if dimension is None else f"{model}, {dimension} dimensions"
            console.print(f"measuring {name}", highlight=False, soft_wrap=True)
            scores = scores_on(measuring if dimension is None else measuring.cut_to(dimension))
            if scores is not None:
                yield name, scores


def compare_runs(
    runs: Sequence[tuple[Config, Run]], *, dimensions: Sequence[int], console: Console, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, Scores]]:
    """Evaluates each run's selected or newest checkpoint on its config's tasks and yields ("base", scores), (run, scores), ...

    Base and guide of the first run stand for those of all that train the same model with the same guide; the others' own are
    called by the run's name too. No two have one name. A task that asks another thing of a run than of those before it, which
    is said, is another task: "held_out (2)". Arguments and errors as `compare` has them.
    """
    first = runs[0][0]
    given: set[str] = set()
    names, told_apart = run_names([run for _, run in runs]), _unlike_tasks([config for config, _ in runs], console)
    for number, ((config, run), name, unlike) in enumerate(zip(runs, names, told_apart, strict=True)):
        for task, other in unlike.items():
            why = f"{name} is judged by other texts, or by texts cut at another length, than {names[0]}"
            say(console, f"{other}: {why} by {task}; their scores say nothing of each other")
        alike = not unlike and (config.model, config.guide, config.evaluation) == (first.model, first.guide, first.evaluation)
        compared = compare(
            config,
            run,
            models=[],
            steps=None,
            dimensions=dimensions,
            console=console,
            share=share,
            tuned=name,
            beside="" if number == 0 else None if alike else f"{name}: ",
        )
        for model, scores in compared:
            label = model if model not in given else f"{model} ({number + 1})"  # a folder may be called "other: base"
            given.add(label)
            yield label, {"/".join([unlike.get(task_of(key), task_of(key)), metric_of(key)]): one for key, one in scores.items()}


def _unlike_tasks(configs: Sequence[Config], console: Console) -> list[dict[str, str]]:
    """By config, the tasks that ask something else than those of their name before it, each with a name of its own."""
    known: dict[str, list[object]] = {}
    unlike = []
    for config in configs:
        measuring, others = Measuring.of_some(config, console), dict[str, str]()
        for task, content in measuring.contents.items():
            asked, before = (content, measuring.terms, config.model.max_length), known.setdefault(task, [])
            if asked not in before:
                before.append(asked)
            if number := before.index(asked):
                others[task] = f"{task} ({number + 1})"
        unlike.append(others)
    return unlike


def run_names(runs: Sequence[Run]) -> list[str]:
    """What tables call each run, no two alike and none as a base or guide: its folder's name, or its path where two share one."""
    names = [run.folder.name for run in runs]
    if len({*names}) < len(runs):
        names = [str(run) for run in runs]
    names = [f"run {name}" if ROLE.fullmatch(name) else name for name in names]
    return [f"{name} ({number})" if name in names[: number - 1] else name for number, name in enumerate(names, start=1)]


def joined(parts: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """The scores that `compare` gave each of several processes, by model, in the order in which one would have them.

    Raises:
        UserError: not all processes found the same models.
    """
    names = [[*part] for part in parts]
    if other := next((some for some in names if some != names[0]), None):
        found, expected = f"{listed(other)}, on another process", f"{listed(names[0])}, as on the first"
        fix = "launch it where all processes see the run folder, while no training deletes checkpoints"
        raise UserError(Fault("the models to evaluate", found, expected, fix))
    return {name: _interleaved([part[name] for part in parts]) for name in names[0]}


def _interleaved(parts: Sequence[Scores]) -> Scores:
    """Scores of one model by all processes, the first of which has every so many-th task, from the first one on."""
    by_task = [[[*scores] for _, scores in groupby(part.items(), lambda item: task_of(item[0]))] for part in parts]
    in_order = chain.from_iterable(zip_longest(*by_task, fillvalue=[]))
    return dict(chain.from_iterable(in_order))


def _named(config: Config, run: Run, models: Sequence[str], steps: str | None, console: Console) -> Iterator[Subject]:
    chosen = read_selected(run) if steps == "selected" else None
    if steps == "selected" and chosen is None:
        raise UserError(Fault("--steps", "selected, and nothing was", "a run with a selected.json", f"gist-train select {run}"))
    numbers = [] if steps is None or chosen is not None else _numbers(run, steps)
    for name in models:
        model = on_this_device(load_finished(name, trust_remote_code=config.model.trust_remote_code))
        if config.evaluation.max_length is None and config.model.max_length not in (None, model.max_length):
            both = f"{name} reads {model.max_length:,} tokens of a text, and this run's model {config.model.max_length:,}"
            say(console, f"{both}: with evaluation.max_length all are measured at one length")
        yield name, partial(_of_model, model)
    for step in numbers:
        yield f"step {step}", partial(_of_checkpoint, run, step)
    if chosen is not None:
        yield chosen.name, _of_selected(config, run, chosen)


def _numbers(run: Run, steps: str) -> list[int]:
    """The steps that `--steps` names, each of which has a checkpoint."""
    saved = run.saved_steps()
    if steps != "all" and not all(part.strip().isdecimal() for part in steps.split(",")):
        raise UserError(Fault("--steps", shown(steps), "all, selected, or steps such as 500,1000", "name one of these"))
    if not saved:
        raise no_checkpoint(run)
    numbers = saved if steps == "all" else [int(part) for part in steps.split(",")]
    for step in numbers:
        if step not in saved:
            raise no_such_step(run, step, saved)
    return numbers


def _side_by_side(config: Config, run: Run, console: Console, tuned: str, beside: str | None) -> Iterator[Subject]:
    if beside is not None:
        base = on_this_device(load_student(config.model, training_prompts(config)))
        yield (
            beside + BASE,
            (lambda measuring: measuring.of_step(run, 0, base)) if run.folder.exists() else partial(_of_model, base),
        )
    selected = read_selected(run)
    newest = checkpoint_to_resume(run, None, console) if selected is None else None
    if selected is not None:
        yield tuned, _of_selected(config, run, selected)
    elif newest is not None:
        yield tuned, partial(_of_checkpoint, run, newest.manifest["step"])
    else:
        console.print(f"{run} has no checkpoint yet: no tuned model to evaluate", highlight=False, soft_wrap=True)
    if beside is None:
        return
    for where, guide in config.guides.items():  # "guide", or "guide[0]", "guide[1]"
        if isinstance(guide, GuideConfig):
            yield beside + where, partial(_of_guide, config, load_guide(guide, where))


def _of_model(model: TextModel, measuring: Measuring) -> Scores:
    return values(measuring.of_model(model))


def _of_guide(config: Config, guide: TextModel, measuring: Measuring) -> Scores:
    """Measured once for all runs that share a cache: a guide does not change."""
    kept = Run(cache_folder(config) / "guide-scores")
    kept.folder.mkdir(parents=True, exist_ok=True)
    return measuring.of_step(kept, 0, on_this_device(guide))


def _of_checkpoint(run: Run, step: int, measuring: Measuring) -> Scores | None:
    return measuring.of_checkpoint(run, step)


def _of_selected(config: Config, run: Run, selected: Selected) -> Callable[[Measuring], Scores | None]:
    if selected.averaged:
        return partial(_of_model, on_this_device(load_trained(selected.folder(run), config.model)))
    return partial(_of_checkpoint, run, selected.step)


def watch(config: Config, run: Run, console: Console) -> Iterator[tuple[int, Scores | None]]:
    """Yields (step, scores) of the base model, step 0, and of every checkpoint as it is written; the oldest first.

    Scores are None for a checkpoint that was deleted before its turn came: raise checkpoint.keep_last where that happens. It
    waits for a run that is not there yet, and ends when the training has ended and its last checkpoint is measured.

    Raises:
        UserError: no tasks, their files have faults, or a checkpoint is damaged.
    """
    measuring = Measuring.of_some(config, console)
    done: set[int] = set()
    while True:
        # Asked before the folder is looked at: what was written before the end is seen.
        ended = run.ended.exists()
        saved = run.saved_steps()
        done &= {0, *saved}  # a run that went back takes its later steps anew
        if run.folder.exists() and 0 not in done:
            yield 0, measuring.of_base(run)
            done.add(0)
        for step in saved:
            if step not in done:
                yield step, measuring.of_checkpoint(run, step)
                done.add(step)
        if ended and done >= {0, *run.saved_steps()}:
            return
        time.sleep(POLL_SECONDS)


def watched(config: Config, run: Run, console: Console) -> dict[str, Scores]:
    """Watches to the end, a line a checkpoint on `console`. Returns "base" and "step N" -> scores."""
    console.print(f"waiting for checkpoints in {run}, until its training ends", soft_wrap=True)
    models: dict[str, Scores] = {}
    for step, scores in watch(config, run, console):
        name = f"step {step}" if step else BASE
        if scores is None:
            console.print(f"{name}: deleted before its turn came; a higher checkpoint.keep_last keeps it longer", soft_wrap=True)
            continue
        models[name] = scores
        console.print(scores_line(name, scores, models.get(BASE) if step else None), highlight=False)
    return models


def comparison_table(models: dict[str, Scores]) -> Group:
    """A row per metric, a column per model, in percent; the last column is tuned minus base where both are there.

    Of more models than have room, a table per task, with a row per model.
    """
    keys = [*dict.fromkeys(chain.from_iterable(models.values()))]  # several runs may judge by different tasks
    if len(models) > SIDE_BY_SIDE:
        return Group(*(_of_task(task, models) for task in dict.fromkeys(map(task_of, keys))))
    table = Table(title="scores x 100")
    table.add_column("metric", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    both = {BASE, TUNED} <= models.keys()
    if both:
        table.add_column("tuned - base", justify="right")
    for key in keys:
        cells = [f"{100 * scores[key]:.1f}" if key in scores else "" for scores in models.values()]
        difference = [in_points(models[TUNED][key], models[BASE][key])] if both else []
        table.add_row(key, *cells, *difference)
    return Group(table)


def _of_task(task: str, models: dict[str, Scores]) -> Table:
    table = Table(title=f"{task}, scores x 100")
    table.add_column("model", no_wrap=True)
    judged = {name: scores for name, scores in models.items() if any(task_of(key) == task for key in scores)}
    keys = [key for key in dict.fromkeys(chain.from_iterable(judged.values())) if task_of(key) == task]
    for key in keys:
        table.add_column(metric_of(key), justify="right")
    for name, scores in judged.items():
        table.add_row(name, *(f"{100 * scores[key]:.1f}" if key in scores else "" for key in keys))
    return table
