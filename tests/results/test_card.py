"""The model card: what the hub's own library reads of it, and what a person is told."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.running import add_scores

from gist_train.results.card import Change, card_metadata, model_card
from gist_train.results.example import Example
from gist_train.results.licences import Licence, licence_of, on_hub
from gist_train.results.onnx import Int8Report, OnnxReport
from gist_train.results.selected import Selected
from gist_train.run_folder import Run

COMMIT = "3" * 40
TASKS = [
    {"type": "sts", "name": "stsb", "path": "s.tsv"},
    {"type": "retrieval", "name": "sci_fact", "path": "folder", "split": "dev"},
    {"type": "classification", "name": "b77", "train": "a", "test": "b"},
]
BEFORE = {"stsb/spearman": 0.8, "sci_fact/ndcg@10": 1 / 3, "b77/accuracy": 0.5, "b77/f1": 0.25}
AFTER = {"stsb/spearman": 0.7512, "sci_fact/ndcg@10": 2 / 3, "b77/accuracy": 0.625, "b77/f1": 0.25, "new/mrr@10": 1e-05}


@pytest.fixture
def make_card(tmp_path, monkeypatch):
    """Writes the files of a run folder and returns its card; nothing is trained."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))

    def make(
        *, before=BEFORE, after=AFTER, step=8, name="run", described=None, selected=None, onnx=None, example=None, **sections
    ):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        config = {
            "name": name,
            "model": {"name": "org/base", "revision": None, "layers": None},
            "guide": {"name": "org/guide", "revision": "v1", "pooling": "mean", "prompt": "say: <it>", "dtype": "float16"},
            "data": {"train": [{"source": "hub", "path": "org/triplets"}, {"source": "jsonl", "path": "rows.jsonl"}]},
            "training": {"batch_size": 16, "seed": 42},
            "optimizer": {"lr": 5e-6},
            "schedule": {"type": "linear", "warmup_ratio": 0.1},
            "loss": {"temperature": 0.01},
            "evaluation": {"tasks": TASKS},
            **sections,
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        of_run = {
            "gist_train": "0.1.0",
            "python": "3.11.9",
            "packages": {"torch": "2.13.0"},
            "processes": 1,
            "precision": "bf16",
            "corpus": "c0ffee",
            "total_steps": 100,
            "data": [
                {"name": "org/triplets (en)", "commit": COMMIT, "rows": 12000},
                {"name": "rows.jsonl", "commit": None, "rows": 96},
            ],
        }
        (run / "run.json").write_text(json.dumps({**of_run, **(described or {})}))
        for at, figures in ((0, before), (step, after)):
            add_scores(run, at, figures)
        manifest = {"step": step, "student": ["tokenizer", "cls", True]}
        (run / "README.md").write_text(
            model_card(Run(run), manifest, selected=selected, onnx=onnx, example=example), encoding="utf-8"
        )
        return run / "README.md"

    return make


@pytest.fixture
def in_cache(tmp_path):
    """Puts a README.md into the hub's cache, as a download at a branch or a commit leaves it."""

    def put(kind, name, readme, ref="main", commit="4" * 40):
        folder = tmp_path / "hub-cache" / f"{kind}s--{name.replace('/', '--')}"
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / commit / "README.md").write_text(readme)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)

    return put


