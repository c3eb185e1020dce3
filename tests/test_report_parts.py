"""What a report says beyond curves: intervals of scores, masked candidates by task, a similarity map, an audit's rows.

Legend: N texts of a map.
"""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from support.browser import opened, parsed
from support.running import copied, gist

from gist_train.config.loading import load_config
from gist_train.data.corpus import Corpus
from gist_train.evaluation.clustering import LoadedClustering
from gist_train.evaluation.pairs import LoadedPairs
from gist_train.evaluation.retrieval import LoadedRetrieval
from gist_train.evaluation.sts import LoadedSts
from gist_train.evaluation.triplets import LoadedTriplets
from gist_train.model.loss import BLOCKS
from gist_train.reporting import similarity
from gist_train.reporting.charts import MOST_STEPS, charts_of, lines_of
from gist_train.reporting.figures import figures_of
from gist_train.reporting.page import _against_base, _side_by_side, page_of
from gist_train.reporting.similarity import NoMap, SimilarityMap, drawn, similarity_map
from gist_train.results.ranking import RESAMPLES, SEED
from gist_train.run_folder import Run

pytest.importorskip("vl_convert", reason="vl-convert-python (extra report) is not installed")
pytestmark = pytest.mark.usefixtures("on_cpu")
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
KEY = "pairs/spearman"


@pytest.fixture
def yaml_path(write_config, write_rows, write_pairs, quickstart_texts, triplets):
    """A run of 12 steps, measured at each 4th on pairs of which one with a high score is hostile, as a row's anchor is."""
    texts = [HOSTILE if number == 4 else text for number, text in enumerate(quickstart_texts[:500:10])]
    evaluation = {**write_pairs(texts), "every": 4}
    rows = [*triplets, {"anchor": f"{HOSTILE} {HOSTILE}", "positive": "---", "task": "a"}]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("odd.jsonl", rows))}]}
    tracking = {"log_every": 1, "log_rows": True}
    return write_config(evaluation=evaluation, data=data, tracking=tracking, selection={"metric": {KEY: 1.0}})


@pytest.fixture
def run(yaml_path):
    """It, audited, trained and selected."""
    for command in ("audit", "train", "select"):
        ended = gist(command, yaml_path)
        assert ended.code == 0, ended.err
    return Run.of(load_config(yaml_path))


def resampled_by_hand(*items):
    """(S, models) Spearman of each model's items over the same draws, in a plain loop."""
    generator = np.random.default_rng([SEED, *b"pairs"])
    draws = [generator.integers(len(items[0]), size=len(items[0])) for _ in range(RESAMPLES)]
    return np.array([[spearmanr(of_model[draw][:, 0], of_model[draw][:, 1]).statistic for of_model in items] for draw in draws])


def items_of(run, step):
    return load_file(run.items(step, "pairs", None, None))["spearman"]


