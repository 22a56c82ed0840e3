"""`minsd web`: a page for drawing, served to this machine alone.

    minsd web --folder models          then open http://127.0.0.1:7860

The page (web.html) polls the state and sends commands, both as JSON:

    GET  /                 the page             POST /run          draw with one or more methods
    GET  /start            models, samplers     POST /candidates   score seeds, and show their maps
    GET  /state            what is going on     POST /cancel       stop
    GET  /file/NAME        an image of --out
    GET  /picture/NAME     a preview or a map

A run is one command line of minsd.generate per method. The page shows these commands, which draw
the same images again. One job runs at a time. Files are taken only from --out and the folders of
--folder, and nothing is fetched from the network.
"""

import io
import json
import random
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from minsd import files
from minsd.adapters import split_name, split_scale
from minsd.app import Tally, mistake, options, reason, requests, study
from minsd.app.jobs import Job, plan
from minsd.app.options import MODEL, OPTIONS, RUN, Given
from minsd.app.progress import Progress
from minsd.app.run import run
from minsd.app.session import Session, open_session
from minsd.noise import excite, initno, layout, losses
from minsd.noise.drivers import Step
from minsd.noise.initial import candidate_seeds
from minsd.noise.initial import noise as unit_noise
from minsd.pipeline import StableDiffusion

PAGE = Path(__file__).with_name("web.html")
LONGEST = 2**20  # bytes of a request
EMBEDDED = ("shapes", "shapes-turbo")
EXTRAS = (
    "out",
    "attention_maps",
    "preview",
    "save_noise",
    "layout_overlay",
)  # options of a run that the page may set
MOST_CANDIDATES = 64
KEPT = 200  # previews and maps held in memory
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class State:
    """What the page shows of the job that is running, or ran last."""

    running: bool = False
    phase: str = ""
    done: int = 0  # steps of the phase
    total: int | None = None
    began: float = 0.0  # when the phase began, by time.monotonic
    message: str = ""
    error: str = ""
    preview: str = ""  # the path of the latest preview
    commands: list[str] = field(default_factory=list)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)


class Cancelled(KeyboardInterrupt):
    """Ends the job's thread, as Ctrl-C ends a run of the command line."""


