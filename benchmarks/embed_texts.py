"""Embeds every text of a config's corpus with any model of sentence-transformers, in bfloat16: vectors for a second guide.

    python -m benchmarks.embed_texts MODEL CONFIG --to FILE.parquet

On a processor with matrix units for bfloat16 (AMX) that is several times as fast as float32. What it writes is read as
`guide: {vectors: FILE.parquet}`.
Exit code: 0.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from rich.console import Console

from gist_train.config.loading import load_config
from gist_train.preparation import prepare_corpus

AT_A_TIME = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder of a model of sentence-transformers")
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("--to", type=Path, required=True, help="the .parquet file")
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text is cut to (default %(default)s)")
    options = parser.parse_args(arguments)
    from sentence_transformers import SentenceTransformer

    corpus = prepare_corpus(load_config(options.config), torch.device("cpu"), Console(stderr=True))
    model = SentenceTransformer(options.model, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    model.max_seq_length = options.max_length
    schema = pa.schema({"text": pa.string(), "embedding": pa.list_(pa.float32())})
    with pq.ParquetWriter(options.to, schema) as writer:
        for first in range(0, corpus.text_count, AT_A_TIME):
            texts = [corpus.text(i) for i in range(first, min(first + AT_A_TIME, corpus.text_count))]
            vectors = model.encode(texts, batch_size=64, convert_to_numpy=False, convert_to_tensor=True).float().numpy()
            writer.write_table(pa.table({"text": texts, "embedding": list(vectors)}, schema))
            print(f"{first + len(texts):,} of {corpus.text_count:,} texts", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
