"""The guide's store built by several processes, of one run or of several: each text once, whoever dies.

Legend: N texts of a corpus, G the guide's width.
"""

import io
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.running import QUIET, exit_code_of, in_processes

from gist_train import training_run
from gist_train.config.loading import load_config
from gist_train.config.models import GuideConfig
from gist_train.config.schema import cache_folder
from gist_train.data.corpus import text_hash
from gist_train.model import filling as filling_module
from gist_train.model import guide as guide_module
from gist_train.model.checksums import HEADER
from gist_train.model.device import this_device
from gist_train.model.guide import GuideStore, store_folder
from gist_train.model.loading import load_guide
from gist_train.model.pretrained import Pretrained
from gist_train.preparation import prepare_corpus
from gist_train.training.distributed import make_accelerator
from gist_train.training.embedding import Processes, prepare_guide

pytestmark = pytest.mark.usefixtures("on_cpu")

PART = 8
"""Texts between two writes, in these tests."""
WIDTH = 48
"""Of the guide's embeddings."""


def watched(patch: pytest.MonkeyPatch, on_call: Callable[[int], object] = lambda _: None) -> list[list[str]]:
    """Texts that this process' guide tokenises from here on, call by call; `on_call` is told the number of each call first."""
    read: list[list[str]] = []
    real, calls = Pretrained.tokens, itertools.count(1)

    def tokens(self: Pretrained, texts: Sequence[str]) -> Any:
        if self.width == WIDTH:  # the student has another
            on_call(next(calls))
            read.append(list(texts))
        return real(self, texts)

    patch.setattr(Pretrained, "tokens", tokens)
    return read


def in_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(filling_module, "TEXTS_PER_WRITE", PART)
    patch.setattr(filling_module, "FEWEST_TEXTS", PART)
    patch.setattr(guide_module, "POLL_SECONDS", 0.01)


def prepared(path: Path, on_call: Callable[[int], object] = lambda _: None) -> tuple[list[list[str]], np.ndarray]:
    """`prepare_guide` as one process of a run: the texts that it embedded, call by call, and (N, G) the corpus' embeddings."""
    accelerator, _ = make_accelerator("float32")
    config = load_config(path)
    corpus = prepare_corpus(config, accelerator.device, QUIET)
    processes = Processes(accelerator.num_processes, False)
    with pytest.MonkeyPatch.context() as patch:
        in_parts(patch)
        read = watched(patch, on_call)
        accelerator.wait_for_everyone()
        look_up = prepare_guide(config, corpus, accelerator.device, QUIET, processes)
    return read, look_up.anchor.embeddings(np.arange(corpus.text_count)).numpy()


def prepared_slowly(path: Path) -> tuple[list[list[str]], np.ndarray]:
    """`prepared`, each part taking long enough for the others to get theirs."""
    return prepared(path, lambda _: time.sleep(0.03))


def flat(parts: Sequence[Sequence[str]]) -> list[str]:
    return [text for part in parts for text in part]


def corpus_of(path: Path) -> tuple[list[str], Path]:
    """The texts, and where their store is."""
    config = load_config(path)
    corpus = prepare_corpus(config, this_device(), QUIET)
    return [corpus.text(i) for i in range(corpus.text_count)], store_folder(cache_folder(config), config.guide, "guide")


def assert_whole(folder: Path, count: int) -> None:
    """The files hold each text once and nothing else, and nobody's claim is left."""
    hashes = (folder / "hashes.bin").read_bytes()
    assert len({hashes[i : i + 16] for i in range(0, len(hashes), 16)}) == len(hashes) / 16 == count
    assert (folder / "embeddings.bin").stat().st_size == count * WIDTH * 4
    assert (folder / "checksums.bin").stat().st_size == HEADER.size + 8 * count
    assert not GuideStore(folder).damaged(np.arange(count)).any()
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.bin",
        "embeddings.bin",
        "hashes.bin",
        "meta.json",
    ]


@pytest.fixture
def config(make_model) -> GuideConfig:
    return GuideConfig(name=str(make_model(width=WIDTH, layers=1, cased=True, vocabulary=300, seed=1)), dtype="float32")


