"""`gist-train report`: what is on the page, and what a browser makes of it.

Legend: a chart is an element of Vega's, one for each title.
"""

import io
import json
import re
import socket
import struct
import time
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from http.client import HTTPConnection
from threading import Event, Thread
from unittest import mock

import pytest
import yaml
from support.browser import opened, parsed
from support.running import QUIET, gist

from gist_train.config.loading import load_config
from gist_train.evaluation.measuring import Measuring
from gist_train.pages.rendering import breakable
from gist_train.reporting.charts import Line, charts_of, lines_of
from gist_train.reporting.figures import MOST_ROWS, figures_of, thinned
from gist_train.reporting.page import _side_by_side, page_of
from gist_train.reporting.serving import server_of
from gist_train.run_folder import Run

pytest.importorskip("vl_convert", reason="vl-convert-python (extra report) is not installed")
pytestmark = pytest.mark.usefixtures("on_cpu")

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture
def run(write_config, write_pairs, quickstart_texts):
    """A finished run of 12 steps, three of which were measured, whose task has a hostile name in the selection's note."""
    evaluation = {**write_pairs(quickstart_texts[:20]), "every": 4}
    path = write_config(evaluation=evaluation, selection={"metric": {"pairs/spearman": 1.0}, "note": HOSTILE})
    assert gist("train", path).code == 0
    assert gist("select", path).code == 0
    return Run.of(load_config(path))


@pytest.fixture
def begun(write_config, write_pairs, quickstart_texts):
    """A run of 2 steps, of which the base alone was measured."""
    training = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
    path = write_config(evaluation={**write_pairs(quickstart_texts[:20]), "every": 0}, training=training)
    assert gist("train", path).code == 0
    run = Run.of(load_config(path))
    Measuring.of(load_config(path), QUIET).of_base(run)
    return run


def test_the_page_of_a_run(run):
    """All that a person asks of it, in one file that asks nobody else."""
    ended = gist("report", run.folder)
    assert ended.code == 0, ended.err
    assert str(run.report) in ended.err.replace("\n", "")
    page = run.report.read_text(encoding="utf-8")
    assert len(page) < 3e6
    found = parsed(page)
    assert set(found.addresses) == {"data:,"}
    assert "img" not in found.tags
    assert found.tags.count("script") == 2
    assert HOSTILE in found.text  # as a text, in the config
    for words in (
        "pairs/spearman",
        "Mean loss",
        "Masked candidates",
        "Learning rate",
        "Scores by step",
        "12 of 12",
        "gist-train",
    ):
        assert words in found.text
    assert f"{figures_of(run).selected.name}, by pairs/spearman" in found.text
    assert "guide:\n  name: " in found.text  # as YAML has it
    assert "revision: null" in found.text
    scores = figures_of(run)
    assert f"{100 * scores.before['pairs/spearman']:.1f}" in found.text
    assert f"{100 * scores.after['pairs/spearman']:.1f}" in found.text


def test_runs_side_by_side(run, write_config):
    other = write_config("other", guide=None, optimizer={"lr": 1e-5})
    assert gist("train", other, "--set", "training.max_steps=4").code == 0
    page = page_of([figures_of(one) for one in (run, Run.of(load_config(other)))])
    text = " ".join(parsed(page).text.split())
    assert "optimizer.lr 0.001 1e-05" in text
    assert "Nothing was measured" in text
    assert '"run"' in page
    assert '"other"' in page
    assert text.index("What differs") < text.index("Scores side by side") < text.index("The training")


def test_each_score_stands_under_its_own_run(run):
    """A run that lacks a score has none, and not its neighbour's; two runs of one name are told apart."""
    whole = figures_of(run)
    key, other = "pairs/spearman", "pairs/pearson"
    runs = [replace(whole, selected=None, scores={4: scores}) for scores in ({key: 0.1, other: 0.2}, {other: 0.3}, {key: 0.9})]
    rows = dict(_side_by_side(runs))
    assert [None if one is None else one.change.after for one in rows[key]] == [0.1, None, 0.9]
    assert [None if one is None else one.change.after for one in rows[other]] == [0.2, 0.3, None]
    page = page_of(runs)
    assert all(f"run ({number})" in page for number in (1, 2, 3))


