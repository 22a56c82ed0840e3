"""Rules that decide from detected objects whether an image is right: those of GenEval, of TIAM, and
of layouts.

GenEval (Ghosh et al. 2023, arXiv 2310.11513) asks for objects with a number, a colour and a
relative position; TIAM (Grimal et al. 2024, arXiv 2307.05134) asks that every named object is in
the image. All functions here are pure functions of detections and of what was asked for, so they
serve every detector. Images are never opened here, and no network is used.

An `Asked` is one line of GenEval's evaluation_metadata.jsonl: `include` and `exclude` list clauses
{"class", "count", "color"?, "position"?: [relation, number of an earlier clause]}. Two keys are
this program's own: `bodies` is the exact number of objects in the image, of any class; `layout`
holds the contents of a layout.json whose regions the image was to fill.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Asked = Mapping[str, Any]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, end exclusive

COCO = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)  # the 80 classes of COCO in order, under GenEval's names
COLOURS = tuple("red orange yellow green blue purple pink brown black white".split())
RELATIONS = ("left of", "right of", "above", "below")

SURE = 0.3  # GenEval: a detection counts above this score
SURE_TO_COUNT = 0.9  # the same, for prompts with the tag `counting`
TIAM_SURE = 0.25
MOST = 16  # detections per class that GenEval looks at
MARGIN = 0.1  # fraction of the two objects' sizes that their centres may differ without a relation


class Detection(NamedTuple):
    """One object that a detector found in an image. `name` is the object's class, `score` the
    detector's confidence from 0 to 1."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = None  # (H,W) bool
    colour: str | None = None

    def row(self) -> dict[str, Any]:
        """Returns the detection, without its mask, as the dict that is written to scores.jsonl."""
        values = {"name": self.name, "score": round(self.score, 4), "box": [round(v, 1) for v in self.box]}
        return values | ({} if self.colour is None else {"colour": self.colour})


# --- what is asked for ----------------------------------------------------------------------------


def check(asked: Asked) -> None:
    """Raises ValueError, with a message of one line, if `asked` does not have the form that the
    head of this file describes."""
    for key in ("include", "exclude"):
        clauses = asked.get(key, [])
        if not isinstance(clauses, list):
            raise ValueError(f"{key!r} must be a list of clauses")
        for number, clause in enumerate(clauses):
            problem = _problem(clause, number)
            if problem:
                raise ValueError(f"clause {number + 1} of {key!r} {problem}")
    if not _whole(asked.get("bodies", 0), 0, 1000):
        raise ValueError("'bodies' must be a whole number from 0 to 1000")
    if "layout" in asked and not _is_layout(asked["layout"]):
        raise ValueError("'layout' must hold regions with a prompt and a box [x0, y0, x1, y1] or a mask")


def _problem(clause: Any, number: int) -> str:
    """Returns what is wrong with a clause, as the second half of a sentence whose first half names
    the clause. Returns an empty string if nothing is wrong. `number` is the clause's index in its
    list."""
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return 'needs a "class", such as {"class": "cat", "count": 1}'
    if not _whole(clause.get("count"), 1, 1000):
        return 'needs a "count" from 1 to 1000'
    if not isinstance(clause.get("color", ""), str):
        return 'has a "color" that is no text'
    place = clause.get("position", [RELATIONS[0], 0])
    if not isinstance(place, list) or len(place) != 2 or place[0] not in RELATIONS:
        return f'needs a "position" of the form [relation, number]; relations are {", ".join(RELATIONS)}'
    if "position" in clause and not _whole(place[1], 0, number - 1):
        return 'has a "position" without the number of an earlier clause; the first is 0'
    return ""


def _is_layout(layout: Any) -> bool:
    """Returns True if `layout` has the form of a layout: a dict whose "regions" are a list of
    dicts, each with a caption under "prompt". A region may have no box. If it has one, the box must
    be four numbers [x0, y0, x1, y1] with x0 < x1 and y0 < y1."""
    regions = layout.get("regions") if isinstance(layout, Mapping) else None
    return isinstance(regions, list) and all(
        isinstance(region, Mapping)
        and isinstance(region.get("prompt"), str)
        and ("box" not in region or _is_box(region["box"]))
        for region in regions
    )


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
    return numbers and box[0] < box[2] and box[1] < box[3]


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# --- boxes ----------------------------------------------------------------------------------------


