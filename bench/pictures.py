"""Draws every picture of the README and of the chapters, with the embedded model.

    python -m bench.pictures            # draw all pictures again, into bench/results/pictures
    python -m bench.pictures front      # draw some
    python -m bench.pictures --check    # draw them, compare with the files, and write nothing

The README's pictures are drawn by its commands. Those of a chapter are made by the code blocks of its
text, which save them in outputs/. A picture counts as the same if it differs little: processors round
differently, and a search for noise can then end elsewhere in a single image.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import bench
from bench.figures import GREEN, RED, beside, grid, plot
from minsd import generate
from minsd.weights.shapes import detector

ROOT = Path(__file__).resolve().parents[1]
FOLDER = bench.RESULTS / "pictures"
CHAPTERS = ("minsd", "samplers", "noise", "kernels", "weights")
LIMIT = 8.0  # mean difference of 8-bit values, above which a picture has changed

PROMPT = "a red circle and a blue square"
SUBJECTS = [("red", "circle"), ("blue", "square")]
SEEDS = "0-7"


@contextmanager
def workplace() -> Iterator[Path]:
    """Changes to a new temporary folder for the duration of the `with` block, and yields its path.
    The folder is deleted afterwards. It contains an empty `outputs/`, and links to those folders of
    the checkout that commands of the README use."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "outputs").mkdir()
        for folder in ("weights", "bench"):
            (place / folder).symlink_to(ROOT / folder)
        os.chdir(place)
        try:
            yield place
        finally:
            os.chdir(before)


def drawn(*argv: str) -> list[Image.Image]:
    """Returns the images that `python -m minsd.generate` draws with these arguments."""
    with tempfile.TemporaryDirectory() as name:
        code = generate.main([*argv, "--out", name, "--quiet"])
        if code:
            raise RuntimeError(f"minsd.generate {' '.join(argv)} ended with {code}")
        return [Image.open(path).convert("RGB").copy() for path in sorted(Path(name).glob("*.png"))]


def blocks(text: str, language: str) -> list[str]:
    """Returns the code blocks of a language in a Markdown text, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def verdicts(images: Sequence[Image.Image]) -> list[str | None]:
    """Returns the colour of the frame to draw around each image: green if both subjects of PROMPT
    are in the image, otherwise red."""
    return [GREEN if detector.judge(image, SUBJECTS).no_neglect else RED for image in images]


def numbered(images: Sequence[Image.Image]) -> list[str]:
    return [f"seed {k}" for k in range(len(images))]


# --- the README's pictures ------------------------------------------------------------------------


def front() -> Image.Image:
    """Returns the first picture of the README: the same eight seeds from plain noise, by InitNO,
    and with `--init-noise best`, one row each."""
    rows = {
        "plain noise": drawn(PROMPT, "--seeds", SEEDS),
        "InitNO": drawn(PROMPT, "--seeds", SEEDS, "--init-noise", "initno"),
        "best of a few": drawn(PROMPT, "--seeds", SEEDS, "--init-noise", "best"),
    }
    frames = {name: verdicts(images) for name, images in rows.items()}
    return grid(rows, numbered(rows["plain noise"]), frames=frames)


def objective() -> Image.Image:
    """Returns the README's picture of an objective that the user writes: a row of images from plain
    noise, and a row from noise that was optimised for the README's example objective."""
    source = next(b for b in blocks((ROOT / "README.md").read_text(), "python") if "def left" in b)
    with workplace() as place:
        (place / "mine.py").write_text(source)
        how = ("--objective", "mine.py:left", "--init-noise", "optimize", "--objective-set", "steps=20")
        rows = {
            "plain noise": drawn(PROMPT, "--seeds", SEEDS),
            "optimised\nfor `left`": drawn(PROMPT, "--seeds", SEEDS, *how),
        }
    return grid(rows, numbered(rows["plain noise"]))


