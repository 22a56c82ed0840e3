"""Models, adapters, layouts and noise files of unknown origin: each is refused in one line, and soon."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_reliability import like, png

import minsd
from minsd import files
from minsd.generate import main
from minsd.noise import initial, layout
from minsd.weights import load, lora
from minsd.weights.controlnet import load_controlnet

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDTH = 160  # of that layer in the embedded model


@pytest.fixture(scope="module")
def sd():
    return minsd.load("shapes", device="cpu")


def refused(call):
    """The message of a refusal, which is one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 1000
    return message


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": "\xe9"}', "not text in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not text in UTF-8"),
        (b'{"a": 1,}', "not JSON"),
        (b"", "not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_of_any_kind(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert says in refused(lambda: files.read_json(path, unique=True))


def test_json_from_pipes_folders_and_endless_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(lambda: files.read_json(tmp_path / "pipe"))
    assert "not a regular file" in refused(lambda: files.read_json("/dev/zero"))
    assert "cannot be read" in refused(lambda: files.read_json(tmp_path))
    assert "there is no file" in refused(lambda: files.read_json(tmp_path / "none"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(files.LARGEST_JSON + 1)
    assert "more than 32 MiB" in refused(lambda: files.read_json(tmp_path / "large"))
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_json(tmp_path / "mark") == {}


# --- adapters -----------------------------------------------------------------------------------------------


def adapter(path, config=None, **tensors):
    halves = {
        f"unet.{LAYER}.lora_A.weight": torch.ones(2, WIDTH),
        f"unet.{LAYER}.lora_B.weight": torch.ones(WIDTH, 2),
    }
    metadata = None
    if config is not None:
        metadata = {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)}
    save_file(halves | tensors, path, metadata)
    return path


@pytest.mark.parametrize("pattern", ["(([a-z0-9_.])+)+!", ".*to_q", "to_(q|k)", "(", "a" * 10_000 + "+"])
def test_no_pattern_of_a_file_is_run(tmp_path, sd, pattern):
    path = adapter(tmp_path / "x.safetensors", {"unet.alpha_pattern": {pattern: 3.0}})
    assert "is not the name of a layer" in refused(lambda: lora.read(path, sd))


def test_alphas_by_layer_are_those_of_peft(tmp_path, sd):
    from peft.utils.other import get_pattern_key

    for patterns in (
        {"to_q": 3.0, "attn1.to_q": 5.0},
        {"attn1.to_q": 5.0, "to_q": 3.0},
        {"o_q": 3.0},
        {f"^{LAYER}": 7.0},
        {"^to_q": 3.0},
        {r"attn1\.to_q$": 4.0, "to_k": 1.0},
    ):
        config = {"unet.alpha_pattern": patterns, "unet.lora_alpha": 16}
        (part,) = lora.read(adapter(tmp_path / "x.safetensors", config), sd).parts
        assert part.factor == patterns.get(get_pattern_key(patterns, LAYER), 16) / 2, patterns


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        "[]",
        "5",
        {"unet.lora_alpha": "x"},
        {"unet.lora_alpha": [1]},
        {"unet.lora_alpha": True},
        {"unet.lora_alpha": float("nan")},
        {"unet.lora_alpha": 1e300},
        {"unet.alpha_pattern": [1]},
        {"unet.alpha_pattern": {"to_q": "x"}},
        {"unet.alpha_pattern": {"to_q": None}},
        {"unet.use_rslora": "yes"},
    ],
    ids=lambda config: str(config)[:30],
)
def test_adapter_configurations_of_wrong_types(tmp_path, sd, config):
    path = adapter(tmp_path / "x.safetensors", config)
    assert "its adapter configuration cannot be read" in refused(lambda: lora.read(path, sd))


