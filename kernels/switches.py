"""Switches for choices on a GPU that are reasoned but not measured, for benches to compare.

The comment on each default says what is expected of it. No switch affects results on a CPU. On a
GPU they change the speed and the rounding, never the formula. A bench tries another value with

    with minsd.kernels.switches.use(heads_fastest=False): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Switches:
    # Order of the gradient kernels' programs. True: the heads of one block of rows follow one
    # another, and find that block of the map's gradient in the L2 cache. False: the blocks of one
    # head follow one another. True is expected to save most of the reads of the map's gradient at
    # 64x64 cells, and to make no difference at 16x16.
    heads_fastest: bool = True
    # Queries x keys from which the map is computed in blocks of 64 x 64, and from which in blocks
    # of 128 x 64. Larger blocks read q and k less often, but a small map has too few of them to
    # occupy every multiprocessor. Expected to be good.
    map_blocks_64: int = 1 << 18
    map_blocks_128: int = 1 << 22
    # True: Triton kernels compute GroupNorm's gradient. Expected to save two transposes of x and
    # an elementwise pass. False: where a gradient is needed, PyTorch computes norm and gradient.
    norm_gradient: bool = True


current = Switches()


@contextmanager
def use(**changes: bool | int) -> Iterator[Switches]:
    """Changes some switches within the block. Threads share them, so only one may use this."""
    global current
    before = current
    current = replace(before, **changes)
    try:
        yield current
    finally:
        current = before
