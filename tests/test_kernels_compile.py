"""Every 16-bit kernel compiles for sm_90 (H100) ahead of time and keeps its work in registers. Needs no GPU: Triton brings ptxas."""

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
# What the UNet runs (no bias or region), in both dtypes; and everything at once, the most registers a kernel can ask for, in
# one dtype a head dim, by turns: the two differ in nothing that takes registers.
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
# GroupNorm: channels in a group at SD's levels, the way up's joined ones included; by channels (NCHW) and by cells
NORMS = [(size, layout) for size in (10, 30, 40, 80) for layout in ("sx_p", "sx_c")]
LOW = ("Q", "K", "V", "Out", "dO", "dQ", "dK", "dV", "bias", "X", "Add", "Weight", "Bias", "Y")
POINTERS = {**dict.fromkeys(("Lse", "Dsum", "Map", "G", "Mean", "M2"), "*fp32"), "region": "*i32"}
ALIGNED = ("sq_", "sk_", "sv_", "so_", "sx_", "P", "C", "share")


def compile_kernel(name, dtype, size, flags):
    """An attention kernel for head dim `size`, or a GroupNorm kernel for `size` channels a group
    -> (registers, stack bytes a thread: 0 means that nothing spilled, shared bytes)"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minsd.kernels import flash, groupnorm

    if name in flash.KERNELS:
        kernel, (constants, options) = flash.KERNELS[name], flash.configuration(name, size)
        constants |= {**flags, "PRECISION": "ieee"}
    else:
        kernel, (constants, options) = groupnorm.KERNELS[name], groupnorm.configuration(size, 1)
        constants |= flags
    kinds = {**POINTERS, **dict.fromkeys(LOW, f"*{dtype}")}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        number = "fp32" if argument in ("scale", "eps") else "i32"
        signature[argument] = "constexpr" if argument in constants else kinds.get(argument, number)
        if argument not in constants and (argument in kinds or argument.startswith(ALIGNED)):
            attributes[i,] = [
                ["tt.divisibility", 16]
            ]  # what the launcher finds out of aligned tensors by itself
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
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


def jobs():
    for i, d in enumerate(HEAD_DIMS):
        for name, variants in VARIANTS.items():
            for flags in variants:
                for dtype in (DTYPES[i % 2],) if flags["REGION"] else DTYPES:
                    yield name, dtype, d, flags
    for i, (size, layout) in enumerate(NORMS):
        for name in ("statistics", "normalise"):
            yield (
                name,
                DTYPES[i % 2],
                size,
                {"ADD": True, layout: 1} | ({"SILU": True} if name == "normalise" else {}),
            )


@pytest.fixture(scope="module")
def compiled():
    """All variants, compiled in processes of their own: this one may have imported the kernels as the interpreter's."""
    compiler = pytest.importorskip("triton.compiler", reason="no Triton on this platform")
    if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
        pytest.skip("Triton before 3.3 is told what to compile in another way")
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
        return [
            row for rows in pool.map(run, [(str(i), str(workers)) for i in range(workers)]) for row in rows
        ]


def main():
    """Every n-th job from the i-th on: python -m tests.test_kernels_compile i n"""
    first, workers = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, rather than remember
        for job in list(jobs())[first::workers]:
            print(json.dumps([*job, *compile_kernel(*job)]), flush=True)


@pytest.mark.parametrize("name", [*VARIANTS, "statistics", "normalise"])
def test_compiles_for_sm_90_without_spills(compiled, name):
    rows = [row for row in compiled if row[0] == name]
    assert len(rows) == len([job for job in jobs() if job[0] == name])
    for _, dtype, size, flags, registers, stack, shared in rows:
        assert stack == 0, (
            f"{name} {dtype} {size} {flags}: {stack} bytes of stack a thread, {registers} registers"
        )
        assert shared <= 232448, f"{name} {dtype} {size} {flags}: {shared} bytes of shared memory"


if __name__ == "__main__":
    main()
