"""Which pass each row of a batch belongs to, for adapters that act on every pass in its own way.

A collage (noise/collage.py) runs its passes, one per caption, as the rows of one batch. A
ControlNet (controlnet.py) or a LoRA (weights/lora.py) that differs from pass to pass has to know
which row belongs to which pass. It gets an `Adapters`, and the collage states the passes around
each run of a network:

    with adapters.rows([0, 0, 1, 1]):
        unet(x, t, context)  # rows 0 and 1 belong to pass 0, rows 2 and 3 to pass 1

Outside such a block these adapters do nothing, so that other callers of the network, such as a
refine, run it without them.

A LoRA with its scale is written FILE:SCALE on the command line, in layouts and in metadata.
Everywhere else it is a (Path, scale) pair: `split_scale` and `join_scale`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LoRAReference = tuple[Path, float]  # an adapter's file and scale


class Adapters:
    """Shared by everything that acts by pass. `passes`: that of each row within a block of `rows`,
    None outside."""

    def __init__(self) -> None:
        self._passes: tuple[int, ...] | None = None

    @property
    def passes(self) -> tuple[int, ...] | None:
        return self._passes

    @contextmanager
    def rows(self, passes: Sequence[int]) -> Iterator[None]:
        """Within the block, row b of every batch belongs to pass `passes[b]`. The end of the
        block, an error included, restores the state before it."""
        before = self._passes
        self._passes = tuple(passes)
        try:
            yield
        finally:
            self._passes = before


def settings_of_rows(rows: int, count: int, adapters: Adapters | None, what: str) -> list[int] | None:
    """Which of `count` settings (scales, control images) each row of a batch takes; None: the
    adapter does nothing now.

    With `adapters` row b takes that of its pass (modulo `count`: a single one serves every pass).
    Without, the rows take the settings in turn, over and over: with R settings, rows b and R + b
    (the two halves of guidance) take the same one. ValueError, naming the settings as `what`,
    where the batch does not fit.
    """
    if adapters is None:
        if rows % count:
            raise ValueError(f"{count} {what} for a batch of {rows} rows: give one, or one per row")
        return [b % count for b in range(rows)]
    if adapters.passes is None:
        return None
    if len(adapters.passes) != rows:
        raise ValueError(f"the passes of {len(adapters.passes)} rows were given, and the batch has {rows}")
    return [k % count for k in adapters.passes]


def split_scale(text: str) -> LoRAReference:
    """ "style.safetensors:0.8" -> the file and 0.8, or 1 without a scale. ValueError for other
    forms.
    """
    tag = re.fullmatch(r"<lora:(.+):([\d.]+)>", text)
    if tag is not None:
        raise ValueError(f"{text} is a prompt's form: give the file, such as {tag[1]}.safetensors:{tag[2]}")
    comma = re.fullmatch(r"(.+:[-+]?\d+),(\d+)", text)
    if comma is not None:
        raise ValueError(f"the scale of {text} has a decimal comma: write {comma[1]}.{comma[2]}")
    m = re.fullmatch(r"(.+?)(?::([-+]?[\d.]+(?:e[-+]?\d+)?))?", text)
    try:
        if m is None:
            raise ValueError
        return Path(m[1]), 1.0 if m[2] is None else float(m[2])
    except ValueError:
        raise ValueError(
            f"a LoRA is given as FILE or FILE:SCALE, such as style.safetensors:0.8, not {text!r}"
        ) from None


def join_scale(path: Path, scale: float) -> str:
    """The inverse of `split_scale`."""
    return f"{path}:{scale}"
