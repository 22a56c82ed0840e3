"""Turns an objective's name, or a user's own function, into a `Steer`: the objective with the
driver (noise/drivers.py) that minimises it, and the settings of both.

    steer = choose("syngen", settings={"until": "10"})          # a name of noise/objectives/
    steer = choose("reward:pickscore")                           # a reward of noise/objectives/reward.py
    steer = choose("mine.py:my", driver="optimize")              # a function in a file
    steer = choose(my, driver="select")                          # a function

`choose` checks everything that can be checked without a model. A file runs as the user who names it,
so the file's name is taken from a command line or a program, never from a prompts file or an image.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minsd.guidance import Model
from minsd.noise import drivers, losses
from minsd.noise.best import draft
from minsd.noise.drivers import Optimizing, Refining, Result, Say, Selection
from minsd.noise.initial import candidate_seeds
from minsd.noise.initial import noise as draw_noise
from minsd.noise.look import Ask, Course, Lift, Objective, ask
from minsd.noise.losses import Subjects
from minsd.noise.objectives import NAMES, find
from minsd.noise.regularizers import REGULARIZERS
from minsd.samplers.random import generators
from minsd.samplers.schedule import Refine

DRIVERS = ("select", "optimize", "refine")


@dataclass(frozen=True)
class Selecting:
    """Settings of the driver select."""

    candidates: int = 16
    # None: scores the noise of every candidate at the first timestep. "zero-order": scores the
    # seed's own noise, and rounds * count noises near it. "halving": scores as None does, then
    # again the best eighth of the candidates after the first `part` of the run's steps.
    search: str | None = None
    rounds: int = 4
    count: int = 4
    near: float = 0.95
    part: float = 0.2

    def __post_init__(self) -> None:
        if self.search not in (None, "zero-order", "halving"):
            raise ValueError(f"search must be none, zero-order or halving, not {self.search!r}")
        if min(self.candidates, self.rounds, self.count) < 1:
            raise ValueError("candidates, rounds and count must be 1 or more")
        if not 0 < self.near < 1 or not 0 < self.part < 1:
            raise ValueError("near and part must be between 0 and 1")


HOW: dict[str, type] = {"select": Selecting, "optimize": Optimizing, "refine": Refining}
WORDS = ("norm", "regularizer", "search")  # settings that are a word or None
UNSET = ("repeats", "limits")  # mappings, which a user cannot set


@dataclass(frozen=True)
class Steer:
    """An objective with its driver and settings, which `choose` has checked."""

    name: str
    target: Callable[..., Any]  # an objective, or a class that makes one
    driver: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # as given
    sha256: str | None = None  # of a user's file

    @property
    def is_class(self) -> bool:
        return isinstance(self.target, type)

    @property
    def replaces_layout(self) -> bool:
        """Whether only the objective uses the layout's regions. The image is then drawn from its
        whole prompt, instead of with one prompt per region."""
        return self.name == "boxes" or bool(self.settings.get("retention"))

    def record(self) -> dict[str, Any]:
        """Returns what identifies this Steer in an image's saved settings: name, driver, settings,
        and the SHA-256 of a user's file."""
        said = {"name": self.name, "driver": self.driver, "settings": dict(sorted(self.settings.items()))}
        return said if self.sha256 is None else said | {"sha256": self.sha256}

    def options(self) -> dict[str, Any]:
        """Returns the given settings that belong to the objective, and not to its driver."""
        known = own_options(self.target)
        return {name: value for name, value in self.settings.items() if name in known}

    def made(self, sd: Model, asks: Sequence[Ask]) -> Objective:
        """Returns the objective for some images. Raises ValueError if the objective cannot be used
        for them, for example because a prompt names no subject."""
        return self.target(sd, asks, **self.options()) if self.is_class else self.target

    def how(self, objective: Objective) -> Any:
        """Returns the driver's settings: those published with the objective, or else the driver's
        defaults, with the given settings changed."""
        kind = HOW[self.driver]
        how: Any = getattr(objective, "how", None)
        if not isinstance(how, kind):
            # The size of a plain function's gradient is unknown, so it is scaled.
            scaled = self.driver != "refine" or self.is_class
            how = kind() if scaled else Refining(share=drivers.SHARE)
        given = {name: value for name, value in self.settings.items() if name in driver_options(self.driver)}
        if self.driver == "refine" and "lr" in given:
            given["scale"] = given.pop("lr")
        if "scale" in given:
            given["share"] = None
        return replace(how, **given)


