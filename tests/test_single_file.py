"""Single files: a diffusers folder and a file in the original layout, of the same weights, load alike.

The original names are listed here as the original code builds its layers (numbered in one sequence);
diffusers' converter gives their names in diffusers. The folder is written by diffusers' classes.
"""

import hashlib
import json
import math
import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_load_fuzz import fuzz, load, one_line

import minsd
from minsd.config import MODELS
from minsd.weights.safetensors_file import Tensors
from minsd.weights.single_file import FileHash, original

LEAVES = ("weight", "bias")
ATTENTION = [f"{p}.{leaf}" for p in ("norm", "proj_in", "proj_out") for leaf in LEAVES] + [
    f"transformer_blocks.0.{p}"
    for p in (
        *(f"attn{n}.to_{x}.weight" for n in (1, 2) for x in "qkv"),
        *(f"attn{n}.to_out.0.{leaf}" for n in (1, 2) for leaf in LEAVES),
        *(f"norm{n}.{leaf}" for n in (1, 2, 3) for leaf in LEAVES),
        *(f"ff.net.{m}.{leaf}" for m in ("0.proj", "2") for leaf in LEAVES),
    )
]
RESNET = [
    f"{p}.{leaf}"
    for leaf in LEAVES
    for p in ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
]


def deep(depth):
    """The names inside an attention layer with `depth` transformer blocks."""
    more = [name for name in ATTENTION if name.startswith("transformer_blocks.0.")]
    return ATTENTION + [name.replace(".0.", f".{i}.", 1) for i in range(1, depth) for name in more]


def original_unet_names(cross=(True, True, True, False), layers=2, depths=(1, 1, 1, 1), xl=False):
    """Names in the order in which the original's constructor makes the layers."""
    blocks = {
        "input_blocks.0.0": LEAVES,
        "time_embed.0": LEAVES,
        "time_embed.2": LEAVES,
        "out.0": LEAVES,
        "out.2": LEAVES,
        "middle_block.0": RESNET,
        "middle_block.1": deep(depths[-1]),
        "middle_block.2": RESNET,
    }
    if xl:
        blocks |= {"label_emb.0.0": LEAVES, "label_emb.0.2": LEAVES}
    i = 1
    for level, on in enumerate(cross):
        for _ in range(layers):
            blocks[f"input_blocks.{i}.0"] = RESNET
            if on:
                blocks[f"input_blocks.{i}.1"] = deep(depths[level])
            i += 1
        if level < len(cross) - 1:
            blocks[f"input_blocks.{i}.0.op"] = LEAVES
            i += 1
    i = 0
    for level, on in reversed(list(enumerate(cross))):
        for layer in range(layers + 1):
            blocks[f"output_blocks.{i}.0"] = RESNET
            if on:
                blocks[f"output_blocks.{i}.1"] = deep(depths[level])
            if level and layer == layers:
                blocks[f"output_blocks.{i}.{1 + on}.conv"] = LEAVES
            i += 1
    return [f"model.diffusion_model.{block}.{leaf}" for block, leaves in blocks.items() for leaf in leaves]


