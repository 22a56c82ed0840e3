"""Attention losses against plain float64 ones from whole softmax tensors; Otsu and components by
definition."""

import copy
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minsd.attention import Attention
from minsd.noise import losses
from minsd.noise.look import Ask, Lift, Look

PROMPT = "a red circle and a blue square"


# --- the same by other means: everything materialised, one image, loops --------------------------


class Whole:
    """Runs the whole UNet with plain attention, and keeps the softmax tensors (heads, N, M) of one
    grid."""

    def __init__(self, monkeypatch, cells=256):
        self.cells, self.cross, self.self = cells, [], []
        monkeypatch.setattr(Attention, "attend", staticmethod(self.attend))

    def attend(self, q, k, v, probs=None, backend=None):
        assert probs is None  # nobody records
        p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        if q.shape[1] == self.cells:
            (self.self if k.shape[1] == self.cells else self.cross).append(p[0])
        return torch.einsum("bhnm,bmhd->bnhd", p, v), None

    def maps(self, unet, x, t, context):
        self.cross, self.self = [], []
        unet(x, t, context)
        assert self.cross and len(self.cross) == len(self.self)
        r = int(self.cells**0.5)
        cross = torch.stack([p.mean(0) for p in self.cross]).mean(0).view(r, r, 77)
        return cross, torch.stack([p.mean(0) for p in self.self]).mean(0).view(r, r, r * r)


