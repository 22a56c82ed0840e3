"""Formats a study's results: as Markdown, CSV, LaTeX, two plots, a page with images, and a sheet.

Plots are SVG that is generated here, so that no plotting package is needed. The page contains its
plots and thumbnails, so that it is a single file that opens anywhere without a network.
"""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minsd import image
from minsd.app.results import Cell, Results, described
from minsd.judges import LOWER, RATES

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
THUMBNAIL = 256  # pixels


# --- text -----------------------------------------------------------------------------------------


def head(column: str) -> str:
    """Returns the heading of a table's column: the name of the judged value, followed by % for a
    rate, or by "(less is better)"."""
    if column in LOWER:
        return f"{column} (less is better)"
    return f"{column} %" if column in RATES else column


def markdown(results: Results, cells: Sequence[Cell], baseline: str, reference: str | None) -> str:
    """Returns the tables of a study in Markdown, with notes below. `cells` are the tables' numbers.
    `reference` is a text about published numbers, or None."""
    columns = list(results.values)
    pick = {(c.part, c.method, c.column, c.tag): c for c in cells}
    n = len(results.pairs)
    prompts = len(set(results.prompts))
    out = [f"{n} pairs of {prompts} prompts and their seeds. Means and rates with 95 % intervals.\n"]
    out += _table(
        ["method", *(head(column) for column in columns)],
        [[m, *(pick["values", m, c, ""].text for c in columns)] for m in results.methods],
    )
    others = [m for m in results.methods if m != baseline]
    if others:
        out.append(
            f"Paired differences to {baseline}, and the fraction of pairs won (ties count half), in %:\n"
        )
        names = [name for c in columns for name in (head(c), f"won by {c} %")]
        rows = []
        for m in others:
            row = [m]
            for c in columns:
                row += [_signed(pick["differences", m, c, ""]), pick["wins", m, c, ""].text]
            rows.append(row)
        out += _table(["method", *names], rows)
        lines = [
            f"- {m}, {c}: {pick['differences', m, c, ''].more}"
            for c in columns
            for m in others
            if pick["differences", m, c, ""].more
        ]
        if lines:
            out += ["Images that changed between wrong and right (McNemar's exact test):\n", *lines, ""]
        preferred = [c for c in cells if c.part == "preferred"]
        if preferred:
            texts = [f"{c.method} {c.text}" for c in preferred]
            out.append(f"PickScore's probability of preference over {baseline}, in %: {'; '.join(texts)}\n")
    costs = list(dict.fromkeys(c.column for c in cells if c.part == "costs"))
    out.append("Cost per image, searching and optimising included (seconds: median; memory: greatest):\n")
    out += _table(
        ["method", *costs], [[m, *(pick["costs", m, c, ""].text for c in costs)] for m in results.methods]
    )
    tags = list(dict.fromkeys(c.tag for c in cells if c.part == "by tag"))
    for column in columns if tags else ():
        out.append(f"{head(column)} by group of prompts:\n")
        out += _table(
            ["method", *(f"{tag} (n = {pick['by tag', baseline, column, tag].n})" for tag in tags)],
            [[m, *(pick["by tag", m, column, tag].text for tag in tags)] for m in results.methods],
        )
    if reference:
        out += [reference, ""]
    return "\n".join([*out, *notes(results, cells)]) + "\n"


def _signed(cell: Cell) -> str:
    """Returns the text of a number that is a difference, with a plus sign if it is positive."""
    return "+" + cell.text if cell.estimate.value > 0 else cell.text


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table, followed by an empty line. `names` are the headings of
    the columns."""
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def notes(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Returns notes below the table, one line each: how the intervals are computed, which values
    are missing, and the judges' weights and options."""
    compared = sum(cell.part == "differences" for cell in cells)
    few = len(set(results.prompts)) < 10
    how = "pairs, because there are fewer than 10 prompts" if few else "prompts, each with all its seeds"
    out = [
        f"- Intervals of means, differences and won pairs: bootstrap over {how} (10,000 draws, seed 0). "
        "Rates: Wilson's interval.",
        f"- {compared} comparisons, uncorrected." if compared else "",
    ]
    for column, by_method in results.values.items():
        missing = sum(int(np.isnan(values).sum()) for values in by_method.values())
        if missing:
            out.append(f"- {column}: {missing} images have no value.")
    out += [f"- {note[:1].upper()}{note[1:]}." for note in results.notes]
    for name, identity in results.identities.items():
        out.append(f"- Judge {name}: {described(identity)}.")
    return [line for line in out if line]