def test_the_hubs_library_reads_every_figure_back(make_card):
    """The hub shows what its parser finds: another value, a lost figure or a value x 100 would be shown to everybody."""
    path = make_card()
    data = ModelCard.load(path).data
    found = {(result.dataset_type, result.metric_type): result for result in data.eval_results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("stsb", "spearman_cosine"): 0.7512,
        ("sci_fact", "cosine_ndcg@10"): 2 / 3,
        ("b77", "accuracy"): 0.625,
        ("b77", "f1"): 0.25,
        ("new", "mrr@10"): 1e-05,
    }
    sts, retrieval = found["stsb", "spearman_cosine"], found["sci_fact", "cosine_ndcg@10"]
    assert (sts.task_type, sts.task_name, sts.metric_name) == ("semantic-similarity", "Semantic Similarity", "Spearman Cosine")
    assert (retrieval.task_type, retrieval.dataset_name, retrieval.dataset_split) == ("information-retrieval", "sci fact", "dev")
    assert found["b77", "f1"].task_type == "text-classification"
    assert found["new", "mrr@10"].task_type == "feature-extraction"
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/triplets"]
    assert (data["library_name"], data["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert data["gist_train"] == {"version": "0.1.0", "run": "run", "step": 8, "corpus": "c0ffee"}
    plain = metadata_load(path)
    assert model_index_to_eval_results(plain["model-index"]) == ("run", data.eval_results)
    assert "license" not in plain


def candidate(name, steps, behind, interval, within_noise):
    distance = {"score": 0.5, "loss": None, "behind": behind, "interval": interval, "within_noise": within_noise}
    return {"name": name, "steps": steps, "base_weight": 0.0, "figures": {}, **distance}


def test_the_card_tells_how_the_model_was_chosen(make_card):
    """A mean of checkpoints has no step: its own figures stand there, not those of its newest, and what it is made of. Of a
    runner-up within noise the card says so."""
    content = {
        "step": 8,
        "steps": [4, 8],
        "base_weight": 0.25,
        "checkpoint": "averaged",
        "around": None,
        "window": None,
        "name": "mean of steps 4, 8, 0.25 of base",
        "metric": {"stsb/spearman": 1.0, "b77/accuracy": 2.0},
        "rule": "metric",
        "evaluation": {"tasks": TASKS, "max_length": None, "truncate_dim": None},
        "leakage": [],
        "figures": {"stsb/spearman": 0.9, "b77/accuracy": 0.4},
        "base": {"stsb/spearman": 0.8, "b77/accuracy": 0.5},
        "candidates": [
            candidate("mean of steps 4, 8, 0.25 of base", [4, 8], None, None, None),
            candidate("step 8", [8], 0.0123, [-0.001, 0.02], True),
            candidate("step 4", [4], 0.05, [0.01, 0.09], False),
            candidate("step 2", [2], 0.06, None, None),
        ],
    }
    selected = Selected.model_validate(content)
    card = make_card(selected=selected).read_text(encoding="utf-8")
    assert "Chosen by the mean of stsb/spearman (weight 1), b77/accuracy (weight 2), of 4 candidates" in card
    assert "0.75 times the mean of the checkpoints at steps 4, 8 and 0.25 times the base model's." in card
    assert "- step 8: 0.0123 behind, -0.0010 to 0.0200 in 95 % of resamples of the tasks' items: within noise\n" in card
    assert "- step 4: 0.0500 behind, 0.0100 to 0.0900 in 95 % of resamples of the tasks' items\n" in card
    assert "- step 2: 0.0600 behind\n" in card
    assert "| stsb/spearman | 0.8000 | 0.9000 | +0.1000 |" in card
    assert "| b77/accuracy | 0.5000 | 0.4000 | -0.1000 |" in card
    assert "## Selection" not in make_card().read_text(encoding="utf-8")


def test_a_card_shows_no_path_of_this_machine(make_card, tmp_path):
    """Everybody reads it. What is left of a path may look like a repository of somebody else's: it must not become the base
    model, nor give its licence."""
    base = tmp_path / "secret" / "my-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    model = {"name": str(base), "revision": None, "layers": None}
    guide = {"name": str(base), "revision": None, "pooling": None, "prompt": None, "dtype": "float16"}
    path = make_card(model=model, guide=guide)
    shown = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in shown
    assert "Fine-tuned from `my-base`" in shown
    data = ModelCard.load(path).data
    assert data["base_model"] is None
    assert data["license"] == "mit"


def test_a_card_shows_no_path_within_a_text(make_card):
    """A tracker's address, a note and a file of data say who trained it, as a model's folder does."""
    path = make_card(
        output_dir="/home/alice/runs",
        cache_dir="../alice-cache",
        tracking={"mlflow": {"tracking_uri": "sqlite:////home/alice/x.db"}, "tensorboard": {"folder": "boards/alice"}},
        selection={
            "note": "as /home/alice/notes/why.txt says (see file:///home/alice/x.md or https://example.com/a/b), and/or so",
        },
        data={"train": [{"source": "hub", "path": "org/triplets"}, {"source": "jsonl", "path": "/home/alice/mine/rows.jsonl"}]},
        evaluation={"tasks": [{"type": "sts", "name": "stsb", "path": "/home/alice/s.tsv"}]},
    )
    shown = path.read_text(encoding="utf-8")
    assert "alice" not in shown
    note = "note: as why.txt says (see file://x.md or https://example.com/a/b), and/or so"
    assert note in " ".join(shown.split())
    assert "path: org/triplets" in shown
    assert "path: rows.jsonl" in shown
    assert "tracking:" not in shown
    assert "paths shortened" in shown


def test_the_card_tells_what_leaked(make_card):
    """A figure on texts that were trained on is no figure; a task that was not looked at is not acquitted."""
    leakage = [{"task": "stsb", "part": "pairs", "texts": 2908, "shared": 12, "rows": 40}]
    card = make_card(described={"leakage": leakage}).read_text(encoding="utf-8")
    assert "| stsb | pairs | 2,908 | 12 | 40 |" in card
    assert "| sci_fact | not checked | | | |" in card
    assert "stand in training rows" not in make_card(evaluation={"tasks": []}).read_text(encoding="utf-8")


def test_the_card_tells_of_onnx_and_dimensions(make_card):
    """Who takes the 8-bit file, or the first 64 numbers, must know what that costs and how to use them."""
    int8 = Int8Report(23_000_000, {"stsb/spearman": (0.75, 0.7425)}, 0.97, 0.99)
    loss = {"temperature": 0.01, "dimensions": [32, 16]}
    card = make_card(onnx=OnnxReport(1.9e-7, 90_400_000, int8), loss=loss).read_text(encoding="utf-8")
    assert "(`onnx/model.onnx`, 90.4 MB) embeddings differ from torch's by 1.9e-07 at most." in card
    assert "| stsb/spearman | 0.7500 | 0.7425 | -0.0075 |" in card
    assert "| lowest cosine with float32 | 1 | 0.9700 | |" in card
    assert "over the first 32, 16 dimensions of an embedding" in card
    plain = make_card(onnx=OnnxReport(1.9e-7, 90_400_000, None)).read_text(encoding="utf-8")
    assert "8 bits" not in plain
    assert "dimensions of an embedding" not in plain


def test_figures_are_named_as_sentence_transformers_names_them(make_card, make_model):
    """Figures of one task from two tools stand side by side on the hub only where both call them the same."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, InformationRetrievalEvaluator

    model = SentenceTransformer(str(make_model()), device="cpu")
    texts = ["one", "two", "three"]
    judged = {"q": {"d"}}
    InformationRetrievalEvaluator({"q": "one"}, {"d": "two", "e": "three"}, judged, name="sci_fact", write_csv=False)(model)
    EmbeddingSimilarityEvaluator(texts, texts[::-1], [0.1, 0.9, 0.2], name="stsb", write_csv=False)(model)
    results = model.model_card_data.format_eval_metrics()["model-index"][0]["results"]
    theirs = {
        (*result["task"].values(), *result["dataset"].values(), metric["type"], metric["name"])
        for result in results
        for metric in result["metrics"]
    }
    assert len(theirs) > 10
    for result in ModelCard.load(make_card()).data.eval_results:
        if result.dataset_type in ("stsb", "sci_fact"):
            named = (result.task_type, result.task_name, result.dataset_name, result.dataset_type)
            assert (*named, result.metric_type, result.metric_name) in theirs


@pytest.mark.parametrize("name", ["1e3", "no", "2024-11-24", "a.b_c-d"])
def test_names_stay_texts(make_card, in_cache, name):
    """A template would write a number, a boolean, a date or broken YAML where a YAML library writes a quoted text."""
    licence = {"license": "other", "license_name": "mine: \"all\" 'yours' # no\n- comment"}
    in_cache("model", "org/base", f"---\n{yaml.safe_dump(licence)}---\ntext")
    path = make_card(name=name)
    data = ModelCard.load(path).data
    assert data.model_name == name
    assert data["gist_train"]["run"] == name
    assert data["license"] == "other"
    assert data["license_name"] == licence["license_name"]
    assert metadata_load(path)["model-index"][0]["name"] == name


def test_a_card_without_figures_has_no_model_index(make_card):
    """An empty model index is refused by the hub's parser."""
    plain = metadata_load(make_card(after={}))
    assert "model-index" not in plain
    assert "metrics" not in plain


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (BEFORE, AFTER, "2 of 5 scores rose, 1 fell, 1 stayed the same, 1 was not measured before training. The largest fall: "),
        ({"a/x": 0.1}, {"a/x": 0.2}, "1 of 1 scores rose, 0 fell."),
        (
            {"a/x": 0.2, "b/x": 0.9},
            {"a/x": 0.1, "b/x": 0.6},
            "0 of 2 scores rose, 2 fell. The largest fall: b/x, from 0.9000 to 0.6000.",
        ),
        ({"a/x": 0.20001}, {"a/x": 0.20002}, "0 of 1 scores rose, 0 fell, 1 stayed the same."),
        ({}, {"a/x": 0.2, "b/x": 0.1}, "0 of 2 scores rose, 0 fell, 2 were not measured before training."),
    ],
)
def test_rises_and_falls_are_counted(make_card, before, after, line):
    """A summary that leaves the falls out, or counts what no reader can see, is an advertisement."""
    text = make_card(before=before, after=after).read_text()
    told = [line for line in text.splitlines() if "scores rose" in line]
    assert [found.startswith(line) for found in told] == [True]
    assert len([found for found in text.splitlines() if found.startswith("| ") and "/" in found]) == len(after)