def plain_smooth(m):
    g = torch.tensor([np.exp(-((d / (2 * 0.5)) ** 2)) for d in (-1, 0, 1)], dtype=m.dtype)
    kernel = torch.outer(g, g) / torch.outer(g, g).sum()
    return F.conv2d(F.pad(m[None, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[0, 0]


def plain_otsu(m):
    """By definition: the first threshold that maximises w0 w1 (mean0 - mean1)^2, in exact
    fractions."""
    levels = [int(v * 255) for v in m.detach().flatten()]
    best = Fraction(0)
    at = 0
    for t in range(256):
        low, high = [v for v in levels if v <= t], [v for v in levels if v > t]
        if low and high:
            apart = Fraction(sum(low), len(low)) - Fraction(sum(high), len(high))
            value = len(low) * len(high) * apart**2
            if value > best:
                best, at = value, t
    return at


def plain_losses(cross, self_maps, subjects, running=None):
    """One image's maps -> response, conflict, background, alignment (0 without `running`),
    subjects' maps."""
    sharp = (100 * cross[..., 1:-1]).softmax(-1)
    maps = [plain_smooth(torch.stack([sharp[..., k - 1] for k in tokens]).mean(0)) for tokens in subjects]
    w = maps[0].shape[1]
    at = [divmod(int(m.argmax()), w) for m in maps]
    response = max(1 - m[p] for m, p in zip(maps, at))
    looks = [plain_smooth(self_maps[p].view(maps[0].shape)) for p in at]
    pairs = [torch.min(a, b).sum() / ((a + b).sum() + 1e-6) for a, b in combinations(looks, 2)]
    conflict = sum(pairs) / len(pairs) if pairs else response * 0
    background = response * 0
    for m, p in zip(maps, at):
        labels, _ = scipy.ndimage.label((m >= plain_otsu(m) / 255).detach().numpy())
        part = torch.from_numpy(labels == labels[p])
        if not part.all() and m[~part].max() > m[part].min():
            background = background + m[~part].max()
    align = sum((m - r).abs().mean() for m, r in zip(maps, running)) if running else response * 0
    return response, conflict, background, align, [m.detach() for m in maps]


def ours(seen, present=None):
    return (
        losses.cross_response(seen.maps, present),
        losses.self_conflict(seen.claims, present),
        losses.clean_background(seen.maps, present),
    )


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_losses_and_gradients_equal_those_of_whole_softmax_tensors(shapes, dtype, within, monkeypatch):
    """Through the embedded network: early-stopped and batched, against whole and one by one
    (float64)."""
    prompts = [PROMPT, "a green star, a red cross and a pink heart"]
    subjects = [[[3], [7]], [[2, 3], [7], [11]]]
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sd = copy.copy(shapes)
    sd.unet = unet = copy.deepcopy(shapes.unet).to(dtype)
    context = shapes.text.encode(prompts)
    leaf = x.to(dtype).requires_grad_()
    lift = Lift(sd, [Ask(prompt, 0, places) for prompt, places in zip(prompts, subjects)], ours)
    seen = Look(lift, leaf, torch.arange(2), 981)
    values = ours(seen, seen.present)
    gradients = [torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in values]

    whole = Whole(monkeypatch)
    sizes = []
    for b in range(2):
        leaf = x[b : b + 1].clone().requires_grad_()
        maps = whole.maps(unet.double(), leaf, 981, context[b : b + 1].double())
        for value, gradient, expected in zip(values, gradients, plain_losses(*maps, subjects[b])):
            assert abs(value[b].item() - expected.item()) <= within
            theirs = torch.zeros(4, 16, 16)
            if expected.requires_grad:
                theirs = torch.autograd.grad(expected, leaf, retain_graph=True)[0][0]
            assert (gradient[b] - theirs).abs().max() <= within * max(1, theirs.abs().max())
            sizes.append(theirs.abs().max().item())
    assert sorted(sizes)[3] > 1e-4  # most of the six matter


def random_maps(b, s, seed, dtype=torch.float64):
    """Blobs and noise in 0..1, (b,s,9,12): not square."""
    m = torch.rand(b, s, 9, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return losses.smooth(m**6)


def test_losses_by_finite_differences():
    m, claims, mean = (random_maps(1, 3, seed)[..., :5, :6].clone().requires_grad_() for seed in range(3))
    check = torch.autograd.gradcheck
    assert check(losses.cross_response, (m,))
    assert check(losses.self_conflict, (claims,))
    assert check(losses.clean_background, (m,))
    assert check(lambda m: losses.alignment(m, mean.detach()), (m,))
    assert check(losses.kl_divergence, (m, mean))


def test_an_image_with_fewer_subjects_is_as_it_is_alone():
    m, claims, mean = random_maps(2, 3, 2), random_maps(2, 3, 3), random_maps(2, 3, 4)
    present = torch.tensor([[True, True, True], [True, True, False]])
    for loss in (
        lambda n, b: losses.cross_response(m[b, :n], None if n is None else present[b, :n]),
        lambda n, b: losses.self_conflict(claims[b, :n], present[b, :n]),
        lambda n, b: losses.clean_background(m[b, :n], present[b, :n]),
        lambda n, b: losses.alignment(m[b, :n], mean[b, :n], present[b, :n]),
    ):
        both = loss(3, slice(0, 2))
        assert torch.equal(both[:1], loss(3, slice(0, 1)))
        assert torch.allclose(both[1:], loss(2, slice(1, 2)), atol=1e-15)
    assert losses.self_conflict(claims[:, :1]).tolist() == [0, 0]  # nothing to conflict with


def test_background_is_the_strongest_response_outside_the_peaks_part():
    m = torch.full((1, 1, 8, 8), 0.05)
    # The highest of the lower class. The comparison with >= lets it in, so it must not touch a
    # part.
    m[0, 0, 0, 7] = 0.2
    m[0, 0, 1:3, 1:3] = torch.tensor([[0.9, 0.7], [0.7, 0.7]])
    assert losses.clean_background(m).item() == 0  # nothing outside is above the part's least, 0.7
    m[0, 0, 5:7, 5:7] = 0.8
    assert losses.clean_background(m).item() == pytest.approx(0.8)
    m[0, 0, 3:5, 2] = m[0, 0, 4, 2:7] = m[0, 0, 4:6, 6] = 0.7  # a bridge makes them one
    assert losses.clean_background(m).item() == 0
    assert losses.clean_background(torch.full((1, 1, 8, 8), 0.4)).item() == 0  # nothing to split


def test_kl_is_that_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    mu, log_var = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=generator).unbind(0)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0))
    assert torch.allclose(losses.kl_divergence(mu, log_var), expected.flatten(1).mean(1))


# --- image processing ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 255), min_size=12, max_size=12), st.sampled_from(["float32", "float64"]))
@settings(max_examples=60, deadline=None)
def test_otsu_by_its_definition(levels, dtype):
    m = ((torch.tensor(levels, dtype=torch.float64) + 0.5) / 256).to(getattr(torch, dtype)).view(3, 4)
    assert losses.otsu(m).item() == plain_otsu(m)


def test_otsu_of_many_maps_at_once_and_of_the_odd_ones():
    m = torch.cat([random_maps(2, 3, 6), torch.zeros(1, 3, 9, 12), torch.ones(1, 3, 9, 12)]).float()
    m[3, 0, :4] = 0  # two levels only
    assert losses.otsu(m).tolist() == [[plain_otsu(s) for s in row] for row in m]
    assert losses.otsu(m)[2:].tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("fraction", [0.3, 0.55, 0.7, 1.0])
def test_component_is_scipys(fraction):
    mask = torch.rand(3, 4, 11, 17, generator=torch.Generator().manual_seed(1)) < fraction
    at = torch.randint(11 * 17, (3, 4), generator=torch.Generator().manual_seed(2))
    ours = losses.component(mask, at)
    for m, p, part in zip(mask.flatten(0, 1), at.flatten().tolist(), ours.flatten(0, 1)):
        labels, _ = scipy.ndimage.label(m.numpy())
        label = labels.flatten()[p]
        assert np.array_equal(part.numpy(), (labels == label) & (label > 0))


def test_component_follows_a_snake_to_its_end():
    mask = torch.zeros(1, 1, 15, 15, dtype=torch.bool)
    mask[..., ::2, :] = True
    for row in range(1, 15, 2):
        mask[..., row, -1 if row % 4 == 1 else 0] = True
    assert torch.equal(losses.component(mask, torch.zeros(1, 1, dtype=torch.long)), mask)


# --- subjects ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, subjects",
    [
        (PROMPT, ["circle", "square"]),
        ("a cat with a red hat, in the snow", ["cat", "hat", "snow"]),
        ("A dog AND a big dog", ["dog#1", "dog#2"]),
        ("a dog, a dog house", ["dog#1", "house"]),
        ("sandwich, withers and a band", ["sandwich", "withers", "band"]),
        (", and the cat's t-shirt, ", ["t-shirt"]),
        ("heart", ["heart"]),
    ],
)
def test_automatic_subjects(prompt, subjects):
    assert losses.automatic_subjects(prompt) == subjects


