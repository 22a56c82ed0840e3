"""What a bench may turn: choices on a GPU that are reasoned, not measured.

Each default says what is expected. None of them touches a result on a CPU, and none changes what is
computed, only how fast and with which rounding. A bench tries another with

    with minsd.kernels.switches.use(heads_fastest=False): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Switches:
    # Grid of the gradient kernels: all heads of a block of rows run side by side, and share its
    # rows of the map's gradient in the L2 cache. False: one head after another. Expected to save
    # most of the reads at 64x64 cells, and to make no difference at 16x16.
    heads_fastest: bool = True
    # Queries x keys from which the map is made in larger blocks, which read q and k less often, and
    # from which in the largest. Expected; below the first, small blocks fill more processors.
    map_blocks_64: int = 1 << 18
    map_blocks_128: int = 1 << 22
    # GroupNorm's gradient by kernels. Expected to save two transposes of x and an elementwise pass.
    norm_gradient: bool = True


current = Switches()


@contextmanager
def use(**changes: bool | int) -> Iterator[Switches]:
    """Within the block, some switches differ; not for several threads at once."""
    global current
    before = current
    current = replace(before, **changes)
    try:
        yield current
    finally:
        current = before
