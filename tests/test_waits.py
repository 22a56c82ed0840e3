"""No step waits for a GPU: what crosses the bus, counted without one.

A copy from the CPU's ordinary memory to a GPU waits until the GPU has done everything before it.
Networks on the meta device compute nothing, but every operation passes a dispatch mode, which counts
those that take tensors of both devices.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minsd
from minsd import graphs, guidance
from minsd.config import ScheduleConfig, UNetConfig
from minsd.controlnet import Control, Controlled, ControlNet
from minsd.noise import collage, collage_control, layout, losses
from minsd.noise.initial import noise
from minsd.noise.look import Ask, Lift, Look
from minsd.noise.objectives.initno import InitNO
from minsd.samplers.schedule import Schedule
from minsd.unet import UNet

CONFIG = UNetConfig(
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_heads=(2,) * 4, context_dim=8, norm_groups=4
)


class Copies(TorchDispatchMode):
    """The names of operations that move data between the CPU and the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [y for y in tree_leaves((args, kwargs, out)) if isinstance(y, torch.Tensor)]
        devices = {y.device.type for y in tensors if y.ndim or func is torch.ops.aten._to_copy.default}
        if len(devices) > 1:
            self.found.append(str(func))
        return out


def meta_model(batch=4):
    """What a collage needs of a model, on the meta device."""

    def encode_prompt(prompts, size=None):
        return torch.empty(1 if isinstance(prompts, str) else len(prompts), 77, 8, device="meta")

    with torch.device("meta"):
        unet = UNet(CONFIG).requires_grad_(False)
    sd = SimpleNamespace(unet=unet, device=torch.device("meta"), dtype=torch.float32, guidance_rescale=0.0)
    sd.config = SimpleNamespace(size=128, unet=unet.config)
    sd.schedule = Schedule(ScheduleConfig())
    sd.encode_prompt, sd.batch_size = encode_prompt, lambda height, width: batch
    sd.predictor = lambda c, u, g: guidance.classifier_free(sd.unet, c, u, g, sd.schedule)
    return sd


LAYOUT = {
    "prompt": "a park",
    "regions": [
        {"prompt": "a red circle", "box": [0, 0, 64, 128]},
        {"prompt": "a blue square", "box": [64, 0, 128, 128], "negative_prompt": "a heart"},
    ],
}


def copies_of_a_step(predict, n=2, t=401):
    """Those of the second step; the first makes what all steps share."""
    x = torch.empty(n, 4, 16, 16, device="meta")
    predict(x, t)
    with Copies() as copies:
        predict(x, t - 20)
    return copies.found


def test_a_copy_is_counted():
    with Copies() as copies:
        torch.zeros(3).to("meta")
        torch.empty(3, device="meta")[torch.tensor([1, 2])]
        torch.empty(3, device="meta") * 2.0
    assert copies.found == ["aten._to_copy.default", "aten.index.Tensor"]


@torch.no_grad()
@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 1),  # this step's draws, all grids in one
        ({"ladder": "compat"}, 1),
        ({"seed": [1, 2]}, 1),
        ({"pad": 0.25}, 0),
        ({"background_drop": 1}, 0),
        ({"masked": False}, 0),
        ({"attention_only": True}, 0),
        ({"crop_margin": 0.25, "crop_until": 0}, 0),
    ],
)
def test_a_collage_step_copies_at_most_its_draws(options, copies, batch):
    lay = layout.load(LAYOUT).sized(128, 128)
    found = copies_of_a_step(collage.predictor(meta_model(batch), lay, **options))
    assert found == ["aten._to_copy.default"] * copies


