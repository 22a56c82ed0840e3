"""The command line: python -m minsd.generate "a red circle and a blue square"

`main` parses, has minsd/arguments.py check and complete what was given, loads the model, and hands it all to minsd/run.py;
errors become one line and an exit code. Heavy imports wait until the arguments are known to be good, so that --help and
most errors answer at once.
"""

import argparse
import errno
import os
import signal
import sys
import warnings
from pathlib import Path

from minsd import __version__
from minsd.app.arguments import EXAMPLE, check
from minsd.app.prompts import located

SAMPLERS = (
    "ddim",
    "pndm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m",
    "unipc",
    "lcm",
)  # samplers.SAMPLERS, without its imports
METHODS = ("random", "initno", "select", "optimize")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


def parser() -> Parser:
    p = Parser(
        prog="python -m minsd.generate",
        description="Draw pictures from a prompt.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    a = p.add_argument_group("what to draw (each also a key of a line of --prompts FILE.jsonl)").add_argument
    a("prompt", nargs="?", metavar="PROMPT", help='what to draw; may be empty ("")')
    a("--negative-prompt", metavar="TEXT", help="what to steer away from")
    a("--seed", metavar="N", type=int, help="seed of the first picture (default: a random one, printed)")
    a("--seeds", metavar="LIST", help="one picture a seed, such as 0-9,12")
    a("--num-images", metavar="N", type=int, help="how many pictures, from consecutive seeds (default: 1)")
    a("--steps", metavar="N", type=int, help="sampling steps (default: the model's, mostly 50)")
    a(
        "--guidance-scale",
        metavar="G",
        type=float,
        help="how strongly the prompt steers (default: the model's)",
    )
    a("--sampler", choices=SAMPLERS, help="default: the model's, mostly ddim")
    a(
        "--karras",
        action="store_true",
        default=None,
        help="levels closer together where there is little noise (dpmpp_2m)",
    )
    a("--height", metavar="H", type=int, help="pixels, a multiple of 8 (default: the model's)")
    a("--width", metavar="W", type=int, help="pixels, a multiple of 8 (default: the model's)")
    a("--init-image", metavar="FILE", type=Path, help="begin from this picture, cut and scaled to the size")
    a("--strength", metavar="S", type=float, help="how far to go from --init-image, 0 to 1 (default: 0.8)")
    a("--noise", metavar="FILE", type=Path, help="initial noise from a file that --save-noise wrote")
    a(
        "--layout",
        metavar="FILE|DIR",
        type=Path,
        help="captions for regions of the picture: a layout.json, or a NoiseCollage folder",
    )
    a(
        "--crop-margin",
        metavar="SHARE",
        type=float,
        help="at first each region sees its box and this share of it around alone; try 0.25",
    )
    a(
        "--control-image",
        metavar="FILE",
        type=Path,
        help="what the --controlnet looks at (edges, a pose, ...), taken as it is",
    )
    a("--control-scale", metavar="S", type=float, help="how much the ControlNet counts (default: 1)")
    a = p.add_argument_group("the initial noise (each also a key of such a line)").add_argument
    a(
        "--init-noise",
        choices=METHODS,
        help="optimise it by attention maps (initno), select or optimise it by inversion stability",
    )
    a("--candidates", metavar="K", type=int, help="select: the best of K seeds from --seed on (default: 100)")
    a("--score", choices=("stability", "attention"), help="select: by what (default: stability)")
    a("--optimize-steps", metavar="N", type=int, help="optimize: gradient steps (default: 100)")
    a(
        "--optimize-mode",
        choices=("full", "detach"),
        help="optimize: through the inversion too, or not (default: full)",
    )
    a(
        "--subjects",
        metavar="WORDS",
        help='what must not be neglected, such as "cat, rabbit" (default: found in the prompt)',
    )
    a("--token-indices", metavar="LIST", help="the same by token position, such as 2,5 (--list-tokens)")
    a(
        "--excite",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="move the latents towards the subjects while denoising (initno does; --no-excite: it does not)",
    )
    a = p.add_argument_group("with what").add_argument
    a(
        "--model",
        metavar="NAME|DIR|FILE|ID",
        help="shapes (the embedded model, default), a diffusers folder, a .safetensors file, a hub id",
    )
    a("--vae", metavar="DIR|FILE", type=Path, help="another VAE than the model's own")
    a(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        help="for single files: a folder with vocab.json and merges.txt",
    )
    a(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the network predicts, where its files do not say",
    )
    a(
        "--controlnet",
        metavar="DIR|FILE",
        type=Path,
        help="a ControlNet for --control-image, or for those of the --layout",
    )
    a(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        help="an adapter, added to the weights; may be given several times",
    )
    a("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one")
    a("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32")
    a(
        "--attention",
        choices=("auto", "triton", "sdpa", "reference"),
        help="who computes attention (default: auto)",
    )
    a("--compile", action="store_true", help="torch.compile the UNet: minutes at first, faster steps after")
    a = p.add_argument_group("many pictures, files, messages").add_argument
    a(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="a prompt a line (.txt), or an object of options a line (.jsonl)",
    )
    a("--resume", action="store_true", help="leave out what --out holds already")
    a("--out", metavar="DIR", type=Path, default=Path("outputs"), help="where pictures go (default: outputs)")
    a("--save-noise", metavar="FILE", type=Path, help="write the initial noise (safetensors)")
    a(
        "--invert",
        metavar="FILE",
        type=Path,
        help="find the noise that draws this picture, save it, and draw from it",
    )
    a("--layout-preview", action="store_true", help="draw the --layout itself to DIR/extra, and stop")
    a(
        "--attention-maps",
        action="store_true",
        help="for each picture a sheet of where its subjects' words looked, in DIR/extra",
    )
    a("--like", metavar="PNG", type=Path, help="make this picture again; other options override its settings")
    a("--list-tokens", action="store_true", help="print the prompt's tokens and their positions, and stop")
    a("--quiet", action="store_true", help="no progress, no notes")
    a("--json", action="store_true", help="one JSON object a picture on standard output")
    a("--debug", action="store_true", help="tracebacks for errors")
    a("--version", action="version", version=f"minsd {__version__}")
    return p


def say(args, *words) -> None:
    if not args.quiet:
        print("minsd:", *words, file=sys.stderr)


def go(args, lines) -> None:
    """Load the model and draw."""
    if args.layout_preview:
        from minsd.image import save
        from minsd.noise.layout import preview

        for line in lines:
            with located(line):  # all of them before the first is drawn
                line.regions = line.regions.sized(line.width or 512, line.height or line.width or 512)
        for number, line in enumerate(lines):
            save(preview(line.regions), path := args.out / "extra" / f"layout-{number}.png")
            say(args, path)
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    import torch

    import minsd
    from minsd.app.run import plan, run

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU a process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.attention == "triton" and device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("--attention triton is for a GPU: leave it out")
    sd = minsd.load(
        args.model,
        device,
        dtype,
        vae=args.vae,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
    )
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)  # or every process of several would take some of the first one, too
    regions = [region for line in lines if line.regions is not None for region in line.regions.regions]
    if args.adapters or any(region.lora for region in regions):
        from minsd.weights import lora

        paths = {path.resolve() for region in regions for path, _ in region.lora}  # as the jobs name them
        args.by_region = {path: lora.read(path, sd) for path in paths}
        lora.merge([(lora.read(path, sd), scale) for path, scale in args.adapters])
    if args.controlnet is not None:
        from minsd.weights.controlnet import load_controlnet

        args.net = load_controlnet(args.controlnet, device=sd.device, dtype=sd.dtype)
    sd.set_attention(args.attention, *([] if args.net is None else [args.net]))
    if args.compile:
        sd.compile()
    if int(os.environ.get("RANK", 0)):
        args.quiet = True
    for note in sd.notes:
        say(args, note)
    if args.list_tokens:
        for line in lines:
            tokens, last = sd.text.tokens(line.prompt), sd.text.max_length - 1
            for position, token in enumerate(tokens):
                print(
                    f"{position:3d}  {token}" + ("  (cut off)" if last <= position < len(tokens) - 1 else "")
                )
        return
    jobs = plan(sd, args, lines)
    first, last = jobs[0]["seed"], jobs[-1]["seed"]
    many = f", {len(jobs)} pictures" + (f" of {len(lines)} prompts" if len(lines) > 1 else "")
    say(args, f"seed {first}" if len(jobs) == 1 else f"seeds {first} to {last}" + many)
    run(sd, args, jobs)


