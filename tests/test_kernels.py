"""Attention backends against a float64 computation written out here."""

import pytest
import torch

from minsd.kernels import attention


def exact(q, k, v, scale, bias=None):
    """float64, head by head, row by row."""
    q, k, v = q.double(), k.double(), v.double()
    out, maps = torch.zeros_like(q), q.new_zeros(*q.shape[:2], k.shape[1])
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for n in range(q.shape[1]):
                s = k[b, :, h] @ q[b, n, h] * scale
                if bias is not None:
                    s = s + bias[b, h, n].double()
                p = torch.zeros_like(s) if (s == -torch.inf).all() else (s - s.max()).exp() / (s - s.max()).exp().sum()
                out[b, n, h], maps[b, n] = p @ v[b, :, h], maps[b, n] + p / q.shape[2]
    return out, maps


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("shape", [(2, 33, 77, 3, 40), (1, 16, 16, 1, 8), (2, 5, 154, 2, 64)], ids=str)  # B N M heads d
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_maps_and_gradients(backend, shape, masked):
    b, n, m, h, d = shape
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, max(n, m), 3, h, d, generator=g).unbind(2)  # strided, as fused projections leave them
    q, k, v = qkv[0][:, :n], qkv[1][:, :m], qkv[2][:, :m]
    bias = None
    if masked:
        bias = torch.randn(b, h, n, m, generator=g).masked_fill(torch.rand(b, h, n, m, generator=g) < 0.3, -torch.inf)
        bias[0, :, 2] = -torch.inf  # a row with nothing to look at
    weights = torch.randn(b, n, h, d, generator=g), torch.randn(b, n, m, generator=g)
    results = []
    for f in (lambda *a: attention(*a, bias=bias, probs="mean", backend=backend), lambda *a: exact(*a, d**-0.5, bias)):
        leaves = [y.detach().clone().requires_grad_() for y in (q, k, v)]
        out, maps = f(*leaves)
        loss = (out * weights[0]).sum() + (maps * weights[1]).sum()
        results.append((out, maps, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results):
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < 2e-6
    plain, none = attention(q, k, v, bias=bias, backend=backend)
    assert none is None and (plain.double() - results[1][0]).norm() / results[1][0].norm() < 2e-6


def test_what_a_caller_gets_wrong():
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="no attention backend is called 'magic'"):
        attention(x, x, x, backend="magic")
    with pytest.raises(ValueError, match="probs must be"):
        attention(x, x, x, probs="all")
