"""Adapters against diffusers and peft loading the same files; merged, per row and undone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_single_file import by_diffusers, original_unet_names

import minsd
from minsd.adapters import Adapters
from minsd.noise.initial import noise
from minsd.samplers.random import generators, randn_like
from minsd.weights import lora

UNET_LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)


def add_random_adapter(pipe, alpha):
    """peft's own adapters on both networks, their upper halves random instead of zero."""
    from peft import LoraConfig

    torch.manual_seed(3)
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=UNET_LAYERS, rank_pattern={"conv1": 2})
    )
    pipe.text_encoder.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=TEXT_LAYERS))
    for module in (pipe.unet, pipe.text_encoder):
        for name, p in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)


@pytest.fixture(scope="session")
def files(small_folder, tmp_path_factory):
    """One file per format, each written with the libraries' own savers or names -> {format: path}."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    out = tmp_path_factory.mktemp("loras")
    pipe = pipeline(small_folder)
    add_random_adapter(pipe, alpha=6)
    unet, text = get_peft_model_state_dict(pipe.unet), get_peft_model_state_dict(pipe.text_encoder)
    paths = {}

    meta = {
        "unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config["default"].to_dict(),
    }
    StableDiffusionPipeline.save_lora_weights(
        out / "peft", unet_lora_layers=unet, text_encoder_lora_layers=text, **meta
    )
    StableDiffusionPipeline.save_lora_weights(
        out / "plain", unet_lora_layers=unet, text_encoder_lora_layers=text
    )
    paths |= {"peft": out / "peft", "plain": out / "plain" / "pytorch_lora_weights.safetensors"}

    prefixed = {f"unet.{k}": v for k, v in unet.items()} | {f"text_encoder.{k}": v for k, v in text.items()}
    kohya = {}
    for key, value in convert_state_dict_to_kohya(dict(prefixed)).items():
        new = key.replace("lora_te1_", "lora_te_")
        kohya[new] = torch.tensor(5.0) if new.endswith(".alpha") else value.contiguous()
    paths["kohya"] = out / "kohya.safetensors"
    save_file(kohya, paths["kohya"])

    only = {k: v for k, v in unet.items() if "attn" in k}  # the oldest form knew attention alone
    old = {}
    for key, value in only.items():
        key = (
            key.replace("to_out.0", "to_out")
            .replace("attn1.", "attn1.processor.")
            .replace("attn2.", "attn2.processor.")
        )
        old["unet." + key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")] = (
            value.contiguous()
        )
    old_text = convert_state_dict_to_diffusers({k: v for k, v in text.items() if "self_attn" in k})
    old |= {f"text_encoder.{k}": v.contiguous() for k, v in old_text.items()}
    paths["old"] = out / "old.safetensors"
    save_file(old, paths["old"])
    return paths


@pytest.mark.parametrize("form", ["peft", "plain", "kohya", "old"])
@torch.no_grad()
def test_parity_with_diffusers_loading_the_same_file(files, small_folder, form):
    sd, pipe = minsd.load(str(small_folder), "cpu"), pipeline(small_folder)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(400), torch.randn(2, 77, 32)
    before = pipe.unet(*inputs).sample
    pipe.load_lora_weights(str(files[form]))
    pipe.set_adapters(pipe.get_list_adapters()["unet"], 0.7)
    kept = lora.merge([(lora.read(files[form], sd), 0.7)])
    theirs = pipe.unet(*inputs).sample
    assert relative(before, theirs) > 1e-2
    assert relative(sd.unet(inputs[0], 400, inputs[2]), theirs) <= 1e-5
    ids = torch.tensor([[1, 2, 3, 40, 50, 634] + [634] * 71])
    assert relative(sd.text.model(ids).last_hidden_state, pipe.text_encoder(ids).last_hidden_state) <= 1e-5
    lora.unmerge(kept)
    assert relative(sd.unet(inputs[0], 400, inputs[2]), before) <= 1e-5


@torch.no_grad()
def test_an_lcm_adapter_with_the_lcm_sampler_draws_what_diffusers_draws(
    files, small_folder, tmp_path, monkeypatch
):
    """As LCM-LoRA is made: kohya's names, every layer of the UNet, none of the text encoder."""
    from diffusers import LCMScheduler

    tensors = {name: p for name, p in load_file(files["kohya"]).items() if name.startswith("lora_unet_")}
    save_file(tensors, tmp_path / "lcm.safetensors")
    start, twins = noise([0], (4, 16, 16)), generators([0], skip=(4, 16, 16))
    pipe = pipeline(small_folder)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path / "lcm.safetensors")
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, **k: randn_like(twins, start)
    )
    expected = pipe(
        "a red circle", latents=start, num_inference_steps=4, guidance_scale=1.5, output_type="latent"
    ).images
    sd = minsd.load(str(small_folder), "cpu")
    how = {"seeds": [0], "steps": 4, "sampler": "lcm", "guidance_scale": 1.5}
    without = sd.sample("a red circle", start, **how)
    lora.merge([(lora.read(tmp_path / "lcm.safetensors", sd), 1.0)])
    assert relative(sd.sample("a red circle", start, **how), expected) <= 1e-4
    assert relative(without, expected) > 1e-2


