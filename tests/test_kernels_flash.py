"""The attention kernels against float64 autograd.

They run on a GPU if there is one, else in Triton's interpreter through test_kernels_interpreter.py.
Shapes are small and each awkward for
a reason: lengths just beside and across the blocks of 32 and 64, 77 keys.
"""

import os

import pytest
import torch

import minsd  # noqa: F401  (settles the import path)

pytest.importorskip("triton", reason="no Triton on this platform")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
HEAD_DIMS = (8, 16, 32, 40, 64, 80, 160)
# Relative norm. Float32 is given twice what the interpreter's arithmetic needs: a GPU adds d products
# one after another and approximates exp2 and log2, which alone comes to 4.7e-7 at d = 80, masked.
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
EXACT = DTYPES[torch.float32]
# B, N, M, heads: N below a block, across two; M = 77, N itself, one more than a block
SHAPES = {
    8: (2, 33, 77, 3),
    16: (1, 64, 64, 2),
    32: (1, 100, 65, 1),
    40: (2, 33, 77, 3),
    64: (1, 50, 50, 2),
    80: (1, 33, 154, 2),
    160: (1, 65, 77, 2),
}
here = pytest.mark.skipif(
    not INTERPRETING and not torch.cuda.is_available(), reason="needs a CUDA device (or TRITON_INTERPRET=1)"
)


def inputs(shape, d, dtype, masked=False, generator_seed=0):
    """q, k, v strided as fused projections return them; gradients of out and map; a bias or None.

    The bias has a row that hides every key.
    """
    b, n, m, h = shape
    g = torch.Generator().manual_seed(generator_seed)
    q, k, v = torch.randn(b, max(n, m), 3, h, d, generator=g).to(DEVICE, dtype).unbind(2)
    weights = (
        torch.randn(b, n, h, d, generator=g).to(DEVICE, dtype),
        torch.randn(b, n, m, generator=g).to(DEVICE),
    )
    bias = None
    if masked:
        bias = torch.randn(b, 1, n, m, generator=g)
        bias = bias.masked_fill(torch.rand(b, 1, n, m, generator=g) < 0.3, -torch.inf)
        bias[0, :, 2] = -torch.inf
        bias = bias.to(DEVICE)
    return (q[:, :n], k[:, :m], v[:, :m]), weights, bias


def exact(q, k, v, bias=None):
    """The definition in float64, for autograd; a row with every key hidden is 0."""
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias.double()
        dead = torch.isneginf(s).all(-1, keepdim=True)
        p = torch.where(dead, 0.0, torch.where(dead, 0.0, s).softmax(-1))
    else:
        p = s.softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", p, v), p.mean(1)


