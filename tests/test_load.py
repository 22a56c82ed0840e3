"""Loading: models saved by diffusers come back tensor for tensor; faulty ones are refused in one line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minsd
from minsd.weights.safetensors_file import PICKLES, RenamedTensors, Tensors, read_header


def tensors(folder):
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    return load_file(folder / f"{stem}.safetensors")


def refused(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        minsd.load(str(folder), "cpu")
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_tensor_is_what_the_file_holds(small_folder, small):
    for part, module in (("unet", small.unet), ("vae", small.vae)):
        own, file = module.state_dict(), tensors(small_folder / part)
        assert own.keys() == file.keys()
        assert all(torch.equal(own[name], file[name]) for name in file)
    own = {k.removeprefix("text_model."): v for k, v in small.text.model.state_dict().items()}
    file = {k.removeprefix("text_model."): v for k, v in tensors(small_folder / "text_encoder").items()}
    assert own.keys() == file.keys() and all(torch.equal(own[name], file[name]) for name in file)
    for module in (small.unet, small.vae, small.text.model):
        assert not module.training and not any(p.requires_grad or p.is_meta for p in module.parameters())


def test_text_positions_are_rebuilt(small):
    """After the meta device this buffer would be garbage, and text states silently wrong."""
    buffers = {name: b for name, b in small.text.model.named_buffers() if name.endswith("position_ids")}
    assert buffers and all(torch.equal(b[0], torch.arange(77)) for b in buffers.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_fp16_variant_and_casts(small_folder, broken_folder, small, dtype):
    for part in ("unet", "vae", "text_encoder"):
        for path in list((broken_folder / part).glob("*.safetensors")):
            save_file(
                {k: v.half() for k, v in load_file(path).items()},
                path.with_name(path.stem + ".fp16.safetensors"),
            )
            path.unlink()
    sd = minsd.load(str(broken_folder), "cpu", dtype)
    assert {p.dtype for m in (sd.unet, sd.vae, sd.text.model) for p in m.parameters()} == {dtype}
    expected = small.unet.conv_in.weight.half().to(dtype)
    assert torch.equal(sd.unet.conv_in.weight, expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tensors_of_the_right_dtype_stay_mapped(broken_folder, small, dtype):
    """Except misaligned float32 matrices, whose products may round differently: these are copied."""
    path = broken_folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    sd = minsd.load(str(broken_folder), "cpu", dtype)
    maps = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(path) in line
    ]
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    mapped, copied = 0, 0
    for name, entry in read_header(path).items():
        weight = sd.unet.get_parameter(name)
        here = any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in maps)
        any_place = dtype != torch.float32 or weight.ndim < 2
        aligned = any_place or (start + entry["data_offsets"][0]) % 64 == 0
        fused = any(f".attn1.to_{part}." in name for part in "qkv")
        assert here == (aligned and not fused)
        assert any_place or weight.data_ptr() % 64 == 0
        mapped += here
        copied += not aligned
    assert mapped > 100 and (copied > 0) == (dtype == torch.float32)


def test_shards(broken_folder, small):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole = tensors(broken_folder / part)
        names = sorted(whole)
        halves = {f"{stem}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, half in halves.items():
            save_file({name: whole[name] for name in half}, broken_folder / part / file)
        files = {name: file for file, half in halves.items() for name in half}
        index = json.dumps({"metadata": {}, "weight_map": files})
        (broken_folder / part / f"{stem}.safetensors.index.json").write_text(index)
        (broken_folder / part / f"{stem}.safetensors").unlink()
    sd = minsd.load(str(broken_folder), "cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(sd.unet.state_dict().values(), small.unet.state_dict().values())
    )
    (broken_folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "00002-of-00002.safetensors is missing" in refused(broken_folder)


def test_the_old_names_of_the_vae_attention(broken_folder, small):
    path = broken_folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
                value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        renamed[name] = value
    save_file(renamed, path)
    sd = minsd.load(str(broken_folder), "cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(sd.vae.state_dict().values(), small.vae.state_dict().values())
    )


def test_text_names_with_and_without_prefix(broken_folder, small):
    path = broken_folder / "text_encoder" / "model.safetensors"
    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    for prefix in ("", "text_model."):
        extra = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}  # in older files
        save_file({prefix + k: v.clone() for k, v in bare.items()} | extra, path)
        sd = minsd.load(str(broken_folder), "cpu")
        assert torch.equal(sd.encode_prompt("a star"), small.encode_prompt("a star"))


def test_a_misfit_names_tensors_shapes_and_the_reason(broken_folder):
    path = broken_folder / "unet" / "diffusion_pytorch_model.safetensors"
    good = load_file(path)
    save_file({k: v for k, v in good.items() if k != "conv_in.bias"}, path)
    assert "1 missing (conv_in.bias)" in refused(broken_folder)
    save_file(good | {"extra.weight": torch.zeros(1)}, path)
    assert "1 unexpected (extra.weight)" in refused(broken_folder)
    save_file(good | {"conv_in.bias": torch.zeros(5)}, path)
    assert "mis-shaped (conv_in.bias (5,), not (32,))" in refused(broken_folder)
    save_file(good | {"conv_in.bias": torch.zeros(32, dtype=torch.int32)}, path)
    assert "dtype I32" in refused(broken_folder)
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, path)
    assert "looks like a LoRA" in refused(broken_folder)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "pooled text"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet/config.json", {"transformer_layers_per_block": [1, [1, 2], 1]}, "SSD-1B, Vega"),
        ("unet/config.json", {"reverse_transformer_layers_per_block": [1, 2, 1]}, "SSD-1B, Vega"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 1]}, "must have 3 numbers"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"down_block_types": ["Strange"] * 3}, "Strange"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionInpaintPipeline"},
            "StableDiffusionInpaintPipeline",
        ),
        ("vae/config.json", {"latent_channels": 16}, "4 latent channels"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDM"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (
            "scheduler/scheduler_config.json",
            {"timestep_spacing": "foo"},
            "timestep_spacing = 'foo' is not known",
        ),
        ("unet/config.json", {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "beta_schedule"),
    ],
)
def test_models_of_another_kind(broken_folder, part, change, says):
    path = broken_folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refused(broken_folder)


@pytest.mark.parametrize(
    "part", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer"]
)
def test_missing_parts_are_named(broken_folder, part):
    path = broken_folder / part
    path.rename(path.with_name("away"))
    message = refused(broken_folder)
    assert "missing" in message and path.name.split(".")[0] in message


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused(broken_folder, tmp_path, suffix):
    """As a file, and as the only weights in a folder."""
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04.")
    assert "is a pickle" in refused(tmp_path / f"model{suffix}")
    weights = broken_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    assert f"has only diffusion_pytorch_model{suffix}, a pickle" in refused(broken_folder)


def test_bad_json(broken_folder):
    (broken_folder / "unet" / "config.json").write_text('{"sample_size": 16,}')
    assert "config.json: not JSON: " in refused(broken_folder)


def hostile(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        hostile(b"{}", length=2**63),
        hostile(b"{}", length=200 * 2**20),
        hostile(b"not json"),
        hostile(b"[1]"),
        hostile(b"[" * 100_000),
        hostile(b'{"a": 1}'),
        hostile(b'{"a": {}}'),
        hostile(b'{"a": {"dtype": "F32"}}'),
        hostile(json.dumps({"a": entry(dtype="X")}).encode(), b"1234"),
        hostile(json.dumps({"a": entry(shape=(-1,))}).encode(), b"1234"),
        hostile(json.dumps({"a": entry(shape=(2**62, 2**62))}).encode(), b"1234"),
        hostile(json.dumps({"a": entry(offsets=(0, 8))}).encode(), b"1234"),
        hostile(json.dumps({"a": entry(), "b": entry()}).encode(), b"1234"),  # overlapping
        hostile(json.dumps({"a": entry(), "b": entry(offsets=(8, 12))}).encode(), b"1234" * 3),  # a gap
        hostile(json.dumps({"a": entry()}).encode(), b"123"),
        hostile(json.dumps({"a": entry()}).encode(), b"12345"),
    ],
    ids=range(18),
)
def test_hostile_headers_are_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a sound safetensors file") as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_a_sound_header_is_read(small_folder):
    path = small_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert {name: tuple(e["shape"]) for name, e in read_header(path).items()} == {
        k: tuple(v.shape) for k, v in load_file(path).items()
    }


def test_a_cut_file_is_refused(broken_folder):
    path = broken_folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in refused(broken_folder)


@pytest.mark.parametrize("name", ["nosuch", "sd15", "someone/something", "./nosuch.safetensors"])
def test_models_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(name)


def test_submodules_resolve_from_minsd_alone():
    code = (
        "import sys, minsd\n"
        "minsd.weights\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "minsd.weights.load.load_model, minsd.weights.lora.read, minsd.weights.controlnet.load_controlnet\n"
        "minsd.weights.hub.fetch, minsd.weights.single_file.original, minsd.weights.ldm_keys.unet_name\n"
        "minsd.weights.safetensors_file.read_header, minsd.weights.shapes\n"
        "print(hasattr(minsd.weights, 'nothing'), 'lora' in dir(minsd.weights))"
    )
    root = Path(minsd.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "False True\n", result.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tensors_are_read_into_place(tmp_path, dtype):
    state = {"b": torch.randn(3, 5).half(), "a": torch.randn(7).half(), "c": torch.randn(2, 3, 1, 1).half()}
    save_file(state, tmp_path / "x.safetensors", {"a": "long header " * 20})
    tensors = Tensors(tmp_path / "x.safetensors", "", dtype)
    whole = torch.zeros(10, 5, dtype=dtype)
    tensors.copy_to(whole[4:7], "b")
    assert torch.equal(whole[4:7], state["b"].to(dtype)) and not whole[:4].any() and not whole[7:].any()
    flat = torch.zeros(2, 3, dtype=dtype)
    RenamedTensors(tensors, "", {"z": ("c", None)}).copy_to(flat, "z")
    assert torch.equal(flat, state["c"].flatten(1).to(dtype))
    columns = torch.zeros(5, 3, dtype=dtype).T  # not contiguous
    tensors.copy_to(columns, "b")
    assert torch.equal(columns, state["b"].to(dtype))


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensors = Tensors(path, "", torch.float32)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match="ended early"):
        tensors.copy_to(torch.empty(1000), "a")