@pytest.fixture
def texts(quickstart_texts) -> list[str]:
    return list(dict.fromkeys(quickstart_texts))[:40]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_pass(write_config, tmp_path, processes):
    """Seven of eight GPUs that idle through the longest pass there is. Each text is embedded once over all ranks, the longest
    first on each, and the store says what one process alone makes it say, bit for bit: what is embedded together is the same."""
    path = write_config(cache_dir=str(tmp_path / "together"))
    texts, folder = corpus_of(path)
    found = [result for _, result in in_processes(processes, prepared_slowly, path)]
    _, alone = prepared(write_config("alone", cache_dir=str(tmp_path / "alone")))
    for parts, vectors in found:
        assert len(parts) >= 3
        assert all(0 < len(part) <= PART for part in parts)
        lengths = [len(text.encode()) for text in flat(parts)]
        assert lengths == sorted(lengths, reverse=True)
        np.testing.assert_array_equal(vectors, alone)
    assert sorted(flat([flat(parts) for parts, _ in found])) == sorted(texts)
    assert_whole(folder, len(texts))


def killed(path: Path, when: str) -> None:
    """`prepared`, until this process is killed in its third part."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    appended, real = itertools.count(1), filling_module._append

    def append(descriptor: int, data: bytes) -> None:
        number = next(appended)
        # Header, embeddings, checksums and hashes of the first part, and the last three of each further one.
        if number == {"within an embedding": 8, "within a checksum": 9, "within a hash": 10}.get(when):
            os.write(descriptor, data[: len(data) // 2 - 3])
            die()
        real(descriptor, data)
        if number == 8 and when == "between the writes":
            die()

    filling_module._append = append
    prepared(path, lambda number: die() if number == 3 and when == "while it embeds" else None)


@pytest.mark.parametrize(
    "when",
    [
        "while it embeds",
        "within a hash",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("within an embedding", "between the writes", "within a checksum")
        ),
    ],
)
def test_a_killed_process_loses_its_part_alone(write_config, tmp_path, when):
    """Power cuts and out-of-memory killers ask nobody. Two parts stay, with what is whole of the third; another number of
    processes goes on from there."""
    path = write_config()
    texts, folder = corpus_of(path)
    assert exit_code_of(killed, path, when) == -signal.SIGKILL
    assert len(list(folder.glob(".claim-*"))) == 1
    there = GuideStore(folder)
    kept = len(there)
    assert kept == 2 * PART + (PART // 2 - 1 if when == "within a hash" else 0)
    known = there.positions(np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16)) >= 0
    found = [result for _, result in in_processes(2, prepared_slowly, path)]
    embedded = flat([flat(parts) for parts, _ in found])
    assert sorted(embedded) == sorted(text for text, stands in zip(texts, known, strict=True) if not stands)
    assert_whole(folder, len(texts))
    _, alone = prepared(write_config("alone", cache_dir=str(tmp_path / "alone")))
    for _, vectors in found:
        np.testing.assert_allclose(vectors, alone, rtol=0, atol=1e-6)


def filling(
    folder: Path, guide: Pretrained, config: GuideConfig, texts: Sequence[str], processes: int = 1, loads: list[int] | None = None
) -> Iterator[int]:
    """One process' part in the build, step by step. `loads` grows where the guide is asked for."""

    def load() -> Pretrained:
        if loads is not None:
            loads.append(1)
        return guide

    hashes = np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16)
    lengths = np.array([len(text.encode()) for text in texts])
    return GuideStore(folder).fill_together(load, config, hashes, lengths, texts.__getitem__, processes)


def test_two_runs_with_other_texts(tmp_path, monkeypatch, config, texts):
    """Runs over two corpora that share texts fill one store at the same time, turn by turn: what both need is embedded once."""
    in_parts(monkeypatch)
    read = watched(monkeypatch)
    guide = load_guide(config)
    counts: list[list[int]] = [[], []]
    builds = [filling(tmp_path / "s", guide, config, some) for some in (texts[:25], texts[15:])]
    for turn in itertools.zip_longest(*builds):
        for count, of in zip(turn, counts, strict=True):
            of += [] if count is None else [count]
    assert sorted(flat(read)) == sorted(texts)
    assert_whole(tmp_path / "s", len(texts))
    assert [of[-1] for of in counts] == [25, 25]
    assert all(of == sorted(of) for of in counts)
    assert max(len(part) for part in read) == PART


