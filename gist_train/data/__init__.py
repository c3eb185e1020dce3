"""From sources to batches: readers, mining, the corpus and which rows a step takes."""
