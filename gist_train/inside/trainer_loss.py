"""The guided contrastive loss as a module of sentence-transformers' trainer. Its mathematics is `guided_contrastive_loss`.

It takes the place of their GISTEmbedLoss and, with mini-batches, of CachedGISTEmbedLoss, under the names of their arguments.

Legend: B rows of the batch at hand, N columns of texts: anchors, positives, and any number of columns of negatives.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentence_transformers
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gist_train.citations import bibtex
from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.losses import DistillationConfig, LossConfig
from gist_train.inside.ahead import TrainingData, embed_ahead
from gist_train.inside.gathering import Gathered, Known, gather
from gist_train.inside.guides import (
    FixedGuide,
    GuideSource,
    ModelGuide,
    Prompts,
    checked_section,
    default_cache,
    guide_of,
)
from gist_train.inside.packing import refuse_no_model, runs_packed
from gist_train.inside.texts import LOSS, TEXTS, USE_COLLATOR, Column, collator, column_of
from gist_train.model.distillation import distillation_loss, map_to_width, regression_loss
from gist_train.model.encoder import Tokens
from gist_train.model.loss import guided_contrastive_loss

logger = logging.getLogger(__name__)


WAITS_ONCE = tuple(map(int, sentence_transformers.__version__.split(".")[:2])) >= (6, 2)
"""Whether processes wait for each other at a step's last mini-batch alone, and not at each of them."""
LAYERS = "all_layer_embeddings"
"""What sentence-transformers' layers leave in the features of a column, by that key, for a loss over each of them."""


