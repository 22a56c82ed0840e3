"""The command line: python -m minsd.generate "a red circle and a blue square"

Reads from top to bottom: `main` parses and checks what needs no model, then `run` loads one and draws. Heavy imports
wait until the arguments are known to be good, so that --help and most errors answer at once.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

from minsd import __version__

SAMPLERS = ("ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lcm")  # samplers.SAMPLERS, without its imports
EXAMPLE = 'python -m minsd.generate "a red circle and a blue square"'


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"minsd: error: {message} (--help lists the options)\n")


def parser() -> Parser:
    p = Parser(prog="python -m minsd.generate", description="Draw pictures from a prompt.", epilog=f"example: {EXAMPLE}",
               allow_abbrev=False)
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw; may be empty (\"\")")
    p.add_argument("--model", metavar="NAME|DIR", help="shapes (the embedded model, default) or a folder in the diffusers layout")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--seed", metavar="N", type=int, help="seed of the first picture (default: a random one, printed)")
    p.add_argument("--seeds", metavar="LIST", help="one picture a seed, such as 0-9,12")
    p.add_argument("--num-images", metavar="N", type=int, help="how many pictures, from consecutive seeds (default: 1)")
    p.add_argument("--steps", metavar="N", type=int, help="sampling steps (default: the model's, mostly 50)")
    p.add_argument("--guidance-scale", metavar="G", type=float, help="how strongly the prompt steers (default: the model's)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: the model's")
    p.add_argument("--height", metavar="H", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--width", metavar="W", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--noise", metavar="FILE", type=Path, help="initial noise from a file that --save-noise wrote")
    p.add_argument("--save-noise", metavar="FILE", type=Path, help="write the initial noise (safetensors)")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("outputs"), help="where pictures go (default: outputs)")
    p.add_argument("--like", metavar="PNG", type=Path, help="make this picture again; other options override its settings")
    p.add_argument("--list-tokens", action="store_true", help="print the prompt's tokens and their positions, and stop")
    p.add_argument("--quiet", action="store_true", help="no progress, no notes")
    p.add_argument("--json", action="store_true", help="one JSON object a picture on standard output")
    p.add_argument("--debug", action="store_true", help="tracebacks for errors")
    p.add_argument("--version", action="version", version=f"minsd {__version__}")
    return p


# What a picture is made from: these keys go into it, and --like takes them from it.
SETTINGS = ("prompt", "model", "negative_prompt", "seed", "steps", "guidance_scale", "sampler", "height", "width", "dtype", "device")


def parse_seeds(text: str) -> list[int]:
    """"0-9,12" -> [0, ..., 9, 12]."""
    seeds = []
    for part in text.split(","):
        if not (m := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"--seeds takes numbers and ranges such as 0-9,12, not {text!r}")
        first, last = int(m[1]), int(m[2] or m[1])
        if last < first or last - first >= 1_000_000:
            raise ValueError(f"--seeds: {part.strip()} is not a range of at most a million seeds, lowest first")
        seeds += range(first, last + 1)
    return seeds


def check(args) -> None:
    """Everything that can be known wrong before a model is loaded; fills in the settings of --like and the seeds."""
    if args.like is not None:
        from minsd.image import read_settings

        settings = read_settings(args.like)
        if settings.get("noise_file") and args.noise is None:
            raise ValueError(f"{args.like} began from the noise file {settings['noise_file']}: give it with --noise")
        for key in SETTINGS:
            if getattr(args, key) is None and not (key == "seed" and args.seeds is not None):
                setattr(args, key, settings.get(key))
    if args.prompt is None:
        raise ValueError(f"a prompt is needed, for example: {EXAMPLE}")
    args.model = args.model or "shapes"
    args.negative_prompt = args.negative_prompt or ""
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"--{name} must be a positive multiple of 8, not {value}; the nearest is {max(8, round(value / 8) * 8)}")
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps must be from 1 to 1000, not {args.steps}")
    if args.guidance_scale is not None and not abs(args.guidance_scale) <= 1000:
        raise ValueError(f"--guidance-scale must be a number such as 7.5, not {args.guidance_scale}")
    if args.num_images is not None and args.num_images < 1:
        raise ValueError(f"--num-images must be 1 or more, not {args.num_images}")
    if args.seeds is not None and (args.seed is not None or args.num_images is not None):
        raise ValueError("--seeds already says how many pictures and from which seeds: leave out --seed and --num-images")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    if args.seeds is not None:
        args.seeds = parse_seeds(args.seeds)
    else:
        first = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
        args.seeds = list(range(first, first + (args.num_images or 1)))
    if args.noise is not None and not args.noise.is_file():
        raise FileNotFoundError(f"there is no noise file {args.noise}")
    if args.list_tokens:
        return
    folder = args.out
    while not folder.exists():  # made only when the first picture is ready
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written to: {folder}: {error.strerror}") from None
    if args.save_noise is not None and not args.save_noise.absolute().parent.is_dir():
        raise FileNotFoundError(f"--save-noise: there is no folder {args.save_noise.absolute().parent}")


def read_noise(path: Path, shape: tuple[int, ...]):
    """Initial noise (B,4,h,w) from a safetensors file, of the given shape per picture."""
    from safetensors.torch import load_file

    from minsd.weights.load import read_header

    read_header(path)
    tensors = load_file(path)
    if list(tensors) != ["noise"]:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors)[:3])}; a noise file holds one tensor called noise")
    noise = tensors["noise"].float()
    if noise.ndim != 4 or tuple(noise.shape[1:]) != shape:
        wanted = f"(pictures, {', '.join(map(str, shape))})"
        raise ValueError(f"{path} holds noise of shape {tuple(noise.shape)}; this model and size need {wanted}")
    if not noise.isfinite().all():
        raise ValueError(f"{path} holds noise that is not finite")
    return noise


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"minsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def say(args, *words) -> None:
    if not args.quiet:
        print("minsd:", *words, file=sys.stderr)


def run(args) -> int:
    """Load, draw, save; the number of pictures made is in `args.made`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    import torch
    from tqdm import tqdm

    import minsd
    from minsd.image import save_numbered
    from minsd.noise.initial import noise as draw_noise

    sd = minsd.load(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    for note in sd.notes:
        say(args, note)
    if args.list_tokens:
        for position, token in enumerate(sd.text.tokens(args.prompt)):
            print(f"{position:3d}  {token}" + ("  (cut off)" if position >= sd.text.max_length - 1 else ""))
        return 0

    height, width = args.height or sd.config.size, args.width or sd.config.size
    shape = (4, height // 8, width // 8)
    if args.noise is not None:
        noise = read_noise(args.noise, shape)
        if len(args.seeds) == 1:
            args.seeds = list(range(args.seeds[0], args.seeds[0] + len(noise)))
        if len(noise) != len(args.seeds):
            raise ValueError(f"{args.noise} holds {len(noise)} noises and {len(args.seeds)} seeds were given: one a picture")
    else:
        noise = None  # drawn batch by batch: a million seeds must not need a million noises at once
    if args.save_noise is not None:
        from safetensors.torch import save_file

        temporary = args.save_noise.with_name(args.save_noise.name + ".tmp")
        save_file({"noise": draw_noise(args.seeds, shape) if noise is None else noise}, temporary)
        os.replace(temporary, args.save_noise)

    common = {
        "prompt": args.prompt, "negative_prompt": args.negative_prompt, "model": args.model, "model_hash": sd.model_hash,
        "sampler": args.sampler or sd.config.sampler, "steps": args.steps or sd.config.steps,
        "guidance_scale": sd.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "height": height, "width": width, "noise_method": "random", "noise_file": str(args.noise) if args.noise else None,
        "device": sd.device.type, "dtype": str(sd.dtype).removeprefix("torch."), "versions": versions(),
    }
    evaluations = []
    handle = sd.unet.register_forward_pre_hook(lambda module, inputs: evaluations.append(len(inputs[0])))
    say(args, f"seed {args.seeds[0]}" if len(args.seeds) == 1 else f"seeds {args.seeds[0]} to {args.seeds[-1]}, {len(args.seeds)} pictures")
    size = sd.batch_size(height, width)
    total = len(args.seeds) * (common["steps"] + (common["sampler"] == "pndm"))  # which visits one timestep twice
    with tqdm(total=total, unit="step", disable=args.quiet, file=sys.stderr) as bar:
        for start in range(0, len(args.seeds), size):
            seeds = args.seeds[start : start + size]
            begin = time.perf_counter()
            evaluations.clear()
            count, last = len(seeds), start + len(seeds)
            bar.set_description(f"picture {last}/{len(args.seeds)}" if count == 1 else f"pictures {start + 1}-{last}/{len(args.seeds)}")
            latents = sd.sample(
                args.prompt, draw_noise(seeds, shape) if noise is None else noise[start : start + size], seeds=seeds,
                negative_prompt=args.negative_prompt, steps=common["steps"], sampler=common["sampler"],
                guidance_scale=common["guidance_scale"], progress=lambda i, t: bar.update(count),  # noqa: B023 (called within this turn)
            )
            pictures = sd.decode(latents)
            seconds = (time.perf_counter() - begin) / count
            args.out.mkdir(parents=True, exist_ok=True)
            for picture, seed in zip(pictures, seeds):
                settings = {**common, "seed": seed}
                path = save_numbered(picture, args.out, settings)
                line = {"file": path.name, **settings, "seconds": round(seconds, 3), "unet_rows": sum(evaluations) // count}
                with (args.out / "runs.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                args.made += 1
                if args.json:
                    print(json.dumps(line, ensure_ascii=False), flush=True)
                elif not args.quiet:
                    bar.write(f"minsd: {path}", file=sys.stderr)
    handle.remove()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.made = 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: print(f"minsd: warning: {message}", file=sys.stderr)
            check(args)
            return run(args)
    except KeyboardInterrupt:
        print(f"minsd: stopped: {args.made} of {len(args.seeds)} pictures are done", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as error:
        if args.debug:
            raise
        message, code = str(error), 2
    except Exception as error:
        if args.debug:
            raise
        message, code = f"{type(error).__name__}: {error} (--debug shows where)", 1
    print("minsd: error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
