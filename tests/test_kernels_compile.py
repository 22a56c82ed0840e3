"""The kernels compile ahead of time for several GPUs and keep their work in registers.

It needs no GPU: Triton brings ptxas.
"""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

LIGHT = {"BIAS": False, "REGION": False}
FULL = {"BIAS": True, "REGION": True}
# As the UNet runs them, and with a bias and a region, which need the most registers. The dtype makes
# no difference to the registers needed.
FLAGS = {"forward": {"OUT": True}, "mean_map": {}}
FLAGS["grad_q"] = FLAGS["grad_kv"] = {"OUT": True, "MAP": True}
DTYPES = ("fp16", "bf16")
ARCHITECTURES = (80, 86, 90)  # in turn; besides, 120 (RTX 5090) spills first and has every variant
SPILL = 64  # bytes of stack a thread: a few registers, kept in the L1 cache
LIMITS = {80: 166912, 86: 101376, 90: 232448, 120: 101376}  # bytes of shared memory
# Channels per GroupNorm group at SD's levels, with and without skips; NCHW and channels_last.
NORMS = [(10, "sx_p"), (30, "sx_c"), (80, "sx_p"), (40, "sx_c"), (10, "sx_c")]
LOW = ("Q", "K", "V", "Out", "dO", "dQ", "dK", "dV", "bias", "X", "Add", "Weight", "Bias", "Y", "dY", "dX")
POINTERS = {
    **dict.fromkeys(("Lse", "Dsum", "Map", "G", "Mean", "M2", "SumE", "SumEX"), "*fp32"),
    "region": "*i32",
}
ALIGNED = ("sq_", "sk_", "sv_", "so_", "sx_", "P", "C", "chunk")


def compile_kernel(name, dtype, size, flags, architecture, pairs):
    """Compile a kernel: `size` is attention's head dim or GroupNorm's channels per group.

    `pairs` is queries x keys, from which large maps get other blocks.

    Returns registers, stack bytes per thread (0: nothing spilled) and bytes of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minsd.kernels import flash, groupnorm

    if name in flash.KERNELS:
        kernel = flash.KERNELS[name]
        sizes, options = flash.configuration(
            name, size, wide=dtype == "fp32", masked=flags["REGION"], pairs=pairs
        )
        constants = {**sizes, **flags, "PRECISION": "ieee"}
    else:
        kernel = groupnorm.KERNELS[name]
        gb = groupnorm.groups_per_block(size * 32, 32, "sx_c" in flags, 4 if dtype == "fp32" else 2)
        sizes, options = groupnorm.configuration(size, 1, gb)
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
        target=GPUTarget("cuda", architecture, 32),
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
    """Yields (kernel, dtype, head dim or channels per group, flags, architecture, pairs)."""
    turn = itertools.count()
    for d in (40, 64, 80, 160):
        for name, flags in FLAGS.items():
            for hidden in (LIGHT, FULL):
                yield name, DTYPES[next(turn) % 2], d, {**hidden, **flags}, 120, 0
            architecture = ARCHITECTURES[next(turn) % 3]
            yield name, "fp16", d, {**FULL, **flags}, architecture, 0
        yield "mean_map", "fp16", d, LIGHT, 90, 1 << 22
        yield "mean_map", "fp16", d, LIGHT, 86, 1 << 18
    for d in (8, 16, 32):
        yield "forward", "bf16", d, {**FULL, "OUT": True}, 120, 0
    yield "forward", "fp16", 160, {**LIGHT, "OUT": False}, 80, 0
    yield "mean_map", "fp32", 40, FULL, 86, 0
    for size, layout in NORMS:
        for name in ("statistics", "normalise", "gradient_sums", "gradient"):
            flags = {"ADD": True, layout: 1}
            if name != "statistics":
                flags["SILU"] = True
            yield name, DTYPES[next(turn) % 2], size, flags, (*ARCHITECTURES, 120)[next(turn) // 2 % 4], 0


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


@pytest.mark.parametrize("name", [*FLAGS, "statistics", "normalise", "gradient_sums", "gradient"])
def test_compiles_without_spills(compiled, name):
    rows = [row for row in compiled if row[0] == name]
    assert len(rows) == len([job for job in jobs() if job[0] == name])
    for _, dtype, size, flags, architecture, pairs, registers, stack, shared in rows:
        variant = f"{name} {dtype} {size} {flags} sm_{architecture} {pairs}"
        assert stack <= SPILL, f"{variant}: {stack} bytes of stack per thread, {registers} registers"
        assert shared <= LIMITS[architecture], f"{variant}: {shared} bytes of shared memory"


def test_the_table_of_shared_memory_is_what_the_compiler_says(compiled):
    from minsd.kernels.shared import HOPPER, NEEDED

    equal = 0
    for name, dtype, size, _, architecture, _, *_, shared in compiled:
        if name in FLAGS:
            column = 2 * (architecture // 10 in HOPPER) + (dtype == "fp32")
            assert shared <= NEEDED[name, size][column]
            equal += shared == NEEDED[name, size][column]
    assert equal >= 16  # the table gives the most any flags need, so no slack for all of them


if __name__ == "__main__":
    main()
