"""Formats a study's results: as Markdown, CSV, LaTeX, a page with images, and a sheet.

The page contains its plots and thumbnails, so that it is a single file that opens anywhere without
a network.
"""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minsd import image
from minsd.app.results import Cell, Results, described, head
from minsd.app.statistics import DRAWS, FEW, Resample
from minsd.app.study_plots import cost, differences
from minsd.judges import LOWER, RATES

THUMBNAIL = 256  # pixels


# --- text -----------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of texts: the headings of its columns, and its rows."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = str | list[str] | Table  # a paragraph, a list of notes, or a table


def report(results: Results, cells: Sequence[Cell], baseline: str, reference: str | None) -> list[Block]:
    """Returns the report of a study as a list of blocks: paragraphs and tables, and notes at the
    end. `cells` are the tables' numbers. `baseline` is the method to which the others are compared.
    `reference` is a paragraph about published numbers, or None."""
    columns = list(results.values)
    pick = {(c.part, c.method, c.column, c.tag): c for c in cells}

    def table(part: str, names: Sequence[str], keys: Sequence[tuple[str, str]]) -> Table:
        """Returns a table with one row per method. Its numbers are those cells whose `part` is the
        given one ("values", "costs" or "by tag"). `keys` has one entry per column of this table:
        the (column, tag) of the cell to show. `names` are the headings of these columns."""
        rows = [[m, *(pick[part, m, *key].text for key in keys)] for m in results.methods]
        return Table(["method", *names], rows)

    n = len(results.pairs)
    prompts = len(set(results.prompts))
    out: list[Block] = [
        f"{n} pairs of {prompts} prompts and their seeds. Means and rates with 95 % intervals.",
        table("values", [head(c) for c in columns], [(c, "") for c in columns]),
    ]
    if len(results.methods) > 1:
        out += _compared(results, cells, baseline)
    costs = list(dict.fromkeys(c.column for c in cells if c.part == "costs"))
    out.append("Cost per image, searching and optimising included (seconds: median; memory: greatest):")
    out.append(table("costs", costs, [(c, "") for c in costs]))
    tags = list(dict.fromkeys(c.tag for c in cells if c.part == "by tag"))
    for column in columns if tags else ():
        names = [f"{tag} (n = {pick['by tag', baseline, column, tag].n})" for tag in tags]
        out.append(f"{head(column)} by group of prompts:")
        out.append(table("by tag", names, [(column, tag) for tag in tags]))
    return [*out, *([reference] if reference else []), notes(results, cells)]


def _compared(results: Results, cells: Sequence[Cell], baseline: str) -> list[Block]:
    """Returns the part of a report that compares the methods to the baseline: a table of paired
    differences and of the rates of won pairs, and texts about them."""
    columns = list(results.values)
    pick = {(c.part, c.method, c.column): c for c in cells}
    others = [m for m in results.methods if m != baseline]
    rows = []
    for m in others:
        row = [m]
        for c in columns:
            gain = pick["differences", m, c]
            row += ["+" * (gain.estimate.value > 0) + gain.text, pick["wins", m, c].text]
        rows.append(row)
    out: list[Block] = [
        f"Paired differences to {baseline}, and the fraction of pairs won (ties count half), in %:",
        Table(["method", *(name for c in columns for name in (head(c), f"won by {c} %"))], rows),
    ]
    changed = [c for c in cells if c.part == "differences" and c.more]
    if changed:
        out.append("Images that changed between wrong and right (McNemar's exact test):")
        out.append([f"{c.method}, {c.column}: {c.more}" for c in changed])
    preferred = [f"{c.method} {c.text}" for c in cells if c.part == "preferred"]
    if preferred:
        out.append(f"PickScore's probability of preference over {baseline}, in %: {'; '.join(preferred)}")
    return out


def markdown(blocks: Sequence[Block]) -> str:
    """Returns the blocks of a report in Markdown."""
    out = []
    for block in blocks:
        if isinstance(block, Table):
            lines = [block.names, ["---"] * len(block.names), *block.rows]
            rows = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
            out.append("\n".join(f"| {row} |" for row in rows))
        else:
            out.append(block if isinstance(block, str) else "\n".join(f"- {line}" for line in block))
    return "\n\n".join(out) + "\n"


def as_html(blocks: Sequence[Block]) -> str:
    """Returns the blocks of a report in HTML."""
    out = []
    for block in blocks:
        if isinstance(block, Table):
            rows = "".join(f"<tr>{_cells('td', row)}" for row in block.rows)
            out.append(f"<div class=wide><table><tr>{_cells('th', block.names)}{rows}</table></div>")
        elif isinstance(block, str):
            out.append(f"<p>{html.escape(block)}</p>")
        else:
            out.append("<ul>" + "".join(f"<li>{html.escape(line)}" for line in block) + "</ul>")
    return "".join(out)


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}" for text in texts)


