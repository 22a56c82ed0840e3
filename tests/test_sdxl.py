"""SDXL against diffusers: networks, text, guided trajectories, single files, adapters, collages."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import sdxl_pipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from test_controlnet import diffusers_controlnet
from test_graphs import Recorded
from test_single_file import as_original_xl, by_diffusers, original_unet_names, sparse_file

import minsd
from minsd import graphs
from minsd.app import session
from minsd.attention import AttentionRecorder
from minsd.config import MODELS
from minsd.controlnet import Control, Controlled
from minsd.generate import main
from minsd.noise import collage, initno, layout, look, objectives, stability
from minsd.noise.initial import noise
from minsd.samplers.random import generators
from minsd.unet import UNet
from minsd.weights import embedding, lora
from minsd.weights.controlnet import load_controlnet
from minsd.weights.safetensors_file import Tensors
from minsd.weights.single_file import original

PROMPT = "a red circle and a blue square"
NEGATIVE = "a green star"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pipe(sdxl_folder):
    """diffusers' pipeline on the same folder."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        sdxl_folder, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def context_of(pipe, prompts):
    """diffusers' encoding as minsd's context, whose size numbers are zeros."""
    states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    row = torch.cat([pooled, torch.zeros(len(pooled), states.shape[-1] - pooled.shape[-1])], dim=1)
    return torch.cat([states, row[:, None]], dim=1)


# --- the networks ---------------------------------------------------------------------------------


def test_full_size_names_and_shapes(monkeypatch, tmp_path):
    """At full size, of our UNet and of a single file, against diffusers' and transformers' classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    for layer in (torch.nn.Linear, torch.nn.Conv2d):  # most of the time of making a network
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    sizes = dict(vocab_size=49408, projection_dim=1280)
    with torch.device("meta"):
        ours = UNet(MODELS["sdxl"].unet)
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, **sizes)
        )
        text_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, **sizes)
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
    assert ours.attention_blocks == [0, 10, 60]

    states = [part.state_dict() for part in (unet, vae, text, text_2)]
    for name, row in (("full", MODELS["sdxl"]), ("full_Turbo", MODELS["sdxl-turbo"])):
        path = tmp_path / f"{name}.safetensors"
        sparse_file(path, as_original_xl(*states))
        parts = original(Tensors(path, "", torch.float16), None, {})
        assert replace(parts.config, name=row.name) == row
        assert len(parts.notes) == 1 and ("base model" in parts.notes[0]) == (name == "full")
    for part, state in zip((parts.unet, parts.vae, parts.text, parts.text_2), states):
        expected = {name.removeprefix("text_model."): tuple(t.shape) for name, t in state.items()}
        found = {name: part.shape(name) for name in part}
        assert found.keys() == expected.keys()
        assert all(found[name] in (expected[name], (*expected[name], 1, 1)) for name in found)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)], ids=str)
@torch.no_grad()
def test_unet_equals_diffusers(sdxl, pipe, size):
    """With the latents' own size and with given numbers, from a context and from its keys."""
    torch.manual_seed(1)
    x = torch.randn(3, 4, *size)
    t = torch.tensor([1, 500, 999])
    context = torch.randn(3, 78, 192)
    p = sdxl.config.unet.pooled_dim
    context[:, -1, p:] = 0
    context[1, -1, p : p + 6] = torch.tensor([640.0, 512.0, 8.0, 16.0, 320.0, 256.0])
    own = torch.tensor([8 * size[0], 8 * size[1], 0, 0, 8 * size[0], 8 * size[1]])
    numbers = torch.stack([own, context[1, -1, p : p + 6], own])
    added = {"text_embeds": context[:, -1, :p], "time_ids": numbers}
    expected = pipe.unet(x, t, context[:, :-1], added_cond_kwargs=added).sample
    assert relative(sdxl.unet(x, t, context), expected) <= 1e-5
    assert torch.equal(sdxl.unet(x, t, sdxl.unet.text_kv(context)), sdxl.unet(x, t, context))


