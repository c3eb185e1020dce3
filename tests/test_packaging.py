"""What is packed: a file that the wheel or the source distribution lacks is there in every checkout, and missed by every user."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from gist_train import __version__

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class Built:
    """What setuptools makes of the files that git tracks, and of no other: a folder of an earlier build would add its own."""

    tracked: set[str]
    source: Path
    """The source distribution, unpacked."""
    wheel: Path
    """Made from it, as pip makes one."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Built once; it takes some 3 seconds."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git says which files there are")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    tracked = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    folder = tmp_path_factory.mktemp("built")
    for name in tracked:
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    build(folder / "checkout", "build_sdist", folder)
    (packed,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(packed, folder, filter="data")
    source = folder / packed.name.removesuffix(".tar.gz")
    build(source, "build_wheel", folder)
    return Built(tracked, source, next(folder.glob("*.whl")))


def build(folder, what, to):
    """Has the build backend of pyproject.toml, in the version that is installed, make something of a folder."""
    code = f"from setuptools.build_meta import {what}; {what}({str(to)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_source_distribution_has_all_that_git_has(built):
    """Who packs it for a distribution runs its checks, which read the site's menu, the Dockerfile and more."""
    assert len(built.tracked) > 400
    assert {name for name in built.tracked if not (built.source / name).is_file()} == set()


def test_the_wheel_holds_all_of_the_package(built):
    """A folder in a folder is no part of `folder/*`, and a pattern is read by setuptools in its own way."""
    of_package = {name for name in built.tracked if name.startswith("gist_train/")}
    assert len([name for name in of_package if not name.endswith(".py")]) > 8
    names = set(zipfile.ZipFile(built.wheel).namelist())
    assert of_package - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"gist_train", f"gist_train-{__version__}.dist-info"}


def test_it_installs_into_an_empty_environment(built, tmp_path):
    """Beside the checkout everything is found, whether it was packed or not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True, timeout=120)
    python = tmp_path / "empty" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built.wheel)], check=True, timeout=120)
    code = "import gist_train; from importlib.metadata import version; print(gist_train.__file__, version('gist-train'))"
    said = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    file, version = said.split()
    assert Path(file).is_relative_to(tmp_path / "empty")
    assert version == __version__
    assert (tmp_path / "empty" / "bin" / "gist-train").is_file()


def test_the_citation_is_of_this_version():
    """A citation of another version sends readers to other code."""
    assert CITATION["version"] == __version__


def test_the_citation_is_of_the_program_and_the_paper():
    """With a preferred citation code hosts offer that alone, and the paper would stand for the program too."""
    assert "preferred-citation" not in CITATION
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["authors"] == PROJECT["authors"]
    (paper,) = CITATION["references"]
    assert "2402.16829" in paper["url"]
    assert {"type", "title", "authors"} <= paper.keys()
