"""Updates while denoising against a plain DDIM loop over one image in float64, from whole softmax
tensors."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_losses import PROMPT, Whole, plain_losses

import minsd
from minsd.noise import drivers, excite
from minsd.noise.initial import noise
from minsd.noise.look import Lift

PLACES = [[3], [7]]


@pytest.fixture(scope="module")
def double(small_folder):
    """The small random model in float64. Its attention is nearly uniform: sharpen it."""
    sd = minsd.load(str(small_folder), "cpu")
    sd.unet.double()
    for name, weight in sd.unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.mul_(6)
    return sd


def plain_run(whole, sd, z, steps, variant, scale, repeats):
    """The specification line by line, under DDIM at guidance 5 -> latents, evaluations of the
    losses."""
    context, empty = sd.encode_prompt(PROMPT), sd.encode_prompt("")
    timesteps = sd.schedule.timesteps(steps)
    x = z.double()
    running = []
    evaluations = 0
    sizes = scale * np.sqrt(np.linspace(1, 0.5, steps))

    def evaluate(x, t, full):
        nonlocal evaluations, running
        evaluations += 1
        x = x.detach().requires_grad_()
        maps = whole.maps(sd.unet, x, t, context)
        now = plain_losses(*maps, PLACES)[-1]
        running = [0.9 * r + 0.1 * m for r, m in zip(running or now, now)]
        cross, conflict, background, align, _ = plain_losses(*maps, PLACES, running)
        loss = cross + 0.1 * background + 0.1 * align + conflict if full else cross
        return cross.item(), conflict.item(), torch.autograd.grad(loss, x)[0]

    official = variant == "official"
    limits = {10: 0.2, 20: 0.2} if official else {0: 0.95, 10: 0.5, 20: 1 - 0.8}
    for i, t in enumerate(timesteps):
        if i < 25:
            cross, conflict, gradient = evaluate(x, t, False)
            if i in limits and (cross > limits[i] or (official and conflict > 0.3)):
                for _ in range(repeats):
                    cross, conflict, gradient = evaluate(x, t, official)
                    x = x - sizes[i] * gradient
                    if cross <= limits[i] and (not official or conflict <= 0.3):
                        break
                cross, _, gradient = evaluate(x, t, False)
            if cross != 0:
                x = x - sizes[i] * gradient
        with torch.no_grad():
            u, c = (sd.unet(x, t, text) for text in (empty, context))
        eps = u + 5 * (c - u)
        a = sd.schedule.abar(t)
        below = t - 1000 // steps
        b = sd.schedule.abar(below) if below >= 0 else sd.schedule.abar(0)
        x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    return x, evaluations


@pytest.mark.parametrize("variant, steps, repeats", [("official", 12, 4), ("attend-and-excite", 11, 20)])
def test_updates_equal_a_plain_loop_and_a_batch_its_images(double, monkeypatch, variant, steps, repeats):
    made = drivers.refine

    def few(sd, slope, how, *rest, **more):
        return made(sd, slope, dataclasses.replace(how, most=repeats), *rest, **more)

    monkeypatch.setattr(drivers, "refine", few)
    z = noise([0, 3], (4, 16, 16)).double()
    with monkeypatch.context() as patched:
        whole = Whole(patched)
        expected = [plain_run(whole, double, z[b : b + 1], steps, variant, 2.0, repeats) for b in range(2)]
    ran = []
    handle = double.unet.conv_in.register_forward_hook(lambda m, inputs, _: ran.append(len(inputs[0])))
    refine = excite.updates(double, [PROMPT] * 2, [None] * 2, variant=variant, steps=steps, scale=2.0)
    latents = double.sample(PROMPT, z, steps=steps, guidance_scale=5.0, refine=refine)
    handle.remove()
    assert sum(ran) - 4 * steps == sum(evaluations for _, evaluations in expected)
    plain = double.sample(PROMPT, z, steps=steps, guidance_scale=5.0)
    for x, before, (theirs, _) in zip(latents, plain, expected):
        assert (x - theirs[0]).abs().max() < 1e-5 * theirs.abs().max()
        assert (x - before).norm() > 0.01 * before.norm()  # and they did something


def test_updates_of_size_zero_change_nothing_and_after_25_steps_nothing_is_asked(shapes):
    refine = excite.updates(shapes, [PROMPT], [None], scale=0.0, steps=2)
    plain, same = (shapes(PROMPT, seeds=[3], steps=2, refine=r)[0] for r in (None, refine))
    assert np.array_equal(np.asarray(plain), np.asarray(same))
    x = torch.zeros(7, 4, 16, 16)
    assert refine(25, 1, x) is x


def test_the_step_sizes_are_those_of_the_sampler_in_use(shapes, monkeypatch):
    """PNDM lists 11 timesteps for 10 steps: its last update is the smallest, half the square root."""
    told = dict.fromkeys(("loss", "cross", "self"), torch.tensor([0.1]))
    monkeypatch.setattr(Lift, "slope", lambda self, x, *_: (told, torch.ones_like(x)))
    refine = excite.updates(shapes, [PROMPT], [None], steps=10, sampler="pndm", scale=3.0)
    x = torch.zeros(1, 4, 16, 16)
    assert [refine(i, 1, x)[0, 0, 0, 0].item() for i in (0, 5, 10)] == pytest.approx(
        [-3, -3 * 0.75**0.5, -3 * 0.5**0.5]
    )


def test_an_image_whose_losses_are_not_finite_goes_on_without_updates(shapes):
    sd = copy.copy(shapes)
    refine = excite.updates(sd, [PROMPT] * 2, [None] * 2, steps=30)
    x = noise([0, 1], (4, 16, 16))
    x[0] = 1e38
    with pytest.warns(UserWarning, match="not finite"):
        moved = refine(0, 958, x)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])


def test_the_embedded_model_attends_more(shapes):
    """At one timestep, update after update: the response loss of noises that neglect a subject
    falls."""
    seen = [[] for _ in range(6)]
    x = noise(range(6), (4, 16, 16))
    for _ in range(6):
        refine = excite.updates(
            shapes,
            [PROMPT] * 6,
            [None] * 6,
            steps=30,
            scale=2.0,
            progress=lambda b, message: seen[b].append(float(message.split()[5])),
        )
        x = refine(1, shapes.schedule.timesteps(30)[0], x)
    before, after = np.array(seen)[:, 0], np.array(seen)[:, -1]
    assert (before > 0.2).sum() >= 2
    assert after[before > 0.2].mean() < before[before > 0.2].mean() - 0.1
    assert all(
        p.grad is None and not p.requires_grad
        for network in (shapes.unet, shapes.text.model)
        for p in network.parameters()
    )


def test_watching_changes_nothing_and_makes_a_sheet(shapes):
    refine, frames = excite.watch(shapes, [PROMPT] * 2, ["red circle, square"] * 2, steps=6, count=3)
    watched = shapes(PROMPT, seeds=[0, 1], steps=6, refine=refine)
    plain = shapes(PROMPT, seeds=[0, 1], steps=6)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(watched, plain))
    assert frames.steps == [0, 2, 5] and all(m.shape == (2, 2, 16, 16) for m in frames.cross + frames.self)
    assert 0 <= min(m.min() for m in frames.cross) and max(m.max() for m in frames.cross) <= 1
    sheet = excite.sheet(watched[1], frames, 1, ["red circle", "square"])
    assert sheet.width >= 3 * 128 and sheet.height >= 4 * 128
    frames.cross = [torch.stack([m[:, 0], m[:, 0] / 50], dim=1) for m in frames.cross]  # square neglected
    frames.self = frames.cross
    rows = np.asarray(excite.sheet(Image.new("L", (128, 128)), frames, 0, ["circle", "square"]))[..., 0]
    first, second = 4 * 16, 4 * 16 + 128 + 18 + 16  # below the title, and below another row of maps
    reds = [rows[top + 8 : top + 120, 8:120].max() for top in (first, second)]
    assert reds[0] > 60 and reds[1] < 10  # on one scale the neglected subject stays dark
    hot = np.asarray(excite.heat(torch.eye(16), watched[0])).astype(int)
    assert hot[60:64, 60:64].mean() > hot[60:64, 0:4].mean() + 30  # bright on the diagonal


@pytest.mark.parametrize(
    "how, message",
    [
        ({"subjects": ["cat"]}, "not in the prompt"),
        ({"variant": "paper"}, "no variant"),
        ({"sampler": "ddmi"}, "no sampler"),
    ],
)
def test_bad_input(shapes, how, message):
    with pytest.raises(ValueError, match=message):
        excite.updates(shapes, [PROMPT], **{"subjects": [None], **how})
    with pytest.raises(ValueError, match="batch of 2"):
        excite.updates(shapes, [PROMPT] * 2, [None] * 2)(0, 981, torch.zeros(3, 4, 16, 16))
