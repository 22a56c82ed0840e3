"""Studies: compare several noise methods over a prompt set, with the same seeds for every method.

    draw  STUDY --prompts ae-animals --seeds 0-63 --methods plain select:attention:5 initno
    table STUDY --baseline plain --latex --page

`draw` fills STUDY/METHOD/ for each method by a run of minsd/app/run.py with --resume; the model is
loaded once. `python -m minsd.judge STUDY` then judges the images. STUDY/study.json holds the
prompts, what their images must show, the seeds and the methods. Methods may be added later; prompts
and seeds cannot change. `table` also takes any folder with one judged folder per method.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minsd import __version__, files, judge
from minsd.app import Tally, ended, options, prompt_sets, requests, study_file, study_page, study_plots
from minsd.app.options import OPTIONS, Given, Parser, positive
from minsd.app.prompt_sets import slug
from minsd.app.prompts import located
from minsd.app.ranks import Share
from minsd.app.requests import Command, Request
from minsd.app.results import compute, read
from minsd.app.study_file import Study

if TYPE_CHECKING:
    from minsd.app.session import Session

PLAIN: dict[str, list[str]] = {  # methods without arguments -> options of minsd.generate
    "plain": [],
    "best": ["--init-noise", "best"],
    "noise": ["--init-noise", "initno", "--no-excite"],
    "initno": ["--init-noise", "initno"],
    "excite": ["--excite"],
}
NOT_IN_STUDIES = ("prompt", "prompts", "like", "invert", "layout_preview", "list_tokens", "engine")
OWN = ("prompt", "prompts", "seeds", "model", "out", "quiet")  # options of studies and of minsd.generate
FORMS = (*PLAIN, "select:SCORE:K", "optimize:STEPS", "collage[:MARGIN]", '"NAME: --options"')


# --- methods --------------------------------------------------------------------------------------


def split_methods(words: Sequence[str]) -> dict[str, list[str]]:
    """Parses the words of --methods. Returns a dict method -> list of the options of minsd.generate
    for which the method stands. A word is either a list of methods' names, separated by commas, or
    a method of the user's own, written as "NAME: OPTIONS", such as "mine: --init-noise select".
    Raises ValueError for an unknown method, and if two methods would have the same folder."""
    out: dict[str, list[str]] = {}
    for word in words:
        by_hand = re.fullmatch(r"([^\s:]+):\s+(-.*)", word, re.DOTALL)
        if by_hand:
            out[by_hand[1]] = shlex.split(by_hand[2])
            continue
        for name in filter(None, (part.strip() for part in word.split(","))):
            out[name] = method_options(name)
    study_file.folders(out)
    return out


def method_options(method: str) -> list[str]:
    """Returns the list of the options of minsd.generate for which a method's name stands. For
    example, "optimize:100" stands for --init-noise optimize --optimize-steps 100. A name in none of
    the forms FORMS is taken as the name of an objective. Raises ValueError, with a message of one
    line, for a name that begins like one of the forms but does not follow it."""
    name, _, rest = method.partition(":")
    if method in PLAIN:
        return PLAIN[method]
    if name == "select" and re.fullmatch(r".+:\d+", rest):
        score, _, count = rest.rpartition(":")
        by = "--score" if score in OPTIONS["score"].choices else "--objective"
        return ["--init-noise", "select", by, score, "--candidates", count]
    if name == "optimize" and rest.isdecimal():
        return ["--init-noise", "optimize", "--optimize-steps", rest]
    if name == "collage" and re.fullmatch(r"(\d*\.?\d+)?", rest):
        return ["--crop-margin", rest] if rest else ["--layout-method", "paper"]
    if name in ("select", "optimize", "collage"):
        raise ValueError(f"there is no method {method!r}: the forms are {', '.join(FORMS)}")
    return ["--objective", method]


# --- draw -----------------------------------------------------------------------------------------


def seeds_of(text: str, number: int) -> str:
    """Returns the seeds of prompt number `number` (from 0), as text for --seeds. If `text` is
    "apart:K", every prompt has K seeds of its own: 0 to K - 1 for the first prompt, K to 2K - 1 for
    the second, and so on. Any other text is returned unchanged, so that all prompts have the same
    seeds."""
    apart = re.fullmatch(r"apart:([1-9]\d*)", text)
    if not apart:
        return text
    count = int(apart[1])
    return f"{number * count}-{number * count + count - 1}"


def asked_for(args: argparse.Namespace) -> Study:
    """Returns the study that the command's options ask for. Raises ValueError or FileNotFoundError
    for mistakes in the options."""
    if args.prompt is None:
        items = prompt_sets.load(args.prompts, args.count)
        name = Path(args.prompts).name
    else:
        items = [{"prompt": args.prompt}]
        name = None
    methods = split_methods(args.methods)
    return Study(name, args.seeds, args.model, args.options, items, methods, {"minsd": __version__})


def requested(study: Study, method: str, folder: Path) -> tuple[Command, list[Request]]:
    """Returns (command, requests) for the run of one method of a study: the settings of the whole
    run, and those of each prompt. `folder` is the study's folder. Raises ValueError or
    FileNotFoundError if minsd.generate would refuse these settings."""
    words = ["--model", study.model, *shlex.split(study.options), *study.methods[method]]
    given = options.parse([*words, "--out", str(folder / slug(method)), "--resume", "--wait"])
    for name in NOT_IN_STUDIES:
        if given[name]:
            raise ValueError(f"{OPTIONS[name].flag} is not for studies: leave it out")
    command, lines = requests.read(given, _lines(study, method, given))
    if lines[0].wants_subjects or lines[0].steer:  # other methods refuse subjects
        command, lines = requests.read(given, _lines(study, method, given, subjects=True))
    return command, lines


def _lines(study: Study, method: str, given: Given, subjects: bool = False) -> Iterator[tuple[str, Given]]:
    """Yields (where, options) for each prompt of the study, as `requests.read` takes them, for the
    run of one method. `where` is the beginning of error messages about the prompt. `given` holds
    the options that all prompts have in common. With `subjects`, the prompts' subjects are
    added."""
    for number, item in enumerate(study.prompts):
        own: Given = {"prompt": item["prompt"], "seeds": seeds_of(study.seeds, number)}
        if method.partition(":")[0] == "collage":
            if not item.get("layout"):
                raise ValueError("it needs prompts with a layout, such as shapes-layout-2")
            own |= {"prompt": None, "layout": item["layout"]}
        elif subjects and item.get("subjects"):
            own["subjects"] = OPTIONS["subjects"].from_json(item["subjects"])
        yield f"prompt {number + 1}: " if number else "", given | own


def draw(args: argparse.Namespace) -> int:
    """Draws those images of the study's methods that are missing. Returns the exit code: 1 if
    images failed, otherwise 0. Raises ValueError or FileNotFoundError for mistakes in the options;
    nothing is written then."""
    study = asked_for(args)
    study_file.joined(args.study, study)  # raises ValueError if the folder holds another study
    parts: list[tuple[Command, list[Request]]] = []
    for name in study.methods:
        with located(f"method {name}: "):
            parts.append(requested(study, name, args.study))
    from minsd.app.jobs import plan
    from minsd.app.run import run

    rank = Share.from_environment().rank
    quiet = args.quiet or rank > 0
    session = None
    plans = []
    notes: list[str] = []
    for name, (command, lines) in zip(study.methods, parts):  # mistakes are found before drawing
        session = _opened(session, command, parts, quiet)
        with located(f"method {name}: "):
            jobs, more = plan(session.sd, command, lines)
        plans.append(jobs)
        notes += [*command.notes, *session.sd.notes, *more]
    for note in dict.fromkeys(notes):
        if not quiet and not note.startswith("subjects: "):  # one for nearly every prompt
            print(f"minsd: {files.printable(note)}", file=sys.stderr)
    if rank == 0:
        study_file.add(args.study, study)
    failed = 0
    for name, (command, _), jobs in zip(study.methods, parts, plans):
        session = _opened(session, command, parts, quiet)
        if not quiet:
            print(f"minsd: method {name}: {len(jobs)} images", file=sys.stderr)
        tally = Tally()
        run(session, jobs, tally)
        failed += tally.failed
    return 1 if failed else 0


def _opened(
    session: "Session | None", command: Command, parts: Sequence[tuple[Command, list[Request]]], quiet: bool
) -> "Session":
    """Returns a session (a loaded model with settings) for the run of one method, whose settings
    are `command`. `session` is the session of the previous method, or None. Its model is used again
    if both methods need the same one; otherwise a model is loaded. `parts` holds the settings of
    all methods' runs."""
    from minsd.app.session import open_session

    if session is not None and _model(session.command) == _model(command):
        return replace(session, command=command)
    lines = [line for other, lines in parts if _model(other) == _model(command) for line in lines]
    return open_session(command, lines, quiet)


