"""Inversion stability against diffusers' schedulers, finite differences, torch.optim.SGD and live
memory."""

import math
import types

import numpy as np
import pytest
import torch
from conftest import Live
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image
from test_samplers import SD

from minsd import guidance
from minsd.config import ModelConfig, ScheduleConfig, UNetConfig
from minsd.noise import stability
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion
from minsd.unet import UNet

PROMPTS = ["a red circle", "a blue square and a star"]


def tiny(dtype=torch.float64, prediction_type="epsilon"):
    """A random UNet on 4x8x8 latents, nonlinear in x, t and text, and a text encoder without files."""
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention=(True, False),
        num_heads=(2, 2),
        context_dim=8,
        norm_groups=4,
        sample_size=8,
    )
    unet = UNet(config).to(dtype).requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.weight.mul_(1.3)

    def encode(prompts):
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        return torch.cat([torch.randn(1, 77, 8, generator=g) for g in generators])

    text = types.SimpleNamespace(encode=encode)
    schedule = ScheduleConfig(prediction_type=prediction_type)
    return StableDiffusion(ModelConfig("tiny", unet=config, schedule=schedule), unet, None, text)


START = noise([0, 1, 2], (4, 8, 8)).double()
BOTH = [*PROMPTS, PROMPTS[0]]


@pytest.fixture(scope="module")
def sd():
    return tiny()


def there_and_back(sd, prompt, x, steps, down, up):
    """noise' by diffusers' two schedulers and guidance written out, one image at a time."""
    cond, uncond = sd.encode_prompt(prompt), sd.encode_prompt("")
    for scheduler, g in ((DDIMScheduler(**SD), down), (DDIMInverseScheduler(**SD), up)):
        scheduler.set_timesteps(steps)
        for t in map(int, scheduler.timesteps):
            c = sd.unet(x, t, cond)
            eps = c if g == 1 else sd.unet(x, t, uncond) * (1 - g) + g * c
            x = scheduler.step(eps, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "steps, down, up, rows_each", [(10, 7.5, 1.0, 30), (5, 2.0, 2.0, 20), (5, 1.0, 1.0, 10)]
)
def test_scores_are_cosines_of_trips_through_diffusers(sd, steps, down, up, rows_each):
    result = stability.score(sd, BOTH, START, steps=steps, guidance_scale=down, guidance_invert=up)
    for got, prompt, x in zip(result.scores, BOTH, START):
        back = there_and_back(sd, prompt, x[None], steps, down, up)
        expected = np.dot(x.numpy().ravel(), back.numpy().ravel()) / np.linalg.norm(x) / np.linalg.norm(back)
        # diffusers keeps its levels in float32.
        assert got == pytest.approx(expected, abs=1e-6) and -1 <= got <= 1
    assert result.rows == 3 * rows_each  # 3 T, 4 T with guidance both ways, 2 T without
    if rows_each == 30:
        # The defaults: 10 steps, guidance 7.5 (the model's) down and 1 up.
        assert stability.score(sd, BOTH, START).scores == result.scores
    assert stability.cosine(START, START).tolist() == pytest.approx([1] * 3, abs=1e-15)


def test_batched_is_one_by_one(sd, monkeypatch):
    whole = stability.score(sd, BOTH, START)
    how = {"optimize_steps": 2, "steps": 3, "lr": 5.0, "rescale": True}
    together, full = [
        stability.optimize_batch(sd, BOTH, START, mode=mode, **how) for mode in ("detach", "full")
    ]
    monkeypatch.setattr(sd, "batch_size", lambda height, width: 1, raising=False)
    single = stability.score(sd, BOTH, START)
    assert single.scores == pytest.approx(whole.scores, abs=1e-12) and single.rows == whole.rows
    for mode, before in (("detach", together), ("full", full)):
        for k, result in enumerate(before):
            alone = stability.optimize(sd, BOTH[k], START[k : k + 1], mode=mode, **how)
            assert torch.allclose(alone.noise, result.noise, atol=1e-11) and alone.rows == result.rows


