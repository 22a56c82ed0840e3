"""Hostile images, noise files, metadata and options: each is refused by one line, or gives a sound value."""

import io
import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_load_fuzz import JUNK, fuzz, one_line

from minsd import image
from minsd.adapters import split_scale
from minsd.app import options
from minsd.noise.initial import read_noise
from minsd.weights import stated
from minsd.words import folded, occurrences, words

SHAPE = (4, 2, 3)
CUTS = st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), max_size=4)


def damaged(content, cuts, keep):
    """Bytes replaced at some places, and the end cut off."""
    out = bytearray(content)
    for at, new in cuts:
        at %= max(1, len(out))
        out[at : at + len(new)] = new
    return bytes(out[: int(len(out) * keep) + 1])


def images():
    """Small images of every kind that the reader takes, as files."""
    ramp = np.linspace(0, 255, 12 * 9).reshape(9, 12)
    colour = Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8))
    kinds = {
        "png": colour,
        "jpeg": colour,
        "webp": colour,
        "gif": colour.quantize(8),
        "bmp": colour,
        "ppm": colour,
        "tga": colour,
        "qoi": colour,
        "tiff": Image.fromarray(ramp.astype(np.float32)),
        "PNG": Image.fromarray((257 * ramp).astype(np.uint16)),
    }
    out = []
    for kind, picture in kinds.items():
        file = io.BytesIO()
        picture.save(file, format=kind)
        out.append(file.getvalue())
    return out


IMAGES = images()


@fuzz(300)
@given(st.sampled_from(IMAGES), CUTS, st.floats(0, 1))
def test_damaged_images(tmp_path_factory, content, cuts, keep):
    path = tmp_path_factory.getbasetemp() / "fuzz.img"
    path.write_bytes(damaged(content, cuts, keep))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = image.read(path)
        except ValueError as error:
            assert "\n" not in str(error)
            return
    assert picture.mode in ("RGB", "F") and picture.width and picture.height
    assert np.isfinite(np.asarray(picture)).all()


def noise_files():
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    npy, pt = io.BytesIO(), io.BytesIO()
    np.save(npy, noise.numpy())
    torch.save(noise, pt)
    metadata = {"prompt": "a star", "updates": "official"}
    return {"safetensors": save({"noise": noise}, metadata), "npy": npy.getvalue(), "pt": pt.getvalue()}


NOISE = noise_files()


@fuzz(300)
@given(st.sampled_from(sorted(NOISE)), CUTS, st.floats(0.9, 1))
def test_damaged_noise_files(tmp_path_factory, kind, cuts, keep):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(damaged(NOISE[kind], cuts, keep))
    found = []
    one_line(lambda: found.append(read_noise(path, SHAPE)))
    for noise in found:
        assert noise.shape[1:] == SHAPE and noise.dtype == torch.float32 and noise.isfinite().all()


@fuzz(200)
@given(
    st.dictionaries(
        st.sampled_from(["modelspec.prediction_type", "modelspec.resolution", "modelspec.architecture"])
        | st.sampled_from(["ss_base_model_version", "ss_v_parameterization", "ss_resolution"]),
        st.text(max_size=20) | st.sampled_from(["v", "512x512", "True", "sd_v2_v", "9" * 5000, "٣٢x٣٢"]),
    ),
    st.dictionaries(st.sampled_from(["_class_name", "unet", "vae", "algorithm_type", "solver_order"]), JUNK),
)
def test_what_files_state(tmp_path_factory, metadata, config):
    said = stated.of_file(metadata)
    assert said.prediction_type in (None, "epsilon", "v_prediction")
    assert said.size is None or (64 <= said.size <= 4096 and said.size % 8 == 0)
    sampler, _ = stated.sampler_of(config)
    assert sampler is None or sampler in options.OPTIONS["sampler"].choices
    one_line(lambda: stated.check_pipeline(config, tmp_path_factory.getbasetemp()))


@fuzz(200)
@given(st.sampled_from(sorted(options.OPTIONS)), JUNK)
def test_values_of_prompts_files(name, value):
    option = options.OPTIONS[name]
    found = []
    one_line(lambda: found.append(option.from_json(value)))
    for taken in found:
        one_line(partial(option.check, taken))
        assert not option.choices or taken in (*option.choices, "dpmpp_2m karras") or name == "device"


@fuzz(200)
@given(
    st.lists(st.text(max_size=8) | st.sampled_from(["--seed", "-n", "--cfg-scale=3", "--prompt", "--", "-1"]))
)
def test_command_lines(argv):
    assume(not {"-h", "--help", "--version"} & set(argv))
    found = []
    one_line(lambda: found.append(options.parse(argv)))
    for given_ in found:
        assert set(given_) == set(options.OPTIONS)


@fuzz(300)
@given(st.text(max_size=40), st.text(max_size=8))
def test_words_of_any_text(prompt, phrase):
    text, where = folded(prompt)
    assert len(text) == len(where) and all(0 <= a < b <= len(prompt) for a, b in where)
    for word in words(prompt):
        assert 0 <= word.start < word.end <= len(prompt)
        assert word.text == "," or (word.start, word.end) in occurrences(
            prompt, prompt[word.start : word.end]
        )
    for start, end in occurrences(prompt, phrase):
        assert 0 <= start < end <= len(prompt)


@fuzz(200)
@given(st.text(max_size=20) | st.from_regex(r"<?(lora:)?[a-z.]{1,5}(:-?[0-9.,e]{0,5})?>?", fullmatch=True))
def test_adapter_references(text):
    found = []
    one_line(lambda: found.append(split_scale(text)))
    for path, scale in found:
        assert str(path) and np.isfinite(scale)


@fuzz(100)
@given(
    st.dictionaries(
        st.sampled_from(["minsd", "parameters", "x"]), st.text(max_size=30) | JUNK.map(json.dumps)
    )
)
def test_metadata_of_pngs(tmp_path_factory, chunks):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        try:
            info.add_itxt(key, value)
        except UnicodeEncodeError:
            return
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    found = []
    one_line(lambda: found.append(image.read_settings(path)))
    assert all(isinstance(settings, dict) for settings in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e308])
def test_ranges_refuse_what_is_no_number(value):
    for name in ("guidance_scale", "strength", "crop_margin", "control_scale"):
        with pytest.raises(ValueError, match="must be from"):
            options.OPTIONS[name].check(value)
