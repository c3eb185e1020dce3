#!/usr/bin/env python3
"""Writes a model's weights as safetensors beside its pickles: python scripts/convert_to_safetensors.py FOLDER

gist-train reads no pickle, since a pickle can run code. Here torch reads it with weights_only, in a process of its own that does
nothing else. The pickles stay where they are, and nothing reads them any more.
"""

import json
import subprocess
import sys
from pathlib import Path

INDEX = "pytorch_model.bin.index.json"


def main() -> int:
    """Converts every pickle of a model folder and of the modules in it."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    pickles = sorted(Path(sys.argv[1]).rglob("pytorch_model*.bin"))
    if not pickles:
        print(f"{sys.argv[1]}: no pytorch_model*.bin in it", file=sys.stderr)
        return 2
    for pickle in pickles:
        target = pickle.with_name(_named(pickle.name))
        # -I: nothing of the environment or this folder is imported.
        command = [sys.executable, "-I", __file__, "--convert", pickle, target]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            print(f"{pickle}: not weights alone, or broken: {last}", file=sys.stderr)
            return 1
        print(target)
    for index in Path(sys.argv[1]).rglob(INDEX):
        table = json.loads(index.read_text(encoding="utf-8"))
        table["weight_map"] = {weight: _named(file) for weight, file in table["weight_map"].items()}
        index.with_name("model.safetensors.index.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


def convert(pickle: Path, target: Path) -> None:
    """Reads the tensors of one pickle, and writes them whole or not at all."""
    import torch
    from safetensors.torch import save_file

    weights = torch.load(pickle, map_location="cpu", weights_only=True)
    # Copies: weights that share their memory, as tied ones do, safetensors refuses.
    tensors = {name: value.clone().contiguous() for name, value in weights.items() if isinstance(value, torch.Tensor)}
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(target)


def _named(pickle: str) -> str:
    return pickle.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
