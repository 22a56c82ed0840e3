"""Whether the Triton kernels can run on a CUDA device: asked once per process and device.

PyTorch computes the same where they cannot, so a machine on which Triton fails makes its pictures
after one warning. Nothing here reads a device's name: only what the device says it has.
"""

import importlib.util
import subprocess
import warnings

import torch

# Found once, at import: torch.compile cannot trace the search.
HAS_TRITON = importlib.util.find_spec("triton") is not None

_failures: dict[int, str | None] = {}


def failure(device: torch.device) -> str | None:
    """Why no kernel runs on this CUDA device, in one line; None if they run.

    The first question launches a tiny kernel, and warns if that fails.
    """
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
    if index not in _failures:
        _failures[index] = reason = _try(device)
        if reason is not None:
            warnings.warn(f"minsd runs without its Triton kernels, more slowly: {reason}", stacklevel=3)
    return _failures[index]


# torch.compile asks once and keeps the answer: neither a launch nor a warning can be traced. This is
# all that torch.compiler.assume_constant_result does, which would import Triton here.
failure.__dict__["_dynamo_marked_constant"] = True


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