def test_a_run_of_an_earlier_version_has_a_page(run):
    """Its config lacks later fields, its description what was not said then."""
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    del config["loss"]["mask"], config["distillation"]
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    described = json.loads(run.description.read_text(encoding="utf-8"))
    del described["total_steps"]
    run.description.write_text(json.dumps(described), encoding="utf-8")
    ended = gist("report", run.folder)
    assert ended.code == 0, ended.err


def test_damaged_files_of_a_run_are_faults(begun):
    """A page is asked for where something went wrong, of all places: a traceback names no file, and a row without a step has no
    place in a chart."""

    def refused(file, content):
        before = file.read_bytes()
        file.write_text(content, encoding="utf-8")
        ended = gist("report", begun.folder)
        file.write_bytes(before)
        return ended.code == 2 and file.name in ended.err and not begun.report.exists()

    for content in ("", "[]", "{}", '{"gist_train": "0.1.0", "data": 3}', "\x00"):
        assert refused(begun.description, content), content
    for row in ("{}", '{"loss": 1.5}', '{"step": "4"}', '{"step": NaN}'):
        assert refused(begun.metrics, begun.metrics.read_text(encoding="utf-8") + row + "\n"), row


def test_a_page_of_several_runs_needs_a_name(begun, tmp_path):
    """In the first one's folder it would replace that one's own page."""
    begun.report.write_text("its own", encoding="utf-8")
    refused = gist("report", begun.folder, begun.folder)
    assert (refused.code, "--to" in refused.err) == (2, True)
    assert begun.report.read_text(encoding="utf-8") == "its own"
    assert gist("report", begun.folder, begun.folder, "--to", tmp_path / "both.html").code == 0
    assert begun.report.read_text(encoding="utf-8") == "its own"


def test_the_base_alone_is_compared_with_nothing(begun):
    """Before the first evaluation the page said that the base stayed as it was, as the tuned model."""
    figures = figures_of(begun)
    assert list(figures.scores) == [0]
    assert (figures.chosen_step, figures.after, figures.resampled_after) == (None, {}, {})
    text = parsed(page_of([figures, figures])).text
    assert "tuned" not in text
    assert text.count("Nothing was measured yet but the base model") == 2


def test_a_million_rows_are_few_on_the_page():
    """The means of neighbours: no row is left out, and no step is told that was not there."""
    rows = [{"step": n, "loss": float(n % 7), "note": "text", "off": True} for n in range(1, 100_001)]
    found = thinned(iter(rows))
    assert MOST_ROWS / 2 <= len(found) <= MOST_ROWS + 1
    assert found[-1]["step"] == 100_000
    assert all(row.keys() == {"step", "loss"} for row in found)
    assert sum(row["loss"] for row in found) / len(found) == pytest.approx(3, abs=0.05)
    assert thinned(iter(rows[:5])) == [{"step": float(n), "loss": float(n % 7)} for n in range(1, 6)]


def test_what_is_no_run_is_refused(tmp_path, write_config):
    for target, told in ((tmp_path, "a run folder"), (write_config(), "train first")):
        ended = gist("report", target)
        assert ended.code == 2
        assert told in ended.err


@contextmanager
def followed(*runs):
    """The port of a server of their page, and what it says on stderr."""
    said = io.StringIO()
    with redirect_stderr(said), server_of(runs) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port, said
        finally:
            server.shutdown()


