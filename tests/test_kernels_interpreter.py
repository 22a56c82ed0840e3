"""The Triton kernels' own tests, run in Triton's interpreter, which needs no GPU.

Triton chooses between compiler and interpreter when a kernel is decorated, so the interpreter gets a
process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
FILES = ("tests/test_kernels_flash.py", "tests/test_kernels_groupnorm.py")


def test_in_the_interpreter():
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton before 3.7 cannot interpret loops with NumPy 2.4 or later")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES]
    process = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert process.returncode == 0 and " passed" in process.stdout, (
        process.stdout[-5000:] + process.stderr[-2000:]
    )
