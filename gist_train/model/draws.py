"""Draws of dropout inside Triton kernels: a function of seed, row and column alone, so that backward finds what forward drew."""

import triton
import triton.language as tl


def zeroed(dropout: float) -> int:
    """Of 2**31 values that a draw may have, those that zero an element."""
    return round(dropout * 2**31)


@triton.jit
def _mixed(x):
    """A uint32 with every bit stirred into every other: the last steps of MurmurHash3 (Appleby, in the public domain)."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def stirred(seed, head, rows, HEADS: tl.constexpr):
    """(n,) what the draws of some rows begin with. Seed, row and head go in one after another: no two rows share them."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mixed(_mixed(rows.to(tl.uint32) * HEADS + head + low) ^ high)


@triton.jit
def kept(of_rows, columns, dropped):
    """Whether elements stay: one draw of 31 bits for each row and column, the same whoever asks.

    Args:
        of_rows: of `stirred`, shaped so that it broadcasts with `columns`.
        dropped: what `zeroed` gave.
    """
    return (_mixed(of_rows ^ (columns.to(tl.uint32) * 0x9E3779B1)) >> 1).to(tl.int32) >= dropped
