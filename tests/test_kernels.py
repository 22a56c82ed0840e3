"""Attention backends in plain PyTorch against a float64 computation written out here."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minsd import kernels
from minsd.kernels import attention, reference
from minsd.kernels.autograd import forward_op

BACKENDS = ["auto", "sdpa", "reference"]


def exact(q, k, v, scale, bias=None):
    """out (B,N,H,d) and map (B,N,M) in float64, head by head and row by row."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    maps = q.new_zeros(*q.shape[:2], k.shape[1])
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for n in range(q.shape[1]):
                s = k[b, :, h] @ q[b, n, h] * scale
                if bias is not None:
                    s = s + bias[b, h, n].double()
                if (s == -torch.inf).all():
                    p = torch.zeros_like(s)
                else:
                    p = (s - s.max()).exp() / (s - s.max()).exp().sum()
                out[b, n, h] = p @ v[b, :, h]
                maps[b, n] = maps[b, n] + p / q.shape[2]
    return out, maps


def relative(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


def outputs_and_gradients(f, qkv, weights):
    leaves = [y.detach().clone().requires_grad_() for y in qkv]
    out, maps = f(*leaves)
    loss = (out * weights[0]).sum() + (maps * weights[1]).sum()
    return out, maps, *torch.autograd.grad(loss, leaves)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "LIMIT", 3 * 77 * 5)  # a few rows at a time, the last chunk shorter


@pytest.mark.parametrize("backend", BACKENDS)
# B, N, M, heads, d
@pytest.mark.parametrize("shape", [(2, 33, 77, 3, 40), (1, 16, 16, 1, 8), (2, 5, 154, 2, 64)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_outputs_maps_and_gradients(backend, shape, masked, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    b, n, m, h, d = shape
    g = torch.Generator().manual_seed(0)
    # strided, as fused projections return them
    qkv = torch.randn(b, max(n, m), 3, h, d, generator=g).unbind(2)
    q, k, v = qkv[0][:, :n], qkv[1][:, :m], qkv[2][:, :m]
    bias = None
    if masked:
        bias = torch.randn(b, h, n, m, generator=g)
        bias = bias.masked_fill(torch.rand(b, h, n, m, generator=g) < 0.3, -torch.inf)
        bias[0, :, 2] = -torch.inf  # a row with every key hidden
    weights = torch.randn(b, n, h, d, generator=g), torch.randn(b, n, m, generator=g)
    ours = outputs_and_gradients(
        lambda *a: attention(*a, bias=bias, probs="mean", backend=backend), (q, k, v), weights
    )
    truth = outputs_and_gradients(lambda *a: exact(*a, d**-0.5, bias), (q, k, v), weights)
    assert all(relative(a, b) < 2e-6 for a, b in zip(ours, truth))
    plain, none = attention(q, k, v, bias=bias, backend=backend)
    assert none is None and relative(plain, truth[0]) < 2e-6


def test_cudnn_comes_first_where_asked_for():
    from torch.nn.attention import SDPBackend

    on_gpu = SimpleNamespace(is_cuda=True)
    usual = torch._C._get_sdp_priority_order()
    with kernels.switches.use(cudnn_first=True):
        with kernels.sdpa._order(SimpleNamespace(is_cuda=False)):
            assert torch._C._get_sdp_priority_order() == usual
        with kernels.sdpa._order(on_gpu):
            order = torch._C._get_sdp_priority_order()
            assert [SDPBackend(k) for k in order[:4]] == kernels.sdpa.CUDNN_FIRST
    with kernels.sdpa._order(on_gpu):
        assert torch._C._get_sdp_priority_order() == usual


def test_the_oracle_itself_differentiates_through_dead_rows():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 2, 8, generator=g, dtype=torch.float64)
    bias = torch.zeros(1, 2, 6, 6)
    bias[:, :, 3] = bias[:, :, :, 1] = -torch.inf
    weights = torch.randn(1, 6, 2, 8, generator=g), torch.randn(1, 6, 6, generator=g)
    ours = outputs_and_gradients(lambda *a: reference.whole(*a, 0.3, bias), (q, k, v), weights)
    truth = outputs_and_gradients(lambda *a: exact(*a, 0.3, bias), (q, k, v), weights)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, truth))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1, 1, 9), (2, 1, 5, 1), (1, 3, 5, 9), (2, 3, 5, 9)], ids=str)