def test_a_wrong_number_of_rows_is_one_line(sdxl, small):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(
        ValueError, match="SDXL's context has 77 text states and a row for the whole .* not 77 rows"
    ):
        sdxl.unet(x, 1, torch.zeros(1, 77, 192))
    with pytest.raises(ValueError, match="a context has 77 text states .* not 78 rows"):
        small.unet.text_kv(torch.zeros(1, 78, 32))


def test_text_equals_diffusers(sdxl, pipe):
    prompts = [PROMPT, "a star", " "]
    expected = context_of(pipe, prompts)
    assert relative(sdxl.encode_prompt(prompts), expected) <= 1e-6
    assert not sdxl.encode_prompt("").any()  # as diffusers' negative prompt of None
    row = sdxl.encode_prompt(["", PROMPT], size=(640, 512))[:, -1]
    assert row[:, 128:134].tolist() == [[640, 512, 0, 0, 640, 512]] * 2 and not row[0, :128].any()


def test_long_prompts_weights_and_clip_skip(sdxl, pipe):
    """The row for the whole stays the last one, and has the first chunk's pooled state."""
    chunk = "a red circle and " * 18 + "a blue heart"  # 75 tokens
    long, alone, star = (sdxl.encode_prompt(text) for text in (f"{chunk} a star", chunk, " a star"))
    assert long.shape == (1, 155, 192) and close(long[:, :77], alone[:, :77])
    assert close(long[:, 77:154], star[:, :77]) and close(long[:, 154], alone[:, 77])
    both = sdxl.encode_prompt([f"{chunk} a star", "a star"])
    assert close(both[1:, :77], sdxl.encode_prompt("a star")[:, :77])
    assert close(sdxl.text.filled(sdxl.encode_prompt("a star"), 155), both[1:])
    zeros = sdxl.text.filled(sdxl.encode_prompt("", size=(64, 64)), 155)
    assert zeros.shape == (1, 155, 192) and not zeros[:, :-1].any() and zeros[0, -1, 128] == 64
    x = noise([0], (4, 8, 8))
    assert sdxl.predictor(long, sdxl.encode_prompt(""), 5.0)(x, 500).isfinite().all()

    text = copy.copy(sdxl.text)
    text.prompt_weights = True
    heavy, plain = text.encode(["a (red:1.5) star"]), text.encode(["a red star"])
    for part in (slice(0, 64), slice(64, 192)):  # each encoder's mean is kept
        assert heavy[:, :77, part].mean() == pytest.approx(plain[:, :77, part].mean().item(), rel=1e-4)
    assert relative(heavy, plain) > 1e-3 and torch.equal(heavy[:, 77], plain[:, 77])
    text.skip(2)
    states, _, pooled, _ = pipe.encode_prompt([PROMPT], do_classifier_free_guidance=False, clip_skip=1)
    assert relative(text.encode([PROMPT])[:, :77], states) <= 1e-6
    assert relative(text.encode([PROMPT])[:, 77, :128], pooled) <= 1e-6


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("negative", "size"), [("", (16, 16)), (NEGATIVE, (16, 24))])
def test_a_guided_trajectory_equals_diffusers(sdxl, pipe, negative, size):
    start = noise([3, 4], (4, *size))
    expected = pipe(
        [PROMPT] * 2,
        negative_prompt=[negative] * 2 if negative else None,
        num_inference_steps=10,
        guidance_scale=5.0,
        latents=start.clone(),
        height=8 * size[0],
        width=8 * size[1],
        output_type="latent",
    ).images
    latents = sdxl.sample(PROMPT, start, negative_prompt=negative, steps=10)
    assert sdxl.config.sampler == "euler" and sdxl.config.guidance_scale == 5
    assert relative(latents, expected) <= 1e-5
    with torch.no_grad():
        pixels = pipe.vae.decode(expected / 0.13025).sample
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for ours, theirs in zip(sdxl.decode(latents), pixels):
        assert np.abs(np.asarray(ours) / 255 - theirs).max() <= 1.01 / 255


