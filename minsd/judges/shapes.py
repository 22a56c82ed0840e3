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
    """Returns what a caption in the training data's grammar asks for, as a dict (`objects.Asked`).
    Returns None for any other caption.

    The grammar: an optional "a photo of", then phrases "a [colour] shape" joined by commas, "and",
    "with", or by one relation such as "left of" between two.
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
    """Returns the clause, in GenEval's form, that asks for one object of a shape and, unless
    `colour` is None, of that colour."""
    return {"class": shape, "count": 1} | ({} if colour is None else {"color": colour})


def detections(bodies: Sequence[detector.Found]) -> list[Detection]:
    """Converts the detector's bodies (connected drawn objects) to Detections. The score is the
    overlap of the body with the most similar template. A body that is badly drawn gets the class
    "malformed", and one with two colours the class "hybrid"; no prompt asks for these classes."""
    out = []
    for body in bodies:
        name = body.shape if body.iou >= detector.IOU else "malformed"
        name = "hybrid" if len(body.colours) == 2 else name
        out.append(Detection(name, body.iou, body.box, colour="+".join(body.colours) or None))
    return out


class Shapes:
    """The judge of the embedded model's images, which show coloured shapes."""

    def __init__(self, identity: dict[str, Any], **unused: Any) -> None:
        self.identity = identity

    def pictures(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[Asked | None]
    ) -> list[Judged]:
        """Judges RGB images. What an image must show comes from `asked` or, if that is None, from
        the prompt. An image has no values if its prompt asks for no shapes."""
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
        """Returns those values of an image of `size` (width, height) that follow from the
        detections `found` alone: `right` and, if `asked` has a layout, the values of
        `objects.layout`."""
        values = {"right": float(not objects.geneval(found, asked, sure=(0, 0)))}
        if asked.get("layout"):
            values |= objects.layout(found, asked["layout"], size, SHAPES)
        return values


build = Shapes
