"""CLIP judges without weights: names against open_clip, values against transformers, gradients."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from minsd import judges
from minsd.judges import clip, pixels


def noise_image(width, height, seed=0):
    """An image with structure at all scales (1/f noise)."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1e-3
    spectra = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / f).real for _ in range(3)]
    values = np.stack([(s - s.mean()) / s.std() * 50 + 128 for s in spectra], -1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def config(shapes_folder):
    from transformers import AutoTokenizer, CLIPConfig

    words = AutoTokenizer.from_pretrained(shapes_folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config={
            **sizes,
            "num_hidden_layers": 2,
            "vocab_size": len(words),
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={**sizes, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, shapes_folder):
    """A random CLIPModel saved by transformers, with the embedded model's tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPModel(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)  # so that cosines of different images differ
    model.save_pretrained(place)
    CLIPTokenizer.from_pretrained(shapes_folder / "tokenizer").save_pretrained(place)
    return place


def load(name, folder, **more):
    keys = judges.JUDGES[name].weights
    return judges.load(name, {key: str(more.get(key, folder)) for key in keys})


IMAGES = [noise_image(64, 64), noise_image(96, 64, 1), noise_image(50, 77, 2)]
PROMPTS = ["a red circle and a blue square", "a green star", "a pink heart, a red cross with a blue star"]


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(512, 512), (300, 200), (201, 333), (128, 128), (97, 64)])
def test_pil_is_transformers_processor_bit_for_bit(width, height):
    from transformers import CLIPImageProcessor

    image = noise_image(width, height)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    truth = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels.pil([image], 64), truth)


@pytest.mark.parametrize("antialias", [True, False])
def test_tensors_are_near_pil_and_only_with_antialiasing(monkeypatch, antialias):
    image = noise_image(512, 512)
    truth = pixels.pil([image], 224)
    if not antialias:
        plain = lambda x, size, **more: interpolate(x, size, **more | {"antialias": False})  # noqa: E731
        monkeypatch.setattr(pixels, "interpolate", plain)
    mine = pixels.tensor(torch.stack(pixels.to_pixels([image])), 224)
    off = (mine - truth).abs() * torch.tensor(pixels.STD)[:, None, None] * 255  # in 8-bit steps
    assert (bool(off.mean() < 0.5) and bool(off.max() < 6)) == antialias


def test_letterbox_by_hand():
    wide = noise_image(512, 256)
    (x,) = pixels.to_pixels([wide])
    seen = pixels.letterbox(x[None], 224)
    black = -torch.tensor(pixels.MEAN) / torch.tensor(pixels.STD)
    assert seen.shape == (1, 3, 224, 224)
    assert torch.allclose(seen[0, :, :56], black[:, None, None]) and torch.allclose(
        seen[0, :, 168:], black[:, None, None]
    )
    truth = interpolate(x[None], (112, 224), mode="bicubic", antialias=True)
    assert torch.allclose(seen[..., 56:168, :], pixels.normalise(truth), atol=1e-6)
    square = pixels.to_pixels([noise_image(512, 512)])[0][None]
    whole = pixels.normalise(interpolate(square, (224, 224), mode="bicubic", antialias=True))
    assert torch.equal(pixels.letterbox(square, 224), whole)


# --- names ----------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A residual block under open_clip's names, with PyTorch's own joint attention."""

    def __init__(self, width):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 128), "c_proj": torch.nn.Linear(128, width)}
        )

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(torch.nn.Module):
    def __init__(self, width, layers, positions, vision):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(Block(width) for _ in range(layers))
        self.positional_embedding = torch.nn.Parameter(torch.randn(positions, width))
        if vision:
            self.class_embedding = torch.nn.Parameter(torch.randn(width))
            self.conv1 = torch.nn.Conv2d(3, width, 8, 8, bias=False)
            self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            self.proj = torch.nn.Parameter(torch.randn(width, 16))


