"""Passwords and tokens: in no message, no file, no card, not on W&B's page and not in what `ps` shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.running import gist

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config, resolved_yaml
from gist_train.config.schema import mathematics
from gist_train.config.secrets import hidden, without_secrets

HEX = "0123456789abcdef0123456789abcdef01234567"
KINDS = {
    "user info": ("https://anna:Sesame1@host/part", ["anna", "Sesame1"]),
    "user info, one slash": ("https:/anna:Sesame1@host/part", ["anna", "Sesame1"]),
    "user info with a slash": ("s3://anna:Ses/ame1Mellon@host/part", ["anna", "ame1Mellon"]),
    "a user alone": ("ftp://Sesame1@host/part", ["Sesame1"]),
    "a token of the hub": ("data/hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567/part", ["hf_", "AbCdEfGh"]),
    "a key of W&B": ("wandb/key-" + HEX, [HEX]),
    "a newer key of W&B": ("wandb_v1_AbCdEfGhIjKlMnOpQrStUvWx", ["AbCdEfGh"]),
    "a key's name of AWS": ("AKIAIOSFODNN7EXAMPLE", ["AKIAIOSF"]),
    "a key of AWS": ("aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYKEY", ["wJalr", "K7MDENG", "bPx", "bPxRfiCY"]),
    "a password by name": ("data/password=Sesame1", ["Sesame1"]),
    "a token in a query": ("https://host/part?token=Sesame1&page=2", ["Sesame1"]),
    "a signed address": ("https://host/part?X-Amz-Signature=5e5a3e01&X-Amz-Date=1", ["5e5a3e01"]),
    "a share of Azure": ("AccountName=a;AccountKey=Sesame1/+==;x", ["Sesame1"]),
    "JSON": ('{"api_key": "Sesame1"}', ["Sesame1"]),
    "a header": ("Authorization: Bearer Sesame1Sesame1Sesame1", ["Sesame1"]),
    "a token of GitHub": ("ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789", ["AbCdEfGh"]),
    "a token of GitLab": ("glpat-AbCdEfGhIjKlMnOpQr", ["AbCdEfGh"]),
    "a token of Slack": ("xoxb-1234567890-AbCdEf", ["1234567890"]),
    "a key of OpenAI": ("sk-proj-AbCdEfGhIjKlMnOpQrStUvWx", ["AbCdEfGh"]),
    "a JSON web token": ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeK", ["eyJ", "Sfl", "SflKxwRJ"]),
}
ORDINARY = [
    "https://huggingface.co/BAAI/bge-small-en-v1.5@main",
    "https://host:8080/a/b@c",
    "write to anna@host.org: thanks",
    f"revision {HEX}, in snapshots/{HEX}",
    "training.batch_tokens: 16384, max_tokens=5, tokens_per_second=7",
    "data/hf_datasets/sk-learn-something-very-long/disk-usage",
    "the secret of token embeddings; password reset",
    "runs/" + HEX,
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_secret_by_its_form_is_hidden(kind):
    """Once hidden, a text stays as it is: what was kept is compared with what is there now."""
    text, secrets = KINDS[kind]
    shown = hidden(text)
    assert "***" in shown
    assert [secret for secret in secrets if secret in shown] == []
    assert hidden(shown) == shown
    assert without_secrets({text: [1, {"a": text}]}) == {shown: [1, {"a": shown}]}


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay(text):
    """A commit that is shown as *** is of no use to anybody."""
    assert hidden(text) == text


def test_the_environments_secrets_are_known_by_their_values(monkeypatch):
    """They may look like anything."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct horse battery")
    assert hidden("s3: correct horse battery staple") == "s3: *** staple"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    assert hidden("s3: correct") == "s3: correct"