def test_turbo_equals_diffusers(shapes_folder, tmp_path):
    """euler_a in one step and in three, without guidance, which the model cards write as 0."""
    pipe = sdxl_pipeline(shapes_folder / "tokenizer", turbo=True)
    pipe.save_pretrained(tmp_path / "tiny-turbo")
    pipe.set_progress_bar_config(disable=True)
    sd = minsd.load(str(tmp_path / "tiny-turbo"), "cpu")
    assert sd.config.sampler == "euler_a"
    start = noise([5], (4, 16, 16))
    for steps in (1, 3):
        expected = pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=0.0,
            latents=start.clone(),
            generator=generators([5], skip=start.shape[1:]),
            output_type="latent",
        ).images
        latents = sd.sample(PROMPT, start, seeds=[5], steps=steps, guidance_scale=1.0)
        assert relative(latents, expected) <= 1e-5


def test_guidance_of_zero_is_none_for_distilled_models_alone(sdxl):
    rows = []
    turbo = copy.copy(sdxl)
    turbo.config = replace(sdxl.config, guidance_scale=1.0)
    handle = sdxl.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    for sd in (sdxl, turbo):
        sd.sample(PROMPT, noise([0], (4, 16, 16)), steps=1, guidance_scale=0.0)
    handle.remove()
    assert rows == [2, 1]


def test_precisions_of_the_vae(sdxl_folder, small_folder, tmp_path):
    """float32 for SDXL in float16, as its VAE's config asks; SD1 does not heed the same config."""
    sd1 = shutil.copytree(small_folder, tmp_path / "sd1")
    path = sd1 / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": True}))
    for folder, dtype, expected in (
        (sdxl_folder, torch.float16, torch.float32),
        (sdxl_folder, torch.bfloat16, torch.bfloat16),
        (sd1, torch.float16, torch.float16),
    ):
        sd = minsd.load(str(folder), "cpu", dtype)
        assert (sd.dtype, sd.vae_dtype) == (dtype, expected)
    sd = minsd.load(str(sdxl_folder), "cpu", torch.float16)
    picture = sd(PROMPT, seeds=0, steps=2, height=64, width=64)[0]
    plain = sd(PROMPT, seeds=0, steps=2, height=64, width=64, init_image=picture, strength=0.5)[0]
    lift = look.Lift(sd, look.ask(sd, [PROMPT], [0]), lambda seen: seen.picture.mean((1, 2, 3)))
    assert lift.score(noise([0], (4, 8, 8)), torch.tensor([0]), 500)["loss"].isfinite().all()
    assert all(len(np.unique(np.asarray(image))) > 20 for image in (picture, plain))


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(sdxl_folder, tmp_path_factory):
    """The weights of `sdxl_folder` as a single file."""
    names = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    states = [load_file(sdxl_folder / f"{name}.safetensors") for name in (*names, "text_encoder_2/model")]
    projection = states[3]["text_projection.weight"]
    assert not torch.allclose(projection, projection.T)  # a test below would not see a wrong side
    whole = as_original_xl(*states, depths=(1, 2, 3), layers=1)
    path = tmp_path_factory.mktemp("sdxl") / "one.safetensors"
    save_file(whole | {"denoiser.sigmas": torch.zeros(1000)}, path)
    return path


