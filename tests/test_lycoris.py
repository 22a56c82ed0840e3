"""Adapters other than plain LoRA: against peft, against their published formulas in float64, per row
against merged, and files that do not fit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import minsd
from minsd.weights import lora

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 32 -> 64, without a bias
CONV = "mid_block.resnets.0.conv1"  # 3x3, 64 -> 64
NORM = "mid_block.resnets.0.norm1"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
@torch.no_grad()
def test_parity_with_peft_loading_the_same_folder(kind, small_folder, tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    torch.manual_seed(4)
    layers = ["to_q", "to_k", "conv2", "proj_in"]
    if kind == "dora":
        config = LoraConfig(r=4, lora_alpha=6, target_modules=layers, use_dora=True, init_lora_weights=False)
    else:
        config = {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](
            r=2, alpha=3, target_modules=layers, init_weights=False
        )
    adapted = get_peft_model(UNet2DConditionModel.from_pretrained(small_folder / "unet"), config)
    adapted.save_pretrained(tmp_path)
    sd = minsd.load(str(small_folder), "cpu")
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    before = sd.unet(x, 400, context)
    kept = lora.merge([(lora.read(tmp_path, sd), 1.0)])
    theirs = adapted(x, torch.tensor(400), context).sample
    assert relative(sd.unet(x, 400, context), theirs) <= 1e-5 < 1e-2 < relative(before, theirs)
    lora.unmerge(kept)
    assert torch.equal(sd.unet(x, 400, context), before)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def formulas(linear, conv):
    """Kind -> (layer, tensors, the weight that they should make), by the formulas of the papers."""
    torch.manual_seed(1)
    a = [normal(64, 2), normal(2, 32), normal(64, 2), normal(2, 32)]
    loha = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), a))
    yield "loha", LINEAR, loha | {"alpha": torch.tensor(3.0)}, linear + 1.5 * (a[0] @ a[1]) * (a[2] @ a[3])
    w1, w2_a, w2_b = normal(8, 4), normal(8, 2), normal(2, 8)
    kron = torch.from_numpy(np.kron(w1.numpy(), (w2_a @ w2_b).numpy()))
    lokr = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(1.0)}
    yield "lokr", LINEAR, lokr, linear + 0.5 * kron
    w2 = normal(8, 16, 3, 3)
    w1 = normal(8, 4)
    blocks = [torch.cat([w1[i, j] * w2 for j in range(4)], 1) for i in range(8)]
    yield (
        "lokr conv",
        CONV,
        {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)},
        conv + torch.cat(blocks),
    )
    up, mid, down = normal(64, 2, 1, 1), normal(2, 2, 3, 3), normal(2, 64, 1, 1)
    chain = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    tucker = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    yield "tucker", CONV, tucker, conv + chain
    up, down, length = normal(64, 2), normal(2, 32), normal(1, 32).abs()
    new = linear + up @ down
    dora = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": length}
    yield (
        "dora by column",
        LINEAR,
        dora,
        torch.stack([length[0, j] * new[:, j] / new[:, j].norm() for j in range(32)], 1),
    )
    rows = normal(64, 1, 1, 1).abs()
    diff = normal(64, 64, 3, 3)
    new = conv + diff
    yield (
        "dora of a difference",
        CONV,
        {"diff": diff, "dora_scale": rows},
        torch.stack([rows[i, 0, 0, 0] * new[i] / new[i].norm() for i in range(64)]),
    )
    scale = normal(32)
    on = torch.tensor(1)
    yield "ia3 in", LINEAR, {"weight": scale, "on_input": on}, linear @ torch.diag(1 + scale)
    scale = normal(1, 64, 1, 1)
    expected = torch.stack([conv[i] * (1 + scale[0, i, 0, 0]) for i in range(64)])
    yield "ia3 out", CONV, {"weight": scale, "on_input": torch.tensor(0)}, expected
    a1, a2, b1, b2 = normal(32, 2), normal(2, 32), normal(64, 2), normal(2, 32)
    glora = {f"{x}.weight": y for x, y in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2))}
    yield "glora", LINEAR, glora | {"alpha": torch.tensor(1.0)}, linear + (linear @ a1 @ a2 + b1 @ b2) / 2


@torch.no_grad()
def test_the_published_formulas(small_folder, tmp_path):
    sd = minsd.load(str(small_folder), "cpu", torch.float64)
    x, context = normal(2, 4, 16, 16), normal(2, 77, 32)
    plain = sd.unet(x, 400, context)
    linear, conv = (sd.unet.get_submodule(name) for name in (LINEAR, CONV))
    assert linear.weight.shape == (64, 32) and conv.weight.shape == (64, 64, 3, 3)
    weights = linear.weight.clone(), conv.weight.clone()
    for kind, layer, tensors, expected in formulas(*weights):
        form = "lora_unet_" + layer.replace(".", "_") if kind != "tucker" else "unet." + layer
        path = tmp_path / f"{kind}.safetensors"
        save_file({f"{form}.{role}": tensor.contiguous() for role, tensor in tensors.items()}, path)
        adapter = lora.read(path, sd)
        kept = lora.merge([(adapter, 1.0)])
        assert relative(sd.unet.get_submodule(layer).weight, expected) < 1e-12, kind
        lora.unmerge(kept)
        kept = lora.merge([(adapter, 0.7)])
        merged = sd.unet(x, 400, context)
        lora.unmerge(kept)
        with lora.per_row([(adapter, [0.7, 0.0])]):
            rows = sd.unet(x, 400, context)
        assert relative(rows[0], merged[0]) < 1e-10 and relative(rows[1], plain[1]) < 1e-12, kind
        assert relative(merged, plain) > 1e-8, kind
    assert torch.equal(linear.weight, weights[0]) and torch.equal(conv.weight, weights[1])


@torch.no_grad()
def test_biases_and_norms(small_folder, tmp_path):
    sd = minsd.load(str(small_folder), "cpu", torch.float64)
    conv, norm = (sd.unet.get_submodule(name) for name in (CONV, NORM))
    before = [p.clone() for p in (conv.bias, norm.weight, norm.bias)]
    changes = normal(3, 64)
    file = {
        f"unet.{CONV}.diff_b": changes[0],
        f"unet.{NORM}.w_norm": changes[1],
        f"unet.{NORM}.b_norm": changes[2],
    }
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, tmp_path / "x.safetensors")
    adapter = lora.read(tmp_path / "x.safetensors", sd)
    kept = lora.merge([(adapter, 0.5)])
    for p, old, change in zip((conv.bias, norm.weight, norm.bias), before, changes):
        torch.testing.assert_close(p, old + 0.5 * change)
    lora.unmerge(kept)
    assert all(map(torch.equal, (conv.bias, norm.weight, norm.bias), before))
    with pytest.raises(ValueError, match="adapter of norms .* acts on the whole image"):
        with lora.per_row([(adapter, [1.0])]):
            pass


ROLES = [
    *(f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"),
    *(
        "hada_t1",
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_b",
        "lokr_t2",
        "dora_scale",
        "diff",
    ),
    *("diff_b", "w_norm", "b_norm", "on_input", "weight", "a1.weight", "b2.weight", "lora_mid.weight"),
    *("lora_up.weight", "lora_down.weight", "alpha", "lora_magnitude_vector"),
]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 32, 64]), max_size=4).map(tuple)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tensors=st.dictionaries(st.sampled_from(ROLES), st.tuples(SHAPES, st.booleans()), min_size=1, max_size=5),
    layer=st.sampled_from([LINEAR, CONV, NORM]),
)
def test_any_file_is_read_or_refused_in_one_line(tensors, layer, small, tmp_path):
    path = tmp_path / "x.safetensors"
    made = {role: torch.ones(shape).to(torch.int32 if whole else torch.float32)
            for role, (shape, whole) in tensors.items()}  # fmt: skip
    save_file({f"unet.{layer}.{role}": tensor for role, tensor in made.items()}, path)
    module = small.unet.get_submodule(layer)
    try:
        adapter = lora.read(path, small)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    for part in adapter.parts:
        assert part.delta().shape == module.weight.shape
        assert part.bias is None or part.bias.shape == module.bias.shape
    assert isinstance(module, nn.Module)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{LINEAR}.hada_w1_a": torch.zeros(64, 2)}, "partial adapter: .* has no 'hada_w1_b'"),
        ({f"{LINEAR}.diff": torch.zeros(64, 1024)}, r"another model: .* diff \(64, 1024\), .*\(64, 32\)"),
        ({f"{LINEAR}.diff_b": torch.zeros(64)}, "another model"),  # there is no bias
        ({f"{CONV}.diff": torch.zeros(64, 64, 3, 3).int()}, "not of floating point"),
        ({"x.y.hada_w1_a": torch.zeros(2, 2)}, "no layer 'x.y'"),
        ({f"{NORM}.lora_{x}.weight": torch.zeros(64, 1) for x in ("up", "down")}, "no layer .*norm1"),
        ({f"{LINEAR}.oft_blocks": torch.zeros(2, 2, 2)}, "an OFT adapter"),
        ({"lora_controlnet": torch.zeros(0)}, "a control-lora"),
    ],
)
def test_what_is_wrong_is_named(tensors, says, small, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=says) as error:
        lora.read(tmp_path / "x.safetensors", small)
    assert "\n" not in str(error.value)
