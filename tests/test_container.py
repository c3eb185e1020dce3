"""The Dockerfile, read: no engine runs where these tests do. A build that fails does so after gigabytes of downloads."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from gist_train.cli import app
from gist_train.version import __version__

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n\s*", "", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))).splitlines()
STEPS = [(word, rest) for word, _, rest in (line.partition(" ") for line in LINES if line)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def copied(rest):
    """Files and folders that a COPY names, without where they go."""
    return shlex.split(rest)[:-1]


def test_what_it_copies_is_there():
    """A file that was moved, or that .dockerignore leaves out of what is sent, ends the build."""
    names = [name for word, rest in STEPS if word == "COPY" for name in copied(rest)]
    assert len(names) >= 5
    assert [name for name in names if not (ROOT / name).exists()] == []
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {*names}


def test_extras_that_it_names_exist():
    """pip only warns of one that does not, and the image lacks it."""
    named = re.findall(r"EXTRAS=([\w,]+)", TEXT)
    assert len(named) >= 2  # the default, and an example
    assert {extra for extras in named for extra in extras.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_versions_are_those_of_constraints():
    """What was tested together is what an image has; a version that is written twice is raised once."""
    installs = [part for word, rest in STEPS if word == "RUN" for part in rest.split("&& ") if part.startswith("pip install")]
    assert len(installs) == 3
    assert [one for one in installs if "--constraint constraints.txt" not in one and "--no-deps" not in one] == []
    assert "==" not in "".join(installs)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    (torch,) = [one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "torch"]
    assert pinned["torch"] in torch.specifier


def test_large_layers_come_before_the_code():
    """Else an edit of a docstring downloads gigabytes."""
    order = [f"{word} {rest}" for word, rest in STEPS]
    (code,) = [number for number, line in enumerate(order) if line == "COPY gist_train gist_train"]
    slow = [number for number, line in enumerate(order) if "--constraint" in line or "apt-get" in line]
    assert len(slow) == 3
    assert max(slow) < code
    # What these need of ours is no file that is edited every day.
    assert {name for word, rest in STEPS[:code] if word == "COPY" for name in copied(rest)} <= {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }


def test_dependencies_install_before_the_code_is_there(tmp_path):
    """pyproject.toml reads a version, a readme and a licence: a new file of that kind would end the build at this step."""
    (step,) = [number for number, (word, rest) in enumerate(STEPS) if word == "RUN" and "EXTRAS" in rest]
    for name in (name for word, rest in STEPS[:step] if word == "COPY" for name in copied(rest)):
        shutil.copy(ROOT / name, tmp_path)
    before = STEPS[step][1].partition(" && pip install")[0]
    subprocess.run(["sh", "-euc", before], cwd=tmp_path, check=True, timeout=20)
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as made; made('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (folder,) = tmp_path.glob("*.dist-info")
    made = metadata.PathDistribution(folder)
    assert made.version != __version__  # so that pip takes ours for another one
    assert len(made.requires) == len(PROJECT["dependencies"]) + sum(map(len, PROJECT["optional-dependencies"].values()))


def test_any_user_can_write_where_libraries_do():
    """Under `--user 1234` a home that is root's, or none, ends a training at its first kernel."""
    (variables,) = [dict(re.findall(r"(\w+)=(\S+)", rest)) for word, rest in STEPS if word == "ENV"]
    (writable,) = re.findall(r"install --directory --mode 1777 (.+)", "\n".join(rest for word, rest in STEPS if word == "RUN"))
    folders = [Path(name) for name in writable.split()]
    assert {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= variables.keys()
    for name, value in variables.items():
        assert name == "USER" or any(Path(value).is_relative_to(folder) for folder in folders), name
    (user,) = [rest for word, rest in STEPS if word == "USER"]
    assert user.split(":")[0] not in ("root", "0")


@pytest.mark.parametrize("line", re.findall(r"docker run (.+)", TEXT))
def test_its_examples_name_commands(line):
    """Who runs an image looks there first."""
    words = re.split(r" {2,}", line)[0].split()
    commands = {
        command.callback.__name__ for group in app.registered_groups for command in group.typer_instance.registered_commands
    }
    assert commands & {*words}
