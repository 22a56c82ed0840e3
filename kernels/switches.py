"""Switches for those choices on a GPU that rest on reasoning and not yet on measurements, so that
benches can compare them.

The comment on each default states what is expected of it. No switch affects results on a CPU. On a
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
    # The fewest elements of x for which Triton kernels compute a GroupNorm whose gradient is needed.
    # They are expected to save two transposes of x and an elementwise pass, but Python launches them
    # more slowly than PyTorch's (by an estimated 50 us per norm), so small norms are left to
    # PyTorch unless a CUDA graph replays them. None: PyTorch computes all of them.
    norm_gradient_from: int | None = 1 << 21
    # In channels_last a program of GroupNorm's kernels takes several groups at once. With 10 channels
    # per group it then reads and writes 16 bytes at a time instead of 4 (as compiled for sm_90),
    # which is expected to halve the time of such norms.
    wide_norm: bool = True
    # Maps of fewer probabilities than this (images x heads x queries x keys) are computed with all
    # of them in memory (materialised.py). 1 << 21 covers 16x16 cells of 8 heads for 3 images. 0 means
    # never, because equal speed is expected in eager mode and a loss in a CUDA graph, which launches
    # the Triton kernels at no cost.
    materialise_below: int = 0
    # Backend "sdpa" with maps takes the log-sum-exp of each row from PyTorch's attention instead of
    # computing the scores once more. Expected to save one of three products of q and k. Off until a
    # GPU has shown that the results agree, because PyTorch's operators for it are private.
    shared_lse: bool = False
    # PyTorch's attention tries cuDNN before its other kernels. Expected to be faster on capability
    # 9.0. Off until measured: some versions of PyTorch prefer cuDNN there by themselves.
    cudnn_first: bool = False


current = Switches()


@contextmanager
def use(**changes: bool | int | None) -> Iterator[Switches]:
    """A context manager. Within its `with` block the given switches (fields of `Switches`) have the
    given values; after it they have their former values again. Yields all switches as they are set
    within the block. All threads share the switches, so only one thread at a time may use this
    function."""
    global current
    before = current
    current = replace(before, **changes)
    try:
        yield current
    finally:
        current = before


@contextmanager
def in_a_graph() -> Iterator[None]:
    """A context manager, for use while a CUDA graph is captured. Within its `with` block
    `group_norm` uses its Triton kernels for small tensors that need a gradient, too. Outside a
    graph it leaves these to PyTorch, because Python launches Triton kernels more slowly; in a graph
    a launch costs nothing. If the switch `norm_gradient_from` is None, the context manager changes
    nothing."""
    least = None if current.norm_gradient_from is None else 0
    with use(norm_gradient_from=least):
        yield
