"""Records which pass each row of a batch belongs to, for adapters (ControlNets and LoRAs) that act
differently from pass to pass.

A collage (noise/collage.py) generates an image from several captions, each for one region of the
image. In each step it makes several passes. A pass is one UNet evaluation with one caption, and all
passes run as the rows of one batch. A ControlNet (controlnet.py) or a LoRA (weights/lora.py) that
differs from pass to pass has to know which row belongs to which pass. Such an adapter gets an
`Adapters` object, and the collage states the passes around each run of a network:

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
    """Tells ControlNets and LoRAs which caption each row of a UNet batch is evaluated with.

    A layout has N + 1 captions: number 0 is that of the whole image, and number k that of region k.
    "Pass k" is the evaluation with caption k; the passes of an image are rows of one batch. Within a
    `with adapters.rows(passes)` block, `passes[b]` is the number of the caption of row b. Rows of
    different images and rows without a prompt (for guidance) have the same numbers. Outside such a
    block, `passes` is None.
    """

    def __init__(self) -> None:
        self._passes: tuple[int, ...] | None = None

    @property
    def passes(self) -> tuple[int, ...] | None:
        return self._passes

    @contextmanager
    def rows(self, passes: Sequence[int]) -> Iterator[None]:
        """Within the `with` block, sets the property `passes`: row b of every batch then belongs to
        the pass with the number passes[b]. A pass is a UNet evaluation with one caption. After the
        block, also if it raises an error, the property has its earlier value again."""
        before = self._passes
        self._passes = tuple(passes)
        try:
            yield
        finally:
            self._passes = before


def settings_of_rows(rows: int, count: int, adapters: Adapters | None, what: str) -> list[int] | None:
    """Assigns the settings of an adapter (a ControlNet or a LoRA) to the `rows` rows of a batch. A
    setting is a control image or a scale, and the adapter has `count` of them. Returns the index of
    the setting (0 to count - 1) for each row, or None if the adapter must not act on this batch.

    If `adapters` is None, row i uses setting i modulo `count`, so both halves of guidance use the
    same settings. Otherwise `adapters` states which pass (UNet evaluation with one caption) each
    row belongs to, and a row of pass k uses setting k modulo `count`. Outside a block of
    `adapters.rows` the result is None.

    Raises ValueError if the number of rows does not fit `count` or the passes. `what` is the word
    for the settings in the error message, such as "control images".
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
    """Parses the text that stands for a LoRA with its scale: "style.safetensors:0.8" becomes
    (Path("style.safetensors"), 0.8). If the text has no scale, the scale is 1. Raises ValueError if
    the text has another form."""
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
    """Returns the text "FILE:SCALE" for a LoRA's file and scale. `split_scale` parses this text."""
    return f"{path}:{scale}"


def split_name(text: str) -> tuple[Path, str | None]:
    """Parses the text of a textual-inversion embedding: "style.pt:my-style" becomes
    (Path("style.pt"), "my-style"), the embedding's file and the word that stands for the embedding
    in prompts. If the text contains no such word, the second item is None."""
    m = re.fullmatch(r"(.+\.(?:safetensors|pt|pth|bin|ckpt)):([^:]+)", text)
    return (Path(text), None) if m is None else (Path(m[1]), m[2])