def test_differences_are_those_of_the_table():
    """0.00005 and 0.00014 differ by 0.0001 or by 0 in the table's four digits: the count must agree with what stands there."""
    assert Change("a/x", 0.20004, 0.20006).difference == pytest.approx(1e-4)
    assert Change("a/x", 0.20001, 0.20004).difference == 0
    assert Change("a/x", None, 0.2).difference is None


def test_licences_come_from_the_parts_own_cards(make_card, in_cache):
    """Each part's licence is what its README.md says at the revision that was read; nothing is made up for the others."""
    in_cache("model", "org/base", "---\nlicense: mit\n---\n# base")
    in_cache("model", "org/guide", "---\nlicense: [apache-2.0, cc-by-4.0]\n---\n# guide", ref="v1")
    in_cache("model", "org/guide", "---\nlicense: gpl\n---\n# another revision", ref="main", commit="5" * 40)
    in_cache("dataset", "org/triplets", "---\nlicense: cc-by-nc-4.0\n---\n# data", commit=COMMIT)
    in_cache("dataset", "rows.jsonl", "---\nlicense: mit\n---\n# somebody else's data, called like our file")
    path = make_card()
    text = path.read_text()
    assert metadata_load(path)["license"] == "mit"
    assert "- base model `org/base`: mit\n" in text
    assert "- guide `org/guide`: apache-2.0, cc-by-4.0\n" in text
    assert "- data org/triplets (en): cc-by-nc-4.0\n" in text
    assert "- data rows.jsonl: not known to gist-train: state it before you publish\n" in text
    assert "may restrict this model further" in text


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: mit\n---\n", Licence("mit", None)),
        ("---\nlicense: other\nlicense_name: mine\n---\n", Licence("other", "mine")),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nlicense: []\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: {broken\n---\n", None),
        ("# no front matter\nlicense: mit", None),
        (b"\xff\xfe\x00", None),
        (None, None),
    ],
)
def test_a_folders_licence(tmp_path, readme, found):
    """Front matter is written by hand: what can't be read is not known, and no reason to fail an export."""
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert licence_of(str(tmp_path), None) == found


