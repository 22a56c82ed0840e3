"""Launches the smallest Triton kernel, to find out whether this machine can run any.

At its first launch Triton builds a helper, for which it needs a C compiler and Python's headers.
PyTorch's wheels bring Triton without these, so an installed Triton may still fail.
"""

# Triton's compiler gives kernels their types.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl


@triton.jit
def _one(X):  # written: one float32
    tl.store(X, 1.0)


def launch(device: torch.device) -> None:
    """Compiles a minimal Triton kernel and launches it on `device`, to find out whether Triton
    works there. Any error that Triton or the driver raises reaches the caller."""
    with torch.cuda.device(device):
        _one[(1,)](torch.zeros(1, device=device))
