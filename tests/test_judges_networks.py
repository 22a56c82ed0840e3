"""ImageReward and Mask2Former without weights: names and formulas on random networks, full sizes on
the meta device, layouts' regions."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, interpolate, layer_norm, linear, softmax

from minsd import judges
from minsd.judges import blip, mask2former, objects, pixels

# --- ImageReward ----------------------------------------------------------------------------------

WIDTH, HEADS, TEXT = 32, 2, 24
LAYERS = 2
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))


def published(width, text, layers, text_layers, words, positions, mlp, text_mlp, patches, patch, head):
    """Names and shapes of ImageReward.pt as its authors wrote it."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for k in range(layers):
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        sizes |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
        for name, size in sizes.items():
            shapes[f"blocks.{k}.{name}.weight"] = size
            shapes[f"blocks.{k}.{name}.bias"] = size[:1]
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{k}.{name}.weight"] = shapes[f"blocks.{k}.{name}.bias"] = (width,)
    out = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    shapes = {
        "embeddings.word_embeddings.weight": (words, text),
        "embeddings.position_embeddings.weight": (positions, text),
        "embeddings.LayerNorm.weight": (text,),
        "embeddings.LayerNorm.bias": (text,),
    }
    for k in range(text_layers):
        stem = f"encoder.layer.{k}."
        sizes = {"intermediate.dense": (text_mlp, text), "output.dense": (text, text_mlp)}
        for kind, states in (("attention", text), ("crossattention", width)):
            sizes |= {f"{kind}.self.query": (text, text), f"{kind}.output.dense": (text, text)}
            sizes |= {f"{kind}.self.{name}": (text, states) for name in ("key", "value")}
        for name, size in sizes.items():
            shapes[f"{stem}{name}.weight"] = size
            shapes[f"{stem}{name}.bias"] = size[:1]
        for name in ("attention.output", "crossattention.output", "output"):
            shapes |= {f"{stem}{name}.LayerNorm.{kind}": (text,) for kind in ("weight", "bias")}
    out |= {f"blip.text_encoder.{name}": shape for name, shape in shapes.items()}
    for k, (a, b) in zip((0, 2, 4, 6, 7), zip(head, head[1:])):
        out |= {f"mlp.layers.{k}.weight": (b, a), f"mlp.layers.{k}.bias": (b,)}
    return out


SMALL = published(WIDTH, TEXT, LAYERS, LAYERS, 60, 40, 64, 48, 16, 8, (TEXT, 8, 8, 4, 4, 1))


@pytest.fixture(scope="module")
def held():
    g = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in SMALL.items():
        value = torch.randn(shape, generator=g) * 0.5
        norm = name.endswith("weight") and re.search(r"norm", name, re.I)
        out[name] = value + 1 if norm else value
    return out


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from transformers import BertTokenizer

    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square and star cat ##s".split()
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(pieces))
    return BertTokenizer(str(path), do_lower_case=True)