@pytest.mark.parametrize(
    "tensors",
    [
        {f"unet.{LAYER}.alpha": torch.ones(2)},
        {f"unet.{LAYER}.alpha": torch.tensor(float("nan"))},
        {f"unet.{LAYER}.alpha": torch.tensor([])},
        {f"unet.{LAYER}.lora_A.weight": torch.tensor(1.0)},
        {f"unet.{LAYER}.lora_B.weight": torch.ones(WIDTH)},
        {f"unet.{LAYER}.lora_A.weight": torch.ones(0, WIDTH)},
        {f"unet.{LAYER}.lora_A.weight": torch.ones(2, WIDTH, dtype=torch.int8)},
    ],
    ids=lambda tensors: str(tensors)[-40:],
)
def test_adapter_tensors_of_wrong_shapes(tmp_path, sd, tensors):
    assert lora.read(adapter(tmp_path / "x.safetensors"), sd).parts
    path = adapter(tmp_path / "x.safetensors", **tensors)
    assert LAYER in refused(lambda: lora.read(path, sd))


# --- ControlNets, models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.999999999.conv1.weight",
        "down_blocks.999999999.resnets.0.conv1.weight",
        "down_blocks.0.resnets.9999.conv1.weight",
        "controlnet_cond_embedding.blocks.999999999.weight",
        "controlnet_down_blocks.999999999.weight",
    ],
)
def test_names_of_layers_build_no_layers(tmp_path, controlnet_folder, name):
    (weights,) = controlnet_folder.glob("*.safetensors")
    save_file({**load_file(weights), name: torch.zeros(1)}, tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        refused(lambda: load_controlnet(tmp_path / "x.safetensors", device="cpu", dtype=torch.float32))
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def controlnet_folder():
    return load.SHAPES_FOLDER / "extras" / "outlines"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", 1e-300),
        ("unet", "sample_size", 999_999),
        ("unet", "sample_size", 0.5),
        ("text_encoder", "eos_token_id", 10**6),
    ],
)
def test_sizes_and_scales_that_no_model_has(tmp_path, part, key, value):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (folder / name).mkdir()
        for file in (load.SHAPES_FOLDER / name).iterdir():
            (folder / name / file.name).symlink_to(file)
    shutil.copy(load.SHAPES_FOLDER / "model_index.json", folder)
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(config | {key: value}))
    assert str(path) in refused(lambda: minsd.load(str(folder), device="cpu"))


def test_tokenizers_with_ids_beyond_the_text_encoder(tmp_path, sd):
    shutil.copytree(load.SHAPES_FOLDER / "tokenizer", tmp_path / "t")
    path = tmp_path / "t" / "vocab.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps(words | {min(words): 10**6}))
    assert "another model's tokenizer" in refused(lambda: load.read_tokenizer(tmp_path / "t", sd.config.text))
    os.mkfifo(tmp_path / "t" / "added_tokens.json")
    assert "a pipe" in refused(lambda: load.read_tokenizer(tmp_path / "t", sd.config.text))