def choose(
    objective: str | Callable[..., Any],
    *,
    driver: str | None = None,
    settings: Mapping[str, Any] | str | None = None,
) -> Steer:
    """Finds an objective and checks its driver and settings.

    `objective`: a name of noise/objectives/, FILE.py:NAME, a function or a class. `driver`: if
    None, the driver that the objective is published with, or refine if it states none. `settings`:
    a mapping, or text such as "lr=5,steps=50". Raises FileNotFoundError if FILE.py does not exist.
    Raises ValueError if there is no such objective, driver or setting, and for a wrong value.
    """
    sha256 = None
    if not isinstance(objective, str):
        target = objective
        name = getattr(objective, "__name__", type(objective).__name__)
    else:
        name = objective
        target, sha256 = _found(objective)
    driver = driver or getattr(target, "driver", "refine")
    if driver not in DRIVERS:
        raise ValueError(f"no driver is called {driver!r}; choose from {', '.join(DRIVERS)}")
    if hasattr(target, "refine") and driver != "refine":
        raise ValueError(f"the objective {name} has updates of its own: leave out --init-noise {driver}")
    given = read_settings(settings) if isinstance(settings, str) else dict(settings or {})
    known = driver_options(driver) | own_options(target)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"no setting of {name} under {driver} is called {key!r}; known: {', '.join(known)}"
            )
        given[key] = _checked(key, value, known[key])
    if driver == "refine" and {"lr", "scale"} <= given.keys():
        raise ValueError("lr and scale are the same setting under refine: give one")
    steer = Steer(name, target, driver, given, sha256)
    if not steer.is_class:
        steer.how(target)  # its errors
    else:
        HOW[driver](**{k: v for k, v in given.items() if k in HOW[driver].__dataclass_fields__})
    return steer


def driver_options(driver: str) -> dict[str, Any]:
    """Returns the settings that a driver accepts, name -> default."""
    options = {f.name: f.default for f in fields(HOW[driver]) if f.name not in UNSET}
    return {**options, "guidance": 1.0} | ({"lr": None} if driver == "refine" else {})


def own_options(target: Callable[..., Any]) -> dict[str, Any]:
    """Returns the settings that an objective's class accepts, name -> default. A plain function has
    none."""
    if not isinstance(target, type):
        return {}
    parameters = list(inspect.signature(target).parameters.values())[2:]  # after sd and asks
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


# --- settings ------------------------------------------------------------------------------------


