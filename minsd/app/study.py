"""Studies: several noise methods over a prompt set with paired seeds, and their table.

    draw  STUDY --prompts ae-animals --seeds 0-63 --methods plain select:attention:5 initno
    table STUDY --baseline plain --latex --page

`draw` fills STUDY/METHOD/ for each method by a resuming run of minsd/app/run.py; the model is
loaded once. `python -m minsd.judge STUDY` then judges the images. STUDY/study.json holds the
prompts with what they ask for, the seeds and the methods. Methods may be added later; prompts and
seeds cannot change. `table` also takes any folder with one judged folder per method.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minsd import __version__, files, judge
from minsd.app import Tally, mistake, options, prompt_sets, reason, requests, study_page
from minsd.app.options import OPTIONS
from minsd.app.prompt_sets import slug
from minsd.app.ranks import Share, label
from minsd.app.results import compute, read

PLAIN: dict[str, list[str]] = {  # methods without arguments -> options of minsd.generate
    "plain": [],
    "best": ["--init-noise", "best"],
    "noise": ["--init-noise", "initno", "--no-excite"],
    "initno": ["--init-noise", "initno"],
    "excite": ["--excite"],
}
FORMS = (*PLAIN, "select:SCORE:K", "optimize:STEPS", "collage[:MARGIN]", '"NAME: --options"')


# --- methods --------------------------------------------------------------------------------------


def split_methods(words: Sequence[str]) -> dict[str, list[str]]:
    """Returns method -> its options of minsd.generate. A word holds method names separated by
    commas, or "NAME: --init-noise ...", a name of the user's own with its options. Raises
    ValueError for an unknown method, and if two methods would share a folder."""
    out: dict[str, list[str]] = {}
    for word in words:
        by_hand = re.fullmatch(r"([^\s:]+):\s+(-.*)", word, re.DOTALL)
        if by_hand:
            out[by_hand[1]] = shlex.split(by_hand[2])
            continue
        for name in filter(None, (part.strip() for part in word.split(","))):
            out[name] = method_options(name)
    folders = [slug(name) for name in out]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two methods would share the folder {max(folders, key=folders.count)}")
    return out


def method_options(method: str) -> list[str]:
    """Returns the options of minsd.generate that a method stands for. A name of no other form is
    taken as an objective's. Raises ValueError, in one line, for a method that this version does not
    have."""
    name, _, rest = method.partition(":")
    if method in PLAIN:
        return _known(method, PLAIN[method])
    if name == "select" and re.fullmatch(r".+:\d+", rest):
        score, _, count = rest.rpartition(":")
        by = "--score" if score in OPTIONS["score"].choices else "--objective"
        return _known(method, ["--init-noise", "select", by, score, "--candidates", count])
    if name == "optimize" and rest.isdecimal():
        return ["--init-noise", "optimize", "--optimize-steps", rest]
    if name == "collage" and re.fullmatch(r"(\d*\.?\d+)?", rest):
        return ["--crop-margin", rest] if rest else ["--layout-method", "paper"]
    if name in ("select", "optimize", "collage"):
        raise ValueError(f"there is no method {method!r}: the forms are {', '.join(FORMS)}")
    return _known(method, ["--objective", method])


def _known(method: str, words: list[str]) -> list[str]:
    """Returns a method's options (`words`) unchanged. Raises ValueError if this version lacks one
    of the options or their values."""
    for flag, value in zip(words, [*words[1:], ""]):
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if not flag.startswith("--"):
            continue
        if name not in OPTIONS or (OPTIONS[name].choices and value not in OPTIONS[name].choices):
            raise ValueError(f"there is no method {method!r}: the forms are {', '.join(FORMS)}")
    return words


# --- draw -----------------------------------------------------------------------------------------


def seeds_of(text: str, number: int) -> str:
    """Returns the seeds of prompt `number`, as text. With "apart:K" every prompt has K seeds of its
    own; any other text is returned unchanged, so that all prompts have the same seeds."""
    apart = re.fullmatch(r"apart:([1-9]\d*)", text)
    if not apart:
        return text
    count = int(apart[1])
    return f"{number * count}-{number * count + count - 1}"


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the contents of the folder's study.json with the methods of `args` added, or those of
    a new study if there is none. Writes nothing. Raises ValueError if the existing study has other
    prompts, seeds, model or options, or other options for a method of the same name."""
    items = [{"prompt": args.prompt}] if args.prompt else prompt_sets.load(args.prompts, args.count)
    study: dict[str, Any] = {
        "set": None if args.prompt else Path(args.prompts).name,
        "seeds": args.seeds,
        "model": args.model,
        "options": args.options,
        "prompts": items,
        "methods": {},
        "versions": {"minsd": __version__},
    }
    path = folder / "study.json"
    if path.exists():
        old = files.read_json(path)
        for key in ("prompts", "seeds", "model", "options"):
            if old[key] != study[key]:
                raise ValueError(f"{path} has other {key}: a study keeps them; take a new folder")
        study = old
    for name, words in split_methods(args.methods).items():
        if study["methods"].setdefault(name, words) != words:
            raise ValueError(f"{path} has a method {name} with other options: give this one another name")
    return study


