"""A collage whose regions have control images and adapters: against single guided passes."""

import contextlib
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minsd import guidance
from minsd.config import ScheduleConfig
from minsd.controlnet import Control, Controlled, ControlNet
from minsd.noise import collage, collage_control, layout
from minsd.noise.initial import noise
from minsd.samplers.schedule import Schedule
from minsd.weights import lora
from minsd.weights.controlnet import load_controlnet
from minsd.weights.shapes import data, detector, extras


@pytest.fixture(scope="module")
def sd(small):
    sd = copy.copy(small)
    sd.unet = copy.deepcopy(small.unet).double()
    sd.schedule = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    return sd


@pytest.fixture(scope="module")
def net(sd):
    torch.manual_seed(2)
    net = ControlNet(sd.config.unet, (4, 4, 8, 8)).double().requires_grad_(False)
    for p in net.controlnet_cond_embedding.parameters():
        p.mul_(3)  # so that control images matter
    return net


def made(*boxes, **more):
    regions = [
        {"prompt": text, "box": box, **more} for text, box in zip(("a red circle", "a blue square"), boxes)
    ]
    given = {"prompt": "two shapes", "negative_prompt": "green", "regions": regions}
    return layout.load(given).sized(128, 96)


LEFT, RIGHT, ALL = [0, 0, 64, 96], [56, 16, 112, 80], [0, 0, 128, 96]
X = noise([1, 2], (4, 12, 16)).double()
PICTURES = torch.rand(3, 3, 96, 128, generator=torch.Generator().manual_seed(3)).double()
SCALES = [0.5, 1.0, 0.7]