def read_settings(text: str) -> dict[str, str]:
    """Parses settings: "lr=5,steps=50" -> {"lr": "5", "steps": "50"}. Raises ValueError for text of
    another form and for a name that is given twice."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"--objective-set takes settings such as lr=5,steps=50, not {part!r}")
        if key in found:
            raise ValueError(f"--objective-set gives {key} twice")
        found[key] = value
    return found


def _checked(key: str, value: Any, default: Any) -> Any:
    """Converts a setting's value to the type of its default. Raises ValueError if that is not
    possible."""
    given = value
    if isinstance(value, str):
        words = {"true": True, "false": False, "none": None}
        value = words.get(value.lower(), value)
        for kind in (int, float):
            if isinstance(value, str):
                try:
                    value = kind(value)
                except ValueError:
                    continue
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if value is None and default is not None and key not in WORDS:
        raise ValueError(f"the setting {key} cannot be none")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"the setting {key} must be a number, not {given!r}")
    if default is None and not (value is None or isinstance(value, str) is (key in WORDS)):
        default = "" if key in WORDS else 0.0
    if default is None or value is None or type(value) is type(default):
        return value
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise ValueError(
        f"the setting {key} must be {kinds.get(type(default), 'of its own type')}, not {given!r}"
    )


# --- where objectives are found ------------------------------------------------------------------


def is_file(text: str) -> bool:
    """Returns whether an objective's name is a file's: FILE.py:NAME or FILE.py."""
    return text.rpartition(":")[0].endswith(".py") or text.endswith(".py")


def _found(text: str) -> tuple[Callable[..., Any], str | None]:
    if is_file(text):
        return _from_file(text)
    if text not in NAMES and not text.startswith("reward:"):
        raise ValueError(
            f"no objective is called {text!r}; choose from {', '.join(NAMES)}, reward:NAME, "
            "or give FILE.py:NAME"
        )
    return find(text), None


_files: dict[Path, tuple[ModuleType, str]] = {}  # imported so far: a file runs once per process


def _from_file(text: str) -> tuple[Callable[..., Any], str]:
    """Imports FILE.py:NAME. Returns (NAME, SHA-256 of the file). The file's folder is not added to
    sys.path.

    Raises FileNotFoundError if there is no such file, and ValueError if the file cannot be imported
    or has no function NAME.
    """
    file, colon, name = text.rpartition(":")
    path = Path(file if colon and file.endswith(".py") else text)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: --objective takes a name, or FILE.py:NAME")
    key = path.resolve()
    if key not in _files:
        _files[key] = _imported(path), hashlib.sha256(path.read_bytes()).hexdigest()
    module, sha256 = _files[key]
    own = [
        k
        for k, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__
    ]
    target = getattr(module, name, None) if file.endswith(".py") else None
    if not callable(target):
        listed = ", ".join(sorted(own)) or "none"
        wanted = f"no function {name}" if file.endswith(".py") else "several, or none, to choose from"
        raise ValueError(f"{path} has {wanted}; its functions are: {listed}: give {path}:NAME")
    return target, sha256


def _imported(path: Path) -> ModuleType:
    name = f"minsd_objective_{len(_files)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        last = traceback.format_exception_only(error)[-1].strip()
        raise ValueError(f"{path} cannot be imported: {last} (--debug shows where)") from error
    return module


# --- a run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A Steer applied to one batch of images: `select`, `optimize` or `refine`."""

    sd: Model
    steer: Steer
    asks: list[Ask]
    steps: int | None = None
    sampler: str | None = None
    karras: bool = False
    negative_prompt: str = ""
    guidance_scale: float | None = None  # None: the model's
    records: list[dict[str, Any]] = field(default_factory=list)  # per image, for its settings

    def _lift(self, asks: Sequence[Ask]) -> tuple[Lift, Any]:
        objective = self.steer.made(self.sd, asks)
        guidance = float(self.steer.settings.get("guidance", 1.0))
        lift = Lift(
            self.sd,
            asks,
            objective,
            guidance=guidance,
            negative_prompt=self.negative_prompt,
            name=self.steer.name,
            course=self._course(),
        )
        return lift, self.steer.how(objective)

    def _course(self) -> Course:
        """Returns the settings of the run that draws the images."""
        config = self.sd.config
        scale = config.guidance(self.guidance_scale)
        sampler = self.sampler or config.sampler
        return Course(self.steps or config.steps, sampler, self.karras, scale, self.negative_prompt)

    def _timesteps(self) -> list[int | float]:
        return losses.listed_timesteps(self.sd, self.steps, self.sampler, self.karras)

    def check(self) -> None:
        """Raises ValueError if the objective cannot be used for these images. No network runs."""
        self.steer.how(self.steer.made(self.sd, self.asks))

    def select(
        self, candidates: Sequence[Sequence[int]], shape: Sequence[int], say: Callable[[str], None]
    ) -> list[Selection]:
        """Chooses each image's noise: that of one of the image's candidates (seeds), or with
        zero-order search a noise near that of the first candidate."""
        t = self._timesteps()[0]
        chosen = []
        for one, seeds in zip(self.asks, candidates, strict=True):
            begin = time.perf_counter()
            lift, how = self._lift([one])
            drafts: dict[int, float] = {}

            def score(x: Tensor, own: Sequence[int] | None = None, lift: Lift = lift) -> list[float]:
                rows = torch.zeros(len(x), dtype=torch.long, device=self.sd.device)
                return lift.score(x.to(self.sd.device, lift.dtype), rows, t, seeds=own)["loss"].tolist()

            if how.search is None:
                at_once = self.sd.batch_size(8 * shape[1], 8 * shape[2])
                left = iter(dict.fromkeys(seeds))  # in the order in which `select` scores them

                def scored(x: Tensor, score: Any = score, left: Iterator[int] = left) -> list[float]:
                    return score(x, list(islice(left, len(x))))

                found = drivers.select(scored, seeds, shape, at_once=at_once, progress=say)
            elif how.search == "halving":
                found, drafts = self._halved(lift, score, seeds, shape, how.part, say)
            else:
                found = drivers.search(
                    score, seeds[0], shape, rounds=how.rounds, count=how.count, near=how.near, progress=say
                )
            found.rows = sum(lift.rows.values())
            chosen.append(found)
            self._note(lift, 1, begin, after={"loss": round(found.score, 5)})
            if how.search == "zero-order":
                self.records[-1]["path"] = found.path  # empty if no neighbour was better
            if drafts:
                self.records[-1]["drafts"] = [{"seed": s, "loss": round(v, 5)} for s, v in drafts.items()]
        return chosen

    def _halved(
        self,
        lift: Lift,
        score: Callable[[Tensor, Sequence[int]], list[float]],
        seeds: Sequence[int],
        shape: Sequence[int],
        part: float,
        say: Callable[[str], None],
    ) -> tuple[Selection, dict[int, float]]:
        """Scores all `seeds` at the first timestep, then the best eighth of them (at least 2) after
        `part` of the run's steps. Chooses the best seed of the second scores. Returns the selection,
        with the first scores, and the second scores by seed, which are not comparable with them."""
        course = self._course()
        stop = min(max(1, round(part * course.steps)), len(self._timesteps()) - 1)

        def drafted(left: list[int]) -> list[float]:
            prompts = [lift.asks[0].prompt] * len(left)
            x, t = draft(self.sd, prompts, draw_noise(left, shape), left, stop, course)
            lift.rows["full"] += stop * len(left) * (1 if course.guidance_scale == 1 else 2)
            rows = torch.zeros(len(left), dtype=torch.long, device=self.sd.device)
            return lift.score(x.to(lift.dtype), rows, t, stop)["loss"].tolist()

        stages = [(lambda left: score(draw_noise(left, shape), left), max(2, len(seeds) // 8)), (drafted, 1)]
        found = drivers.halve(seeds, stages, progress=say)
        first, last = found.stages
        return Selection(found.seed, draw_noise([found.seed], shape), last[found.seed], first), last

    def optimize(self, start: Tensor, say: Say) -> list[Result]:
        """Optimises each image's noise, starting from `start` (B,4,h,w)."""
        begin = time.perf_counter()
        lift, how = self._lift(self.asks)
        t = self._timesteps()[0]
        lift.begin()
        results = drivers.optimize(
            lambda x, rows: lift.slope(x, rows, t, limits=how.limits or None),
            lambda x, rows: lift.score(x, rows, t),
            start,
            torch.arange(len(start), device=self.sd.device),
            how,
            device=self.sd.device,
            dtype=lift.dtype,
            draws=generators([one.seed for one in self.asks], skip=start.shape[1:]),
            progress=say,
        )
        noise = torch.cat([result.noise for result in results])
        pulls = {name: pull(noise, start.to(noise)) for name, (pull, _) in REGULARIZERS.items()}
        for b, result in enumerate(results):
            distance = {name: round(float(values[b]), 5) for name, values in pulls.items()}
            self._note(lift, len(start), begin, **_ended(result), regularizers=distance)
        return results

    def noise(self, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Returns the noise (B,4,h,w) that the driver, select or optimize, finds from the images'
        seeds. For select, the candidates are those of `candidate_seeds`, as on the command line.
        """
        if self.steer.driver == "select":
            count = int(self.steer.settings.get("candidates", Selecting.candidates))
            listed = [candidate_seeds(seed, count) for seed in seeds]
            return torch.cat([one.noise for one in self.select(listed, shape, lambda message: None)])
        results = self.optimize(draw_noise(list(seeds), shape), lambda b, message: None)
        return torch.cat([result.noise for result in results])

    def refine(self, say: Say | None = None) -> tuple[Refine, Callable[[], None]]:
        """Returns (refine, end): the function that updates the latents before each prediction, and
        a function to call after the run, which adds to `records`."""
        begin = time.perf_counter()
        lift, how = self._lift(self.asks)
        results = [Result(torch.empty(0)) for _ in self.asks]
        own = getattr(lift.objective, "refine", None)
        if own is not None:
            move = own(self.sd, lift, len(self._timesteps()), say)
        else:
            run = {"steps": self.steps, "sampler": self.sampler, "karras": self.karras}
            move = drivers.refine(
                self.sd,
                lift.slope,
                how,
                len(self.asks),
                begin=lift.begin,
                record=results,
                progress=say,
                **run,
            )

        def end() -> None:
            for result in results:
                self._note(lift, len(self.asks), begin, **_ended(result))

        return move, end

    def _note(self, lift: Lift, images: int, begin: float, **values: Any) -> None:
        rows = {kind: round(n / images, 2) for kind, n in sorted(lift.rows.items())}
        seconds = round((time.perf_counter() - begin) / images, 3)
        values["reward"] = getattr(lift.objective, "identity", None)
        said = {name: value for name, value in values.items() if value not in (None, {})}
        self.records.append({**self.steer.record(), **said, "rows": rows, "seconds": seconds})


def _ended(result: Result) -> dict[str, Any]:
    before, after = ({k: round(v, 5) for k, v in told.items()} for told in (result.before, result.after))
    return {"before": before, "after": after, "met": result.met, "note": result.note}


Begin = Callable[..., tuple[Tensor, Refine | None]]


def asked(
    objective: Callable[..., Any] | str | None,
    driver: str | None,
    settings: Mapping[str, Any] | None,
    subjects: Subjects,
    pairs: str | None,
    taken: bool,
) -> Begin | None:
    """Prepares an objective for `StableDiffusion.__call__`. Returns a function to call for each
    batch, or None if `objective` is None. That function returns (noise, refine): the noise
    (B,4,h,w) to begin from, and the updates of the latents or None.

    `taken` is whether the caller has also given noise or updates. Raises ValueError if an objective
    is given although `taken` is true, or if no objective is given although driver, settings, subjects
    or pairs is. Raises the errors of `choose` too.
    """
    if objective is None:
        if any(given is not None for given in (driver, settings, subjects, pairs)):
            raise ValueError("driver, settings, subjects and pairs are for an objective: give one")
        return None
    if taken:
        raise ValueError("an objective finds the noise or the updates itself: leave out noise and refine")
    steer = choose(objective, driver=driver, settings=settings)

    def begin(
        sd: Model, prompts: list[str], seeds: list[int], noise: Tensor, *run: Any
    ) -> tuple[Tensor, Refine | None]:
        asks = ask(sd, prompts, seeds, None if subjects is None else [subjects] * len(seeds), pairs)
        batch = Run(sd, steer, asks, *run)
        if steer.driver == "refine":
            return noise, batch.refine()[0]
        return batch.noise(seeds, noise.shape[1:]), None

    return begin
