"""What an installed package holds: a file that the wheel lacks is there in every checkout, and missed by every user."""

import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from conftest import ROOT

from gist_train import __version__

PACKAGE = ROOT / "gist_train"


def data_files():
    """Files of the package that are no code, from its folder down."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }


def test_every_data_file_is_packed():
    """A folder in a folder is no part of `folder/*`."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gist_train"]
    packed = {str(path.relative_to(PACKAGE)) for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    assert len(data_files()) > 8
    assert data_files() - packed == set()


@pytest.mark.slow
def test_the_wheel_holds_all(tmp_path):
    """The rule that setuptools itself follows, and not ours of it."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gist_train/{name}" for name in data_files()} <= names
    assert {f"gist_train/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_citation_is_of_this_version():
    """A citation of another version sends readers to other code."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