class GuidedContrastiveLoss(CachedLossMixin, nn.Module):
    """The guided contrastive loss of GISTEmbed (Solatorio 2024, arXiv 2402.16829) for `SentenceTransformerTrainer`.

    Args:
        model: to train.
        guide: a SentenceTransformer; the name or folder of a model; a store's folder; a .parquet or .npy file of vectors; a
            mapping, as the section `guide` of a YAML (`{"name": ..., "revision": ..., "prompts": {...}, "pooling": ...}`);
            "self", or the model itself, for the student's own similarities; None for no guide.
        temperature, margin_strategy, margin, contrast_anchors, contrast_positives: as in GISTEmbedLoss.
        mini_batch_size, mini_batch_num_tokens: rows, or tokens, of a column that are encoded at a time, as in
            CachedGISTEmbedLoss; both None: all at once, as in GISTEmbedLoss.
        show_progress_bar: of mini-batches.
        gather_across_devices: rows contrast with the texts of all processes, anchors too.
        weight, mask, softness, hardness, negatives, mask_duplicates, block_size, dimensions, dimension_weights: as in the section
            `loss` of a YAML.
        distillation: as the section of that name: `{"weight": 2, "temperature": 0.05}`.
        guide_prompts: what a guide reads before every text, or by "anchor", "positive" and "negative".
        cache_dir: where embeddings are kept; None for gist-train in the user's folder for caches.

    Raises:
        UserError: an option that can't be, or a guide that is none.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: GuideSource,
        temperature: float = 0.01,
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        weight: float = 1.0,
        mask: Literal["hard", "soft"] = "hard",
        softness: float = 0.05,
        hardness: float = 0.0,
        negatives: Literal["all", "hard"] = "all",
        mask_duplicates: bool = True,
        block_size: int | None = None,
        dimensions: Sequence[int] | None = None,
        dimension_weights: Sequence[float] | None = None,
        distillation: Mapping[str, Any] | None = None,
        guide_prompts: Prompts = None,
        cache_dir: str | Path | None = None,
    ):
        super().__init__()
        refuse_no_model(model, LOSS)
        self.options = checked_section(
            LossConfig,
            {
                "weight": weight,
                "temperature": temperature,
                "margin": margin,
                "margin_strategy": margin_strategy,
                "mask": mask,
                "softness": softness,
                "hardness": hardness,
                "contrast_anchors": contrast_anchors,
                "contrast_positives": contrast_positives,
                "negatives": negatives,
                "mask_duplicates": mask_duplicates,
                "block_size": block_size,
                "dimensions": list(dimensions) if isinstance(dimensions, Iterable) else dimensions,
                "dimension_weights": list(dimension_weights) if isinstance(dimension_weights, Iterable) else dimension_weights,
            },
            "loss",
        )
        _refuse_unlike("distillation", distillation, Mapping | None, "a dict of its keys, or None")
        _refuse_unlike("gather_across_devices", gather_across_devices, bool, "True or False")
        self.distillation = checked_section(DistillationConfig, distillation or {}, "distillation")
        self.model = model
        self.guide = guide_of("self" if guide is model else guide, guide_prompts, Path(cache_dir or default_cache()))
        self.gather_across_devices, self.show_progress_bar = gather_across_devices, show_progress_bar
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]  # never read where tokens are counted
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self._decodes: bool | None = None
        self._ahead = False
        self._refuse_what_cannot_be()

    @property
    def _student(self) -> SentenceTransformer:
        """The model itself: the trainer puts a wrapped one in its place."""
        return next(module for module in self.model.modules() if isinstance(module, SentenceTransformer))

    @property
    def _guide_name(self) -> str | None:
        return self.guide.name if isinstance(self.guide, ModelGuide | FixedGuide) else self.guide

    def _refuse_what_cannot_be(self) -> None:
        for name, value in (("mini_batch_size", self.mini_batch_size), ("mini_batch_num_tokens", self.mini_batch_num_tokens)):
            _refuse_unlike(name, value, int | None, "a whole number of 1 or more, or None")
            if value is not None and value < 1:
                fix = "raise it, or leave it out: the batch is then encoded at once"
                raise UserError(Fault(f"{LOSS}: {name}", str(value), "a whole number of 1 or more, or None", fix))
        width = self._student.get_embedding_dimension()
        if width is not None and (wide := [size for size in self.options.dimensions or () if size > width]):
            found, fix = f"{wide[0]:,}, and a model of {width:,} dimensions", "leave it out"
            raise UserError(Fault(f"{LOSS}: dimensions", found, "no more than the model has", fix))
        if self.distillation.scores:
            fix = "leave it out, or train with gist-train train, whose rows may have scores"
            raise UserError(Fault(f"{LOSS}: distillation.scores", f"{self.distillation.scores:g}", "0: no scores are read", fix))
        if self.distillation.on and not isinstance(self.guide, ModelGuide | FixedGuide):
            fix = "name a guide, or leave distillation out"
            raise UserError(Fault(f"{LOSS}: distillation", f"given, and guide: {self._guide_name}", "a guide to learn from", fix))
        if not (self.options.weight or self.distillation.on):
            found = "loss.weight 0, and no distillation"
            raise UserError(Fault(f"{LOSS}: weight", found, "something to learn", "raise it, or give distillation a weight"))
        if self.uses_gradient_cache and has_static_embedding_input(self._student):
            fix = "leave mini_batch_size and mini_batch_num_tokens out: such a model needs little memory"
            found = "mini-batches, and a model whose input is a StaticEmbedding"
            raise UserError(Fault(f"{LOSS}: mini_batch_size", found, "features with a row for each text", fix))

    def collator(self, args: SentenceTransformerTrainingArguments) -> SentenceTransformerDataCollator:
        """A `data_collator` for the trainer whose batches hold their texts: the guide then reads what the user wrote.

        Without it, it reads what the student's tokens decode to: in lower case, cut and after the student's prompts, where the
        student reads so.

        Args:
            args: the trainer's, whose prompts and routes the student's texts are tokenized with.
        """
        return collator(self._student.preprocess, args.prompts, args.router_mapping)

    def embed(self, data: TrainingData) -> int:
        """Has the guide embed every text of the data before a training, faster than a step would: sorted by length.

        All processes may call it together, and share the work. Returns how many texts there are. The trainer needs the `collator`
        then: without it the guide reads other texts, which are not embedded yet.

        Args:
            data: a `datasets.Dataset`, or some by name, with columns in the order of the trainer's.

        Raises:
            UserError: the data are no data sets, or have no texts, or the guide is no model.
        """
        if not isinstance(self.guide, ModelGuide):
            fix = "train without: nothing is to be embedded"
            raise UserError(Fault(f"{LOSS}: embed", f"guide: {self._guide_name}", "a guide that is a model", fix))
        together = dist.is_initialized()
        processes, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        self._ahead = True
        return embed_ahead(self.guide, data, self._student.device, processes, first=rank == 0)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The loss of a batch, a scalar: its mean over rows.

        Args:
            sentence_features: of each column, from the trainer's collator or the model's `preprocess`.
            labels: not read.

        Raises:
            UserError: there are no positives, or texts that the guide knows nothing of; or mini-batches are wanted of several
                processes, and sentence-transformers is older than 6.2.
        """
        given = list(sentence_features)
        features = [dict(column) for column in given]
        if len(features) < 2:
            fix = "select the columns anchor and positive, in this order; columns of negatives may follow"
            raise UserError(Fault(f"{LOSS}: a batch", f"{len(features)} columns of texts", "two or more", fix))
        known = self._known(features)
        for column in features:
            column.pop(TEXTS, None)  # no model's business
        if self.uses_gradient_cache:
            self._refuse_unlike_waits()
            return self.forward_cached(features, known)  # type: ignore[arg-type]
        embeddings = embed_columns(self.model, features, separate_first=not runs_packed(self.model))
        for column, own in zip(given, features, strict=True):
            if LAYERS in own:  # AdaptiveLayerLoss, which asks for the loss of each layer, looks for them there
                column[LAYERS] = own[LAYERS]
        return self._loss(embeddings, known)

    def _refuse_unlike_waits(self) -> None:
        """A process that has more mini-batches than another would wait for it for ever, and tokens make their number unlike."""
        if isinstance(self.model, DistributedDataParallel) and not WAITS_ONCE:
            found = f"mini-batches in several processes, and sentence-transformers {sentence_transformers.__version__}"
            expected = "6.2 or newer, where processes wait for each other once a step"
            fix = 'pip install -U "sentence-transformers>=6.2", or leave mini_batch_size and mini_batch_num_tokens out'
            raise UserError(Fault(f"{LOSS}: mini_batch_size", found, expected, fix))

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """As `CachedLossMixin` asks for it.

        Args:
            reps: of each column the embeddings of its mini-batches.
            labels: a `Known`.
            with_backward: whether gradients of the embeddings are wanted at once.
        """
        loss = self._loss([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        return loss

    def _known(self, features: Sequence[Mapping[str, Any]]) -> Known:
        guided = isinstance(self.guide, ModelGuide | FixedGuide)
        if not guided and not self.options.mask_duplicates:
            return Known(None, None)
        columns = []
        if guided and self._ahead and TEXTS not in features[0]:
            logger.warning("%s: texts were embedded ahead, and batches come without them: %s", LOSS, USE_COLLATOR)
            self._ahead = False
        for column in features:
            decodes = guided and TEXTS not in column and self._reads_text()
            columns.append(column_of(column, self._decode if decodes else None))
        if len(rows := {len(column.hashes) for column in columns}) > 1:
            found = f"columns of {listed(map(str, sorted(rows)))} texts"
            fix = "give every row a text in each column; rows without a negative belong into a data set of their own"
            raise UserError(Fault(f"{LOSS}: a batch", found, "columns of as many texts each", fix))
        device = self._student.device
        ids = guides = None
        if self.options.mask_duplicates:
            ids = [torch.from_numpy(column.hashes[:, :8].copy().view(np.int64)[:, 0]).to(device) for column in columns]
        if guided:
            guides = [self._embeddings(column, min(role, 2), device) for role, column in enumerate(columns)]
        return Known(guides, ids)

    def _embeddings(self, column: Column, role: int, device: torch.device) -> Tensor:
        assert isinstance(self.guide, ModelGuide | FixedGuide)
        return torch.from_numpy(self.guide.embeddings(column, role, device)).to(device)

    def _reads_text(self) -> bool:
        """Whether the guide can't read the student's tokens. It is asked where there are no texts, for a guide may be loaded."""
        assert isinstance(self.guide, ModelGuide | FixedGuide)
        if self._decodes is None:
            self._decodes = not self.guide.tokenizes_like(self._student)
        return self._decodes

    def _decode(self, tokens: list[Tokens]) -> list[str]:
        tokenizer: Any = self._student.tokenizer
        texts: list[str] = tokenizer.batch_decode([ids.tolist() for ids in tokens], skip_special_tokens=True)
        return texts

    def _loss(self, embeddings: Sequence[Tensor], known: Known) -> Tensor:
        """Scalar: of the rows at hand, against all that are gathered."""
        gathered = gather(embeddings, known, across=self.gather_across_devices)
        if self.guide == "self":
            gathered = replace(gathered, guides=[part.detach() for part in gathered.students])
        given = gathered.given()
        total = embeddings[0].new_zeros((), dtype=torch.promote_types(embeddings[0].dtype, torch.float32))
        if self.options.weight:
            options = self.options.model_dump(exclude={"weight", "mask_duplicates", "votes"})
            total = total + self.options.weight * guided_contrastive_loss(**given, **options).loss
        if self.distillation.weight:
            options = self.distillation.model_dump(include={"temperature", "guide_temperature"})
            options |= self.options.model_dump(include={"block_size", "dimensions", "dimension_weights"})
            total = total + self.distillation.weight * distillation_loss(**given, **options).loss
        if self.distillation.regression:
            total = total + self.distillation.regression * self._regression(gathered)
        # Each process has its share of the mean over all rows, and the trainer averages gradients over processes.
        return total * len(gathered.sizes)

    def _regression(self, gathered: Gathered) -> Tensor:
        """Of this process' texts; summed over processes it is the mean over all texts."""
        assert gathered.guides is not None
        students, guides = gathered.students[gathered.rank], gathered.guides[gathered.rank]
        wide, narrow = guides.shape[1], students.shape[1]
        if wide > narrow:
            found = f"{self.distillation.regression:g}, and a guide of {wide} dimensions for a student of {narrow}"
            fix = "take distillation.weight, which compares similarities, or gist-train train, which cuts the guide's embeddings"
            raise UserError(Fault(f"{LOSS}: distillation.regression", found, "a guide that is no wider than the student", fix))
        return regression_loss(students, guides, map_to_width(np.empty((0, wide), np.float32), narrow)) / gathered.count

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss: the options that differ from the defaults, and the guide's name."""
        config: dict[str, Any] = {"guide": self._guide_name, "temperature": self.options.temperature}
        config |= self.options.model_dump(exclude_defaults=True)
        if self.distillation.on:
            config["distillation"] = self.distillation.model_dump(exclude_defaults=True)
        shared = ("mini_batch_size", "mini_batch_num_tokens", "gather_across_devices")
        return config | {name: vars(self)[name] for name in shared}

    @property
    def citation(self) -> str:
        """For the model card."""
        return bibtex("gistembed")


def _refuse_unlike(name: str, value: object, kind: Any, expected: str) -> None:
    """Raises UserError where an argument is of another kind than the one that is expected, in words."""
    if not isinstance(value, kind):
        raise UserError(Fault(f"{LOSS}: {name}", shown(value), expected, "give one of these"))
