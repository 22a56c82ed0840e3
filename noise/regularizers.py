"""Regularizers that keep an optimised noise x (B,4,h,w) close to unit noise. Each returns one value
per image, (B,); lower is better.

norm    r^2 / 2 - (d - 1) log r with r = |x|, least at r = sqrt(d - 1): the norm of d unit normal
        numbers (ReNO, Eyring et al. 2024, arXiv 2406.04312). It depends on the norm of x alone.
kl      |x - start|^2 / 2d: KL(N(x - start, 1) || N(0, 1)) per number, InitNO's bound for a shift.
white   -(l1 + l2), plus the mean of the same over 20 random permutations of x (DNO, Tang et al.
        2024, arXiv 2405.18881). With x's d numbers as m rows of k = 4, M1 the norm of the mean row
        and M2 the spectral norm of Z'Z / m - I (Z: the rows as a matrix),
            l1 = -m M1^2 / 2k,   l2 = -m max(sqrt(1 + M2) - 1 - sqrt(k / m), 0)^2 / 2,
        each cut to at most -log 2, so that x is not pushed further once it is within the bound.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

K = 4  # numbers per row of `white`
PERMUTATIONS = 20


def norm(x: Tensor, start: Tensor) -> Tensor:
    """Returns, for each image, how unlikely the norm |x| of its noise x (B,4,h,w) is: the negative
    logarithm of the density that unit noise has at this norm, up to a constant, (B,). `start` is
    not used."""
    r = x.flatten(1).norm(dim=1)
    return r**2 / 2 - (x[0].numel() - 1) * r.log()


def kl(x: Tensor, start: Tensor) -> Tensor:
    """Returns the KL divergence (B,) between unit noise shifted by x - start and unit noise,
    divided by the number of elements of one image's noise. x is the optimised noise and `start` the
    noise before the optimisation, both (B,4,h,w)."""
    return 0.5 * (x - start).flatten(1).square().mean(dim=1)


def white(x: Tensor, start: Tensor, permutations: int = PERMUTATIONS) -> Tensor:
    """Returns a measure (B,) of how unlikely the mean and the covariance of the numbers of x are
    for unit noise, where the numbers are taken as rows of four. It is -(l1 + l2) for the given
    order of the numbers, plus the mean of the same over `permutations` random orders. l1 and l2 are
    DNO's bounds (the head of this file has the formulas). `start` is not used."""
    flat = x.flatten(1)
    total = -_bounds(flat)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(flat.shape[1], generator=generator) for _ in range(permutations)]
    shuffled = [-_bounds(flat[:, order.to(flat.device)]) for order in orders]
    return total + torch.stack(shuffled).mean(dim=0) if shuffled else total


def _bounds(flat: Tensor) -> Tensor:
    """Returns l1 + l2 (B,) for the numbers `flat` (B,d) of each image's noise. These are DNO's
    bounds, which fall as the mean (l1) and the covariance (l2) of rows of four numbers become
    unlikely for unit noise (the head of this file has the formulas)."""
    rows = flat.unflatten(1, (-1, K))  # (B, m, k)
    m = rows.shape[1]
    mean = rows.mean(dim=1).norm(dim=1)
    spread = rows.transpose(1, 2) @ rows / m - torch.eye(K, dtype=flat.dtype, device=flat.device)
    spectral = torch.linalg.matrix_norm(spread, ord=2)
    l1 = -m * mean**2 / (2 * K)
    l2 = -m * ((1 + spectral).sqrt() - 1 - (K / m) ** 0.5).clamp(min=0) ** 2 / 2
    return l1.clamp(max=-math.log(2)) + l2.clamp(max=-math.log(2))


def moments(x: Tensor) -> dict[str, Tensor]:
    """Returns "norm", "mean" and "std" of the d numbers of each image's noise x (B,4,h,w), all
    (B,). "norm" is |x| / sqrt(d). Unit noise has about 1, 0 and 1."""
    flat = x.flatten(1)
    norm = flat.norm(dim=1) / flat.shape[1] ** 0.5
    return {"norm": norm, "mean": flat.mean(dim=1), "std": flat.std(dim=1)}


def measures(x: Tensor, start: Tensor) -> dict[str, Tensor]:
    """Returns the value (B,) of every regularizer, by name, for noise x (B,4,h,w) that was
    optimised from `start`. The values are not multiplied by the regularizers' weights. From the
    value of "norm", the least possible value is subtracted, so that it is 0 at best."""
    x, start = x.double(), start.double()
    values = {name: of(x, start) for name, (of, _) in REGULARIZERS.items()}
    n = x[0].numel() - 1
    return values | {"norm": values["norm"] - n / 2 + n * math.log(n) / 2}


# Name -> (regularizer, usual weight). The weights are those of ReNO, the InitNO paper, and DNO.
REGULARIZERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "norm": (norm, 0.01),
    "kl": (kl, 500.0),
    "white": (white, 1.0),
}
