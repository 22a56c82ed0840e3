"""Every 16-bit kernel compiles for sm_90 (H100) ahead of time and keeps its work in registers.

It needs no GPU: Triton brings ptxas.
"""

import inspect
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
# In both dtypes: no bias or region, as the UNet runs them. In one dtype per head dim, alternating:
# both, which need the most registers. The dtype makes no difference to the registers needed.
VARIANTS = {
    "forward": [{**LIGHT, "OUT": True}, {**LIGHT, "OUT": False}, {**FULL, "OUT": True}],
    "mean_map": [LIGHT, FULL],
    "grad_q": [
        {**LIGHT, "OUT": True, "MAP": True},
        {**LIGHT, "OUT": False, "MAP": True},
        {**FULL, "OUT": True, "MAP": True},
    ],
    "grad_kv": [{**LIGHT, "OUT": True, "MAP": True}, {**FULL, "OUT": True, "MAP": True}],
}
DTYPES = ("fp16", "bf16")
# Channels per GroupNorm group at SD's levels, with and without skips; NCHW and channels_last.
NORMS = [(size, layout) for size in (10, 30, 40, 80) for layout in ("sx_p", "sx_c")]
LOW = ("Q", "K", "V", "Out", "dO", "dQ", "dK", "dV", "bias", "X", "Add", "Weight", "Bias", "Y")
POINTERS = {**dict.fromkeys(("Lse", "Dsum", "Map", "G", "Mean", "M2"), "*fp32"), "region": "*i32"}
ALIGNED = ("sq_", "sk_", "sv_", "so_", "sx_", "P", "C", "chunk")


def compile_kernel(name, dtype, size, flags):
    """Compile a kernel: `size` is attention's head dim or GroupNorm's channels per group.

    Returns registers, stack bytes per thread (0: nothing spilled) and bytes of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minsd.kernels import flash, groupnorm

    if name in flash.KERNELS:
        kernel = flash.KERNELS[name]
        sizes, options = flash.configuration(name, size)
        constants = {**sizes, **flags, "PRECISION": "ieee"}
    else:
        kernel = groupnorm.KERNELS[name]
        sizes, options = groupnorm.configuration(size, 1)
        constants = {**sizes, **flags}
    kinds = {**POINTERS, **dict.fromkeys(LOW, f"*{dtype}")}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        number = "fp32" if argument in ("scale", "eps") else "i32"
        signature[argument] = "constexpr" if argument in constants else kinds.get(argument, number)
        if argument not in constants and (argument in kinds or argument.startswith(ALIGNED)):
            attributes[i,] = [["tt.divisibility", 16]]  # as the launcher finds for aligned tensors
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), compiled.metadata.shared


def jobs():
    """Yields (kernel, dtype, head dim or channels per group, flags)."""
    for i, d in enumerate(HEAD_DIMS):
        for name, variants in VARIANTS.items():
            for flags in variants:
                for dtype in (DTYPES[i % 2],) if flags["REGION"] else DTYPES:
                    yield name, dtype, d, flags
    for i, (size, layout) in enumerate(NORMS):
        for name in ("statistics", "normalise"):
            flags = {"ADD": True, layout: 1}
            if name == "normalise":
                flags["SILU"] = True
            yield name, DTYPES[i % 2], size, flags


@pytest.fixture(scope="module")
def compiled():
    """All variants, compiled in other processes: in this one the kernels may be interpreted."""
    compiler = pytest.importorskip("triton.compiler", reason="no Triton on this platform")
    if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
        pytest.skip("Triton before 3.3 takes its constants in another form")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(part):
        command = [sys.executable, "-m", "tests.test_kernels_compile", *part]
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return [json.loads(line) for line in process.stdout.splitlines()]

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(run, [(str(i), str(workers)) for i in range(workers)])
        return [row for rows in parts for row in rows]


def main():
    """Every n-th job from the i-th on: python -m tests.test_kernels_compile i n"""
    first, workers = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, rather than reuse
        for job in list(jobs())[first::workers]:
            print(json.dumps([*job, *compile_kernel(*job)]), flush=True)


@pytest.mark.parametrize("name", [*VARIANTS, "statistics", "normalise"])
def test_compiles_for_sm_90_without_spills(compiled, name):
    rows = [row for row in compiled if row[0] == name]
    assert len(rows) == len([job for job in jobs() if job[0] == name])
    for _, dtype, size, flags, registers, stack, shared in rows:
        variant = f"{name} {dtype} {size} {flags}"
        assert stack == 0, f"{variant}: {stack} bytes of stack per thread, {registers} registers"
        assert shared <= 232448, f"{variant}: {shared} bytes of shared memory"


if __name__ == "__main__":
    main()
