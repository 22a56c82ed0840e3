"""Which InitNO losses have plain noises on a model? Its limits can be set from the percentiles.

    python -m bench.calibrate --model DIR [--prompt TEXT [--subjects WORDS]] [--seeds 64] [--csv]

InitNO accepts a noise whose two losses at the first timestep are below their limits. The limits 0.2
(response loss) and 0.3 (conflict loss) were published for SD 1.4. On another model they may accept
every noise or none. The bench prints percentiles of both losses over seeds, and the fraction of
noises below the present limit. With a limit at a low percentile InitNO optimises most noises, with
one at a high percentile only the worst. Pass limits as `initno.optimize(..., cross_limit=,
conflict_limit=)`.

Each seed costs one early-stopped UNet evaluation without a gradient.
"""

import argparse
import math

import torch

from bench import Row, parser, report
from minsd.noise import look, losses
from minsd.noise.initial import noise
from minsd.noise.initno import CROSS_LIMIT
from minsd.pipeline import StableDiffusion, load

PERCENTILES = (5, 10, 25, 50, 75, 90, 95)


def losses_of(sd: StableDiffusion, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Returns each loss of every seed, (seeds,), at the model's first timestep."""
    subjects = args.subjects or losses.automatic_subjects(args.prompt)
    losses.resolve(sd.text, args.prompt, subjects)  # reports words that the prompt lacks
    side = (args.size or sd.config.size) // 8
    starts = noise(range(args.seeds), (4, side, side))
    asks = look.ask(sd, [args.prompt], [0], [subjects])
    lift = look.Lift(sd, asks, lambda seen: losses.cross_response(seen.maps))
    t = losses.listed_timesteps(sd)[0]
    found: dict[str, list[torch.Tensor]] = {"response": [], "conflict": []}
    with torch.no_grad():
        for x in starts.split(sd.batch_size(8 * side, 8 * side)):
            seen = look.Look(lift, x.to(sd.device), torch.zeros(len(x), dtype=torch.long), t)
            found["response"].append(losses.cross_response(seen.maps).float().cpu())
            found["conflict"].append(losses.self_conflict(seen.claims).float().cpu())
    return {name: torch.cat(values) for name, values in found.items()}


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