def test_bias_broadcasts(backend, size):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=g) for n in (5, 9, 9))
    bias = torch.randn(size, generator=g)
    bias[0, 0, 0, 0] = -torch.inf
    out, maps = attention(q, k, v, bias=bias, probs="mean", backend=backend)
    want = exact(q, k, v, 8**-0.5, bias.expand(2, 3, 5, 9))
    assert relative(out, want[0]) < 2e-6 and relative(maps, want[1]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_region_attention_is_attention_of_each_region(backend, small_chunks):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 30, 3, 16, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, 4, 7, 3, 16, generator=g, dtype=torch.float64)  # 4 texts of 7
    region = torch.randint(-1, 4, (2, 30), generator=g)  # -1: no text
    weights = torch.randn(2, 30, 3, 16, generator=g), torch.randn(2, 30, 7, generator=g)

    def gathered(q, k, v):
        out, maps = torch.zeros_like(q), torch.zeros(2, 30, 7, dtype=q.dtype)
        for b in range(2):
            for text in range(4):
                rows = region[b] == text
                if rows.any():
                    o, p = exact(q[b : b + 1, rows], k[b : b + 1, text], v[b : b + 1, text], 0.25)
                    out[b, rows], maps[b, rows] = o[0], p[0]
        return out, maps

    ours = outputs_and_gradients(
        lambda *a: attention(*a, region=region, probs="mean", backend=backend), (q, k, v), weights
    )
    truth = outputs_and_gradients(gathered, (q, k, v), weights)
    assert all(relative(a, b) < 1e-10 for a, b in zip(ours, truth))
    assert not ours[0][region == -1].any() and not ours[1][region == -1].any()


@pytest.mark.parametrize("heads", [1, 3])
def test_masks_are_not_written_once_a_head(heads, monkeypatch):
    """PyTorch pads the mask it is given: expanded over heads, it would be written that often."""
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask, scale):
        masks.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 3, 8, generator=g), torch.randn(2, 3, 7, 3, 8, generator=g)
    region = torch.randint(-1, 3, (2, 6), generator=g)
    attention(q, k, k, region=region, bias=torch.zeros(1, heads, 1, 21))
    assert masks[0].shape == (2, heads, 6, 21)
    attention(q, k[:, 0], k[:, 0], bias=torch.zeros(1, heads, 1, 1))
    assert masks[1].shape == (1, heads, 6, 7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_sixteen_bits_are_summed_in_32(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 20, 2, 40, generator=g).to(dtype)
    weights = torch.randn(1, 20, 2, 40, generator=g).to(dtype), torch.randn(1, 20, 20, generator=g)
    ours = outputs_and_gradients(lambda *a: attention(*a, probs="mean", backend="reference"), qkv, weights)
    truth = outputs_and_gradients(lambda *a: exact(*a, 40**-0.5), qkv.double(), weights)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and relative(ours[1], truth[1]) < 1e-6
    assert all(relative(a, b) < tolerance for a, b in zip(ours, truth))


def test_gradcheck_of_the_reference(small_chunks):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 2, 3, generator=g, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4)
    )
    bias = torch.randn(1, 1, 5, 4, generator=g)
    bias[0, 0, 1] = bias[0, 0, 2, 0] = -torch.inf
    assert torch.autograd.gradcheck(
        lambda *a: attention(*a, bias=bias, probs="mean", backend="reference"), (q, k, v)
    )


@pytest.mark.parametrize("with_v", [True, False])
def test_opcheck(with_v):
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (6, 7, 7))
    torch.library.opcheck(forward_op, (q, k, v if with_v else None, 0.3, None, None, 7, True, "reference"))