def test_a_change_has_the_interval_of_its_items(run):
    """Resampled apart, base and tuned model would differ by the luck of two draws: no change would ever be certain."""
    figures = figures_of(run)
    scored = next(one for one in _against_base(figures) if one.change.key == KEY)
    samples = resampled_by_hand(items_of(run, figures.selected.step), items_of(run, 0))
    expected = np.quantile(samples[:, 0] - samples[:, 1], [0.025, 0.975])
    assert (scored.distance.low, scored.distance.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert scored.distance.behind == pytest.approx(figures.after[KEY] - figures.before[KEY], abs=1e-4)
    low, high = np.quantile(samples[:, 0], [0.025, 0.975])
    bars = [layer for layer in charts_of([figures])["Scores by step"]["layer"] if "errorbar" in str(layer["mark"])]
    assert len({layer["mark"]["rule"]["xOffset"] for layer in bars}) == len(bars)  # side by side
    (bar,) = [value for layer in bars for value in layer["data"]["values"] if value["series"] == KEY]
    assert bar["step"] == figures.selected.step
    assert (bar["low"], bar["high"]) == pytest.approx((100 * low, 100 * high), abs=1e-9)
    text = " ".join(parsed(page_of([figures])).text.split())
    line = next(line for line in lines_of(charts_of([figures])["Scores by step"]) if line.name == KEY)
    assert line.within == f"{100 * low:.1f} to {100 * high:.1f} at {figures.selected.step}"  # for those who see no bar
    assert f"{line.last} {line.within}" in text
    assert f"{100 * expected[0]:+.2f} to {100 * expected[1]:+.2f}" in text
    assert ("within noise" in text) == any(one.distance.within_noise for one in _against_base(figures))


def test_two_runs_have_paired_intervals(run):
    """Of the same items alone: another file of the same name is another task, and its difference says nothing."""
    first, second = figures_of(run), figures_of(Run(copied(run.folder, "second")))
    second = replace(second, selected=None, scores={step: second.scores[step] for step in (0, 4)})
    shutil.rmtree(run.folder.with_name("second") / "checkpoints")
    second = replace(second, resampled_after=resampled_at(run, 4, second))
    compared = dict(_side_by_side([first, second]))[KEY][1]
    samples = resampled_by_hand(items_of(run, 4), items_of(run, first.selected.step))
    expected = np.quantile(samples[:, 0] - samples[:, 1], [0.025, 0.975])
    assert (compared.distance.low, compared.distance.high) == pytest.approx(tuple(expected), abs=1e-12)
    other = replace(second, contents={"pairs": "another"})
    assert not dict(_side_by_side([first, other]))[KEY][1].comparable
    assert "other texts or terms" in parsed(page_of([first, other])).text
    assert "other texts or terms" not in parsed(page_of([first, second])).text


def resampled_at(run, step, figures):
    from gist_train.reporting.noise import resampled

    return resampled(run, step, figures.scores[step], figures.terms, figures.contents)


def test_masked_candidates_are_told_by_task(run):
    """Which task a guide masks much of is what a margin is chosen by; a mean over all of them hides it."""
    (folder,) = (one for one in (run.folder.parent / ".cache" / "corpora").iterdir() if one.name[0] != ".")
    corpus, expected = Corpus(folder), {}
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    of_steps = {one["step"]: one["rows"] for one in map(json.loads, run.rows.read_text(encoding="utf-8").splitlines())}
    for row in rows:
        tasks = {corpus.tasks[int(corpus.task[number])] for number in of_steps[row["step"]]}
        name = tasks.pop() if len(tasks) == 1 else None
        assert row["task"] == name
        expected.setdefault(name, []).append(row["masked_pp"])
    found = figures_of(run).masked
    assert {task: one.steps for task, one in found.items()} == {task: len(values) for task, values in expected.items()}
    assert {task: one.share("pp") for task, one in found.items()} == pytest.approx(
        {task: np.mean(values) for task, values in expected.items()}
    )
    assert len(expected) >= 2
    assert "Masked candidates by task" in parsed(page_of([figures_of(run)])).text


def test_rows_of_earlier_versions_name_no_task(run):
    """Their page has no such table, and no row of a task without a name."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    run.metrics.write_text("".join(json.dumps({**line, "task": ["a"]}) + "\n" for line in lines[:6]), encoding="utf-8")
    with run.metrics.open("a", encoding="utf-8") as file:
        for line in lines[6:]:
            del line["task"]
            file.write(json.dumps(line) + "\n")
    assert figures_of(run).masked == {}
    assert "Masked candidates by task" not in parsed(page_of([figures_of(run)])).text


def test_a_map_has_the_cosines_of_both_models(run, make_model):
    """A map of another checkpoint, or of texts in another order, would look as convincing."""
    found = similarity_map(run)
    assert isinstance(found, SimilarityMap), found
    assert len(found.texts) == 20 == len(found.groups)
    assert HOSTILE in found.texts
    selected = figures_of(run).selected
    for cosines, folder in ((found.before, make_model()), (found.after, selected.folder(run))):
        vectors = SentenceTransformer(str(folder), device="cpu").encode(found.texts, normalize_embeddings=True)
        np.testing.assert_allclose(cosines, vectors @ vectors.T, atol=1e-5)
    together = [found.before[i, j] for i in range(20) for j in range(20) if i != j and found.groups[i] == found.groups[j]]
    apart = [found.before[i, j] for i in range(20) for j in range(20) if found.groups[i] != found.groups[j]]
    assert found.mean(found.before, together=True) == pytest.approx(np.mean(together))
    assert found.mean(found.before, together=False) == pytest.approx(np.mean(apart))
    assert len(together) == 20


def test_where_there_is_no_map_it_says_why(run, monkeypatch, tmp_path):
    """A page must not fail, ask a hub or run a stranger's code for a picture."""

    def why(**sections):
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        other = Run(copied(run.folder, "other"))
        other.config.write_text(yaml.safe_dump(config | sections), encoding="utf-8")
        found = similarity_map(other)
        shutil.rmtree(other.folder)
        assert isinstance(found, NoMap)
        return found.reason

    model = yaml.safe_load(run.config.read_text(encoding="utf-8"))["model"]
    assert why(model={**model, "name": "nobody/has-this"}) == "nobody/has-this is not on this machine"
    assert "code of its own" in why(model={**model, "trust_remote_code": True})
    assert "no task" in why(evaluation={"tasks": [], "every": 0}, selection={})
    gone = {"type": "sts", "name": "pairs", "path": str(tmp_path / "gone.tsv")}
    assert "gone.tsv" in why(evaluation={"tasks": [gone]})
    monkeypatch.setattr(similarity, "LARGEST_TASK", 10)
    assert "no task" in why()
    monkeypatch.setattr(similarity, "LARGEST_MODEL", 10)
    assert "GB of weights" in why()
    shutil.rmtree(run.checkpoints)
    run.selected.unlink()
    assert similarity_map(run) == NoMap("the run has no checkpoint")
    assert "Not drawn: the run has no checkpoint." in parsed(page_of([figures_of(run)], [similarity_map(run)])).text


def test_held_out_rows_are_shown_first(write_config, write_pairs, quickstart_texts):
    """They are the user's own texts."""
    evaluation = {**write_pairs(quickstart_texts[:20]), "held_out": 12}
    path = write_config(evaluation=evaluation, training={"batch_size": 8, "max_steps": 1, "precision": "float32"})
    assert gist("train", path).code == 0
    run = Run.of(load_config(path))
    found = similarity_map(run)
    assert isinstance(found, SimilarityMap), found
    held = (run.held_out / "rows.jsonl").read_text(encoding="utf-8")
    assert found.task == "held_out"
    assert all(json.dumps(text)[1:-1] in held for text in found.texts)


TEXTS = tuple(f"text {n}" for n in range(40))
OTHERS = tuple(f"other {n}" for n in range(40))


@pytest.mark.parametrize(
    ("task", "groups"),
    [
        (LoadedSts("t", TEXTS, OTHERS, np.arange(40) % 20 / 4.0), [(TEXTS[n], OTHERS[n]) for n in (18, 19, 38, 39)]),
        (LoadedPairs("t", TEXTS, OTHERS, np.arange(40) % 20 == 3), [(TEXTS[n], OTHERS[n]) for n in (3, 23)]),
        (LoadedTriplets("t", TEXTS[:3], OTHERS[:3], TEXTS[3:6]), [(TEXTS[n], OTHERS[n]) for n in range(3)]),
        (
            LoadedRetrieval("t", TEXTS[:3], OTHERS[:5], judgements=({1: 1.0, 2: 3.0, 9: 5.0}, {9: 1.0}, {0: 1.0})),
            [(TEXTS[0], OTHERS[2]), (TEXTS[2], OTHERS[0])],
        ),
        (LoadedClustering("t", TEXTS, np.arange(40) % 8), [TEXTS[n::8] for n in (0, 2, 4, 7)]),
        (LoadedClustering("t", TEXTS[:5], np.array([0, 0, 1, 0, 1])), [[TEXTS[n] for n in (0, 1, 3)]]),
    ],
)
def test_texts_that_belong_together_are_drawn(task, groups):
    """Groups of texts that have nothing to do with each other would make any map look wrong."""
    found = drawn(task)[1]
    assert [tuple(group) for group in found] == [tuple(group) for group in groups]


def test_an_audit_is_shown_and_where_it_is_from(run, yaml_path):
    """Rows that were looked at in other data are said to be so."""
    text = " ".join(parsed(page_of([figures_of(run)])).text.split())
    assert f"{HOSTILE} {HOSTILE}" in text
    assert "by run-audit.json beside the run's folder" in text
    assert "other data" not in text
    record = json.loads(run.audit.read_text(encoding="utf-8"))
    record["sources"][0]["path"] = "elsewhere.jsonl"
    run.audit.write_text(json.dumps(record), encoding="utf-8")
    assert "of other data than this run's" in parsed(page_of([figures_of(run)])).text
    run.audit.unlink()
    assert "Not looked for" in parsed(page_of([figures_of(run)])).text
    run.audit.write_text("{}", encoding="utf-8")
    ended = gist("report", yaml_path)
    assert ended.code == 2
    assert "gist-train audit" in ended.err


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), pytest.param(1200, "dark", marks=pytest.mark.slow)])
def test_maps_and_examples_in_a_browser(run, width, scheme):
    """Hostile texts in a tooltip of the map, in its list and among bad rows are read, not run."""
    assert gist("report", run.folder).code == 0
    with opened(run.report, width, scheme) as page:
        for side in ("before", "after"):
            page.wait_for_selector(f"#map-0-{side} svg")
            assert page.locator(f"#map-0-{side} svg [aria-roledescription='rect mark']").count() == 400
        hostile = page.locator("#map-0-after svg [aria-roledescription='rect mark'][aria-label*='img src=x']").first
        hostile.scroll_into_view_if_needed()
        hostile.hover()
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert "<img src=x" in page.inner_text("#vg-tooltip-element")
        for words in ("the texts", "the worst of each kind"):
            page.locator("summary", has_text=words).first.focus()
            page.keyboard.press("Enter")
        assert page.locator("li", has_text="<img src=x").first.is_visible()
        shown = page.locator("dd", has_text="<img src=x").locator("visible=true")  # the next ones of a kind are folded still
        assert shown.count() > 0
        assert page.locator("img").count() == 0


