"""Where does the embedded model attend, and does that predict what it will draw?

    python -m bench.attention_maps [--csv]

First, on rendered images that training never saw, noised to each timestep: do the 16x16 maps of a
caption's colour and shape words lie on the object that the words name? `argmax_hits` is the
fraction of the maps whose maximum is inside the object's outline. `share_inside` is the fraction of
the map's weight inside the outline; compare it with `area`, the fraction of the image that the
object covers, since a map without information would have that fraction inside.

Second, at the first timestep of a run, before anything is drawn: how far do InitNO's response and
conflict losses (noise/losses.py) vary between noises, and how do they correlate with the detector's
verdict on the finished image? Only if they correlate can optimising them help.
"""

import math
import os
from collections.abc import Sequence
from multiprocessing.pool import Pool
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Row, loaded, parser, pool, print_table, write_csv
from bench.shapes import BATCH, Subjects, cases, sentence
from minsd.attention import AttentionRecorder
from minsd.noise import losses
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion
from minsd.weights.shapes import data, detector

TIMESTEPS = (981, 958, 900, 800, 700, 600, 500, 400, 300, 200, 100, 1)
KINDS = ("colour", "shape")
CELLS = 16  # per side, of latents and maps
# What the losses are computed on -> which of a subject's words (colour, shape)
WORDS = {"shape": slice(1, 2), "colour": slice(0, 1), "both": slice(0, 2)}


def cross_maps(sd: StableDiffusion, prompts: list[str], x: Tensor, t: int | float) -> AttentionRecorder:
    """Evaluates the UNet once on latents x (B,4,16,16) at timestep t, with one prompt per image and
    without guidance. Returns the recorder, which holds the attention maps."""
    record = AttentionRecorder(only=True)
    with torch.no_grad():
        sd.unet(x, t, sd.encode_prompt(prompts), record=record)
    return record


# --- do maps lie on objects? ----------------------------------------------------------------------


class Word(NamedTuple):
    """A colour word or shape word of a caption, with the place in the image of the object that it
    names."""

    position: int  # of its token
    kind: str
    cells: Tensor  # (16,16), how much of each cell the object covers