def write_lines(study: Mapping[str, Any], folder: Path, method: str) -> Path:
    """Writes the prompts file of one method, and the layout files that it refers to. Returns the
    path of the prompts file. Raises ValueError if the method needs layouts and a prompt has
    none."""
    place = folder / "prompts"
    place.mkdir(parents=True, exist_ok=True)
    by_layout = method.partition(":")[0] == "collage"
    lines = []
    for number, item in enumerate(study["prompts"]):
        line: dict[str, Any] = {"prompt": item["prompt"], "seeds": seeds_of(study["seeds"], number)}
        if item.get("subjects") and not by_layout:
            line["subjects"] = item["subjects"]
        if by_layout:
            if not item.get("layout"):
                raise ValueError(f"method {method} needs prompts with a layout, such as shapes-layout-2")
            path = place / f"layout-{number:05d}.json"
            _put(path, json.dumps(item["layout"], ensure_ascii=False))
            line = {"layout": str(path), "seeds": line["seeds"]}
        lines.append(json.dumps(line, ensure_ascii=False))
    path = place / f"{slug(method)}.jsonl"
    _put(path, "\n".join(lines) + "\n")
    return path


def _put(path: Path, text: str) -> None:
    """Writes a text file completely or not at all. Several processes may write the same file at
    once."""
    with files.temporary(path.parent) as file:
        file.write(text.encode())
        files.put(file, path)


def draw(args: argparse.Namespace) -> int:
    """Draws every method's images that are still missing. Returns the exit code: 1 if images
    failed, otherwise 0. Raises ValueError or FileNotFoundError for mistakes in the options."""
    study = prepare(args.study, args)
    drawn = [name for name in study["methods"] if (args.study / slug(name)).is_dir()]
    asked = []
    for name in split_methods(args.methods):
        path = write_lines(study, args.study, name)
        words = ["--prompts", str(path), "--out", str(args.study / slug(name)), "--resume"]
        words += ["--model", study["model"], *shlex.split(study["options"]), *study["methods"][name]]
        try:
            asked.append((name, *requests.read(options.parse(words))))
        except (ValueError, FileNotFoundError) as error:
            if name not in drawn:
                path.unlink()
            where = re.compile(rf"{re.escape(str(path))}, (?:line 1: )?")  # of a file that `draw` wrote
            raise ValueError(f"method {name}: {where.sub('', str(error))}") from None
    from minsd.app.jobs import plan
    from minsd.app.run import run
    from minsd.app.session import open_session

    rank = Share.from_environment().rank
    if rank == 0:
        _put(args.study / "study.json", json.dumps(study, ensure_ascii=False, indent=1) + "\n")
    session = None
    failed = 0
    for name, command, lines in asked:
        lines = list(lines)
        if session is None or _model(session.command) != _model(command):
            session = open_session(command, lines, args.quiet or rank > 0)
        session = replace(session, command=command)
        jobs, _ = plan(session.sd, command, lines)
        if not session.quiet:
            print(f"minsd: method {name}: {len(jobs)} images", file=sys.stderr)
        tally = Tally()
        run(session, jobs, tally)
        failed += tally.failed
    return 1 if failed else 0


