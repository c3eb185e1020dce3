#!/usr/bin/env bash
# Sets up .venv and runs the test suite; further arguments go to pytest, e.g. -m slow for the tests that take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev,quickstart
# A worker for each core: most tests wait for their own processes and files, and few gain from a second thread.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