def iou(a: Box, b: Box, more: float = 0.0) -> float:
    """Returns the intersection over union of two boxes (x0, y0, x1, y1). `more` is added to the
    width and height of each box and of their intersection. It is 0 if x1 and y1 are the first pixel
    outside the box, and 1 for GenEval's rule, which takes them for the last pixel inside."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + more, 0.0) * max(y1 - y0 + more, 0.0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if union > 0 else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """Returns how box `a` lies relative to box `b`, a set of none, one or two of `RELATIONS`, such
    as "left of".

    The rule is GenEval's. Along each axis, take the distance between the two centres, and subtract
    MARGIN times the sum of the boxes' sizes along this axis. The relation along this axis holds if
    the result is more than half of the distance between the centres in the plane.
    """
    boxes = np.array([a, b], float).reshape(2, 2, 2)  # (box, corner, axis)
    centres = boxes.mean(1)
    distance = centres[0] - centres[1]
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    left = np.maximum(np.abs(distance) - MARGIN * sizes, 0) * np.sign(distance)
    if (np.abs(left) < 1e-3).all():
        return set()
    x, y = left / np.linalg.norm(distance)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, true in zip(RELATIONS, holds) if true}


def kept(found: Iterable[Detection], sure: float, nms: float = 1.0) -> dict[str, list[Detection]]:
    """Returns a dict class -> list of this class's detections that GenEval counts, best score
    first. They have a score above `sure`, and are at most MOST per class.

    A detection is also dropped if its IoU with a better detection of its class is `nms` or more.
    The default 1.0 drops none, as GenEval's own program does.
    """
    out: dict[str, list[Detection]] = {}
    best_first = sorted(found, key=lambda detection: -detection.score)
    for name in dict.fromkeys(detection.name for detection in best_first):
        left = [one for one in best_first if one.name == name and one.score > sure][:MOST]
        out[name] = []
        for one in left:
            if nms == 1.0 or all(iou(one.box, other.box, 1.0) < nms for other in out[name]):
                out[name].append(one)
    return out


# --- right or wrong -------------------------------------------------------------------------------

Colour = Callable[[Detection], str | None]


def geneval(
    found: Sequence[Detection],
    asked: Asked,
    *,
    sure: tuple[float, float] = (SURE, SURE_TO_COUNT),
    nms: float = 1.0,
    colour: Colour = lambda detection: detection.colour,
) -> list[str]:
    """Applies GenEval's rules to an image. Returns the reasons why the image is wrong; an empty
    list means that it is right. `found` are the detections in the image, and `asked` states what
    the image must contain.

    `sure` holds two thresholds. A detection counts only if its score is above the first, or above
    the second if `asked` has the tag "counting". If two detections of a class have an IoU of `nms`
    or more, the one with the lower score is dropped; 1 drops none. `colour` is called to get a
    detection's colour, only for detections whose colour matters.
    """
    objects = kept(found, sure[asked.get("tag") == "counting"], nms)
    wrong = []
    taken: list[list[Detection]] = []  # per clause; empty where the clause failed
    for clause in asked.get("include", ()):
        name = clause["class"]
        count = clause["count"]
        these = objects.get(name, [])[:count]
        problem = f"expected {name}>={count}, found {len(these)}" if len(these) < count else ""
        if not problem and "color" in clause:
            colours = [colour(one) for one in these]
            if colours.count(clause["color"]) < count:
                seen = ", ".join(one or "none" for one in colours)
                problem = f"expected {clause['color']} {name}>={count}, found {seen}"
        if not problem and "position" in clause:
            relation, other = clause["position"]
            if not taken[other]:
                problem = f"no target for {name} to be {relation}"
            elif not all(relation in relations(a.box, b.box) for a in these for b in taken[other]):
                problem = f"expected {name} {relation} target"
        if problem:
            wrong.append(problem)
        taken.append([] if problem else these)
    for clause in asked.get("exclude", ()):
        if len(objects.get(clause["class"], ())) >= clause["count"]:
            wrong.append(f"expected {clause['class']}<{clause['count']}")
    if "bodies" in asked and len(found) != asked["bodies"]:
        wrong.append(f"expected {asked['bodies']} bodies, found {len(found)}")
    return wrong


def tiam(found: Iterable[Detection], names: Sequence[str]) -> list[bool]:
    """Returns for each class in `names` whether the image shows an object of this class, that is,
    whether `found` has a detection of this class with a score of at least TIAM_SURE. By TIAM's rule
    without colours, the image is right if all are True."""
    there = {one.name for one in found if one.score >= TIAM_SURE}
    return [name in there for name in names]


# --- layouts --------------------------------------------------------------------------------------


def class_of(caption: str, names: Iterable[str]) -> str | None:
    """Returns the class that a caption is about, one of `names`, or None if the caption contains
    none of them. If it contains several, the one that ends last is taken: "dog" for "a cat on a
    dog". If two end at the same place, the longer one is taken: "teddy bear" before "bear"."""
    text = f" {caption.lower()} "
    places = {name: text.rfind(f" {name} ") + len(name) for name in names if f" {name} " in text}
    return max(places, key=lambda name: (places[name], len(name)), default=None)