def test_a_file_and_a_folder_are_the_same_model(sdxl, file, sdxl_folder):
    sd = minsd.load(str(file), "cpu", tokenizer=sdxl_folder / "tokenizer")
    parts = [[m.unet, m.vae, m.text.model, m.text.second.model] for m in (sd, sdxl)]
    for a, b in zip(*([part.state_dict() for part in of] for of in parts)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(sd.encode_prompt([PROMPT, ""]), sdxl.encode_prompt([PROMPT, ""]))
    assert replace(sd.config.unet, sample_size=16) == sdxl.config.unet
    assert sd.config.vae == sdxl.config.vae and len(sd.notes) == 1
    start = noise([1], (4, 8, 8))
    assert torch.equal(sd.sample(PROMPT, start, steps=2), sdxl.sample(PROMPT, start, steps=2))


def test_a_file_marked_for_zero_terminal_snr_equals_diffusers(file, sdxl_folder, pipe, tmp_path):
    """A file with ComfyUI's marks, drawn with Euler's rule and guidance rescale."""
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(file) | marks, tmp_path / "v.safetensors")
    sd = minsd.load(str(tmp_path / "v.safetensors"), "cpu", tokenizer=sdxl_folder / "tokenizer")
    assert len(sd.notes) == 1 and sd.config.sampler == "euler"
    changed = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    theirs = copy.copy(pipe)
    theirs.scheduler = pipe.scheduler.from_config(
        pipe.scheduler.config, **changed, rescale_betas_zero_snr=True
    )
    start, options = noise([3, 4], (4, 16, 16)), {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    expected = theirs(
        [PROMPT] * 2,
        num_inference_steps=10,
        latents=start.clone(),
        height=128,
        width=128,
        output_type="latent",
        **options,
    ).images
    assert relative(sd.sample(PROMPT, start, steps=10, **options), expected) <= 3e-5


def test_another_vae_has_the_models_scale(sdxl, file, sdxl_folder, tmp_path):
    """A file of a VAE does not state its scale."""
    alone = tmp_path / "vae.safetensors"
    shutil.copy(sdxl_folder / "vae" / "diffusion_pytorch_model.safetensors", alone)
    for vae in (alone, file):
        sd = minsd.load(str(sdxl_folder), "cpu", vae=vae)
        assert sd.config.vae == sdxl.config.vae and sd.config.vae.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {"edm_mean": torch.zeros(4)}, "is of the EDM kind .Playground 2.5."),
        (lambda s: s | {"edm_vpred.sigma_max": torch.zeros(1)}, "is of the EDM kind"),
        (
            lambda s: {
                name.replace("embedders.1", "embedders.0"): value
                for name, value in s.items()
                if "embedders.0" not in name
            },
            "is the SDXL refiner, .* give the base model",
        ),
        (lambda s: {n: v for n, v in s.items() if "embedders.0" not in n}, "SDXL's two text encoders"),
        (lambda s: {n: v for n, v in s.items() if not n.endswith("text_projection")}, "not whole"),
        (
            lambda s: {n: v for n, v in s.items() if "output_blocks.0.1.transformer_blocks.2" not in n},
            "depths that differ within a level .SSD-1B, Vega. are not supported",
        ),
        (lambda s: {n: v for n, v in s.items() if "diffusion_model" not in n}, "without its UNet"),
        (lambda s: {"add_embedding.linear_1.weight": torch.zeros(1)}, "an SDXL network alone"),
    ],
    ids=["edm", "edm v", "refiner", "one encoder", "no projection", "ssd-1b", "no unet", "unet"],
)
def test_files_that_are_refused(file, sdxl_folder, tmp_path, change, says):
    save_file(change(load_file(file)), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=says) as error:
        minsd.load(str(tmp_path / "bad.safetensors"), "cpu", tokenizer=sdxl_folder / "tokenizer")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "the SDXL refiner, .* give the base model"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "with other networks"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "with other networks"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 1536}, "pooled text has 0 numbers"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 1740}, "pooled text has 204 numbers"),
        ("unet/config.json", {"cross_attention_dim": 160}, "text states of width 160"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("text_encoder_2/config.json", {"projection_dim": 32}, "a pooled text state of width 128"),
    ],
)
def test_folders_that_are_refused(sdxl_folder, tmp_path, part, change, says):
    folder = shutil.copytree(sdxl_folder, tmp_path / "broken")
    values = json.loads((folder / part).read_text()) | change
    (folder / part).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says) as error:
        minsd.load(str(folder), "cpu")
    assert "\n" not in str(error.value)


def test_the_row_of_a_folder(sdxl_folder, sdxl):
    """The tiny network equals no row: the defaults are those of SDXL."""
    assert (sdxl.config.steps, sdxl.config.sampler, sdxl.config.guidance_scale) == (50, "euler", 5.0)
    assert sdxl.config.zero_empty and sdxl.config.size == 128 and sdxl.notes == []
    assert (sdxl.text.pad_token_id, sdxl.text.second.pad_token_id) == (sdxl.text.tokenizer.eos_token_id, 0)


