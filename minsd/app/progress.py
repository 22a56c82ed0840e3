"""Shows what a run is doing: which images, in which phase, how far, and how long that will take.

The phases of a batch are the search for its noise, sampling, and decoding; each has a bar of its
own. On a terminal the bar is redrawn. Anywhere else, such as in a log file, a line is printed at
most every LOG_SECONDS.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from minsd.image import contact_sheet, save
from minsd.noise.drivers import Step

LOG_SECONDS = 30
BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
NO_BAR = "{desc} ...{postfix}"  # of a phase whose number of steps is unknown


class Show:
    """Receives the progress of drawing. This class shows nothing; its subclasses do."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Begins a phase of `total` steps (None: unknown). `name` describes it to the user."""

    def advance(self) -> None:
        """Counts one step of the phase."""

    def say(self, message: str) -> None:
        """Shows a message about the phase. The message may be a `Step`, a str that also states how
        many steps of the phase are done, and of how many."""

    def preview(self, step: int, images: Sequence[Image.Image]) -> None:
        """Shows the images of a batch as they are predicted after `step` sampling steps."""


class Progress(Show):
    """Shows the progress of a run on standard error, and previews as `out`/extra/preview.png.

    `wanted` is the number of images of the run. With `hidden`, there are no bars.
    """

    def __init__(self, wanted: int, out: Path, hidden: bool = False):
        self.out = out
        self.wanted = wanted
        self.hidden = hidden
        self.done = 0  # images drawn or failed
        self.began = time.monotonic()
        self.heading = ""  # the batch and the phase
        self.images = ""  # of the batch, such as "images 5-8/80"
        self.bar: tqdm | None = None

    def batch(self, count: int) -> None:
        """Begins a batch of `count` images."""
        first = self.done + 1
        last = self.done + count
        self.images = f"image {first}" if count == 1 else f"images {first}-{last}"
        self.images += f"/{self.wanted}"
        if self.done:  # the time that all images left will take, judging by those done
            each = (time.monotonic() - self.began) / self.done
            self.images += f" (about {in_words(each * (self.wanted - self.done))} left)"

    def made(self, path: Path, row: Mapping[str, Any]) -> None:
        """Counts an image that was saved at `path`. `row` is its row of runs.jsonl."""
        self.done += 1

    def failed(self, line: str) -> None:
        """Counts an image that could not be drawn, and prints a line about it."""
        self.done += 1
        self.write(line)

    def phase(self, name: str, total: int | None = None) -> None:
        self.heading = f"{self.images}, {name}" if self.images else name
        self._open(total)

    def _open(self, total: int | None) -> None:
        """Replaces the progress bar by a new one of `total` steps. None means that the number of
        steps is unknown."""
        self.close()
        how: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if not sys.stderr.isatty():
            how = {"file": _Lines(), "mininterval": LOG_SECONDS, "miniters": 1, "delay": LOG_SECONDS}
        form = NO_BAR if total is None else BAR
        self.bar = tqdm(
            total=total, desc=self.heading, bar_format=form, leave=False, disable=self.hidden, **how
        )

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, message: str) -> None:
        if self.bar is None:
            return
        if isinstance(message, Step):
            if self.bar.total != message.most or message.done < self.bar.n:
                self._open(message.most)
            self.bar.update(message.done - self.bar.n)
        self.bar.set_postfix_str(message, refresh=sys.stderr.isatty())

    def preview(self, step: int, images: Sequence[Image.Image]) -> None:
        columns = math.ceil(len(images) ** 0.5)
        save(contact_sheet(images, columns), self.out / "extra" / "preview.png")

    def write(self, line: str) -> None:
        """Prints a line, above the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()


class _Lines:
    """A file object for a progress bar: prints every state of the bar to standard error, on a line
    of its own."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(f"minsd: {text}", file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def in_words(seconds: float) -> str:
    """Formats a time: "40 s", "12 min" or "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5970:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
