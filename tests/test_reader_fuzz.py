"""Hostile adapters, ControlNets, layouts, prompts files, images, rows: a value, or an error of one line.

Each test stands for one reader. MINSD_FUZZ=N tries N times as many inputs (tests/test_load_fuzz.py); under it
an input also fails that takes more than ten seconds.
"""

import io
import json
import os
import shutil
import signal
import struct
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save, save_file
from test_input_fuzz import CUTS, damaged
from test_load_fuzz import JUNK, TIMES, fuzz, one_line

import minsd
from minsd import files, image
from minsd.app import folder as folders
from minsd.app import options
from minsd.generate import main
from minsd.noise import layout
from minsd.weights import embedding, hub, load, lora
from minsd.weights.controlnet import load_controlnet

LAYERS = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "nosuch"]
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["a\x1b[31mb", "\ud800", "\u2028", "a\0b", "../x", "/dev/zero", ""]
)
VALUES = JUNK | TEXTS | st.sampled_from([10**400, 1e308, float("nan"), [[[1]]], {"a": {}}])


@pytest.fixture(autouse=True)
def alarm():
    """A hang fails a long run."""
    if not TIMES:
        yield
        return

    def late(*args):
        raise TimeoutError("ten seconds for one input")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused_or(call):
    """The result of a call, or None where it is refused in one line. Ten seconds at most in a long run."""
    found = []
    if TIMES:
        signal.alarm(10)
    one_line(lambda: found.append(call()))
    if TIMES:
        signal.alarm(0)
    return found[0] if found else None


def shown(line):
    """No character that a terminal obeys or hides."""
    return all(unicodedata.category(c) not in files.HIDDEN or c in files.JOINERS for c in line)


def run(*argv, capfd):
    """The command line without a model: 2 and one line, or it would load the model."""
    if TIMES:
        signal.alarm(10)
    code = main([*map(str, argv)])
    if TIMES:
        signal.alarm(0)
    error = capfd.readouterr().err
    assert code == 2, error
    assert all(shown(line) and len(line) < 5000 for line in error.split("\n"))
    assert [line for line in error.splitlines() if "error" in line] and "Traceback" not in error
    return error


@pytest.fixture
def loading(monkeypatch):
    def loaded(*args, **more):
        raise FileNotFoundError("LOADING")

    monkeypatch.setattr("minsd.app.session.load", loaded)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def sd():
    return minsd.load("shapes", device="cpu")


@fuzz(100)
@given(st.binary(max_size=40) | JUNK.map(lambda value: json.dumps(value).encode()), st.booleans(), CUTS)
def test_json(content, unique, cuts):
    value = refused_or(partial(files.parse_json, damaged(content, cuts, 1), unique))
    json.dumps(value)  # nothing deep
    if isinstance(value, str):
        assert shown(files.printable(value))
        assert json.loads(files.dumps(value)) == value


@fuzz(50)
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from(["unet.", "lora_unet_", "text_encoder.", "", "base_model.model."]),
            st.sampled_from(LAYERS),
            st.sampled_from(
                [".lora_A.weight", ".lora_B.weight", ".lora_up.weight", ".lora_down.weight", ".alpha", ".x"]
            ),
        ).map("".join)
        | TEXTS,
        st.sampled_from(
            [(2, 160), (160, 2), (2, 160, 1, 1), (160, 2, 1, 1), (0, 160), (160,), (2, 0), (), (3, 5)]
        ),
        max_size=4,
    ),
    st.dictionaries(
        st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "lora_alpha", "x"]),
        VALUES
        | st.dictionaries(st.sampled_from(["to_q", "(a+)+", "^to_q", "("]) | TEXTS, VALUES, max_size=2),
    )
    | VALUES,
    CUTS,
)
def test_adapters(place, sd, shapes, config, cuts):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    try:
        content = save(tensors, {"lora_adapter_metadata": json.dumps(config)})
    except Exception:  # a name that cannot be written
        content = save({}, {"lora_adapter_metadata": json.dumps(config)})
    path = place / "adapter.safetensors"
    path.write_bytes(damaged(content, cuts, 1))
    adapter = refused_or(partial(lora.read, path, sd))
    for part in () if adapter is None else adapter.parts:
        assert part.delta().shape == part.module.weight.shape and np.isfinite(part.factor)


def embeddings():
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    early = io.BytesIO()
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, early)
    return {"safetensors": save({"emb_params": vectors}), "pt": early.getvalue(), "bin": early.getvalue()}


EMBEDDINGS = embeddings()


