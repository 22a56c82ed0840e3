"""NoiseCollage on a tiny network in float64: identities, and the whole against single rows."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from minsd.adapters import Adapters
from minsd.attention import Attention
from minsd.config import ScheduleConfig
from minsd.kernels import attention
from minsd.noise import collage, layout
from minsd.noise.initial import noise
from minsd.samplers import SAMPLERS
from minsd.samplers.schedule import Schedule

A, B = "a red circle", "a blue square"
LEFT, RIGHT, ALL = [0, 0, 64, 128], [64, 0, 128, 128], [0, 0, 128, 128]
T = 401


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make(prompt, *regions, negative="", width=128, height=128):
    """A layout of (caption, box) or (caption, box, more)."""
    listed = [{"prompt": r[0], "box": r[1], **(r[2] if len(r) > 2 else {})} for r in regions]
    given = {"prompt": prompt, "negative_prompt": negative, "regions": listed}
    return layout.load(given).sized(width, height)


@pytest.fixture(scope="module")
def x():
    return noise([5, 6], (4, 16, 16)).double()


def plain(sd, prompt, negative="", g=7.5):
    return sd.predictor(sd.encode_prompt([prompt]), sd.encode_prompt([negative]), g)


def row_by_row(sd, x, t, lay, cells, g, weight=0.1, rescale=0.0):
    """The definition, for one image and boxes of whole cells: 2 (N + 1) separate passes. `cells(k,
    grid)` is the (h,w) of 0 (own text), 1 (the image's), 2 (none) in pass k. `rescale` is applied
    to the network's outputs, by diffusers."""
    h, w = x.shape[-2:]
    total, merged = torch.zeros(h, w, dtype=x.dtype), torch.zeros_like(x)
    for k in range(len(lay.regions) + 1):
        who, fill = (lay, torch.ones(h, w)) if k == 0 else (lay.regions[k - 1], torch.zeros(h, w))
        if k:
            x0, y0, x1, y1 = (v // 8 for v in who.bounds)
            fill[y0:y1, x0:x1] = 1
        m = (weight if k == 0 else who.weight) * fill.to(x)
        halves = []
        for texts in ((who.negative_prompt, lay.negative_prompt, ""), (who.prompt, lay.prompt, "")):
            region = {grid: cells(k, grid).flatten()[None] for grid in sd.unet.grids((h, w))}
            halves.append(sd.unet(x, t, sd.encode_prompt(texts)[None], region=region))
        out = rescale_noise_cfg(halves[0] + g * (halves[1] - halves[0]), halves[1], rescale)
        if sd.schedule.prediction_type == "v_prediction":
            a = sd.schedule.abar(t)
            out = a**0.5 * out + (1 - a) ** 0.5 * x
        merged, total = merged + m * out, total + m
    return merged / total


# --- what must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_collages_that_are_plain_sampling(tiny, x, dtype, limit, prediction_type):
    sd = copy.copy(tiny)
    sd.unet = copy.deepcopy(tiny.unet).to(dtype)
    sd.schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    x = x.to(dtype)
    a, b = plain(sd, A, "blurry")(x, T), plain(sd, B, "blurry")(x, T)
    assert relative(a, b) > 1e-2  # texts matter, or nothing would be tested
    for lay, options, expected in (
        (make(A, negative="blurry"), {}, a),
        (make(A, (A, ALL), negative="blurry"), {}, a),
        (make(A, (A, LEFT), negative="blurry"), {"background_drop": 0}, a),
        (make(A, (B, ALL), negative="blurry"), {"background_weight": 0}, b),
        (make(A, (B, LEFT), (B, RIGHT), negative="blurry"), {"attention_only": True}, b),
        (make(A, (A, ALL), negative="blurry"), {"ladder": "compat"}, a),
    ):
        ours = collage.predictor(sd, lay, **options)(x, T)
        assert ours.dtype == dtype and relative(ours, expected) < limit, (lay, options)
    unguided = collage.predictor(sd, make(A, (A, ALL)), guidance_scale=1)(x, T)
    assert relative(unguided, plain(sd, A, g=1)(x, T)) < limit


def test_merge_weights():
    fill = np.zeros((2, 4, 4))
    fill[0, :, :2] = fill[1, :2, 1:3] = 1
    m = collage.merge_weights(fill, [0.1, 1, 1])
    assert np.allclose(m.sum(0), 1, atol=1e-15)
    assert m[:, 3, 0].round(4).tolist() == [0.0909, 0.9091, 0]
    assert m[:, 0, 1].round(4).tolist() == [0.0476, 0.4762, 0.4762]
    assert m[:, 3, 3].tolist() == [1, 0, 0]
    rng = np.random.default_rng(0)
    assert np.allclose(collage.merge_weights(rng.random((5, 9, 7)), rng.random(6)).sum(0), 1, atol=1e-12)
    with pytest.raises(ValueError, match=r"no region covers 37.5 % of the image, and background_weight is 0"):
        collage.merge_weights(fill, [0, 1, 1])
    assert np.allclose(collage.merge_weights(np.ones((1, 4, 4)), [0, 1])[1], 1)


def test_regions_in_any_order(tiny, x):
    regions = [
        (A, LEFT),
        (B, [32, 32, 128, 96], {"weight": 2}),
        ("a green star", [8, 0, 120, 40], {"negative_prompt": "a heart"}),
    ]
    results = [
        collage.predictor(tiny, make("a park", *order), background_drop=0)(x, T)
        for order in itertools.permutations(regions)
    ]
    assert all(relative(other, results[0]) < 1e-10 for other in results[1:])


def test_a_caption_has_no_effect_where_its_region_has_no_weight(tiny, x):
    one, other = (
        collage.predictor(tiny, make(A, (caption, LEFT), ("a green star", RIGHT)))(x, T) for caption in (A, B)
    )
    assert torch.equal(one[..., 8:], other[..., 8:])
    assert relative(one[..., :8], other[..., :8]) > 1e-3


def test_fused_region_attention_is_attention_of_gathered_rows(tiny, x, monkeypatch):
    predict = collage.predictor(tiny, make(A, (B, LEFT), ("a green star", [40, 8, 128, 88])), seed=[1, 2])
    fused = predict(x, T)

    def gathered(q, k, v, *, region=None, **rest):
        if region is None:
            return attention(q, k, v, **rest)
        out = torch.zeros_like(q)
        for b, text in itertools.product(range(len(q)), range(k.shape[1])):
            rows = region[b] == text
            if rows.any():
                one = slice(b, b + 1)
                out[b, rows] = attention(q[one, rows], k[one, text], v[one, text], **rest)[0][0]
        return out, None

    monkeypatch.setattr(Attention, "attend", staticmethod(gathered))
    assert relative(predict(x, T), fused) < 1e-10


@pytest.mark.parametrize(
    ("lay", "options", "rows"),
    [
        (make(A, (A, LEFT), (B, RIGHT)), {}, 4),  # N + 2
        (make(A, (A, LEFT), (B, RIGHT)), {"guidance_scale": 1}, 3),
        (make(A, (A, LEFT), (B, RIGHT, {"negative_prompt": "a heart"})), {}, 6),  # 2 (N + 1)
        # Cells at the empty prompt are without the negative prompt too.
        (make(A, (A, LEFT), (B, RIGHT), negative="blurry"), {}, 6),
        (make(A, (A, LEFT), (B, RIGHT), negative="blurry"), {"background_drop": 0}, 4),
        (make(A, (A, LEFT), (B, RIGHT), negative="blurry"), {"pad": 0.1}, 6),
        # So wide that no cell is left at the empty prompt.
        (make(A, (A, LEFT), (B, RIGHT), negative="blurry"), {"pad": 5.0}, 4),
        (make(A, (A, LEFT), (B, RIGHT)), {"attention_only": True}, 2),
        (make(A, (A, LEFT), (B, RIGHT)), {"attention_only": True, "guidance_scale": 1}, 1),
        (make(A), {}, 2),
        (make(A, (A, LEFT), (B, RIGHT)), {"masked": False}, 4),
        (
            make(A, (A, LEFT), (B, RIGHT), negative="blurry"),
            {"masked": False},
            4,
        ),  # no cell at the empty prompt
        (make(A, (A, LEFT), (B, RIGHT)), {"adapters": Adapters()}, 6),  # they may differ from pass to pass
        (make(A), {"adapters": Adapters()}, 2),
    ],
)
def test_rows_of_a_step(tiny, x, lay, options, rows):
    calls = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    steps = list(SAMPLERS["unipc"](collage.predictor(tiny, lay, **options), x, tiny.schedule, 3))
    handle.remove()
    assert calls == [2 * rows] * 3 and len(steps) == 3  # one batch per step, for both images


# --- the whole against its definition -------------------------------------------------------------


@pytest.mark.parametrize("negatives", [("", ""), ("blurry", "a heart")])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("drop", "rescale"), [(0, 0.0), (1, 0.7)])
def test_against_one_row_at_a_time(tiny, x, negatives, prediction_type, drop, rescale):
    """With empty negative prompts this also says that the N + 2 rows give what 2 (N + 1) do."""
    sd = copy.copy(tiny)
    sd.schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    boxes = [[0, 64, 64, 128], [0, 0, 128, 64]]
    lay = make(
        "a park",
        (A, boxes[0]),
        (B, boxes[1], {"weight": 3, "negative_prompt": negatives[1]}),
        negative=negatives[0],
    )

    def cells(k, grid):
        where = torch.zeros(grid, dtype=torch.long)
        if k:
            where += 2 if drop else 1
            x0, y0, x1, y1 = (v * grid[0] // 128 for v in boxes[k - 1])  # whole cells at every level
            where[y0:y1, x0:x1] = 0
        return where

    sd.guidance_rescale = rescale
    expected = row_by_row(sd, x[:1], T, lay, cells, 5.0, 0.2, rescale)
    ours = collage.predictor(sd, lay, guidance_scale=5.0, background_weight=0.2, background_drop=drop)(
        x[:1], T
    )
    assert relative(ours, expected) < 1e-10


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_unmasked_passes_are_the_plain_predictions_of_their_captions(tiny, x, negative):
    lay = make("a park", (A, LEFT), (B, RIGHT), negative=negative)
    whole, left, right = (plain(tiny, text, negative)(x, T) for text in ("a park", A, B))
    expected = torch.cat([(0.1 * whole + left)[..., :8], (0.1 * whole + right)[..., 8:]], dim=-1) / 1.1
    assert relative(collage.predictor(tiny, lay, masked=False)(x, T), expected) < 1e-10


@pytest.mark.parametrize("masked", [True, False])
def test_adapters_know_every_row_s_pass(tiny, x, monkeypatch, masked):
    """In each run of the text encoder, of the layers that take the texts, and of the network;
    nothing else changes."""
    monkeypatch.setattr(tiny, "batch_size", lambda height, width: 1, raising=False)
    monkeypatch.setattr(collage, "ROWS_AT_ONCE", 5 * 256)
    adapters, seen = Adapters(), {"text": [], "keys": [], "unet": []}

    def watch(module, name):
        return module.register_forward_pre_hook(
            lambda m, args: seen[name].append((len(args[0]), adapters.passes))
        )

    layer = next(m for m in tiny.unet.modules() if isinstance(m, Attention) and m.is_cross)
    handles = [watch(tiny.text.model, "text"), watch(layer.to_k, "keys"), watch(tiny.unet, "unet")]
    lay = make("a park", (A, LEFT), (B, RIGHT))
    monkeypatch.setattr(layer, "fused", None)  # so that to_k is called
    out = collage.predictor(tiny, lay, masked=masked, background_drop=1, adapters=adapters)(x, T)
    for handle in handles:
        handle.remove()
    assert relative(out, collage.predictor(tiny, lay, masked=masked, background_drop=1)(x, T)) < 1e-10
    assert all(len(passes) == rows for found in seen.values() for rows, passes in found)
    # Two images: u_0, u_1, u_2, then c_0, c_1, c_2.
    assert [passes for _, passes in seen["unet"]] == [(0, 0, 1, 1, 2), (2, 0, 0, 1, 1), (2, 2)]
    assert [passes for _, passes in seen["keys"]] == [(0, 1, 2, 0, 1, 2)]
    assert len(seen["text"]) == 1 and set(seen["text"][0][1]) == {0, 1, 2}
    assert adapters.passes is None


def test_attention_only_takes_each_cell_s_own_text(tiny, x):
    """Where regions overlap, the heaviest; of equals the smallest. Elsewhere the image's caption."""
    lay = make(
        "a park",
        (A, [64, 64, 128, 128]),
        (B, [0, 64, 128, 128]),
        ("a heart", [64, 64, 128, 128], {"weight": 0.5}),
    )
    predict = collage.predictor(tiny, lay, attention_only=True, guidance_scale=3.0)
    texts, region = tiny.encode_prompt(["a park", A, B])[None], {}
    for grid in tiny.unet.grids((16, 16)):
        n = grid[0] // 2
        where = torch.zeros(grid, dtype=torch.long)
        where[n:], where[n:, n:] = 2, 1
        region[grid] = where.flatten()[None]
    c, u = tiny.unet(x[:1], T, texts, region=region), tiny.unet(x[:1], T, tiny.encode_prompt([""]))
    assert relative(predict(x[:1], T), u + 3.0 * (c - u)) < 1e-10


def test_pad_keeps_the_caption_in_a_ring():
    lay = make("a park", (A, [48, 64, 80, 96]))  # 4x4 cells
    ring = collage.fixed_surroundings(lay.regions, (16, 16), 0.75, 0.5)  # two more on each side
    expected = torch.full((16, 16), collage.EMPTY)
    expected[6:14, 4:12] = collage.WHOLE
    assert torch.equal(ring[0, 0], expected)


# --- random choices --------------------------------------------------------------------------------


def test_draws_follow_from_seed_timestep_and_region():
    first = collage.drawn_surroundings((64, 64), 0.75, 3, 401, 0)
    assert set(first.unique().tolist()) == {collage.WHOLE, collage.EMPTY}
    assert abs((first == collage.EMPTY).double().mean() - 0.75) < 4 * (0.75 * 0.25 / 4096) ** 0.5
    assert torch.equal(first, collage.drawn_surroundings((64, 64), 0.75, 3, 401, 0))
    for other in ((4, 401, 0), (3, 381, 0), (3, 401.5, 0), (3, 401, 1)):
        agree = (first == collage.drawn_surroundings((64, 64), 0.75, *other)).double().mean()
        assert abs(agree - (0.75**2 + 0.25**2)) < 0.05  # what two independent draws share


@torch.no_grad()
def test_an_image_depends_on_neither_its_batch_nor_how_memory_splits_it(tiny, x, monkeypatch):
    lay = make(A, (B, LEFT), ("a green star", RIGHT))
    together = collage.predictor(tiny, lay, seed=[3, 8])(x, T)
    alone = [collage.predictor(tiny, lay, seed=seed)(x[b : b + 1], T) for b, seed in enumerate((3, 8))]
    assert relative(torch.cat(alone), together) < 1e-10
    assert relative(collage.predictor(tiny, lay, seed=9)(x[:1], T), alone[0]) > 1e-4  # the draws do matter
    calls = []
    monkeypatch.setattr(tiny, "batch_size", lambda height, width: 1, raising=False)
    monkeypatch.setattr(collage, "ROWS_AT_ONCE", 3 * 256)
    handle = tiny.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    split = collage.predictor(tiny, lay, seed=[3, 8])(x, T)
    handle.remove()
    assert calls == [3, 3, 2] and relative(split, together) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("ladder", ["direct", "compat"])
def test_any_sampler_and_an_odd_size(tiny, ladder):
    lay = make(A, (B, [0, 0, 100, 40]), ("a green star", [60, 20, 200, 72]), width=200, height=72)
    z = noise([1], (4, 9, 25)).double()
    for name in SAMPLERS:
        out = tiny.denoise(
            collage.predictor(tiny, lay, ladder=ladder, seed=1), z, seeds=[1], steps=3, sampler=name
        )
        assert out.shape == z.shape and out.isfinite().all()


def test_gradients_flow_to_latents(tiny, x):
    """By finite differences along one direction."""
    predict = collage.predictor(tiny, make(A, (B, LEFT)))
    leaf, way = x[:1].clone().requires_grad_(), torch.randn_like(x[:1])
    (gradient,) = torch.autograd.grad((predict(leaf, T) ** 2).sum(), leaf)
    with torch.no_grad():
        up, down = ((predict(x[:1] + s * 1e-5 * way, T) ** 2).sum() for s in (1, -1))
    assert (gradient * way).sum().item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5)


# --- compat ---------------------------------------------------------------------------------------


def test_compat_fill_is_the_published_resize():
    pixels = np.zeros((512, 512), bool)
    pixels[64:256, 64:256] = True
    pixels[256:320, 64:256] = True  # x 64 to 256, y 64 to 320
    fill = (collage.compat_fill(pixels) * 255).round().astype(int)
    assert (fill == 255).sum() == 660 and (fill != 0).sum() == 884
    assert fill[20, 7:9].tolist() == [20, 235]


def test_compat_ladder_numbers():
    levels = [(64, 64), (32, 32), (16, 16), (8, 8)]
    big, small = torch.zeros(2, 64, 64, dtype=torch.bool)
    big[5:37, 3:30], small[1:8, 1:8] = True, True
    down, up = collage.carry(big, levels, True)
    assert [round(down[g].double().mean().item(), 3) for g in levels] == [0.211, 0.203, 0.219, 0.188]
    assert [round(up[g].double().mean().item(), 3) for g in levels] == [0.188] * 4
    down, up = collage.carry(small, levels, True)
    assert [down[g].sum().item() for g in levels] == [49, 9, 1, 0] and not any(up[g].any() for g in levels)


@torch.no_grad()
def test_compat_in_the_network(tiny):
    """Layer by layer: the mask shrinks through the encoder half; after the coarsest grid its blocks
    are everywhere. The next evaluation begins anew."""
    lay = make(A, (B, [16, 32, 136, 160]), width=256, height=256)
    fill = torch.from_numpy(collage.compat_fill(lay.regions[0].pixels))
    full, seen = fill == 1, []
    coarse = full[::8, ::8]
    expected = [full, full[::2, ::2], full[::4, ::4], coarse]
    expected += [coarse.repeat_interleave(n, 0).repeat_interleave(n, 1) for n in (2, 2, 4, 4, 8, 8)]
    hooks = [
        m.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["region"][-1]), with_kwargs=True
        )
        for m in tiny.unet.modules()
        if isinstance(m, Attention) and m.is_cross
    ]
    predict = collage.predictor(tiny, lay, ladder="compat")
    z = noise([0], (4, 32, 32)).double()
    for _ in range(2):
        seen.clear()
        predict(z, T)
        assert len(seen) == len(expected)
        assert all(torch.equal(cells == collage.OWN, mask.flatten()) for cells, mask in zip(seen, expected))
    for hook in hooks:
        hook.remove()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_weight": 0}, "no region covers 50.0 % of the image, and background_weight is 0"),
        ({"background_weight": -1}, "background_weight must be 0 or more"),
        ({"background_drop": 1.5}, "background_drop must be from 0 to 1"),
        ({"pad": -1}, "pad must be 0 or more"),
        ({"ladder": "steps"}, "choose from direct, compat"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"seed": -1}, "whole numbers from 0"),
        ({"seed": []}, "whole numbers from 0"),
        ({"attention_only": True, "masked": False}, "attention_only is one masked pass"),
        ({"attention_only": True, "adapters": Adapters()}, "attention_only is one pass for all regions"),
        ({"crop_margin": -0.1}, "crop_margin must be from 0 to 1000, such as 0.25, not -0.1"),
        ({"crop_margin": 1001.0}, "crop_margin must be from 0 to 1000, such as 0.25, not 1001.0"),
        ({"crop_margin": float("nan")}, "crop_margin must be from 0 to 1000"),
        ({"crop_margin": 0, "attention_only": True}, "crop_margin goes neither with"),
        ({"crop_margin": 0, "ladder": "compat"}, "crop_margin goes neither with"),
    ],
)
def test_mistakes(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        collage.predictor(tiny, make(A, (B, LEFT)), **options)


def test_what_does_not_fit(tiny, x):
    with pytest.raises(ValueError, match="3 seeds for 2 images"):
        collage.predictor(tiny, make(A, (B, LEFT)), seed=[1, 2, 3])(x, T)
    with pytest.raises(ValueError, match="16x16 latent cells: latents of shape"):
        collage.predictor(tiny, make(A, (B, LEFT)))(x[..., :8], T)
    with pytest.raises(ValueError, match="3 seeds for 2 images"):
        collage.predictor(tiny, make(A, (B, LEFT)), seed=[1, 2, 3], crop_margin=0)(x, 981)
    with pytest.raises(ValueError, match="16x16 latent cells: latents of shape"):
        collage.predictor(tiny, make(A, (B, LEFT)), crop_margin=0)(x[..., :8], T)
    with pytest.raises(ValueError, match="region 1 has an adapter"):
        collage.predictor(tiny, make(A, (B, LEFT, {"lora": ["a.safetensors"]})))


def test_a_layout_without_a_size_takes_the_model_s(tiny, x):
    open_size = layout.load({"prompt": A, "regions": [{"prompt": B, "box": [0, 0, 0.5, 1]}]})
    assert tiny.config.size == 128
    ours, expected = (collage.predictor(tiny, lay)(x, T) for lay in (open_size, make(A, (B, LEFT))))
    assert torch.equal(ours, expected)
