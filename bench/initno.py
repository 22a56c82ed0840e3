"""What does InitNO cost, a step of noise optimisation and a whole picture, against an implementation as research code has it?

    python -m bench.initno [--model sd15] [--size 512] [--runs 2] [--device cuda --dtype float16] [--csv]

Full-size networks with the same random weights, one thread on a CPU, each provider in a process of its own so that its
peak memory (weights counted) is its own. `minsd` is `initno.optimize_batch`, `excite.updates` and `sd.predictor` as they
are. `research` is written here as the published programs work: every layer materialises its softmax tensor and those of
up to 32x32 cells are stored, weights take gradients, the UNet runs to its end, torch.optim.Adam optimises, and the graph of
an update outlives it into the guided step. Both must come out with the same noises, latents and predictions.

    optimise    a step of noise optimisation: losses of the maps, their gradient, Adam, the projection of the KL divergence
    update      a step of the updates while denoising: the response loss of the maps and its gradient
    denoise     a guided step
    picture     10 of the first (one round), 25 of the second and 50 of the third; refinement and further rounds are more
                of the same. Text encoder and VAE left out.

Times are medians after one step to warm up; on a busy machine `cpu_seconds`, which leaves out waiting for a core, is the
better guide. On a CPU peaks only grow while a process lives, so each includes those of the lines below it.
"""

import argparse
import json
import statistics
import sys
import time

from bench import forget_peak, in_own_process, on_gpu, peak_mb, report, wait
from bench.unet import build

PROMPT, SUBJECTS = "a red circle and a blue square", ["circle", "square"]
GUIDANCE, T = 7.5, 981
PICTURE = {"optimise": 10, "update": 25, "denoise": 50}