def test_with_equal_guidance_finer_steps_return_nearer(sd, shapes):
    missed = [
        1 - np.array(stability.score(sd, BOTH, START, steps=T, guidance_scale=1.0).scores)
        for T in (5, 10, 20, 40)
    ]
    assert all((coarse > fine).all() for coarse, fine in zip(missed, missed[1:]))
    assert (missed[-1] < missed[0] / 4).all()
    missed = [
        1 - np.mean(stability.score(shapes, PROMPTS[0], [3, 4], steps=T, guidance_scale=1.0).scores)
        for T in (5, 20)
    ]
    assert missed[0] > missed[1] > 0


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_full_gradients_equal_finite_differences(prediction_type):
    """In float64, along random directions and single numbers, for a batch; checkpoints change no
    bit."""
    sd = tiny(prediction_type=prediction_type)
    trip, rows = stability.Trip(sd, BOTH, steps=3), torch.arange(3)
    scores, gradient = stability.gradients(trip, START, rows, "full")
    unchecked = stability.gradients(trip, START, rows, "full", checkpointed=False)
    assert torch.equal(unchecked[1], gradient) and torch.equal(unchecked[0], scores)
    assert scores.tolist() == pytest.approx(stability.score(sd, BOTH, START, steps=3).scores, abs=1e-12)
    generator = torch.Generator().manual_seed(5)
    directions = [*torch.randn(4, 1, 4, 8, 8, generator=generator, dtype=torch.float64), gradient]
    for k in (0, 100, 255):
        directions.append(torch.nn.functional.one_hot(torch.tensor(k), 256).double().view(1, 4, 8, 8))
    for direction in directions:
        direction = direction.expand_as(START) / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        h = 1e-4
        with torch.no_grad():  # fourth order: f(h) and f(2h)
            points = [START + k * h * direction for k in (1, -1, 2, -2)]
            s = [stability.cosine(x, trip(x, rows)) for x in points]
        slope = -(8 * (s[0] - s[1]) - (s[2] - s[3])) / (12 * h)
        claimed = (gradient * direction).flatten(1).sum(dim=1)
        assert (claimed - slope).abs().max() <= 1e-6 * gradient.flatten(1).norm(dim=1).min()


def test_detached_gradients_are_perpendicular(sd):
    trip, rows = stability.Trip(sd, BOTH, steps=5), torch.arange(3)
    scores, gradient = stability.gradients(trip, START, rows, "detach")
    back = trip(START, rows)
    leaf = START.clone().requires_grad_()
    s = torch.nn.functional.cosine_similarity(leaf.flatten(1), back.flatten(1))
    expected = torch.autograd.grad((1 - s).sum(), leaf)[0]
    assert torch.allclose(gradient, expected, atol=1e-15)
    for g, x, v, s in zip(gradient, START, back, scores):
        u, v = x.flatten() / x.norm(), v.flatten() / v.norm()
        angle = 2 * math.atan2((u - v).norm(), (u + v).norm())  # not by way of the cosine
        assert abs(torch.dot(g.flatten(), u)) <= 1e-15 and s == pytest.approx(math.cos(angle), abs=1e-14)
        assert g.norm().item() == pytest.approx(math.sin(angle) / x.norm().item(), rel=1e-12)


def test_memory_of_full_is_flat_in_the_number_of_steps(sd):
    peaks = {}
    for checkpointed in (True, False):
        for steps in (3, 12):
            trip = stability.Trip(sd, PROMPTS[0], steps=steps)
            with Live() as live:
                stability.gradients(trip, START[:1], torch.arange(1), "full", checkpointed)
            peaks[checkpointed, steps] = live.peak
    assert peaks[False, 12] > 3 * peaks[False, 3]  # the measure sees activations
    assert peaks[True, 12] < 1.1 * peaks[True, 3]  # grows by the latents between steps, 2 kB each
    assert peaks[True, 12] < peaks[False, 3] / 2


# --- selection -----------------------------------------------------------------------------------


def test_selection(sd):
    """The best and the worst score; known ones cost nothing; a repeated seed counts once; one seed
    suffices."""
    seeds = [5, 3, 9, 7, 3]
    messages = []
    alone = {seed: stability.score(sd, PROMPTS[0], [seed], steps=3).scores[0] for seed in seeds}
    best = stability.select(sd, PROMPTS[0], seeds, steps=3, progress=messages.append)
    assert best.scores == pytest.approx(alone, abs=1e-9) and list(best.scores) == [5, 3, 9, 7]
    assert best.seed == max(alone, key=alone.get) and torch.equal(best.noise, noise([best.seed], (4, 8, 8)))
    assert best.ranked == sorted(alone, key=alone.get, reverse=True)
    assert best.rows == 4 * 9 and best.score == best.scores[best.seed]
    assert messages == [f"4/4 best {best.score:.3f} (seed {best.seed})"]
    more = stability.select(sd, PROMPTS[0], [*seeds, 11], steps=3, known=best.scores)
    assert more.rows == 9 and {s: more.scores[s] for s in best.scores} == best.scores
    worst = stability.select(sd, PROMPTS[0], seeds, steps=3, known=best.scores, worst=True)
    assert worst.rows == 0 and worst.seed == best.ranked[-1]
    chosen = {0: 2.0, 1: math.nan, 2: 2.0}  # impossible scores
    taken = stability.select(sd, PROMPTS[0], [2, 0, 1], known=chosen)
    assert (taken.seed, taken.rows, taken.ranked) == (2, 0, [2, 0, 1])
    assert torch.equal(stability.select(sd, PROMPTS[0], [6], steps=2).noise, noise([6], (4, 8, 8)))
    with pytest.raises(FloatingPointError, match="overflowed"):
        stability.select(sd, PROMPTS[0], [1], known=chosen)