def original_vae_names(levels=4, layers=2):
    resnet = [f"{p}.{leaf}" for p in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut") for leaf in LEAVES]
    attention = [f"{p}.{leaf}" for p in ("norm", "q", "k", "v", "proj_out") for leaf in LEAVES]
    names = [f"{p}.{leaf}" for p in ("quant_conv", "post_quant_conv") for leaf in LEAVES]
    for half, way, n, sample in (
        ("encoder", "down", layers, "downsample"),
        ("decoder", "up", layers + 1, "upsample"),
    ):
        names += [f"{half}.{p}.{leaf}" for p in ("conv_in", "norm_out", "conv_out") for leaf in LEAVES]
        names += [
            f"{half}.mid.{p}"
            for p in (
                *(f"block_{i}.{r}" for i in (1, 2) for r in resnet),
                *(f"attn_1.{a}" for a in attention),
            )
        ]
        names += [
            f"{half}.{way}.{level}.block.{i}.{r}" for level in range(levels) for i in range(n) for r in resnet
        ]
        names += [f"{half}.{way}.{level}.{sample}.conv.{leaf}" for level in range(levels) for leaf in LEAVES]
    return [f"first_stage_model.{name}" for name in names]


def by_diffusers(names, convert):
    """diffusers' name -> the original's, by diffusers' converter. Each tensor holds its name's index."""
    return {
        new: names[int(value)]
        for new, value in convert({name: torch.tensor([float(i)]) for i, name in enumerate(names)}).items()
    }


def as_original(parts, text, layers=2, **unet):
    """State dicts of diffusers' UNet and VAE, and of transformers' CLIP -> one original state dict.

    `layers`: residual blocks per level, of both networks; `unet`: further arguments of
    `original_unet_names`.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    vae_kinds = {"down_block_types": [0] * 4, "up_block_types": [0] * 4, "layers_per_block": layers}
    kinds = vae_kinds | ({"addition_embed_type": "text_time"} if unet.get("xl") else {})
    whole = {}
    for part, names, convert in (
        ("unet", original_unet_names(layers=layers, **unet), lambda c: convert_ldm_unet_checkpoint(c, kinds)),
        ("vae", original_vae_names(layers=layers), lambda c: convert_ldm_vae_checkpoint(c, vae_kinds)),
    ):
        table = by_diffusers(names, convert)
        assert parts[part].keys() <= table.keys()
        for new, tensor in parts[part].items():
            # The original's attention in the VAE is made of 1x1 convolutions.
            conv = part == "vae" and ".attentions." in new and tensor.ndim == 2
            whole[table[new]] = tensor[:, :, None, None] if conv else tensor
    return {name: tensor.contiguous() for name, tensor in (whole | text).items()}


def as_open_clip(state, prefix="cond_stage_model.model."):
    """transformers' names -> OpenCLIP's: q, k and v in one tensor, the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    new = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T
        if "text_projection.weight" in state
        else torch.eye(state["final_layer_norm.bias"].shape[0]),
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))):
        theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in LEAVES:
            new[f"{ours}.attn.in_proj_{leaf}"] = torch.cat(
                [state[f"{theirs}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            )
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                new[f"{ours}.{b}.{leaf}"] = state[f"{theirs}.{a}.{leaf}"]
    return {prefix + name: tensor.contiguous() for name, tensor in new.items()}


def as_original_xl(unet, vae, text, text_2, depths=(1, 2, 10), layers=2):
    """State dicts of diffusers' and transformers' networks -> one state dict in the original layout."""
    clip = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in text.items()
    }
    texts = clip | as_open_clip(text_2, "conditioner.embedders.1.model.")
    cross = (False, True, True)
    parts = {"unet": unet, "vae": vae}
    return as_original(parts, texts, layers=layers, cross=cross, depths=depths, xl=True)


def pipeline_classes(sd2, tokenizer, row=None):
    """diffusers' networks in the architecture of SD1 or SD2: narrow, or of the full size of a `row`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, hidden, vocab = (64, 128, 128, 128), 128, tokenizer and len(tokenizer)
    if row:
        width, hidden, vocab = row.unet.block_out_channels, row.text.hidden_size, row.text.vocab_size
    unet = UNet2DConditionModel(
        sample_size=row.unet.sample_size if row else 8,
        block_out_channels=width,
        cross_attention_dim=hidden,
        attention_head_dim=[w // 64 for w in width] if sd2 else 8,
        use_linear_projection=sd2,
        upcast_attention=sd2,
    )
    vae = AutoencoderKL(
        block_out_channels=row.vae.block_out_channels if row else (32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_attention_heads=hidden // 64,
            num_hidden_layers=24 if sd2 else row.text.num_layers if row else 2,
            hidden_act="gelu" if sd2 else "quick_gelu",
            eos_token_id=vocab - 1,
        )
    )
    return unet, vae, text


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def twins(request, tmp_path_factory, shapes_folder):
    """The same random weights as a folder and as a file -> (folder, file, whole text encoder, is SD2)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sd2, where = request.param == "sd2", tmp_path_factory.mktemp(request.param)
    tokenizer = CLIPTokenizer.from_pretrained(shapes_folder / "tokenizer")
    torch.manual_seed(0)
    unet, vae, whole_text = pipeline_classes(sd2, tokenizer)
    for p in whole_text.parameters():  # CLIP initialises biases with zeros, which would hide a swap
        p.data += 0.02 * torch.randn_like(p)
    text = whole_text
    if sd2:
        tokenizer.pad_token = "!"
        text = CLIPTextModel(
            CLIPTextConfig.from_dict(whole_text.config.to_dict() | {"num_hidden_layers": 23})
        )
        text.load_state_dict({k: v for k, v in whole_text.state_dict().items() if ".layers.23." not in k})
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if sd2 else "epsilon",
    )
    folder, file = where / "folder", where / "one.safetensors"
    StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    state = whole_text.state_dict()
    if sd2:
        text_state = as_open_clip(state)
    else:
        text_state = {
            f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
            for k, v in state.items()
        }
        positions = torch.arange(77.0)[None]
        text_state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    left = {
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.diffusion_modelout2bias": torch.zeros(4),
        "model_ema.decay": torch.zeros(1),
    }
    save_file(as_original({"unet": unet.state_dict(), "vae": vae.state_dict()}, text_state) | left, file)
    return folder, file, whole_text, sd2


@pytest.fixture
def tokenizer(shapes_folder):
    return shapes_folder / "tokenizer"


def rewrite(file, to, change):
    save_file(change(load_file(file)), to)
    return to


def refused(*args, **more):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        minsd.load(*map(str, args), device="cpu", **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_and_a_folder_are_the_same_model(twins, tokenizer):
    folder, file, _, sd2 = twins
    one, many = minsd.load(str(file), "cpu", tokenizer=tokenizer), minsd.load(str(folder), "cpu")
    for a, b in ((one.unet, many.unet), (one.vae, many.vae), (one.text.model, many.text.model)):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (
        one.unet.config.num_heads == many.unet.config.num_heads
        and one.text.pad_token_id == many.text.pad_token_id
    )
    how = dict(seeds=[3], steps=3, height=64, width=64)
    picture, expected = one("a red circle", **how)[0], many("a red circle", **how)[0]
    assert picture.tobytes() == expected.tobytes() and len(set(picture.tobytes())) > 50
    assert one.name == "one" and len(one.notes) == sd2


def test_fp8_files_are_cast_and_leftovers_of_the_projection_ignored(twins, tmp_path, tokenizer):
    _, file, _, sd2 = twins

    def fp8(tensors):
        small = {name: p.to(torch.float8_e4m3fn) if p.ndim > 1 else p for name, p in tensors.items()}
        left = {} if sd2 else {"cond_stage_model.transformer.text_projection.weight": torch.zeros(2, 2)}
        return small | left

    sd = minsd.load(str(rewrite(file, tmp_path / "fp8.safetensors", fp8)), "cpu", tokenizer=tokenizer)
    exact = minsd.load(str(file), "cpu", tokenizer=tokenizer)
    ours, theirs = (dict(each.unet.named_parameters()) for each in (sd, exact))
    for name, p in theirs.items():
        assert torch.equal(ours[name], p.to(torch.float8_e4m3fn).float() if p.ndim > 1 else p), name
    scales = {"model.diffusion_model.out.2.scale_weight": torch.ones(())}
    scaled = rewrite(file, tmp_path / "scaled.safetensors", lambda tensors: tensors | scales)
    assert "a scale for each layer" in refused(scaled, tokenizer=tokenizer)


def test_sd2_takes_the_penultimate_layer(twins, tokenizer):
    _, file, whole_text, sd2 = twins
    sd = minsd.load(str(file), "cpu", tokenizer=tokenizer)
    prompt = "a red circle and a blue square"
    ids = sd.text.ids(prompt)
    ids += [0 if sd2 else ids[-1]] * (77 - len(ids))
    with torch.no_grad():
        out = whole_text(torch.tensor([ids]), output_hidden_states=True)
        norm = getattr(whole_text, "text_model", whole_text).final_layer_norm
        expected = norm(out.hidden_states[-2]) if sd2 else out.last_hidden_state
    torch.testing.assert_close(sd.encode_prompt(prompt), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("twins", ["sd2"], indirect=True)
def test_files_made_from_folders_have_23_layers(twins, tmp_path, tokenizer):
    file = twins[1]

    def change(state):
        return {
            k: v
            for k, v in state.items()
            if ".resblocks.23." not in k and "text_projection" not in k and "logit_scale" not in k
        }

    small = rewrite(file, tmp_path / "23.safetensors", change)
    a, b = (minsd.load(str(f), "cpu", tokenizer=tokenizer).encode_prompt("a star") for f in (file, small))
    assert torch.equal(a, b)


def test_prediction_type_and_the_note(twins, tokenizer):
    _, file, _, sd2 = twins
    sd = minsd.load(str(file), "cpu", tokenizer=tokenizer)
    assert sd.config.schedule.prediction_type == ("v_prediction" if sd2 else "epsilon")
    if sd2:
        assert (
            "--prediction-type epsilon" in sd.notes[0]
            and sd.config.size == 768
            and sd.config.unet.upcast_attention
        )
    sd = minsd.load(str(file), "cpu", tokenizer=tokenizer, prediction_type="epsilon")
    assert sd.config.schedule.prediction_type == "epsilon" and sd.notes == [] and sd.config.size == 512
    assert "prediction_type" in refused(file, prediction_type="sample")


def test_half_precision_files_and_casts(twins, tmp_path, tokenizer):
    _, file, _, _ = twins
    half = rewrite(file, tmp_path / "half.safetensors", lambda state: {k: v.half() for k, v in state.items()})
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    expected = load_file(file)[name].half()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        sd = minsd.load(str(half), "cpu", dtype, tokenizer=tokenizer)
        assert {p.dtype for m in (sd.unet, sd.vae, sd.text.model) for p in m.parameters()} == {dtype}
        assert torch.equal(
            sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight, expected.to(dtype)
        )


@pytest.mark.parametrize(
    "layout", ["original", "original, bare", "diffusers", "folder", "model folder", "checkpoint"]
)
def test_another_vae(twins, tmp_path, tokenizer, layout):
    folder, file, _, _ = twins
    other = {k: 0.5 * v for k, v in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items()}
    halved = {k: 0.5 * v if k.startswith("first_stage_model.") else v for k, v in load_file(file).items()}
    path = tmp_path / "vae.safetensors"
    if layout == "checkpoint":
        save_file(halved, path)
    elif layout.startswith("original"):
        bare = layout.endswith("bare")
        vae = {
            k.removeprefix("first_stage_model.") if bare else k: v
            for k, v in halved.items()
            if k.startswith("first_stage_model.")
        }
        save_file(vae | ({"loss.logvar": torch.zeros(())} if bare else {}), path)
    elif layout == "diffusers":
        save_file(other, path)
    else:
        path = tmp_path / "vae"
        path.mkdir()
        save_file(other, path / "diffusion_pytorch_model.safetensors")
        config = json.loads((folder / "vae" / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
        path = tmp_path if layout == "model folder" else path
    for model, more in ((file, {"tokenizer": tokenizer}), (folder, {})):
        sd = minsd.load(str(model), "cpu", vae=path, **more)
        state = sd.vae.state_dict()
        assert all(
            torch.equal(state[name], value.reshape(state[name].shape)) for name, value in other.items()
        )
        assert (
            sd.config.vae.scaling_factor
            == (0.5 if layout.endswith("folder") else 0.18215)
            == sd.vae.config.scaling_factor
        )


def test_a_file_without_a_vae_takes_another(twins, tmp_path, tokenizer):
    folder, file, _, _ = twins
    path = tmp_path / "no.safetensors"
    rewrite(
        file, path, lambda state: {k: v for k, v in state.items() if not k.startswith("first_stage_model.")}
    )
    assert "--vae" in refused(path, tokenizer=tokenizer)
    assert minsd.load(str(path), "cpu", tokenizer=tokenizer, vae=folder / "vae").vae
    for bad, says in ((tmp_path / "nosuch", "no VAE"), (path, "not a VAE"), (tmp_path / "x.ckpt", "pickle")):
        assert says in refused(file, tokenizer=tokenizer, vae=bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)},
            "inpainting",
        ),
        (lambda s: {"conditioner.embedders.0.x": torch.zeros(1)}, "SDXL"),
        (lambda s: s | {"control_model.zero_convs.0.0.weight": torch.zeros(1)}, "ControlNet"),
        (lambda s: {k: v for k, v in s.items() if "cond_stage" not in k}, "no text encoder"),
        (lambda s: {k: v for k, v in s.items() if "input_blocks.1.0.in_layers.0" not in k}, "2 missing"),
        (lambda s: s | {"model.diffusion_model.input_blocks.1.1.extra": torch.zeros(1)}, "unexpected"),
        (lambda s: s | {"model.diffusion_model.input_blocks.99.0.weight": torch.zeros(1)}, "not whole"),
        (lambda s: s | {"model.diffusion_model.out.2.bias": torch.zeros(5)}, "mis-shaped"),
        (lambda s: s | {"model.diffusion_model.out.1.bias": torch.zeros(5)}, "two names"),
        (
            lambda s: {k: v for k, v in s.items() if "cond_stage" not in k} | as_tiny_clip(64),
            "different models",
        ),
        (lambda s: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "Flux"),
        (lambda s: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, "SD3"),
        (lambda s: {"lora_unet_x.lora_up.weight": torch.zeros(1)}, "LoRA"),
        (lambda s: {k: v for k, v in s.items() if k.startswith("first_stage_model.")}, "VAE alone"),
        (lambda s: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "UNet alone"),
        (lambda s: {"emb_params": torch.zeros(1, 768)}, "textual-inversion"),
        (lambda s: {"whatever": torch.zeros(1)}, "no model that minsd knows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("twins", ["sd1"], indirect=True)
def test_other_kinds_of_files_are_named(twins, tmp_path, tokenizer, change, says):
    assert says in refused(rewrite(twins[1], tmp_path / "bad.safetensors", change), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def content(twins):
    """(header, tensors' bytes) of the whole checkpoint."""
    whole = twins[1].read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:length]), whole[length:]


@fuzz(10)
@given(draw=st.randoms(use_true_random=False))
def test_entries_of_a_checkpoint_changed(content, tmp_path_factory, shapes_folder, draw):
    """Changed names, shapes and dtypes in a file that stays sound: it loads, or is refused in one line."""
    header, data = content
    header = {name: dict(entry) for name, entry in header.items()}
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(header.keys() - {"__metadata__"}))
        entry, other = header[name], draw.choice(sorted(header))
        shape, n = entry["shape"], draw.randint(0, 70)
        what = draw.choice(["shape", "dtype", "name", "digits", "swap"])
        if what == "shape":
            entry["shape"] = draw.choice(
                [
                    shape[::-1],
                    [1, *shape],
                    [*shape, 1, 1],
                    [math.prod(shape)],
                    [*shape[:1], math.prod(shape[1:])],
                ]
            )
        elif what == "dtype":
            entry["dtype"] = draw.choice(["I32", "F32"])
        elif what == "name":
            new = [
                name + ".weight",
                "model.diffusion_model." + name,
                name.replace("_model.", ".", 1),
                f"x{n}",
            ]
            header[draw.choice(new)] = header.pop(name)
        elif what == "digits":
            header[re.sub(r"\d+", str(n), name, count=draw.randint(1, 3))] = header.pop(name)
        elif other != "__metadata__":
            header[name], header[other] = header[other], header[name]
    text, path = json.dumps(header).encode(), tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    one_line(lambda: load(path, tokenizer=shapes_folder / "tokenizer"))


def as_tiny_clip(hidden):
    prefix = "cond_stage_model.transformer.text_model."
    return {
        f"{prefix}embeddings.token_embedding.weight": torch.zeros(635, hidden),
        f"{prefix}embeddings.position_embedding.weight": torch.zeros(77, hidden),
        f"{prefix}encoder.layers.0.mlp.fc1.weight": torch.zeros(4 * hidden, hidden),
    }


def test_unknown_tensors_are_left_out_with_a_note(twins, tmp_path, tokenizer):
    path = rewrite(
        twins[1], tmp_path / "more.safetensors", lambda state: state | {"recipe.weights": torch.zeros(2)}
    )
    assert "recipe.weights" in minsd.load(str(path), "cpu", tokenizer=tokenizer).notes[-1]


def test_tokenizers_are_checked(twins, tmp_path):
    _, file, _, _ = twins
    assert "vocab.json and merges.txt" in refused(file, tokenizer=tmp_path / "nosuch")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "tokenizer" in refused(file, tokenizer=empty)
    big = tmp_path / "big"  # more tokens than the text encoder knows would be an index error in a run
    big.mkdir()
    (big / "vocab.json").write_text(
        json.dumps({f"t{i}": i for i in range(900)} | {"<|startoftext|>": 900, "<|endoftext|>": 901})
    )
    (big / "merges.txt").write_text("#version: 0.2\n")
    assert "another model's tokenizer" in refused(file, tokenizer=big)


def sparse_file(path, state, dtype="F16"):
    """A safetensors file with these shapes; its zeros take no space on the disk."""
    header, position = {}, 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + 2 * tensor.numel()],
        }
        position += 2 * tensor.numel()
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + position)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size_files_are_the_known_families(name, tmp_path):
    """All names and shapes at full size, against diffusers' and transformers' classes; no data is read."""
    row, sd2 = MODELS[name], name == "sd21"
    with torch.device("meta"):
        unet, vae, text = pipeline_classes(sd2, None, row)
    text_state = (
        as_open_clip(text.state_dict())
        if sd2
        else {f"cond_stage_model.transformer.{k}": v for k, v in text.state_dict().items()}
    )
    sparse_file(
        tmp_path / "full.safetensors",
        as_original({"unet": unet.state_dict(), "vae": vae.state_dict()}, text_state),
    )
    parts = original(Tensors(tmp_path / "full.safetensors", "", torch.float16), None, {})
    config = parts.config
    assert (config.unet, config.vae, config.text, config.schedule) == (
        row.unet,
        row.vae,
        row.text,
        row.schedule,
    )
    for part, module in zip((parts.unet, parts.vae, parts.text), (unet, vae, text)):
        shapes = {
            k.removeprefix("text_model."): tuple(v.shape)
            for k, v in module.state_dict().items()
            if ".layers.23." not in k
        }
        found = {k: part.shape(k) for k in part}
        assert found.keys() == shapes.keys()
        assert all(found[k] in (shapes[k], (*shapes[k], 1, 1)) for k in shapes)


def test_the_hash_is_stored_by_path_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, store = tmp_path / "model.safetensors", tmp_path / "cache" / "minsd" / "sha256.json"

    def digest():
        thread = FileHash(file)
        thread.run()
        return thread.digest

    file.write_bytes(b"one")
    assert digest() == hashlib.sha256(b"one").hexdigest()[:10] and store.is_file()
    known = json.loads(store.read_text())
    assert list(known.values()) == [digest()]
    store.write_text(json.dumps(dict.fromkeys(known, "0123456789")))
    assert digest() == "0123456789"  # looked up, not computed
    file.write_bytes(b"other")
    assert digest() == hashlib.sha256(b"other").hexdigest()[:10] and len(json.loads(store.read_text())) == 1
    for junk in ("[1]", "{", '{"a": 1}', "null"):
        store.write_text(junk)
        assert digest() == hashlib.sha256(b"other").hexdigest()[:10]
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert digest() == hashlib.sha256(b"other").hexdigest()[:10]


def test_a_loaded_file_knows_its_hash(twins, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sd = minsd.load(str(twins[1]), "cpu", tokenizer=tokenizer)
    assert sd.model_hash == hashlib.sha256(twins[1].read_bytes()).hexdigest()[:10]