def words_of(example: data.Example, masks: np.ndarray) -> list[Word]:
    cells = F.avg_pool2d(torch.from_numpy(masks), data.SIZE // CELLS)  # (objects, 16, 16)
    words = []
    for *places, index in example.named:
        for kind, place in zip(KINDS, places):
            if index is not None and place is not None:
                # token 0 is the start; commas are tokens
                words.append(Word(place + 1, kind, cells[index]))
    return words


def on_rendered_images(sd: StableDiffusion, n: int) -> list[Row]:
    """Measures, over n rendered images that are not in the training set, how well attention maps
    lie on the objects that words name. Returns one row per timestep and kind of word (colour,
    shape)."""
    examples = [data.example(91_000, i) for i in range(n)]
    images = []
    words = []
    for example in examples:
        image, masks = example.render()
        images.append(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
        words.append(words_of(example, masks))
    with torch.no_grad():
        latents = sd.vae.encode(torch.cat(images))[0] * sd.config.vae.scaling_factor
    eps = noise(range(n), latents.shape[1:])
    captions = [example.caption for example in examples]
    rows = []
    for t in TIMESTEPS:
        x = sd.schedule.add_noise(latents, eps, t)
        parts = [slice(i, i + 50) for i in range(0, n, 50)]
        maps = torch.cat([cross_maps(sd, captions[part], x[part], t).cross for part in parts])
        for kind in KINDS:
            rows.append(
                {"t": t, "abar": round(sd.schedule.abar(t), 4), "words": kind, **overlap(maps, words, kind)}
            )
    return rows


def overlap(maps: Tensor, words: list[list[Word]], kind: str) -> Row:
    """Returns, as columns of a row, how well the maps of all words of one kind ("colour" or
    "shape") lie on the objects that the words name. `maps` is (images,16,16,77), and `words` lists
    the words of each image's caption."""
    hits, inside, area = [], [], []
    for image, mine in zip(maps, words):
        for word in mine:
            if word.kind == kind:
                m = image[..., word.position]
                hits.append(float(word.cells.flatten()[m.argmax()] > 0))
                inside.append(float((m * word.cells).sum() / m.sum()))
                area.append(float(word.cells.mean()))
    means = {"argmax_hits": hits, "share_inside": inside, "area": area}
    return {"n": len(hits)} | {name: round(float(np.mean(values)), 3) for name, values in means.items()}


# --- do losses predict verdicts? ------------------------------------------------------------------


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Returns (correlation, p): Spearman's rank correlation of a and b, in which equal values share
    their mean rank, and its two-sided p-value by the normal approximation."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0, 1.0
    r = float(np.corrcoef(ranks(a), ranks(b))[0, 1])
    return r, math.erfc(abs(r) * math.sqrt(len(a) - 1) / math.sqrt(2))


class Outcome(NamedTuple):
    """InitNO's losses of one noise at the first timestep, and the detector's verdict on the image
    drawn from it."""

    losses: dict[str, tuple[float, float]]  # name in WORDS -> response, conflict
    verdict: detector.Verdict


def losses_on(
    sd: StableDiffusion, prompts: list[str], subjects: list[Subjects], words: slice, record: AttentionRecorder
) -> list[tuple[float, float]]:
    """Returns a (response loss, conflict loss) pair for each image: InitNO's two losses, computed
    from the attention maps in `record`.

    `prompts` and `subjects` have one entry per image. A subject is a (colour, shape) pair of words.
    The slice `words` is applied to each pair, and selects which of the two words count: only their
    maps enter the losses.
    """
    places = [
        [sd.text.positions(prompt, word) for subject in these for word in subject[words]]
        for prompt, these in zip(prompts, subjects)
    ]
    maps = losses.subject_maps(record.cross, losses.selector(places))
    response = losses.cross_response(maps)
    conflict = losses.self_conflict(losses.claims(record.self, losses.peaks(maps)))
    return list(zip(response.tolist(), conflict.tolist()))


def _job(job: tuple[str, str, int, int, int]) -> list[Outcome]:
    model, group, n, start, steps = job
    sd = loaded(model)
    numbers = range(start, min(start + BATCH, n))
    subjects = [cases(group, n)[k] for k in numbers]
    prompts = [sentence(these) for these in subjects]
    x = noise(numbers, (4, CELLS, CELLS))
    record = cross_maps(sd, prompts, x, sd.schedule.timesteps(steps)[0])
    by_words = {name: losses_on(sd, prompts, subjects, words, record) for name, words in WORDS.items()}
    images = sd(prompts, numbers, noise=x, steps=steps)
    return [
        Outcome({name: values[b] for name, values in by_words.items()}, detector.judge(image, these))
        for b, (image, these) in enumerate(zip(images, subjects))
    ]


def losses_against_verdicts(processes: Pool, model: str, n: int, steps: int) -> list[Row]:
    rows = []
    for group in ("two", "three"):
        jobs = [(model, group, n, i, steps) for i in range(0, n, BATCH)]
        outcomes = [outcome for part in processes.imap(_job, jobs) for outcome in part]
        for words in WORDS:
            for k, loss in enumerate(("response", "conflict")):
                values = [outcome.losses[words][k] for outcome in outcomes]
                row: Row = {"group": group, "n": n, "steps": steps, "loss": loss, "words": words}
                rows.append(row | against(values, [outcome.verdict for outcome in outcomes]))
    return rows


def against(values: list[float], verdicts: list[detector.Verdict]) -> Row:
    """Compares a loss with the success of the images. `values` holds the loss of each noise, and
    `verdicts` the detector's verdict on the image drawn from that noise. Returns, as columns of a
    row, the spread of the loss, and for each kind of success (`no_neglect`, `strict`) its rate and
    the rank correlation of the loss with it."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    row: dict[str, Any] = {"median": round(middle, 3), "iqr": round(high - low, 3)}
    row |= {"min": round(min(values), 3), "max": round(max(values), 3)}
    for name in ("no_neglect", "strict"):
        right = [float(getattr(verdict, name)) for verdict in verdicts]
        r, p = rank_correlation(values, right)
        row |= {name: round(np.mean(right), 3), f"rank_{name}": round(r, 3), f"p_{name}": f"{p:.1g}"}
    return row


def main() -> None:
    options = parser(__doc__, "attention_maps")
    options.add_argument(
        "--model", default="shapes", help="shapes (the default), or a folder of another like it"
    )
    options.add_argument("-n", type=int, default=240, help="images per row (default: 240)")
    options.add_argument("--steps", type=int, default=30, help="sampling steps (default: 30)")
    options.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    args = options.parse_args()
    with pool(args.workers, args.model) as processes:
        against_verdicts = losses_against_verdicts(processes, args.model, args.n, args.steps)
    on_objects = on_rendered_images(loaded(args.model), args.n)
    for name, rows in (("attention_maps", on_objects), ("attention_maps_losses", against_verdicts)):
        print_table(rows)
        print()
        if args.csv:
            write_csv(name, [{"model": args.model, **row} for row in rows])


if __name__ == "__main__":
    main()