class Studio:
    """The loaded model, and the job with its images."""

    def __init__(self, out: Path, folders: Sequence[Path]):
        self.out = out
        self.folders = [out, *folders]
        self.state = State()
        self.pictures: dict[str, bytes] = {}  # name -> PNG
        self.cancelled = False
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Session] | None = None  # what identifies the model, and its session
        self._count = 0

    def start(self, work: Callable[[], None], commands: list[str]) -> None:
        """Begins a job in a thread of its own. Raises ValueError if one is running."""
        with self._lock:
            if self.state.running:
                raise ValueError("a job is running: wait for it, or cancel it")
            self.cancelled = False
            self.state = State(True, "loading the model", began=time.monotonic(), commands=commands)
        threading.Thread(target=self._work, args=(work, self.state), daemon=True).start()

    @staticmethod
    def _work(work: Callable[[], None], state: State) -> None:
        try:
            work()
        except Cancelled:
            state.error = "cancelled"
        except Exception as error:
            state.error = files.printable(reason(error, ""))
            if not mistake(error):
                print(f"minsd: error: {state.error}", file=sys.stderr)
        state.running = False

    def session(self, command: requests.Command, lines: Sequence[requests.Request]) -> Session:
        """Returns a session with the model of a command, which is loaded only if the last command
        had another."""
        key = [getattr(command, option.name) for option in OPTIONS.values() if option.group == MODEL]
        key += [region.lora for line in lines if line.layout for region in line.layout.regions]
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees the memory before the next model is loaded
            self._loaded = key, open_session(command, lines, quiet=True)
        return replace(self._loaded[1], command=command)

    def keep(self, picture: Image.Image) -> str:
        """Holds an image in memory, and returns the path under which the page finds it."""
        held = io.BytesIO()
        picture.save(held, "PNG")
        self._count += 1
        self.pictures[str(self._count)] = held.getvalue()
        self.pictures.pop(str(self._count - KEPT), None)
        return f"picture/{self._count}"

    # --- what the page asks for -------------------------------------------------------------------

    def models(self) -> list[str]:
        """Returns the embedded models, and those in the folders of --folder: model folders and
        .safetensors files."""
        found = [path.parent for folder in self.folders[1:] for path in folder.glob("**/model_index.json")]
        found += [path for folder in self.folders[1:] for path in folder.glob("*.safetensors")]
        return [*EMBEDDED, *map(str, sorted(found))]

    def run(self, form: Mapping[str, Any]) -> None:
        """Begins to draw the form's prompt or layout with each of its methods. Raises ValueError or
        FileNotFoundError for mistakes."""
        words = self.words(form)
        previews = ["--preview", str(form["preview"])] if form.get("preview") else []
        planned = []
        for method in form.get("methods") or ["plain"]:
            own = [*words, *study.method_options(str(method))]
            command = self.read([*own, "--attention-maps", *previews])
            planned.append((str(method), "minsd " + shlex.join(own), *command))

        def work() -> None:
            for method, shown, command, lines in planned:
                session = self.session(command, lines)
                jobs, notes = plan(session.sd, command, lines)
                live = Live(self, len(jobs), method, shown)
                live.say("; ".join(notes))
                run(session, jobs, Tally(), show=live)

        self.start(work, [shown for _, shown, *_ in planned])

    def candidates(self, form: Mapping[str, Any]) -> None:
        """Begins to score the candidates of the form's seed by attention. Raises ValueError or
        FileNotFoundError for mistakes."""
        count = int(form.get("count") or 8)
        if not 1 <= count <= MOST_CANDIDATES:
            raise ValueError(f"the number of candidates must be from 1 to {MOST_CANDIDATES}, not {count}")
        command, lines = self.read([*self.words({**form, "regions": None}), "--attention-maps"])

        def work() -> None:
            session = self.session(command, lines)
            job = plan(session.sd, command, lines)[0][0]
            live = Live(self, count, "candidates", "")
            self.state.candidates = [
                row | {"picture": self.keep(tile)} for row, tile in scored(session.sd, job, count, live)
            ]

        self.start(work, [])

    def words(self, form: Mapping[str, Any]) -> list[str]:
        """Returns the command line that a form stands for, without its method. If the form has
        regions, writes their layout to a file in --out."""
        seed = str(form.get("seed") or "").strip() or str(random.SystemRandom().randrange(2**32))
        words = ["--seed", seed]
        for name in ("num_images", "model", "steps", "guidance_scale", "sampler", "width", "height"):
            words += [OPTIONS[name].flag, str(form[name])] if form.get(name) else []
        words += ["--out", str(self.out), *shlex.split(str(form.get("more") or ""))]
        prompt, negative = str(form.get("prompt") or ""), str(form.get("negative_prompt") or "")
        if form.get("regions"):  # captions and boxes alone: other keys could name files
            regions = [{"prompt": one["prompt"], "box": one["box"]} for one in form["regions"]]
            drawn = {"prompt": prompt, "negative_prompt": negative, "regions": regions}
            return ["--layout", str(self.write_layout(drawn)), *words]
        return ["--prompt", prompt, *(["--negative-prompt", negative] if negative else []), *words]

    def write_layout(self, drawn: Mapping[str, Any]) -> Path:
        """Checks a layout and returns the path of its file in --out, which is written unless the
        newest file holds this layout already."""
        layout.load(dict(drawn))
        text = json.dumps(drawn, ensure_ascii=False, indent=1) + "\n"
        folder = self.out / "layouts"
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]
        last = max(numbers, default=-1)
        if last >= 0 and (folder / f"{last}.json").read_text(encoding="utf-8") == text:
            return folder / f"{last}.json"
        path = folder / f"{last + 1}.json"
        with files.temporary(folder) as file:
            file.write(text.encode())
            files.put(file, path)
        return path

    def read(self, words: list[str]) -> tuple[requests.Command, list[requests.Request]]:
        """Reads a command line. Raises ValueError or FileNotFoundError for its mistakes, for options
        that the page may not set, and for files outside --out and the folders of --folder."""
        given = options.parse(words)
        for name, value in given.items():
            option = OPTIONS[name]
            if value in (None, False, option.default):
                continue
            if option.group == RUN and name not in EXTRAS:
                raise ValueError(f"{option.flag} is for the command line")
            for path in named_files(given, name):
                if name != "out" and not path.exists():
                    raise FileNotFoundError(f"{option.flag}: there is no {path}")
                if not any(inside(path, folder) for folder in self.folders):
                    named = ", ".join(map(str, self.folders))
                    raise ValueError(f"{option.flag}: {path} is not in the folders of this page ({named})")
        return requests.read(given)