@fuzz(60)
@given(st.sampled_from(sorted(EMBEDDINGS)), CUTS, st.floats(0.9, 1), st.none() | TEXTS)
def test_embeddings(place, sd, kind, cuts, keep, name):
    path = place / f"word.{kind}"
    path.write_bytes(damaged(EMBEDDINGS[kind], cuts, keep))
    found = refused_or(partial(embedding.read, path, name, sd))
    assert found is None or (found.name.isprintable() and all(v.isfinite().all() for v in found.vectors))
    if not cuts and keep == 1 and name is None:
        assert found is not None


@pytest.fixture(scope="module")
def controlnet(place):
    source = load.SHAPES_FOLDER / "extras" / "outlines"
    shutil.copytree(source, place / "controlnet")
    return place / "controlnet"


@fuzz(20)
@given(
    st.sampled_from(
        ["num_attention_heads", "attention_head_dim", "norm_num_groups", "norm_eps", "conditioning_channels"]
        + ["_class_name", "class_embed_type", "upcast_attention", "controlnet_conditioning_channel_order"]
    ),
    VALUES | st.lists(st.integers(-1, 64), max_size=5),
    st.booleans(),
    st.sampled_from(
        ["down_blocks.0.resnets.{}.conv1.weight", "down_blocks.{}.resnets.0.conv1.weight"]
        + ["controlnet_cond_embedding.blocks.{}.weight", "controlnet_down_blocks.{}.bias", "{}"]
    ),
    st.integers(0, 10**10),
)
def test_controlnets(controlnet, key, value, named, name, number):
    source = load.SHAPES_FOLDER / "extras" / "outlines"
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (controlnet / "config.json").write_text(json.dumps(config))
    (weights,) = source.glob("*.safetensors")
    (controlnet / weights.name).unlink()  # it may be mapped still
    if named:
        tensors = load_file(weights) | {name.format(number): torch.zeros(1)}
        save_file(tensors, controlnet / weights.name)
    else:
        shutil.copy(weights, controlnet)
    net = refused_or(partial(load_controlnet, controlnet, device="cpu", dtype=torch.float32))
    assert net is None or not named


FACTORS = st.dictionaries(
    st.sampled_from(
        [
            f"{layer}.{part}"
            for layer in ("time_embedding.linear_1", "conv_in", "x", "")
            for part in ("up", "down")
        ]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 64, 256]), max_size=5),
)


@fuzz(40)
@given(FACTORS, st.booleans())
def test_control_loras(place, shapes, factors, own):
    """On top of the embedded model's ControlNet, whose other tensors are whole."""
    (source,) = (load.SHAPES_FOLDER / "extras" / "outlines").glob("*.safetensors")
    whole = load_file(source) | {"lora_controlnet": torch.zeros(0)}
    if own:  # then the factors change the UNet's own weights
        whole = {
            k: v for k, v in whole.items() if not k.startswith(("conv_in.w", "time_embedding.linear_1.w"))
        }
    path = place / "control-lora.safetensors"
    path.unlink(missing_ok=True)
    save_file(whole | {name: torch.ones(shape) for name, shape in factors.items()}, path)
    net = refused_or(partial(load_controlnet, path, device="cpu", dtype=torch.float32, unet=shapes.unet))
    assert net is not None or factors


REGION = st.fixed_dictionaries(
    {"prompt": TEXTS},
    optional={
        "box": st.lists(st.floats(0, 1) | st.integers(0, 64), min_size=4, max_size=4) | VALUES,
        "mask": st.sampled_from(["mask.png", "none.png", "layout.json"]) | VALUES,
        "negative_prompt": VALUES,
        "weight": st.floats() | VALUES,
        "lora": st.lists(TEXTS, max_size=2) | VALUES,
        "control_image": VALUES,
        "control_scale": st.floats() | VALUES,
    },
)
LAYOUT = st.fixed_dictionaries(
    {"prompt": TEXTS, "regions": st.lists(REGION, max_size=3) | VALUES},
    optional={"width": st.sampled_from([64, 10**9]) | VALUES, "height": st.just(64) | VALUES, "x": VALUES},
)


@fuzz(100)
@given(LAYOUT | VALUES, CUTS | st.just([]))
def test_layouts(place, given_, cuts):
    Image.new("L", (9, 9), 255).save(place / "mask.png")
    (place / "layout.json").write_bytes(damaged(json.dumps(given_).encode(), cuts, 1))
    found = refused_or(partial(layout.load, place / "layout.json"))
    sized = None if found is None else refused_or(partial(layout.ensure_sized, found, 64))
    if sized is not None:
        json.dumps(sized.to_json())
        assert all(region.pixels.shape == (sized.height, sized.width) for region in sized.regions)


@fuzz(25)
@given(VALUES, VALUES, st.booleans())
def test_published_layouts(place, whole, part, masked):
    folder = place / "published"
    for name, caption in (("PALL", whole), ("P000", part)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "self_caption.json").write_text(json.dumps(caption))
    (folder / "P000" / "mask_image.png").unlink(missing_ok=True)
    if masked:
        Image.new("L", (64, 64), 255).save(folder / "P000" / "mask_image.png")
    refused_or(partial(layout.load, folder))


