#!/usr/bin/env bash
# Asks the advisory databases about every version that constraints.txt pins. Needs a network; ends with 1 where one has a known hole.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pip-audit
"$folder/venv/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip --strict "$@"