def as_csv(results: Results, cells: Sequence[Cell]) -> str:
    """Returns the numbers of a study's tables as CSV: one row per number, with as many digits as
    the tables show."""
    out = io.StringIO()
    prompts = len(set(results.prompts))
    rows = [cell.row(prompts) for cell in cells]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def latex(results: Results, cells: Sequence[Cell]) -> str:
    """Returns the table of values in LaTeX, for the package booktabs. The best value of a column is
    bold if it is clearly better than the next best: the bootstrap interval of their paired
    difference does not contain 0."""
    from minsd.app.statistics import Resample

    pick = {(c.method, c.column): c for c in cells if c.part == "values"}
    resample = Resample(results.prompts)
    best = {}
    for column, by_method in results.values.items():
        sign = -1 if column in LOWER else 1
        found = {m: sign * pick[m, column].estimate.value for m in by_method}
        order = sorted(found, key=lambda m: math.inf if math.isnan(found[m]) else -found[m])
        if len(order) > 1:
            gap = resample.estimate(sign * (by_method[order[0]] - by_method[order[1]]))
            best[column] = order[0] if gap.low > 0 else None
    columns = list(results.values)
    lines = [
        "\\begin{tabular}{l" + "c" * len(columns) + "}",
        "\\toprule",
        " & ".join(["method", *(_tex(head(c)) for c in columns)]) + " \\\\",
        "\\midrule",
    ]
    for method in results.methods:
        row = [_tex(method)]
        for column in columns:
            text = pick[method, column].text
            row.append(f"\\textbf{{{text}}}" if best.get(column) == method else text)
        lines.append(" & ".join(row) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return "".join("\\" + c if c in "_%&#$" else c for c in text)


# --- plots ----------------------------------------------------------------------------------------


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


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns the places of an axis's ticks between `low` and `high`: multiples of a round step (1,
    2 or 5 times a power of ten). There are about `about` of them at most."""
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
        low = min(0.0, *(c.estimate.low for c in mine))
        high = max(0.0, *(c.estimate.high for c in mine))
        pad = 0.05 * (high - low) or 1.0
        low, high = low - pad, high + pad

        def at(value: float, low: float = low, high: float = high) -> float:
            return left + width * (value - low) / (high - low)

        parts.append(_text(8, y, f"{column}: difference to {baseline}"))
        bottom = y + 8 + row * len(mine)
        for tick in ticks(low, high):
            parts.append(_line(at(tick), y + 8, at(tick), bottom, "#222" if abs(tick) < 1e-12 else "#ddd"))
            parts.append(_text(at(tick), bottom + 14, f"{tick:g}", "middle", "#666"))
        for k, cell in enumerate(mine):
            middle = y + 8 + row * (k + 0.5)
            colour = COLOURS[methods.index(cell.method) % len(COLOURS)]
            parts.append(_text(left - 8, middle + 4, cell.method, "end"))
            parts.append(_line(at(cell.estimate.low), middle, at(cell.estimate.high), middle, colour, 2))
            parts.append(
                f'<circle cx="{at(cell.estimate.value):.1f}" cy="{middle:.1f}" r="4" fill="{colour}"/>'
            )
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
    top = 30.0
    for column in results.values:
        mine = [c for c in cells if c.part == "values" and c.column == column and c.method in seconds]
        mine = [c for c in mine if math.isfinite(c.estimate.low)]
        if not mine:
            continue
        low = min(c.estimate.low for c in mine)
        high = max(c.estimate.high for c in mine)
        pad = 0.05 * (high - low) or 1.0
        low, high = low - pad, high + pad

        def y(value: float, low: float = low, high: float = high, top: float = top) -> float:
            return top + height * (1 - (value - low) / (high - low))

        def x(value: float) -> float:
            return left + width * (math.log10(value) - x_low) / (x_high - x_low)

        parts.append(_text(8, top - 12, f"{head(column)} against seconds per image"))
        for tick in ticks(low, high, 4):
            parts += [
                _line(left, y(tick), left + width, y(tick)),
                _text(left - 6, y(tick) + 4, f"{tick:g}", "end"),
            ]
        for tick in (k * 10.0**p for p in range(-3, 5) for k in (1, 2, 5)):
            if x_low <= math.log10(tick) <= x_high:
                parts.append(_line(x(tick), top, x(tick), top + height, "#eee"))
                parts.append(_text(x(tick), top + height + 16, f"{tick:g} s", "middle", "#666"))
        for cell in mine:
            colour = COLOURS[results.methods.index(cell.method) % len(COLOURS)]
            px, py = x(seconds[cell.method]), y(cell.estimate.value)
            parts.append(_line(px, y(cell.estimate.low), px, y(cell.estimate.high), colour, 2))
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
            parts.append(_text(px + 7, py + 4, cell.method))
        top += height + 66
    return _svg(left + width + 80, int(top) - 20, parts)


# --- images ---------------------------------------------------------------------------------------


def _order(results: Results, baseline: str, rows: int) -> list[int]:
    """Chooses the (prompt, seed) pairs that the page shows, and returns their numbers. If there are
    at most `rows` pairs, all are shown. Otherwise a third are those with the greatest gains, a
    third those with the greatest losses, and the others are chosen at random. The gain of a pair is
    the mean of all methods' differences to the baseline in the first column of values."""
    n = len(results.pairs)
    if n <= rows:
        return list(range(n))
    values = next(iter(results.values.values()), {})
    gains = [values[m] - values[baseline] for m in results.methods if values and m != baseline]
    mean = np.nan_to_num(np.mean(gains, 0)) if gains else np.zeros(n)
    order = [int(k) for k in np.argsort(-mean, kind="stable")]
    third = rows // 3
    chosen = list(dict.fromkeys(order[:third] + order[n - third :]))
    others = [int(k) for k in np.random.default_rng(0).permutation(n) if k not in chosen]
    return chosen + others[: rows - len(chosen)]


