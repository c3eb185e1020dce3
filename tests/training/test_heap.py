"""Holes in the C library's heap are given back where the process has grown beyond what its first steps took."""

import sys

import numpy as np
import pytest

from gist_train.training import heap as heaps
from gist_train.training.heap import Heap, resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is trimmed")
MIB = 2**20


def holes():
    """Leaves 256 MiB of freed pieces in the heap, each between two that are kept: as much is resident as if all were used."""
    pieces = [np.ones(MIB // 64 // 8) for _ in range(32 * 1024)]
    kept = pieces[::2]
    del pieces
    return kept


def test_holes_are_given_back(monkeypatch):
    """Over days they pile up until the machine is out of memory, though nothing is lost."""
    monkeypatch.setattr(heaps, "SETTLED", 2)
    heap = Heap()
    heap.after_step()
    heap.after_step()
    before = resident()
    kept = holes()
    grown = resident()
    assert grown - before > 400 * MIB
    heap.after_step()
    assert grown - resident() > 150 * MIB
    assert len(kept) == 16 * 1024


def test_a_process_that_uses_more_is_not_trimmed_at_every_step(monkeypatch):
    """What an evaluation has loaded is in use: to give back nothing at each step takes its time for nothing."""
    monkeypatch.setattr(heaps, "SETTLED", 1)
    heap, trimmed = Heap(), []
    real = heap._trim
    monkeypatch.setattr(heap, "_trim", lambda pad: trimmed.append(real(pad)))
    heap.after_step()
    used = np.ones(max(400 * MIB, resident() // 2) // 8)
    for _ in range(5):
        heap.after_step()
    assert len(trimmed) == 1
    assert used[-1] == 1
