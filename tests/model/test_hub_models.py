"""Models of the hub: asked once, and with a whole copy in the cache never waited for long, whatever the hub does."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from support.hub_stub import hub

COMMIT = "1" * 40
FAULTS = {
    "silent": "did not answer within 1 s",
    "half": "answers with what can't be read",
    401: "does not know the token",
    403: "refuses it to this account",
    404: "has no such name or revision",
    429: "was asked too often",
    500: "fails (HTTP 500)",
    "closed": "can't be reached",
}
LOADS = """
import json, logging, sys, time
from huggingface_hub import constants
from gist_train.config.errors import UserError
from gist_train.config.models import StoredModelConfig
from gist_train.data import asking
from gist_train.model import hub
from gist_train.model.folders import folder_prompt, identity
from gist_train.model.loading import load_guide

hub.SECONDS_TO_ANSWER = asking.SECONDS_TO_ANSWER = 1.0
asking.SECONDS_BETWEEN_TRIES = (0.1, 0.1)
logging.basicConfig(format="%(message)s", level=logging.WARNING)
for endpoint, name in json.loads(sys.argv[1]):
    constants.ENDPOINT = endpoint
    hub.commit_of.cache_clear()
    asking._silent.clear()
    began = time.monotonic()
    try:
        known = identity(name, None, "guide", str)
        model = load_guide(StoredModelConfig(name=name, revision=None))
        folder_prompt(name, None)
        load_guide(StoredModelConfig(name=name, revision=None))
        found = [known, model.encode(["a text"]).tolist()]
    except UserError as error:
        found = str(error)
    print(json.dumps([time.monotonic() - began, found]), flush=True)
    print("end of", endpoint, file=sys.stderr, flush=True)
"""


def loaded(tmp_path, endpoints, offline="0"):
    """(seconds, what was found) for each (endpoint, name), and what was said of each, in a process of its own."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": endpoints[0][0]}
    command = [sys.executable, "-c", LOADS, json.dumps(endpoints)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    said = [part.partition("\n")[2] for part in f"\n{ended.stderr}".split("end of ")]
    return [json.loads(line) for line in ended.stdout.splitlines()], [ended.stderr.split("end of ")[0], *said[1:]]


@pytest.fixture
def files(make_model):
    folder = make_model()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_copy_is_enough_whatever_the_hub_does(files, tmp_path):
    """Loaded over the network once; then the same model without, told each time by the hub's own fault."""
    with ExitStack() as servers:
        good, requests = servers.enter_context(hub("me/model", {COMMIT: files}, "models"))
        faults = [servers.enter_context(hub("me/model", {COMMIT: files}, "models", fault))[0] for fault in list(FAULTS)[:-1]]
        endpoints = [good, good, *faults, "http://127.0.0.1:9"]
        found, said = loaded(tmp_path, [(endpoint, "me/model") for endpoint in endpoints])
        asked = len(requests)
    (_, expected), *rest = found
    assert expected[0] == f"me/model@{COMMIT}"
    assert [model for _, model in rest] == [expected] * len(rest)
    assert (
        max(seconds for seconds, _ in rest) < 30
    )  # loading it twice, on a machine that others use; each file asked for thrice would take minutes
    assert asked < 60
    for line, words in zip(said[2:], FAULTS.values(), strict=False):
        assert f"me/model: the hub {words}" in line, line
        assert line.count("the copy in the cache is taken, commit 1111") == 1
    (_, offline), *_ = loaded(tmp_path, [("http://127.0.0.1:9", "me/model")], offline="1")[0]
    assert offline == expected


@pytest.mark.slow
def test_without_a_copy_each_fault_is_told_apart(files, tmp_path):
    """Three tries where another may help; then a message that says what the hub does, and no traceback."""
    with ExitStack() as servers:
        kinds = list(FAULTS)[:-1]
        faulty = [servers.enter_context(hub("me/other", {COMMIT: files}, "models", fault)) for fault in kinds]
        found, _ = loaded(tmp_path, [(endpoint, "me/other") for endpoint, _ in faulty] + [("http://127.0.0.1:9", "me/other")])
        counts = {kind: len(requests) for kind, (_, requests) in zip(kinds, faulty, strict=True)}
    for (_, message), words in zip(found, FAULTS.values(), strict=True):
        assert message.startswith('guide.name\n  found     "me/other", which could not be loaded: the hub '), message
        assert words in message
    assert counts.pop("silent") >= 3  # the HTTP library tries a lost connection again
    assert counts == {"half": 3, 401: 1, 403: 1, 404: 1, 429: 3, 500: 3}


@pytest.mark.slow
def test_a_copy_without_its_modules_is_no_whole_one(files, tmp_path):
    """Taken for one, a model that pools the first token would be loaded with mean pooling, and nothing would say so."""
    with hub("me/model", {COMMIT: files}, "models") as (good, _):
        (_, _), *_ = loaded(tmp_path, [(good, "me/model")])[0]
    snapshot = tmp_path / "home" / "hub" / "models--me--model" / "snapshots" / COMMIT
    (snapshot / "modules.json").unlink()
    (_, message), *_ = loaded(tmp_path, [("http://127.0.0.1:9", "me/model")])[0]
    assert isinstance(message, str), message
    assert f"the hub can't be reached; its copy in the cache, commit {COMMIT}, lacks a part" in message