def test_noise_files_that_are_pipes(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    assert "holds no noise files" in refused(lambda: initial.read_noise(tmp_path, (4, 8, 8)))
    np.save(tmp_path / "b.npy", np.zeros((0, 4, 8, 8)))
    assert "holds noise of shape" in refused(lambda: initial.read_noise(tmp_path / "b.npy", (4, 8, 8)))


# --- layouts ------------------------------------------------------------------------------------------------


def regions(count, **more):
    return {"prompt": "a", "regions": [{"prompt": "b", "box": [0, 0, 1, 1], **more}] * count}


def test_a_layout_has_a_bounded_number_of_regions_and_pixels(tmp_path):
    assert "at most 256 regions" in refused(lambda: layout.load(regions(257)))
    assert len(layout.load(regions(256)).sized(512, 512).regions) == 256
    large = layout.load(regions(40))
    tracemalloc.start()
    try:
        assert "at most 2 regions, not 40" in refused(lambda: large.sized(16384, 16384))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    for number in range(257):
        (tmp_path / f"P{number}").mkdir(parents=True)
    (tmp_path / "PALL").mkdir()
    assert "at most 256 regions" in refused(lambda: layout.load(tmp_path))


def test_a_mask_is_read_once_and_all_masks_are_bounded(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("L", (100, 100), 255).save(tmp_path / name)
    read = layout._read_mask
    seen = []
    monkeypatch.setattr(layout, "_read_mask", lambda path, where: seen.append(path) or read(path, where))
    given = {"prompt": "a", "regions": [{"prompt": "b", "mask": "a.png"}] * 200}
    (tmp_path / "l.json").write_text(json.dumps(given))
    assert len(layout.load(tmp_path / "l.json").regions) == 200 and len(seen) == 1
    given["regions"].append({"prompt": "c", "mask": "b.png"})
    (tmp_path / "l.json").write_text(json.dumps(given))
    monkeypatch.setattr(layout, "MOST_PIXELS", 19_999)
    assert "region 201: the masks have more than" in refused(lambda: layout.load(tmp_path / "l.json"))


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "\ud800"},
        {"negative_prompt": "\udfff"},
        {"weight": float("nan")},
        {"weight": 1e300},
        {"weight": 10**400},
        {"control_scale": 101},
        {"lora": ["a:1e999"]},
        {"box": [0, 0, 1e400, 1]},
        {"mask": "a\0b", "box": None},
    ],
    ids=str,
)
def test_layouts_with_values_of_no_use(more):
    given = regions(1, **more)
    if more.get("box", 0) is None:
        del given["regions"][0]["box"]
    assert "region 1: " in refused(lambda: layout.load(given))
    assert "prompt" in refused(lambda: layout.load({"prompt": "\ud800"}))


# --- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"init_noise": "select", "score": "stability", "candidates": 1000, "steps": 50},
        {"init_noise": "optimize", "optimize_steps": 1000, "steps": 50},
        {"steps": 500, "width": 2048, "height": 2048, "layout": {"prompt": "a", "regions": [{}] * 20}},
    ],
    ids=str,
)
def test_modest_settings_do_not_add_up_to_days(tmp_path, capfd, monkeypatch, settings):
    monkeypatch.setattr("minsd.app.session.load", None)
    assert like(png(tmp_path / "x.png", {"prompt": "a star", "seed": 0} | settings)) == 2
    error = capfd.readouterr().err
    assert "UNet evaluations" in error and "--trust" in error and error.count("\n") == 1


def test_an_image_is_drawn_again_from_the_commit_of_its_model(tmp_path, capfd, monkeypatch):
    asked = []

    def loaded(model, *args, **more):
        asked.append(model)
        raise FileNotFoundError("LOADING")

    monkeypatch.setattr("minsd.app.session.load", loaded)
    commit = "b" * 40
    for model, revision, wanted in (
        ("some/one", commit, f"some/one@{commit}"),
        ("some/one@v2", commit, "some/one@v2"),
        ("some/one", None, "some/one"),
        ("some/one", "../evil", "some/one"),
        ("sd15", commit, f"stable-diffusion-v1-5/stable-diffusion-v1-5@{commit}"),
    ):
        settings = {"prompt": "a", "seed": 0, "model": model, "model_revision": revision}
        assert like(png(tmp_path / "x.png", settings), "--trust") == 2 and asked.pop() == wanted


def test_broken_files_of_the_command_line_are_one_line(tmp_path, capfd):
    os.mkfifo(tmp_path / "l.json")
    for options in (
        ["--layout", tmp_path / "l.json"],
        ["--init-image", tmp_path / "l.json"],
        ["--like", "/dev/zero"],
    ):
        assert main(["a", *map(str, options), "--out", str(tmp_path / "o")]) == 2
        error = capfd.readouterr().err
        assert error.startswith("minsd: error: ") and error.count("\n") == 1
