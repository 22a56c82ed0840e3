"""Whether the Triton kernels can run on a CUDA device: asked once per process and device.

PyTorch computes the same where they cannot, so a machine on which Triton fails makes its pictures
after one warning. Nothing here reads a device's name: only what the device says it has.
"""

import importlib.util
import subprocess
import warnings

import torch

from .shared import HOPPER, most_needed

# Found once, at import: torch.compile cannot trace the search.
HAS_TRITON = importlib.util.find_spec("triton") is not None

LEAST = (8, 0)  # compute capability

_failures: dict[int, str | None] = {}


def failure(device: torch.device) -> str | None:
    """Why no kernel runs on this CUDA device, in one line; None if they run.

    The first question launches a tiny kernel, and warns if that fails. A device that is too old for
    the kernels gives no warning: nothing is wrong with it.
    """
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
    if index not in _failures:
        reason = _too_old(device)
        if reason is None:
            reason = _try(device)
            if reason is not None:
                warnings.warn(f"minsd runs without its Triton kernels, more slowly: {reason}", stacklevel=3)
        _failures[index] = reason
    return _failures[index]


def short_of_memory(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels do not fit into this device's shared memory; None if they do."""
    limit, hopper = shared_memory(device)
    if limit is None:  # ROCm, or a PyTorch that cannot tell: Triton will
        return None
    most, name = most_needed(head_dim, dtype, hopper)
    if most <= limit:
        return None
    return f"{name} with head dim {head_dim} needs {most} bytes of shared memory, the device has {limit}"


def shared_memory(device: torch.device) -> tuple[int | None, bool]:
    """Bytes of shared memory a block of threads may ask for, and whether `most_needed` is
    Hopper's.
    """
    if torch.version.hip is not None:
        return None, False
    have = torch.cuda.get_device_properties(device)
    return getattr(have, "shared_memory_per_block_optin", None), have.major in HOPPER


# torch.compile asks once and keeps the answer: neither a launch nor a warning can be traced. This
# is all that torch.compiler.assume_constant_result does, which would import Triton here.
failure.__dict__["_dynamo_marked_constant"] = True
shared_memory.__dict__["_dynamo_marked_constant"] = True


def _too_old(device: torch.device) -> str | None:
    """On a T4 (7.5) half the variants pass its shared memory and the others spill kilobytes."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    have = torch.cuda.get_device_capability(device)
    if have >= LEAST:
        return None
    return f"the kernels need compute capability {LEAST[0]}.{LEAST[1]}, the device has {have[0]}.{have[1]}"


def _try(device: torch.device) -> str | None:
    try:
        _launch(device)
    except Exception as error:  # whatever it is: PyTorch can do the work
        first = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, subprocess.CalledProcessError):
            first = f"its command {error.cmd[0]} failed"  # the rest is a long list of arguments
        if isinstance(error, subprocess.CalledProcessError) or "compiler" in first:
            first += "; install a C compiler and Python's headers (Debian: gcc python3-dev)"
        return f"Triton cannot launch a kernel here ({type(error).__name__}: {first[:200]})"
    return None


def _launch(device: torch.device) -> None:
    from . import probe  # imports Triton

    probe.launch(device)