def test_progress_names_the_best_so_far(sd, monkeypatch):
    monkeypatch.setattr(sd, "batch_size", lambda height, width: 2, raising=False)
    messages = []
    scores = stability.select(sd, PROMPTS[0], [4, 5, 6, 7, 8], steps=2, progress=messages.append).scores
    for message, count in zip(messages, (2, 4, 5), strict=True):
        seed = max(list(scores)[:count], key=scores.get)
        assert message == f"{count}/5 best {scores[seed]:.3f} (seed {seed})"


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"sampler": "euler_a"}, "noise or memory"),
        ({"sampler": "lcm"}, "noise or memory"),
        ({"sampler": "dpmpp_2m"}, "noise or memory"),
        ({"sampler": "unipc"}, "noise or memory"),
        ({"sampler": "pndm"}, "noise or memory"),
        ({"eta": 0.5}, "noise or memory"),
        ({"sampler": "ddpm"}, "no sampler"),
        ({"steps": 0}, "steps"),
        ({"guidance_scale": math.nan}, "guidance"),
        ({"height": 60}, "multiple of 8"),
    ],
)
def test_refusals_come_before_any_network_runs(sd, wrong, says):
    with guidance.counted(sd.unet) as rows:
        for call in (stability.score, stability.select):
            with pytest.raises(ValueError, match=says):
                call(sd, PROMPTS[0], [0, 1], **wrong)
        with pytest.raises(ValueError, match=says):
            stability.optimize(sd, PROMPTS[0], 0, **wrong)
    assert not rows