def run(f, qkv, weights, parts=("out", "map"), **kwargs):
    leaves = [y.detach().clone(memory_format=torch.preserve_format).requires_grad_() for y in qkv]
    out, maps = f(*leaves, **kwargs)
    loss = 0.0
    if "out" in parts:
        loss = loss + (out * weights[0].to(out.dtype)).sum()
    if "map" in parts:
        loss = loss + (maps * weights[1].to(maps.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return out, maps, *(torch.zeros_like(y) if g is None else g for g, y in zip(grads, leaves))


def ours(q, k, v, **kwargs):
    from minsd.kernels import attention

    return attention(q, k, v, probs="mean", backend="triton", **kwargs)


def assert_close(results, truths, tolerance, names=("out", "map", "dq", "dk", "dv")):
    for name, result, truth in zip(names, results, truths):
        error = (result.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_the_door_knows_the_head_dims():
    from minsd.kernels import TRITON_HEAD_DIMS, flash

    assert tuple(flash.PIECES) == TRITON_HEAD_DIMS == HEAD_DIMS


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("masked", [False, True])
def test_against_float64_autograd(d, dtype, masked):
    qkv, weights, bias = inputs(SHAPES[d], d, dtype, masked)
    assert not qkv[0].is_contiguous()
    truth = run(exact, [y.double() for y in qkv], weights, bias=bias)
    assert_close(run(ours, qkv, weights, bias=bias), truth, DTYPES[dtype])


@here
@pytest.mark.parametrize("parts", [("out",), ("map",)])
def test_one_gradient_without_the_other(parts):
    qkv, weights, _ = inputs((1, 33, 77, 3), 40, torch.float32)
    truth = run(exact, [y.double() for y in qkv], weights, parts)
    assert_close(run(ours, qkv, weights, parts)[2:], truth[2:], EXACT, ("dq", "dk", "dv"))


@here
def test_frozen_text_and_map_alone():
    """Keys without gradient; and a map from q and k alone, as the sdpa backend needs it."""
    from minsd.kernels import autograd

    (q, k, v), weights, _ = inputs((2, 33, 77, 3), 16, torch.float32)
    truth = run(exact, [y.double() for y in (q, k, v)], weights)
    q = q.detach().requires_grad_()
    out, maps = ours(q, k, v)
    (dq,) = torch.autograd.grad((out * weights[0]).sum() + (maps * weights[1]).sum(), q)
    assert_close([dq], [truth[2]], EXACT)
    _, maps = autograd.apply(q, k, None, q.shape[-1] ** -0.5, None, None, 77, True, "triton")
    (dq,) = torch.autograd.grad((maps * weights[1]).sum(), q)
    truth_dq = run(exact, [y.double() for y in (q, k, v)], weights, ("map",))[2]
    assert_close([maps, dq], [truth[1], truth_dq], EXACT)


@here
def test_bias_of_every_broadcast_and_dead_rows():
    qkv, weights, _ = inputs((2, 33, 40, 3), 16, torch.float32)
    for sizes in ((1, 1, 1, 40), (2, 1, 1, 40), (1, 3, 33, 1), (1, 1, 1, 1), (2, 3, 33, 40)):
        bias = torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        truth = run(exact, [y.double() for y in qkv], weights, bias=bias)
        assert_close(run(ours, qkv, weights, bias=bias), truth, EXACT)
    bias = torch.zeros(1, 1, 33, 1, device=DEVICE)
    bias[:, :, 7] = -torch.inf
    out, maps, dq, _, _ = run(ours, qkv, weights, bias=bias)
    assert not out[:, 7].any() and not maps[:, 7].any() and not dq[:, 7].any()
    assert torch.allclose(maps.sum(-1)[:, 8:], torch.ones(2, 25, device=DEVICE), atol=1e-6)


@here
@pytest.mark.parametrize(
    "changes",
    [
        {"heads_fastest": False, "map_blocks_64": 1, "map_blocks_128": 1 << 60},
        {"map_blocks_64": 1, "map_blocks_128": 1},
    ],
)
def test_switches_change_no_result(changes):
    """The other grid of the gradient kernels; the map in blocks of 64 and of 128 rows."""
    from minsd.kernels import switches

    qkv, weights, _ = inputs((1, 70, 77, 2), 16, torch.float16)
    before = run(ours, qkv, weights)
    with switches.use(**changes):
        after = run(ours, qkv, weights)
    assert switches.current == switches.Switches()
    assert_close(after, before, 1e-6)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", ["nothing", "bias", "regions"])
def test_small_maps_materialised_in_16_bits(dtype, hidden, monkeypatch):
    """As close to float64 as the kernels, since only operands are rounded, and not the scores."""
    from minsd import kernels

    if INTERPRETING:  # no map is computed so on a CPU otherwise
        monkeypatch.setattr(kernels, "_map_kernel", lambda q, k, backend: "materialised")
    qkv, weights, bias = inputs((2, 33, 78, 3), 40, dtype, hidden == "bias")
    more = {} if bias is None else {"bias": bias}
    if hidden == "regions":
        qkv = qkv[0], *(y.unflatten(1, (2, 39)) for y in qkv[1:])
        weights = weights[0], weights[1][..., :39]
        more["region"] = torch.arange(66, device=DEVICE).view(2, 33) % 3  # 2: no text

    def by(backend):
        return lambda *a, **more: kernels.attention(*a, probs="mean", backend=backend, **more)

    truth = run(by("reference"), [y.double() for y in qkv], weights, **more)
    with kernels.switches.use(materialise_below=1 << 30):
        result = run(by("auto"), qkv, weights, **more)
        decoupled = run(by("sdpa"), qkv, weights, **more)
    assert_close(result, truth, DTYPES[dtype])
    assert_close(decoupled, truth, DTYPES[dtype])
    assert torch.equal(result[1], decoupled[1]) and result[1].dtype == torch.float32


@here
@pytest.mark.parametrize("shape", [(2, 33, 77, 3), (1, 65, 64, 2)], ids=str)
def test_maps_from_the_log_sum_exp_of_pytorch(shape, monkeypatch):
    from minsd import kernels
    from minsd.kernels import flash

    monkeypatch.setattr(kernels, "_map_kernel", lambda q, k, backend: "triton")
    qkv, weights, _ = inputs(shape, 40, torch.float16)
    launched, launch = [], flash._launch
    monkeypatch.setattr(
        flash, "_launch", lambda name, *a, **kw: launched.append(name) or launch(name, *a, **kw)
    )

    def decoupled(*a):
        return kernels.attention(*a, probs="mean", backend="sdpa")

    twice = run(decoupled, qkv, weights)
    assert launched == ["forward", "mean_map", "grad_q", "grad_kv"]
    launched.clear()
    with kernels.switches.use(shared_lse=True):
        once = run(decoupled, qkv, weights)
    assert launched == ["mean_map", "grad_q", "grad_kv"]
    assert_close(once, twice, 1e-4)
    assert_close(once, run(exact, [y.double() for y in qkv], weights), DTYPES[torch.float16])


@here
def test_nan_rows_stay_in_their_rows_and_large_logits_stay_finite():
    (q, k, v), weights, _ = inputs((1, 40, 77, 2), 32, torch.float32)
    clean_out, clean_map = ours(q, k, v)
    spoilt = q.clone()
    spoilt[:, 5, 0] = torch.nan
    out, maps = ours(spoilt, k, v)
    assert out[:, 5, 0].isnan().all() and maps[:, 5].isnan().all()
    out, maps = out.clone(), maps.clone()
    out[:, 5, 0], maps[:, 5] = clean_out[:, 5, 0], clean_map[:, 5]
    assert torch.equal(out, clean_out) and torch.equal(maps, clean_map)

    factor = 1e4 / torch.einsum("bnhd,bmhd->bhnm", q, k).abs().max() * 32**0.5  # the largest logit is 1e4
    results = run(ours, (q * factor, k, v), weights)
    assert all(y.isfinite().all() for y in results)
    assert_close(results[:2], run(exact, [y.double() for y in (q * factor, k, v)], weights), 1e-3)


@here
def test_same_bits_every_time():
    # two blocks of queries, two of keys
    qkv, weights, bias = inputs((1, 65, 33, 2), 16, torch.float16, masked=True)
    first = run(ours, qkv, weights, bias=bias)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(ours, qkv, weights, bias=bias), first))


@here
@pytest.mark.parametrize("biased", [False, True])
def test_region_attention_is_attention_of_each_region(biased):
    texts, length = 3, 21  # a text ends within a block of keys
    (q, k, v), weights, _ = inputs((2, 40, texts * length, 2), 40, torch.float32)
    k, v = k.unflatten(1, (texts, length)), v.unflatten(1, (texts, length))
    weights = weights[0], weights[1][..., :length]
    g = torch.Generator().manual_seed(3)
    region = torch.randint(-1, texts + 1, (2, 40), generator=g).to(DEVICE)  # -1 and 3: no text
    bias = torch.randn(2, 1, 40, texts * length, generator=g).to(DEVICE) if biased else None
    result = run(ours, (q, k, v), weights, region=region, bias=bias)
    leaves = [y.detach().double().requires_grad_() for y in (q, k, v)]
    loss = 0.0
    for b in range(2):
        for text in range(texts):
            rows, keys = region[b] == text, slice(text * length, (text + 1) * length)
            some = None if bias is None else bias[b : b + 1, :, rows, keys]
            one = slice(b, b + 1)
            out, maps = exact(leaves[0][one, rows], leaves[1][one, text], leaves[2][one, text], some)
            assert_close([result[0][one, rows], result[1][one, rows]], [out, maps], EXACT)
            loss = loss + (out * weights[0][b, rows]).sum() + (maps * weights[1][b, rows]).sum()
    assert_close(result[2:], torch.autograd.grad(loss, leaves), EXACT, ("dq", "dk", "dv"))
    nowhere = (region < 0) | (region == texts)
    assert nowhere.any() and not any(y[nowhere].any() for y in result[:3])


@here
def test_opcheck_of_the_custom_operator():
    from minsd.kernels.autograd import forward_op

    (q, k, v), _, bias = inputs((1, 17, 20, 2), 16, torch.float32, masked=True)
    q, k, v = (y.detach().requires_grad_() for y in (q, k, v))
    region = torch.arange(17, device=DEVICE)[None] % 2
    torch.library.opcheck(forward_op, (q, k, v, 0.25, bias, region, 10, True, "triton"))


@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n, m, h, d", [(4096, 4096, 8, 40), (1024, 77, 8, 80), (256, 256, 8, 160)])
def test_gpu_sizes_of_the_model_and_cuda_graph(n, m, h, d):
    qkv, weights, _ = inputs((2, n, m, h), d, torch.float16)
    truth = run(exact, [y.double() for y in qkv], weights)
    assert_close(run(ours, qkv, weights), truth, 2e-3)
    ours(*qkv)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, maps = ours(*qkv)
    graph.replay()
    torch.cuda.synchronize()
    assert_close([out, maps], truth, 2e-3)