def test_subjects_are_found_by_word_or_index(shapes):
    assert losses.resolve(shapes.text, PROMPT, None) == [[3], [7]]
    assert losses.resolve(shapes.text, PROMPT, "red circle, square") == [[2, 3], [7]]
    assert losses.resolve(shapes.text, "a red circle and a blue circle", ["circle#2", 2]) == [[7], [2]]
    assert losses.resolve(shapes.text, PROMPT, [7]) == [[7]]


@pytest.mark.parametrize(
    "prompt, subjects, message",
    [
        (PROMPT, ["circle", "cat"], "not in the prompt"),
        (PROMPT, "circle, ", "empty"),
        (PROMPT, [], "no subjects"),
        (PROMPT, [3, 8], "outside the prompt"),  # 8 is the end token
        (PROMPT, [0], "outside the prompt"),
        (PROMPT, [3, -1], "outside the prompt"),
        (PROMPT, [3, 7.0], "word of the prompt or a token index"),
        (PROMPT, [3, True], "word of the prompt or a token index"),
        (PROMPT, ["circle", 3], "named twice"),
        ("a circle and a circle", ["circle"], "occurs 2 times"),
        ("a circle " + "and a star " * 30 + "and a heart", [2, 76], "outside the prompt"),
        (" , and", None, "names nothing"),
        ("", None, "names nothing"),
    ],
)
def test_subjects_that_cannot_be(prompt, subjects, message, shapes):
    with pytest.raises(ValueError, match=message) as error:
        losses.resolve(shapes.text, prompt, subjects)
    assert "\n" not in str(error.value)


def test_the_timesteps_a_run_lists(shapes):
    assert losses.listed_timesteps(shapes, 50, "ddim")[0] == 981
    assert losses.listed_timesteps(shapes, 50, "pndm")[0] == 981
    assert len(losses.listed_timesteps(shapes, 10, "pndm")) == 11
    assert len(losses.listed_timesteps(shapes, 10, "heun")) == 10
    assert losses.listed_timesteps(shapes, 10, "dpmpp_2m", karras=True)[0] == pytest.approx(999)
    with pytest.raises(ValueError, match="no sampler"):
        losses.listed_timesteps(shapes, 10, "ddmi")
