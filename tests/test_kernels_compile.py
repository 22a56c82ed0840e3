"""Every 16-bit kernel compiles for sm_90 (H100) ahead of time and keeps its work in registers. Needs no GPU: Triton brings ptxas."""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HEAD_DIMS = (8, 16, 32, 40, 64, 80, 160)
LIGHT = {"BIAS": False, "REGION": False}
FULL = {"BIAS": True, "REGION": True}
# What the UNet runs (no bias, both gradients), and everything at once: the most registers a kernel can ask for.
VARIANTS = {
    "forward": [{**LIGHT, "OUT": True}, {**FULL, "OUT": True}, {**LIGHT, "OUT": False}],
    "mean_map": [LIGHT, FULL],
    "grad_q": [{**LIGHT, "OUT": True, "MAP": True}, {**FULL, "OUT": True, "MAP": True}, {**LIGHT, "OUT": False, "MAP": True}],
    "grad_kv": [{**LIGHT, "OUT": True, "MAP": True}, {**FULL, "OUT": True, "MAP": True}],
}


def compile_kernel(name, dtype, head_dim, flags):
    """-> (registers, stack bytes a thread: 0 means that nothing spilled, shared bytes)"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minsd.kernels import flash

    kernel = flash.KERNELS[name]
    constants, options = flash.configuration(name, head_dim)
    constants = {**constants, **flags, "PRECISION": "ieee"}
    low = f"*{dtype}"
    pointers = {"Lse": "*fp32", "Dsum": "*fp32", "Map": "*fp32", "G": "*fp32", "bias": low, "region": "*i32", "scale": "fp32"}
    pointers |= dict.fromkeys(("Q", "K", "V", "Out", "dO", "dQ", "dK", "dV"), low)
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else pointers.get(argument, "i32")
        if argument in pointers and argument != "scale" or argument[:3] in ("sq_", "sk_", "sv_", "so_"):
            attributes[i,] = [["tt.divisibility", 16]]  # what the launcher finds out of aligned tensors by itself
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32), options=options,
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


def jobs(dtype, head_dim):
    return [(name, dtype, head_dim, flags) for name, variants in VARIANTS.items() for flags in variants]


@pytest.fixture(scope="module")
def compiled():
    """All variants, compiled in processes of their own: this one may have imported the kernels as the interpreter's."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(part):
        command = [sys.executable, "-m", "tests.test_kernels_compile", *part]
        process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
        assert process.returncode == 0, process.stderr[-3000:]
        return [json.loads(line) for line in process.stdout.splitlines()]

    cases = [f"{dtype}:{d}" for d in HEAD_DIMS for dtype in ("fp16", "bf16")]
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(run, [cases[i::workers] for i in range(workers)]) for row in rows]


def main():
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, rather than remember
        for case in sys.argv[1:]:
            dtype, d = case.split(":")
            for job in jobs(dtype, int(d)):
                print(json.dumps([*job, *compile_kernel(*job)]), flush=True)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_compiles_for_sm_90_without_spills(compiled, name):
    rows = [row for row in compiled if row[0] == name]
    assert len(rows) == len(VARIANTS[name]) * len(HEAD_DIMS) * 2
    for _, dtype, d, flags, registers, stack, shared in rows:
        assert stack == 0, f"{name} {dtype} d={d} {flags}: {stack} bytes of stack a thread, {registers} registers"
        assert shared <= 232448, f"{name} {dtype} d={d} {flags}: {shared} bytes of shared memory"


if __name__ == "__main__":
    main()