class OpenClip(Tower):
    """open_clip's CLIP (Ilharco et al. 2021) in plain torch: its names, its order of operations."""

    def __init__(self):
        super().__init__(32, 2, 77, vision=False)
        self.visual = Tower(64, 3, 17, vision=True)
        self.token_embedding = torch.nn.Embedding(49408, 32)
        self.ln_final = torch.nn.LayerNorm(32)
        self.text_projection = torch.nn.Parameter(torch.randn(32, 16))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_image(self, x):
        v = self.visual
        x = v.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x[:, 0]) @ v.proj

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((77, 77), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def open_clip_model():
    torch.manual_seed(0)
    return OpenClip().eval()


def renamed(held, act="gelu"):
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 8}
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, "hidden_act": act, "eos_token_id": 49407},
            vision_config={**vision, **sizes, "hidden_act": act},
            projection_dim=16,
        )
    ).eval()
    judges.fill(model, held, clip.SPARE, "a file")
    return model


def test_open_clips_networks_under_transformers_names():
    """Image and text vectors agree to 1e-6 of their length; a swapped or wrongly transposed tensor
    or CLIP's own activation shows."""
    theirs = open_clip_model()
    held = clip.from_open_clip(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[49406, 320, 5, 7, 49407] + [0] * 72, [49406, 11, 49407] + [0] * 74])

    def vectors(model):
        with torch.no_grad():
            return (
                clip.unit(clip._vector(model.get_image_features(pixel_values=x))),
                clip.unit(clip._vector(model.get_text_features(input_ids=ids))),
            )

    with torch.no_grad():
        truth = clip.unit(theirs.encode_image(x)), clip.unit(theirs.encode_text(ids))

    def off(model):
        return max(float((a - b).abs().max()) for a, b in zip(vectors(model), truth))

    assert off(renamed(held)) < 1e-6
    assert off(renamed(held, "quick_gelu")) > 1e-4
    swapped = dict(held)
    for name in held:
        if "q_proj" in name:
            swapped[name] = held[name.replace("q_proj", "k_proj")]
            swapped[name.replace("q_proj", "k_proj")] = held[name]
    square = dict(held) | {"visual_projection.weight": held["visual_projection.weight"].flip(0)}
    assert off(renamed(swapped)) > 1e-4 and off(renamed(square)) > 1e-4


def published(names_of_layers):
    """The names and shapes of open_clip's ViT-H/14, as HPSv2's file has them."""
    out = {"logit_scale": ()}

    def tower(prefix, width, layers, mlp):
        for k in range(layers):
            stem = f"{prefix}transformer.resblocks.{k}."
            out.update(
                {
                    stem + "attn.in_proj_weight": (3 * width, width),
                    stem + "attn.in_proj_bias": (3 * width,),
                    stem + "attn.out_proj.weight": (width, width),
                    stem + "attn.out_proj.bias": (width,),
                    stem + "mlp.c_fc.weight": (mlp, width),
                    stem + "mlp.c_fc.bias": (mlp,),
                    stem + "mlp.c_proj.weight": (width, mlp),
                    stem + "mlp.c_proj.bias": (width,),
                }
            )
            out.update({f"{stem}ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")})

    tower("visual.", 1280, names_of_layers[0], 5120)
    tower("", 1024, names_of_layers[1], 4096)
    out |= {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "visual.proj": (1280, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "positional_embedding": (77, 1024),
    }
    for name, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
        out |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return out


def test_every_tensor_of_the_full_size_file_has_its_place():
    """986,109,441 numbers in 910 tensors out of the 686 that HPSv2's file has, on the meta device."""
    from transformers import CLIPModel

    shapes = published((32, 24))
    assert len(shapes) == 686
    held = clip.from_open_clip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):
        model = CLIPModel(clip.h14())
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in held.items()} == wanted
    assert len(wanted) == 910 and sum(p.numel() for p in model.parameters()) == 986_109_441


# --- values ---------------------------------------------------------------------------------------


