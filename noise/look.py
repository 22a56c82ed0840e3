"""Objectives, and the `Look` (one evaluation of the UNet) that an objective judges.

An objective judges initial noise, or the latents of any step. It is a function of a `Look`:

    objective(look) -> (b,)              lower is better, one value per image
    objective(look) -> (b,), told        also `told`, a dict of further values to report:
                                         name -> (b,)

A `Look` offers attention maps, predicted noise, predicted clean latents, the image that these
latents decode to, and the image that a whole run draws from the noise. Each of them is computed only
when the objective reads it. If the objective reads only attention maps, the UNet evaluation stops
after the last of them. If it reads nothing, the UNet is not evaluated.

`Lift` turns an objective into two functions, `score` (values) and `slope` (values and gradients).
The drivers (noise/drivers.py) need nothing else to minimise the objective. Published methods are in
noise/objectives/.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minsd.attention import AttentionRecorder
from minsd.graphs import differentiating
from minsd.guidance import Model, eps_from_output
from minsd.noise import losses
from minsd.noise.layout import SizedLayout
from minsd.noise.losses import Subjects
from minsd.noise.pairs import Group, find_groups, read_groups
from minsd.samplers import SAMPLERS
from minsd.samplers.random import generators
from minsd.samplers.schedule import Timestep, clean

Told = dict[str, Tensor]  # values to report, by name: name -> one value per image, (b,)
Objective = Callable[["Look"], Tensor | tuple[Tensor, Told]]


@dataclass(frozen=True)
class Ask:
    """What an objective needs to know of one image: prompt, seed, subjects, groups of a noun with
    its modifiers, and layout."""

    prompt: str
    seed: int = 0
    # Token positions of each subject. Empty if the prompt names no subject.
    subjects: list[list[int]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)  # nouns with their modifiers
    layout: SizedLayout | None = None


@dataclass(frozen=True)
class Course:
    """Settings of the run that will draw the image."""

    steps: int
    sampler: str
    karras: bool = False
    guidance_scale: float = 7.5
    negative_prompt: str = ""


def ask(
    sd: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    subjects: Sequence[Subjects] | None = None,
    pairs: str | None = None,
    layout: SizedLayout | None = None,
) -> list[Ask]:
    """Makes one `Ask` per image, which holds what an objective needs to know of the image: prompt,
    seed, subjects, groups and layout. No network runs.

    `subjects` has one item per image: a list of words or token indices, or None to find the
    subjects in the prompt. If `subjects` itself is None, they are found in every prompt. `pairs` is
    a text that lists groups of a noun with its modifiers, such as "red circle; blue square", and
    holds for all images; if it is None, the groups are found in each prompt. If none are found, the
    list in the Ask is empty. Raises ValueError if given subjects or pairs are malformed or not in
    the prompt.
    """
    asks = []
    for b, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        given = None if subjects is None else subjects[b]
        try:
            places = losses.resolve(sd.text, prompt, given)
        except ValueError:
            if given is not None:
                raise
            places = []
        if pairs is not None:
            groups = read_groups(sd.text, prompt, pairs)
        else:
            groups = find_groups(sd.text, prompt)
        asks.append(Ask(prompt, seed, places, groups, layout))
    return asks


class Look:
    """One evaluation of the UNet, as an objective sees it: latents x (b,4,h,w) of some images of a
    batch at timestep t, and what the UNet computes from them. Attention maps and predictions are
    computed when they are first read.

    `i` is the number of the run's step, or None before the run begins. `phase` is "score" for an
    evaluation without gradients, "update" for the one update of a step, and "repeat" for the
    repeated updates that may precede it. `index` (b,) holds, for each image in x, the image's
    number in the batch.
    """

    def __init__(
        self,
        lift: "Lift",
        x: Tensor,
        index: Tensor,
        t: Timestep,
        i: int | None = None,
        phase: str = "score",
        seeds: Sequence[int] | None = None,
    ):
        self._lift = lift
        self._seeds = seeds
        self._held: dict[str, Tensor] = {}
        self.evaluations: list[tuple[str, int]] = []  # ("full" or "stopped", rows) of each evaluation
        self.x = x
        self.index = index
        self.t = t
        self.i = i
        self.phase = phase

    @cached_property
    def rows(self) -> list[int]:
        """For each image in x, the image's number in the batch, as a list."""
        return self.index.tolist()

    @property
    def asks(self) -> list[Ask]:
        """The `Ask` of each image in x, which holds prompt, seed, subjects, groups and layout."""
        return [self._lift.asks[row] for row in self.rows]

    def read(self, *kinds: str) -> list[Tensor]:
        """Returns one tensor for each of `kinds`: "cross" or "self" (attention maps), "eps" or
        "uncond" (noise predicted with the prompt or the negative prompt). The UNet is evaluated if
        one of them is not yet computed.

        Kinds that are read together come from one evaluation. Each evaluation also computes every
        kind that was read in earlier Looks of the same Lift, so that only the first Look may need
        several evaluations.
        """
        self._lift.asked.update(kinds)
        missing = self._lift.asked - self._held.keys()
        if not self._held.keys() >= set(kinds):
            self._held |= self._evaluate(missing)
        return [self._held[kind] for kind in kinds]

    def _evaluate(self, wanted: set[str]) -> dict[str, Tensor]:
        sd = self._lift.sd
        b = len(self.x)
        maps = [kind for kind in ("cross", "self") if kind in wanted]
        passes = [kind for kind in ("eps", "uncond") if kind in wanted]
        contexts = []
        if maps or "eps" in wanted:
            contexts.append(self._lift.context[self.index])
        if "uncond" in wanted:
            contexts.append(self._lift.uncond.expand(b, -1, -1))
        longest = max(context.shape[1] for context in contexts)
        contexts = [c if c.shape[1] == longest else sd.text.filled(c, longest) for c in contexts]
        x = torch.cat([self.x] * len(contexts)).to(contexts[0].dtype)
        options = {"record": AttentionRecorder(only=not passes, kinds=maps)} if maps else {}
        output = sd.unet(x, self.t, torch.cat(contexts), **options)
        self.evaluations.append(("full" if passes else "stopped", len(x)))
        out = {kind: getattr(options["record"], kind)[:b] for kind in maps}
        if passes:
            latents = torch.cat([self.x] * len(contexts))
            eps = eps_from_output(output.to(latents.dtype), latents, self.t, sd.schedule)
            # If `wanted` has maps and no "eps", the first b rows served only for the maps.
            out |= dict(zip(reversed(passes), reversed(eps.split(b))))
        return out

    @property
    def cross(self) -> Tensor:
        """Cross-attention probabilities (b,h,w,77n), averaged over heads and layers, at the
        recorded resolution h x w. The last axis holds the positions of the prompt's n chunks of 77
        tokens."""
        return self.read("cross")[0]

    @property
    def self(self) -> Tensor:
        """Self-attention probabilities (b,h,w,h*w) at the recorded resolution h x w, averaged over
        heads and layers. The last axis holds the cells that are attended to."""
        return self.read("self")[0]

    @cached_property
    def maps(self) -> Tensor:
        """Attention maps of the subjects, (b,S,h,w): the cross-attention of each cell to each of S
        subjects, sharpened by a softmax over tokens and smoothed."""
        return losses.subject_maps(self.cross, self._subjects())

    @cached_property
    def claims(self) -> Tensor:
        """The region that each of S subjects is expected to fill, (b,S,h,w): the smoothed
        self-attention of the cell at which the subject's cross-attention map (`maps`) is
        largest."""
        own = self.read("cross", "self")[1]  # one evaluation for both: `maps` reads "cross"
        return losses.claims(own, losses.peaks(self.maps))

    @cached_property
    def present(self) -> Tensor:
        """Booleans (b,S): element [k, s] is True if image k has a subject number s. Images of a
        batch may have different numbers of subjects; S is the largest."""
        return self._subjects().any(dim=-1)

    def _subjects(self) -> Tensor:
        if not self._lift.select.shape[1]:
            raise ValueError(
                f"{self._lift.name} reads the subjects' maps, and the prompt names none: give --subjects"
            )
        return self._lift.select[self.index]

    def words(self, select: Tensor, *, sharp: bool = False, smooth: bool = False) -> Tensor:
        """Returns the cross-attention maps (b,S,h,w) of S words per image. `select` (b,S,77n), made
        by `losses.selector`, selects the tokens of each word among the n chunks of 77 tokens; the
        maps of a word's tokens are averaged.

        With `sharp`, the cross-attention C is first sharpened to softmax(100 C) over all tokens but
        the first and last of each chunk. With `smooth`, the maps are smoothed by `losses.smooth`.
        """
        return _word_maps(self.cross, select, sharp, smooth)

    def maps_of(
        self, k: int, words: Sequence[Sequence[int]], *, sharp: bool = True, smooth: bool = True
    ) -> Tensor:
        """Returns the cross-attention maps (n,h,w) of n words in image k of this Look (k counts
        from 0).

        `words` holds the token positions of each word. `sharp` and `smooth` are those of the method
        `words`.
        """
        cross = self.cross[k : k + 1]
        return _word_maps(cross, losses.selector([words], cross.shape[-1]), sharp, smooth)[0]

    @property
    def eps(self) -> Tensor:
        """The noise (b,4,h,w) predicted with the prompt."""
        return self.read("eps")[0]

    @property
    def uncond(self) -> Tensor:
        """The noise (b,4,h,w) predicted with the negative prompt."""
        return self.read("uncond")[0]

    @cached_property
    def x0(self) -> Tensor:
        """Predicted clean latents (b,4,h,w): (x - sqrt(1 - abar) e) / sqrt(abar). Here abar is the
        schedule's cumulative product of alphas at the timestep, and e the noise predicted with the
        guidance scale that the Lift was given (with 1, the prompt's prediction alone)."""
        guidance = self._lift.guidance
        if guidance == 1:
            e = self.eps
        else:
            e, u = self.read("eps", "uncond")
            e = u + guidance * (e - u)
        return clean(self.x, e, self._lift.sd.schedule.abar(self.t))

    @cached_property
    def picture(self) -> Tensor:
        """The images (b,3,H,W), with values 0 to 1, that the predicted clean latents x0 decode to.
        If x0 needs a gradient, the backward pass recomputes the decoder's activations instead of
        storing them."""
        return self._decoded(self.x0)

    @cached_property
    def drawn(self) -> Tensor:
        """The images (b,3,H,W), with values 0 to 1, that the whole run draws from the noises x.

        If x needs a gradient, the backward pass recomputes the activations of every step and of the
        decoder instead of storing them. So memory holds the activations of one step, or of the
        decoder, at a time. Raises ValueError within a run, where x is no initial noise, and if the
        Lift was given no `course`.
        """
        course = self._lift.course
        if course is None or self.i is not None:
            raise ValueError(
                f"{self._lift.name} reads the image that a run draws from a noise, which does not exist "
                "within a run: use --init-noise select or optimize"
            )
        sd = self._lift.sd
        scale = course.guidance_scale
        uncond = self._lift.uncond if scale != 1 else self._lift.context[:1]
        predict = sd.predictor(self._lift.context[self.index], uncond, scale)
        branches = 1 if scale == 1 or sd.config.unet.guidance_dim else 2

        def counted(x: Tensor, t: Timestep) -> Tensor:
            self.evaluations.append(("full", branches * len(x)))
            return predict(x, t)

        seeds = [one.seed for one in self.asks] if self._seeds is None else self._seeds
        options: dict[str, Any] = {"karras": True} if course.karras else {}
        x = self.x.to(sd.dtype)
        walk = SAMPLERS[course.sampler](
            lambda x, t: recomputed(counted, x, t),
            x,
            sd.schedule,
            course.steps,
            generator=generators(seeds, skip=x.shape[1:]),
            **options,
        )
        for _, _, x in walk:  # noqa: B007
            pass
        return self._decoded(x)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Returns the images (b,3,H,W), with values 0 to 1, that latents (b,4,h,w) decode to."""
        sd = self._lift.sd
        z = latents.to(sd.vae_dtype) / sd.config.vae.scaling_factor
        return (recomputed(sd.vae.decode, z).to(self.x.dtype) / 2 + 0.5).clamp(0, 1)


def recomputed(function: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """Returns function(x, *more). If x needs a gradient, the backward pass computes the function's
    activations again instead of storing them."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x, *more)
    out = checkpoint(function, x, *more, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


class Lift:
    """An objective bound to a model and to the images of a batch. `score` returns the objective's
    values, and `slope` its values and gradients.

    `guidance` is the guidance scale of `Look.x0`. `negative_prompt` is the prompt of `Look.uncond`.
    `course` holds the settings of the run by which `Look.drawn` makes the images. The model's
    weights take no gradient. `sd.unet` is read at each call, so a ControlNet may be added to or
    removed from the model between calls.

    The attribute `rows` counts UNet rows (a row is one image evaluated with one prompt). Rows that
    were differentiated are counted under the key "gradient". The others are counted under "stopped"
    if the evaluation stopped after the attention maps, and under "full" if it did not.
    """

    def __init__(
        self,
        sd: Model,
        asks: Sequence[Ask],
        objective: Objective,
        *,
        guidance: float = 1.0,
        negative_prompt: str = "",
        name: str = "",
        course: Course | None = None,
    ):
        self.sd = sd
        self.course = course
        self.asks = list(asks)
        self.objective = objective
        self.guidance = guidance
        self.negative_prompt = negative_prompt
        self.name = name or getattr(objective, "__name__", type(objective).__name__)
        self.asked: set[str] = set()  # the kinds that any Look has read so far
        self.rows: Counter[str] = Counter()
        # (B, 77n, D); for SDXL (B, 77n + 1, D), whose last row has no attention map
        self.context = sd.encode_prompt([one.prompt for one in asks])
        places = [one.subjects for one in asks]
        tokens = self.context.shape[1] // losses.CHUNK * losses.CHUNK
        self.select = losses.selector(places, tokens).to(sd.device)  # (B, S, 77n)

    @cached_property
    def uncond(self) -> Tensor:
        """The text states of the negative prompt, (1,77n,D) for n chunks of 77 tokens."""
        return self.sd.encode_prompt([self.negative_prompt])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and gradients: float64 for a float64 UNet, otherwise float32."""
        return torch.promote_types(self.sd.dtype, torch.float32)

    def begin(self) -> None:
        """Calls the method `begin` of the objective, if it has one. That method resets the
        objective's state (such as a running mean) for a new run."""
        begin = getattr(self.objective, "begin", None)
        if begin is not None:
            begin()

    def _size(self, x: Tensor) -> int:
        """Returns how many images with latents of x's size the UNet evaluates at a time."""
        return self.sd.batch_size(8 * x.shape[-2], 8 * x.shape[-1])

    @torch.no_grad()
    def score(
        self, x: Tensor, rows: Tensor, t: Timestep, i: int | None = None, seeds: Sequence[int] | None = None
    ) -> Told:
        """Evaluates the objective, without gradients, at latents x (b,4,h,w) and timestep t. `rows`
        (b,) holds each image's number in the batch; `i` is the run's step, or None before the run.

        Returns the values to report as name -> (b,), with the objective's own value under "loss".
        As many images as `sd.batch_size` allows are evaluated at a time. `seeds` (b,) are those from
        which samplers draw their noise in `Look.drawn`; None means the seeds of the images' Asks.
        """
        parts = []
        for part in torch.arange(len(x), device=x.device).split(self._size(x)):
            own = None if seeds is None else [seeds[k] for k in part.tolist()]
            look = Look(self, x[part], rows[part], t, i, seeds=own)
            parts.append(self._judged(look)[1])
            self._count(look)
        return _joined(parts)

    def slope(
        self,
        x: Tensor,
        rows: Tensor,
        t: Timestep,
        i: int | None = None,
        phase: str = "update",
        limits: Mapping[str, float] | None = None,
    ) -> tuple[Told, Tensor]:
        """Evaluates the objective at latents x (b,4,h,w) and timestep t, and the gradient of its
        loss with respect to x. `rows` (b,) holds each image's number in the batch; `i` is the run's
        step, or None before the run; `phase` is passed to the `Look`.

        Returns (told, gradient): the values to report as name -> (b,), and the gradient (b,4,h,w)
        in x's dtype. `limits` (name -> value) saves work: if, on a CPU, all images that are
        evaluated together have values below all limits, nothing is differentiated and their
        gradients are 0.
        """
        parts: list[Told] = []
        gradients: list[Tensor] = []
        # A gradient needs more memory than a guided step. Gradients of maps are so small that
        # float16 would lose them.
        scale = 256.0 if self.context.dtype == torch.float16 else 1.0
        for part in torch.arange(len(x), device=x.device).split(max(1, self._size(x) // 2)):
            with torch.enable_grad(), differentiating(self.sd.unet):
                leaf = x[part].detach().requires_grad_()
                look = Look(self, leaf, rows[part], t, i, phase)
                loss, told = self._judged(look)
                # On a GPU this check would have to wait for the forward pass, so it is left out.
                done = bool(limits) and not x.is_cuda and bool(met(told, limits).all())
                if done:
                    gradient = torch.zeros_like(leaf)
                else:
                    self._check_gradient(loss, loss)
                    [gradient] = torch.autograd.grad(scale * loss.sum(), leaf, allow_unused=True)
                    self._check_gradient(loss, gradient)
                    gradient = gradient / scale
            self._count(look, differentiated=not done)
            parts.append(told)
            gradients.append(gradient)
        return _joined(parts), torch.cat(gradients)

    def _judged(self, look: Look) -> tuple[Tensor, Told]:
        """Calls the objective. Returns (loss, told): the loss (b,), and the values to report as
        name -> (b,), detached, with the loss under "loss". Raises ValueError unless the loss is a
        tensor with one value per image."""
        result: Any = self.objective(look)
        if isinstance(result, tuple) and (len(result) != 2 or not isinstance(result[1], dict)):
            raise ValueError(f"{self.name} must return the loss, or the loss and a dict of further values")
        loss, told = result if isinstance(result, tuple) else (result, {})
        b = len(look.x)
        if not isinstance(loss, Tensor) or loss.shape != (b,):
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"{self.name} returned {shape} for {b} images: one value per image is wanted, shape ({b},)"
            )
        for name, value in told.items():
            if not isinstance(value, Tensor) or value.shape != (b,):
                raise ValueError(f"{self.name} reports {name!r}: a tensor of shape ({b},) is wanted")
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in told.items()}}

    def _check_gradient(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Raises ValueError if `loss` does not depend on the latents. That is the case if the loss
        requires no gradient, or if autograd returned None as its `gradient`."""
        if not loss.requires_grad or gradient is None:
            raise ValueError(
                f"{self.name} does not depend on the latents, so it has no gradient: compute it from the "
                "look's tensors without detaching them, or use --init-noise select"
            )

    def not_finite(self, rows: Sequence[int]) -> str:
        """Returns a message for the user: that the objective's value or gradient is not finite for
        the images `rows` of the batch, which are named by their seeds, and what to do."""
        seeds = ", ".join(str(self.asks[row].seed) for row in rows)
        advice = "look in it for a division by 0, and for a log, root or norm of 0"
        if self.sd.dtype == torch.float16:
            advice = "try --dtype float32 or bfloat16"
        return f"the value of {self.name}, or its gradient, is not finite for seed {seeds}: {advice}"

    def _count(self, look: Look, differentiated: bool = False) -> None:
        for kind, n in look.evaluations:
            self.rows["gradient" if differentiated else kind] += n


def met(told: Told, limits: Mapping[str, float]) -> Tensor:
    """Returns a boolean per image, (b,): True if the values of the image in `told` (name -> (b,))
    are below all `limits` (name -> value)."""
    return torch.stack([told[name] < limit for name, limit in limits.items()]).all(dim=0)


def finite(told: Told, *more: Tensor) -> Tensor:
    """Returns a boolean per image, (b,): True if all values of the image in `told` (name -> (b,))
    are finite, and all elements of the image in each tensor of `more`, (b,...)."""
    checks = [value.isfinite() for value in told.values()]
    checks += [tensor.flatten(1).isfinite().all(dim=1) for tensor in more]
    return torch.stack(checks).all(dim=0)


def _joined(parts: Sequence[Told]) -> Told:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _word_maps(cross: Tensor, select: Tensor, sharp: bool, smooth: bool) -> Tensor:
    if sharp:
        cross = (100 * losses.inner(cross)).softmax(dim=-1)
        select = losses.inner(select)
    maps = losses.mean_maps(cross, select)
    return losses.smooth(maps) if smooth else maps
