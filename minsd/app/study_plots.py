"""Plots a study's results as SVG, which is generated here, so that no plotting package is needed."""

import html
import math
from collections.abc import Callable, Sequence

from minsd.app.results import Cell, Results, head

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{html.escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, stroke: str = "#ccc", width: float = 1) -> str:
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
    )


def _marked(cell: Cell, methods: Sequence[str], at: Callable[[float], tuple[float, float]]) -> list[str]:
    """Returns SVG elements that show a cell (a number with its interval): a line along the interval
    and a dot at the value, in the colour of the cell's method. `at` maps a value to its (x, y) in
    pixels."""
    colour = COLOURS[methods.index(cell.method) % len(COLOURS)]
    x, y = at(cell.estimate.value)
    line = _line(*at(cell.estimate.low), *at(cell.estimate.high), colour, 2)
    return [line, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>']


def _bounds(cells: Sequence[Cell], *more: float) -> tuple[float, float]:
    """Returns (lowest, highest), the ends of an axis that shows the intervals of all `cells` and
    the values `more`, with a margin of 5 % on both sides."""
    low = min([c.estimate.low for c in cells] + [*more])
    high = max([c.estimate.high for c in cells] + [*more])
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Returns the linear function that maps a value to a position in pixels: `low` to `start`, and
    `high` to `end`."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns the places of an axis's ticks between `low` and `high`: the multiples of a round
    step, which is 1, 2 or 5 times a power of ten. The step is chosen such that there are at most
    `about` + 1 ticks."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def differences(cells: Sequence[Cell], baseline: str) -> str:
    """Returns an SVG plot of every method's paired difference to the baseline, with its interval,
    in every column of values."""
    shown = [c for c in cells if c.part == "differences" and math.isfinite(c.estimate.low)]
    columns = list(dict.fromkeys(c.column for c in shown))
    # The baseline counts too, so that a method has one colour in both plots.
    methods = list(dict.fromkeys(c.method for c in cells))
    left, width, row = 190, 420, 20
    parts: list[str] = []
    y = 30.0
    for column in columns:
        mine = [c for c in shown if c.column == column]
        low, high = _bounds(mine, 0.0)
        at = _axis(low, high, left, left + width)
        parts.append(_text(8, y, f"{column}: difference to {baseline}"))
        bottom = y + 8 + row * len(mine)
        for tick in ticks(low, high):
            parts.append(_line(at(tick), y + 8, at(tick), bottom, "#222" if abs(tick) < 1e-12 else "#ddd"))
            parts.append(_text(at(tick), bottom + 14, f"{tick:g}", "middle", "#666"))
        for k, cell in enumerate(mine):
            middle = y + 8 + row * (k + 0.5)
            parts.append(_text(left - 8, middle + 4, cell.method, "end"))
            parts += _marked(cell, methods, lambda value, at=at, middle=middle: (at(value), middle))
        y = bottom + 46
    return _svg(left + width + 30, int(y) - 10, parts)


def cost(results: Results, cells: Sequence[Cell]) -> str:
    """Returns one SVG with a plot for each column of values: each method's mean value against its
    median seconds per image, on a logarithmic axis of seconds."""
    seconds = {c.method: c.estimate.value for c in cells if c.part == "costs" and c.column == "seconds"}
    seconds = {method: value for method, value in seconds.items() if value > 0}
    parts: list[str] = []
    left, width, height = 60, 460, 200
    if not seconds:
        return _svg(300, 40, [_text(8, 24, "no seconds are known")])
    x_low = math.log10(min(seconds.values())) - 0.1
    x_high = math.log10(max(seconds.values())) + 0.35
    x = _axis(x_low, x_high, left, left + width)  # of the logarithm
    top = 30.0
    for column in results.values:
        mine = [c for c in cells if c.part == "values" and c.column == column and c.method in seconds]
        mine = [c for c in mine if math.isfinite(c.estimate.low)]
        if not mine:
            continue
        low, high = _bounds(mine)
        y = _axis(low, high, top + height, top)
        parts.append(_text(8, top - 12, f"{head(column)} against seconds per image"))
        for tick in ticks(low, high, 4):
            parts += [
                _line(left, y(tick), left + width, y(tick)),
                _text(left - 6, y(tick) + 4, f"{tick:g}", "end"),
            ]
        for tick in (k * 10.0**p for p in range(-3, 5) for k in (1, 2, 5)):
            if x_low <= math.log10(tick) <= x_high:
                place = x(math.log10(tick))
                parts.append(_line(place, top, place, top + height, "#eee"))
                parts.append(_text(place, top + height + 16, f"{tick:g} s", "middle", "#666"))
        for cell in mine:
            place = x(math.log10(seconds[cell.method]))
            parts += _marked(cell, results.methods, lambda value, y=y, place=place: (place, y(value)))
            parts.append(_text(place + 7, y(cell.estimate.value) + 4, cell.method))
        top += height + 66
    return _svg(left + width + 80, int(top) - 20, parts)