def asked(port, path="/", **headers):
    """Status and body of the answer to a request with these headers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


REFRESH = 'http-equiv="refresh"'


def test_a_run_is_followed_on_this_machine_alone(begun):
    """Under a name of its own that leads here, another site's script could read the texts."""
    begun.ended.unlink()
    with followed(begun) as (port, _):
        assert REFRESH in asked(port)[1]
        assert asked(port, "/config.yaml")[0] == 404
        for host in ("localhost", f"localhost:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
            assert asked(port, Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost:x"):
            status, body = asked(port, Host=host)
            assert (status, "optimizer" in body) == (403, False)


def test_following_goes_on_until_a_run_has_ended(begun, tmp_path):
    """A page that says why there is none is loaded again as well, else it would stand there when there is one."""
    with followed(begun) as (port, _):
        assert REFRESH not in asked(port)[1]
    content = begun.description.read_text(encoding="utf-8")
    begun.description.write_text("", encoding="utf-8")
    with followed(begun, Run(tmp_path / "<b>later")) as (port, _):
        status, body = asked(port)
        assert (status, REFRESH in body, "run.json" in body) == (200, True, True)
        begun.description.write_text(content, encoding="utf-8")
        body = asked(port)[1]
        assert (REFRESH in body, "&lt;b&gt;later" in body, "<b>" in body) == (True, True, False)


def test_a_browser_that_has_gone_is_no_fault(begun, monkeypatch):
    """Closed tabs would fill the terminal with tracebacks."""
    gone = Event()

    def late(*_, **__):
        assert gone.wait(60)
        return "page" * 10_000_000

    monkeypatch.setattr("gist_train.reporting.serving.page_of", late)
    with followed(begun) as (port, said):
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            browser.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            time.sleep(0.2)
        gone.set()
        assert asked(port)[0] == 200
    assert said.getvalue() == ""


def test_a_run_that_has_not_begun_can_be_followed(write_config, monkeypatch, begun):
    """Whoever starts both at once has no folder yet; a file in place of a page is asked for without --follow."""
    monkeypatch.setattr(
        "gist_train.reporting.serving.ThreadingHTTPServer.serve_forever", mock.Mock(side_effect=KeyboardInterrupt)
    )
    ended = gist("report", write_config("later"), "--follow")
    assert (ended.code, "has not begun" in ended.err, "http://127.0.0.1:" in ended.err) == (0, True, True)
    refused = gist("report", begun.folder, "--follow", "--to", "page.html")
    assert (refused.code, "--follow" in refused.err) == (2, True)
    begun.description.write_text("", encoding="utf-8")
    assert gist("report", begun.folder, "--follow").code == 2


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_in_a_browser(run, width, scheme):
    """Charts are drawn, a line tells its values, tables sort by keyboard; no error, no request, nothing wider than the screen."""
    assert gist("report", run.folder).code == 0
    with opened(run.report, width, scheme) as page:
        page.wait_for_selector("#chart-0 svg")
        assert page.locator(".chart svg").count() == page.locator(".chart").count() >= 6
        page.locator("#chart-0").scroll_into_view_if_needed()
        box = page.locator("#chart-0 svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2)
        page.wait_for_selector("#vg-tooltip-element.visible")
        tooltip = page.locator("#vg-tooltip-element")
        assert "step" in tooltip.inner_text()
        assert "undefined" not in tooltip.inner_text()
        assert tooltip.bounding_box()["x"] >= 0
        assert tooltip.bounding_box()["x"] + tooltip.bounding_box()["width"] <= width
        label = page.locator("#chart-0 svg text").first
        soft = page.evaluate("getComputedStyle(document.querySelector('footer')).color")
        assert label.evaluate("text => getComputedStyle(text).fill") == soft
        numbers = page.locator(".card", has=page.locator("#chart-0")).locator("summary")
        numbers.focus()
        page.keyboard.press("Enter")
        assert page.locator("#chart-0-lines td").first.is_visible()
        rows = page.locator("table.sortable").first.locator("tbody tr th")
        before = rows.all_inner_texts()
        button = page.locator("table.sortable thead button").first
        button.focus()
        page.keyboard.press("Enter")
        assert rows.all_inner_texts() == sorted(before)
        page.keyboard.press("Enter")
        assert rows.all_inner_texts() == sorted(before, reverse=True)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "dark")])