def named_files(given: Given, name: str) -> list[Path]:
    """Returns the paths that the value of an option names. A model's hub id counts as a path."""
    value = given[name]
    if OPTIONS[name].kind is Path:
        return [Path(value)]
    if name in ("lora", "embedding"):
        return [Path((split_scale if name == "lora" else split_name)(text)[0]) for text in value]
    if name == "objective" and ".py" in value:
        return [Path(value.rpartition(":")[0])]
    return [Path(value)] if name == "model" and value not in EMBEDDED else []


def inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


class Live(Progress):
    """The progress of a run by one method, written to the studio's state. Cancelling the job ends
    the run at its next step."""

    def __init__(self, studio: Studio, wanted: int, method: str, command: str):
        super().__init__(wanted, studio.out, hidden=True)
        self.studio = studio
        self.state = studio.state
        self.method = method
        self.command = command

    def _at(self, done: int, total: int | None) -> None:
        if total != self.state.total or done < self.state.done:
            self.state.began = time.monotonic()
        self.state.done, self.state.total = done, total
        if self.studio.cancelled:
            raise Cancelled

    def phase(self, name: str, total: int | None = None) -> None:
        self.state.phase = ", ".join(filter(None, (self.method, self.images, name)))
        self.state.message = ""
        self.state.began = time.monotonic()
        self._at(0, total)

    def advance(self) -> None:
        self._at(self.state.done + 1, self.state.total)

    def say(self, message: str) -> None:
        self.state.message = message
        if isinstance(message, Step):
            self._at(message.done, message.most)

    def preview(self, step: int, images: Sequence[Image.Image]) -> None:
        self.state.preview = self.studio.keep(images[0])

    def made(self, path: Path, row: Mapping[str, Any]) -> None:
        super().made(path, row)
        sheet = path.parent / "extra" / f"{path.stem}-attention.png"
        shown = {"file": path.name, "method": self.method, "command": self.command, "seed": str(row["seed"])}
        more = {name: row.get(name) for name in ("width", "height", "steps", "seconds", "subjects")}
        self.state.images.append(shown | more | {"attention": sheet.exists()})

    def failed(self, line: str) -> None:
        super().failed(line)
        self.state.error = line.removeprefix("minsd: error: ")


