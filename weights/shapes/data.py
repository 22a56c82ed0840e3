"""Captioned pictures of coloured shapes: what the embedded model is trained on. A seed and an index give one picture.

128x128 pixels, a light ground, one to three objects of 8 colours x 6 shapes that do not touch. Captions fail in the
ways of captions on the web: some leave the colours out, and more than a third of those of one- and two-object pictures
name one object that is not there, so that a model trained on them may neglect a subject as Stable Diffusion does.
Eight colour-shape combinations and two pairs of shapes never occur: composition can be tested on them.
"""

import math
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
HELD_OUT = {  # colour-shape combinations never drawn or named in training: each colour once, each shape once or twice
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
COUNTS = (0.2, 0.5, 0.3)  # of one, two, three objects
ABSENT = 0.35  # of one- and two-object captions name one more
RADII = {1: (20, 34), 2: (17, 27), 3: (16, 23)}  # pixels, by number of objects


def outline(shape: str, turn: float = 0.0) -> np.ndarray:
    """The shape's polygon (n,2), x to the right and y down, about its centre, within radius 1; turned by `turn` radians."""
    if shape == "circle":
        a = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = 0.92 * np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "square":
        points = 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "triangle":
        a = -math.pi / 2 + 2 * math.pi / 3 * np.arange(3)
        points = 1.08 * np.stack([np.cos(a), np.sin(a)], 1) + (0, 0.22)
    elif shape == "star":  # fat: a thin one does not survive a small VAE
        a = -math.pi / 2 + math.pi / 5 * np.arange(10)
        r = np.where(np.arange(10) % 2 == 0, 1.05, 0.55)
        points = r[:, None] * np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "heart":
        a = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        x = 16 * np.sin(a) ** 3
        y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        points = np.stack([x, -y - 1], 1) / 16.5
    else:  # cross
        w = 0.33
        points = np.array(
            [
                (-w, -1),
                (w, -1),
                (w, -w),
                (1, -w),
                (1, w),
                (w, w),
                (w, 1),
                (-w, 1),
                (-w, w),
                (-1, w),
                (-1, -w),
                (-w, -w),
            ]
        )
    rotation = np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    return points @ rotation.T


@dataclass(frozen=True)
class Object:
    colour: str
    shape: str
    x: float  # centre, pixels
    y: float
    radius: float  # pixels
    turn: float  # radians

    def mask(self) -> np.ndarray:
        """Coverage (SIZE,SIZE) in 0..1, anti-aliased."""
        k = 4  # supersampling
        canvas = Image.new("L", (SIZE * k, SIZE * k))
        points = (outline(self.shape, self.turn) * self.radius + (self.x, self.y)) * k
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
        return np.asarray(canvas.reduce(k), np.float32) / 255


@dataclass(frozen=True)
class Example:
    """One picture with its caption. `named[i]` is an object of the caption: its words' places in `words`, and the
    index of the object drawn, or None when it is absent."""

    objects: tuple[Object, ...]
    ground: tuple[int, int, int]
    words: tuple[str, ...]
    named: tuple[
        tuple[int | None, int, int | None], ...
    ]  # (place of the colour word, of the shape word, object)

    @property
    def caption(self) -> str:
        return " ".join(self.words).replace(" ,", ",")

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """-> picture (SIZE,SIZE,3) uint8 and the objects' masks (n,SIZE,SIZE) float32."""
        picture = np.empty((SIZE, SIZE, 3), np.float32)
        picture[:] = self.ground
        masks = np.stack([o.mask() for o in self.objects])
        for o, mask in zip(self.objects, masks):
            picture += mask[..., None] * (np.array(COLOURS[o.colour], np.float32) - picture)
        return picture.round().astype(np.uint8), masks


def _pairs_allowed(shapes) -> bool:
    return not any(pair <= set(shapes) for pair in HELD_OUT_PAIRS)


def draw_subjects(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """n colour-shape combinations, colours and shapes all different, none held out."""
    while True:
        picks = [COMBINATIONS[i] for i in rng.choice(len(COMBINATIONS), n, replace=False)]
        colours, shapes = zip(*picks)
        if len(set(colours)) == n == len(set(shapes)) and _pairs_allowed(shapes):
            return picks


def place(rng: np.random.Generator, n: int) -> list[tuple[float, float, float]]:
    """n centres and radii (pixels), apart from one another and inside the picture."""
    while True:
        placed = []
        for _ in range(60):
            r = rng.uniform(*RADII[n])
            x, y = rng.uniform(r + 3, SIZE - r - 3, 2)
            if all(math.hypot(x - a, y - b) > 1.12 * (r + c) + 3 for a, b, c in placed):
                placed.append((x, y, r))
                if len(placed) == n:
                    return placed


def example(seed: int, index: int) -> Example:
    """Picture number `index` of the set that `seed` names."""
    rng = np.random.default_rng((seed, index))
    n = 1 + int(rng.choice(3, p=COUNTS))
    absent = int(n < 3 and rng.random() < ABSENT)
    subjects = draw_subjects(rng, n + absent)
    objects = tuple(
        Object(colour, shape, x, y, r, rng.uniform(-0.14, 0.14))
        for (colour, shape), (x, y, r) in zip(subjects[:n], place(rng, n))
    )
    ground = tuple(int(v) for v in np.clip(rng.uniform(222, 250) + rng.uniform(-7, 7, 3), 215, 255))
    words, named = _caption(rng, subjects, n, objects)
    return Example(objects, ground, tuple(words), tuple(named))


def _caption(rng, subjects, n, objects):
    order = [int(i) for i in rng.permutation(len(subjects))]
    colours = rng.random() >= 0.1  # now and then nobody says the colours
    style = rng.random()
    words, named = [], []
    if style < 0.08:
        words += [["a", "picture", "of"], ["an", "image", "of"], ["a", "photo", "of"]][int(rng.integers(3))]
    joint = ["and"] if style < 0.85 else ["with"]
    if len(order) == 2 == n and rng.random() < 0.12:  # where they lie to one another
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
