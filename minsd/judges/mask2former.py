"""Judges that apply GenEval's or TIAM's rules to the objects that Mask2Former finds (Cheng et al.
2022, arXiv 2112.01527). CLIP determines the objects' colours.

GenEval uses the same network with other weights (mmdetection's), so the column is called
geneval-style here. Masks become detections as in mmdetection: the 100 best pairs of query and class
are kept, with the class probability times the mean of sigmoid(mask logits) inside the mask as their
score. The network is transformers' Mask2FormerForUniversalSegmentation. Its own post-processing is
not used, because it removes small masks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from minsd.judges import Judged, objects, pixels
from minsd.judges.clip import Clip, h14, network, parts, tokenizer, unit
from minsd.judges.objects import COCO, COLOURS, Asked, Detection

SHORT, LONG = 800, 1333  # pixels: the shorter side of the resized image, the most of the longer
DIVISOR = 32
BEST = 100  # pairs of query and class that are kept
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
GREY = 0x99  # the value of the pixels around an object while its colour is determined


def prepared(image: Image.Image, short: int = SHORT, long: int = LONG) -> tuple[Tensor, tuple[int, int]]:
    """Prepares an image for the network. It is resized, with its proportions kept, until its
    shorter side has `short` pixels, or until its longer side has `long` pixels if that happens
    first. It is then normalised, and padded with zeros at the right and at the bottom, so that
    height and width are multiples of 32.

    Returns (input, (height, width)): the padded image (1,3,H,W), and the height and width of the
    image without the padding.
    """
    (x,) = pixels.to_pixels([image])
    height, width = x.shape[-2:]
    scale = min(short / min(height, width), long / max(height, width))
    new = round(height * scale), round(width * scale)
    x = interpolate(x[None], new, mode="bilinear", antialias=True, align_corners=False)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return pad(x, (0, -new[1] % DIVISOR, 0, -new[0] % DIVISOR)), new


def detections(
    classes: Tensor, masks: Tensor, inside: tuple[int, int], padded: tuple[int, int], size: tuple[int, int]
) -> list[Detection]:
    """Converts the network's outputs for one image to detections, whose masks and boxes are in
    pixels of the original image. Empty masks are left out.

    `classes` (Q,C+1) are the class logits of Q queries; the last class is "nothing". `masks`
    (Q,h,w) are the mask logits of these queries. The other arguments are heights and widths in
    pixels: `padded` those of the network's input, `inside` those of the image in this input,
    without the padding, and `size` those of the original image.
    """
    probs = classes.softmax(-1)[:, :-1].flatten()
    best = probs.topk(min(BEST, len(probs)))
    kinds = classes.shape[-1] - 1
    out = []
    for score, place in zip(best.values.tolist(), best.indices.tolist()):
        query, kind = divmod(place, kinds)
        logits = interpolate(masks[query][None, None], padded, mode="bilinear", align_corners=False)
        logits = logits[..., : inside[0], : inside[1]]
        logits = interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0]
        mask = logits > 0
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if not len(rows):
            continue
        sure = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        x0, y0, x1, y1 = map(float, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        name = COCO[kind] if kinds == len(COCO) else str(kind)
        out.append(Detection(name, score * float(sure), (x0, y0, x1, y1), mask.cpu().numpy()))
    return out


def crop(image: Image.Image, one: Detection) -> Image.Image:
    """Cuts the box of the detection `one` out of an image, and returns this part. Its pixels
    outside the detection's mask are grey."""
    array = np.array(image.convert("RGB"))
    if one.mask is not None:
        array[~one.mask] = GREY
    height, width = array.shape[:2]
    x0, y0, x1, y1 = (round(v) for v in one.box)
    return Image.fromarray(array[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)])


class Colours:
    """Tells the colour of an object by CLIP. Each of the ten colours is represented by the mean of
    the vectors of three sentences that contain the colour; the one nearest to the object's vector
    is taken."""

    SENTENCES = (
        "a photo of a {colour} {name}",
        "a photo of a {colour}-colored {name}",
        "a photo of a {colour} object",
    )

    def __init__(self, clip: Clip):
        self.clip = clip

    @torch.no_grad()
    def __call__(self, image: Image.Image, one: Detection) -> str:
        """Returns the colour of the detected object `one` in the image, one of COLOURS."""
        vector = self.clip.images(pixels.pil([crop(image, one)], self.clip.size))[0]
        texts = [s.format(colour=colour, name=one.name) for colour in COLOURS for s in self.SENTENCES]
        means = unit(self.clip.texts(texts).to(vector).reshape(len(COLOURS), len(self.SENTENCES), -1).mean(1))
        return COLOURS[int((means @ vector).argmax())]


