#!/usr/bin/env bash
# Sets up .venv and runs the test suite; further arguments go to pytest, e.g. -m slow for the tests that take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev,quickstart
exec .venv/bin/python -m pytest "$@"