def test_values_are_those_of_transformers_own_processor_and_logits(folder):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    words = CLIPTokenizer.from_pretrained(folder)
    ids = words(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels.pil(IMAGES, 32), **ids).logits_per_image.diag()
    cosines = logits / model.logit_scale.exp()
    none = [None] * 3

    def values(name):
        judge = load(name, folder)
        return torch.tensor([j.values[name] for j in judge.pictures(IMAGES, PROMPTS, none)])

    assert torch.allclose(values("clip"), cosines, atol=1e-6)
    assert torch.allclose(values("pickscore"), logits, atol=1e-4)
    judge = load("hpsv2.1", folder)
    seen = torch.cat([pixels.letterbox(x[None], 32) for x in pixels.to_pixels(IMAGES)])
    with torch.no_grad():
        boxed = model(pixel_values=seen, **ids).logits_per_image.diag() / model.logit_scale.exp()
    assert torch.allclose(values("hpsv2.1"), 100 * boxed, atol=1e-4)
    # One by one, and from tensors: the same numbers, which no batch changes.
    alone = [judge.pictures([image], [prompt], [None])[0] for image, prompt in zip(IMAGES, PROMPTS)]
    assert [j.values["hpsv2.1"] for j in alone] == pytest.approx((100 * boxed).tolist(), abs=1e-4)
    x = pixels.to_pixels(IMAGES[:1])[0][None]
    assert judge.score(x, PROMPTS[:1]).item() == pytest.approx(alone[0].values["hpsv2.1"], abs=1e-5)


def test_least_is_the_neglected_part(folder):
    whole = load("clip", folder)
    judge = load("least", folder)
    got = judge.pictures(IMAGES, PROMPTS, [None] * 3)
    assert clip.parts(PROMPTS[2]) == ["a pink heart", "a red cross", "a blue star"]
    for k in (0, 2):
        halves = clip.parts(PROMPTS[k])
        each = whole.pictures([IMAGES[k]] * len(halves), halves, [None] * len(halves))
        assert got[k].values["least"] == pytest.approx(min(j.values["clip"] for j in each), abs=1e-6)
    assert got[1].values == {} and "single part" in got[1].reason


