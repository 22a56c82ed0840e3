"""ControlNet against diffusers' on the same random weights, and the promises of `Controlled`."""

import dataclasses
import gc
import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import small_pipeline
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

import minsd
from minsd import guidance
from minsd.adapters import Adapters
from minsd.config import MODELS
from minsd.controlnet import Control, Controlled, ControlNet, read_control_image
from minsd.unet import UNet
from minsd.weights.controlnet import load_controlnet


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def diffusers_controlnet(config, **more) -> ControlNetModel:
    torch.manual_seed(1)
    net = ControlNetModel(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=[("CrossAttn" if cross else "") + "DownBlock2D" for cross in config.cross_attention],
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
        use_linear_projection=config.linear_projection,
        upcast_attention=config.upcast_attention,
        **more,
    ).eval()
    for name, p in net.named_parameters():  # convolutions that begin at zero would hide everything
        if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")) and p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return net


@torch.no_grad()
def test_full_size_parity():
    """SD1.5's size, 32x32 latents; one set of weights in memory: ours are assigned from theirs."""
    config = MODELS["sd15"].unet
    theirs = diffusers_controlnet(config)
    with torch.device("meta"):
        ours = ControlNet(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict: the same names, every one
    x, context, picture = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.rand(1, 3, 256, 256)
    skips, middle = ours(x, 481, context, ours.embed(picture))
    expected, expected_middle = theirs(x, torch.tensor(481), context, picture, return_dict=False)
    assert len(skips) == len(expected) == 12
    assert max(relative(a, b) for a, b in zip((*skips, middle), (*expected, expected_middle))) <= 1e-5
    del theirs, ours
    gc.collect()


@pytest.fixture(scope="module")
def net_folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "net"
    diffusers_controlnet(
        small.config.unet, conditioning_embedding_out_channels=(8, 8, 16, 24)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def net(net_folder):
    return load_controlnet(net_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    """Two control images, (2,3,128,128)."""
    torch.manual_seed(6)
    return torch.rand(2, 3, 128, 128)


def controlled(sd, controls, guidance_scale=5.0, seeds=(0, 1), steps=3):
    unet = Controlled(sd.unet, controls)
    predict = guidance.classifier_free(
        unet, sd.encode_prompt("a red circle"), sd.encode_prompt(""), guidance_scale, sd.schedule
    )
    return sd.denoise(predict, minsd.noise.initial.noise(seeds, (4, 16, 16)), steps=steps, sampler="ddim")


@pytest.mark.parametrize("more", [{}, {"start": 0.2, "end": 0.7}], ids=["all steps", "some steps"])
def test_pipeline_parity(small, net, net_folder, shapes_folder, pictures, more):
    """Two ControlNets, each at its own scale and time, over ten guided steps."""
    from diffusers import StableDiffusionControlNetPipeline

    plain = small_pipeline(shapes_folder / "tokenizer")
    plain.unet.load_state_dict(small.unet.state_dict())
    theirs = [ControlNetModel.from_pretrained(net_folder)] * 2
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=theirs, requires_safety_checker=False)
    pipe.text_encoder.load_state_dict(small.text.model.state_dict(), strict=False)
    pipe.set_progress_bar_config(disable=True)
    start, end = more.get("start", 0.0), more.get("end", 1.0)
    expected = pipe(
        "a red circle",
        image=[pictures[:1], pictures[1:]],
        num_inference_steps=10,
        guidance_scale=5.0,
        output_type="latent",
        latents=minsd.noise.initial.noise([0], (4, 16, 16)),
        controlnet_conditioning_scale=[0.9, 0.4],
        control_guidance_start=[start, 0.0],
        control_guidance_end=[end, 1.0],
    ).images
    controls = [Control(net, pictures[:1], 0.9, **more), Control(net, pictures[1:], 0.4)]
    assert relative(controlled(small, controls, seeds=[0], steps=10), expected) <= 1e-4
    without = controlled(small, controls[1:], seeds=[0], steps=10)
    assert relative(without, expected) > 1e-2  # the first one matters


@torch.no_grad()
def test_rows_take_their_own_image_and_scale(small, net, pictures):
    both = controlled(small, [Control(net, pictures, [0.7, 0.2])])
    for b, scale in enumerate((0.7, 0.2)):
        alone = controlled(small, [Control(net, pictures[b : b + 1], scale)], seeds=[b])
        assert relative(both[b : b + 1], alone) < 1e-5
    x, context = torch.randn(3, 4, 16, 16), torch.randn(3, 77, 32)
    adapters = Adapters()
    unet = Controlled(small.unet, [Control(net, pictures, [0.7, 0.2])], adapters)
    with adapters.rows([1, 0, 1]):
        by_pass = unet(x, 500, context)
        with pytest.raises(ValueError, match="3 rows were given, and the batch has 2"):
            unet(x[:2], 500, context[:2])
    for b, k in enumerate((1, 0, 1)):
        one = Controlled(small.unet, [Control(net, pictures[k : k + 1], (0.7, 0.2)[k])])
        assert relative(by_pass[b : b + 1], one(x[b : b + 1], 500, context[b : b + 1])) < 1e-5
    assert torch.equal(unet(x, 500, context), small.unet(x, 500, context))  # outside a block it does nothing
    off = controlled(small, [Control(net, pictures, 0.0)])
    assert torch.equal(off, controlled(small, []))
    assert relative(both, off) > 1e-2


def test_start_and_end_are_fractions_of_the_schedule(net, pictures):
    for timesteps, active in ((1000, range(200, 800)), (500, range(100, 400)), (10, range(2, 8))):
        control = Control(net, pictures, 1.0, 0.2, 0.8, timesteps)
        assert [t for t in range(timesteps) if control.is_active(t)] == list(active)
        assert all(Control(net, pictures, num_train_timesteps=timesteps).is_active(t) for t in (0, timesteps))
    assert Control(net, pictures, 1.0, 0.2, 0.8).is_active(torch.tensor([500, 900]))
    assert not Control(net, pictures, 0.0).is_active(500)


@torch.no_grad()
def test_another_set_of_controls_takes_the_first_one_s_place(small, net, pictures):
    torch.manual_seed(7)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    first = Controlled(small.unet, [Control(net, pictures[:1])])
    second, alone = (Controlled(unet, [Control(net, pictures[1:])]) for unet in (first, small.unet))
    assert torch.equal(second(x, 500, context), alone(x, 500, context))


@torch.no_grad()
def test_texts_of_both_halves_reach_the_controlnet(small, net, pictures):
    """Text 0 in the encoder half, text 1 from the middle on, as a collage's "compat" cells may have
    it."""
    torch.manual_seed(8)
    x, texts, grids = torch.randn(1, 4, 16, 16), torch.randn(1, 2, 77, 32), small.unet.grids((16, 16))
    down, up = ({grid: torch.full((1, grid[0] * grid[1]), text) for grid in grids} for text in (0, 1))
    unet = Controlled(small.unet, [Control(net, pictures[:1])])
    added = net(x, 300, texts[:, 0], net.embed(pictures[:1]))[0]  # its encoder half, at text 0
    middle = net(x, 300, texts, net.embed(pictures[:1]), region=(down, up))[1]
    expected = small.unet(x, 300, texts, region=(down, up), control=(added, middle))
    assert relative(unet(x, 300, texts, region=(down, up)), expected) < 1e-5


@torch.no_grad()
def test_region_attention_reaches_the_controlnet(small, net, pictures):
    """Every cell at text 1 of 3 is that text alone, in the UNet and in the ControlNet."""
    torch.manual_seed(7)
    x, texts = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 77, 32)
    unet = Controlled(small.unet, [Control(net, pictures)])
    region = {grid: torch.ones(2, grid[0] * grid[1], dtype=torch.long) for grid in unet.grids((16, 16))}
    expected = unet(x, 500, texts[:, 1])
    assert relative(unet(x, 500, texts, region=region), expected) < 1e-5
    assert relative(unet(x, 500, unet.text_kv(texts[:, 1])), expected) < 1e-6


# diffusers' names -> those of the original layout, written out for a network of 4 levels of 2 layers
ORIGINAL = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "controlnet_mid_block": "middle_block_out.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)},
    **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(12)},
    **{f"down_blocks.{b}.resnets.{i}": f"input_blocks.{3 * b + i + 1}.0" for b in range(4) for i in range(2)},
    **{
        f"down_blocks.{b}.attentions.{i}": f"input_blocks.{3 * b + i + 1}.1"
        for b in range(3)
        for i in range(2)
    },
    **{f"down_blocks.{b}.downsamplers.0.conv": f"input_blocks.{3 * b + 3}.0.op" for b in range(3)},
}
ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str) -> str:
    prefix = next(p for p in sorted(ORIGINAL, key=len, reverse=True) if name.startswith(f"{p}."))
    rest = name[len(prefix) + 1 :]
    if ".resnets." in prefix:
        layer, _, leaf = rest.rpartition(".")
        rest = f"{ORIGINAL_RESNET[layer]}.{leaf}"
    return f"control_model.{ORIGINAL[prefix]}.{rest}"


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
@torch.no_grad()
def test_single_files_of_both_layouts(tmp_path, linear):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = dataclasses.replace(
        MODELS["sd20" if linear else "sd15"].unet, block_out_channels=(32, 64, 64, 64), num_heads=(8, 8, 8, 8)
    )
    theirs = diffusers_controlnet(config)
    state = theirs.state_dict()
    original = {original_name(name): p for name, p in state.items()}
    back = convert_controlnet_checkpoint(dict(original), {"layers_per_block": 2})
    assert back.keys() == state.keys() and all(
        torch.equal(back[name], state[name]) for name in state
    )  # diffusers reads it so
    original["model.diffusion_model.out.2.bias"] = torch.zeros(4)  # these files hold the whole model beside
    bare = {
        name.removeprefix("control_model."): p
        for name, p in original.items()
        if name.startswith("control_model.")
    }
    x, context, picture = (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 77, config.context_dim),
        torch.rand(1, 3, 64, 64),
    )
    expected = theirs(x, torch.tensor(300), context, picture, return_dict=False)[1]
    for name, tensors in (("diffusers", state), ("original", original), ("bare", bare)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        net = load_controlnet(tmp_path / f"{name}.safetensors", device="cpu", dtype=torch.float32)
        assert relative(net(x, 300, context, net.embed(picture))[1], expected) <= 1e-5


@torch.no_grad()
def test_a_control_lora_is_the_controlnet_of_the_sums(tmp_path):
    """W = UNet's weight + up @ down by hand, for linear layers and convolutions; the rest is whole, or
    the UNet's own."""
    sizes = {"block_out_channels": (32, 64, 64, 64), "num_heads": (8, 8, 8, 8)}
    config = dataclasses.replace(MODELS["sd15"].unet, **sizes)
    torch.manual_seed(2)
    unet = UNet(config).requires_grad_(False)
    theirs = diffusers_controlnet(config)
    own, state, file = dict(unet.named_parameters()), theirs.state_dict(), {}
    kinds = Counter()
    for number, (name, p) in enumerate(state.items()):
        layer = original_name(name).removeprefix("control_model.")
        if name not in own or p.ndim == 1 and number % 3:
            file[layer] = p
            kinds["whole"] += 1
        elif p.ndim == 1 or number % 5 == 0:
            state[name] = own[name]
            kinds["own"] += 1
        else:
            up, down = torch.randn(len(p), 3) / 40, torch.randn(3, *p.shape[1:]) / 40
            state[name] = own[name] + torch.tensordot(up, down, 1)
            layer = layer.removesuffix(".weight")
            file |= {f"{layer}.up": up if p.ndim == 2 else up[:, :, None, None], f"{layer}.down": down}
            kinds[p.ndim] += 1
    assert min(kinds[kind] for kind in ("whole", "own", 2, 4)) > 10
    theirs.load_state_dict(state)
    path = tmp_path / "control-lora.safetensors"
    save_file(file | {"lora_controlnet": torch.zeros(0)}, path)
    net = load_controlnet(path, device="cpu", dtype=torch.float32, unet=unet)
    assert max(relative(p, state[name]) for name, p in net.named_parameters()) <= 1e-6
    # GroupNorm at the coarsest level would have two values per group with 8x8 latents.
    x, context, picture = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.rand(1, 3, 256, 256)
    skips, middle = net(x, 300, context, net.embed(picture))
    expected, expected_middle = theirs(x, torch.tensor(300), context, picture, return_dict=False)
    assert max(relative(a, b) for a, b in zip((*skips, middle), (*expected, expected_middle))) <= 1e-5
    assert all(torch.equal(p, before) for p, before in zip(unet.parameters(), own.values()))
    other = UNet(dataclasses.replace(config, context_dim=48))
    for change, model, says in (
        ({}, None, "is a control-lora, a difference from a UNet"),
        ({}, other, "with this model's UNet, the control-lora .*mis-shaped"),
        ({"time_embed.0.up": torch.zeros(128, 5)}, unet, "time_embed.0.up and .down do not fit"),
        ({"strange.up": torch.zeros(2, 2)}, unet, "strange.up and .down do not fit"),
        ({"middle_block_out.0.weight": None}, unet, "is not a ControlNet"),
    ):
        changed = {k: v for k, v in (file | change).items() if v is not None}
        save_file(changed | {"lora_controlnet": torch.zeros(0)}, path)
        with pytest.raises(ValueError, match=says) as error:
            load_controlnet(path, device="cpu", dtype=torch.float32, unet=model)
        assert "\n" not in str(error.value)


def test_a_control_lora_draws_from_the_command_line(tmp_path):
    """The embedded model's ControlNet as a control-lora: its wide layers as exact factors of the
    difference from the UNet, the rest whole. The image is that of the ControlNet itself."""
    from minsd.generate import main
    from minsd.weights.load import SHAPES_FOLDER

    folder = SHAPES_FOLDER / "extras" / "outlines"
    own = dict(minsd.load("shapes", "cpu").unet.named_parameters())
    file = {"lora_controlnet": torch.zeros(0)}
    for name, weight in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        layer = original_name(name).removeprefix("control_model.")
        if name not in own or weight.ndim != 2:
            file[layer] = weight.float()
            continue
        layer = layer.removesuffix(".weight")
        file[f"{layer}.up"] = weight.float() - own[name]
        file[f"{layer}.down"] = torch.eye(weight.shape[1])
    assert sum(name.endswith(".up") for name in file) > 20
    save_file(file, tmp_path / "control-lora.safetensors")
    images = []
    for number, net in enumerate((folder, tmp_path / "control-lora.safetensors", None)):
        out = tmp_path / str(number)
        words = [
            "a red circle and a blue square",
            "--seed",
            "1",
            "--steps",
            "4",
            "--out",
            str(out),
            "--quiet",
        ]
        if net is not None:
            words += ["--controlnet", str(net), "--control-image", str(folder / "example.png")]
        assert main(words) == 0
        images.append(np.asarray(Image.open(out / "00000-1.png")).astype(int))
    plain, lora, without = images
    assert abs(lora - plain).max() <= 1
    assert abs(lora - without).max() > 50


@torch.no_grad()
def test_colours_in_bgr_order(small, net, net_folder, pictures, tmp_path):
    save_file(
        load_file(net_folder / "diffusion_pytorch_model.safetensors"),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    config = json.loads((net_folder / "config.json").read_text()) | {
        "controlnet_conditioning_channel_order": "bgr"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    bgr = load_controlnet(tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(bgr.embed(pictures), net.embed(pictures[:, [2, 1, 0]]))


def test_one_clear_line_for_what_does_not_fit(small, small_folder, net, net_folder, pictures, tmp_path):
    def refused(kind, message, call):
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    def load(path):
        return lambda: load_controlnet(path, device="cpu", dtype=torch.float32)

    refused(FileNotFoundError, "there is no ControlNet", load(tmp_path / "none"))
    refused(ValueError, "pickle", load(tmp_path / "control.pth"))
    refused(ValueError, "is not a ControlNet", load(small_folder / "unet"))
    save_file({"adapter.body.0.in_conv.weight": torch.zeros(1)}, tmp_path / "t.safetensors")
    refused(ValueError, "looks like a T2I adapter", load(tmp_path / "t.safetensors"))
    tensors = load_file(net_folder / "diffusion_pytorch_model.safetensors")
    del tensors["controlnet_down_blocks.0.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    refused(ValueError, "1 missing .controlnet_down_blocks.0.bias", load(tmp_path / "less.safetensors"))
    other = diffusers_controlnet(dataclasses.replace(small.config.unet, context_dim=48))
    other.save_pretrained(tmp_path / "wider")
    wider = load(tmp_path / "wider")()
    refused(
        ValueError,
        "width 48 .*take the one for this model's family",
        lambda: Controlled(small.unet, [Control(wider, pictures)]),
    )
    refused(ValueError, "needs a control image", lambda: Control(net, None))
    refused(ValueError, "start < end", lambda: Control(net, pictures, start=0.5, end=0.5))
    refused(ValueError, "control scale", lambda: Control(net, pictures, [1.0, 2.0, 3.0]))
    little = [Control(net, pictures[..., :64, :64])]
    refused(ValueError, "64x64 pixels does not fit an image of 128x128", lambda: controlled(small, little))
    two = [Control(net, pictures)]
    refused(
        ValueError,
        "2 control images for a batch of 1",
        lambda: controlled(small, two, guidance_scale=1.0, seeds=[0]),
    )


def test_control_images_are_taken_as_given(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    x = read_control_image(tmp_path / "edges.png", 48, 64)
    assert np.array_equal((x[0] * 255).round().permute(1, 2, 0).numpy(), pixels)
    assert read_control_image(tmp_path / "edges.png", 128, 64).shape == (1, 3, 64, 128)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not an image"):
        read_control_image(tmp_path / "text.png", 64, 64)
    with pytest.raises(FileNotFoundError, match="no control image"):
        read_control_image(tmp_path / "none.png", 64, 64)
