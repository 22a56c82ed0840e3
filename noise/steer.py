"""Turns an objective's name, or a user's own function, into a `Steer`: the objective with the
driver (noise/drivers.py) that minimises it, and the settings of both.

    steer = choose("syngen", settings={"until": "10"})          # a name of noise/objectives/
    steer = choose("reward:pickscore")                           # a reward of noise/objectives/reward.py
    steer = choose("mine.py:my", driver="optimize")              # a function in a file
    steer = choose(my, driver="select")                          # a function

`choose` checks everything that can be checked without a model. A file of objectives runs as Python
code with the rights of the user who names it, so its name is taken from a command line or a
program, never from a prompts file or an image.
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
from minsd.noise.regularizers import measures, moments
from minsd.samplers.random import generators
from minsd.samplers.schedule import Refine, Timestep

DRIVERS = ("select", "optimize", "refine")


@dataclass(frozen=True)
class Selecting:
    """Settings of the driver select, the method that scores several noises and chooses the best."""

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
NEEDED = inspect.Parameter.empty  # in place of the default of a setting that has none
SEARCHES = {"rounds": "zero-order", "count": "zero-order", "near": "zero-order", "part": "halving"}
UNSET = ("repeats", "limits")  # mappings, which a user cannot set


@dataclass(frozen=True)
class Steer:
    """An objective, the driver (the method that minimises it), and the settings of both. `choose`
    makes a Steer and checks it."""

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
        """Returns True if the regions of a layout are used by the objective alone. The image is
        then drawn from its whole prompt, instead of with one prompt per region."""
        return self.name == "boxes" or bool(self.settings.get("retention"))

    def record(self) -> dict[str, Any]:
        """Returns what identifies this Steer in an image's saved settings, as a dict: name, driver,
        settings, and the SHA-256 of the user's file if the objective is from one."""
        said = {"name": self.name, "driver": self.driver, "settings": dict(sorted(self.settings.items()))}
        return said if self.sha256 is None else said | {"sha256": self.sha256}

    def options(self) -> dict[str, Any]:
        """Returns the user's settings for the objective, without those for its driver, as name ->
        value."""
        known = own_options(self.target)
        return {name: value for name, value in self.settings.items() if name in known}

    def made(self, sd: Model, asks: Sequence[Ask]) -> Objective:
        """Returns the objective for some images; `asks` holds one Ask (prompt, seed, subjects,
        groups, layout) per image. Raises ValueError if the objective cannot be used for them, for
        example because a prompt names no subject."""
        return self.target(sd, asks, **self.options()) if self.is_class else self.target

    def how(self, objective: Objective) -> Any:
        """Returns the settings of the driver, a `Selecting`, `Optimizing` or `Refining`. They are
        those published with the objective or, if there are none, the driver's defaults. Settings
        that the user gave replace them."""
        kind = HOW[self.driver]
        how: Any = getattr(objective, "how", None)
        if not isinstance(how, kind):
            # The size of the gradient of a user's own objective is unknown, so it is scaled.
            own = not (self.is_class and self.name in NAMES)
            how = Refining(share=drivers.SHARE) if own and self.driver == "refine" else kind()
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

    `objective` is a name of noise/objectives/, FILE.py:NAME, a function, or a class that makes one.
    `driver` is "select", "optimize" or "refine"; None means the driver that the objective is
    published with, or refine if it states none. `settings` are those of objective and driver, as a
    mapping, or as text such as "lr=5,steps=50".

    Raises FileNotFoundError if FILE.py does not exist, TypeError for an objective of another type,
    and ValueError if there is no such objective, driver or setting, for a wrong value, and for a
    class that cannot be used as an objective.
    """
    sha256 = None
    if isinstance(objective, str):
        name = objective
        target, sha256 = _found(objective)
    elif callable(objective):
        target = objective
        name = getattr(objective, "__name__", type(objective).__name__)
    else:
        kind = type(objective).__name__
        raise TypeError(f"an objective is a name, FILE.py:NAME, a function or a class, not of type {kind}")
    driver = driver or getattr(target, "driver", "refine")
    if driver not in DRIVERS:
        raise ValueError(f"no driver is called {driver!r}; choose from {', '.join(DRIVERS)}")
    if hasattr(target, "refine") and driver != "refine":
        raise ValueError(f"the objective {name} has updates of its own: leave out --init-noise {driver}")
    given = read_settings(settings) if isinstance(settings, str) else dict(settings or {})
    if isinstance(target, type):
        _check_class(name, target, given)
    known = driver_options(driver) | own_options(target)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"no setting of {name} under {driver} is called {key!r}; known: {', '.join(known)}"
            )
        given[key] = _checked(key, value, known[key])
    if driver == "refine" and {"lr", "scale"} <= given.keys():
        raise ValueError("lr and scale are the same setting under refine: give one")
    if driver == "select":
        _check_search({key: given[key] for key in given.keys() - own_options(target).keys()})
    steer = Steer(name, target, driver, given, sha256)
    if not steer.is_class:
        steer.how(target)  # raises its errors
    else:
        HOW[driver](**{k: v for k, v in given.items() if k in HOW[driver].__dataclass_fields__})
    return steer


def driver_options(driver: str) -> dict[str, Any]:
    """Returns the settings that a driver ("select", "optimize" or "refine") accepts, as name ->
    default."""
    options = {f.name: f.default for f in fields(HOW[driver]) if f.name not in UNSET}
    return {**options, "guidance": 1.0} | ({"lr": None} if driver == "refine" else {})


def own_options(target: Callable[..., Any]) -> dict[str, Any]:
    """Returns the settings that the class of an objective accepts, as name -> default, or NEEDED
    for a setting without a default. A plain function has none."""
    if not isinstance(target, type):
        return {}
    parameters = list(inspect.signature(target).parameters.values())[2:]  # after sd and asks
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _check_class(name: str, target: type, given: Mapping[str, Any]) -> None:
    """Raises ValueError unless a class can be called as cls(sd, asks) with the given settings, and
    its instances as objective(look)."""
    if not any("__call__" in vars(cls) for cls in target.__mro__):
        raise ValueError(f"{name} is a class without __call__: define __call__(self, look)")
    parameters = list(inspect.signature(target).parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        made = f"{target.__name__}(sd, asks)"
        raise ValueError(f"{name} is a class that {made} does not make: define __init__(self, sd, asks)")
    for setting, default in own_options(target).items():
        if default is NEEDED and setting not in given:
            raise ValueError(
                f"{name} needs the setting {setting}: give --objective-set {setting}=VALUE, or a default"
            )


def _check_search(given: Mapping[str, Any]) -> None:
    """Raises ValueError if `given`, the user's settings of the driver select, has a setting that is
    not for the search named by given["search"]."""
    search = given.get("search")
    if search == "zero-order" and "candidates" in given:
        raise ValueError(
            "zero-order search begins from the seed's own noise and has no candidates: set its size by "
            "--objective-set rounds=4,count=4"
        )
    for setting, wanted in SEARCHES.items():
        if setting in given and search != wanted:
            raise ValueError(f"{setting} is a setting of search={wanted}: give that too, or leave it out")


# --- settings ------------------------------------------------------------------------------------


def read_settings(text: str) -> dict[str, str]:
    """Parses a text of settings: "lr=5,steps=50" gives {"lr": "5", "steps": "50"}. Raises
    ValueError for text of another form and for a name that is given twice."""
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
    """Converts `value`, given for the setting `key`, to the type of the setting's default. Raises
    ValueError if that is not possible."""
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
    if default is NEEDED:
        return value
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
    """Returns True if `text`, the name of an objective, refers to a Python file: FILE.py:NAME or
    FILE.py."""
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
    """Imports the file in `text`, FILE.py:NAME. Returns (target, sha256): the function or class
    NAME, and the SHA-256 of the file. The file's folder is not added to sys.path.

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
    """A Steer (an objective with its driver and settings) applied to one batch of images. The
    methods `select`, `optimize` and `refine` run the driver of that name."""

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
        how = self.steer.how(self.steer.made(self.sd, self.asks))
        if self.steer.driver == "select" and how.search == "halving":
            self._draft_steps(how.part)

    def _draft_steps(self, part: float) -> int:
        """Returns the number of steps of a draft (the first steps of a run): the fraction `part` of
        the run's steps, but at least 1 and fewer than the run takes. Raises ValueError if the run
        has a single step."""
        last = len(self._timesteps()) - 1
        if last < 1:
            raise ValueError("search=halving drafts the first steps of a run: give 2 --steps or more")
        return min(max(1, round(part * (self.steps or self.sd.config.steps))), last)

    def select(
        self, candidates: Sequence[Sequence[int]], shape: Sequence[int], say: Callable[[str], None]
    ) -> list[Selection]:
        """Chooses each image's noise. `candidates` holds a list of seeds per image, and `shape` is
        (4,h,w) of one noise. The choice is the candidate with the lowest loss or, with the search
        "zero-order", a noise near that of the first candidate. Returns one Selection per image.
        `say(message)` is called with the progress."""
        t = self._timesteps()[0]
        chosen = []
        for k, (one, seeds) in enumerate(zip(self.asks, candidates, strict=True)):
            told = drivers.part_of(say, k, len(self.asks))
            begin = time.perf_counter()
            lift, how = self._lift([one])
            drafts: dict[int, float] = {}

            def score(x: Tensor, own: Sequence[int] | None = None, lift: Lift = lift) -> list[float]:
                return _scores(lift, x.to(self.sd.device, lift.dtype), t, seeds=own)

            left = iter(dict.fromkeys(seeds))  # in the order in which `drivers.select` scores them

            def scored(x: Tensor, score: Any = score, left: Iterator[int] = left) -> list[float]:
                return score(x, list(islice(left, len(x))))

            try:
                if how.search is None:
                    at_once = self.sd.batch_size(8 * shape[1], 8 * shape[2])
                    found = drivers.select(scored, seeds, shape, at_once=at_once, progress=told)
                elif how.search == "halving":
                    found, drafts = self._halved(lift, score, seeds, shape, how.part, told)
                else:
                    around = {"rounds": how.rounds, "count": how.count, "near": how.near}
                    found = drivers.search(score, seeds[0], shape, **around, progress=told)
            except FloatingPointError:
                raise ValueError(f"no candidate has a score: {lift.not_finite([0])}") from None
            found.rows = sum(lift.rows.values())
            chosen.append(found)
            self._note(lift, 1, begin, after=_rounded({"loss": found.score}))
            if how.search == "zero-order":
                self.records[-1]["path"] = found.path  # empty if no neighbour was better
            if drafts:
                self.records[-1]["drafts"] = [
                    {"seed": seed, "loss": drivers.rounded(loss)} for seed, loss in drafts.items()
                ]
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
        """Chooses one image's seed in two stages, by losses: lower is better. First, `score(noises,
        seeds)` returns the losses of all `seeds` at the first timestep. Then an eighth of the
        seeds, those with the lowest losses (at least 2 seeds), are sampled for the fraction `part`
        of the run's steps, and `lift` evaluates the loss of the latents reached. The seed with the
        lowest second loss is chosen. `shape` is (4,h,w) of one noise. `say(message)` is called
        after each stage.

        Returns (selection, drafts): the chosen seed with the first losses of all seeds, and the
        second losses as seed -> loss. First and second losses are not comparable.
        """
        course = self._course()
        stop = self._draft_steps(part)

        def drafted(left: list[int]) -> list[float]:
            prompts = [lift.asks[0].prompt] * len(left)
            x, t = draft(self.sd, prompts, draw_noise(left, shape), left, stop, course)
            lift.rows["full"] += stop * len(left) * (1 if course.guidance_scale == 1 else 2)
            return _scores(lift, x.to(lift.dtype), t, stop)

        stages = [(lambda left: score(draw_noise(left, shape), left), max(2, len(seeds) // 8)), (drafted, 1)]
        found = drivers.halve(seeds, stages, progress=say)
        first, last = found.stages
        return Selection(found.seed, draw_noise([found.seed], shape), last[found.seed], first), last

    def optimize(self, start: Tensor, say: Say) -> list[Result]:
        """Optimises the noises `start` (B,4,h,w) of the batch by the driver optimize. Returns one
        Result per image. `say(b, message)` is called with the progress of image b."""
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
            not_finite=lift.not_finite,
            progress=say,
        )
        noise = torch.cat([result.noise for result in results])
        # Whatever the regularizer was: a noise unlike unit noise may please the objective alone.
        shape = drivers.values_of(moments(noise)), drivers.values_of(measures(noise, start))
        for result, of_noise, values in zip(results, *shape):
            ends = {"noise": _rounded(of_noise), "regularizers": _rounded(values)}
            self._note(lift, len(start), begin, **_ended(result), **ends)
        return results

    def noise(self, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Returns the noise (B,4,h,w) that the driver, select or optimize, finds for images with
        these seeds. `shape` is (4,h,w) of one noise. For select, the candidates of each image are
        those of `candidate_seeds`, as on the command line."""
        if self.steer.driver == "select":
            count = int(self.steer.settings.get("candidates", Selecting.candidates))
            listed = [candidate_seeds(seed, count) for seed in seeds]
            return torch.cat([one.noise for one in self.select(listed, shape, lambda message: None)])
        results = self.optimize(draw_noise(list(seeds), shape), lambda b, message: None)
        return torch.cat([result.noise for result in results])

    def refine(self, say: Say | None = None) -> tuple[Refine, Callable[[], None]]:
        """Returns (refine, end): the function `refine(i, t, x) -> x` that samplers call to update
        the latents before each noise prediction, and a function to call after the run, which adds
        an entry per image to `records`. `say(b, message)` is called with the progress of image
        b."""
        begin = time.perf_counter()
        lift, how = self._lift(self.asks)
        results = [Result(torch.empty(0)) for _ in self.asks]
        own = getattr(lift.objective, "refine", None)
        if own is not None:
            move = own(self.sd, lift, len(self._timesteps()), results, say)
        else:
            run = {"steps": self.steps, "sampler": self.sampler, "karras": self.karras}
            move = drivers.refine(
                self.sd,
                lift.slope,
                how,
                len(self.asks),
                begin=lift.begin,
                record=results,
                not_finite=lift.not_finite,
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


def _scores(
    lift: Lift, x: Tensor, t: Timestep, i: int | None = None, seeds: Sequence[int] | None = None
) -> list[float]:
    """Evaluates the objective for the first image of `lift` at k latents x (k,4,h,w) and timestep
    t. Returns a list of the k losses, with NaN for those that are not finite. `i` and `seeds` are
    as in `Lift.score`."""
    loss = lift.score(x, torch.zeros(len(x), dtype=torch.long, device=x.device), t, i, seeds)["loss"]
    return loss.where(loss.isfinite(), math.nan).tolist()


def _ended(result: Result) -> dict[str, Any]:
    before, after = _rounded(result.before), _rounded(result.after)
    return {"before": before, "after": after, "met": result.met, "note": result.note}


def _rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: drivers.rounded(value) for name, value in values.items()}


Begin = Callable[..., tuple[Tensor, Refine | None]]


def asked(
    objective: Callable[..., Any] | str | None,
    driver: str | None,
    settings: Mapping[str, Any] | None,
    subjects: Subjects,
    pairs: str | None,
    taken: bool,
) -> Begin | None:
    """Prepares an objective for `StableDiffusion.__call__`. Returns None if `objective` is None.
    Otherwise returns a function begin(sd, prompts, seeds, noise, *run), to be called for each
    batch; `run` are steps, sampler, karras, negative prompt and guidance scale. It returns (noise,
    refine): the noise (B,4,h,w) to begin from, and the function that updates the latents during the
    run, or None if there is none.

    `objective`, `driver` and `settings` are those of `choose`; `subjects` and `pairs` (nouns with
    their modifiers) are for the objective. `taken` is True if the caller has also given noise or
    updates of the latents, which an objective would replace.

    Raises ValueError if an objective is given although `taken` is True, or if no objective is given
    although driver, settings, subjects or pairs are. Raises the errors of `choose` too.
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