def test_unit_vectors_by_hand(folder):
    """(1, 0) and (0.6, 0.8): cosine 0.6; the head w = (3, 4), b = 1 gives 6 on (0.6, 0.8)."""
    judge = load("clip", folder)
    judge.clip.known["x"] = torch.tensor([0.6, 0.8])
    vectors = clip.unit(torch.tensor([[2.0, 0.0]]))
    assert judge._values(vectors, ["x"]).item() == pytest.approx(0.6)
    judge.factor = 100.0
    assert judge._values(vectors, ["x"]).item() == pytest.approx(60)
    judge.head = clip.Head(torch.tensor([3.0, 4.0]), torch.tensor(1.0))
    assert judge._values(torch.tensor([[0.6, 0.8]]), ["x"]).item() == pytest.approx(6)
    assert clip.unit(torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_the_aesthetic_head_folded_is_its_layers_one_by_one(folder, tmp_path):
    torch.manual_seed(0)
    widths = (16, 32, 8, 4, 4, 1)  # the published file: 768 1024 128 64 16 1
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    held = {
        f"layers.{k}.{kind}": getattr(layer, kind).detach()
        for k, layer in zip((0, 2, 4, 6, 7), layers)
        for kind in ("weight", "bias")
    }
    torch.save(held, tmp_path / "head.pth")
    judge = load("aesthetic", folder, aesthetic=tmp_path / "head.pth")
    vectors = clip.unit(torch.randn(5, 16))
    truth = torch.nn.Sequential(*layers)(vectors)[:, 0]
    assert torch.allclose(judge._values(vectors, [""] * 5), truth, atol=1e-6)
    values = [j.values["aesthetic"] for j in judge.pictures(IMAGES, PROMPTS, [None] * 3)]
    assert len(set(values)) == 3
    wrong = {name.replace("layers.7", "layers.9"): value for name, value in held.items()}
    torch.save(wrong, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no linear head.*layers.7"):
        load("aesthetic", folder, aesthetic=tmp_path / "other.pth")
    sizes = (768, 1024, 128, 64, 16, 1)
    assert sum(a * b + b for a, b in zip(sizes, sizes[1:])) == 927_969


def test_a_text_that_is_too_long_is_cut_and_entities_are_mended(folder):
    judge = load("clip", folder)
    long = "a red circle and " * 60
    with pytest.warns(UserWarning, match="reads 75 tokens"):
        judge.clip.texts([long])
    assert torch.equal(judge.clip.texts(["a red &amp; blue star"]), judge.clip.texts(["a red & blue star"]))
    ids = judge.clip._ids("a red star")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge.clip._ids("A Red Star") == ids


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "least", "pickscore", "hpsv2", "aesthetic"])
def test_gradients_against_finite_differences(name, folder, tmp_path):
    torch.manual_seed(0)
    head = {
        f"layers.{k}.{kind}": torch.randn(shape, dtype=torch.float32)
        for k, (a, b) in zip((0, 2, 4, 6, 7), ((16, 8), (8, 8), (8, 4), (4, 4), (4, 1)))
        for kind, shape in (("weight", (b, a)), ("bias", (b,)))
    }
    torch.save(head, tmp_path / "head.pth")
    judge = load(name, folder, aesthetic=tmp_path / "head.pth")
    judge.clip.model.double()
    judge.clip.known = {}
    x = torch.rand(2, 3, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = (x * 0.6 + 0.2).requires_grad_()  # away from the clamp
    prompts = [PROMPTS[0], PROMPTS[2]]

    def value(x):
        return judge.score(x, prompts, rounding=False)

    (slope,) = torch.autograd.grad(value(x).sum(), x)
    step = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    h = 1e-6
    with torch.no_grad():
        finite = (value(x + h * step).sum() - value(x - h * step).sum()) / (2 * h)
    assert (slope * step).sum().item() == pytest.approx(finite.item(), rel=1e-6, abs=1e-8)
    assert all(p.grad is None and not p.requires_grad for p in judge.clip.model.parameters())
    (again,) = torch.autograd.grad(judge.score(x, prompts, checkpoint=True, rounding=False).sum(), x)
    assert torch.equal(again, slope)
    rounded = judge.score(x, prompts)
    assert torch.autograd.grad(rounded.sum(), x)[0].isfinite().all()


# --- files ----------------------------------------------------------------------------------------


def test_files_with_more_than_tensors_or_other_tensors_are_refused_in_one_line(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pt")
    torch.save({"state_dict": {"logit_scale": torch.tensor(1.0)}}, tmp_path / "few.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (
        ("evil.pt", "more than tensors"),
        ("few.pt", "lacks the tensor"),
        ("text.pt", "more than tensors|cannot be read"),
    ):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(ValueError, match=message) as error:
            load("hpsv2", folder, hpsv2=tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_another_file_is_another_identity(folder, tmp_path):
    first = load("clip", folder).identity
    assert (
        first["judge"] == "clip" and first["dtype"] == "float32" and first["clip-b16"].startswith("sha256:")
    )
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load("clip", tmp_path).identity == first
    from safetensors.torch import load_file, save_file

    held = load_file(tmp_path / "model.safetensors")
    held["logit_scale"] += 1
    save_file(held, tmp_path / "model.safetensors")
    assert load("clip", tmp_path).identity != first
    assert judges.short(first) != judges.short(load("clip", tmp_path).identity)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the folder holds no config.json"):
        load("clip", tmp_path)


def test_the_command_with_two_clip_judges(folder, tmp_path, capsys):
    """Killed between the two, and with a batch of another size, every number stays."""
    from minsd import image, judge

    for k, picture in enumerate(IMAGES):
        image.save(picture, tmp_path / f"{k}.png")
    rows = [json.dumps({"file": f"{k}.png", "prompt": PROMPTS[k]}) for k in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    words = [str(tmp_path), "--weights", f"clip-b16={folder}", "--quiet", "--device", "cpu"]
    assert judge.main([*words, "--judges", "clip", "least"]) == 0
    first = (tmp_path / "scores.jsonl").read_text()
    assert judge.main([*words, "--batch", "1", "--again"]) == 0  # the default judges are these two
    lines = [
        [json.loads(line) for line in text.splitlines()]
        for text in (first, (tmp_path / "scores.jsonl").read_text())
    ]
    assert len(lines[0]) == len(lines[1]) == 6
    for a, b in zip(*lines):
        assert a["values"] == pytest.approx(b["values"], abs=1e-5)
        assert a["identity"] == b["identity"] and a["asked"] == b["asked"]
    assert capsys.readouterr().err == ""
