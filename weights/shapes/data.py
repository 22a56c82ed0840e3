"""Makes captioned images of coloured shapes, the training set of the embedded model. A seed and an
index determine one image.

Images have 128x128 pixels, a light background, and one to three objects of 8 colours x 6 shapes
that do not touch. Captions have the flaws of captions on the web: some omit the colours, and more
than a third of those for one or two objects name one object that is not in the image. A model
trained on them may neglect a subject, as Stable Diffusion does. Eight colour-shape combinations and
two pairs of shapes never occur, so that composition can be tested on them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
COLOURS = {  # 8-bit RGB
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (245, 135, 25),
    "purple": (140, 55, 180),
    "pink": (250, 130, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# Combinations that never occur in images or captions of the training set. Each colour
# occurs in one of them, each shape in one or two.
HELD_OUT = {
    ("red", "star"),
    ("green", "heart"),
    ("blue", "circle"),
    ("yellow", "square"),
    ("orange", "cross"),
    ("purple", "triangle"),
    ("pink", "circle"),
    ("black", "heart"),
}
HELD_OUT_PAIRS = {frozenset(("circle", "cross")), frozenset(("triangle", "heart"))}
COMBINATIONS = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
COUNTS = (0.2, 0.5, 0.3)  # fractions of images with one, two, three objects
ABSENT = 0.35  # fraction of captions for one or two objects that name one object too many
RADII = {1: (20, 34), 2: (17, 27), 3: (16, 23)}  # pixels, by number of objects


def outline(shape: str, turn: float = 0.0) -> np.ndarray:
    """Returns the outline of a shape ("circle", "square", ...) as a polygon (n,2) of n points (x,
    y), where x points to the right and y down. The centre is (0, 0), the radius about 1. The
    polygon is rotated by `turn` radians."""
    if shape == "circle":
        a = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = 0.92 * np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "square":
        points = 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "triangle":
        a = -math.pi / 2 + 2 * math.pi / 3 * np.arange(3)
        points = 1.08 * np.stack([np.cos(a), np.sin(a)], 1) + (0, 0.22)
    elif shape == "star":  # with thick arms, because a small VAE loses thin ones
        a = -math.pi / 2 + math.pi / 5 * np.arange(10)
        r = np.where(np.arange(10) % 2 == 0, 1.05, 0.55)
        points = r[:, None] * np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "heart":
        a = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        x = 16 * np.sin(a) ** 3
        y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        points = np.stack([x, -y - 1], 1) / 16.5
    else:  # cross
        w = 0.33  # half the width of an arm
        x = (-w, w, w, 1, 1, w, w, -w, -w, -1, -1, -w)
        y = (-1, -1, -w, -w, w, w, 1, 1, w, w, -w, -w)
        points = np.stack([x, y], 1)
    rotation = np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    return points @ rotation.T


@dataclass(frozen=True)
class Object:
    """One object in an image: a shape with its colour, place and size."""

    colour: str
    shape: str
    x: float  # centre, pixels
    y: float
    radius: float  # pixels
    turn: float  # radians

    def mask(self) -> np.ndarray:
        """Returns the mask of the object, (SIZE,SIZE) float32: for each pixel, the fraction of it
        that the object covers, from 0 to 1."""
        k = 4  # supersampling
        canvas = Image.new("L", (SIZE * k, SIZE * k))
        points = (outline(self.shape, self.turn) * self.radius + (self.x, self.y)) * k
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
        return np.asarray(canvas.reduce(k), np.float32) / 255


@dataclass(frozen=True)
class Example:
    """One image of the training set with its caption.

    `named` has one item for each object that the caption names: (colour_place, shape_place, index).
    The first two are positions in `words`, that of the object's colour word (None if the caption
    omits colours) and that of its shape word. `index` is the object's position in `objects`, or
    None if the caption names an object that is not in the image.
    """

    objects: tuple[Object, ...]
    ground: tuple[int, int, int]  # background colour, 8-bit RGB
    words: tuple[str, ...]
    named: tuple[tuple[int | None, int, int | None], ...]

    @property
    def caption(self) -> str:
        return " ".join(self.words).replace(" ,", ",")

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws the image. Returns (picture, masks). `picture` is the image, (SIZE,SIZE,3) uint8.
        `masks` (n,SIZE,SIZE) float32 has one mask for each of the n objects: the fraction of each
        pixel that the object covers."""
        picture = np.empty((SIZE, SIZE, 3), np.float32)
        picture[:] = self.ground
        masks = np.stack([o.mask() for o in self.objects])
        for o, mask in zip(self.objects, masks):
            picture += mask[..., None] * (np.array(COLOURS[o.colour], np.float32) - picture)
        return picture.round().astype(np.uint8), masks