def _model(command: Command) -> list[Any]:
    """Returns those settings of a run that must be equal in two runs for them to use the same
    loaded model."""
    return [getattr(command, name) for name, option in OPTIONS.items() if option.group == options.MODEL]


# --- the commands ---------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> int:
    """Writes the table of a judged study (table.md, table.csv) and its plots. Writes a LaTeX table,
    a page and a contact sheet too if the options request them. Prints the table. Returns the exit
    code, 0. Raises ValueError or FileNotFoundError for a folder without scores."""
    results = read(args.study, args.unjudged)
    baseline = args.baseline or results.methods[0]
    cells = compute(results, baseline)
    published = PRESETS.get(args.preset, {}).get("published")
    report = study_page.report(results, cells, baseline, published)
    text = study_page.markdown(report)
    texts = {
        "table.md": text,
        "table.csv": study_page.as_csv(results, cells),
        "differences.svg": study_plots.differences(cells, baseline),
        "cost.svg": study_plots.cost(results, cells),
    }
    if args.latex:
        texts["table.tex"] = study_page.latex(results, cells)
    if args.page:
        texts["index.html"] = study_page.page(results, cells, baseline, report, args.rows)
    out = args.out or args.study
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        files.write(out / name, content)
    if args.sheet:
        study_page.sheet(results, args.sheet, out / "sheet.png")
    written = ", ".join([*texts, *(["sheet.png"] if args.sheet else [])])
    print(f"minsd: written to {files.printable(out)}: {written}", file=sys.stderr)
    encoding = sys.stdout.encoding or "utf-8"  # may lack characters of a method's name
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Draws the images of a study, judges them, and writes the table and the page. If the weights
    of a judge are missing, raises FileNotFoundError with --judges; without --judges, prints a
    message and leaves the images unjudged. Returns the exit code: 1 if images failed, otherwise 0.
    """
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
    return table(args) or failed


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


def parser(prog: str) -> Parser:
    """Returns the parser of the commands `draw`, `table` and `compare`. `prog` is the program's
    name in its help."""
    p = Parser(prog=prog, description="Compare noise methods over a prompt set.")
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
    t.add_argument("--rows", type=positive, default=200, metavar="N", help="rows of the page (default: 200)")
    t.add_argument("--sheet", type=positive, metavar="N", help="also sheet.png: N rows drawn at random")
    t.add_argument("--preset", choices=tuple(PRESETS), help="add what the paper published")
    c = actions.add_parser("compare", help="draw, judge and table in one go")
    c.add_argument("prompt", nargs="?", metavar="PROMPT", help="one prompt; or give --prompts")
    _draw_options(c)
    c.add_argument("--out", dest="study", type=Path, default=Path("comparison"), metavar="DIR", help="folder")
    c.add_argument("--judges", nargs="+", metavar="NAME", help="as minsd.judge takes them")
    c.set_defaults(unjudged=True, baseline=None, out=None, latex=True, page=True, rows=200, sheet=16)
    return p


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line. Returns (the words of the studies' own parser, the other options of
    minsd.generate with their values)."""
    own = []
    others = []
    words = iter(argv)
    for word in words:
        flag = word.partition("=")[0]
        name = options.named(flag[2:].removeprefix("no-")) if flag.startswith("--") else None
        if name is None or name in OWN:
            own.append(word)
            continue
        others.append(word)
        if "=" not in word and OPTIONS[name].kind is not bool:
            others += [value for value in [next(words, None)] if value is not None]
    return own, others