@torch.no_grad()
def test_peft_folder_takes_its_alpha_from_the_configuration(small_folder, tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_pretrained(small_folder / "unet")
    config = LoraConfig(
        r=4, lora_alpha=9, use_rslora=True, target_modules=["to_q", "conv2"], init_lora_weights=False
    )
    adapted = get_peft_model(unet, config)
    adapted.save_pretrained(tmp_path)
    sd = minsd.load(str(small_folder), "cpu")
    inputs = torch.randn(1, 4, 16, 16), torch.tensor(400), torch.randn(1, 77, 32)
    lora.merge([(lora.read(tmp_path, sd), 1.0)])
    assert relative(sd.unet(inputs[0], 400, inputs[2]), adapted(*inputs).sample) <= 1e-5


@torch.no_grad()
def test_unmerge_restores_every_bit(files, small_folder):
    for dtype in (torch.float32, torch.float16):
        sd = minsd.load(str(small_folder), "cpu", dtype)
        both = [(lora.read(files["kohya"], sd), 0.8), (lora.read(files["plain"], sd), -0.4)]
        modules = (sd.unet, sd.text.model)
        before = [p.clone() for m in modules for p in m.parameters()]
        fused = [m.fused.clone() for m in sd.unet.modules() if getattr(m, "fused", None) is not None]
        kept = lora.merge(both)
        assert (
            sum(not torch.equal(a, b) for a, b in zip(before, (p for m in modules for p in m.parameters())))
            > 80
        )
        with pytest.raises(ValueError, match="merged into this model already"):
            lora.merge(both[:1])
        lora.unmerge(kept)
        assert all(torch.equal(a, b) for a, b in zip(before, (p for m in modules for p in m.parameters())))
        assert all(
            torch.equal(a, m.fused)
            for a, m in zip(fused, (m for m in sd.unet.modules() if getattr(m, "fused", None) is not None))
        )


@torch.no_grad()
def test_per_row_everywhere_is_merged_and_each_row_has_its_own(files, small_folder):
    sd = minsd.load(str(small_folder), "cpu", torch.float64)
    a, b = lora.read(files["kohya"], sd), lora.read(files["plain"], sd)
    torch.manual_seed(5)
    x, context = torch.randn(4, 4, 16, 16).double(), torch.randn(4, 77, 32).double()
    prompts = ["a red circle"] * 4

    def run():
        text_kv = sd.unet.text_kv(context)  # as predictors use it
        return sd.unet(x, 400, context), sd.unet(x, 400, text_kv), sd.encode_prompt(prompts)

    expected = {}
    for pair in ((0.0, 0.0), (0.9, 0.0), (0.5, -0.7), (0.0, 1.2)):
        kept = lora.merge([(a, pair[0]), (b, pair[1])])
        expected[pair] = run()
        lora.unmerge(kept)
    pairs = list(expected)
    with lora.per_row([(a, [p[0] for p in pairs]), (b, [p[1] for p in pairs])]):
        rows = run()
    with lora.per_row([(a, [0.9])]):
        everywhere = run()
    order = [2, 0, 0, 3, 1]
    adapters = Adapters()
    with lora.per_row([(a, [p[0] for p in pairs]), (b, [p[1] for p in pairs])], adapters):
        with adapters.rows(order):
            chosen = sd.unet(x[order], 400, context[order])
            with pytest.raises(ValueError, match="5 rows were given, and the batch has 4"):
                sd.unet(x, 400, context)
        outside = sd.unet(x, 400, context)
    assert relative(outside, expected[0.0, 0.0][0]) < 1e-12
    for k, row in zip(order, chosen):
        assert relative(row, expected[pairs[k]][0][k]) < 1e-12
    for which in range(3):
        for row, pair in enumerate(pairs):
            assert relative(rows[which][row], expected[pair][which][row]) < 1e-12
        assert relative(everywhere[which], expected[0.9, 0.0][which]) < 1e-12
    assert relative(expected[0.9, 0.0][0], expected[0.0, 0.0][0]) > 1e-2
    assert torch.equal(run()[0], expected[0.0, 0.0][0])  # nothing is left behind
    layers = [m for m in sd.unet.modules() if isinstance(m, minsd.attention.Attention)]
    assert all((m.fused is None) == m.is_cross for m in layers)
    with lora.per_row([(a, [1.0, 0.0])]), pytest.raises(ValueError, match="2 scales .* 1 rows"):
        sd.unet(x[:1], 400, context[:1])


def test_the_original_code_s_names_are_read_too(small, tmp_path):
    """As ComfyUI writes them, with dots, and with underlines for dots; for the text encoder ComfyUI's."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = original_unet_names(cross=(True, True, False), layers=1, depths=(1, 1, 1))
    kinds = {"down_block_types": [0] * 3, "up_block_types": [0] * 3, "layers_per_block": 1}
    table = by_diffusers(names, lambda checkpoint: convert_ldm_unet_checkpoint(checkpoint, kinds))
    table = {new.removesuffix(".weight"): old.removesuffix(".weight") for new, old in table.items()
             if new.endswith(".weight")}  # fmt: skip
    ours = dict(small.unet.named_modules())
    layers = {
        new: old.removeprefix("model.diffusion_model.")
        for new, old in table.items()
        if ours.get(new) is not None
    }
    assert len(layers) > 100
    for form in ("diffusion_model.{}", "lora_unet_{}"):
        file = {
            f"{form.format(old if '.{}' in form else old.replace('.', '_'))}.diff": torch.zeros_like(
                small.unet.get_submodule(new).weight
            )
            for new, old in layers.items()
        }
        save_file(file, tmp_path / "x.safetensors")
        parts = lora.read(tmp_path / "x.safetensors", small).parts
        by_name = {part.name: part.module for part in parts}
        assert by_name == {f"unet.{new}": small.unet.get_submodule(new) for new in layers}
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1"
    save_file({f"{name}.diff_b": torch.zeros(64)}, tmp_path / "t.safetensors")
    (part,) = lora.read(tmp_path / "t.safetensors", small).parts
    assert part.name == "text_encoder.encoder.layers.1.mlp.fc1"


def edited(files, tmp_path, change, form="kohya"):
    tensors = load_file(files[form])
    change(tensors)
    save_file(tensors, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


def wider(tensors):
    for name in list(tensors):
        if "attn2_to_k.lora_down" in name:
            tensors[name] = torch.zeros(tensors[name].shape[0], 1024)


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"another model: .*attn2.* 1024 -> 32.*this model's layer is 32 -> 32 .*SD2.x 1024"),
        (lambda t: t.clear(), "empty adapter"),
        (lambda t: t.pop(f"{FIRST}.lora_up.weight"), "partial adapter: .* no 'up' half"),
        (
            lambda t: [t.pop(f"{FIRST}.lora_{w}.weight") for w in ("up", "down")],
            "partial adapter: .* no weights",
        ),
        (lambda t: [t.update({n.replace("lora_te_", "lora_te2_"): t.pop(n)}) for n in list(t)], "SDXL"),
        (
            lambda t: [t.clear(), t.update({"emb_params": torch.zeros(2, 768)})],
            "is a textual-inversion embedding",
        ),
        (
            lambda t: [
                t.update({f"lora_unet_input_blocks_1_1_proj_in.lora_{w}.weight": torch.zeros(2, 2)})
                for w in ("up", "down")
            ],
            "another model: .*input_blocks_1_1_proj_in.* 2 -> 2",
        ),
        (lambda t: t.update({"conv_in.weight": torch.zeros(2, 2)}), "no part of a LoRA"),
        (
            lambda t: t.update({f"{FIRST}.lora_down.weight": torch.zeros(4, 32, dtype=torch.int32)}),
            "floating point",
        ),
    ],
    ids=["family", "empty", "half", "alpha alone", "sdxl", "embedding", "original", "a model", "integers"],
)
def test_one_clear_line_for_what_does_not_fit(files, small, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        lora.read(edited(files, tmp_path, change), small)
    assert "\n" not in str(error.value)


def test_what_is_not_there(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no LoRA"):
        lora.read(tmp_path / "none.safetensors", small)
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        lora.read(tmp_path, small)
    with pytest.raises(ValueError, match="pickle"):
        lora.read(tmp_path / "x.ckpt", small)
    with pytest.raises(ValueError, match="must be a number"):
        lora.merge([(lora.LoRA("x", ()), float("nan"))])
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    save_file(
        {"base_model.model.conv_in.lora_A.weight": torch.zeros(2, 36)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="configuration cannot be read"):
        lora.read(tmp_path, small)