# --- adapters and ControlNets ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(sdxl_folder, tmp_path_factory):
    """Adapters of every linear layer and convolution -> {"peft", "kohya", "sgm": file}."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict

    out = tmp_path_factory.mktemp("adapters")
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    states = {}
    torch.manual_seed(2)
    for name, network in networks.items():
        layers = [n for n, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
        states[name] = {
            key: 0.1 * torch.randn_like(value) for key, value in get_peft_model_state_dict(network).items()
        }
    layers = {f"{name}_lora_layers": state for name, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(out / "peft", **layers)
    paths = {"peft": out / "peft" / "pytorch_lora_weights.safetensors"}

    flat = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    kohya = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(flat).items()}
    paths["kohya"] = out / "kohya.safetensors"
    save_file(kohya, paths["kohya"])

    names = original_unet_names(cross=(False, True, True), layers=1, depths=(1, 2, 3), xl=True)
    kinds = {"down_block_types": [0] * 3, "up_block_types": [0] * 3, "layers_per_block": 1}
    kinds |= {"addition_embed_type": "text_time"}
    table = by_diffusers(names, lambda checkpoint: convert_ldm_unet_checkpoint(checkpoint, kinds))
    table = {
        "lora_unet_" + new.removesuffix(".weight").replace(".", "_"): "lora_unet_"
        + old.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        for new, old in table.items()
    }
    sgm = {}
    for key, value in kohya.items():
        layer, _, rest = key.partition(".")
        sgm[f"{table.get(layer, layer)}.{rest}"] = value
    assert len(sgm) == len(kohya) and any("output_blocks_1_2_conv" in key for key in sgm)
    paths["sgm"] = out / "sgm.safetensors"
    save_file(sgm, paths["sgm"])
    return paths


@torch.no_grad()
def test_adapters_equal_diffusers(adapters, sdxl_folder, sdxl):
    from diffusers import StableDiffusionXLPipeline

    sd = minsd.load(str(sdxl_folder), "cpu")
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    pipe.load_lora_weights(adapters["peft"])
    read = {form: lora.read(path, sd) for form, path in adapters.items()}
    layers = {part.name: part for part in read["peft"].parts}
    assert {name.split(".")[0] for name in layers} == {"unet", "text_encoder", "text_encoder_2"}
    assert len(layers) == len(load_file(adapters["peft"])) // 2
    for form in ("kohya", "sgm"):
        others = {part.name: part for part in read[form].parts}
        assert others.keys() == layers.keys()
        assert all(torch.equal(others[name].delta(), layers[name].delta()) for name in layers)

    torch.manual_seed(3)
    x, t = torch.randn(2, 4, 16, 16), 400
    kept = lora.merge([(read["sgm"], 1.0)])
    context = sd.encode_prompt([PROMPT, NEGATIVE])
    assert relative(context, context_of(pipe, [PROMPT, NEGATIVE])) <= 1e-5
    numbers = torch.tensor([[128, 128, 0, 0, 128, 128]] * 2)
    added = {"text_embeds": context[:, -1, :128], "time_ids": numbers}
    expected = pipe.unet(x, t, context[:, :-1], added_cond_kwargs=added).sample
    assert relative(sd.unet(x, t, context), expected) <= 1e-5
    assert relative(sdxl.unet(x, t, context), expected) > 1e-2
    lora.unmerge(kept)
    assert torch.equal(sd.encode_prompt(PROMPT), sdxl.encode_prompt(PROMPT))
    assert torch.equal(sd.unet(x, t, context), sdxl.unet(x, t, context))


def test_adapters_of_sdxl_are_refused_by_sd1(adapters, small, tmp_path):
    for prefix in ("lora_te2", "lora_unet"):
        part = {
            name: tensor for name, tensor in load_file(adapters["sgm"]).items() if name.startswith(prefix)
        }
        save_file(part, tmp_path / "part.safetensors")
        with pytest.raises(ValueError, match="SDXL"):
            lora.read(tmp_path / "part.safetensors", small)


@torch.no_grad()
def test_a_controlnet_equals_diffusers(sdxl, tmp_path):
    config = sdxl.config.unet
    theirs = diffusers_controlnet(
        config,
        transformer_layers_per_block=config.transformer_depth,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=config.pooled_dim + 6 * 256,
        conditioning_embedding_out_channels=(8, 8, 16, 24),
    )
    theirs.save_pretrained(tmp_path / "net")
    net = load_controlnet(tmp_path / "net", device="cpu", dtype=torch.float32)
    torch.manual_seed(4)
    x, picture = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 128, 128)
    context = sdxl.encode_prompt([PROMPT, NEGATIVE])
    added = {"text_embeds": context[:, -1, :128], "time_ids": torch.tensor([[128, 128, 0, 0, 128, 128]] * 2)}
    expected, expected_middle = theirs(
        x, torch.tensor(481), context[:, :-1], picture, added_cond_kwargs=added, return_dict=False
    )
    skips, middle = net(x, 481, context, net.embed(picture))
    assert len(skips) == len(expected)
    assert max(relative(a, b) for a, b in zip((*skips, middle), (*expected, expected_middle))) <= 1e-5
    controlled = Controlled(sdxl.unet, [Control(net, picture)])
    plain = controlled(x, 481, context)
    assert torch.equal(controlled(x, 481, controlled.text_kv(context)), plain)
    assert relative(sdxl.unet(x, 481, context), plain) > 1e-3


# --- noise methods --------------------------------------------------------------------------------


def test_maps_of_sdxl_sizes(sdxl):
    """16x16 cells at 512 pixels, 32x32 at 1024; the early stop has the maps and gradients of a full run."""
    for side, cells in ((64, 16), (96, 24), (128, 32)):
        record = AttentionRecorder()
        record.begin([(side, side), (side // 2, side // 2), (side // 4, side // 4)], [0, 10, 60])
        assert record.resolution == (cells, cells) and record.total == 60
    context, results = sdxl.encode_prompt(PROMPT), []
    for only in (False, True):
        record = AttentionRecorder((4, 4), only=only)
        leaf = noise([0], (4, 16, 16)).requires_grad_()
        assert (sdxl.unet(leaf, 300, context, record=record) is None) == only
        assert record.cross.shape == (1, 4, 4, 77)
        loss = record.cross[..., 3].amax() + record.self.square().sum()
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


def test_methods_on_a_batch_are_those_of_its_images(sdxl):
    prompts, subjects, seeds = [PROMPT, NEGATIVE], [["circle", "square"], ["star"]], [1, 2]
    how = {"steps": 3, "height": 64, "width": 64}
    short = {"rounds": 1, "round_steps": 2, "last_steps": 1}
    batch = initno.optimize_batch(sdxl, prompts, subjects, seeds, **short, **how)
    trip = {"steps": 2, "guidance_scale": 5.0}
    latents = noise(seeds, (4, 8, 8))
    scores = stability.score(sdxl, prompts, latents, **trip).scores
    for k in range(2):
        alone = initno.optimize(sdxl, prompts[k], subjects[k], seeds[k], **short, **how)
        assert close(batch[k].noise, alone.noise)
        assert not torch.equal(alone.noise, noise([seeds[k]], (4, 8, 8)))
        score = stability.score(sdxl, prompts[k], latents[k : k + 1], **trip).scores[0]
        assert scores[k] == pytest.approx(score, abs=1e-5)


def test_objectives_have_gradients(sdxl):
    """Every objective judges a Look at SDXL: maps of 77 tokens, predictions and the decoded image."""
    halves = [
        {"prompt": text, "box": box}
        for text, box in (("a red circle", [0, 0, 0.5, 1]), ("a blue square", [0.5, 0, 1, 1]))
    ]
    made = layout.load({"prompt": PROMPT, "regions": halves}).sized(64, 64)
    asks = look.ask(sdxl, [PROMPT], [0], layout=made)
    x, rows = noise([0], (4, 8, 8)), torch.tensor([0])
    kinds = {name: objectives.find(name)(sdxl, asks) for name in objectives.NAMES}
    kinds["picture"] = lambda seen: seen.picture.mean((1, 2, 3))
    for name, objective in kinds.items():
        lift = look.Lift(sdxl, asks, objective, guidance=5.0, negative_prompt="a star")
        lift.begin()
        told, gradient = lift.slope(x, rows, 500, 1)
        assert told["loss"].isfinite().all() and gradient.isfinite().all(), name
    assert gradient.abs().sum() > 0


def test_the_whole_rows_of_a_collage(sdxl, monkeypatch):
    """Every pass has its own caption's pooled state; crops have the layout's size."""
    boxes = [[0, 0, 64, 128], [64, 0, 128, 128]]
    regions = [
        {"prompt": prompt, "box": box} for prompt, box in zip(("a red circle", "a blue square"), boxes)
    ]
    made = layout.load({"prompt": PROMPT, "width": 128, "height": 128, "regions": regions})
    seen = []
    whole = type(sdxl.unet).embed_whole
    monkeypatch.setattr(
        type(sdxl.unet), "embed_whole", lambda unet, x, row: seen.append(row) or whole(unet, x, row)
    )
    x = noise([0, 1], (4, 16, 16))
    pooled = sdxl.encode_prompt(["", PROMPT, "a red circle", "a blue square"])[:, -1, :128]
    collage.predictor(sdxl, made, guidance_scale=5.0, seed=[0, 1])(x, 801)
    rows = torch.cat([row for row, _ in seen])
    assert close(rows, pooled.repeat_interleave(2, 0))  # u, the whole image, 1 and 2, for two images
    assert not torch.cat([size for _, size in seen]).any()

    seen.clear()
    collage.predictor(sdxl, made, guidance_scale=5.0, seed=[0, 1], crop_margin=0.25)(x, 801)
    assert len(seen) == 3  # the whole image, and two crops
    assert torch.cat([size for _, size in seen]).unique(dim=0).tolist() == [[128, 128, 0, 0, 128, 128]]
    assert close(seen[1][0], pooled[[0, 0, 2, 2]])


def test_an_unmasked_collage_is_weighted_passes(sdxl):
    regions = [{"prompt": "a red circle", "box": [0, 0, 64, 128]}]
    made = layout.load({"prompt": PROMPT, "width": 128, "height": 128, "regions": regions})
    x = noise([0], (4, 16, 16))
    found = collage.predictor(sdxl, made, guidance_scale=5.0, masked=False)(x, 601)
    uncond = sdxl.encode_prompt("")
    whole, region = (
        sdxl.predictor(sdxl.encode_prompt(text), uncond, 5.0)(x, 601) for text in (PROMPT, "a red circle")
    )
    expected = whole.clone()
    expected[..., :8] = (0.1 * whole + region)[..., :8] / 1.1
    assert relative(found, expected) <= 1e-5


def test_the_same_images_with_graphs(sdxl, monkeypatch):
    fake = Recorded()
    monkeypatch.setattr(graphs, "capture", fake)
    monkeypatch.setattr(graphs, "broken", False)
    sd = copy.copy(sdxl)
    how = {"seeds": [1], "steps": 4, "height": 64, "width": 64}
    plain = [np.asarray(sd(prompt, **how)[0]).astype(int) for prompt in (PROMPT, NEGATIVE)]
    sd.use_graphs()
    try:
        graphed = [np.asarray(sd(prompt, **how)[0]).astype(int) for prompt in (PROMPT, NEGATIVE)]
        assert (fake.captures, fake.replays) == (1, 7)
        sd(PROMPT, **how | {"height": 128})
        assert fake.captures == 2
    finally:
        sd.use_graphs(False)
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(plain, graphed))
    assert np.abs(plain[0] - plain[1]).max() > 2


# --- the command line -----------------------------------------------------------------------------


def test_every_command_line(sdxl, sdxl_folder, adapters, tmp_path, capfd, monkeypatch):
    """The runs of test_generate.py, at 64x64 pixels in two steps."""
    monkeypatch.chdir(tmp_path)
    regions = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue square", "box": [0.5, 0, 1, 1]},
    ]
    own = [regions[0], regions[1] | {"lora": [f"{adapters['kohya']}:0.5"]}]
    for name, parts in (("plain", regions), ("lora", own)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"prompt": PROMPT, "regions": parts}))
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{NEGATIVE}\n")
    common = ["--model", str(sdxl_folder), *"--steps 2 --height 64 --width 64 --out o".split()]

    def run(*args, quiet=True):
        assert main([*args, *common, *(["--quiet"] if quiet else [])]) == 0
        return json.loads((tmp_path / "o" / "runs.jsonl").read_text().splitlines()[-1])

    assert run(PROMPT, "--seed", "1", "--lora", f"{adapters['sgm']}:0.5")["lora"]
    monkeypatch.setattr(session, "load", lambda *how, **more: copy.copy(sdxl))  # loaded once from here on
    first = run(PROMPT, "--seeds", "3-4", "--save-noise", "--negative-prompt", NEGATIVE)
    assert (first["sampler"], first["guidance_scale"], first["unet_rows"]) == ("euler", 5.0, 4)
    picture = f"o/{first['file']}"
    short = partial(initno.optimize_batch, rounds=1, round_steps=2, last_steps=1)
    monkeypatch.setattr(
        initno, "optimize_batch", short
    )  # as it is, it never accepts a random network's noise
    initno_row = run(PROMPT, *"--seed 1 --init-noise initno --attention-maps".split())
    assert initno_row["initno"].keys() == {"success", "rounds", "steps", "losses"}
    run(PROMPT, "--seed", "1", "--excite")
    assert run(PROMPT, "--seed", "1", "--objective", "syngen")["objective"]
    for score in ("stability", "attention"):
        how = f"--seed 1 --init-noise select --candidates 2 --score {score}"
        assert len(run(PROMPT, *how.split())["candidates"]) == 2
    how = "--seed 1 --init-noise optimize --optimize-steps 1 --optimize-mode detach"
    assert run(PROMPT, *how.split())["stability"]
    assert run("--layout", "plain.json", "--seed", "1")["unet_rows"] == 8 + 2  # a look at each region
    assert run("--layout", "plain.json", "--seed", "1", "--crop-margin", "0.25")["crop_margin"] == 0.25
    select = "--layout plain.json --seed 1 --init-noise select --score attention --candidates 2"
    assert len(run(*select.split())["candidates"]) == 2
    assert run("--layout", "lora.json", "--seed", "1")["unet_rows"] == 12 + 2
    assert run(PROMPT, *f"--seed 1 --init-image {picture} --strength 0.5".split())["strength"] == 0.5
    assert run("--invert", picture)["psnr"] > 0
    assert run("--prompts", "prompts.txt", "--seed", "1")["prompt"] == NEGATIVE
    assert run(PROMPT, "--seed", "9", "--noise", f"o/extra/{first['file'][:-4]}-noise.safetensors")
    again = run("--like", picture)["file"]
    assert (
        np.abs(np.asarray(Image.open(f"o/{again}")).astype(int) - np.asarray(Image.open(picture))).max() <= 2
    )
    capfd.readouterr()
    run(PROMPT, "--list-tokens")
    assert "circle</w>" in capfd.readouterr().out
    turbo = copy.copy(sdxl)
    turbo.config = replace(sdxl.config, guidance_scale=1.0)
    monkeypatch.setattr(session, "load", lambda *how, **more: turbo)
    row = run(PROMPT, "--seed", "1", "--guidance-scale", "0", quiet=False)
    assert (row["guidance_scale"], row["unet_rows"]) == (1.0, 2)
    assert "guidance scale 0 means no guidance for this model" in capfd.readouterr().err


def test_an_embedding_has_vectors_for_both_encoders(sdxl, sdxl_folder, tmp_path):
    """A word with the vectors of "red" reads as "red" does, also in the pooled state."""
    sd = minsd.load(str(sdxl_folder), "cpu")
    (token,) = sd.text.ids("red")[1:-1]
    tables = [encoder.model.get_input_embeddings().weight for encoder in (sd.text, sd.text.second)]
    parts = {name: table[token][None].clone() for name, table in zip(("clip_l", "clip_g"), tables)}
    save_file(parts, tmp_path / "style.safetensors")
    embedding.add(embedding.read(tmp_path / "style.safetensors", None, sd), sd)
    assert close(sd.encode_prompt("a style star"), sdxl.encode_prompt("a red star"))
    assert close(sd.encode_prompt("a star"), sdxl.encode_prompt("a star"))
    assert relative(sdxl.encode_prompt("a style star"), sdxl.encode_prompt("a red star")) > 1e-2
