"""Do chosen and optimised noises, and updates while denoising, make images show what was asked for?

    python -m bench.alignment --out study                       # the embedded model, 200 prompts
    python -m bench.alignment --out study --model sd14 --prompts ae-animals --seeds 0-3

This is a preset of the study program (minsd/app/study.py). It compares plain sampling, the best of
five seeds by attention score, InitNO's optimised noise alone, Attend-and-Excite, and InitNO with
updates, on the same prompts and seeds. The images are judged, and STUDY/index.html and
STUDY/table.md compare the methods. Options are those of `bench.study compare`. The rows of
results/alignment.csv come from an earlier bench, which had other seeds and batches and was replaced
by the study.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import bench  # noqa: F401  # sets up the import path of a bare checkout
from minsd.app import study
from minsd.guidance import counted
from minsd.image import contact_sheet
from minsd.pipeline import StableDiffusion

Costs = dict[str, float]  # unet_rows, seconds, cpu_seconds of one image


class Cost:
    """Adds up three costs: UNet rows (the sum of the batch sizes of all UNet evaluations), seconds,
    and processor seconds. Work counts if it is done inside a `with` block of the method
    `spending`."""

    def __init__(self, sd: StableDiffusion) -> None:
        self.unet = sd.unet
        self.total = np.zeros(3)

    @contextmanager
    def spending(self) -> Iterator[None]:
        begin = np.array([0, time.perf_counter(), time.process_time()])
        with counted(self.unet) as rows:
            yield
        self.total += np.array([sum(rows), time.perf_counter(), time.process_time()]) - begin

    def per_image(self, images: int) -> Costs:
        unet_rows, seconds, cpu_seconds = self.total / images
        return {"unet_rows": unet_rows, "seconds": seconds, "cpu_seconds": cpu_seconds}


def save_sheet(path: Path, images: Sequence[tuple[Image.Image, str]], columns: int) -> None:
    """Saves a contact sheet of (image, caption) pairs at `path`, with `columns` images per row. The
    file has only 128 colours, so that it is small enough for the repository. Images of geometric
    shapes in plain colours look almost the same with 128 colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet([image for image, _ in images], columns, [caption for _, caption in images])
    sheet.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> int:
    return study.main(["compare", "--preset", "alignment", *sys.argv[1:]], "python -m bench.alignment")


if __name__ == "__main__":
    sys.exit(main())
