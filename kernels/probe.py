"""The smallest Triton kernel: launching it tells whether this machine can run any.

Triton builds a helper with the machine's C compiler at its first launch, and needs Python's headers
for it. PyTorch's wheels bring Triton but neither, so an installed Triton may still fail here.
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
    """Compile and launch it on `device`; raises whatever Triton or the driver raise."""
    with torch.cuda.device(device):
        _one[(1,)](torch.zeros(1, device=device))