def one_by_one(sd, net, lay, x, t, crop, g=4.0, scales=SCALES, adapted=lambda k: contextlib.nullcontext()):
    """The definition: N+1 guided predictions by themselves, merged by weights written out for boxes
    of whole cells."""
    h, w = x.shape[-2:]
    total, merged = torch.zeros(h, w).double(), torch.zeros_like(x)
    for k, who in enumerate((lay, *lay.regions)):
        x0, y0, x1, y1 = (v // 8 for v in (ALL if k == 0 else who.bounds))
        m = torch.zeros(h, w).double()
        m[y0:y1, x0:x1] = 0.1 if k == 0 else who.weight
        if crop in (None, "collage"):
            x0, y0, x1, y1 = 0, 0, w, h
        elif crop == 0.25:
            x0, y0, x1, y1 = {
                (0, 0, 8, 12): (0, 0, 10, 12),
                (7, 2, 14, 10): (5, 0, 16, 12),
                (0, 0, 16, 12): (0, 0, 16, 12),
            }[x0, y0, x1, y1]
        cut = (slice(None), slice(None), slice(y0, y1), slice(x0, x1))
        picture = PICTURES[k : k + 1, :, 8 * y0 : 8 * y1, 8 * x0 : 8 * x1]
        unet, eps = Controlled(sd.unet, [Control(net, picture, scales[k])]), torch.zeros_like(x)
        with adapted(k):
            texts = (sd.encode_prompt(p) for p in (who.prompt, who.negative_prompt))
            eps[cut] = guidance.classifier_free(unet, *texts, g, sd.schedule)(x[cut], t)
        merged, total = merged + m * eps, total + m
    return merged / total


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("crop", [None, 0, 0.25])
@torch.no_grad()
def test_is_the_merge_of_single_passes(sd, net, crop):
    lay = made(LEFT, RIGHT)
    predict = collage_control.predictor(
        sd, lay, net, PICTURES, SCALES, crop_margin=crop, crop_until=0, guidance_scale=4.0
    )
    expected = one_by_one(sd, net, lay, X, 401, crop)
    assert relative(predict(X, 401), expected) < 1e-10
    assert relative(predict(X[:1], 401), expected[:1]) < 1e-10  # another batch size, and rows split otherwise
    off = collage_control.predictor(
        sd, lay, net, PICTURES, [0.0] * 3, crop_margin=crop, crop_until=0, guidance_scale=4.0
    )
    assert relative(off(X, 401), expected) > 1e-3


@pytest.mark.parametrize("crop", [0, 0.25])
@torch.no_grad()
def test_crops_without_a_controlnet(sd, net, crop):
    lay = made(LEFT, RIGHT, weight=0.5)
    predict = collage.predictor(sd, lay, guidance_scale=4.0, crop_margin=crop, crop_until=0)
    expected = one_by_one(sd, net, lay, X, 401, crop, scales=[0.0] * 3)
    assert relative(predict(X, 401), expected) < 1e-10 and relative(predict(X[1:], 401), expected[1:]) < 1e-10
    # A margin reaches no further than the image.
    whole = collage.predictor(sd, lay, guidance_scale=4.0, crop_margin=5, crop_until=0)
    assert relative(whole(X, 401), one_by_one(sd, net, lay, X, 401, None, scales=[0.0] * 3)) < 1e-10


@torch.no_grad()
def test_crops_end_where_objects_have_their_places(sd, net):
    lay = made(LEFT, RIGHT)
    for make in (
        collage.predictor,
        lambda *args, **more: collage_control.predictor(*args, net, PICTURES, SCALES, **more),
    ):
        crops, whole = (make(sd, lay, guidance_scale=4.0, crop_margin=c) for c in (0.25, None))
        assert torch.equal(crops(X, 499), whole(X, 499)) and relative(crops(X, 500), whole(X, 500)) > 1e-3


def test_objects_lie_on_their_outlines_in_crops_too(shapes):
    """The embedded model and its ControlNet, judged by pixels: crops see the part of the outlines
    that is theirs."""
    net = load_controlnet(
        Path(extras.__file__).parent / "extras" / "outlines", device=shapes.device, dtype=shapes.dtype
    )
    right = 0
    for seed in (2, 3, 4, 7, 9, 10):
        rng = np.random.default_rng(seed)
        objects = tuple(
            data.Object(*subject, *place, 0.0)
            for subject, place in zip(data.draw_subjects(rng, 2), data.place(rng, 2))
        )
        reach = [1.15 * o.radius + 2 for o in objects]
        boxes = [
            np.clip([o.x - r, o.y - r, o.x + r, o.y + r], 0, 128).astype(int).tolist()
            for o, r in zip(objects, reach)
        ]
        regions = [{"prompt": f"a {o.colour} {o.shape}", "box": box} for o, box in zip(objects, boxes)]
        lay = layout.load(
            {
                "prompt": " and ".join(r["prompt"] for r in regions),
                "width": 128,
                "height": 128,
                "regions": regions,
            }
        )
        pictures = (
            torch.from_numpy(np.array(extras.outlines(objects))).permute(2, 0, 1).expand(3, -1, -1, -1) / 255
        )
        predict = collage_control.predictor(
            shapes, lay, net, pictures, [1.0] * 3, guidance_scale=5.0, crop_margin=0.25
        )
        pixels = np.asarray(
            shapes.decode(shapes.denoise(predict, noise([seed], (4, 16, 16)), steps=12))[0]
        ).astype(float)
        for o in objects:
            drawn, wanted = (
                np.linalg.norm(pixels - data.COLOURS[o.colour], axis=-1) < detector.FAR,
                o.mask() > 0.5,
            )
            right += (drawn & wanted).sum() > 0.7 * (drawn | wanted).sum()
    assert right >= 11  # of 12; with all of the outlines made small in every crop 8


@torch.no_grad()
def test_flex_with_whole_boxes_is_fixed(sd, net):
    lay = made(ALL, ALL)
    for g in (1.0, 4.0):
        make = partial(
            collage_control.predictor, sd, lay, net, PICTURES, SCALES, crop_until=0, guidance_scale=g
        )
        assert relative(make(crop_margin=0)(X, 401), make()(X, 401)) < 1e-10


@torch.no_grad()
def test_without_scale_it_is_a_collage_of_plain_texts(sd, net):
    """One region everywhere: M is 1/1.1 and 0.1/1.1, and pass 1 of a collage looks at its own text
    in every cell."""
    lay = made(ALL)
    ours = collage_control.predictor(sd, lay, net, PICTURES[:2], [0.0, 0.0])
    theirs = collage.predictor(sd, lay, background_drop=0)
    assert relative(ours(X, 401), theirs(X, 401)) < 1e-10


@torch.no_grad()
def test_masked_on_request(sd, net):
    """With the region everywhere and nothing outside, masked or not is the same; with half of it,
    it is not."""
    for box, same in ((ALL, True), (LEFT, False)):
        on, off = (
            collage_control.predictor(sd, made(box), net, PICTURES[:2], [0.5, 1.0], masked=m)(X, 401)
            for m in (True, False)
        )
        assert (relative(on, off) < 1e-10) == same


@pytest.fixture(scope="module")
def loras(sd):
    """Two random ones, on both networks, by names that layouts use."""
    torch.manual_seed(5)
    fused = lora.fused_layers(sd.unet)
    made = {}
    for name in ("one", "two"):
        parts = []
        for module in (*sd.unet.modules(), *sd.text.model.modules()):
            if isinstance(module, torch.nn.Linear) or (
                isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)
            ):
                shape = module.weight.shape
                down = torch.randn(2, *shape[1:]).double() / shape[1:].numel() ** 0.5
                up = 0.05 * torch.randn(shape[0], 2, *[1] * (len(shape) - 2)).double()
                parts.append(lora.LowRank(str(len(parts)), module, fused.get(module), down, up, 1.0))
        made[Path(name)] = lora.LoRA(name, tuple(parts))
    return made