def test_more_refusals(sd):
    for wrong, says in (
        ({"mode": "half"}, "mode"),
        ({"keep": "first"}, "keep"),
        ({"optimize_steps": -1}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
    ):
        with pytest.raises(ValueError, match=says):
            stability.optimize(sd, PROMPTS[0], 0, **wrong)
    with pytest.raises(ValueError, match="no seeds"):
        stability.select(sd, PROMPTS[0], [])
    with pytest.raises(ValueError, match="one prompt"):
        stability.score(sd, PROMPTS, START)
    with pytest.raises(ValueError, match="shape"):
        stability.score(sd, PROMPTS[0], START[0])


def test_other_samplers_without_memory_end_where_the_inversion_begins(sd):
    """Euler's rule between DDIM's levels is DDIM: the same score, if it ends where the inversion
    begins."""
    a, b, c = (stability.score(sd, BOTH, START, steps=5, sampler=name) for name in ("ddim", "euler", "heun"))
    assert b.scores == pytest.approx(a.scores, abs=1e-9) and c.scores != pytest.approx(a.scores, abs=1e-4)
    assert c.rows == 3 * (2 * 9 + 5)


# --- optimisation --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("mode", ["full", "detach"])
def test_optimisation_is_sgd_with_momentum(sd, mode):
    """torch's SGD and autograd over a trip through diffusers' schedulers: noise, scores, norms,
    rows, messages."""
    messages = []
    options = {
        "mode": mode,
        "optimize_steps": 3,
        "lr": 4.0,
        "momentum": 0.5,
        "steps": 3,
        "guidance_scale": 2.0,
    }
    result = stability.optimize(sd, PROMPTS[1], START[:1], progress=messages.append, **options)
    x = START[:1].clone().requires_grad_()
    sgd, expected = torch.optim.SGD([x], lr=4.0, momentum=0.5), []
    for step in range(4):
        back = there_and_back(sd, PROMPTS[1], x, 3, 2.0, 1.0)
        back = back if mode == "full" else back.detach()
        s = torch.nn.functional.cosine_similarity(x.flatten(1), back.flatten(1))[0]
        expected.append(
            {"score": s.item(), "norm": x.norm().item() / 16, "mean": x.mean().item(), "std": x.std().item()}
        )
        if step < 3:
            sgd.zero_grad()
            (1 - s).backward()
            sgd.step()
    assert torch.allclose(result.noise, x.detach(), atol=1e-5)
    assert not torch.allclose(result.noise, START[:1], atol=1e-2)
    assert [pytest.approx(h, abs=1e-5) for h in expected] == result.history
    assert result.before == result.history[0]["score"] < result.history[-1]["score"] == result.score
    # Checkpoints compute every row again.
    assert result.rows == (9 * (3 * 2 + 1) if mode == "full" else 9 * 4)
    best, last = max(h["score"] for h in result.history), result.history[-1]
    assert messages[-1] == (
        f"step 3/3 score {last['score']:.3f} best {best:.3f} norm {last['norm']:.3f} mean {last['mean']:.3f}"
        f" std {last['std']:.3f}"
    )


def test_nothing_to_do_gives_the_plain_noise_and_picture(shapes):
    plain = noise([3], (4, 16, 16))
    still = {"optimize_steps": 1, "lr": 0.0}
    for options in ({"optimize_steps": 0}, still, still | {"mode": "detach"}):
        assert torch.equal(stability.optimize(shapes, PROMPTS[0], 3, steps=2, **options).noise, plain)
    picked = stability.select(shapes, PROMPTS[0], [3], steps=2)
    pictures = [shapes(PROMPTS[0], seeds=[3], steps=2, **how)[0] for how in ({}, {"noise": picked.noise})]
    assert np.array_equal(*map(np.asarray, pictures))
    ranking = stability.Selection(3, plain, 0.5, {3: 0.5, 4: 0.25, 5: 0.75}, 0, "high")
    board = stability.sheet(shapes, PROMPTS[0], ranking, count=1, steps=2)
    best = np.asarray(shapes(PROMPTS[0], seeds=[5, 4], steps=2)[0])
    assert np.array_equal(np.asarray(board)[2:130, 2:130], best)


def test_norms_warn_and_can_be_rescaled(sd):
    rough = {"optimize_steps": 2, "lr": 300.0, "steps": 2, "mode": "full"}
    with pytest.warns(
        UserWarning, match=r"noise is \d\.\d+ of unit noise's, outside 0\.97\.\.1\.03: lower lr"
    ):
        left = stability.optimize(sd, PROMPTS[0], START[:1], **rough)
    assert not 0.97 <= left.history[-1]["norm"] <= 1.03
    kept = stability.optimize(sd, PROMPTS[0], START[:1], rescale=True, **rough)
    assert [h["norm"] for h in kept.history[1:]] == pytest.approx([1, 1], abs=1e-12)
    assert kept.noise.norm().item() == pytest.approx(16, abs=1e-12)


def test_the_best_iterate_can_be_kept(sd):
    # A far too large lr: the score jumps about.
    rough = {"optimize_steps": 4, "lr": 3000.0, "steps": 2, "mode": "detach", "rescale": True}
    runs = [stability.optimize(sd, PROMPTS[0], START[:1], keep=keep, **rough) for keep in ("last", "best")]
    scores = [h["score"] for h in runs[0].history]
    assert max(scores) > scores[-1] and (runs[0].score, runs[1].score) == (scores[-1], max(scores))
    again = stability.score(sd, PROMPTS[0], runs[1].noise, steps=2).scores
    assert again == pytest.approx([max(scores)], abs=1e-12)


@pytest.mark.filterwarnings("ignore:at step")
def test_what_is_not_finite_gives_the_plain_noise(sd):
    bad = START.clone()
    bad[1, 0, 0, 0] = math.inf
    with pytest.warns(UserWarning, match="not finite"):
        results = stability.optimize_batch(sd, BOTH, bad, mode="detach", optimize_steps=2, steps=2)
    assert results[1].note and torch.equal(results[1].noise, bad[1:2])
    assert not results[0].note and results[0].score > results[0].before


# --- pictures ------------------------------------------------------------------------------------


def test_a_picture_is_inverted_and_made_again(shapes):
    picture = shapes("a red circle and a blue square", seeds=[1], steps=6)[0].resize((200, 200))
    plain, better = (stability.invert_picture(shapes, picture, steps=25, iterations=n) for n in (0, 2))
    fitted = np.asarray(picture.resize((128, 128), Image.Resampling.LANCZOS), float)
    for found in (plain, better):
        error = ((np.asarray(found.picture, float) - fitted) ** 2).mean()
        assert found.psnr == pytest.approx(20 * math.log10(255) - 10 * math.log10(error), abs=1e-9)
        again = shapes("", noise=found.noise, steps=25, sampler="ddim", guidance_scale=1.0)[0]
        assert np.abs(np.asarray(again).astype(int) - np.asarray(found.picture)).max() <= 1
    assert (plain.rows, better.rows) == (50, 100)
    assert plain.psnr < better.psnr <= better.codec_psnr + 0.5 and better.psnr > 25
    assert stability.psnr(picture, picture) == math.inf
    for wrong, says in (
        ({"iterations": -1}, "iterations"),
        ({"height": 100}, "multiple of 8"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=says):
            stability.invert_picture(shapes, picture, **wrong)