@torch.no_grad()
def test_draws_leave_pinned_memory_and_nobody_waits(monkeypatch):
    """The stand-in for a GPU keeps the data on the CPU and notes how it was asked for."""
    asked = []
    pin, to = torch.Tensor.pin_memory, torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda y: asked.append("pinned") or y.clone())
    monkeypatch.setattr(
        torch.Tensor, "to", lambda y, device, **how: asked.append((str(device), how)) or y.clone()
    )
    halves = [{(2, 2): torch.arange(8).view(2, 1, 4), (1, 1): torch.tensor([[[8]], [[9]]])}] * 2
    there = collage.sent(halves, torch.device("cuda", 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert asked == ["pinned", ("cuda:0", {"non_blocking": True})]
    for here, half in zip(halves, there, strict=True):
        assert here.keys() == half.keys() and all(torch.equal(here[grid], half[grid]) for grid in here)
    assert collage.sent(halves, torch.device("cpu")) is halves


@torch.no_grad()
def test_a_controlnet_step_copies_nothing():
    sd = meta_model()
    with torch.device("meta"):
        net = ControlNet(CONFIG, (4, 4, 8, 8)).requires_grad_(False)
    controls = [
        Control(net, torch.rand(2, 3, 128, 128), [0.7, 0.2]),
        Control(net, torch.rand(1, 3, 128, 128)),
    ]
    plain = copy.copy(sd)
    plain.unet = Controlled(sd.unet, controls)
    for model in (sd, plain):
        cond, uncond = model.encode_prompt("a park"), model.encode_prompt("")
        predict = guidance.classifier_free(model.unet, cond, uncond, 7.5, model.schedule)
        assert copies_of_a_step(predict) == []
    lay = layout.load(LAYOUT).sized(128, 128)
    for options in ({}, {"crop_margin": 0.25, "crop_until": 0}):
        pictures = torch.rand(3, 3, 128, 128)
        predict = collage_control.predictor(sd, lay, net, pictures, [0.5, 1.0, 0.7], **options)
        assert copies_of_a_step(predict) == []


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"pad": 0.25}, {"crop_margin": 0.25, "crop_until": 0}])
@pytest.mark.parametrize("controlled", [False, True])
def test_on_a_gpu_no_step_of_a_collage_waits(options, controlled):
    sd = minsd.load("shapes", "cuda")
    lay = layout.load(LAYOUT).sized(128, 128)
    if controlled:
        torch.manual_seed(0)
        net = ControlNet(sd.config.unet, (4, 4, 8, 8)).requires_grad_(False).to("cuda", sd.dtype)
        graphs.use_graphs(net)
        pictures = torch.rand(3, 3, 128, 128)
        predict = collage_control.predictor(sd, lay, net, pictures, [0.5, 1.0, 0.7], **options)
    else:
        predict = collage.predictor(sd, lay, **options)
    x = noise([1, 2], (4, 16, 16)).to("cuda", sd.dtype)
    for t in (981, 961, 941):  # the second captures the graphs
        predict(x, t)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(x, 921)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_loss_of_an_optimisation_step_is_read_before_its_gradient(monkeypatch):
    """On the meta device every question for a value raises."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda y: True))
    sd = meta_model()
    sd.text = None
    monkeypatch.setattr(losses, "component", lambda mask, at: mask)  # asks every eighth ring
    sd.config.conflict_limit, sd.config.update_scale = 0.3, 20.0
    asks = [Ask(prompt, 0, [[2], [5]]) for prompt in "ab"]
    objective = InitNO(sd, asks)
    lift = Lift(sd, asks, objective)
    x = torch.empty(2, 4, 16, 16, device="meta")
    for i, phase in ((None, "update"), (3, "update"), (3, "repeat")):
        look = Look(lift, x, torch.arange(2, device="meta"), 401, i, phase)
        cells = torch.rand(2, 16, 16, 256, device="meta")
        look._held = {"cross": cells[..., :77], "self": cells}
        loss, told = objective(look)
        assert loss.shape == told["cross"].shape == (2,)


@pytest.mark.parametrize("asking", [1, 3, 8])
def test_a_component_is_the_same_however_rarely_it_is_asked_for(asking, monkeypatch):
    mask = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.62
    mask[0, 0] = False
    mask[0, 0, ::2] = True  # a snake, of the longest way
    mask[0, 0, 1::4, -1] = mask[0, 0, 3::4, 0] = True
    at = mask.flatten(2).long().argmax(-1)
    expected = losses.component(mask, at)
    assert 100 < expected[0, 0].sum() == mask[0, 0].sum()
    asked, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: asked.append(1) or equal(a, b))
    found = losses.component(mask, at, asking)
    assert equal(found, expected) and len(asked) <= 16 * 16 / asking