@pytest.mark.parametrize("how", ["collage", None, 0, 0.25])
@torch.no_grad()
def test_each_region_has_its_own_adapters(sd, net, loras, how):
    """Against passes whose adapters are merged into the weights: none for the whole image, one for
    the first region, both for the second."""
    one, two = loras
    lay = made(LEFT, RIGHT)
    lay = replace(
        lay,
        regions=(
            replace(lay.regions[0], lora=((one, 0.8),)),
            replace(lay.regions[1], lora=((two, 0.5), (one, -0.4))),
        ),
    )
    weights = {0: {}, 1: {one: 0.8}, 2: {two: 0.5, one: -0.4}}
    scales = [0.0] * 3 if how == "collage" else SCALES

    @contextlib.contextmanager
    def merged(k):
        kept = lora.merge([(loras[path], scale) for path, scale in weights[k].items()])
        yield
        lora.unmerge(kept)

    expected = one_by_one(sd, net, lay, X, 401, how, scales=scales, adapted=merged)
    with lora.by_region(lay.regions, loras) as adapters:
        settings = {"guidance_scale": 4.0, "adapters": adapters}
        if how == "collage":
            predict = collage.predictor(sd, lay, masked=False, **settings)
        else:
            settings |= {"crop_margin": how, "crop_until": 0}
            predict = collage_control.predictor(sd, lay, net, PICTURES, SCALES, **settings)
        ours = predict(X, 401)
    assert relative(ours, expected) < 1e-6  # the text encoder is in float32
    assert relative(one_by_one(sd, net, lay, X, 401, how, scales=scales), expected) > 1e-3


@torch.no_grad()
def test_outside_the_block_no_adapter_acts(sd, net, loras):
    """As in a refine, which runs the network between a collage's predictions; nor after an error
    within the block."""
    texts = sd.encode_prompt(["a red circle"])
    lay = made(LEFT)
    lay = replace(lay, regions=(replace(lay.regions[0], lora=((next(iter(loras)), 0.8),)),))
    plain = sd.unet(X[:1], 401, texts)
    with lora.by_region(lay.regions, loras) as adapters:
        controlled = Controlled(sd.unet, [Control(net, PICTURES[:2])], adapters)

        def changes():
            """By how much the LoRA changes the UNet's output, and both together the controlled
            one's."""
            outputs = [unet(X[:1], 401, texts) for unet in (sd.unet, controlled)]
            return [relative(output, plain) for output in outputs]

        assert max(changes()) < 1e-12
        with adapters.rows([1]):
            first = changes()
            with adapters.rows([0]):
                only_control = changes()
            assert changes() == first  # an inner block restores the outer one's passes
        assert min(first) > 1e-3 and only_control[0] < 1e-12 < 1e-3 < only_control[1]
        assert max(changes()) < 1e-12
        with pytest.raises(KeyError), adapters.rows([1]):
            raise KeyError
        assert adapters.passes is None and max(changes()) < 1e-12
        assert relative(sd.encode_prompt(["a red circle"]), texts) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("crop", [None, 0.25])
def test_a_prediction_that_fails_leaves_no_adapter_behind(sd, net, loras, crop, monkeypatch):
    lay = made(LEFT)
    lay = replace(lay, regions=(replace(lay.regions[0], lora=((next(iter(loras)), 0.8),)),))
    texts = sd.encode_prompt(["a red circle"])
    plain = sd.unet(X[:1], 401, texts)
    with lora.by_region(lay.regions, loras) as adapters:
        settings = {"crop_margin": crop, "crop_until": 0, "adapters": adapters}
        predict = collage_control.predictor(sd, lay, net, PICTURES[:2], SCALES[:2], **settings)
        assert adapters.passes is None
        predict(X, 401)
        assert adapters.passes is None and relative(sd.unet(X[:1], 401, texts), plain) < 1e-12

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(collage, "eps_from_output", interrupted)
            predict(X, 401)
        assert adapters.passes is None and relative(sd.unet(X[:1], 401, texts), plain) < 1e-12
        handle = sd.unet.conv_in.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(X, 401)
        handle.remove()
        assert adapters.passes is None and relative(sd.unet(X[:1], 401, texts), plain) < 1e-12


def test_without_loras_there_are_no_adapters(loras):
    with lora.by_region(made(LEFT).regions, loras) as adapters:
        assert adapters is None


def test_reading_control_images(tmp_path):
    for name, grey in (("whole", 100), ("one", 200)):
        Image.fromarray(np.full((96, 128), grey, np.uint8)).save(tmp_path / f"{name}.png")
    lay = made(LEFT, RIGHT, control_image=str(tmp_path / "one.png"), control_scale=0.5)
    pictures, scales = collage_control.read(lay, tmp_path / "whole.png", 0.8)
    assert pictures.shape == (3, 3, 96, 128) and scales == [0.8, 0.4, 0.4]
    assert [round(255 * p.mean().item()) for p in pictures] == [100, 200, 200]
    assert collage_control.read(lay)[1] == [0.0, 0.5, 0.5]  # none for the whole picture
    # A region without one takes the whole image's.
    assert collage_control.read(made(LEFT), tmp_path / "whole.png")[1] == [1.0, 1.0]
    with pytest.raises(ValueError, match="needs a control image"):
        collage_control.read(made(LEFT))


def test_one_clear_line(sd, net):
    lay = made(LEFT, RIGHT)
    with pytest.raises(ValueError, match="crop_margin must be from 0 to 1000"):
        collage_control.predictor(sd, lay, net, PICTURES, SCALES, crop_margin=-1)
    with pytest.raises(ValueError, match="3 control images"):
        collage_control.predictor(sd, lay, net, PICTURES[:2], SCALES)