def test_numbers_sort_as_numbers(run, tmp_path, width, scheme):
    """As texts, -10 comes before -9 and after "-": whoever sorts by the change reads the wrong rows first."""
    whole = figures_of(run)
    changed = {"a": -0.02, "b": 0.3, "c": -0.1, "d": 0.04}
    bases = {"a": 0.5, "b": 0.25, "c": 0.5625, "d": 0.0625}
    before = {f"{name}/score": base for name, base in bases.items()}
    after = {f"{name}/score": base + changed[name] for name, base in bases.items()} | {"e/score": 0.9}
    figures = replace(whole, selected=None, scores={0: before, 4: after}, resampled_before={}, resampled_after={})
    page_path = tmp_path / "page.html"
    page_path.write_text(page_of([figures, replace(whole, name="other")]), encoding="utf-8")
    with opened(page_path, width, scheme) as page:
        page.wait_for_selector("#chart-0 svg [aria-roledescription='rule mark'][aria-label*='of other']", state="attached")
        table = page.locator("[aria-labelledby=scores] table.sortable").first
        names = table.locator("tbody th")
        for column, ascending in (("base", "edbac"), ("change", "ecadb"), ("tuned", "dcabe")):
            button = table.locator("thead button", has_text=column)
            button.click()
            assert "".join(name[0] for name in names.all_inner_texts()) == ascending
            button.click()
            assert "".join(name[0] for name in names.all_inner_texts()) == ascending[::-1]


def test_a_chart_is_in_numbers_too(run):
    """Who sees no chart reads where its lines begin and end, and what lies between."""
    rows = [{"step": float(10 * n), "loss_mean": loss} for n, loss in enumerate((3.0, 5.0, 1.25, 2.0), start=1)]
    figures = replace(figures_of(run), rows=rows)
    assert lines_of(charts_of([figures])["Mean loss"]) == [Line("mean loss", "3 at 10", "1.25 at 30", "5 at 20", "2 at 40")]
    two = [replace(figures, name="a"), replace(figures, name="b", rows=rows[:2])]
    assert [(line.name, line.last) for line in lines_of(charts_of(two)["Mean loss"])] == [("a", "2 at 40"), ("b", "5 at 20")]
    text = " ".join(parsed(page_of([figures])).text.split())
    assert "mean loss 3 at 10 1.25 at 30 5 at 20 2 at 40" in text


def test_the_chart_library_has_its_licences(begun):
    """A page holds a copy of it, and BSD, ISC and MIT let a copy be handed on only with their text in it."""
    (script,) = re.findall(r"<script>/\*!(.*?)</script>", page_of([figures_of(begun)]), re.DOTALL)
    comment, _, library = script.partition("*/")
    assert len(library) > 500_000
    for words in (
        "University of Washington Interactive Data Lab",
        "Redistributions in binary form must reproduce the above copyright notice",
        'PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"',
        "Mike Bostock",
        "this permission notice appear in all copies",
        "this permission notice shall be included in all copies",
    ):
        assert words in comment


def test_a_name_breaks_where_it_may():
    """A name of 200 characters without a break makes a table wider than a phone; breaks between letters can't be read."""
    assert str(breakable("a_b/<img>.c")) == "a_<wbr>b/<wbr>&lt;img&gt;.<wbr>c"


def test_scripts_end_where_they_end(run):
    """A text that ends the script element would be run as a page."""
    page = page_of([figures_of(run)])
    specs = json.loads(re.search(r"const specs = (.*);\n", page).group(1))
    assert len(specs) >= 6
    assert page.count("</script>") == 2
