#!/usr/bin/env bash
# Sets up .venv and runs the test suite; further arguments go to pytest, e.g. -m slow for the tests that take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev,quickstart
# Half as many workers again as cores: a third of the time is spent on waiting for processes and time limits.
# Few tests gain from a second thread.
workers=$(($(nproc) * 3 / 2)) # before OMP_NUM_THREADS, by which nproc counts
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$workers" --dist worksteal "$@"
