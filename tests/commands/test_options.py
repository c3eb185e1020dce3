"""What commands share: where an answer in JSON goes."""

import subprocess
import sys

import pytest

NOISY = """
import ctypes, os, subprocess, sys
from gist_train.commands.options import answering
print("before")
with answering(True) as out:
    print("a print")
    os.write(1, b"a write\\n")
    ctypes.CDLL(None).printf(b"a printf\\n")
    subprocess.run(["echo", "a child"], check=True)
    print("{}", file=out)
    if len(sys.argv) > 1:
        raise SystemExit(3)
os.write(1, b"after\\n")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_but_the_answer_is_on_stdout(fails):
    """A program that parses it would end at a line of a library's C code, or of a compiler that it started."""
    command = [sys.executable, "-c", NOISY, *["fails"] * fails]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 3 * fails, ended.stderr
    assert ended.stdout == ("before\n" if fails else "before\n{}\nafter\n")
    assert {"a print", "a write", "a printf", "a child"} <= {*ended.stderr.splitlines()}