class Mask2Former:
    """A judge that applies rules to the objects that the network Mask2Former (`model`) finds:
    GenEval's rules if `colours` is given, otherwise TIAM's.

    With GenEval's rules, if two boxes of one class have an IoU of `nms` or more, the one with the
    lower score is dropped; 1 drops none. `sides` is (short, long): images are resized until the
    shorter side has `short` pixels, or the longer has `long` pixels if that happens first.
    `identity` is the dict that is written into every line of scores.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        model: Any,
        colours: Colours | None = None,
        nms: float = 1.0,
        sides: tuple[int, int] = (SHORT, LONG),
    ):
        self.identity = identity
        self.model = model
        self.colours = colours
        self.nms = nms
        self.sides = sides

    @torch.no_grad()
    def find(self, image: Image.Image) -> list[Detection]:
        """Returns everything that the network finds in an RGB image, including detections with low
        scores."""
        x, inside = prepared(image, *self.sides)
        weight = next(self.model.parameters())
        out = self.model(pixel_values=x.to(weight.device, weight.dtype))
        return detections(
            out.class_queries_logits[0].float(),
            out.masks_queries_logits[0].float(),
            inside,
            (x.shape[-2], x.shape[-1]),
            (image.height, image.width),
        )

    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Judges RGB images one by one, and returns one result per image. `asked` holds for each
        image what it must contain, or None if this is not known. TIAM's rule then takes it from the
        prompt. The result has no values if the detector does not know a class that is asked for, or
        if GenEval's rules are to be applied and `asked` states nothing to look for."""
        return [self._judge(*one) for one in zip(images, prompts, asked)]

    def _judge(self, image: Image.Image, prompt: str, asked: Asked | None) -> Judged:
        names = names_of(prompt, asked)
        if self.colours is None and not names:
            return Judged({}, (), "the prompt names an object that the detector does not know")
        if self.colours is not None and not known(asked):
            return Judged({}, (), "nothing is known of what the prompt asks for, or not by this detector")
        found = self.find(image)
        if self.colours is None:
            there = objects.tiam(found, names)
            lacks = [name for name, held in zip(names, there) if not held]
            return Judged(
                {"tiam-like": float(all(there))}, found, ", ".join(lacks) and f"lacks {', '.join(lacks)}"
            )
        named: dict[int, str] = {}
        colours = self.colours

        def colour(one: Detection) -> str:
            named[id(one)] = colours(image, one)
            return named[id(one)]

        assert asked is not None
        wrong = objects.geneval(found, asked, nms=self.nms, colour=colour)
        found = [one._replace(colour=named.get(id(one))) for one in found]
        values = {"geneval-style": float(not wrong)}
        if asked.get("layout"):
            values |= objects.layout(found, asked["layout"], image.size, COCO)
        return Judged(values, found, "; ".join(wrong))


def known(asked: Asked | None) -> bool:
    """Returns True if a detector of COCO's classes can judge what is asked for. `asked` must then
    have at least one clause (a requirement on one class, under "include" or "exclude"), and all its
    clauses must be about classes of COCO. None returns False."""
    clauses = [*(asked or {}).get("include", ()), *(asked or {}).get("exclude", ())]
    return bool(clauses) and all(one["class"] in COCO for one in clauses)


def names_of(prompt: str, asked: Asked | None) -> list[str]:
    """Returns the COCO classes of the objects that a prompt asks for. They are taken from the list
    "include" of `asked` or, if it has none, from the prompt, one class for each part of the prompt
    ("a cat and a dog" has two parts). Returns an empty list if one of the objects is not of a COCO
    class."""
    if asked and "include" in asked:
        names = [one["class"] for one in asked["include"]]
    else:
        found = [(part.strip().lower(), objects.class_of(part, COCO)) for part in parts(prompt) or [prompt]]
        # In "an orange crown" the orange is a colour, and no crown is among COCO's classes.
        names = [name if name and part.endswith(name) else "" for part, name in found]
    return names if all(name in COCO for name in names) else []


def load_network(path: Path) -> Any:
    """Loads the Mask2Former network in the folder of the file `path`, and returns it frozen.
    transformers reads the files, because it translates tensor names between its versions. Raises
    ValueError, with a message of one line, if the files cannot be read or a tensor is missing."""
    from transformers import Mask2FormerForUniversalSegmentation

    try:
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(  # nosec B615: no download
            path.parent, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path.parent} cannot be read as a Mask2Former: {str(error).splitlines()[0]}"
        ) from None
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("criterion."))
    if missing:
        raise ValueError(f"{path} lacks the tensor {missing[0]}: another model's file?")
    return model.requires_grad_(False).eval()


def build(
    identity: dict[str, Any],
    *,
    files: Mapping[str, Path],
    device: torch.device | str,
    dtype: torch.dtype,
    nms: float = 1.0,
) -> Mask2Former:
    """Loads the judge called `identity["judge"]`, "geneval-style" or "tiam-like". `files` maps keys
    of WEIGHTS to the paths of its weights. `identity` is the dict with the judge's name, weights,
    dtype and options that is written into every line of scores. "geneval-style" drops the box with
    the lower score if two boxes of one class have an IoU of `nms` or more; 1 drops none."""
    model = load_network(files["mask2former"]).to(device=device, dtype=dtype)
    if "clip-l14" not in files:
        return Mask2Former(identity, model, None, nms)
    path = files["clip-l14"]
    return Mask2Former(
        identity, model, Colours(Clip(network(path, h14()), tokenizer(path.parent), device, dtype)), nms
    )