def _model(command: requests.Command) -> list[Any]:
    """Returns the settings that must be equal for two methods to use the same loaded model."""
    names = ("model", "vae", "tokenizer", "prediction_type", "controlnet", "lora")
    return [getattr(command, name) for name in (*names, "device", "dtype", "attention", "compile")]


# --- the commands ---------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> int:
    """Writes the table of a judged study and its plots and, as asked for, a LaTeX table, a page and
    a contact sheet. Returns the exit code."""
    results = read(args.study, args.unjudged)
    baseline = args.baseline or results.methods[0]
    cells = compute(results, baseline)
    out = args.out or args.study
    out.mkdir(parents=True, exist_ok=True)
    text = study_page.markdown(results, cells, baseline, PRESETS.get(args.preset, {}).get("published"))
    _put(out / "table.md", text)
    _put(out / "table.csv", study_page.as_csv(results, cells))
    _put(out / "differences.svg", study_page.differences(cells, baseline))
    _put(out / "cost.svg", study_page.cost(results, cells))
    if args.latex:
        _put(out / "table.tex", study_page.latex(results, cells))
    if args.page:
        _put(out / "index.html", study_page.page(results, cells, baseline, text, args.rows))
    if args.sheet:
        study_page.sheet(results, args.sheet, out / "sheet.png")
    encoding = sys.stdout.encoding or "utf-8"  # may lack characters of a method's name
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Draws the images of a study, judges them, and writes the table and page. Without --judges,
    missing weights only leave the images unjudged. Returns the exit code."""
    words = [str(args.study), *(["--judges", *args.judges] if args.judges else []), "--quiet"]
    asked = judge.options().parse_args(words)
    if args.judges != ["all"]:
        for name in args.judges or ():
            judge.Ready(name, asked, True)  # its weights are found before anything is drawn
    failed = draw(args)
    try:
        failed = judge.run(asked) or failed
    except FileNotFoundError as error:
        if args.judges:
            raise
        print(f"minsd: the images are not judged: {files.printable(error)}", file=sys.stderr)
    code = table(args)
    print(f"minsd: {args.study / 'index.html'}", file=sys.stderr)
    return failed or code


# The protocols of papers on the initial noise, as far as they were read in the papers' programs, and
# the numbers that the papers published. The lists of methods are this program's own.
PRESETS: dict[str, dict[str, Any]] = {
    "initno": {
        "draw": {
            "prompts": "ae",
            "seeds": "0-63",
            "methods": ["plain", "excite", "noise", "initno"],
            "options": "--steps 50 --guidance-scale 7.5",
        },
        "judges": ["clip", "least"],
        "published": "Attend-and-Excite and InitNO report CLIP similarities (ViT-B/16) to the prompt "
        "and to its neglected half, for SD1.4 and 64 seeds per prompt. Their texts are "
        "means over 80 templates and those here are the prompts alone, so the absolute "
        "values differ.",
    },
    "geneval": {
        "draw": {
            "prompts": "geneval",
            "seeds": "42-45",
            "methods": ["plain", "select:attention:5", "initno"],
            "options": "--steps 50 --guidance-scale 9",
        },
        "judges": ["geneval-style"],
        "published": "Published with GenEval's own detector (other weights of the same network), in %: "
        "SD1.5 43 overall (97 single object, 38 two objects, 35 counting, 76 colors, 4 "
        "position, 6 color attribution); SD2.1 50 (98, 51, 44, 85, 7, 17); SDXL 55 (98, "
        "74, 39, 85, 15, 23).",
    },
    "not-all-noises": {
        "draw": {
            "seeds": "0",
            "methods": ["plain", "select:stability:100", "optimize:100"],
            "options": "--steps 10 --guidance-scale 5.5",
        },
        "judges": ["hpsv2.1", "pickscore", "imagereward", "aesthetic"],
        "published": "Not All Noises reports that people prefer selected noise in up to 57 % and "
        "optimised noise in up to 72.5 % of DrawBench's prompts; people's choices are not "
        "repeated here. HPSv2's authors report 26.95 (v2) and 25.35 (v2.1) for SD1.4 on "
        "their own prompts.",
    },
    "noisecollage": {
        "draw": {"prompts": "shapes-layout-2", "methods": ["plain", "collage"], "seeds": "0"},
        "judges": ["region_clip"],
        "published": "NoiseCollage reports the similarity of each region's crop to its caption on "
        "captioned boxes of its own, by another CLIP (open_clip's ViT-B-32-quickgelu, "
        "laion400m_e32).",
    },
    "alignment": {
        "draw": {
            "prompts": "shapes-two",
            "methods": ["plain", "select:attention:5", "noise", "excite", "initno"],
        }
    },
}
DEFAULTS: dict[str, Any] = {
    "prompts": "shapes-geneval",
    "seeds": "apart:1",
    "methods": ["plain", "select:attention:5", "noise", "initno"],
    "model": "shapes",
    "options": "",
}


def parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser of `draw`, `table` and `compare`."""
    p = argparse.ArgumentParser(prog=prog, description="Compare noise methods over a prompt set.")
    actions = p.add_subparsers(dest="action", required=True)
    d = actions.add_parser("draw", help="draw all methods' images; what is there stays")
    d.add_argument("study", type=Path, metavar="STUDY", help="the study's folder")
    d.set_defaults(prompt=None)
    _draw_options(d)
    t = actions.add_parser("table", help="the table of a judged study")
    t.add_argument(
        "study", type=Path, metavar="STUDY", help="a study, or a folder with one folder per method"
    )
    t.set_defaults(unjudged=False)
    t.add_argument("--baseline", metavar="METHOD", help="default: the first")
    t.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: STUDY)")
    t.add_argument("--latex", action="store_true", help="also table.tex")
    t.add_argument("--page", action="store_true", help="also index.html, with the images")
    t.add_argument("--rows", type=int, default=200, metavar="N", help="rows of the page (default: 200)")
    t.add_argument("--sheet", type=int, metavar="N", help="also sheet.png: N rows drawn at random")
    t.add_argument("--preset", choices=tuple(PRESETS), help="add what the paper published")
    c = actions.add_parser("compare", help="draw, judge and table in one go")
    c.add_argument("prompt", nargs="?", metavar="PROMPT", help="one prompt; or give --prompts")
    _draw_options(c)
    c.add_argument("--out", dest="study", type=Path, default=Path("comparison"), metavar="DIR", help="folder")
    c.add_argument("--judges", nargs="+", metavar="NAME", help="as minsd.judge takes them")
    c.set_defaults(unjudged=True, baseline=None, out=None, latex=False, page=True, rows=200, sheet=None)
    return p


