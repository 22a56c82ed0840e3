"""What are InitNO's losses of plain noises on a model? Set its limits from the percentiles.

    python -m bench.calibrate --model DIR [--prompt TEXT [--subjects WORDS]] [--seeds 64] [--csv]

InitNO accepts a noise whose two losses at the first timestep are below their limits. The limits 0.2
(response loss) and 0.3 (conflict loss) were published for SD 1.4. On another model they may accept
every noise or none. The bench prints percentiles of both losses over seeds, and the fraction of
noises below the present limit. With a limit at a low percentile InitNO optimises most noises; with
a limit at a high percentile it optimises only the worst. Pass limits as `initno.optimize(...,
cross_limit=, conflict_limit=)`.

Each seed costs one UNet evaluation without a gradient, which stops after the last attention map.
"""

import argparse
import math

import torch

from bench import Row, parser, report
from minsd.noise import losses
from minsd.noise.initial import noise
from minsd.noise.initno import CROSS_LIMIT
from minsd.noise.look import Lift, ask
from minsd.noise.objectives.initno import InitNO
from minsd.pipeline import StableDiffusion, load

PERCENTILES = (5, 10, 25, 50, 75, 90, 95)


def losses_of(sd: StableDiffusion, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Returns InitNO's losses of plain noises at the first timestep: a dict with the keys
    "response" and "conflict", each with a tensor (seeds,)."""
    asks = ask(sd, [args.prompt], [0], [args.subjects])
    lift = Lift(sd, asks, InitNO(sd, asks))
    t = losses.listed_timesteps(sd, None, None, False)[0]
    side = (args.size or sd.config.size) // 8
    starts = noise(range(args.seeds), (4, side, side))
    rows = torch.zeros(len(starts), dtype=torch.long, device=sd.device)
    told = lift.score(starts.to(sd.device), rows, t)
    return {"response": told["cross"].float().cpu(), "conflict": told["self"].float().cpu()}


def main() -> None:
    options = parser(__doc__, "calibrate")
    options.add_argument("--model", default="shapes", help="as for python -m minsd.generate (shapes)")
    options.add_argument("--prompt", default="a cat and a rabbit", help="one with at least two subjects")
    options.add_argument("--subjects", nargs="+", help="words of the prompt (default: found in it)")
    options.add_argument("--seeds", type=int, default=64, help="number of noises (default: 64)")
    options.add_argument("--size", type=int, help="pixels per side (default: the model's)")
    options.add_argument("--device", help="default: cuda where available, otherwise cpu")
    options.add_argument("--dtype", help="default: float16 on cuda, otherwise float32")
    args = options.parse_args()
    sd = load(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    limits = {"response": CROSS_LIMIT, "conflict": sd.config.conflict_limit}
    rows: list[Row] = []
    for name, values in losses_of(sd, args).items():
        row: Row = {"model": sd.name, "size": args.size or sd.config.size, "prompt": args.prompt}
        row |= {"seeds": args.seeds, "loss": name}
        row |= {f"p{p}": round(values.quantile(p / 100).item(), 4) for p in PERCENTILES}
        limit = limits[name]
        row |= {"limit": "none" if math.isinf(limit) else limit}
        row |= {"below": round((values < limit).float().mean().item(), 3)}
        rows.append(row)
    report("calibrate", rows, args.csv, sd.device)


if __name__ == "__main__":
    main()