@pytest.mark.usefixtures("on_cpu")
def test_a_whole_pipeline_writes_none(write_config, write_rows, write_pairs, triplets, make_model, tmp_path, monkeypatch):
    """Twelve kinds, wherever a text can come in: greps all files that it wrote, and all that it said."""
    # The last one of each: long enough that no megabyte of weights has it by chance, nor two columns of a database side by side.
    kept = {name: secrets[-1] for name, (_, secrets) in KINDS.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gist_train.data.fingerprints.SETTLED_SECONDS", -1.0)  # the files are new, and yet to be remembered
    monkeypatch.setenv("OF_THE_ENVIRONMENT", "https://ottokar:Mellon22@host")
    before = {*tmp_path.rglob("*")}

    def planted(kind: str, target: Path, name: str) -> str:
        folder = tmp_path / KINDS[kind][0].replace("?", "/").replace('"', "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
        return str(folder / name)

    evaluation = write_pairs([row["anchor"] for row in triplets[:20]])
    rows = write_rows("part.jsonl", triplets)
    Path("https:/ottokar:Mellon22@host").mkdir(parents=True)
    Path("https:/ottokar:Mellon22@host/rest.jsonl").symlink_to(rows)
    sources = [
        {"source": "jsonl", "path": planted(kind, rows, f"{i}.jsonl")}
        for i, kind in enumerate(KINDS)
        if "{" not in KINDS[kind][0]
    ]
    sources += [
        {"source": "jsonl", "path": "${OF_THE_ENVIRONMENT}/rest.jsonl"},
        {"source": "jsonl", "path": planted("user info", rows, "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567.jsonl")},
        {"source": "jsonl", "path": "part.jsonl", "where": 'task != "token=Sesame1"'},
    ]
    evaluation["tasks"][0]["path"] = planted("a user alone", tmp_path / "pairs.tsv", "pairs.tsv")
    evaluation |= {"every": 2, "held_out": 20}
    guide = {"name": planted("a signed address", make_model(), "guide"), "dtype": "float32"}
    path = write_config(
        "run",
        data={"train": sources, "on_bad_row": "skip"},
        model={"name": planted("a token in a query", make_model(), "model")},
        guide=guide,
        evaluation=evaluation,
        selection={"metric": "pairs/spearman"},
        training={"batch_size": 8, "max_steps": 4, "precision": "float32"},
        checkpoint={"every": 2},
        tracking={"log_every": 1, "wandb": {"project": "p", "mode": "offline"}, "tensorboard": {}, "mlflow": {}},
    )
    (tmp_path / "part.jsonl").write_text(rows.read_text() + '{"anchor": ""}\n')
    there = {*tmp_path.rglob("*")} - before
    told = [
        gist("plan", path, "--json"),
        gist("train", path),
        gist("evaluate", path, "--model", planted("a password by name", make_model(), "model")),
        gist("select", path),
        gist("export", path),
        gist("train", path, "--set", "training.max_steps=5", "--set", "data.on_bad_row=fail"),
        gist("train", path, "--set", "data.train.0.path=https://anna:Sesame1@host/no", "--set", "name=other"),
        gist("train", path, "--set", "tracking.wandb={project: p, api_key: Sesame1}"),
        gist("init", planted("user info", rows, "one.jsonl"), "--to", "starter.yaml"),
        gist("init", "https://anna:Sesame1@host/no.jsonl", "--to", "starter.yaml"),
    ]
    assert [ended.code for ended in told] == [0, 0, 0, 0, 0, 2, 2, 2, 2, 2], [ended.err for ended in told]
    wrote = {one for one in tmp_path.rglob("*") if one.is_file() and not one.is_symlink()} - there
    assert {
        "mlflow.db",
        "config.yaml",
        "run.json",
        "selected.json",
        "manifest.json",
        "README.md",
        "meta.json",
        "content-hashes.json",
    } <= {one.name for one in wrote}
    texts = {str(one): one.read_bytes() for one in wrote} | {f"run {i}": f"{e.out}{e.err}".encode() for i, e in enumerate(told)}
    secrets = [*kept.values(), "Sesame1", "Mellon22", "ottokar"]
    found = [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text]
    assert found == []
    assert "token=***" in yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["model"]["name"]
    assert not (tmp_path / "starter.yaml").exists()
    assert "*** stands for a password or token" in told[6].err


def test_a_resume_does_not_mind_another_password(write_config):
    """What a checkpoint keeps and what the YAML says are compared without it; another host is another model."""
    path, other = (load_config(write_config(model={"name": f"https://a:{word}@host/m"})) for word in ("one", "two"))
    assert mathematics(path) == mathematics(other)
    assert mathematics(path)["model.name"] == "https://***@host/m"
    assert "https://***@host/m" in resolved_yaml(path)
    assert path.model.name == "https://a:one@host/m"


@pytest.mark.parametrize(
    "sections",
    [
        {"guide": {"name": "g", "prompt": "password=Sesame1 "}},
        {"guide": {"name": "g", "prompts": {"anchor": "token=Sesame1"}}},
        {"data": {"train": [{"source": "jsonl", "path": "a", "task": "password=Sesame1"}]}},
        {"tracking": {"wandb": {"project": HEX}}},
        {"tracking": {"wandb": {"project": "p", "entity": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"}}},
        {"name": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"},
    ],
)
def test_names_and_prompts_hold_none(write_config, sections):
    """A prompt is part of the model, a name of a folder's: hidden there, they would be others."""
    path = write_config()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert len(raised.value.faults) == 1
    assert "take the" in str(raised.value)
    for secret in ("Sesame1", HEX, "AbCd"):
        assert secret not in str(raised.value)


@pytest.mark.skipif(sys.platform != "linux", reason="ps reads elsewhere what no process can change")
def test_ps_shows_none():
    """Everybody on the machine reads it there; the length stays, so that nothing beside it is written over."""
    code = """
import sys
from gist_train.config.secrets import hide_command_line
hide_command_line()
print(open("/proc/self/cmdline").read().strip(chr(0)).split(chr(0))[-3:], sys.argv[1:])
"""
    words = ["--set", "a=https://anna:Sesame1@host/part", "last"]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60)
    shown = ["--set", "a=https://***@host/part", "last"]
    assert ran.stdout == f"{shown} {shown}\n"


@pytest.mark.usefixtures("on_cpu")
def test_what_others_print_is_hidden_too():
    """A traceback of a fault of ours, a warning, another package's print."""
    code = """
import sys, warnings
from gist_train import cli
def app(args, **_):
    assert args == ["https://anna:Sesame1@host/part"]
    print("see", args[0])
    warnings.warn(args[0])
    raise RuntimeError(args[0])
cli.app = app
cli.main()
"""
    words = [sys.executable, "-c", code, "https://anna:Sesame1@host/part"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 1
    assert ran.stdout == "see https://***@host/part\n"
    assert "RuntimeError: https://***@host/part" in ran.stderr
    assert "Sesame1" not in ran.stderr


def test_telemetry_is_off_unless_the_user_turns_it_on():
    """Read when the hub's package is imported."""
    code = "from gist_train import cli; cli.app = lambda **_: None; cli.main();"
    code += "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    for setting, expected in ((None, "True"), ("0", "False")):
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
        environment |= {} if setting is None else {"HF_HUB_DISABLE_TELEMETRY": setting}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        assert ran.stdout == f"{expected}\n"
