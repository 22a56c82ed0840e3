"""Noise optimisation against a plain loop with torch.optim.Adam in float64, from whole softmax
tensors."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from test_losses import PROMPT, Whole, plain_losses

from minsd.attention import Attention
from minsd.noise import initno
from minsd.noise.initial import noise

PLACES = [[3], [7]]


@pytest.fixture(scope="module")
def double(shapes):
    """The embedded model in float64."""
    sd = copy.copy(shapes)
    sd.unet = copy.deepcopy(shapes.unet).double()
    return sd


def plain_initno(
    whole, sd, seed, t, variant, rounds, round_steps, last_steps, lr, limits, kl_limit=1e-3, kl_weight=500
):
    """The specification read line by line: one noise -> (noise, success, rounds begun, losses of
    every evaluation)."""
    context, g = sd.encode_prompt(PROMPT), torch.Generator().manual_seed(seed)
    history = []

    def attempt(z, steps, closing):
        log_var, mu = (torch.zeros_like(z, requires_grad=True) for _ in range(2))
        adam = torch.optim.Adam([log_var, mu], lr=lr, eps=1e-3)

        def kl():
            return -0.5 * (1 + log_var - mu**2 - log_var.exp()).mean()

        for step in range(steps + closing):
            x = z * (0.5 * log_var).exp() + mu
            cross, conflict, background, *_ = plain_losses(*whole.maps(sd.unet, x, t, context), PLACES)
            history.append((cross.item(), conflict.item()))
            if cross < limits[0] and conflict < limits[1]:
                return x.detach(), True, None
            if step == steps:
                return x.detach(), False, None
            used = conflict * 0 if variant == "official" and cross > 0.5 else conflict
            adam.zero_grad()
            loss = cross + used + (background if variant == "official" else kl_weight * kl())
            loss.backward()
            adam.step()
            while variant == "official" and kl() > kl_limit:
                adam.zero_grad()
                kl().backward()
                adam.step()
        used = used.item()
        return x.detach(), False, cross.item() + used + (1 if variant == "official" and used <= 1e-6 else 0)

    pool = []
    for k in range(rounds):
        z = torch.randn(1, 4, 16, 16, generator=g).double()
        x, success, score = attempt(z, round_steps, 0)
        if success:
            return x, True, k + 1, history
        pool.append((score, z if variant == "official" else x))
    best = min(pool, key=lambda entry: entry[0])[1]
    if variant == "official":
        best, success, _ = attempt(best, last_steps, 1)
        return best, success, rounds, history
    return best, False, rounds, history


@pytest.mark.parametrize(
    "variant, seeds, limits, how",
    [
        # Never succeeds: self stays above 0.4 here.
        ("official", [1, 5], (0.2, 0.3), {"rounds": 2, "round_steps": 2, "last_steps": 2}),
        ("official", [1, 5, 8], (0.15, math.inf), {"rounds": 3, "round_steps": 3, "last_steps": 8}),
        ("paper", [1, 5], (0.2, 0.3), {"rounds": 2, "round_steps": 3, "last_steps": 0}),
    ],
)
def test_one_image_equals_a_plain_loop_and_a_batch_its_images(
    double, monkeypatch, variant, seeds, limits, how
):
    with monkeypatch.context() as patched:
        whole = Whole(patched)
        expected = [
            plain_initno(whole, double, seed, 981, variant, lr=1e-2, limits=limits, **how) for seed in seeds
        ]
    how |= {"variant": variant, "lr": 1e-2, "cross_limit": limits[0], "conflict_limit": limits[1]}
    words = ["circle", "square"]
    alone = [initno.optimize(double, PROMPT, words, seed, **how) for seed in seeds]
    batch = initno.optimize_batch(double, [PROMPT] * len(seeds), [words] * len(seeds), seeds, **how)
    [first] = initno.optimize_batch(double, [PROMPT], [words], seeds[:1], **how)
    assert torch.equal(first.noise, alone[0].noise) and first.losses == alone[0].losses
    for result, one, (x, success, rounds, history) in zip(batch, alone, expected):
        for found in (result, one):
            assert (found.success, found.rounds, found.steps) == (success, rounds, len(history))
            before, after = (dict(zip(("cross", "self"), history[k])) for k in (0, -1))
            assert found.losses["before"] == pytest.approx(before, abs=1e-7)
            if variant == "official":
                assert found.losses["after"] == pytest.approx(after, abs=1e-6)
            assert (found.noise - x).abs().max() < 1e-6
            assert found.noise.shape == (1, 4, 16, 16) and found.note is None
        assert (result.noise - one.noise).abs().max() < 1e-9
        for when in ("before", "after"):
            assert result.losses[when] == pytest.approx(one.losses[when], abs=1e-9)
    if limits[1] == math.inf:
        assert len({len(history) for *_, history in expected}) > 1  # each went its own way


def test_the_embedded_model_is_helped(shapes):
    """Seeds whose noise neglects a subject come out attending to all; KL stays within its bound; no
    weight has a gradient."""
    seeds = list(range(12))
    results = initno.optimize_batch(shapes, [PROMPT] * 12, [None] * 12, seeds, steps=30)
    before, after = ([r.losses[when]["cross"] for r in results] for when in ("before", "after"))
    failed = [k for k in range(12) if before[k] >= 0.2]
    assert len(failed) >= 3
    assert sum(results[k].success for k in failed) >= 0.7 * len(failed)
    assert all(a < 0.2 for a, r in zip(after, results) if r.success)
    for k, r in enumerate(results):
        if r.steps == 1:  # good as it was: the seed's own noise, to the bit
            assert torch.equal(r.noise, noise([k], (4, 16, 16)))
    # The losses reported are those of the noise returned.
    scores = initno.attention_scores(shapes, PROMPT, None, torch.cat([r.noise for r in results]), steps=30)
    assert scores == pytest.approx([sum(r.losses["after"].values()) for r in results], abs=1e-3)
    for network in (shapes.unet, shapes.text.model, shapes.vae):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_scores_of_seeds_are_those_of_their_noises(shapes):
    by_seed = initno.attention_scores(shapes, PROMPT, "circle, square", [4, 5, 6])
    by_noise = initno.attention_scores(shapes, PROMPT, [3, 7], noise([4, 5, 6], (4, 16, 16)))
    assert by_seed == by_noise and len(set(by_seed)) == 3


def test_without_rounds_or_learning_the_picture_is_that_of_the_seed(shapes):
    plain = np.asarray(shapes(PROMPT, seeds=[5], steps=3)[0])
    for how in (
        {"rounds": 0},
        {"rounds": 1, "round_steps": 2, "last_steps": 2, "lr": 0.0, "conflict_limit": 0.0},
    ):
        result = initno.optimize(shapes, PROMPT, None, 5, **how)
        assert not result.success
        assert np.array_equal(np.asarray(shapes(PROMPT, noise=result.noise, steps=3)[0]), plain)


def test_only_the_recording_layers_hold_probabilities_and_the_rest_does_not_run(shapes, monkeypatch):
    calls, attend = [], Attention.attend

    def counted(q, k, v, *, probs=None, **more):
        calls.append((q.shape[1], probs))
        return attend(q, k, v, probs=probs, **more)

    monkeypatch.setattr(Attention, "attend", staticmethod(counted))
    ran = []
    handle = shapes.unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    initno.optimize(shapes, PROMPT, None, 5, rounds=1, round_steps=1, last_steps=0)
    handle.remove()
    assert calls and all((n == 256) == (probs == "mean") for n, probs in calls)
    assert not ran


def test_losses_that_are_not_finite_leave_the_seeds_noise(shapes):
    sd = copy.copy(shapes)
    sd.unet = copy.deepcopy(shapes.unet)
    sd.unet.conv_in.weight.fill_(1e30)
    with pytest.warns(UserWarning, match="not finite"):
        result = initno.optimize(sd, PROMPT, None, 5)
    assert not result.success and "not finite" in result.note and result.steps == 1
    assert torch.equal(result.noise, noise([5], (4, 16, 16)))


def test_the_projection_is_bounded_and_says_so(monkeypatch):
    """Two of three noises are far off: each goes on alone until it is near enough, or the bound is
    hit."""

    def away():
        g = initno.Gaussians(torch.zeros(3, 4, 4, 4), lr=1e-2)
        g.p[1:] = 0.3
        g.p[2, :, 0] = 1.0
        return g

    rows, g = torch.arange(3), away()
    first = g.p.clone()
    g.project(rows, 1e-3)
    assert (g.kl(rows)[0] <= 1e-3).all() and torch.equal(g.p[0], first[0])
    turns = [int(n) for n in g.count]
    assert turns[0] == 0 < turns[1] < turns[2]
    monkeypatch.setattr(initno, "KL_TURNS", turns[1])
    g = away()
    with pytest.warns(UserWarning, match=f"still above 0.001 after {turns[1]} steps"):
        g.project(rows, 1e-3)
    assert g.kl(rows)[0].tolist()[1] <= 1e-3 < g.kl(rows)[0].tolist()[2]


@pytest.mark.parametrize("turns", [None, 0, 1], ids=["bounded by none", "bound reached", "one more turn"])
def test_the_projection_of_a_gpu_asks_rarely_and_ends_where_the_other_does(monkeypatch, turns):
    """Images that are done rest, in turns after the last of them as well."""

    def away():
        g = initno.Gaussians(torch.zeros(4, 4, 4, 4, dtype=torch.float64), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        g.p[1:] = 0.3 * torch.randn(g.p[1:].shape, generator=generator, dtype=torch.float64)
        g.p[2, :, 0] = 1.0
        g.count += 5
        return g

    rows = torch.tensor([3, 0, 2])
    each, unasked, asked = away(), away(), []
    each._project_each(rows, 1e-3)
    longest = int(each.count.max()) - 5
    assert longest % initno.KL_UNASKED and longest > 2 * initno.KL_UNASKED
    if turns is not None:
        monkeypatch.setattr(initno, "KL_TURNS", longest + turns)
    each = away()
    done = each._project_each(rows, 1e-3)
    any_ = torch.Tensor.any
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "any", lambda y: asked.append(1) or any_(y))
        assert unasked._project_unasked(rows, 1e-3) == done == (turns != 0)
    assert len(asked) <= longest // initno.KL_UNASKED + 2
    assert torch.equal(each.count, unasked.count)
    for name in ("p", "first", "second"):
        assert (getattr(each, name) - getattr(unasked, name)).abs().max() < 1e-12
    assert torch.equal(unasked.p[1], away().p[1])


def test_progress_tells_where_it_is(shapes):
    said = []
    initno.optimize(
        shapes,
        PROMPT,
        None,
        5,
        rounds=2,
        round_steps=2,
        last_steps=1,
        conflict_limit=0.0,
        progress=said.append,
    )
    assert [re.sub(r"\d\.\d\d", "#", line) for line in said] == [
        f"{where} cross # self #"
        for where in (
            "round 1/2 step 1/2",
            "round 1/2 step 2/2",
            "round 2/2 step 1/2",
            "round 2/2 step 2/2",
            "last try step 1/1",
            "last try, end",
        )
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda sd: initno.optimize(sd, PROMPT, "cat, square", 0), "not in the prompt"),
        (lambda sd: initno.optimize(sd, PROMPT, [], 0), "no subjects"),
        (lambda sd: initno.optimize(sd, PROMPT, [3, 40], 0), "outside the prompt"),
        (lambda sd: initno.optimize(sd, PROMPT, None, 0, variant="novel"), "no variant"),
        (lambda sd: initno.optimize(sd, PROMPT, None, 0, sampler="ddmi"), "no sampler"),
        (lambda sd: initno.optimize(sd, PROMPT, None, 0, rounds=-1), "rounds"),
        (lambda sd: initno.optimize(sd, PROMPT, None, -1), "seed"),
        (lambda sd: initno.optimize_batch(sd, [PROMPT], [None], [0, 1]), "one seed per image"),
        (lambda sd: initno.attention_scores(sd, PROMPT, [0], [0, 1]), "outside the prompt"),
    ],
)
def test_bad_input_is_refused_before_any_network_runs(shapes, call, message):
    def refuse(*_):
        raise AssertionError("a network ran")

    handles = [network.register_forward_pre_hook(refuse) for network in (shapes.unet, shapes.text.model)]
    try:
        with pytest.raises(ValueError, match=message):
            call(shapes)
    finally:
        for handle in handles:
            handle.remove()
