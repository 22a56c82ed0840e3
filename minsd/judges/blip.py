"""ImageReward (Xu et al. 2023, arXiv 2304.05977): a BLIP image encoder, and a BERT that encodes the
prompt with cross-attention to the image.

    value = (head(h) - 0.16717362830052426) / 1.0333394966054072

h is the last hidden state of the text's first token, and head is five linear layers. The networks
are transformers' BLIP classes. In the published file, only the image encoder's tensors have names
other than those in transformers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from minsd.judges import Judged, fill, pixels, tensors
from minsd.judges.clip import AESTHETIC, Head, fold
from minsd.judges.objects import Asked

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards, in the authors' program
LENGTH = 35  # tokens that ImageReward reads
IMAGE = {  # the authors' names of the image encoder, in order of replacement -> BlipVisionModel's
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"^norm\.": "post_layernorm.",
}


def vision_config(**sizes: Any) -> "BlipVisionConfig":
    """Returns the configuration of ImageReward's image encoder, a ViT-L/16. `sizes` are fields of
    the configuration that are to have other values. The default of the field layer_norm_eps is 1e-6
    here, and 1e-5 in transformers."""
    from transformers import BlipVisionConfig

    large = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    return BlipVisionConfig(**{**large, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, **sizes})


def text_config(**sizes: Any) -> "BlipTextConfig":
    """Returns the configuration of ImageReward's text encoder, a BERT. `sizes` are fields of the
    configuration that are to have other values. The field `is_decoder` is True, because only then
    does transformers give the layers cross-attention."""
    from transformers import BlipTextConfig

    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    rest = {"vocab_size": 30524, "encoder_hidden_size": 1024, "max_position_embeddings": 512}
    return BlipTextConfig(**{**base, **rest, "layer_norm_eps": 1e-12, "is_decoder": True, **sizes})


class ImageReward:
    """The judge ImageReward, a network that predicts how much people like an image for its prompt.

    `held` are all tensors of ImageReward's published file (name -> tensor), and `path` is this
    file, for error messages. `words` is BERT's tokenizer. `vision` and `text` are the
    configurations of image and text encoder; None stands for the published ones. `identity` is the
    dict that is written into every line of scores. The constructor raises ValueError if the tensors
    do not fit the networks.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        held: Mapping[str, Tensor],
        words: "BertTokenizer",
        path: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vision: "BlipVisionConfig | None" = None,
        text: "BlipTextConfig | None" = None,
    ):
        from transformers import BlipTextModel, BlipVisionModel

        vision = vision or vision_config()
        with torch.device("meta"):
            image_encoder = BlipVisionModel(vision)
            text_encoder = BlipTextModel(text or text_config(), add_pooling_layer=False)
        left = [name for name in held if not name.startswith(("blip.", "mlp."))]
        if left:
            raise ValueError(f"{path} has beyond its network the tensor {left[0]}: another model's file?")
        fill(image_encoder, renamed(held), (), path)
        fill(text_encoder, _under("blip.text_encoder.", held), (), path)
        self.identity = identity
        self.image_encoder: Any = image_encoder.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        self.text_encoder: Any = text_encoder.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        self.head: Head = fold(_under("mlp.", held), path, AESTHETIC)
        self.words = words
        self.size: int = vision.image_size  # type: ignore[assignment]

    @torch.no_grad()
    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Returns for each RGB image, in the column "imagereward", its reward for its prompt.
        Images may have different sizes. `asked` is ignored."""
        values = self._values(pixels.pil(images, self.size), prompts).tolist()
        return [Judged({"imagereward": value}) for value in values]

    def score(
        self, x: Tensor, prompts: Sequence[str], checkpoint: bool = False, rounding: bool = True
    ) -> Tensor:
        """Returns the rewards (B,) of images x (B,3,H,W) with pixels in 0..1, for one prompt per
        image. They are differentiable with respect to x. If `checkpoint` is True, activations are
        computed again in the backward pass, which takes less memory. If `rounding` is True, the
        resized pixels are rounded to 8 bits, and the gradient is passed through the rounding
        unchanged."""
        seen = pixels.tensor(x, self.size, rounding)
        if not checkpoint:
            return self._values(seen, prompts)
        from torch.utils.checkpoint import checkpoint as again

        out = again(lambda seen: self._values(seen, prompts), seen, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    def _values(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        weight = next(self.text_encoder.parameters())
        states = self.image_encoder(pixel_values=seen.to(weight.device, weight.dtype)).last_hidden_state
        said = self.words(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(weight.device)
        out = self.text_encoder(
            input_ids=said["input_ids"],
            attention_mask=said["attention_mask"],
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=weight.device),
            is_decoder=False,  # otherwise a word would only see those before it
        )
        h = out.last_hidden_state[:, 0]
        h = h if h.dtype == torch.float64 else h.float()
        w, b = (v.to(h) for v in self.head)
        return (h @ w + b - MEAN) / STD


def _under(prefix: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}


def renamed(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the image encoder's tensors (name -> tensor) under the names that transformers'
    BlipVisionModel gives them. `held` are all tensors of ImageReward's file, under the file's
    names."""
    out = {}
    for name, value in _under("blip.visual_encoder.", held).items():
        for pattern, new in IMAGE.items():
            name = re.sub(pattern, new, name)
        out[name] = value
    return out


def build(
    identity: dict[str, Any], *, files: Mapping[str, Path], device: torch.device | str, dtype: torch.dtype
) -> ImageReward:
    """Loads the judge ImageReward. `files` maps the keys "imagereward" and "bert" to the paths of
    its weights and of BERT's vocabulary. `identity` is the dict with the judge's name, weights,
    dtype and options that is written into every line of scores."""
    from transformers import BertTokenizer

    words = BertTokenizer(str(files["bert"]), do_lower_case=True)
    path = files["imagereward"]
    return ImageReward(identity, tensors(path), words, path, device, dtype)