def boxes_of(layout: Mapping[str, Any], width: int, height: int) -> list[Box]:
    """Returns the boxes of a layout's regions, (x0, y0, x1, y1) in pixels of an image of `width` x
    `height`. In the layout, which has the form of layout.json, they may also be given as fractions
    of the image. Returns an empty list if a region has no box, because it has a mask."""
    out = []
    for region in layout["regions"]:
        if "box" not in region:
            return []
        x0, y0, x1, y1 = region["box"]
        if max(region["box"]) <= 1:
            x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
        out.append((x0, y0, x1, y1))
    return out


def layout(
    found: Iterable[Detection], asked: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]
) -> dict[str, float]:
    """Compares the detections `found` in an image with the boxes of the layout `asked`. `size` is
    the (width, height) of the image, and `names` are the detector's classes. Returns a dict column
    -> value, which is empty if a region of the layout has no box.

    The class of a region is the one that its caption names. Each region gets at most one detection
    of its class, and each detection belongs to at most one region, such that the sum of the IoUs of
    region and detection is greatest. A region without a detection has an IoU of 0. The columns are

        box_iou    mean IoU of the regions
        box_half   fraction of regions with an IoU of at least 0.5
        box_any    fraction of regions whose class is detected anywhere in the image
        strays     number of detections of the regions' classes that belong to no region
    """
    boxes = boxes_of(asked, *size)
    if not boxes:
        return {}
    classes = [class_of(region["prompt"], names) for region in asked["regions"]]
    objects = [one for several in kept(found, SURE).values() for one in several if one.name in classes]
    objects = sorted(objects, key=lambda one: -one.score)[:MOST]

    @cache
    def best(region: int, used: int) -> tuple[float, ...]:
        """Finds the best assignment of detections to the regions from index `region` to the last,
        and returns the IoUs of these regions. `used` marks the detections that are taken already:
        bit k is set if detection k is."""
        if region == len(boxes):
            return ()
        options = [(0.0, *best(region + 1, used))]
        for k, one in enumerate(objects):
            overlap = iou(boxes[region], one.box)
            if one.name == classes[region] and overlap and not used >> k & 1:
                options.append((overlap, *best(region + 1, used | 1 << k)))
        return max(options, key=sum)

    values = best(0, 0)
    n = len(boxes)
    return {
        "box_iou": sum(values) / n,
        "box_half": sum(value >= 0.5 for value in values) / n,
        "box_any": sum(name in {one.name for one in objects} for name in classes) / n,
        "strays": float(len(objects) - sum(value > 0 for value in values)),
    }
