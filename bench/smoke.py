"""Does the embedded model draw the same images here in every way of drawing them?

    python -m bench.smoke [--out DIR]        # on CUDA if there is a GPU

Prints versions and the device. Compares float16, float32 and a collage with float32 on a CPU, and
CUDA graphs with none; tries InitNO. DIR receives smoke.png, a sheet of the images. Each part runs
even if an earlier one raised. Exit code: 1 if a check failed, else 0.
"""

import platform
import shutil
import sys
import sysconfig
import time
import traceback
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from minsd.image import contact_sheet
from minsd.kernels import devices
from minsd.noise import collage, initno, layout
from minsd.noise.initial import noise
from minsd.pipeline import StableDiffusion, load

PROMPT = "a red circle and a blue square"
STEPS = 6
# Levels of 255, on average over an image. On a CPU float16 differs by 0.03 (measured).
CLOSE = 1.0


class Smoke:
    """The checks of this bench, and the images drawn for them so far."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sd = load("shapes", self.device)  # float16 on a GPU
        self.exact = load("shapes", "cpu", torch.float32)
        self.images: dict[str, Image] = {}  # by caption
        self.checks = 0
        self.failed = 0

    def check(self, passed: bool, told: str) -> None:
        print("ok:    " if passed else "FAILED:", told, flush=True)
        self.checks += 1
        self.failed += not passed

    def near(self, images: np.ndarray, truth: np.ndarray, what: str) -> None:
        error = float(np.abs(images.astype(int) - truth).mean())
        told = f"{what}: {error:.3f} levels from float32 on a CPU (bound {CLOSE})"
        self.check(error < CLOSE, told)

    def draw(self, sd: StableDiffusion, caption: str) -> tuple[np.ndarray, float]:
        """Draws two images with the model `sd`, and keeps the first for the contact sheet, with
        `caption`. Returns (images, seconds), where images is (2,H,W,3) with values 0..255."""
        begin = time.perf_counter()
        images = sd(PROMPT, seeds=[0, 1], steps=STEPS)
        seconds = time.perf_counter() - begin
        self.images[caption] = images[0]
        return np.stack([np.asarray(image) for image in images]).astype(int), seconds

    def versions(self) -> None:
        for package in ("torch", "triton", "transformers", "numpy", "diffusers", "pytest-xdist"):
            try:
                print(package, version(package))
            except PackageNotFoundError:
                print(package, "is not installed")
        header = Path(sysconfig.get_path("include"), "Python.h")
        # Triton needs both to launch its first kernel.
        print("Python", platform.python_version(), "Python.h:", header.exists())
        print("C compiler:", shutil.which("gcc") or shutil.which("cc"))
        if self.device == "cuda":
            print(torch.cuda.get_device_properties(0))
            print("Triton kernels:", devices.failure(torch.device("cuda", 0)) or "they run")
            print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())

    def precision(self) -> None:
        truth, _ = self.draw(self.exact, "exact")
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
            images, _ = self.draw(load("shapes", self.device, dtype), f"{self.device} {name}")
            self.near(images, truth, name)

    def graphs(self) -> None:
        if self.device == "cpu":
            print("skipped: CUDA graphs need a CUDA device")
            return
        _, first = self.draw(self.sd, "graphs, first")
        replayed, seconds = self.draw(self.sd, "graphs")
        again, _ = self.draw(self.sd, "graphs, again")
        graphs = self.sd.graphs
        assert graphs is not None  # on CUDA `load` has made them
        held = f"{graphs.held / 2**20:.0f} MB"
        told = f"{len(graphs.graphs)} graphs, {len(graphs.refused)} refused, {held}"
        self.check(len(graphs.graphs) > 0 and not graphs.refused, told)
        self.check(np.array_equal(replayed, again), "graphs repeat their images bit for bit")
        self.sd.use_graphs(False)
        plain, eager = self.draw(self.sd, "no graphs")
        self.sd.use_graphs()
        change = np.abs(replayed - plain).max()
        self.check(bool(change <= 2), f"graphs change a pixel by {change} levels at most (bound 2)")
        print(f"two images: {first:.2f} s at first, {seconds:.2f} with graphs, {eager:.2f} without")

    def optimised(self) -> None:
        begin = time.perf_counter()
        result = initno.optimize(self.sd, PROMPT, ["circle", "square"], 1, rounds=1)
        seconds = time.perf_counter() - begin
        told = f"InitNO: {result.steps} evaluations in {seconds:.2f} s, {result.losses}"
        self.check(bool(result.noise.isfinite().all()), told)
        self.images["InitNO"] = self.sd(PROMPT, noise=result.noise, steps=STEPS)[0]

    def collage(self) -> None:
        boxes = {"a red circle": [0.05, 0.3, 0.45, 0.7], "a blue square": [0.55, 0.3, 0.95, 0.7]}
        regions = [{"prompt": prompt, "box": box} for prompt, box in boxes.items()]
        source = {"prompt": PROMPT, "width": 128, "height": 128, "regions": regions}
        drawn: dict[str, np.ndarray] = {}
        for name, sd in (("collage", self.sd), ("exact collage", self.exact)):
            predict = collage.predictor(sd, layout.load(source), guidance_scale=5.0)
            latents = sd.denoise(predict, noise([1], (4, 16, 16)), seeds=[1], steps=STEPS)
            self.images[name] = sd.decode(latents)[0]
            drawn[name] = np.asarray(self.images[name])
        self.near(drawn["collage"], drawn["exact collage"], "a collage")

    def run(self, out: Path) -> int:
        """Runs all checks, saves the contact sheet in the folder `out`, and returns the exit code:
        1 if a check failed, otherwise 0."""
        for part in (self.versions, self.precision, self.graphs, self.optimised, self.collage):
            try:
                part()
            except Exception as error:
                traceback.print_exc()
                self.check(False, f"{part.__name__}: {error!r}")
            if self.images:
                sheet = contact_sheet(list(self.images.values()), 4, list(self.images))
                sheet.save(out / "smoke.png")
        images = f"{len(self.images)} images on {self.device}"
        print(f"{self.checks} checks, {self.failed} failed; {images}")
        return int(self.failed > 0)


def main() -> None:
    options = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--out", type=Path, default=Path("outputs"), help="folder (default: outputs)")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(Smoke().run(args.out))


if __name__ == "__main__":
    main()
