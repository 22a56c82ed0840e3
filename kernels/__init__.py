"""Attention that can also tell where it looked: one entry, `attention()`, several backends."""

import torch.nn.functional as F

from . import reference

BACKENDS = ("auto", "sdpa", "reference")


def attention(q, k, v, *, scale=None, bias=None, probs=None, backend="auto"):
    """softmax(q k^T scale + bias) v, per head.

    q (B,N,H,d), k and v (B,M,H,d) as projections leave them; `scale` defaults to d**-0.5; `bias` is added to the scores
    (B,H,N,M), -inf hiding a key; a row with every key hidden gives 0. With `probs="mean"` the mean over heads of the
    softmax comes too, (B,N,M). Returns (out (B,N,H,d), probs or None); both are differentiable. ValueError for a backend
    or a kind of probs that is not known.

    `reference` holds every probability in memory. `sdpa` is PyTorch's fused attention, which holds none; wanted maps
    are then computed apart from q and k. `auto` is `sdpa` where no maps are wanted, else `reference`, whose one softmax
    serves output and map. A bias always goes to `reference`: fused attention gives NaN where every key is hidden.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend is called {backend!r}; choose from {', '.join(BACKENDS)}")
    if probs not in (None, "mean"):
        raise ValueError(f"probs must be None or 'mean', not {probs!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference" or bias is not None or (backend == "auto" and probs):
        return reference.whole(q, k, v, scale, bias, probs == "mean")
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), scale=scale).transpose(1, 2)
    return out, reference.whole(q, k, v, scale, probs=True)[1] if probs else None
