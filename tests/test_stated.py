"""Files are believed in what they state of themselves: ModelSpec and kohya metadata, scheduler and
pipeline classes, clip skip.

Keys and values as in public files: ModelSpec's (Stability AI's convention) and sd-scripts'.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_single_file import refused, tokenizer, twins  # noqa: F401 (fixtures)

import minsd
from minsd.weights import stated


@pytest.mark.parametrize(
    ("metadata", "prediction", "size"),
    [
        ({}, None, None),
        ({"modelspec.prediction_type": "v"}, "v_prediction", None),
        ({"modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x512"}, "epsilon", 512),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", None),
        (
            {"modelspec.architecture": "stable-diffusion-v2-512", "modelspec.resolution": "768x512"},
            "epsilon",
            None,
        ),
        (
            {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": "v"},
            "v_prediction",
            None,
        ),
        ({"modelspec.architecture": "stable-diffusion-v1"}, None, None),
        ({"ss_base_model_version": "sd_v2_v", "ss_resolution": "(768, 768)"}, "v_prediction", 768),
        ({"ss_base_model_version": "sd_v1"}, None, None),
        ({"ss_v_parameterization": "True"}, "v_prediction", None),
        ({"ss_base_model_version": "sd_v2_v", "modelspec.prediction_type": "epsilon"}, "epsilon", None),
        ({"modelspec.prediction_type": "rubbish", "modelspec.resolution": "0x0"}, None, None),
        ({"modelspec.resolution": "999999x999999"}, None, None),
    ],
)
def test_metadata_of_single_files(metadata, prediction, size):
    found = stated.of_file(metadata)
    assert (found.prediction_type, found.size, found.zero_snr) == (prediction, size, False)
    marked = stated.of_file(metadata, ["v_pred", "ztsnr"])
    assert (marked.prediction_type, marked.zero_snr) == (prediction or "v_prediction", True)
    assert stated.of_file(metadata | {"ss_zero_terminal_snr": "True"}).zero_snr


def test_marks_of_zero_terminal_snr(twins, tokenizer, tmp_path):  # noqa: F811
    """As a folder with that scheduler config: the same schedule, which begins at timestep 999."""
    folder, file, _, _ = twins
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(file) | marks, tmp_path / "z.safetensors")
    sd = minsd.load(str(tmp_path / "z.safetensors"), "cpu", tokenizer=tokenizer)
    shutil.copytree(folder, tmp_path / "folder")
    values = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    change(tmp_path / "folder", "scheduler/scheduler_config.json", values | {"rescale_betas_zero_snr": True})
    same = minsd.load(str(tmp_path / "folder"), "cpu")
    assert sd.config.schedule == same.config.schedule and sd.notes == []
    assert sd.schedule.timesteps(4)[0] == 999 and sd.schedule.abar(999) == 2**-24
    how = {"seeds": [3], "steps": 2, "height": 64, "width": 64}
    assert sd("a red circle", **how)[0].tobytes() == same("a red circle", **how)[0].tobytes()
    del marks["v_pred"]
    save_file(load_file(file) | marks, tmp_path / "z.safetensors")
    said = refused(tmp_path / "z.safetensors", tokenizer=tokenizer, prediction_type="epsilon")
    assert "needs a model that predicts v: give --prediction-type v_prediction if this one does" in said


def test_single_files_are_loaded_as_they_state(twins, tokenizer, tmp_path):  # noqa: F811
    _, file, _, sd2 = twins
    state = load_file(file)

    def load(metadata, **more):
        save_file(state, tmp_path / "x.safetensors", metadata)
        return minsd.load(str(tmp_path / "x.safetensors"), "cpu", tokenizer=tokenizer, **more)

    sd = load({"modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x512"})
    assert (sd.config.schedule.prediction_type, sd.config.size, sd.notes) == ("epsilon", 512, [])
    sd = load({"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"})
    assert (sd.config.schedule.prediction_type, sd.config.size, sd.notes) == ("v_prediction", 768, [])
    sd = load({"modelspec.prediction_type": "v"}, prediction_type="epsilon")
    assert sd.config.schedule.prediction_type == "epsilon" and "states v_prediction" in sd.notes[0]
    sd = load({"ss_base_model_version": "sd_v2" if sd2 else "sd_v1"})
    assert (
        sd.config.schedule.prediction_type == ("v_prediction" if sd2 else "epsilon") and len(sd.notes) == sd2
    )


def change(folder, part, values):
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("scheduler", "sampler", "says"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim", None),
        ({"_class_name": "PNDMScheduler"}, "ddim", "--sampler pndm"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_a", "sampler euler_a, as the folder's"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m", "--karras"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "ddim",
            "not among",
        ),
        ({"_class_name": "LCMScheduler"}, "lcm", "sampler lcm"),
        ({"_class_name": "TCDScheduler"}, "ddim", "TCDScheduler, is not among minsd's samplers"),
        ({"_class_name": ["odd"]}, "ddim", "not among"),
    ],
)
def test_the_scheduler_of_a_folder_is_followed_or_noted(broken_folder, scheduler, sampler, says):
    change(broken_folder, "scheduler/scheduler_config.json", scheduler)
    sd = minsd.load(str(broken_folder), "cpu")
    assert sd.config.sampler == sampler
    assert sd.notes == [] if says is None else says in sd.notes[0]
    assert (sd.config.steps, sd.config.guidance_scale) == ((4, 1.0) if sampler == "lcm" else (50, 7.5))


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionInitNOPipeline",
        "StableDiffusionPAGPipeline",
        "LatentConsistencyModelPipeline",
    ],
)
def test_pipelines_with_the_same_networks_are_loaded(broken_folder, small_folder, kind):
    change(broken_folder, "model_index.json", {"_class_name": kind})
    if "ControlNet" in kind:
        change(broken_folder, "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]})
    sd, plain = (minsd.load(str(folder), "cpu") for folder in (broken_folder, small_folder))
    assert torch.equal(sd.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert bool(sd.notes) == ("ControlNet" in kind)


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "StableDiffusionInpaintPipeline"},
        {"_class_name": "StableDiffusionUpscalePipeline"},
        {"_class_name": "StableDiffusionXLPipeline"},
        {"_class_name": "Odd\x1b[2J"},
        {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"text_encoder": ["transformers", "T5EncoderModel"]},
    ],
)
def test_pipelines_with_other_networks_are_refused(broken_folder, values):
    if values.get("_class_name", "").startswith("Odd"):
        (broken_folder / "model_index.json").write_text("{}")
    change(broken_folder, "model_index.json", values)
    message = refused(broken_folder)
    assert "with other networks" in message and "\x1b" not in message


def test_fewer_text_layers_are_clip_skip(broken_folder, small_folder):
    """As diffusers' documentation has it: num_hidden_layers one lower, the file unchanged. Truth:
    transformers.
    """
    from transformers import CLIPTextModel

    config = json.loads((broken_folder / "text_encoder/config.json").read_text())
    layers = config["num_hidden_layers"]
    change(broken_folder, "text_encoder/config.json", {"num_hidden_layers": layers - 1})
    sd = minsd.load(str(broken_folder), "cpu")
    assert sd.notes == [
        f"the text encoder runs {layers - 1} of its {layers} layers (clip skip), as its config states"
    ]
    ids = sd.text.ids("a red circle")
    ids += [sd.text.pad_token_id] * (77 - len(ids))
    theirs = CLIPTextModel.from_pretrained(broken_folder / "text_encoder").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(sd.encode_prompt("a red circle"), expected, atol=1e-5, rtol=1e-5)
    assert minsd.load(str(small_folder), "cpu").notes == []


def _renamed(state, table):
    out = {}
    for name, tensor in state.items():
        for old, new in table.items():
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.").replace(
                f"attn_1.{old}.", f"attn_1.{new}."
            )
        out[name] = tensor
    return out


NAMES = ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
SPELLINGS = (
    ("q", "k", "v", "proj_out", "norm"),
    ("query", "key", "value", "proj_attn", "group_norm"),
    ("to_q", "to_k", "to_v", "to_out.0", "group_norm"),
    ("to_q", "to_k", "to_v", "to_out", "norm"),
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_vae_attention_in_every_spelling(twins, tokenizer, tmp_path, spelling):  # noqa: F811
    folder, file, _, _ = twins
    expected = minsd.load(str(folder), "cpu").vae.state_dict()
    other = tmp_path / "folder"
    shutil.copytree(folder, other)
    weights = other / "vae/diffusion_pytorch_model.safetensors"
    save_file(_renamed(load_file(weights), dict(zip(NAMES, spelling))), weights)
    single = tmp_path / "x.safetensors"
    save_file(_renamed(load_file(file), dict(zip(SPELLINGS[0], spelling))), single)
    for sd in (minsd.load(str(other), "cpu"), minsd.load(str(single), "cpu", tokenizer=tokenizer)):
        state = sd.vae.state_dict()
        assert state.keys() == expected.keys()
        assert all(
            np.array_equal(state[name].numpy().ravel(), expected[name].numpy().ravel()) for name in state
        )