def _draw_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that `draw` and `compare` share."""
    sets = ", ".join(prompt_sets.SETS)
    p.add_argument("--prompts", metavar="SET|FILE", help=f"{sets}, or a file")
    p.add_argument("--count", type=int, metavar="N", help="the first N prompts of each tag")
    p.add_argument(
        "--seeds", metavar="LIST", help="the same for all prompts (0-63), or apart:K: K each of its own"
    )
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=", ".join(FORMS) + ", or an objective")
    p.add_argument("--model", help="as minsd.generate takes it (default: shapes)")
    p.add_argument("--options", help='options of minsd.generate for all methods, such as "--steps 20"')
    p.add_argument("--preset", choices=tuple(PRESETS), help="a paper's protocol; options override it")
    p.add_argument("--quiet", action="store_true", help="errors only")


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench.study") -> int:
    """Runs the command line. Returns 0, 1 if images failed, 2 for the user's mistakes, or 130 if
    the user stopped it."""
    args = parser(prog).parse_args(argv)
    try:
        if args.action == "table":
            return table(args)
        defaults = DEFAULTS | PRESETS.get(args.preset, {}).get("draw", {})
        if args.prompt:
            defaults |= {"seeds": "0-3"}
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        if args.action == "compare" and args.judges is None and args.model != "shapes":
            args.judges = PRESETS.get(args.preset, {}).get("judges")
        return draw(args) if args.action == "draw" else compare(args)
    except Exception as error:
        print(f"minsd: error: {label()}{files.printable(reason(error, ''))}", file=sys.stderr)
        return 2 if mistake(error) else 1
    except KeyboardInterrupt:
        print("minsd: stopped; the same command goes on", file=sys.stderr)
        return 130
