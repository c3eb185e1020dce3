"""The page of `gist-train audit`: what is on it, and what a browser makes of it."""

import json
import re

import pytest
from support.browser import opened, parsed
from support.running import gist

from gist_train.auditing.html_page import audit_html
from gist_train.auditing.record import read_audit
from gist_train.config.loading import load_config
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{ 7 * 7 }}"


@pytest.fixture
def audited(write_config, write_rows, triplets):
    """The YAML of a tiny run, audited: rows stand there twice, one text is hostile and so is the task's name, one is dashes."""
    rows = [{**row, "task": f"{row['task']} {HOSTILE}"} for row in triplets]
    rows += [*rows[:9], {"anchor": f"{HOSTILE} {HOSTILE}", "positive": "---", "task": f"a {HOSTILE}"}]
    path = write_config(data={"train": [{"source": "jsonl", "path": str(write_rows("odd.jsonl", rows))}]})
    ended = gist("audit", path, "--margins", "0.2")
    assert ended.code == 0, ended.err
    return path


def test_the_page_of_an_audit(audited):
    """Shares, examples with texts, source and row, what would be masked by task, block and margin: one file that asks nobody."""
    run = Run.of(load_config(audited))
    assert not run.folder.exists()  # `train --resume never` would refuse it
    page = run.audit_page.read_text(encoding="utf-8")
    found, record = parsed(page), json.loads(run.audit.read_text(encoding="utf-8"))
    text = " ".join(found.text.split())
    assert {*found.addresses} == {"data:,"}
    assert "img" not in found.tags
    assert found.tags.count("script") == 1
    empty = record["kinds"]["empty"]
    assert (empty["rows"], empty["worst"][0]["row"]) == (1, 106)
    assert f"{HOSTILE} {HOSTILE}" in text
    assert f"task a {HOSTILE}, {empty['worst'][0]['source']}, row 106" in text
    assert "anchor" in text
    for line in record["masking"] + record["margins"]:
        assert f"{100 * line['masked']:.1f} %" in text
    assert "0 (the config's)" in text
    assert [line["margin"] for line in record["margins"]] == [0.0, 0.2]
    for line in record["margins"]:
        of_margin = [one for one in record["masking"] if one["margin"] == line["margin"]]
        assert sum(one["batches"] for one in of_margin) == line["batches"]
        assert min(one["masked"] for one in of_margin) <= line["masked"] <= max(one["masked"] for one in of_margin)


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_an_audit_in_a_browser(audited, width, scheme):
    """Hostile texts are read, not run; tables sort by keyboard; further examples open by keyboard."""
    with opened(Run.of(load_config(audited)).audit_page, width, scheme) as page:
        rows = page.locator("table.sortable").first.locator("tbody tr th")
        before = rows.all_inner_texts()
        assert len(before) >= 2
        page.locator("table.sortable thead button").first.focus()
        page.keyboard.press("Enter")
        assert rows.all_inner_texts() == sorted(before)
        more = page.locator("details").first
        hidden = more.locator("li").first
        assert not hidden.is_visible()
        more.locator("summary").focus()
        page.keyboard.press("Enter")
        assert hidden.is_visible()
        assert page.locator("dd", has_text="<img src=x").first.is_visible()
        assert page.locator("img").count() == 0


def test_an_audit_of_long_texts_stays_small(audited):
    """A page that a mail refuses is shown to nobody: texts are cut, and it says by how much."""
    record = read_audit(Run.of(load_config(audited)))
    worst = record.kinds["duplicate"].worst[0]
    long = {"anchor": "<" * 100_000, "positives": ['"' * 9000] * 50, "negatives": ["&" * 9000] * 500, "task": "t" * 9000}
    found = record.kinds["duplicate"].model_copy(update={"worst": [type(worst)(**(asdict_of(worst) | long))] * 10})
    tasks = [line.model_copy(update={"task": f"{n} {'<' * 900}"}) for n in range(2000) for line in record.masking[:2]]
    kinds = {f"kind {n}": found for n in range(15)}
    page = audit_html(record.model_copy(update={"kinds": kinds, "masking": tasks}))
    assert len(page.encode()) < 3e6
    text = parsed(page).text
    assert "(99,400 characters more)" in text
    assert "and 498 more" in text
    assert "1,500 tasks more" in text


def asdict_of(suspect):
    return {name: getattr(suspect, name) for name in suspect.__dataclass_fields__}


def test_without_a_guide_the_page_says_so(write_config, tmp_path):
    ended = gist("audit", write_config(guide=None), "--page", tmp_path / "other.html")
    assert ended.code == 0, ended.err
    text = parsed((tmp_path / "other.html").read_text(encoding="utf-8")).text
    assert "no guide's embeddings are stored" in text
    assert "No row is suspect" in text


def test_a_page_goes_into_a_folder_that_is_there(write_config, tmp_path):
    """Found out after an hour of embedding, it would be lost."""
    for to in (tmp_path / "nowhere" / "a.html", tmp_path):
        ended = gist("audit", write_config(), "--page", to)
        assert ended.code == 2
        assert re.match(r"gist-train \S+: audit run\n--page\n", ended.err), ended.err
    assert not (tmp_path / "runs").exists()


def test_a_record_that_was_edited_is_told(audited):
    run = Run.of(load_config(audited))
    run.audit.write_text('{"rows": 0}', encoding="utf-8")
    with pytest.raises(Exception, match="gist-train audit writes"):
        read_audit(run)
