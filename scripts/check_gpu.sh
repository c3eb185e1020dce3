#!/usr/bin/env bash
# Checks and times gist-train on a GPU, stage by stage, without network:
#
#     scripts/check_gpu.sh OUT [--device cuda|cpu] [--tiny] [STAGE ...]
#
# STAGE is a name or a number of: 1 versions, 2 tests, 3 training, 4 step, 5 profile, 6 passes; all by default. Each has a process and
# a time limit of its own, and writes OUT/<number>-<name>.txt and .json. Exit code: 0, or 1 where a stage failed.
# Reads $PYTHON (python3), $GIST_TRAIN_DATA, and $TMPDIR: models and corpora stay in its folder check_gpu for the next stage.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
names=(versions tests training step profile passes)
seconds=(60 130 110 240 60 60)

usage() { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

out="" options=() chosen=()
while (($#)); do
    case "$1" in
        --device) (($# > 1)) || usage; options+=(--device "$2"); shift ;;
        --tiny) options+=(--tiny) ;;
        -*) usage ;;
        *) if [[ -z "$out" ]]; then out="$1"; else chosen+=("$1"); fi ;;
    esac
    shift
done
[[ -n "$out" ]] || usage
mkdir -p "$out" || exit 2

wanted=()
for choice in "${chosen[@]+"${chosen[@]}"}"; do
    found=""
    for index in "${!names[@]}"; do
        if [[ "$choice" == "${names[index]}" || "$choice" == "$((index + 1))" ]]; then found="$index"; fi
    done
    [[ -n "$found" ]] || { echo "no such stage: $choice" >&2; usage; }
    wanted+=("$found")
done
((${#wanted[@]})) || wanted=("${!names[@]}")

# As gist-train's own command has it, before torch is imported.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# This checkout, wherever a package of that name is installed.
export PYTHONPATH="${here%/scripts}${PYTHONPATH:+:$PYTHONPATH}"
failed=0
for index in "${wanted[@]}"; do
    name="${names[index]}" file="$out/$((index + 1))-${names[index]}"
    rm -f "$file.json"
    echo "== $((index + 1)) $name (at most ${seconds[index]} s)"
    timeout -s INT -k 10 "${seconds[index]}" \
        "$python" -m benchmarks.gpu "$name" --out "$out" "${options[@]+"${options[@]}"}" 2>&1 | tee "$file.txt"
    ((PIPESTATUS[0] == 0)) || failed=1
done
"$python" -m benchmarks.gpu table --out "$out" || failed=1
exit "$failed"
