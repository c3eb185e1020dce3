"""Programs that measure: gist-train against sentence-transformers, and on a GPU. the benchmark in the checkout."""