def notes(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Returns notes below the table, one line each: how the intervals are computed, which values
    are missing, and the judges' weights and options."""
    compared = sum(cell.part == "differences" for cell in cells)
    few = len(set(results.prompts)) < FEW
    how = f"pairs, because there are fewer than {FEW} prompts" if few else "prompts, each with all its seeds"
    out = [
        f"Intervals of means, differences and won pairs: bootstrap over {how} ({DRAWS:,} draws, seed 0). "
        "Rates: Wilson's interval."
    ]
    if compared:
        out.append(f"{compared} comparisons, uncorrected.")
    for column, by_method in results.values.items():
        missing = sum(int(np.isnan(values).sum()) for values in by_method.values())
        if missing:
            out.append(f"{column}: {missing} images have no value.")
    out += [f"{note[:1].upper()}{note[1:]}." for note in results.notes]
    return out + [f"Judge {name}: {described(identity)}." for name, identity in results.identities.items()]


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
    named = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(named.get(c, "\\" + c if c in "_%&#${}" else c) for c in text)


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


def page(results: Results, cells: Sequence[Cell], baseline: str, blocks: Sequence[Block], rows: int) -> str:
    """Returns the whole study as one HTML file: its report (`blocks`), the plots, and at most
    `rows` (prompt, seed) pairs, each with the images of all methods. `cells` are the tables'
    numbers."""
    shown = _order(results, baseline, rows)
    images = []
    for k in shown:
        prompt, seed = results.pairs[k]
        title = f"{html.escape(prompt)} <small>{html.escape(f'seed {seed} {results.tags[k]}')}</small>"
        figures = "".join(_figure(results, method, k) for method in results.methods)
        images.append(f'<div class="row"><p>{title}</p><div class="images">{figures}</div></div>')
    choices, script = _sorting(results, baseline, shown)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(', '.join(results.methods))}</title><style>{STYLE}</style>"
        f"<h1>{len(results.methods)} methods, {len(results.pairs)} pairs</h1>{as_html(blocks)}"
        f"{differences(cells, baseline)}{cost(results, cells)}"
        f"<h2>Images</h2><p>{len(shown)} of {len(results.pairs)} rows{choices}</p>"
        f"<div id=rows>{''.join(images)}</div>{script}</html>\n"
    )


def _figure(results: Results, method: str, k: int) -> str:
    """Returns, in HTML, the image that one method drew for the (prompt, seed) pair number `k`, with
    its values and the objects that were detected in it."""
    values = {column: by_method[method][k] for column, by_method in results.values.items()}
    said = ", ".join(f"{column} {value:.3g}" for column, value in values.items() if np.isfinite(value))
    found = results.found[method][k]
    seen = ", ".join(f"{one.get('colour', '')} {one['name']}".strip() for one in found[:6])
    first = next(iter(values), "")
    mark = ""
    if first in RATES and np.isfinite(values[first]):
        mark = " class=good" if values[first] else " class=bad"
    return (
        f'<figure><img src="{thumbnail(results.files[method][k], found)}" alt="" loading="lazy">'
        f"<figcaption><b{mark}>{html.escape(method)}</b><br>{html.escape(said)}<br>"
        f"{html.escape(seen)}</figcaption></figure>"
    )


def _sorting(results: Results, baseline: str, shown: Sequence[int]) -> tuple[str, str]:
    """Returns (choices, script), both in HTML. `choices` are the lists in which the reader chooses
    how the page's rows are sorted, and `script` sorts them. `shown` holds the number of the
    (prompt, seed) pair in each row. Both texts are empty if there is nothing to compare."""
    others = [m for m in results.methods if m != baseline]
    if not others or not results.values:
        return "", ""
    values = {
        column: {
            # The script takes what is greater as better.
            m: [(-v if column in LOWER else v) if math.isfinite(v) else None for v in of[shown].tolist()]
            for m, of in by_method.items()
        }
        for column, by_method in results.values.items()
    }
    random = np.random.default_rng(1).permutation(len(shown)).tolist()
    data = json.dumps({"baseline": baseline, "values": values, "random": random}).replace("</", "<\\/")
    choices = (
        ", by <select id=order><option value=gain>greatest gain<option value=loss>greatest loss"
        f"<option value=random>random</select>of <select id=method>{_choices(others)}</select>"
        f"over {html.escape(baseline)} in <select id=column>{_choices([*values])}</select>"
    )
    return choices, f"<script id=data type='application/json'>{data}</script><script>{SCRIPT}</script>"


def _choices(names: Sequence[str]) -> str:
    return "".join(f'<option value="{html.escape(name)}">{html.escape(name)}' for name in names)


def sheet(results: Results, rows: int, path: Path) -> None:
    """Saves a contact sheet at `path`. Each row of the sheet shows one (prompt, seed) pair, and
    each column a method. The pairs are `rows` pairs chosen at random with a fixed seed."""
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
    image.save(image.contact_sheet(pictures, len(results.methods), captions), path)
