"""A run that has grown for weeks: what is asked at each checkpoint does not read everything again."""

import json
import random

import pytest
from support.running import WHOLE, add_scores

from gist_train.data import files
from gist_train.data.files import lines_from_the_end
from gist_train.evaluation import score_file
from gist_train.evaluation.score_file import read_scores
from gist_train.run_folder import MANIFEST, Run
from gist_train.training.rowfile import _cut


@pytest.mark.parametrize("at_a_time", [1, 7, 1 << 16])
@pytest.mark.parametrize("end", ["", "\n", "torn"])
def test_lines_from_the_end_are_those_from_the_beginning(tmp_path, monkeypatch, at_a_time, end):
    """Wherever a read begins: lines of no sign, of one, and longer than what is read at a time."""
    monkeypatch.setattr(files, "READ_AT_A_TIME", at_a_time)
    draw = random.Random(0)
    for lines in ([], [""], ["a"], ["", "", "b"], ["x" * draw.randrange(30) for _ in range(40)]):
        content = "\n".join(lines) + end
        (tmp_path / "file").write_text(content)
        found = list(lines_from_the_end(tmp_path / "file"))
        expected = content.split("\n")
        assert [line.decode() for _, line in reversed(found)] == expected
        for at, line in found:
            assert content.encode()[at : at + len(line)] == line
            assert at == 0 or content[at - 1] == "\n"


@pytest.mark.parametrize("step", [0, 1, 499, 500, 9000])
@pytest.mark.parametrize("torn", ["", '{"step": 501, "lo', '{"step": 501}'])
def test_a_long_log_is_cut_as_the_obvious_way_cuts_it(tmp_path, monkeypatch, step, torn):
    """All rows read, those up to the step kept; a line that was garbled in the middle stays, and no reader minds it."""
    monkeypatch.setattr(files, "READ_AT_A_TIME", 100)
    lines = [json.dumps({"step": i, "loss": i / 7}) for i in range(1, 501)]
    lines[250] = lines[250][:9] + "\0" * 9
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n" + torn)
    last = _cut(path, step)
    kept = [line for i, line in enumerate(lines, 1) if i <= step]
    whole = torn == '{"step": 501}'
    assert last == (501 if whole else 500)
    assert path.read_text() == "".join(f"{line}\n" for line in [*kept, *([torn] if whole and step > 500 else [])])


def test_scores_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    """Row by row what reading anew gives, also where the file was cut, replaced or torn in between."""
    run, parsed = Run(tmp_path), []
    original = score_file.json_row
    monkeypatch.setattr(score_file, "json_row", lambda line: parsed.append(line) or original(line))

    def scores():
        found = read_scores(run, WHOLE)
        score_file._read_of.cache_clear()
        parsed_before = len(parsed)
        assert read_scores(run, WHOLE) == found
        del parsed[parsed_before:]
        return found

    for step in range(5):
        add_scores(tmp_path, step, {"a/x": step / 10, "b/y": 0.5})
        assert len(read_scores(run, WHOLE)) == step + 1
    assert len(parsed) == 10  # of ten rows
    read_scores(run, WHOLE)
    assert len(parsed) == 10
    with run.evaluations.open("a") as file:
        file.write('{"step": 5, "ta')
    assert list(scores()) == [0, 1, 2, 3, 4]
    add_scores(tmp_path, 6, {"a/x": 0.6})
    assert list(scores()) == [0, 1, 2, 3, 4, 6]
    score_file.cut_scores(run, 2, None)
    assert list(scores()) == [0, 1, 2]
    text = run.evaluations.read_text().replace("0.5", "0.7")
    run.evaluations.write_text(text)
    assert scores()[0] == {"a/x": 0.0, "b/y": 0.7}
    run.evaluations.write_text(text.removesuffix("\n"))  # as an editor may leave it
    assert scores()[2] == {"a/x": 0.2, "b/y": 0.7}
    add_scores(tmp_path, 3, {"a/x": 0.3})
    assert list(scores()) == [0, 1, 2, 3]
    run.evaluations.unlink()
    assert scores() == {}


def test_checkpoints_are_found_as_the_obvious_way_finds_them(tmp_path):
    """Folders with a manifest, by their names; links, files and strays are none."""
    run = Run(tmp_path)
    assert run.saved_steps() == []
    for step in (30, 4, 100):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / MANIFEST).write_text("{}")
    run.checkpoint(7).mkdir()
    run.checkpoint(8).write_text("")
    run.checkpoint(9).symlink_to(run.checkpoint(4))
    (run.checkpoints / "step-12").mkdir()
    (run.checkpoints / "step-12" / MANIFEST).write_text("{}")
    assert run.saved_steps() == [4, 30, 100]