def scored(
    sd: StableDiffusion, job: Job, count: int, show: Progress
) -> list[tuple[dict[str, Any], Image.Image]]:
    """Returns (row, image) for each candidate of a job's seed, the best first. The row holds the
    seed, its attention score (lower is better) and the maximum of each subject's attention map at
    the first timestep. The image shows these maps, all on one colour scale."""
    sampling = job.sampling
    course = {"steps": sampling.steps, "sampler": sampling.sampler, "karras": sampling.karras}
    first = losses.listed_timesteps(sd, **course)[0]
    subjects = list(job.subjects or ())
    seeds = candidate_seeds(job.seed, count)
    noise = unit_noise(seeds, (4, sampling.height // 8, sampling.width // 8))
    scores: list[float] = []
    maps = []  # (S, h, w) each
    show.phase("looking at their attention", count)
    for part in noise.split(sd.batch_size(sampling.height, sampling.width)):
        scores += initno.attention_scores(sd, job.prompt, subjects, part, **course)
        n = len(part)
        look, frames = excite.watch(sd, [job.prompt] * n, [subjects] * n, count=1, **course)
        look(0, first, part.to(sd.device, sd.dtype))
        maps += frames.cross[0]
        show.say(Step("", len(scores), count))
    top = max(float(each.max()) for each in maps)
    grey = Image.new("RGB", (96, 96 * sampling.height // sampling.width), "#888")
    found = []
    for seed, score, each in zip(seeds, scores, maps):
        tile = Image.new("RGB", (len(each) * (grey.width + 2) - 2, grey.height), "white")
        for s, values in enumerate(each):
            tile.paste(excite.heat(values, grey, top), (s * (grey.width + 2), 0))
        peaks = [f"{subject} {values.max():.2f}" for subject, values in zip(subjects, each)]
        found.append(({"seed": str(seed), "score": round(score, 3), "peaks": peaks}, tile))
    return sorted(found, key=lambda one: one[0]["score"])


# --- the server -----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """The page's server, at one address of this machine."""

    daemon_threads = True

    def __init__(self, studio: Studio, host: str, port: int):
        self.studio = studio
        self.local = host in LOCAL
        super().__init__((host, port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self._answering():
            self._check_host()
            studio = self.server.studio
            kind, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
            if not kind:
                self._send("text/html; charset=utf-8", PAGE.read_bytes())
            elif kind == "start":
                samplers = OPTIONS["sampler"].choices
                self._json({"models": studio.models(), "samplers": samplers, "out": str(studio.out)})
            elif kind == "state":
                state = studio.state
                self._json(vars(state) | {"seconds": time.monotonic() - state.began})
            elif kind == "picture" and name in studio.pictures:
                self._send("image/png", studio.pictures[name])
            elif kind == "file" and name.endswith(".png") and inside(studio.out / name, studio.out):
                self._send("image/png", (studio.out / name).read_bytes())
            else:
                raise FileNotFoundError(f"there is nothing at {self.path}")

    def do_POST(self) -> None:
        with self._answering():
            self._check_host()
            # A page of another site cannot send JSON here: its browser would ask first.
            if self.headers.get_content_type() != "application/json":
                raise ValueError("a request must be JSON")
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= LONGEST:
                raise ValueError(f"a request must have 1 to {LONGEST} bytes")
            form = files.parse_json(self.rfile.read(length))
            studio = self.server.studio
            if self.path == "/cancel":
                studio.cancelled = True
            elif self.path in ("/run", "/candidates") and isinstance(form, dict):
                (studio.run if self.path == "/run" else studio.candidates)(form)
            else:
                raise ValueError(f"there is no command {self.path}")
            self._json({"commands": studio.state.commands})

    def _check_host(self) -> None:
        """Raises ValueError for a request to another host's name. A page of another site can make
        its own name point at this machine, and would then be let in by the browser."""
        host = self.headers.get("Host", "").rpartition(":")[0].strip("[]")
        if self.server.local and host not in LOCAL:
            raise ValueError("this page answers to local addresses only")

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Answers errors of the block with one line."""
        try:
            yield
        except ConnectionError:
            pass  # the browser is gone
        except Exception as error:
            self.close_connection = True  # part of the request may be unread
            code = 404 if isinstance(error, OSError) and self.command == "GET" else 400
            self._json({"error": files.printable(reason(error, ""))}, code)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send("application/json", json.dumps(value).encode(), code)

    def _send(self, kind: str, content: bytes, code: int = 200) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        # The browser itself refuses to fetch anything from elsewhere, or to show the page in another.
        headers["Content-Security-Policy"] = (
            "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the page polls several times per second."""


def main(argv: Sequence[str]) -> int:
    """Serves the page until the user stops it. Returns 0, or 2 for the user's mistakes."""
    p = options.Parser(prog="minsd web", description="Serve a page for drawing to this machine.")
    p.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    where = "models and other files may come from here; may be given several times"
    p.add_argument("--folder", type=Path, action="append", default=[], metavar="DIR", help=where)
    p.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860; 0: any free one")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1")
    try:
        args = p.parse_args(argv)
        for folder in args.folder:
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}")
        try:
            server = Server(Studio(args.out, args.folder), args.host, args.port)
        except (OSError, OverflowError) as error:
            raise ValueError(f"the page cannot be served at {args.host}:{args.port}: {error}") from None
    except (ValueError, FileNotFoundError) as error:
        print(f"minsd: error: {files.printable(reason(error))}", file=sys.stderr)
        return 2
    if not server.local:
        print("minsd: whoever reaches this address can draw on this machine", file=sys.stderr)
    print(f"minsd: http://{args.host}:{server.server_address[1]} (Ctrl-C ends it)", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