def small_judge(held, words, **vision):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "image_size": 32, "patch_size": 8}
    text = {
        "hidden_size": TEXT,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    text |= {"vocab_size": 60, "encoder_hidden_size": WIDTH, "max_position_embeddings": 40}
    return blip.ImageReward(
        {"judge": "imagereward"},
        held,
        words,
        "a file",
        vision=blip.vision_config(**(sizes | vision)),
        text=blip.text_config(**text),
    )


def plain_reward(held, seen, ids, mask, eps=1e-6, causal=False):
    """ImageReward's formula in plain torch on the authors' names."""

    def w(name):
        return held[f"{name}.weight"], held[f"{name}.bias"]

    def attend(q, k, v, bias=None):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if bias is None else scores + bias
        return (softmax(scores, -1) @ v).transpose(-2, -3).flatten(-2)

    stem = "blip.visual_encoder."
    x = torch.nn.functional.conv2d(seen, *w(stem + "patch_embed.proj"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([held[stem + "cls_token"].expand(len(x), 1, -1), x], 1) + held[stem + "pos_embed"]
    for k in range(LAYERS):
        block = f"{stem}blocks.{k}."
        y = layer_norm(x, (WIDTH,), *w(block + "norm1"), eps=eps)
        y = attend(*linear(y, *w(block + "attn.qkv")).chunk(3, -1))
        x = x + linear(y, *w(block + "attn.proj"))
        y = layer_norm(x, (WIDTH,), *w(block + "norm2"), eps=eps)
        x = x + linear(gelu(linear(y, *w(block + "mlp.fc1"))), *w(block + "mlp.fc2"))
    states = layer_norm(x, (WIDTH,), *w(stem + "norm"), eps=eps)
    stem = "blip.text_encoder."
    h = held[stem + "embeddings.word_embeddings.weight"][ids]
    h = h + held[stem + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = layer_norm(h, (TEXT,), *w(stem + "embeddings.LayerNorm"), eps=1e-12)
    bias = torch.where(mask.bool(), 0.0, -1e9)[:, None, None]
    if causal:
        bias = bias + torch.full((ids.shape[1],) * 2, -1e9).triu(1)
    for k in range(LAYERS):
        block = f"{stem}encoder.layer.{k}."
        for kind, other, hidden in (("attention", None, bias), ("crossattention", states, None)):
            q, key, v = (
                linear(h if name == "query" or other is None else other, *w(f"{block}{kind}.self.{name}"))
                for name in ("query", "key", "value")
            )
            y = linear(attend(q, key, v, hidden), *w(f"{block}{kind}.output.dense"))
            h = layer_norm(y + h, (TEXT,), *w(f"{block}{kind}.output.LayerNorm"), eps=1e-12)
        y = linear(gelu(linear(h, *w(block + "intermediate.dense"))), *w(block + "output.dense"))
        h = layer_norm(y + h, (TEXT,), *w(block + "output.LayerNorm"), eps=1e-12)
    out = h[:, 0]
    for k in (0, 2, 4, 6, 7):
        out = linear(out, *w(f"mlp.layers.{k}"))
    return (out[:, 0] - 0.16717362830052426) / 1.0333394966054072


PROMPTS = ["a red circle and a blue square", "cats"]


def test_imagereward_is_its_formula_and_two_mistakes_are_not(held, words, tmp_path):
    torch.save(held, tmp_path / "r.pt")
    judge = small_judge(judges.tensors(tmp_path / "r.pt"), words)
    got = torch.tensor([j.values["imagereward"] for j in judge.pictures([IMAGE] * 2, PROMPTS, [None] * 2)])
    said = words(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    assert said["input_ids"][0, 0] == 2  # [CLS], not BLIP's own start token
    seen = pixels.pil([IMAGE] * 2, 32)

    def plain(**more):
        return plain_reward(held, seen, said["input_ids"], said["attention_mask"], **more)

    assert torch.allclose(got, plain(), atol=2e-5)
    assert (got - plain(causal=True)).abs().max() > 1e-3
    wrong = small_judge(held, words, layer_norm_eps=1e-2)  # as the default 1e-5 would at full size
    off = torch.tensor([j.values["imagereward"] for j in wrong.pictures([IMAGE] * 2, PROMPTS, [None] * 2)])
    assert (off - plain()).abs().max() > 1e-4
    assert 1.2 == pytest.approx(0.9995 * 1.0333394966054072 + 0.16717362830052426, abs=1e-4)
    from safetensors.torch import save_file

    save_file(held, tmp_path / "r.safetensors")
    assert all(torch.equal(v, held[k]) for k, v in judges.tensors(tmp_path / "r.safetensors").items())
    with pytest.raises(ValueError, match="lacks the tensor"):
        small_judge({k: v for k, v in held.items() if "blocks.1.norm1" not in k}, words)
    with pytest.raises(ValueError, match="beyond its network"):
        small_judge(held | {"other.weight": torch.zeros(1)}, words)


def test_the_gradient_of_imagereward(held, words):
    judge = small_judge(held, words)
    judge.image_encoder.double()
    judge.text_encoder.double()
    x = torch.rand(1, 3, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    x.requires_grad_()
    (slope,) = torch.autograd.grad(judge.score(x, PROMPTS[:1], rounding=False).sum(), x)
    step = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        high, low = (judge.score(x + s * 1e-6 * step, PROMPTS[:1], rounding=False).sum() for s in (1, -1))
    assert (slope * step).sum().item() == pytest.approx(((high - low) / 2e-6).item(), rel=1e-6, abs=1e-8)
    (again,) = torch.autograd.grad(judge.score(x, PROMPTS[:1], checkpoint=True, rounding=False).sum(), x)
    assert torch.equal(again, slope)


def test_every_tensor_of_imagereward_at_full_size_has_its_place():
    from transformers import BlipTextModel, BlipVisionModel

    full = published(1024, 768, 24, 12, 30524, 512, 4096, 3072, 196, 16, (768, 1024, 128, 64, 16, 1))
    full = {name: torch.empty(shape, device="meta") for name, shape in full.items()}
    with torch.device("meta"):
        image, text = (
            BlipVisionModel(blip.vision_config()),
            BlipTextModel(blip.text_config(), add_pooling_layer=False),
        )
    for network, mine in ((image, blip.renamed(full)), (text, blip._under("blip.text_encoder.", full))):
        wanted = {name: value.shape for name, value in network.state_dict().items()}
        assert {name: value.shape for name, value in mine.items()} == wanted
    assert image.config.layer_norm_eps == 1e-6


# --- Mask2Former ----------------------------------------------------------------------------------


def test_detections_are_the_formula_on_the_raw_outputs():
    """Against a plain writing of it, pair by pair, at sizes that are no multiples of anything."""
    g = torch.Generator().manual_seed(0)
    classes = torch.randn(5, 4, generator=g) * 2
    masks = torch.randn(5, 8, 12, generator=g) * 3
    masks[4] = -1.0  # an empty mask
    got = mask2former.detections(classes, masks, (50, 90), (64, 96), (33, 61))
    truth = []
    for q in range(5):
        big = interpolate(masks[q][None, None], (64, 96), mode="bilinear")[..., :50, :90]
        logits = interpolate(big, (33, 61), mode="bilinear")[0, 0]
        if (logits > 0).any():
            inside = logits[logits > 0].sigmoid().mean().item()
            rows, columns = np.nonzero((logits > 0).numpy())
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            truth += [(classes[q].softmax(-1)[k].item() * inside, str(k), box) for k in range(3)]
    truth.sort(reverse=True)
    mine = sorted(((d.score, d.name, d.box) for d in got), reverse=True)
    assert len(mine) == len(truth) == 12
    for a, b in zip(mine, truth):
        assert a[0] == pytest.approx(b[0], abs=1e-6) and a[1:] == b[1:]


def test_padding_to_32_and_back_keeps_places():
    """A network that finds bright pixels: the box of a bright square comes back where it was drawn."""
    image = Image.new("RGB", (150, 100))
    image.paste("white", (30, 20, 70, 60))
    x, inside = mask2former.prepared(image, 200, 333)
    assert x.shape == (1, 3, 224, 320) and inside == (200, 300)
    assert (x[..., 200:, :] == 0).all() and (x[..., 300:] == 0).all()
    mask = interpolate(x.mean(1, keepdim=True), (56, 80), mode="bilinear")[0]
    classes = torch.zeros(1, 81)
    classes[0, 15] = 9
    found = mask2former.detections(classes, mask, inside, (224, 320), (100, 150))
    assert found[0].name == "cat"
    assert found[0].box == pytest.approx((30, 20, 70, 60), abs=1.5)
    small = mask2former.crop(image, found[0])
    assert small.size == pytest.approx((40, 40), abs=3) and small.getpixel((20, 20)) == (255, 255, 255)


@pytest.fixture(scope="module")
def small_detector(tmp_path_factory):
    """A random Mask2Former with seven queries, saved by transformers."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=7,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("detector")
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(place)
    return place, model


def test_mask2former_from_its_files(small_detector, tmp_path):
    place, model = small_detector
    judge = judges.load("tiam-like", {"mask2former": str(place)})
    judge.sides = (96, 160)
    found = judge.find(IMAGE)
    x, inside = mask2former.prepared(IMAGE, 96, 160)
    with torch.no_grad():
        out = model(pixel_values=x)
    truth = mask2former.detections(
        out.class_queries_logits[0], out.masks_queries_logits[0], inside, x.shape[-2:], (40, 48)
    )
    assert [(d.name, d.box) for d in found] == [(d.name, d.box) for d in truth]
    assert [d.score for d in found] == pytest.approx([d.score for d in truth], abs=1e-6)
    known, unknown = judge.pictures([IMAGE] * 2, ["a cat and a dog", "a cat and a crown"], [None] * 2)
    assert known.values == {"tiam-like": 0.0} and "lacks" in known.reason
    assert unknown.values == {} and "does not know" in unknown.reason
    assert not any(p.requires_grad for p in judge.model.parameters())
    from safetensors.torch import load_file, save_file

    held = load_file(place / "model.safetensors")
    del held["class_predictor.weight"]
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the tensor class_predictor.weight"):
        judges.load("tiam-like", {"mask2former": str(tmp_path)})


def test_coco_knows_the_objects_of_91_of_attend_and_excites_prompts():
    from minsd.app.prompt_sets import load

    counts = [
        sum(bool(mask2former.names_of(item["prompt"], None)) for item in load(name))
        for name in ("ae-animals", "ae-animals-objects", "ae-objects")
    ]
    assert counts == [15, 48, 28]


class Paint:
    """A stand-in for CLIP whose image vector is the mean colour, and whose texts name colours."""

    size = 8

    def images(self, seen):
        rgb = seen * torch.tensor(pixels.STD)[:, None, None] + torch.tensor(pixels.MEAN)[:, None, None]
        rgb = rgb.mean((2, 3)) - 0.6  # of grey, the surroundings
        return rgb / rgb.norm(dim=1, keepdim=True).clamp_min(1e-9)

    def texts(self, texts):
        known = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
        rows = [next((v for k, v in known.items() if re.search(rf"\b{k}\b", t)), (-1, -1, -1)) for t in texts]
        return torch.nn.functional.normalize(torch.tensor(rows).float() - 0.4, dim=1)


def test_colours_come_from_the_mask_alone():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    mask = np.zeros((20, 40), bool)
    mask[:, 20:] = True
    one = objects.Detection("car", 0.9, (0, 0, 40, 20), mask)
    colours = mask2former.Colours(Paint())
    assert colours(image, one) == "blue"
    assert colours(image, one._replace(mask=~mask)) == "red"
    assert set(np.unique(np.asarray(mask2former.crop(image, one))[:, :20])) == {0x99}


# --- regions --------------------------------------------------------------------------------------


def test_regions_against_their_captions():
    from minsd.judges.regions import SIDE, Regions, on_white

    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    square = on_white(image, (0, 5, 20, 15))
    assert square.size == (SIDE, SIDE)
    assert square.getpixel((SIDE // 2, 5)) == (255, 255, 255) and square.getpixel((5, SIDE // 2)) == (
        255,
        0,
        0,
    )
    layout = {
        "regions": [
            {"prompt": "a red car", "box": [0, 0, 0.5, 1]},
            {"prompt": "a blue car", "box": [0.5, 0, 1, 1]},
        ]
    }
    judge = Regions({}, Paint())
    right, wrong, none = judge.pictures(
        [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image],
        [""] * 3,
        [{"layout": layout}, {"layout": layout}, None],
    )
    assert right.values["nearest_own"] == 1 and wrong.values["nearest_own"] == 0
    assert right.values["region_clip"] > wrong.values["region_clip"]
    assert none.values == {} and "no layout" in none.reason
