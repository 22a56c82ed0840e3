"""Finds out whether the Triton kernels can run on a CUDA device. The result is kept for the rest of
the process.

If the kernels cannot run, PyTorch computes the same results, so a machine on which Triton fails
still makes images, after one warning. The decision depends on the device's reported capability and
shared memory, never on its name.
"""

import importlib.util
import subprocess  # nosec B404: runs fixed commands only
import warnings

import torch

from .shared import HOPPER, most_needed

# Found once, at import: torch.compile cannot trace the search.
HAS_TRITON = importlib.util.find_spec("triton") is not None

LEAST = (8, 0)  # compute capability

_failures: dict[int, str | None] = {}


def failure(device: torch.device) -> str | None:
    """Returns None if Triton kernels can run on this CUDA device. Otherwise returns the reason why
    they cannot, a text of one line.

    The first call for a device launches a tiny kernel, and issues a warning if the launch fails. A
    device that is too old gets no launch and no warning, because nothing is wrong with it. Later
    calls return the stored result.
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
    """Returns None if the CUDA device has enough shared memory for the attention kernels of this
    head dim and dtype, or if it is not known how much it has. Otherwise returns a text of one line
    that states how much is needed and how much the device has."""
    limit, hopper = shared_memory(device)
    if limit is None:  # ROCm, or an old PyTorch: Triton raises where it matters
        return None
    most, name = most_needed(head_dim, dtype, hopper)
    if most <= limit:
        return None
    return f"{name} with head dim {head_dim} needs {most} bytes of shared memory, the device has {limit}"


def shared_memory(device: torch.device) -> tuple[int | None, bool]:
    """Returns (limit, hopper) for a CUDA device. `limit` is the number of bytes of shared memory
    that a block of threads may use, or None if it is not known. `hopper` is True if the device is
    of the Hopper or a similar generation (`HOPPER` in shared.py), on which kernels need more shared
    memory."""
    if torch.version.hip is not None:
        return None, False
    have = torch.cuda.get_device_properties(device)
    return getattr(have, "shared_memory_per_block_optin", None), have.major in HOPPER


# torch.compile calls these functions once and keeps the answer, because neither a launch nor a
# warning can be traced. torch.compiler.assume_constant_result does only this, but imports Triton.
failure.__dict__["_dynamo_marked_constant"] = True
shared_memory.__dict__["_dynamo_marked_constant"] = True


def _too_old(device: torch.device) -> str | None:
    """Returns None if the device's compute capability is high enough for the Triton kernels, or if
    there is no CUDA. Otherwise returns the reason why it is too low, a text of one line.

    On a T4, for example, which has capability 7.5, half of the kernels' variants need more shared
    memory than the device has, and the other half spill kilobytes of registers.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    have = torch.cuda.get_device_capability(device)
    if have >= LEAST:
        return None
    return f"the kernels need compute capability {LEAST[0]}.{LEAST[1]}, the device has {have[0]}.{have[1]}"


def _try(device: torch.device) -> str | None:
    try:
        _launch(device)
    except Exception as error:  # of any kind, because PyTorch can do the work
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
