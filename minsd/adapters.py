"""Records which pass each row of a batch belongs to, for adapters that act differently from pass to
pass.

A collage (noise/collage.py) makes several passes per step. A pass is one UNet evaluation with one
caption, and all passes run as the rows of one batch. A ControlNet (controlnet.py) or a LoRA
(weights/lora.py) that differs from pass to pass has to know which row belongs to which pass. Such
an adapter gets an `Adapters` object, and the collage states the passes around each run of a
network:

    with adapters.rows([0, 0, 1, 1]):
        unet(x, t, context)  # rows 0 and 1 belong to pass 0, rows 2 and 3 to pass 1

Outside such a block these adapters do nothing, so other callers of the network, such as a `refine`
function that updates the latents, run the network without them.

A LoRA with its scale is written FILE:SCALE on the command line, in layouts and in metadata.
Everywhere else it is a (Path, scale) pair; `split_scale` and `join_scale` convert between the two.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LoRAReference = tuple[Path, float]  # an adapter's file and scale


class Adapters:
    """An object that a collage shares with all adapters that differ from pass to pass (a pass is
    one UNet evaluation with one caption). Within a block of `rows`, `passes` holds the number of
    the pass of each row of the batch. Outside such a block, `passes` is None."""

    def __init__(self) -> None:
        self._passes: tuple[int, ...] | None = None

    @property
    def passes(self) -> tuple[int, ...] | None:
        return self._passes

    @contextmanager
    def rows(self, passes: Sequence[int]) -> Iterator[None]:
        """Sets `passes` within the `with` block: row b of every batch belongs to pass `passes[b]`.
        At the end of the block `passes` gets its earlier value back, also after an error."""
        before = self._passes
        self._passes = tuple(passes)
        try:
            yield
        finally:
            self._passes = before


def settings_of_rows(rows: int, count: int, adapters: Adapters | None, what: str) -> list[int] | None:
    """Returns, for each of `rows` rows of a batch, the index (0 to count - 1) of the setting that
    the row uses, where a setting is a scale or a control image. Returns None if the adapter does
    nothing now.

    With `adapters`, a row that belongs to pass k uses setting k modulo `count`, so that a single
    setting serves every pass. Outside a block of `adapters.rows` the result is None. Without
    `adapters`, row i uses setting i modulo `count`, so that both halves of guidance use the same
    settings. Raises ValueError if the number of rows does not fit the number of settings or of
    passes; `what` is the name of the settings in the message.
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
    """Parses "style.safetensors:0.8" into (Path("style.safetensors"), 0.8). The scale is 1 if the
    text has none. Raises ValueError for other forms."""
    tag = re.fullmatch(r"<lora:(.+):([\d.]+)>", text)
    if tag is not None:
        raise ValueError(f"{text} is a prompt's form: give the file, such as {tag[1]}.safetensors:{tag[2]}")
    comma = re.fullmatch(r"(.+:[-+]?\d+),(\d+)", text)
    if comma is not None:
        raise ValueError(f"the scale of {text} has a decimal comma: write {comma[1]}.{comma[2]}")
    m = re.fullmatch(r"(.+?)(?::([-+]?[\d.]+(?:e[-+]?\d+)?))?", text)
    try:
        scale = 1.0 if m is None or m[2] is None else float(m[2])
        if m is None or not math.isfinite(scale):
            raise ValueError
        return Path(m[1]), scale
    except ValueError:
        raise ValueError(
            f"a LoRA is given as FILE or FILE:SCALE, such as style.safetensors:0.8, not {text!r}"
        ) from None


def join_scale(path: Path, scale: float) -> str:
    """Returns FILE:SCALE for a file and a scale, the inverse of `split_scale`."""
    return f"{path}:{scale}"


def split_name(text: str) -> tuple[Path, str | None]:
    """Parses "style.pt:my-style" into the file of an embedding and the word that stands for the
    embedding in prompts. The word is None if the text has none."""
    m = re.fullmatch(r"(.+\.(?:safetensors|pt|pth|bin|ckpt)):([^:]+)", text)
    return (Path(text), None) if m is None else (Path(m[1]), m[2])