def test_names_of_this_machine_are_no_ids(tmp_path, monkeypatch):
    """A folder that looks like an id of the hub's would be linked to somebody else's model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert on_hub("org/base")
    assert [name for name in ("models/mine", str(tmp_path), "~/model", "./model", "a/b/c", "rows/*.jsonl") if on_hub(name)] == []
    config = {"name": "run", "model": {"name": "models/mine"}, "evaluation": {"tasks": []}}
    data = card_metadata(config, [({"path": "models/mine"}, {"commit": None})], [], None).to_dict()
    assert not data.keys() & {"base_model", "base_model_relation", "datasets", "license"}


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (8, "inside the warm-up: step 8 of its 10, in a schedule of 100 steps; the learning rate had risen to 4e-06"),
        (10, "after the warm-up of 10 steps, in a schedule of 100; the learning rate was 5e-06"),
        (55, "after the warm-up of 10 steps, in a schedule of 100; the learning rate was 2.5e-06"),
    ],
)
def test_the_place_in_the_schedule_is_told(make_card, step, line):
    """GIST-small was taken from inside its warm-up: who makes it again must know that the rate was still rising."""
    assert f"- this checkpoint is {line}\n" in make_card(step=step).read_text()


def test_a_run_that_tells_no_total_says_nothing_of_it(make_card):
    """run.json of an older version: no total, so no warm-up to speak of; all else stands."""
    path = make_card()
    described = json.loads((path.parent / "run.json").read_text())
    del described["total_steps"]
    for origin in described["data"]:
        del origin["rows"]
    (path.parent / "run.json").write_text(json.dumps(described))
    text = model_card(Run(path.parent), {"step": 8, "student": ["tokenizer", "mean", False]})
    assert "this checkpoint is" not in text
    assert f"- org/triplets (en) (hub, commit {COMMIT})\n" in text
    assert "Pooling: mean. The embeddings are not normalised" in text


def test_a_person_is_told_what_it_is_made_of(make_card):
    """Guide, data and software: what one needs to judge the model or to make it again."""
    text = make_card().read_text()
    assert "Pooling: cls. The embeddings are normalised to length 1." in text
    assert '- guide `org/guide`, revision v1, pooling mean, prompt `"say: <it>"`, store float16' in text
    assert f"- org/triplets (en) (hub, commit {COMMIT}, 12,000 rows)\n" in text
    assert "- rows.jsonl (jsonl, 96 rows)\n" in text
    assert "gist-train 0.1.0, Python 3.11.9, torch 2.13.0" in text
    assert "`c0ffee`" in text


def test_the_card_shows_rows_of_the_data(make_card):
    """Whoever looks for a model must see what texts it was made for; a text of theirs is no Markdown."""
    rows = [
        {"task": "faq", "anchor": "a | <b>", "positive": "`two`", "negative": "no"},
        {"task": "t", "anchor": "x", "positive": "y"},
    ]
    text = make_card(described={"examples": rows}).read_text()
    assert "| faq | `a \\| <b>` | `` `two` `` | `no` |\n| t | `x` | `y` |  |\n" in text


def test_the_card_says_prompts_in_words(make_card):
    """A model that was trained with prompts is a worse one without them."""
    example = Example('model = SentenceTransformer("me/model")', "tensor([[0.5]])", {"query": "query: ", "document": "passage: "})
    text = make_card(example=example).read_text()
    assert 'Before a query the model expects `"query: "`.\nBefore a document the model expects `"passage: "`.\n' in text
    assert "```text\ntensor([[0.5]])\n```" in text
    assert "without a prompt" in make_card(example=Example("code", None, {})).read_text()


@pytest.mark.parametrize(
    ("changed", "cited"),
    [
        ({"guide": None}, set()),
        ({}, {"2402.16829"}),
        ({"loss": {"temperature": 0.01, "dimensions": [16], "hardness": 5.0}}, {"2402.16829", "2205.13147", "2503.04812"}),
        ({"distillation": {"weight": 2.0}}, {"2402.16829", "1503.02531"}),
        ({"training": {"batch_size": 16, "seed": 42, "max_tokens_per_forward": 512}}, {"2402.16829", "2101.06983"}),
    ],
)
def test_those_whose_work_was_used_are_cited(make_card, changed, cited):
    """A paper writer copies what stands there: who is left out is not cited, who was not used should not be."""
    text = make_card(**changed).read_text()
    assert {*re.findall(r"eprint = {([\d.]+)}", text)} == {"1908.10084", *cited}
