"""What an audit looks at: every usable row of a config's files, and the batches that a training would make of them."""

import torch
from rich.console import Console

from gist_train.config.errors import UserError
from gist_train.config.schema import Config
from gist_train.data.batches import BatchPlan
from gist_train.data.caches import mark_used
from gist_train.preparation import judged_hashes, prepare_tokens, student_and_corpus
from gist_train.progress import say
from gist_train.suspects import Looked
from gist_train.training.batching import batch_plan, check_candidates
from gist_train.training.embedding import prepare_guide
from gist_train.training.guides import StoredGuide, parts_of_all


def whole_data(config: Config) -> Config:
    """The config whose corpus has every usable row of its files as it came: held-out rows and texts of evaluation tasks too, none
    dropped as suspect, none with negatives that the guide finds."""
    every = {"drop_suspects": None, "hard_negatives": None, "exclude_evaluation_texts": False}
    evaluation = config.evaluation.model_copy(update={"held_out": None})
    return config.model_copy(update={"data": config.data.model_copy(update=every), "evaluation": evaluation})


def prepare_to_look(config: Config, device: torch.device, console: Console) -> tuple[Looked, BatchPlan | None]:
    """What all rows of the files of `config` are judged by, and the batches that a training would make of them.

    Args:
        config: as `whole_data` gives it.

    Returns:
        None for the batches where the rows give no whole one, which is said.

    Raises:
        UserError: data or models are not what the config says.
    """
    student, corpus = student_and_corpus(config, device, console)
    tokens = prepare_tokens(corpus, student, console)
    guide = prepare_guide(config, corpus, device, console)
    plan = None
    try:
        check_candidates(config, corpus)
        plan = batch_plan(config, corpus, guide)
    except UserError as error:  # rows can be judged all the same
        say(console, f"no batches, so what the guide would mask is not counted:\n{error}")
    looked = Looked(corpus, guide, parts_of_all(config, corpus), tokens, student, judged_hashes(config), in_files=True)
    prepared = [corpus.folder, *guide.folders()] if isinstance(guide, StoredGuide) else [corpus.folder]
    for folder in prepared:
        mark_used(folder)
    return looked, plan
