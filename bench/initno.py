"""What does InitNO cost, per optimisation step and per image, against code in research style?

    python -m bench.initno [--model sd15] [--size 512] [--runs 2] [--csv]
    python -m bench.initno --device cuda --dtype float16 --csv

The providers (implementations to compare) use the same random weights, one thread on a CPU, and a
process each, so that each has a peak of memory (weights included) of its own. `minsd` is
`initno.optimize`, `excite.updates` and `sd.predictor` as they are; `eager_maps`, on a GPU, is the
same without CUDA graphs of the evaluations whose maps are differentiated. `research`, below, works
as the published programs do: every layer materialises its probabilities, and those of up to 32x32
cells are stored; weights take gradients; the UNet runs to its end; torch.optim.Adam optimises; the
graph of an update is kept through the guided step that follows. All must arrive at the same noises,
latents and predictions.

    optimise    a step of noise optimisation: losses of the maps, their gradient, Adam, and the
                projection to the limit of the KL divergence
    update      a step of the updates while denoising: the response loss of the maps, its gradient
    denoise     a guided step
    picture     a whole image, computed from the others: 10 times `optimise` (one round), 25 times
                `update` and 50 times `denoise`; leaves out refinements and further rounds, which
                repeat these steps, and text encoder and VAE

Times are medians, after one step to warm up, or two on a GPU. On a busy machine trust
`cpu_seconds`, which leaves out waiting for a core. On a CPU the peak of a process never falls, so
each peak includes those of the rows below it.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import Row, forget_peak, in_own_process, on_gpu, parser, peak_mb, report, wait
from bench.unet import context_rows, random_model
from minsd.attention import Attention, AttentionRecorder
from minsd.config import MODELS
from minsd.kernels import onednn
from minsd.noise import excite, initno, losses
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion, load

PROMPT = "a red circle and a blue square"
SUBJECTS = ["circle", "square"]
GUIDANCE = 7.5
T = 981
PROVIDERS = ("research", "minsd", "eager_maps")
PICTURE = {"optimise": 10, "update": 25, "denoise": 50}  # steps per image

Tick = Callable[[], None]  # called after every step


class Research:
    """InitNO for one image, implemented in the straightforward way of published programs."""

    def __init__(self, sd: StableDiffusion, context: Tensor, uncond: Tensor, cells: int) -> None:
        self.sd = sd
        recorder = AttentionRecorder()
        recorder.begin(sd.unet.grids((cells, cells)), sd.unet.attention_blocks)
        assert recorder.resolution is not None
        self.grid = recorder.resolution  # of the maps that the losses read
        self.context = context
        self.both = torch.cat([uncond, context])
        self.stored: list[Tensor] = []
        self.select = losses.selector([losses.resolve(sd.text, PROMPT, SUBJECTS)]).to(context.device)
        Attention.attend = staticmethod(self.attend)
        onednn.available = lambda *tensors: False  # PyTorch's own matrix products
        for module in sd.unet.modules():
            if isinstance(module, Attention):
                module.fused = None  # projections one by one, from weights that can take gradients
        sd.unet.requires_grad_()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        if q.shape[1] <= 32**2:
            self.stored.append(p)
        return torch.einsum("bhnm,bmhd->bnhd", p, v), None

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates the UNet once on latents x. Returns (maps, claims). `maps` are the subjects'
        cross-attention maps (M in noise/losses.py), and `claims` the self-attention maps at their
        peaks (A in noise/losses.py)."""
        self.stored.clear()
        self.sd.unet(x, T, self.context)
        cells = self.grid[0] * self.grid[1]
        means = []
        for keys in (77, cells):
            kept = [p.mean(dim=1) for p in self.stored if p.shape[2:] == (cells, keys)]
            means.append(torch.stack(kept).mean(dim=0).float().unflatten(1, self.grid))
        cross = losses.subject_maps(means[0], self.select)
        return cross, losses.claims(means[1], losses.peaks(cross))

    def optimise(self, start: Tensor, steps: int, tick: Tick) -> Tensor:
        log_var, mu = (torch.zeros_like(start, requires_grad=True) for _ in range(2))
        adam = torch.optim.Adam([log_var, mu], lr=1e-2, eps=1e-3)
        for _ in range(steps):
            maps, claims = self.maps((start * (0.5 * log_var).exp() + mu).to(self.context.dtype))
            cross = losses.cross_response(maps)
            conflict = losses.self_conflict(claims)
            loss = cross + conflict * (cross <= 0.5) + losses.clean_background(maps)
            if cross < 0.2 and conflict < 0.3:
                break
            self.sd.unet.zero_grad()
            adam.zero_grad()
            loss.sum().backward()
            adam.step()
            while (kl := losses.kl_divergence(mu, log_var)) > 1e-3:
                adam.zero_grad()
                kl.sum().backward()
                adam.step()
            tick()
        self.sd.unet.zero_grad()
        return (start * (0.5 * log_var).exp() + mu).detach()

    def update(self, x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        maps, _ = self.maps(leaf.to(self.context.dtype))
        self.loss = losses.cross_response(maps).sum()  # keeps its graph until the next update
        size = self.sd.config.update_scale * (1 - 0.5 / 49) ** 0.5
        return x - size * torch.autograd.grad(self.loss, leaf, retain_graph=True)[0]

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        self.stored.clear()
        u, c = self.sd.unet(torch.cat([x, x]), T, self.both).chunk(2)
        return u + GUIDANCE * (c - u)


class Ours:
    """minsd's InitNO for one image, run through the public functions that users call."""

    def __init__(self, sd: StableDiffusion, context: Tensor, uncond: Tensor, cells: int) -> None:
        self.sd = sd
        self.predict = sd.predictor(context, uncond, GUIDANCE)
        self.refine = excite.updates(sd, [PROMPT], [SUBJECTS], steps=50)

    def optimise(self, start: Tensor, steps: int, tick: Tick) -> Tensor:
        """Optimises `start`, which must be the noise of seed 0, for `steps` steps, and returns the
        result. `tick` is called after each of these steps.

        `initno.optimize`, which this calls, first runs a round of one step. This extra step does
        not change the result, because the `steps` steps begin from `start` again, and `tick` is not
        called after it.
        """
        calls = 0

        def progress(message: str) -> None:
            nonlocal calls
            if calls:  # the round's own step does not count
                tick()
            calls += 1

        result = initno.optimize(
            self.sd,
            PROMPT,
            SUBJECTS,
            0,
            steps=50,
            height=8 * start.shape[-2],
            width=8 * start.shape[-1],
            progress=progress,
            rounds=1,
            round_steps=1,
            last_steps=steps,
        )
        return result.noise.to(start)

    def update(self, x: Tensor) -> Tensor:
        return self.refine(1, T, x)  # a plain update: refinements are at i = 10 and 20

    @torch.no_grad()
    def denoise(self, x: Tensor) -> Tensor:
        return self.predict(x, T)


def worker(args: argparse.Namespace) -> None:
    """Times one provider (implementation), the one of --worker, in this process, and prints the
    result as JSON."""
    torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(1)
    config = MODELS[args.model].unet
    shape = 2, 1, context_rows(config), config.context_dim
    context, uncond = torch.randn(shape, generator=generator).to(device, dtype)
    text: Any = load("shapes", "cpu").text  # its tokenizer finds the subjects
    text.encode = lambda prompts: context
    sd = random_model(args.model, dtype, device, text, as_loaded=args.worker != "research")
    if args.worker == "eager_maps":
        sd.use_graphs(gradients=False)
    cells = args.size // 8
    provider = (Research if args.worker == "research" else Ours)(sd, context, uncond, cells)
    start = noise([0], (4, cells, cells)).to(device)
    result = {}
    warm = 2 if on_gpu(device) else 1  # on a GPU the second evaluation captures its graph
    stamps: list[tuple[float, float]] = []

    def tick() -> None:
        wait(device)
        stamps.append((time.perf_counter(), time.process_time()))

    for name in reversed(PICTURE):
        if on_gpu(device):
            forget_peak(device)
        stamps.clear()
        tick()
        x = start
        if name == "optimise":
            x = provider.optimise(start, args.runs + warm, tick)
        else:
            for _ in range(args.runs + warm):
                x = provider.update(start) if name == "update" else provider.denoise(start.to(dtype))
                tick()
        peak = peak_mb(device)
        seconds, cpu_seconds = (
            statistics.median(b - a for a, b in zip(times[warm:], times[warm + 1 :]))
            for times in zip(*stamps[: args.runs + warm + 1])
        )
        result[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak}
        result[name]["result"] = (x - start).float().flatten().tolist()
    print(json.dumps(result))


def compare(args: argparse.Namespace, results: dict[str, dict[str, Row]]) -> list[Row]:
    """Returns the table: one row per kind of step and provider (implementation), and at its end the
    rows of a whole image. `results` maps provider -> kind of step -> measured values. The column
    `differ` is the relative difference between the result of a provider and that of `research`.

    Raises SystemExit if results differ in float32. In 16 bits rounding decides which of two nearly
    equal peaks is the higher, so optimised noises may differ much, and the difference is only
    reported.
    """
    differ: dict[tuple[str, str], str] = {}
    for name, what in itertools.product(set(results) - {"research"}, PICTURE):
        ours, theirs = (torch.tensor(results[each][what]["result"]) for each in (name, "research"))
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if args.dtype == "float32" and not error < 1e-3:
            sys.exit(f"{what}: {name} does not compute the same as research: relative error {error:.1e}")
        differ[name, what] = f"{error:.0e}"
    for steps in results.values():
        whole: Row = {"peak_mb": max(steps[what]["peak_mb"] for what in PICTURE)}
        for key in ("seconds", "cpu_seconds"):
            whole[key] = sum(count * steps[what][key] for what, count in PICTURE.items())
        steps["picture"] = whole
    rows = []
    for what in (*PICTURE, "picture"):
        base = results["research"][what]
        for name, steps in results.items():
            spent = steps[what]
            row: Row = {"model": args.model, "size": args.size, "dtype": args.dtype, "what": what}
            row |= {"provider": name}
            row |= {key: round(spent[key], 3) for key in ("seconds", "cpu_seconds")}
            row |= {"peak_mb": round(spent["peak_mb"])}
            for key in ("seconds", "cpu_seconds", "peak_mb"):
                row[f"{key}_ratio"] = round(spent[key] / base[key], 3)
            row["differ"] = differ.get((name, what), "")
            rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__, "initno")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    options.add_argument(
        "--runs", type=int, default=2, help="steps of each kind, after the first (default: 2)"
    )
    options.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    options.add_argument("--dtype", default="float32", help="float32 (the default), float16, ...")
    options.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args)
        return
    torch.set_num_threads(1)  # as in the workers, for the CSV's device column
    results = {}
    for name in PROVIDERS if on_gpu(args.device) else PROVIDERS[:-1]:
        results[name] = in_own_process("--worker", name)
        times = ", ".join(f"{what} {step['seconds']:.2f} s" for what, step in results[name].items())
        print(f"{name}: {times}", file=sys.stderr, flush=True)
    report("initno", compare(args, results), args.csv, args.device)


if __name__ == "__main__":
    main()
