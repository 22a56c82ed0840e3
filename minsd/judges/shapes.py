"""The embedded model's judge: applies GenEval's rules to the shapes that weights/shapes/detector.py
finds in an image's pixels.

A caption in the training data's grammar states by itself what the image must show; a prompt set may
ask for more. The columns are `right` (by GenEval's rules, 0 or 1), `no_neglect` (no object is
missing, merged or wrongly coloured), `strict` (the image shows exactly what was asked for, and
nothing else), and for layouts those of `objects.layout`.
"""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from minsd.judges import Judged, objects
from minsd.judges.objects import Asked, Detection
from minsd.weights.shapes import detector
from minsd.weights.shapes.data import COLOURS, SHAPES

PREFIX = re.compile(r"(?:a photo of|a picture of|an image of)\s+")
PHRASE = re.compile(rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})")
JOINT = re.compile(rf"\s*(, and|,|and|with|{'|'.join(objects.RELATIONS)})\s+")


def read_caption(caption: str) -> dict[str, Any] | None:
    """Returns what a caption asks for, as a dict (`objects.Asked`), if the caption has the form of
    those in the training data. Otherwise returns None.

    Such a caption is a list of phrases "a SHAPE" or "a COLOUR SHAPE", joined by commas, "and" or
    "with", or two phrases joined by a relation such as "left of". "a photo of", "a picture of" or
    "an image of" may precede it.
    """
    text = PREFIX.sub("", caption.strip().lower(), count=1)
    phrases: list[tuple[str | None, str]] = []
    joints: list[str] = []
    at = 0
    while (phrase := PHRASE.match(text, at)) is not None:
        phrases.append((phrase[1], phrase[2]))
        at = phrase.end()
        joint = JOINT.match(text, at)
        if joint is None:
            break
        joints.append(joint[1])
        at = joint.end()
    if not phrases or at != len(text) or len(joints) != len(phrases) - 1:
        return None
    clauses = [clause(colour, shape) for colour, shape in phrases]
    if not set(joints) & set(objects.RELATIONS):
        return {"include": clauses}
    if len(phrases) != 2:
        return None
    first, second = clauses
    return {"include": [second, first | {"position": [joints[0], 0]}]}


def clause(colour: str | None, shape: str) -> dict[str, Any]:
    """Returns a clause of `objects.Asked`, in GenEval's form, that asks for one object of this
    shape and colour. If `colour` is None, any colour will do."""
    return {"class": shape, "count": 1} | ({} if colour is None else {"color": colour})


def detections(bodies: Sequence[detector.Found]) -> list[Detection]:
    """Converts bodies (connected groups of pixels, which the embedded model's detector finds) to
    detections. The class is the body's shape, "malformed" for a badly drawn body, or "hybrid" for a
    body of two colours; no prompt asks for the last two. The score is the intersection over union
    of the body and the outline of its shape."""
    out = []
    for body in bodies:
        name = body.shape if body.iou >= detector.IOU else "malformed"
        name = "hybrid" if len(body.colours) == 2 else name
        out.append(Detection(name, body.iou, body.box, colour="+".join(body.colours) or None))
    return out


class Shapes:
    """The judge of images that show coloured shapes, such as those of the embedded model. It needs
    no weights. `identity` is the dict that is written into every line of scores."""

    def __init__(self, identity: dict[str, Any], **unused: Any) -> None:
        self.identity = identity

    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Judges RGB images, and returns one result per image. What an image must show is taken
        from the list "include" in the image's entry of `asked` or, if there is none, from the
        prompt. The result has no values if neither asks for shapes."""
        return [self._judge(*one) for one in zip(images, prompts, asked)]

    def _judge(self, image: Image.Image, prompt: str, asked: Asked | None) -> Judged:
        asked = asked if asked and "include" in asked else {**(asked or {}), **(read_caption(prompt) or {})}
        clauses = asked.get("include", ())
        subjects = [(one.get("color"), one["class"]) for one in clauses for _ in range(one["count"])]
        found = detections(detector.find(image))
        if not subjects or any(shape not in SHAPES for _, shape in subjects):
            return Judged({}, found, "the prompt asks for no shapes")
        verdict = detector.judge(image, subjects)
        return Judged(
            self.rules(found, asked, image.size)
            | {"no_neglect": float(verdict.no_neglect), "strict": float(verdict.strict)},
            found,
            "; ".join(objects.geneval(found, asked, sure=(0, 0))) or verdict.kind,
        )

    @staticmethod
    def rules(found: Sequence[Detection], asked: Asked, size: tuple[int, int]) -> dict[str, float]:
        """Returns those values of an image that follow from its detections `found` alone, as a dict
        column -> value: `right`, which is 1 if the image is right by GenEval's rules, otherwise 0,
        and, if `asked` has a layout, the columns of `objects.layout`. `size` is the (width, height)
        of the image in pixels."""
        values = {"right": float(not objects.geneval(found, asked, sure=(0, 0)))}
        if asked.get("layout"):
            values |= objects.layout(found, asked["layout"], size, SHAPES)
        return values


build = Shapes