def test_others_take_over_from_a_process_that_ended(tmp_path, monkeypatch, config, texts):
    """Where the launcher kills nobody, the others finish; meanwhile they wait, without the guide in memory."""
    monkeypatch.setattr(guide_module, "POLL_SECONDS", 0.001)
    read = watched(monkeypatch)
    guide = load_guide(config)
    first = filling(tmp_path / "s", guide, config, texts)
    next(first)  # has taken all there is
    loads: list[int] = []
    second = filling(tmp_path / "s", guide, config, texts, loads=loads)
    assert [next(second) for _ in range(3)] == [0, 0, 0]
    assert loads == []
    first.close()
    assert list(second)[-1] == len(texts)
    assert loads == [1]
    assert sorted(flat(read)) == sorted(texts * 2)
    assert_whole(tmp_path / "s", len(texts))


def test_an_unseen_claim_stores_no_text_twice(tmp_path, monkeypatch, config, texts):
    """Over a network a folder's listing may be a minute old: two machines then embed the same texts, and one of them stores."""
    monkeypatch.setattr(guide_module.Claims, "others", lambda _: [])
    read = watched(monkeypatch)
    guide = load_guide(config)
    for _ in itertools.zip_longest(*(filling(tmp_path / "s", guide, config, texts) for _ in range(2))):
        pass
    assert sorted(flat(read)) == sorted(texts * 2)
    assert_whole(tmp_path / "s", len(texts))


def test_each_counts_what_all_have_done(tmp_path, monkeypatch, config, texts):
    """A bar of this process' texts alone would stop at half, and its estimate of the time left be twice too long."""
    in_parts(monkeypatch)
    guide = load_guide(config)
    builds = [filling(tmp_path / "s", guide, config, texts) for _ in range(2)]
    # 40 texts in parts of 8: what is stored, and the part that was just embedded.
    assert [next(builds[turn % 2]) for turn in range(6)] == [8, 8, 16, 24, 32, 32]
    assert [list(build)[-1] for build in builds] == [40, 40]


@pytest.mark.parametrize("turns", [(0, 1, 2), (0, 0, 1, 2, 2, 2), (2, 1, 0, 0)])
def test_the_last_texts_are_shared_out(tmp_path, monkeypatch, config, texts, turns):
    """Parts of 2,048 would leave all but one of eight ranks without any of a small corpus. Who is faster must not change what is
    embedded together: the store's bits, and with them a training's, would hang on it."""
    monkeypatch.setattr(filling_module, "FEWEST_TEXTS", 2)
    read = watched(monkeypatch)
    guide = load_guide(config)
    builds = [filling(tmp_path / "s", guide, config, texts, processes=3) for _ in range(3)]
    for build in builds:
        next(build)
    for turn in itertools.cycle(turns):
        if next(builds[turn], None) is None:
            break
    lengths = sorted((len(text.encode()) for text in texts), reverse=True)
    for part in read:  # half a share of the bytes that are left: a sixth of them, or the fewest
        bytes_taken = [sum(lengths[: count + 1]) for count in range(len(lengths))]
        expected = sum(taken < sum(lengths) // 6 for taken in bytes_taken)
        assert len(part) == min(len(lengths), max(2, expected))
        lengths = lengths[len(part) :]
    assert not lengths
    assert flat(read) == sorted(texts, key=lambda text: -len(text.encode()))


def opened(path: Path) -> tuple[int, str]:
    """`open_job` of `train`: how many texts this rank embedded, and what it showed."""
    accelerator, _ = make_accelerator("float32")
    console = Console(file=io.StringIO(), quiet=not accelerator.is_main_process, width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling_module, "FEWEST_TEXTS", PART)
        read = watched(patch, lambda _: time.sleep(0.1))
        training_run.open_job(load_config(path), accelerator, console)
    return len(flat(read)), console.file.getvalue()


def test_a_training_shares_it_and_one_rank_shows_all(write_config):
    """The bar of a rank that counted its own texts would end at half; those of eight ranks would overwrite each other."""
    path = write_config()
    texts, _ = corpus_of(path)
    counts, shown = zip(*(result for _, result in in_processes(2, opened, path)), strict=True)
    assert min(counts) > 0
    assert sum(counts) == len(texts)
    to_do = re.search(r"embedding with the guide: (\d+) to do", shown[0])
    assert to_do is not None
    assert counts[0] < int(to_do[1]) <= len(texts)  # fewer than all where the other rank began first
    assert f"embedding with the guide: {to_do[1]} done" in shown[0]
    assert "embedding" not in shown[1]