def test_compiled_equals_eager_without_graph_breaks():
    q, k, v = (torch.randn(1, n, 2, 8) for n in (6, 7, 7))
    weights = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 7)

    def f(q, k, v):
        return attention(q, k, v, probs="mean")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours = outputs_and_gradients(compiled, (q, k, v), weights)
    eager = outputs_and_gradients(f, (q, k, v), weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, eager))


def test_memory_stays_bounded(monkeypatch):
    """No operation, forward or backward, makes a tensor larger than the map.

    All heads' probabilities are 8 times that.
    """
    n, largest = 1024, 0
    monkeypatch.setattr(reference, "LIMIT", 1 << 17)
    q, k, v = (torch.randn(1, n, 8, 8, requires_grad=True) for _ in range(3))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for y in out if isinstance(out, tuple) else (out,):
                largest = max(largest, y.numel() if torch.is_tensor(y) else 0)
            return out

    with Watch():
        out, maps = attention(q, k, v, probs="mean", backend="reference")
        torch.autograd.grad((out, maps), (q, k, v), (torch.ones_like(out), torch.ones_like(maps)))
    assert largest == n * n
    with Watch():
        reference.whole(q, k, v, 1.0)
    assert largest == 8 * n * n  # `Watch` notices what is not bounded


def test_no_second_derivative():
    q, k, v = (torch.randn(1, 4, 1, 8, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(attention(q, k, v, probs="mean")[1].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_what_a_caller_gets_wrong():
    x = torch.zeros(1, 4, 1, 8)
    for kwargs, message in (
        ({"backend": "magic"}, "no attention backend is called 'magic'"),
        ({"probs": "all"}, "probs must be"),
        ({"bias": torch.zeros(1, 1, 4, 5)}, "bias must broadcast"),
        ({"bias": torch.zeros(4, 4)}, "bias must broadcast"),
        ({"bias": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}, "bias must hold floats"),
        ({"bias": torch.zeros(1, 1, 4, 4, requires_grad=True)}, "bias takes no gradient"),
        ({"region": torch.zeros(1, 4, dtype=torch.long)}, r"k and v \(B,R,M,H,d\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(x, x, x, **kwargs)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(x, x.double(), x.double())
    with pytest.raises(ValueError, match="differ in batch, heads or head dim"):
        attention(x, x.expand(2, 4, 1, 8), x.expand(2, 4, 1, 8))
    with pytest.raises(ValueError, match="M is 0"):
        attention(x, x[:, :0], x[:, :0])
    several = x[:, None]
    with pytest.raises(ValueError, match=r"region must be \(B,N\)"):
        attention(x, several, several, region=torch.zeros(1, 4))


def test_triton_errors_are_one_line(monkeypatch):
    x = torch.zeros(1, 4, 1, 8)
    unsupported = torch.zeros(1, 4, 1, 24)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    with pytest.raises(ValueError, match="head dims 8, 16"):
        attention(unsupported, unsupported, unsupported, backend="triton")
    with pytest.raises(ValueError, match="no float64"):
        attention(x.double(), x.double(), x.double(), backend="triton")
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the triton package"):
        attention(x, x, x, backend="triton")


def test_triton_is_imported_only_for_a_kernel():
    code = """
import sys
import torch
by_torch = {"triton"} & set(sys.modules)  # none in torch 2.13
import minsd
x = torch.zeros(1, 4, 1, 8)
minsd.kernels.attention(x, x, x, probs="mean")
assert minsd.kernels.reference.LIMIT and minsd.kernels.onednn.ROWS
kernels = {"triton", "minsd.kernels.flash", "minsd.kernels.groupnorm"}
assert not (kernels - by_torch) & set(sys.modules)
if minsd.kernels.HAS_TRITON:
    assert minsd.kernels.flash.KERNELS and minsd.kernels.groupnorm.KERNELS
assert not hasattr(minsd.kernels, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(kernels.__file__).parents[1])