def test_a_million_steps_and_many_runs_stay_small(run):
    """A row every 50 steps, an evaluation every 500, eight runs: a page that can be sent around, with the selected step in it."""
    figures = figures_of(run)
    steps = range(500, 1_000_001, 500)
    scores = {step: {f"task {n}/score": 0.123456789 * n / (1 + step) for n in range(10)} for step in (0, *steps)}
    rows = [{**figures.rows[0], "step": float(step), "lr": 1 / step, "loss_mean": 1 / 7 / step} for step in range(50, 20_050, 50)]
    selected = figures.selected.model_copy(update={"step": 7_500})
    long = replace(figures, rows=rows, scores=scores, selected=selected)
    assert len(page_of([long]).encode()) < 3e6
    assert len(page_of([long] * 8).encode()) < 3e6
    spec = charts_of([long])["Scores by step"]
    shown = {value["step"] for value in spec["data"]["values"]}
    assert {0, 7_500, 1_000_000} <= shown
    assert len(shown) <= MOST_STEPS + 1
    assert spec["data"]["values"][0].keys() == {"step", "value", "series"}


def test_many_tasks_and_runs_can_be_told_apart(run):
    """56 lines of ten colours say nothing; two runs' lines of one task have one colour, and other dashes."""
    figures = figures_of(run)
    many = {f"task{n}/score": n / 100 for n in range(56)} | {KEY: 0.5}
    selected = figures.selected
    assert selected.metric == {KEY: 1.0}
    spec = charts_of([replace(figures, scores={0: many, 12: many})])["Scores by step, 10 of 57 tasks"]
    lines = {value["series"] for value in spec["data"]["values"]}
    assert len(lines) == 10
    assert KEY in lines  # by which the step was selected
    two = charts_of([replace(figures, name="a"), replace(figures, name="b")])
    values = two["Masked candidates"]["data"]["values"]
    assert {(value["series"], value["run"]) for value in values} == {(block, name) for block in BLOCKS for name in "ab"}
    assert two["Masked candidates"]["layer"][0]["encoding"]["strokeDash"]["field"] == "run"
    assert {value["series"] for value in two["Mean loss"]["data"]["values"]} == {"a", "b"}
    for title, told in (("Mean loss", ("color", "series")), ("Masked candidates", ("strokeDash", "run"))):
        rules = two[title]["layer"][-1]
        assert [one[told[1]] for one in rules["data"]["values"]] == ["a", "b"]
        assert rules["encoding"][told[0]]["field"] == told[1]
        assert rules["data"]["values"][1]["what"] == f"{selected.name} of b"
    assert two["Learning rate"]["layer"][0]["data"]["values"] == [{"from": 0, "to": 2}]


def test_the_warm_up_is_in_the_chart(run):
    """12 steps, a tenth of them rounded up."""
    layer = charts_of([figures_of(run)])["Learning rate"]["layer"][0]
    assert layer["data"]["values"] == [{"from": 0, "to": 2}]


def test_a_page_that_is_followed_has_no_map(run):
    """Two models would be loaded each time that a browser asks."""
    page = page_of([figures_of(run)], refresh=15)
    assert "gist-train report without --follow draws it" in parsed(page).text
    assert [key for key in json.loads(re.search(r"const specs = (.*);\n", page).group(1)) if key.startswith("map")] == []
