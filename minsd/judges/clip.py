"""Judges that use CLIP: clip, least, PickScore, HPSv2, the aesthetic predictor.

With image vector e and text vector t, both of unit length, c = e . t is their cosine (Radford et
al. 2021, arXiv 2103.00020), and the judges are

    clip       c                       least      the smallest c over the prompt's parts
    pickscore  exp(logit_scale) c      (Kirstain et al. 2023, arXiv 2305.01569)
    hpsv2      100 c                   (Wu et al. 2023, arXiv 2306.09341)
    aesthetic  w . e + b               (LAION's improved aesthetic predictor, five linear layers)

`least` is Attend-and-Excite's minimum object similarity (Chefer et al. 2023, arXiv 2301.13826). All
networks are instances of transformers' CLIPModel; `from_open_clip` converts the names of HPSv2's
tensors.
"""

import html
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minsd.judges import Judged, fill, pixels, tensors
from minsd.judges.objects import Asked

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SPARE = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
PARTS = re.compile(r",\s*(?:and\s+|with\s+)?|\s+(?:and|with)\s+")
AESTHETIC = tuple(f"layers.{k}" for k in (0, 2, 4, 6, 7))  # linear layers, with dropouts between


# --- the network ----------------------------------------------------------------------------------


def h14() -> "CLIPConfig":
    """Returns the configuration of OpenCLIP's ViT-H/14, the network of HPSv2 and PickScore. Its
    activation function is GELU, while that of OpenAI's CLIP is quick_gelu."""
    from transformers import CLIPConfig

    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "eos_token_id": 49407,
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    return CLIPConfig(
        text_config={**text, "hidden_act": "gelu"},
        vision_config={**vision, "hidden_act": "gelu"},
        projection_dim=1024,
    )


