"""How the work is cut into programs: plain numbers and pure functions, importable without Triton.

None of them has been measured on a GPU yet; bench/gpu.py is what measures them.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program works on: whole filters of one row, so many numbers of each at a time."""

    filters: int
    lanes: int


NARROW = Tile(filters=4, lanes=256)
"""For filters of up to 256 numbers."""

WIDE = Tile(filters=1, lanes=1024)
"""For longer filters."""

FLAT = Tile(filters=128, lanes=1)
"""For filters of one number: a norm's scale and shift, a bias."""

LAW_LANES = 256
"""Filters at a time where a law is applied to a whole layer: more would cost every program registers."""

THREADS = 128
"""Of a program: each holds 8 numbers, which are two loads of 16 bytes in float32 and one in bfloat16."""


def measuring_registers(accumulator_bytes: int) -> int:
    """Registers that a thread of `measure` or `charge` may have on CUDA, enough to need no memory instead.

    Left to itself ptxas 12.8 puts a value of `measure` on the stack in float64, and 12.9 goes down to 40 in
    `charge` for sm_80.
    """
    return 56 if accumulator_bytes == 4 else 96


def filters_a_tile(size: int) -> int:
    """How many filters of `size` numbers one program takes."""
    if size == 1:
        return FLAT.filters
    return (NARROW if size <= NARROW.lanes else WIDE).filters


def warps(warp_size: int) -> int:
    """Warps of a program where a warp has `warp_size` threads."""
    return max(THREADS // warp_size, 1)