def main(argv: list[str] | None = None) -> int:
    # OpenMP's threads wait for each other by spinning, which beside other work takes the processors from those waited for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported
    args = argparse.Namespace(debug=False)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            options = parser()
            args = options.parse_args(argv)
            args.made, args.wanted, args.where, args.net, args.adapters, args.by_region = (
                0,
                0,
                "",
                None,
                [],
                {},
            )
            go(args, check(args, {option.dest: option for option in options._actions}))
        return 0
    except KeyboardInterrupt:
        print(f"minsd: stopped: {args.made} of {args.wanted} pictures are done", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        code = 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
        message = str(error) if code == 2 else f"{type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = "the disk is full: free some of it, and give the same command with --resume"
        if wanted := getattr(args, "wanted", 0):
            message = f"{args.made} of {wanted} pictures are done; {message}"
        elif code == 2 and int(os.environ.get("RANK", 0)):
            return code  # all processes find the same: one tells
    print("minsd: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def warn(message, *rest, **more) -> None:
    from tqdm import tqdm

    tqdm.write(f"minsd: warning: {message}", file=sys.stderr)  # above a progress bar, not into it


def script() -> int:
    """`main` as a program of its own: torchrun, Slurm and timeout end a run by SIGTERM, which then stops as
    Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    sys.exit(script())
