"""Rows of a corpus -> the batch plan of a config, or why they give none."""

import numpy as np

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.data.batches import BatchPlan
from gist_train.data.cells import Likeness
from gist_train.data.corpus import Corpus
from gist_train.training.guides import Guide, StoredGuide


def check_candidates(config: Config, corpus: Corpus) -> None:
    """Raises UserError where no step can teach anything: each batch is one row, and no row has a negative."""
    if config.training.batch_size == 1 and not len(corpus.negative):
        found, expected = "1, and rows without negatives", "2 or more: the other rows of its batch serve a row as negatives"
        raise UserError(Fault("training.batch_size", found, expected, "raise it; 16 to 128 is usual"))


def batch_plan(config: Config, corpus: Corpus, guide: Guide = None) -> BatchPlan:
    """The batch plan of `config` over `corpus`.

    Args:
        guide: what similar rows are found by; without one they are not, and counts are right all the same.

    Raises:
        UserError: the rows give no whole batch.
    """
    _refuse_rows_without_candidates(config, corpus)
    try:
        return BatchPlan(
            task=corpus.task,
            anchor=corpus.anchor,
            positive=corpus.positive,
            positive_offsets=corpus.positive_offsets,
            batching=config.data.batching,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
            source=corpus.source,
            weights=[source.weight for source in config.data.train],
            likeness=_likeness(config, corpus, guide),
        )
    except ValueError as error:
        if config.data.batching == "reference" and corpus.row_count >= config.training.batch_size:
            fix = "put the rows of a task together in the file, or set data.batching: task"
            setting = f"reference; no {config.training.batch_size} neighbouring rows, counted from the first, are of one task"
            raise UserError(Fault("data.batching", setting, "windows of rows of one task", fix)) from None
        raise UserError(
            Fault(
                "training.batch_size",
                f"{config.training.batch_size}; {error} from {', '.join(source.path for source in config.data.train)}",
                "a size of which the data has one whole batch at least",
                "lower training.batch_size or add rows",
            )
        ) from None


def _likeness(config: Config, corpus: Corpus, guide: Guide) -> Likeness | None:
    """What tells how alike rows are; None where batches don't go by it."""
    if config.data.batching != "similar" or not isinstance(guide, StoredGuide):
        return None
    anchors = guide.anchor
    return Likeness(config.data.similarity_depth, lambda rows: anchors.embeddings(corpus.anchor[rows]).numpy())


def _refuse_rows_without_candidates(config: Config, corpus: Corpus) -> None:
    """UserError where rows that keep to their own negatives have none: they would contrast with nothing, and teach nothing."""
    bare = np.bincount(corpus.source[np.diff(corpus.negative_offsets) == 0], minlength=len(config.data.train))
    faults = [
        Fault(
            f"data.train[{index}].in_batch_negatives",
            f"false, and {count:,} rows of {source.path} without a negative",
            "false where every row has a negative of its own",
            "set it to true, or give these rows negatives",
        )
        for index, (source, count) in enumerate(zip(config.data.train, bare.tolist(), strict=True))
        if count and not source.in_batch_negatives
    ]
    if faults:
        raise UserError(*faults)