def thumbnail(path: Path, found: Sequence[dict[str, Any]]) -> str:
    """Returns the image at `path` as a data URI of a small JPEG, on which the boxes of the detected
    objects `found` are drawn."""
    from PIL import ImageDraw

    picture = image.read(path, on="white").convert("RGB")
    scale = min(1.0, THUMBNAIL / max(picture.size))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height))
    pen = ImageDraw.Draw(picture)
    for one in found:
        pen.rectangle([value * scale for value in one["box"]], outline="#888")
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}.wide{overflow-x:auto}
td,th{white-space:nowrap;padding:.25em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.row img{width:128px;display:block}.row{border-top:1px solid #ccc;padding:.6em 0}
.images{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0;width:128px;font-size:12px}
figcaption{color:#555;overflow-wrap:anywhere}
.bad{color:#b00020}.good{color:#00701a}select{font:inherit;margin-right:1em}
"""
SCRIPT = """
const get=name=>document.getElementById(name),rows=[...document.querySelectorAll('.row')];
const data=JSON.parse(get('data').textContent),method=get('method'),column=get('column'),order=get('order');
function gain(i){const v=data.values[column.value],d=v[method.value][i]-v[data.baseline][i];
return Number.isFinite(d)?d:0}
function key(i){return order.value==='random'?data.random[i]:order.value==='gain'?-gain(i):gain(i)}
function sort(){const keys=rows.map((_,i)=>key(i)),box=document.getElementById('rows');
[...rows.keys()].sort((a,b)=>keys[a]-keys[b]||a-b).forEach(i=>box.append(rows[i]))}
for(const s of [method,column,order])s.addEventListener('change',sort);sort();
"""


def page(results: Results, cells: Sequence[Cell], baseline: str, text: str, rows: int) -> str:
    """Returns the whole study as one HTML file: the tables (`text`, in Markdown), the plots, and at
    most `rows` (prompt, seed) pairs, each with the images of all methods. `cells` are the tables'
    numbers."""
    shown = _order(results, baseline, rows)
    columns = list(results.values)
    blocks = []
    for k in shown:
        prompt, seed = results.pairs[k]
        figures = []
        for method in results.methods:
            values = [(c, results.values[c][method][k]) for c in columns]
            said = ", ".join(f"{c} {v:.3g}" for c, v in values if np.isfinite(v))
            found = results.found[method][k]
            seen = ", ".join(f"{one.get('colour', '')} {one['name']}".strip() for one in found[:6])
            first = values[0][1] if values and columns[0] in RATES else math.nan
            mark = "" if math.isnan(first) else (" class=good" if first else " class=bad")
            figures.append(
                f'<figure><img src="{thumbnail(results.files[method][k], found)}" alt="" loading="lazy">'
                f"<figcaption><b{mark}>{html.escape(method)}</b><br>{html.escape(said)}<br>"
                f"{html.escape(seen)}</figcaption></figure>"
            )
        where = html.escape(f"seed {seed} {results.tags[k]}")
        title = f"{html.escape(prompt)} <small>{where}</small>"
        blocks.append(f'<div class="row"><p>{title}</p><div class="images">{"".join(figures)}</div></div>')
    numbers = {
        c: {
            m: [float(v) if np.isfinite(v) else None for v in results.values[c][m][shown]]
            for m in results.methods
        }
        for c in columns
    }
    data = {
        "baseline": baseline,
        "values": numbers,
        "random": [int(k) for k in np.random.default_rng(1).permutation(len(shown))],
    }
    of = f"{len(shown)} of {len(results.pairs)}"
    others = [m for m in results.methods if m != baseline] or [baseline]
    choices = (
        f"<p>{of} rows, by <select id=order><option value=gain>greatest gain<option value=loss>greatest loss"
        f"<option value=random>random</select>of <select id=method>{_choices(others)}</select>"
        f"over {html.escape(baseline)} in <select id=column>{_choices(columns)}</select></p>"
    )
    dumped = json.dumps(data).replace("</", "<\\/")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(', '.join(results.methods))}</title><style>{STYLE}</style>"
        f"<h1>{len(results.methods)} methods, {len(results.pairs)} pairs</h1>{as_html(text)}"
        f"{differences(cells, baseline)}{cost(results, cells)}<h2>Images</h2>{choices}"
        f"<div id=rows>{''.join(blocks)}</div>"
        f"<script id=data type='application/json'>{dumped}</script><script>{SCRIPT}</script></html>\n"
    )


def _choices(names: Sequence[str]) -> str:
    return "".join(f'<option value="{html.escape(name)}">{html.escape(name)}' for name in names)


def as_html(text: str) -> str:
    """Converts Markdown to HTML. Only the forms that this module writes are supported: paragraphs,
    tables and lists."""
    out = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        run: list[str] = []
        for line in [*lines, ""]:
            if run and line[:2] != run[0][:2]:
                out.append(_block(run))
                run = []
            if line:
                run.append(line)
    return "".join(out)


def _block(lines: Sequence[str]) -> str:
    if lines[0].startswith("| "):
        rows = [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        cells[0] = cells[0].replace("td>", "th>")
        return f"<div class=wide><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>"
    if lines[0].startswith("- "):
        return "<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>"
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def sheet(results: Results, rows: int, path: Path) -> None:
    """Saves a contact sheet of `rows` (prompt, seed) pairs, chosen at random with a fixed seed, at
    `path`. Each row of the sheet shows a pair, and each column a method."""

    from minsd.image import contact_sheet, save

    n = len(results.pairs)
    drawn = sorted(int(k) for k in np.random.default_rng(0).permutation(n)[:rows])
    first = next(iter(results.values.values()), {})
    pictures = []
    captions = []
    for k in drawn:
        for method in results.methods:
            picture = image.read(results.files[method][k], on="white").convert("RGB")
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            pictures.append(picture)
            captions.append(f"{method} {first[method][k]:.3g}" if first else method)
    side = pictures[0].size
    pictures = [picture if picture.size == side else picture.resize(side) for picture in pictures]
    save(contact_sheet(pictures, len(results.methods), captions), path)