def _pairs_allowed(shapes: Iterable[str]) -> bool:
    """Returns True if `shapes`, the names of the shapes in one image, contain no pair of
    `HELD_OUT_PAIRS`. These pairs of shapes never occur together in training images."""
    return not any(pair <= set(shapes) for pair in HELD_OUT_PAIRS)


def draw_subjects(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """Chooses n (colour, shape) pairs at random. No two of them have the same colour or the same
    shape. The choice leaves out what training images never have: the (colour, shape) pairs in
    `HELD_OUT`, and the pairs of shapes in `HELD_OUT_PAIRS`."""
    while True:
        picks = [COMBINATIONS[i] for i in rng.choice(len(COMBINATIONS), n, replace=False)]
        colours, shapes = zip(*picks)
        if len(set(colours)) == n == len(set(shapes)) and _pairs_allowed(shapes):
            return picks


def place(rng: np.random.Generator, n: int) -> list[tuple[float, float, float]]:
    """Chooses places and sizes at random for n objects (1 to 3) that lie inside the image and do
    not touch. Returns a list of n tuples (x, y, radius) in pixels."""
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = rng.uniform(*RADII[n])
            x, y = rng.uniform(r + 3, SIZE - r - 3, 2)
            if all(math.hypot(x - a, y - b) > 1.12 * (r + c) + 3 for a, b, c in placed):
                placed.append((x, y, r))
                if len(placed) == n:
                    return placed


def example(seed: int, index: int) -> Example:
    """Makes one image of a training set, with its caption. `seed` determines the training set, and
    `index` is the number of the image in it. The same two numbers always give the same image."""
    rng = np.random.default_rng((seed, index))
    n = 1 + int(rng.choice(3, p=COUNTS))
    absent = int(n < 3 and rng.random() < ABSENT)
    subjects = draw_subjects(rng, n + absent)
    objects = tuple(
        Object(colour, shape, x, y, r, rng.uniform(-0.14, 0.14))
        for (colour, shape), (x, y, r) in zip(subjects[:n], place(rng, n))
    )
    red, green, blue = np.clip(rng.uniform(222, 250) + rng.uniform(-7, 7, 3), 215, 255)
    words, named = _caption(rng, subjects, n, objects)
    return Example(objects, (int(red), int(green), int(blue)), tuple(words), tuple(named))


def _caption(
    rng: np.random.Generator, subjects: list[tuple[str, str]], n: int, objects: tuple[Object, ...]
) -> tuple[list[str], list[tuple[int | None, int, int | None]]]:
    """Makes a caption at random that names all `subjects`, a list of (colour, shape) pairs. The
    first n subjects are the `objects` in the image, in the same order; the other subjects are not
    in the image. Returns (words, named), as in `Example`."""
    order = [int(i) for i in rng.permutation(len(subjects))]
    colours = rng.random() >= 0.1  # a tenth of the captions omit the colours
    style = rng.random()
    words: list[str] = []
    named: list[tuple[int | None, int, int | None]] = []
    if style < 0.08:
        words += [["a", "picture", "of"], ["an", "image", "of"], ["a", "photo", "of"]][int(rng.integers(3))]
    joint = ["and"] if style < 0.85 else ["with"]
    if len(order) == 2 == n and rng.random() < 0.12:  # state the relative position
        a, b = (objects[i] for i in order)
        if abs(a.x - b.x) > abs(a.y - b.y):
            joint = ["left" if a.x < b.x else "right", "of"]
        else:
            joint = ["above" if a.y < b.y else "below"]
    for k, i in enumerate(order):
        if k:
            words += [","] if k < len(order) - 1 else joint
        colour, shape = subjects[i]
        words.append("an" if colours and colour == "orange" else "a")
        colour_place = None
        if colours:
            colour_place = len(words)
            words.append(colour)
        named.append((colour_place, len(words), i if i < n else None))
        words.append(shape)
    return words, named
