#!/usr/bin/env bash
# Makes .venv beside this folder and installs gist-train with pinned versions.
#   scripts/setup.sh [EXTRA[,EXTRA...]]     extras of pyproject.toml; default: quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: set PYTHON to one" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[${1:-quickstart}]"
