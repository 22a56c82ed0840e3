"""Which kernels are faster on this GPU, for guided steps and for gradients of attention maps?

    python -m bench.switches [--model sd15] [--size 512] [--batches 1 8] [--runs 10] [--csv]
    python -m bench.switches --model shapes --size 128 --variants default cudnn_first # a try

Each variant changes one switch of kernels/switches.py, or the backend of attention, on random
weights. `step_ms` is a guided step (two UNet rows per image). `look_ms` is an evaluation that ends
after its attention maps, with the gradient of a loss of the maps, as InitNO takes at every step. On
a GPU both are replayed from CUDA graphs, which each variant captures anew. Times are medians. The
ratios compare with `default`; `default_again`, measured last, shows how much the machine drifts.
`differ` is the larger relative difference of predicted noise and gradient from the default's.

On a CPU no switch has an effect. What the switches do to single attention layers, with maps of up
to 64x64 cells, bench.attention measures.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import Row, clocked, on_gpu, parser, print_table, write_csv
from bench.unet import random_model
from minsd.config import MODELS
from minsd.kernels import switches
from minsd.noise import losses
from minsd.noise.initial import noise
from minsd.noise.look import Lift, Look, ask
from minsd.pipeline import StableDiffusion, load

PROMPT = "a red circle and a blue square"
T = 981
WARM = 3  # evaluations before those that are timed: eager, captured, replayed
NEVER = 1 << 62  # more than any size

# Name -> backend of attention, and changed switches.
VARIANTS: dict[str, tuple[str, dict[str, int | bool | None]]] = {
    "default": ("auto", {}),
    "pytorch_norm_gradient": ("auto", {"norm_gradient_from": None}),
    "narrow_norm": ("auto", {"wide_norm": False}),
    "materialised": ("auto", {"materialise_below": NEVER}),
    "cudnn_first": ("auto", {"cudnn_first": True}),
    "decoupled": ("sdpa", {}),
    "decoupled_one_lse": ("sdpa", {"shared_lse": True}),
    "heads_apart": ("auto", {"heads_fastest": False}),
    "default_again": ("auto", {}),
}


def tasks(sd: StableDiffusion, size: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Returns a dict with the two functions to time. "step" does one guided sampling step, and
    returns the predicted noise. "look" evaluates the UNet only as far as the attention maps need
    it, computes a loss from the maps, and returns the gradient of the loss with respect to the
    latents."""
    x = noise(range(batch), (4, size // 8, size // 8)).to(sd.device)
    context = sd.encode_prompt(PROMPT).expand(batch, -1, -1)
    predict = sd.predictor(context, torch.zeros_like(context), 7.5)
    latents = x.to(context.dtype)

    def objective(look: Look) -> Tensor:
        conflict = losses.self_conflict(look.claims)
        return losses.cross_response(look.maps) + conflict

    lift = Lift(sd, ask(sd, [PROMPT] * batch, range(batch), [["circle", "square"]] * batch), objective)
    rows = torch.arange(batch, device=sd.device)

    @torch.no_grad()
    def step() -> Tensor:
        return predict(latents, T)

    return {"step": step, "look": lambda: lift.slope(x, rows, T)[1]}


def relative(y: Tensor, truth: Tensor) -> float:
    return ((y.float() - truth.float()).norm() / truth.float().norm()).item()


def measure(sd: StableDiffusion, args: argparse.Namespace, batch: int) -> None:
    """Times each variant for one batch size. Prints and saves each row as soon as it is measured,
    so that a run that is interrupted keeps the finished rows."""
    base: Row = {}
    truth: dict[str, Tensor] = {}
    for name in args.variants:
        backend, changes = VARIANTS[name]
        sd.set_attention(backend)  # releases the graphs of the variant before
        row: Row = {"model": args.model, "size": args.size, "dtype": args.dtype, "batch": batch}
        row["variant"] = name
        errors = []
        with switches.use(**changes):
            for what, run in tasks(sd, args.size, batch).items():
                for _ in range(WARM):
                    result = run()
                spent = [clocked(sd.device, run)[1] for _ in range(args.runs)]
                errors.append(relative(result, truth.setdefault(what, result)))
                row[f"{what}_ms"] = round(1e3 * statistics.median(spent), 3)
        base = base or row
        for what in truth:
            row[f"{what}_ratio"] = round(row[f"{what}_ms"] / base[f"{what}_ms"], 3)
        row["differ"] = f"{max(errors):.0e}"
        print_table([row])
        if args.csv:
            write_csv("switches", [row], args.device)


def main() -> None:
    options = parser(__doc__, "switches")
    options.add_argument("--model", default="sd15", choices=MODELS, help="its sizes (default: sd15)")
    options.add_argument("--size", type=int, default=512, help="pixels per side (default: 512)")
    options.add_argument("--batches", nargs="+", type=int, default=[1], help="images (default: 1)")
    options.add_argument("--runs", type=int, default=10, help="timed evaluations of each (default: 10)")
    names = ", ".join(VARIANTS)
    options.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"some of {names} (default: all)",
    )
    gpu = torch.cuda.is_available()
    options.add_argument("--device", default="cuda" if gpu else "cpu", help="default: CUDA if there is a GPU")
    options.add_argument("--dtype", help="default: float16 on a GPU, float32 on a CPU")
    args = options.parse_args()
    args.dtype = args.dtype or ("float16" if on_gpu(args.device) else "float32")
    text: Any = load("shapes", "cpu").text  # its tokenizer finds the subjects
    dtype = getattr(torch, args.dtype)
    dim = MODELS[args.model].unet.context_dim
    states = torch.randn(1, 77, dim, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
    text.encode = lambda prompts: states
    sd = random_model(args.model, dtype, args.device, text)
    for batch in args.batches:
        measure(sd, args, batch)


if __name__ == "__main__":
    main()
