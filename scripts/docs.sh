#!/usr/bin/env bash
# Builds the documentation into build/site, any warning an error: open build/site/index.html. Further arguments go to mkdocs.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh docs
exec .venv/bin/mkdocs build --strict "$@"