KEYS = st.sampled_from([*options.PER_LINE, "cfg_scale", "model", "nosuch"]) | TEXTS
LINE = st.dictionaries(KEYS, VALUES, max_size=3).map(lambda line: json.dumps({"prompt": "a"} | line))


@fuzz(60)
@given(st.lists(LINE | TEXTS, max_size=3), st.sampled_from([".txt", ".jsonl"]), CUTS | st.just([]))
def test_prompts_files(place, loading, capfd, lines, suffix, cuts):
    path = place / f"prompts{suffix}"
    path.write_bytes(damaged("\n".join(lines).encode("utf-8", "surrogatepass") or b"\n", cuts, 1))
    error = run("--prompts", path, "--out", place / "out", capfd=capfd)
    assert "LOADING" in error or "prompts" in error


SETTINGS = [name for name, option in options.OPTIONS.items() if option.like or option.like_method]
MORE = ["candidates", "subjects", "excite", "noise_file", "model_revision", "asked_seed", "versions"]


@fuzz(80)
@given(
    st.dictionaries(st.sampled_from([*SETTINGS, *MORE]), VALUES | LAYOUT, max_size=3),
    st.sampled_from(["random", "select", "initno", "optimize", "invert"]),
    st.booleans(),
)
def test_settings_of_images(place, loading, capfd, settings, method, trust):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("minsd", json.dumps({"prompt": "a", "seed": 0, "init_noise": method} | settings))
    Image.new("RGB", (8, 8)).save(place / "like.png", pnginfo=info)
    error = run("--like", place / "like.png", *["--trust"] * trust, "--out", place / "out", capfd=capfd)
    assert "LOADING" in error or error.count("\n") == 1


def drawn():
    info = PngImagePlugin.PngInfo()
    settings = {"prompt": "a", "seed": 3, "width": 16, "height": 16, "candidates": [{"seed": 3, "score": 1}]}
    info.add_itxt("minsd", json.dumps(settings))
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"minsd-fuzz-{os.getpid()}.png"
    Image.fromarray(noise).save(path, pnginfo=info)
    content = path.read_bytes()
    path.unlink()
    return content


DRAWN = drawn()
ROW = {"file": "00000-3.png", "prompt": "a", "seed": 3}


@fuzz(150)
@given(CUTS, st.floats(0.5, 1), st.booleans())
def test_images_in_a_folder(place, cuts, keep, whole):
    path = place / "00000-3.png"
    content = damaged(DRAWN, cuts, keep)
    path.write_bytes(content)
    settings = refused_or(partial(image.verified, path, whole))
    assert settings is None or settings["seed"] == 3 or cuts
    assert settings is not None or content != DRAWN


@fuzz(60)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*ROW, "candidates", "width", "asked_seed"]) | TEXTS, VALUES, max_size=3
        ).map(lambda more: json.dumps(ROW | more).encode())
        | st.binary(max_size=20),
        max_size=4,
    ),
    st.sampled_from(["00000-3.png", "00000-0.png", "9" * 30 + "-1.png"]),
    CUTS,
)
def test_rows_and_folders(place, lines, name, cuts):
    folder = place / "rows"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(damaged(DRAWN, cuts, 1))
    (folder / "runs.jsonl").write_bytes(b"\n".join(lines))
    notes, given_back = [], []
    done = folders.done(folder, given_back.append, notes.append)
    assert len(done) <= 1 and all(note.count("\n") == 0 for note in notes)
    folders.merge(folder, [])
    kept = (folder / "runs.jsonl").read_bytes().split(b"\n")[:-1]
    assert len({json.loads(row)["file"] for row in kept}) == len(kept)


@fuzz(50)
@given(JUNK | st.dictionaries(st.just("weight_map"), VALUES | st.dictionaries(TEXTS, VALUES)))
def test_indices_of_shards(place, index):
    path = place / "unet" / "index.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(index))
    assert all(name.startswith("unet/") and "/" not in name[5:] for name in hub.shards(path))


@fuzz(20)
@given(st.binary(max_size=40), st.integers(0, 2**64 - 1))
def test_locks(place, content, length):
    """Whatever .lock and .runs.lock hold, images get the next numbers."""
    folder = place / "locks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / ".lock").write_bytes(content + struct.pack("<Q", length))
    settings = {"prompt": "x", "negative_prompt": "", "seed": 1, "steps": 1, "sampler": "ddim", "model": "m"}
    settings |= {"guidance_scale": 1.0, "width": 8, "height": 8}
    made = [image.save_numbered(Image.new("RGB", (8, 8)), folder, settings).name for _ in range(2)]
    assert made == ["00000-1.png", "00001-1.png"]