class Research:
    """The straightforward way, for one picture."""

    def __init__(self, sd, context, uncond, cells):
        import torch

        from minsd.attention import Attention, AttentionRecorder
        from minsd.kernels import onednn
        from minsd.noise import losses

        self.torch, self.losses, self.sd = torch, losses, sd
        which = AttentionRecorder()
        which.begin(sd.unet.grids((cells, cells)), sd.unet.attention_blocks)
        self.grid = which.resolution  # which maps are looked at
        self.context, self.both, self.stored = context, torch.cat([uncond, context]), []
        self.select = losses.selector([losses.resolve(sd.text, PROMPT, SUBJECTS)]).to(context.device)
        Attention.attend, onednn.available = (
            staticmethod(self.attend),
            lambda *tensors: False,
        )  # PyTorch's own products
        for module in sd.unet.modules():
            if isinstance(module, Attention):
                module.fused = None  # projections one by one, from weights that can take gradients
        sd.unet.requires_grad_()

    def attend(self, q, k, v, **_):
        p = (self.torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        if q.shape[1] <= 32**2:
            self.stored.append(p)
        return self.torch.einsum("bhnm,bmhd->bnhd", p, v), None

    def look(self, x):
        self.stored.clear()
        self.sd.unet(x, T, self.context)
        cells, maps = self.grid[0] * self.grid[1], []
        for keys in (77, cells):
            kept = [p.mean(dim=1) for p in self.stored if p.shape[2:] == (cells, keys)]
            maps.append((sum(kept) / len(kept)).float().unflatten(1, self.grid))
        cross = self.losses.subject_maps(maps[0], self.select)
        return cross, self.losses.claims(maps[1], self.losses.peaks(cross))

    def optimise(self, noise, steps, tick):
        log_var, mu = (self.torch.zeros_like(noise, requires_grad=True) for _ in range(2))
        adam = self.torch.optim.Adam([log_var, mu], lr=1e-2, eps=1e-3)
        for _ in range(steps):
            maps, claims = self.look((noise * (0.5 * log_var).exp() + mu).to(self.context.dtype))
            cross, conflict = self.losses.cross_response(maps), self.losses.self_conflict(claims)
            loss = cross + conflict * (cross <= 0.5) + self.losses.clean_background(maps)
            if cross < 0.2 and conflict < 0.3:
                break
            self.sd.unet.zero_grad()
            adam.zero_grad()
            loss.sum().backward()
            adam.step()
            while (kl := self.losses.kl_divergence(mu, log_var)) > 1e-3:
                adam.zero_grad()
                kl.sum().backward()
                adam.step()
            tick()
        self.sd.unet.zero_grad()
        return (noise * (0.5 * log_var).exp() + mu).detach()

    def update(self, x):
        leaf = x.clone().requires_grad_()
        maps, _ = self.look(leaf.to(self.context.dtype))
        self.loss = self.losses.cross_response(maps).sum()  # and the graph stays until the next
        step = self.sd.config.update_scale * (1 - 0.5 / 49) ** 0.5
        return x - step * self.torch.autograd.grad(self.loss, leaf, retain_graph=True)[0]

    def denoise(self, x):
        with self.torch.no_grad():
            self.stored.clear()
            u, c = self.sd.unet(self.torch.cat([x, x]), T, self.both).chunk(2)
            return u + GUIDANCE * (c - u)


class Ours:
    """What minsd's users call."""

    def __init__(self, sd, context, uncond, cells):
        from minsd.noise import excite

        self.sd, self.predict = sd, sd.predictor(context, uncond, GUIDANCE)
        self.refine = excite.updates(sd, [PROMPT], [SUBJECTS], steps=50)

    def optimise(self, noise, steps, tick):
        """A round of one step, then the last try, which begins again from the seed's own noise."""
        from minsd.noise import initno

        how = {
            "rounds": 1,
            "round_steps": 1,
            "last_steps": steps,
            "steps": 50,
            "height": 8 * noise.shape[-2],
            "width": 8 * noise.shape[-1],
        }
        calls = iter(range(steps + 2))
        result = initno.optimize(
            self.sd, PROMPT, SUBJECTS, 0, progress=lambda _: next(calls) and tick(), **how
        )
        return result.noise.to(noise)

    def update(self, x):
        return self.refine(1, T, x)  # between the refinements, at i = 10 and 20

    def denoise(self, x):
        import torch

        with torch.no_grad():
            return self.predict(x, T)


def worker(args):
    import torch

    import minsd
    from minsd.config import MODELS
    from minsd.noise.initial import noise
    from minsd.pipeline import StableDiffusion

    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    unet, config = build("minsd", args.model, dtype, device)
    sd = StableDiffusion(
        MODELS[args.model], unet, None, minsd.load("shapes", "cpu").text
    )  # its words alone are asked for
    generator, cells = torch.Generator().manual_seed(1), args.size // 8
    context, uncond = torch.randn(2, 1, 77, config.context_dim, generator=generator).to(device, dtype)
    sd.encode_prompt = lambda prompts: context
    provider = {"minsd": Ours, "research": Research}[args.worker](sd, context, uncond, cells)
    z, told = noise([0], (4, cells, cells)).to(device), {}
    stamps = []

    def tick():
        wait(device)
        stamps.append((time.perf_counter(), time.process_time()))

    for name in reversed(PICTURE):
        if on_gpu(device):
            forget_peak(device)
        stamps.clear()
        tick()
        if name == "optimise":
            x = provider.optimise(z, args.runs + 1, tick)
        else:
            for _ in range(args.runs + 1):
                x = getattr(provider, name)(z if name == "update" else z.to(dtype))
                tick()
        peak = peak_mb(device)
        seconds, cpu_seconds = (
            statistics.median(b - a for a, b in zip(of[1:], of[2:])) for of in zip(*stamps[: args.runs + 2])
        )
        told[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_mb": peak,
            "result": (x - z).float().flatten().tolist(),
        }
    print(json.dumps(told))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument(
        "--runs", type=int, default=2, help="steps counted of each kind, after one to warm up"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", action="store_true", help="append to bench/results/initno.csv")
    parser.add_argument("--worker", choices=("minsd", "research"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    import torch

    torch.set_num_threads(1)  # as the workers: the CSV says so
    told, rows = {}, []
    for name in ("research", "minsd"):
        told[name] = in_own_process("--worker", name)
        print(
            f"{name}: " + ", ".join(f"{what} {of['seconds']:.2f} s" for what, of in told[name].items()),
            file=sys.stderr,
            flush=True,
        )
    for what in PICTURE:
        ours, theirs = (torch.tensor(told[name][what].pop("result")) for name in ("minsd", "research"))
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < (1e-3 if args.dtype == "float32" else 0.1):
            sys.exit(
                f"{what}: the two do not compute the same, their changes differ by {error:.1e} of their size"
            )
    for of in told.values():
        of["picture"] = {
            key: sum(n * of[what][key] for what, n in PICTURE.items()) for key in ("seconds", "cpu_seconds")
        }
        of["picture"]["peak_mb"] = max(of[what]["peak_mb"] for what in PICTURE)
    for what in (*PICTURE, "picture"):
        for name, of in told.items():
            times, base = of[what], told["research"][what]
            rows.append(
                {"model": args.model, "size": args.size, "dtype": args.dtype, "what": what, "provider": name}
                | {key: round(times[key], 3) for key in ("seconds", "cpu_seconds")}
                | {"peak_mb": round(times["peak_mb"])}
                | {
                    f"{key}_ratio": round(times[key] / base[key], 3)
                    for key in ("seconds", "cpu_seconds", "peak_mb")
                }
            )
    report("initno", rows, args.csv, args.device)


if __name__ == "__main__":
    main()