def boxed(image: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """Draws (box in fractions, colour) pairs over an image."""
    out = image.copy()
    pen = ImageDraw.Draw(out)
    for (x0, y0, x1, y1), colour in boxes:
        w, h = out.size
        pen.rectangle((x0 * w, y0 * h, x1 * w - 1, y1 * h - 1), outline=colour, width=2)
    return out


def layout() -> Image.Image:
    """Returns the README's picture of a layout, with three rows of images: from the prompt alone,
    by NoiseCollage as published, and by minsd's default method."""
    source = next(b for b in blocks((ROOT / "README.md").read_text(), "json") if "regions" in b)
    seeds = ("--seeds", SEEDS)
    with workplace() as place:
        (place / "layout.json").write_text(source)
        rows = {
            "prompt alone": drawn(PROMPT, *seeds),
            "NoiseCollage,\nas published": drawn(
                "--layout", "layout.json", "--layout-method", "paper", *seeds
            ),
            "minsd": drawn("--layout", "layout.json", *seeds),
        }
    boxes = [((0.0, 0.2, 0.45, 0.8), "#d62728"), ((0.55, 0.2, 1.0, 0.8), "#1f77b4")]
    rows = {name: [boxed(image, boxes) for image in images] for name, images in rows.items()}
    return grid(rows, numbered(rows["minsd"]))


def control() -> Image.Image:
    """Returns the README's picture of a ControlNet and a LoRA, side by side. The ControlNet follows
    outlines. The LoRA makes a hole in every shape."""
    extras = ROOT / "weights" / "shapes" / "extras"
    example = Image.open(extras / "outlines" / "example.png")
    net = ("--controlnet", str(extras / "outlines"))
    by_outline = drawn(
        PROMPT, *net, "--control-image", str(extras / "outlines" / "example.png"), "--seed", "1"
    )
    circle = drawn("a red circle", "--seeds", "1-2")
    pierced = drawn("a red circle", "--lora", str(extras / "pierced.safetensors"), "--seeds", "1-2")
    first = grid({"ControlNet": [example, *by_outline]}, ["outline", "image"])
    second = grid({"LoRA": [circle[0], pierced[0], circle[1], pierced[1]]}, ["without", "with"] * 2)
    return beside([first, second])


def cost() -> Image.Image:
    """Returns a plot of the rate of images without neglect against the UNet rows per image, with
    one point per method. The numbers come from alignment.csv and methods.csv in bench/results."""
    names = {
        "plain": "plain noise",
        "select": "select of 5",
        "noise": "InitNO's noise alone",
        "excite": "Attend-and-Excite",
        "initno": "InitNO",
        "best": "best",
    }
    lines: dict[str, list[tuple[float, float]]] = {}
    bars: dict[str, list[tuple[float, float]]] = {}
    for table in ("alignment", "methods"):
        with (bench.RESULTS / f"{table}.csv").open() as file:
            for row in csv.DictReader(file):
                name = names.get(row["method"])
                if row["group"] != "two" or name is None or name in lines:
                    continue
                lines[name] = [(float(row["unet_rows"]), 100 * float(row["no_neglect"]))]
                low, _, high = row["no_neglect_95"].partition("-")
                bars[name] = [(100 * float(low), 100 * float(high))]
    title = "% of 200 images with both objects [95 %]"
    return plot(lines, "UNet rows per image", title, points=True, bars=bars, size=(620, 280))


def many() -> Image.Image:
    """Returns the README's picture of many prompts: the prompts of its prompts.txt, one row each,
    drawn by shapes-turbo."""
    source = blocks((ROOT / "README.md").read_text(), "text")[0]
    with workplace() as place:
        (place / "prompts.txt").write_text(source)
        images = drawn("--prompts", "prompts.txt", "--seeds", SEEDS, "--model", "shapes-turbo")
    names = [re.sub(r" (and|above) ", r"\n\1 ", prompt) for prompt in source.splitlines()]
    return grid({name: images[8 * k : 8 * k + 8] for k, name in enumerate(names)}, side=64)


def methods() -> Image.Image:
    """Returns the README's picture of the methods that need no layout, one column each. The two
    rows are seeds with which plain sampling leaves out an object of the prompt."""
    how = {
        "plain": [],
        "best": ["--init-noise", "best"],
        "select": ["--init-noise", "select", "--candidates", "16"],
        "initno": ["--init-noise", "initno"],
        "excite": ["--excite"],
    }
    others = ("syngen", "divide", "contrast", "overlap", "saga", "nlg")
    how |= {name: ["--objective", name] for name in others}
    columns = {name: drawn(PROMPT, "--seeds", "1,3", *options) for name, options in how.items()}
    return grid(
        {f"seed {s}": [c[k] for c in columns.values()] for k, s in enumerate((1, 3))}, list(columns), side=72
    )


README_PICTURES: dict[str, Callable[[], Image.Image]] = {
    "front": front,
    "objective": objective,
    "layout": layout,
    "control": control,
    "cost": cost,
    "many": many,
    "methods": methods,
}

# --- the chapters' pictures ------------------------------------------------------------------------


def chapter(folder: str) -> dict[str, Image.Image]:
    """Runs the Python blocks of a chapter, FOLDER/README.md, in one namespace. Returns the pictures
    that the blocks save in outputs/, by name. An assertion in a block that fails raises
    AssertionError."""
    path = ROOT / folder / "README.md"
    text = path.read_text()
    names = {"__name__": "chapter"}
    with workplace() as place:
        for source in blocks(text, "python"):
            line = text[: text.index(source)].count("\n")  # so that a traceback names the line
            exec(compile("\n" * line + source, str(path), "exec"), names)
        return {
            file.stem: Image.open(file).convert("RGB").copy()
            for file in sorted((place / "outputs").glob("*.png"))
        }


# --- files -----------------------------------------------------------------------------------------


def difference(image: Image.Image, path: Path) -> float:
    """Returns the mean difference, in 8-bit values, of an image from a file, or infinity if the file
    is missing or has another size."""
    if not path.is_file():
        return float("inf")
    kept = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    now = np.asarray(image.convert("RGB"), dtype=float)
    return float(np.abs(kept - now).mean()) if kept.shape == now.shape else float("inf")


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture to a file with few colours (64 or 128), because the repository contains the
    pictures and small files are wanted there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = 64 if image.width * image.height > 100_000 else 128
    how = {"method": Image.Quantize.MEDIANCUT, "kmeans": 2, "dither": Image.Dither.NONE}
    image.quantize(colours, **how).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choices = [*README_PICTURES, *CHAPTERS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(choices)} (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the files; write nothing")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(choices)
    if unknown:
        parser.error(f"there is no picture {min(unknown)}: choose from {', '.join(choices)}")
    changed = []
    for name in args.names or choices:
        found = {name: README_PICTURES[name]()} if name in README_PICTURES else chapter(name)
        for one, image in found.items():
            path = FOLDER / f"{one}.png"
            apart = difference(image, path)
            print(f"{one}: {'new' if apart == float('inf') else f'differs by {apart:.2f}'}")
            if apart > LIMIT:
                changed.append(one)
            if not args.check:
                save(image, path)
    if args.check and changed:
        print(
            f"changed: {', '.join(changed)}: look at them, then run python -m bench.pictures", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
