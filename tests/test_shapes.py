"""The embedded model: its training images and captions, the detector, and the files that ship."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

import minsd
from minsd.weights.shapes import data, detector
from minsd.weights.shapes import train as training

FOLDER = Path(data.__file__).parent


@pytest.fixture(scope="module")
def sd():
    return minsd.load("shapes", device="cpu")


# -- data


def test_a_seed_and_an_index_name_one_picture():
    first = [data.example(5, i) for i in range(4)]
    again = [data.example(5, i) for i in reversed(range(4))][::-1]  # in another order
    assert first == again
    assert all((a.render()[0] == b.render()[0]).all() for a, b in zip(first, again))
    assert len({e.caption for i in range(20) for e in [data.example(6, i)]}) > 15


def test_captions_name_what_is_drawn_and_sometimes_more():
    examples = [data.example(1, i) for i in range(1500)]
    counts = np.bincount([len(e.objects) for e in examples], minlength=4)[1:] / len(examples)
    assert np.abs(counts - data.COUNTS).max() < 0.04
    untrue = 0
    for e in examples:
        drawn = {o.shape: o for o in e.objects}
        said = re.findall(rf"an? (?:({'|'.join(data.COLOURS)}) )?({'|'.join(data.SHAPES)})", e.caption)
        assert {s for _, s in said} >= set(drawn)
        for colour, shape in said:
            assert shape not in drawn or colour in ("", drawn[shape].colour)
        absent = [s for _, s in said if s not in drawn]
        assert len(absent) <= 1 and not (absent and len(drawn) == 3)
        untrue += bool(absent)
        for colour_place, shape_place, index in e.named:
            if index is None:
                assert e.words[shape_place] in absent
            else:
                assert e.words[shape_place] == e.objects[index].shape
                assert colour_place is None or e.words[colour_place] == e.objects[index].colour
        if where := re.search(r"(\w+) (left of|right of|above|below) an? (?:\w+ )?(\w+)$", e.caption):
            a, b = drawn[where[1]], drawn[where[3]]
            true = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
            assert true[where[2]]
    assert untrue / (counts[:2].sum() * len(examples)) == pytest.approx(data.ABSENT, abs=0.05)


def test_held_out_is_never_drawn_nor_named():
    for i in range(2500):
        e = data.example(2, i)
        assert not data.HELD_OUT & {(o.colour, o.shape) for o in e.objects}
        shapes = set(re.findall("|".join(data.SHAPES), e.caption))
        assert not any(pair <= shapes for pair in data.HELD_OUT_PAIRS)
        assert not any(f"{c} {s}" in e.caption for c, s in data.HELD_OUT)


def test_masks_are_where_the_objects_colour_is():
    for i in range(30):
        e = data.example(3, i)
        picture, masks = e.render()
        assert picture.shape == (128, 128, 3) and min(e.ground) >= 215
        for o, mask in zip(e.objects, masks):
            assert (picture[mask == 1] == data.COLOURS[o.colour]).all() and (mask == 1).sum() > 150
        assert (picture[masks.sum(0) == 0] == e.ground).all()
        assert masks.sum(0).max() <= 1  # objects do not touch


def test_every_caption_word_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    for i in range(200):
        e = data.example(4, i)
        expected = tokenizer(e.caption, padding="max_length", max_length=77).input_ids
        assert training.token_ids(e.words) == expected
        assert expected[len(e.words) + 1] == tokenizer.eos_token_id


# -- detector: on rendered examples, and on images drawn by Pillow alone


def test_detector_accepts_renders_and_refuses_other_captions():
    for i in range(120):
        e = data.example(7, i)
        picture, subjects = e.render()[0], [(o.colour, o.shape) for o in e.objects]
        assert detector.judge(picture, subjects).strict, (i, subjects)
        assert detector.judge(picture, [(None, s) for _, s in subjects]).strict
        colour, shape = subjects[0]
        other = next(c for c in data.COLOURS if c not in {c for c, _ in subjects})
        assert detector.judge(picture, [(other, shape)] + subjects[1:]).kind == "wrong colour"
        more = detector.judge(picture, subjects + [(other, "star" if shape != "star" else "circle")])
        assert not more.strict
        if len(subjects) > 1:
            assert detector.judge(picture, subjects[1:]).failures == ("extra",)


def canvas(*draws):
    picture = Image.new("RGB", (128, 128), (236, 232, 238))
    pen = ImageDraw.Draw(picture)
    for method, box, colour in draws:
        getattr(pen, method)(box, fill=data.COLOURS.get(colour, colour))
    return picture


RED_CIRCLE = ("ellipse", (14, 14, 58, 58), "red")
BLUE_SQUARE = ("rectangle", (70, 66, 110, 106), "blue")
ASKED = [("red", "circle"), ("blue", "square")]


@pytest.mark.parametrize(
    "draws, kind, no_neglect",
    [
        ([RED_CIRCLE, BLUE_SQUARE], "right", True),
        ([RED_CIRCLE], "missing", False),
        ([], "missing", False),
        ([RED_CIRCLE, ("rectangle", (70, 66, 110, 106), "green")], "wrong colour", False),
        ([RED_CIRCLE, ("rectangle", (70, 66, 110, 106), "red")], "mixed", False),
        ([("ellipse", (14, 14, 58, 58), "blue"), ("rectangle", (70, 66, 110, 106), "red")], "mixed", False),
        ([RED_CIRCLE, ("polygon", [(90, 60), (68, 100), (112, 100)], "blue")], "wrong shape", True),
        ([RED_CIRCLE, ("rectangle", (66, 80, 122, 90), "blue")], "malformed", True),
        ([RED_CIRCLE, BLUE_SQUARE, ("ellipse", (14, 74, 54, 114), "red")], "doubled", True),
        ([RED_CIRCLE, BLUE_SQUARE, ("rectangle", (14, 74, 50, 110), "green")], "extra", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts(draws, kind, no_neglect):
    verdict = detector.judge(canvas(*draws), ASKED)
    assert (verdict.kind, verdict.no_neglect, verdict.strict) == (kind, no_neglect, kind == "right")


def test_one_body_of_two_colours_is_a_hybrid():
    picture = canvas(
        ("ellipse", (30, 30, 90, 90), "red"), ("polygon", [(60, 30), (92, 30), (92, 90), (60, 90)], "blue")
    )
    verdict = detector.judge(picture, [("red", "star"), ("blue", "heart")])
    assert "hybrid" in verdict.failures and not verdict.no_neglect


def test_objects_that_touch_are_still_two():
    picture = canvas(("ellipse", (20, 40, 62, 82), "red"), ("rectangle", (62, 40, 102, 80), "blue"))
    assert detector.judge(picture, ASKED).strict


def test_noise_holds_no_object():
    rng = np.random.default_rng(0)
    for _ in range(5):
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
            (128, 128), Image.BICUBIC
        )
        assert not detector.judge(picture, [("red", "circle")]).strict


# -- what ships


def test_the_codec_keeps_what_the_detector_sees(sd):
    examples = [data.example(8, i) for i in range(100)]
    pictures = sd.decode(sd.encode([Image.fromarray(e.render()[0]) for e in examples]))
    right = sum(
        detector.judge(p, [(o.colour, o.shape) for o in e.objects]).strict for p, e in zip(pictures, examples)
    )
    assert right >= 95


def test_the_folder_is_small_and_is_what_the_code_describes(sd):
    files = [
        p
        for p in FOLDER.rglob("*")
        if p.is_file() and not {"run", "extras", "__pycache__"} & {*p.relative_to(FOLDER).parts}
    ]
    assert sum(p.stat().st_size for p in files) <= 20e6
    row = minsd.config.MODELS["shapes"]
    assert sd.config.unet == row.unet and sd.config.schedule == row.schedule and sd.config.text == row.text
    sd_abar = 0.0058  # Stable Diffusion's first level: a 16x16 latent there has no trace of a layout
    assert 3 * sd_abar < sd.schedule.abar(981) < 20 * sd_abar
    assert sd.schedule.timesteps(50)[0] == 981


def test_diffusers_draws_the_same_picture(sd):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle and a blue square", "a yellow star"]
    noise = minsd.noise.initial.noise([3, 4], (4, 16, 16))
    theirs = pipe(prompts, latents=noise, num_inference_steps=12, guidance_scale=5.0, output_type="np").images
    ours = np.stack(
        [np.asarray(p) for p in sd(prompts, noise=noise, steps=12, sampler="ddim", guidance_scale=5.0)]
    )
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 2


def test_it_draws_what_the_prompt_names(sd):
    subjects = [data.COMBINATIONS[i] for i in range(0, 40, 2)]
    pictures = sd([f"a {colour} {shape}" for colour, shape in subjects], seeds=range(20), steps=20)
    assert sum(detector.judge(p, [s]).strict for p, s in zip(pictures, subjects)) >= 18
