"""oneDNN's product instead of MKL's against float64, and the cases left to PyTorch's own."""

import numpy as np
import pytest
import torch

from minsd.kernels import Linear, attention, linear, onednn

there = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN operators"
)


@pytest.fixture
def calls(monkeypatch):
    """One entry per product by oneDNN."""
    made, product = [], onednn.product
    monkeypatch.setattr(onednn, "product", lambda *args: made.append(1) or product(*args))
    return made


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@there
@pytest.mark.parametrize("shape, out", [((2, 33, 24), 40), ((16, 8), 1), ((3, 4, 5, 6), 7)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradient_against_float64(shape, out, with_bias, calls):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.randn(out, shape[-1], generator=g)
    bias = torch.randn(out, generator=g) if with_bias else None
    truth = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (bias.double() if with_bias else 0)
    assert relative(linear(x, weight, bias), truth) < 1e-6 and len(calls) == 1
    if x.ndim > 2:  # any strides
        assert relative(linear(x.transpose(0, 1), weight, bias), truth.transpose(0, 1)) < 1e-6

    leaf, up = x.clone().requires_grad_(), torch.randn(*shape[:-1], out, generator=g)
    calls.clear()
    (grad,) = torch.autograd.grad(linear(leaf, weight, bias), leaf, up)
    assert len(calls) == 2  # forward and backward
    assert relative(grad, torch.einsum("...o,oi->...i", up.double(), weight.double())) < 1e-6


@there
def test_where_linear_is_left_to_pytorch(calls):
    layer = Linear(8, 4)
    x = torch.randn(20, 8)
    layer(x).sum().backward()  # weights that need a gradient
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(4, 8), atol=1e-5) and not calls
    layer.requires_grad_(False)
    assert layer(x[:2]).shape == (2, 4) and layer(x[:0]).shape == (0, 4) and not calls
    assert Linear(8, 4).double()(x.double()).dtype == torch.float64 and not calls
    with torch.backends.mkldnn.flags(enabled=False):
        plain = layer(x)
    assert not calls
    torch.testing.assert_close(layer(x), plain)
    assert len(calls) == 1
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(forward, tangent @ layer.weight.T)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), layer.weight.sum(0).expand_as(x))
    assert len(calls) == 1
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    assert len(calls) == 1


@there
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 3e-4)], ids=str
)
# B, N, M, heads, d
@pytest.mark.parametrize("shape", [(2, 33, 77, 3, 40), (1, 50, 50, 1, 8), (1, 1, 9, 2, 16)], ids=str)
def test_attention_in_blocks_against_float64(shape, dtype, tolerance, calls, monkeypatch):
    b, n, m, h, d = shape
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(onednn, "BLOCK", 20 * m)  # the last block shorter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(b, max(n, m), 3, h, d, generator=g).to(dtype).unbind(2)
    q, k, v = q[:, :n], k[:, :m], v[:, :m]
    out, _ = attention(q, k, v, scale=0.3)
    p = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()).mul(0.3).softmax(-1)
    assert out.dtype == dtype and relative(out, torch.einsum("bhnm,bmhd->bnhd", p, v.double())) < tolerance
    assert len(calls) == b * h * 2 * -(-n // 20)


@there
def test_where_attention_is_left_to_pytorch(calls, monkeypatch):
    q, k, v = torch.randn(3, 1, 30, 2, 8).unbind()
    plain = attention(q, k, v)[0]
    assert not calls  # too small
    monkeypatch.setattr(onednn, "LEAST", 0)
    bias = torch.zeros(1, 1, 1, 30)
    torch.testing.assert_close(attention(q, k, v, bias=bias)[0], plain)
    leaf = v.clone().requires_grad_()
    assert torch.autograd.grad(attention(q, k, leaf)[0].sum(), leaf)[0].abs().sum() > 0 and not calls
    torch.testing.assert_close(attention(q, k, v)[0], plain)
    assert calls


@there
def test_the_same_image_as_without(small, calls, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 0)
    ours = small("a red circle", seeds=[3], steps=3)[0]
    assert calls
    calls.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        plain = small("a red circle", seeds=[3], steps=3)[0]
    assert not calls
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(plain))
    assert difference.max() <= 2 and np.asarray(plain).std() > 10
