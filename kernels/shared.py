"""States how much of a GPU's shared memory each attention kernel needs, so that kernels that cannot
run are refused before they are launched.

Each entry is the most that the kernel needs with any of its flags, block sizes (flash.py) and, in
float32, precisions. The entries were found by compiling ahead of time: in 16 bits for sm_80, 86, 89,
90 and 120 with Triton 3.6.0 and 3.7.1, in float32 for sm_80 and sm_90 with Triton 3.7.1.
tests/test_kernels_compile.py compiles some of the kernels again. Compute capabilities 8.6, 8.9 and
12.0 have 99 KB (101376 bytes), 8.0 has 163 KB (166912), and 9.0 and 10.0 have 227 KB (232448). The
program reads the limit from the device (devices.py).
"""

import torch

# Major compute capabilities whose tensor cores read operands from shared memory, so that kernels
# need more of it.
HOPPER = (9, 10, 11)

# (kernel, head dim) -> bytes for 16-bit and for float32 inputs, then the same two on HOPPER.
NEEDED: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("forward", 8): (22528, 28672, 26624, 28672),
    ("mean_map", 8): (32768, 8192, 32768, 8192),
    ("grad_q", 8): (15360, 28672, 25904, 35112),
    ("grad_kv", 8): (15744, 31104, 15744, 30080),
    ("forward", 16): (22528, 28672, 26624, 28672),
    ("mean_map", 16): (32768, 8192, 32768, 8192),
    ("grad_q", 16): (15360, 28672, 25904, 35112),
    ("grad_kv", 16): (15744, 31104, 15744, 30080),
    ("forward", 32): (28672, 41216, 36864, 41216),
    ("mean_map", 32): (32768, 12288, 32768, 12288),
    ("grad_q", 32): (18432, 40960, 31024, 53544),
    ("grad_kv", 32): (20864, 45440, 20864, 42368),
    ("forward", 40): (34816, 53504, 47104, 61504),
    ("mean_map", 40): (32768, 16384, 37408, 16384),
    ("grad_q", 40): (30720, 61440, 42336, 65536),
    ("grad_kv", 40): (31104, 67968, 27008, 61824),
    ("forward", 64): (32768, 65536, 49152, 81920),
    ("mean_map", 64): (32768, 20480, 49152, 20480),
    ("grad_q", 64): (32768, 65536, 40960, 73728),
    ("grad_kv", 64): (20864, 49536, 20864, 49536),
    ("forward", 80): (38912, 77824, 59392, 102400),
    ("mean_map", 80): (32768, 24576, 61440, 24576),
    ("grad_q", 80): (43008, 86016, 53248, 98304),
    ("grad_kv", 80): (27008, 63872, 27008, 63872),
    ("forward", 160): (49152, 32832, 69632, 32832),
    ("mean_map", 160): (61440, 45056, 122880, 45056),
    ("grad_q", 160): (57344, 61440, 67584, 61440),
    ("grad_kv", 160): (53248, 71680, 73728, 71680),
}


def most_needed(head_dim: int, dtype: torch.dtype, hopper: bool) -> tuple[int, str]:
    """Returns (most, kernel): the number of bytes of shared memory that the most demanding
    attention kernel needs for this head dim and dtype, and the name of that kernel. The kernels of
    the gradient count too. `hopper` is True if the device's major compute capability is in
    `HOPPER`; kernels need more there."""
    column = 2 * hopper + (dtype == torch.float32)
    most, kernel = 0, ""
    for (name, d), row in NEEDED.items():  # a loop that torch.compile can trace
        if d == head_dim and row[column] > most:
            most, kernel = row[column], name
    return most, kernel