TOP = {  # open_clip's names -> CLIPModel's
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
INSIDE = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(
    r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.?(weight|bias|in_proj_weight|in_proj_bias)"
)


def from_open_clip(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts tensors (name -> tensor) of an open_clip model to those of transformers' CLIPModel,
    and returns them under the new names. The two final projections are transposed, and the joint
    projection of each attention layer is split into queries, keys and values. Tensors with unknown
    names keep them."""
    out: dict[str, Tensor] = {}
    for name, value in held.items():
        name = name.removeprefix("model.")
        block = BLOCK.fullmatch(name)
        if name in TOP:
            out[TOP[name]] = value.T if name in ("visual.proj", "text_projection") else value
        elif name.rpartition(".")[0] in NORMS:
            stem, _, kind = name.rpartition(".")
            out[f"{NORMS[stem]}.{kind}"] = value
        elif block:
            tower = "vision_model" if block[1] else "text_model"
            stem = f"{tower}.encoder.layers.{block[2]}"
            if block[4].startswith("in_proj_"):
                for which, part in zip("qkv", value.chunk(3)):
                    out[f"{stem}.self_attn.{which}_proj.{block[4].removeprefix('in_proj_')}"] = part
            else:
                out[f"{stem}.{INSIDE.get(block[3], block[3])}.{block[4]}"] = value
        else:
            out[name] = value  # `fill` refuses what no network has
    return out


def network(path: Path, config: "CLIPConfig | None" = None) -> "CLIPModel":
    """Returns a CLIPModel, frozen, in float32 on the CPU, with the weights in the file `path`. Its
    tensors may have the names of transformers or of open_clip. The configuration is that of a
    config.json in the same folder; if there is none, `config` is used. Raises ValueError if the
    tensors do not fit the configuration."""
    from transformers import CLIPConfig, CLIPModel

    held = tensors(path)
    beside = path.parent / "config.json"
    if beside.is_file():
        config = CLIPConfig.from_pretrained(beside, local_files_only=True)  # nosec B615: no download
    assert config is not None
    with torch.device("meta"):
        model = CLIPModel(config)
    if not any(name.startswith("text_model.") for name in held):
        held = from_open_clip(held)
    fill(model, held, SPARE, path)
    return model


def tokenizer(folder: Path) -> "CLIPTokenizer":
    """Loads CLIP's tokenizer from `folder`, or, if the folder contains none, from the hub's cache
    or by a download. Raises FileNotFoundError if it is not found and cannot be downloaded."""
    from transformers import CLIPTokenizer

    from minsd.weights import hub

    own = (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file()
    try:
        place = folder if own else hub.tokenizer()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer, and {hub.CLIP} is not in the hub cache: put vocab.json and "
            "merges.txt into the folder"
        ) from None
    return CLIPTokenizer.from_pretrained(place, local_files_only=True)  # nosec B615: no download


class Clip:
    """CLIP's image encoder and text encoder. Both return vectors of unit length. `words` is the
    tokenizer; `device` and `dtype` are those that the model is moved to."""

    def __init__(
        self, model: "CLIPModel", words: "CLIPTokenizer", device: torch.device | str, dtype: torch.dtype
    ):
        self.model = model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        self.words = words
        vision: Any = model.config.vision_config
        self.size: int = vision.image_size
        self.known: dict[str, Tensor] = {}  # text -> the text's vector, on the CPU

    def images(self, seen: Tensor) -> Tensor:
        """Returns the vectors (B,D) of preprocessed images `seen` (B,3,size,size), with unit
        length. They are float32, or float64 if the model is."""
        weight = self.model.visual_projection.weight
        out = self.model.get_image_features(pixel_values=seen.to(weight.device, weight.dtype))
        return unit(_vector(out))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns the vectors (B,D) of B texts, with unit length, on the CPU. Each text is encoded
        once, and its vector is kept for later calls. A text of more than 77 tokens is cut off, with
        a warning."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for at in range(0, len(new), 64):
            part = new[at : at + 64]
            ids = [self._ids(text) for text in part]
            longest = max(map(len, ids))
            # Attention is causal and the first end token is read, so padding changes nothing.
            rows = [one + one[-1:] * (longest - len(one)) for one in ids]
            weight = self.model.text_projection.weight
            with torch.no_grad():
                out = self.model.get_text_features(input_ids=torch.tensor(rows, device=weight.device))
            self.known |= dict(zip(part, unit(_vector(out)).cpu()))
        return torch.stack([self.known[text] for text in texts])

    def _ids(self, text: str) -> list[int]:
        ids = self.words(html.unescape(html.unescape(text)).strip(), verbose=False)["input_ids"]
        most = self.model.config.text_config.max_position_embeddings
        if len(ids) > most:
            warnings.warn(f"a judge reads {most - 2} tokens of the prompt {text[:60]!r}", stacklevel=3)
            ids = ids[: most - 1] + ids[-1:]
        return ids


def _vector(out: Any) -> Tensor:
    """Returns the projected vectors (B,D) in `out`, the result of CLIPModel.get_image_features or
    get_text_features. This result is an object in transformers 5, and the tensor itself in earlier
    versions."""
    return out if isinstance(out, Tensor) else out.pooler_output


def unit(vectors: Tensor) -> Tensor:
    """Divides each of the vectors (B,D) by its length. A zero vector stays zero. The result is
    float64 for float64 vectors, otherwise float32."""
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    return wide / wide.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def parts(prompt: str) -> list[str]:
    """Splits a prompt at commas, "and" and "with", and returns the parts: ["a cat", "a dog"] for "a
    cat and a dog". Returns an empty list if there is nothing to split."""
    found = [part.strip() for part in PARTS.split(prompt) if part.strip()]
    return found if len(found) > 1 else []


# --- judges ---------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A linear function of the unit image vectors: value = vectors @ weight + bias."""

    weight: Tensor  # (D,)
    bias: Tensor  # ()


def fold(held: Mapping[str, Tensor], path: Path, names: Sequence[str] = AESTHETIC) -> Head:
    """Combines linear layers that follow one another without activations between them into one
    layer, and returns it. `held` are the tensors of the file at `path` (name -> tensor), and
    `names` are the names of the layers, first to last. The last layer must have one output. The
    product is computed in float64. Raises ValueError if the file does not have exactly these
    layers."""
    wanted = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    if set(held) != wanted:
        wrong = sorted(set(held) ^ wanted)[0]
        raise ValueError(f"{path} is no linear head: its layers are not {', '.join(names)} ({wrong})")
    weight: Tensor | None = None
    bias = torch.zeros((), dtype=torch.float64)
    for name in names:
        w, b = held[f"{name}.weight"].double(), held[f"{name}.bias"].double()
        bias = w @ bias + b if weight is not None else b
        weight = w if weight is None else w @ weight
    assert weight is not None
    return Head(weight[0].float(), bias[0].float())


class ClipJudge:
    """A judge that computes one value per image from CLIP's vectors, for the column `column`.

    The value is the cosine of image and prompt, times `factor`. Two arguments change this. If
    `head` is given, the value is a linear function of the image's vector alone. If `least` is True,
    the prompt is split into parts, and the value is the smallest cosine of the image and a part.

    `box` is a function that prepares images for the network, box(pixels (B,3,H,W), size); None
    stands for CLIP's own preprocessing. HPSv2 needs another.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        clip: Clip,
        column: str,
        *,
        factor: float = 1.0,
        head: Head | None = None,
        least: bool = False,
        box: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.identity = identity
        self.clip = clip
        self.column = column
        self.factor = factor
        self.head = head
        self.least = least
        self.box = box  # HPSv2's preprocessing, in place of CLIP's

    @torch.no_grad()
    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Returns for each RGB image its value for its prompt. Images may have different sizes.
        `asked` is ignored. If the judge was made with least=True, which compares parts of the
        prompt, an image whose prompt has a single part gets no value."""
        if self.box is None:
            seen = pixels.pil(images, self.clip.size)
        else:
            seen = torch.cat([self.box(one[None], self.clip.size) for one in pixels.to_pixels(images)])
        values = self._values(self.clip.images(seen), prompts).tolist()
        nothing = Judged({}, reason="the prompt has a single part")
        return [
            nothing if self.least and not parts(prompt) else Judged({self.column: value})
            for value, prompt in zip(values, prompts)
        ]

    def score(
        self, x: Tensor, prompts: Sequence[str], checkpoint: bool = False, rounding: bool = True
    ) -> Tensor:
        """Returns the values (B,) of images x (B,3,H,W) with pixels in 0..1, for one prompt per
        image. They are differentiable with respect to x. If `checkpoint` is True, activations are
        computed again in the backward pass, which takes less memory. If `rounding` is True, the
        resized pixels are rounded to 8 bits, and the gradient is passed through the rounding
        unchanged; HPSv2 never rounds."""
        seen = pixels.tensor(x, self.clip.size, rounding) if self.box is None else self.box(x, self.clip.size)
        if checkpoint:
            from torch.utils.checkpoint import checkpoint as again

            vectors = again(self.clip.images, seen, use_reentrant=False)
        else:
            vectors = self.clip.images(seen)
        assert isinstance(vectors, Tensor)
        return self._values(vectors, prompts)

    def _values(self, vectors: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.head is not None:
            weight, bias = (v.to(vectors) for v in self.head)
            return vectors @ weight + bias
        if not self.least:
            return self.factor * (vectors * self.clip.texts(prompts).to(vectors)).sum(-1)
        split = [parts(prompt) or [prompt] for prompt in prompts]
        return torch.stack(
            [(self.clip.texts(these).to(vectors) @ one).min() for one, these in zip(vectors, split)]
        )


def build(
    identity: dict[str, Any], *, files: Mapping[str, Path], device: torch.device | str, dtype: torch.dtype
) -> ClipJudge:
    """Loads the judge called `identity["judge"]`, one of those that use CLIP. `files` maps keys of
    WEIGHTS to the paths of its weights. `identity` is the dict with the judge's name, weights,
    dtype and options that is written into every line of scores."""
    name: str = identity["judge"]
    path = next(iter(files.values()))
    model = network(path, h14())
    clip = Clip(model, tokenizer(path.parent), device, dtype)
    if name == "pickscore":
        return ClipJudge(identity, clip, name, factor=float(model.logit_scale.double().exp()))
    if name == "aesthetic":
        head = fold(tensors(files["aesthetic"]), files["aesthetic"])
        return ClipJudge(identity, clip, name, head=head)
    if name.startswith("hpsv2"):
        smooth = not name.endswith("@plain")

        def box(x: Tensor, size: int) -> Tensor:
            return pixels.letterbox(x, size, smooth)

        return ClipJudge(identity, clip, name, factor=100.0, box=box)
    return ClipJudge(identity, clip, name, least=name == "least")
