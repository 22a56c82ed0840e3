"""The command line: python -m minsd.generate "a red circle and a blue square"

`main` parses the options (minsd/app/options.py), checks them (requests.py), loads the model
(session.py), plans one job per image (jobs.py) and runs them (run.py). Errors become one line and
an exit code. Heavy imports wait until the options are known to be good, so that --help and most
errors answer at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minsd.app import Tally, mistake, options, ranks, reason, requests, warned
from minsd.app.hold import Hold
from minsd.app.prompts import located
from minsd.app.requests import Command, Request
from minsd.files import printable, read_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command line with the arguments `argv`, or with those of the process if `argv` is
    None. Returns the exit code: 0 if all images are done, 2 if the user made a mistake, 130 if the
    user interrupted the run, and 1 after any other error."""
    argv = sys.argv[1:] if argv is None else argv
    tally = Tally()
    try:
        with warned():
            command, lines = requests.read(options.parse(argv))
            go(command, lines, tally)
        return _end(tally)
    except KeyboardInterrupt:
        done = f"{tally.made} of {tally.wanted} images are done"
        print(f"minsd: {ranks.label()}stopped: {done}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        return _report(error, tally)


def go(command: Command, lines: Sequence[Request], tally: Tally) -> None:
    """Generates the images of a run. With the option --layout-preview, draws previews of the
    layouts instead.

    `command` holds the settings of the whole run. `lines` has one item for each prompt, with the
    settings of this prompt. `tally` counts the saved and the failed images.
    """
    quiet = command.quiet or ranks.Share.from_environment().rank > 0

    def say(*words: object) -> None:
        if not quiet:
            print("minsd:", *map(printable, words), file=sys.stderr)

    for note in command.notes:
        say(note)
    if command.layout_preview:
        preview_layouts(command, lines, say)
        return
    hold = Hold(command.out, command.resume, command.wait, say)
    try:
        draw(command, lines, tally, hold, quiet, say)
    finally:
        hold.release()


def draw(
    command: Command,
    lines: Sequence[Request],
    tally: Tally,
    hold: Hold,
    quiet: bool,
    say: Callable[..., None],
) -> None:
    """Loads the model, plans the jobs (one per image) and runs them. With the option --list-tokens,
    prints the tokens of the prompts instead.

    `command` holds the settings of the whole run. `lines` has one item for each prompt, with the
    settings of this prompt. `tally` counts the saved and the failed images. `hold` is the object
    that locks the output folder. If `quiet` is True, there is no progress bar. `say` is a function
    that prints a note for the user.
    """
    if command.out.is_dir() and not command.list_tokens:
        hold.take()  # before the minutes of loading; `run` locks a folder that does not exist yet
    if sys.stderr.isatty():
        say(f"loading {command.model}")
    from minsd.app.jobs import plan
    from minsd.app.run import run
    from minsd.app.session import open_session

    cluster = None
    if command.engine == "ray" and not command.list_tokens:
        from minsd.app.cluster import Cluster

        cluster = Cluster(command, lines)
    session = open_session(command, lines, quiet) if cluster is None else cluster.session(quiet)
    for note in session.sd.notes:
        say(note)
    if command.list_tokens:
        for line in lines:
            list_tokens(session.sd.text, line.prompt)
        return
    jobs, notes = plan(session.sd, command, lines, cluster and cluster.device)
    for note in notes:  # after `plan`, so that an error is the only line
        say(note)
    if len(jobs) == 1:
        say(f"seed {jobs[0].seed}")
    else:
        of_prompts = f" of {len(lines)} prompts" if len(lines) > 1 else ""
        say(f"seeds {jobs[0].seed} to {jobs[-1].seed}, {len(jobs)} images{of_prompts}")
    run(session, jobs, tally, hold, cluster and cluster.draw)


def preview_layouts(command: Command, lines: Sequence[Request], say: Callable[..., None]) -> None:
    """Draws a preview of the layout of each prompt, without loading a model. `lines` has one item
    for each prompt, with the prompt's settings. A preview has the size that the image would have.
    It is written into the folder extra/ in the output folder, and its path is printed with the
    function `say`."""
    from minsd.image import save
    from minsd.noise.layout import preview

    layouts = []
    size = model_size(command.model)
    for line in lines:
        assert line.layout is not None  # `requests.read` has checked it
        with located(line.where):  # all sizes are checked before the first preview is drawn
            layouts.append(line.layout.sized(line.width or size, line.height or size))
    for number, layout in enumerate(layouts):
        path = command.out / "extra" / f"layout-{number}.png"
        save(preview(layout), path)
        say(path)


def model_size(model: str) -> int:
    """Returns the default side of a model's images, in pixels, without loading the model. `model`
    is a name, a folder, a file or a hub id. Returns 512 if the side is known only after loading, as
    for a single file."""
    from minsd.config import CELL, LARGEST, MODELS

    if model in MODELS:
        return MODELS[model].size
    try:
        side = 8 * int(read_json(Path(model) / "unet" / "config.json")["sample_size"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 512
    return side if CELL <= side <= LARGEST else 512


def list_tokens(text: Any, prompt: str) -> None:
    """Prints the tokens of a prompt, one per line, with their positions. `text` is the model's text
    encoder."""
    for position, token in enumerate(text.tokens(prompt)):
        line = f"{position:3d}  {printable(token)}"
        encoding = sys.stdout.encoding or "utf-8"  # may lack characters of the prompt
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def _end(tally: Tally) -> int:
    """Returns the exit code of a run that came to its end: 0 if all images are done; 2 if only one
    image was asked for and it failed by a mistake of the user; otherwise 1. If several images were
    asked for and some failed, prints how many failed."""
    if not tally.failed:
        return 0
    if tally.single:  # its error was printed, and needs no count
        return 2 if tally.mistaken else 1
    print(
        f"minsd: error: {ranks.label()}{tally.failed} of {tally.wanted} images are not drawn, for the "
        "reasons above; the same command with --resume tries them again",
        file=sys.stderr,
    )
    return 1


def _report(error: Exception, tally: Tally) -> int:
    """Prints `error`, which ended the run, as one line. Returns the exit code: 2 if the error is a
    mistake of the user, otherwise 1. If `tally` knows how many images were asked for, the line also
    states how many are done."""
    message = reason(error)
    if tally.wanted:
        message = f"{tally.made} of {tally.wanted} images are done; {message}"
    print(f"minsd: error: {ranks.label()}{printable(message)}", file=sys.stderr)
    return 2 if mistake(error) else 1


def script() -> int:
    """Runs the command line of this process as a program and returns its exit code. The signal
    SIGTERM, which torchrun, Slurm and timeout send, stops the run like Ctrl-C.

    If there are several arguments and the first one is `judge` or `compare`, another program runs:
    minsd/judge.py or minsd/app/study.py. If either word is the only argument, it is a prompt. If
    the first argument is `web`, the page of minsd/app/web.py is served.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # OpenMP's threads spin while they wait, which takes the processor from other work. torch reads
    # this variable when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if len(sys.argv) > 1 and sys.argv[1] == "web":
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the package is imported
        from minsd.app import web

        return web.main(sys.argv[2:])
    if len(sys.argv) > 2 and sys.argv[1] == "judge":
        from minsd import judge

        return judge.main(sys.argv[2:])
    if len(sys.argv) > 2 and sys.argv[1] == "compare":
        from minsd.app import study

        return study.main(sys.argv[1:], "minsd")
    return main()


if __name__ == "__main__":
    sys.exit(script())