def _draw_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that the commands `draw` and `compare` share to the parser `p` of one of
    them."""
    sets = ", ".join(prompt_sets.SETS)
    p.add_argument("--prompts", metavar="SET|FILE", help=f"{sets}, or a file")
    p.add_argument("--count", type=positive, metavar="N", help="the first N prompts of each tag")
    p.add_argument(
        "--seeds", metavar="LIST", help="the same for all prompts (0-63), or apart:K: K each of its own"
    )
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=", ".join(FORMS) + ", or an objective")
    p.add_argument("--model", help="as minsd.generate takes it (default: shapes)")
    p.add_argument("--options", help="options of minsd.generate for all methods; or give them as they are")
    p.add_argument("--preset", choices=tuple(PRESETS), help="a paper's protocol; options override it")
    p.add_argument("--quiet", action="store_true", help="errors only")


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench.study") -> int:
    """Runs the command line `argv` (default: that of the process). Returns 0 if all is done, 1 if
    images failed or another error occurred, 2 for a mistake of the user, and 130 if the user
    stopped the run."""

    def work() -> int:
        own, others = split_options(sys.argv[1:] if argv is None else argv)
        args = parser(prog).parse_args(own)
        if others and args.action == "table":
            raise ValueError(f"{others[0]} is for drawing: leave it out")
        return _run(args, others)

    return ended(work)


def _run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Runs the command that the options name. `others` are options of minsd.generate for all
    methods. Returns the exit code."""
    if args.action == "table":
        return table(args)
    if args.prompt is not None and (args.prompts or args.count):
        raise ValueError("give a prompt or --prompts with --count, not both")
    preset = PRESETS.get(args.preset, {})
    defaults = DEFAULTS | preset.get("draw", {}) | ({} if args.prompt is None else {"seeds": "0-3"})
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.options = " ".join(filter(None, (args.options, shlex.join(others))))
    if args.action == "draw":
        code = draw(args)
        if not args.quiet and Share.from_environment().rank == 0:
            print(f"minsd: to judge the images: python -m minsd.judge {args.study}", file=sys.stderr)
        return code
    if args.judges is None and args.model != "shapes":
        args.judges = preset.get("judges")
    return compare(args)
