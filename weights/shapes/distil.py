"""Distils the embedded model into shapes-turbo, which needs one to four steps and no guidance.

    python -m minsd.weights.shapes.distil [--quick] [--samples N] [--minutes M] [--export] [--out FILE]

The student is the embedded model's UNet with a low-rank adapter (weights/lora.py). Only the adapter
is trained and written. It is trained by distribution matching distillation (Yin et al. 2024, arXiv
2311.18828) as simplified in DMD2 (Yin et al. 2024, arXiv 2405.14867), which needs no images and no
recorded sampling runs. A training step does three things:

1. The student generates clean latents x0 from unit noise, in one to four Euler steps at the
   timesteps that shapes-turbo uses later. The gradient flows through the last step alone.
2. x0 is noised to a random timestep, and two networks predict the clean latents from the result:
   the embedded model under guidance, and a copy of the embedded model that is trained on the
   student's own x0 ("fake"). The difference between the two predictions is the gradient on x0. It
   moves the student's distribution towards the guided model's.
3. The copy takes a step of ordinary denoising training on the same noised x0.

Prompts are chosen at random, without those that bench/shapes.py uses. Checkpoints go to `run/`, and
the same command resumes from the newest one. train.py describes checkpoints, and how several
processes share the work.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from minsd.config import MODELS
from minsd.samplers import euler
from minsd.samplers.schedule import Schedule
from minsd.unet import UNet
from minsd.weights.load import TURBO_FILE, load_model
from minsd.weights.shapes import data
from minsd.weights.shapes.train import (
    HERE,
    SEED,
    Options,
    Run,
    Workers,
    begin,
    command_line,
    start,
    token_ids,
    use_attention_in_full,
)

ROW = MODELS["shapes-turbo"]
RANK = 20  # of the adapter, which then has 2.9 MB in fp16
BATCH = 16  # images per step, over all processes
SAMPLES = {"full": 11_200, "quick": 1_600}
LEARNING_RATE = 6e-4  # of the copy ("fake")
# The adapter's learning rate, relative to the copy's. The copy has to keep up with the student. If
# it does not, the student's colours swing around those of the embedded model.
RATE = 0.5
GUIDANCE = 5.0  # guidance scale of the embedded model: its default
# Sampling steps of the student's run -> how often in training. A single step is the hardest.
STEPS = {1: 0.7, 2: 0.14, 3: 0.04, 4: 0.12}
CAPTIONS = 0.25  # fraction of the prompts that are captions of data.py; the rest are plain lists
NOISED = (20, 980)  # timesteps at which the two predictions are compared: from, below


class LowRank(nn.Module):
    """Low-rank changes for every linear layer and convolution of a UNet. Their matrices are
    parameters to be trained, and the UNet's weights stay as they are."""

    def __init__(self, unet: UNet, rank: int = RANK):
        """Makes the matrices `down` (r,in) and `up` (out,r) for every linear layer and convolution
        of `unet`. Their product is what is added to the layer's weight. The rank r is `rank`, or
        less if the layer is too small. `up` is zero at first, so that nothing is changed yet."""
        super().__init__()
        layers = {name: m for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.names = list(layers)
        shapes = [m.weight.flatten(1).shape for m in layers.values()]  # (out, in)
        ranks = [min(rank, *shape) for shape in shapes]
        self.down = nn.ParameterList(torch.randn(r, n) / n**0.5 for r, (_, n) in zip(ranks, shapes))
        self.up = nn.ParameterList(torch.zeros(m, r) for r, (m, _) in zip(ranks, shapes))

    def weights(self, unet: UNet) -> dict[str, Tensor]:
        """Adds the low-rank changes to the weights of `unet`. Returns the sums, as a dict of
        parameter name -> tensor that has the weights of the changed layers only. Gradients flow
        from it to the low-rank matrices."""
        named = dict(unet.named_parameters())
        return {
            f"{name}.weight": named[f"{name}.weight"] + (up @ down).view_as(named[f"{name}.weight"])
            for name, down, up in zip(self.names, self.down, self.up)
        }


def plain(subjects: list[tuple[str, str]]) -> list[str]:
    """Makes a prompt that lists objects, such as "a red circle , a blue square and a green star".
    `subjects` are the objects' (colour, shape) pairs. Returns the prompt's words and commas."""
    words: list[str] = []
    for k, (colour, shape) in enumerate(subjects):
        if k:
            words.append("," if k < len(subjects) - 1 else "and")
        words += ["an" if colour == "orange" else "a", colour, shape]
    return words


def benched() -> set[tuple[str, ...]]:
    """Returns the prompts with two or three objects that bench/shapes.py uses, each as a tuple of
    words. Training must leave them out. Prompts with one object are not left out, because
    bench/shapes.py uses all that exist."""
    prompts = set()
    for count in (2, 3):
        rng = np.random.default_rng((7, count - 1))  # SEED and the group's index there
        prompts |= {tuple(plain(data.draw_subjects(rng, count))) for _ in range(200)}
    return prompts


def draw_prompt(rng: np.random.Generator, without: set[tuple[str, ...]]) -> list[str]:
    """Chooses a prompt at random and returns its words. The prompt is either a caption as in the
    training of the embedded model, or a plain list of one to three objects. Prompts in `without`
    are never chosen."""
    while True:
        if rng.random() < CAPTIONS:
            words = list(data.example(SEED + 2, int(rng.integers(2**40))).words)
        else:
            words = plain(data.draw_subjects(rng, 1 + int(rng.choice(3, p=data.COUNTS))))
        if tuple(words) not in without:
            return words


class Distillation:
    """The networks of a distillation by the method DMD2, and the losses of one training step.
    `teacher` is the UNet of the embedded model and stays frozen. The student, which is to be
    trained, is the teacher with the weight changes of `adapter`. `fake` is a copy of the teacher
    that learns to denoise the student's images."""

    def __init__(self, workers: Workers):
        model = load_model("shapes", device=torch.device(workers.device), dtype=torch.float32)
        torch.manual_seed(SEED + 3)
        self.workers = workers
        self.teacher = UNet(ROW.unet).to(workers.device)
        self.fake = UNet(ROW.unet).to(workers.device)
        for network in (self.teacher, self.fake):
            network.load_state_dict(model.unet.state_dict())
            if workers.device == "cpu":
                use_attention_in_full(network)
        self.teacher.requires_grad_(False)
        self.adapter = LowRank(self.teacher).to(workers.device)
        self.text = model.text.model
        self.schedule = Schedule(ROW.schedule)
        self.without = benched()
        self.empty = self.encode([[]])

    @torch.no_grad()
    def encode(self, prompts: list[list[str]]) -> Tensor:
        """Returns the text states (n,77,D) of n prompts. A prompt is a list of words."""
        ids = torch.tensor([token_ids(words) for words in prompts])
        return self.text(ids.to(self.workers.device)).last_hidden_state

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (signal, noise), each (B,1,1,1), for timesteps t (B,). `signal` is sqrt(abar) and
        `noise` is sqrt(1 - abar), where abar is the schedule's cumulative product of 1 - beta up to
        t."""
        abar = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1).to(self.workers.device)
        return abar.sqrt(), (1 - abar).sqrt()

    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Computes the clean latents from noisy latents x at timesteps t (B,) and the noise `eps`
        predicted in them. Returns (x - sqrt(1 - abar) eps) / sqrt(abar), where abar is the
        schedule's cumulative product of 1 - beta up to t. x, `eps` and the result are (B,4,h,w)."""
        signal, noise = self.levels(t)
        return (x - noise * eps) / signal

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, context: Tensor, **weights: Tensor) -> Tensor:
        """Predicts the noise in latents x (B,4,h,w) at timesteps t (B,) with `network`, a UNet.
        `context` (B,77,D) are the text states. `weights` (parameter name -> tensor) take the place
        of the network's own parameters of these names."""
        with self.workers.autocast():
            return functional_call(network, weights, (x, t.to(x.device), context)).float()

    def draw(
        self, weights: dict[str, Tensor], noise: Tensor, context: Tensor, steps: int, last: int
    ) -> Tensor:
        """Generates latents with the student by Euler's method. `noise` (B,4,h,w) has unit
        variance, `weights` are the student's (from `LowRank.weights`), and `context` (B,77,D) are
        the text states of the prompts.

        The timesteps are those of a run with `steps` steps, but the run ends with step number
        `last`, counted from 0. Returns the clean latents (B,4,h,w) that the student predicts in
        step `last`. Gradients flow through this step only.
        """
        grid = [int(t) for t in self.schedule.timesteps(steps)]
        x = euler.begin(None, noise, self.schedule, grid[0])
        frozen = {name: weight.detach() for name, weight in weights.items()}
        for i in range(last):
            t, below = (torch.full((len(x),), grid[k]) for k in (i, i + 1))
            with torch.no_grad():
                eps = self.predict(self.teacher, x, t, context, **frozen)
            signal, level = self.levels(below)
            x = signal * self.clean(x, eps, t) + level * eps
        t = torch.full((len(x),), grid[last])
        return self.clean(x, self.predict(self.teacher, x, t, context, **weights), t)

    def losses(
        self, batch: int, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, tuple[Tensor, float]]:
        """Computes the losses of one training step on `batch` images. All random numbers come from
        `rng` and `generator`. Returns a dict of name -> (loss, weight), as `Run.train` needs it."""
        device = self.workers.device
        context = self.encode([draw_prompt(rng, self.without) for _ in range(batch)])
        size = ROW.unet.sample_size
        noise, again = torch.randn((2, batch, 4, size, size), generator=generator).to(device)
        t = torch.randint(*NOISED, (batch,), generator=generator)
        steps = int(rng.choice(list(STEPS), p=list(STEPS.values())))
        weights = self.adapter.weights(self.teacher)
        x0 = self.draw(weights, noise, context, steps, int(rng.integers(steps)))

        signal, level = self.levels(t)
        x = signal * x0.detach() + level * again
        fake = self.predict(self.fake, x, t, context)
        with torch.no_grad():
            both = torch.cat([self.empty.expand_as(context), context])
            eps = self.predict(self.teacher, torch.cat([x, x]), torch.cat([t, t]), both)
            without, with_prompt = eps.chunk(2)
            real = self.clean(x, without + GUIDANCE * (with_prompt - without), t)
            gap = self.clean(x, fake, t) - real
            # The normalisation of DMD's equation 8: each image has a gradient of similar size at
            # every timestep.
            target = x0 - gap / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        error = (fake - again).square().mean(dim=(1, 2, 3))  # (B,)
        # Noisy timesteps weigh more, as in train.py.
        importance = self.schedule.alphas_cumprod[t].rsqrt().to(device)
        return {
            "match": (0.5 * (x0 - target).square().mean(), 1.0),
            "fake": ((importance * error).mean(), 1.0),
            "gap": (gap.abs().mean(), 0.0),
        }


def export(adapter: LowRank, unet: UNet, path: Path) -> None:
    """Writes an adapter as a LoRA file in fp16 to `path`, with the tensor names of PEFT. `unet` is
    a UNet with the layers that the adapter was made for."""
    tensors = {}
    for name, down, up in zip(adapter.names, adapter.down, adapter.up):
        shape = unet.get_submodule(name).weight.shape
        assert isinstance(shape, torch.Size)
        more = [1] * (len(shape) - 2)  # (out, r) or, for a convolution, (out, r, 1, 1)
        halves = {"A": down.view(-1, *shape[1:]), "B": up.view(*up.shape, *more)}
        for half, matrix in halves.items():
            tensors[f"unet.{name}.lora_{half}.weight"] = matrix.detach().half().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # save_file makes files that only their owner can read


def export_checkpoint(run: Path, out: Path) -> None:
    """Writes the adapter from the checkpoint in the folder `run` as a LoRA file to `out`. The
    training may still be incomplete."""
    unet = UNet(ROW.unet)
    adapter = LowRank(unet)
    state = torch.load(run / "turbo.pt", map_location="cpu", weights_only=True)
    adapter.load_state_dict(state["average"]["adapter"])
    export(adapter, unet, out)
    print(f"written to {out} from step {state['step']}")


def work(rank: int, world: int, device: str, options: Options) -> None:
    """Runs the whole distillation in one process: process number `rank` of `world`. `device` is
    "cpu" or "cuda"."""
    workers = begin(rank, world, device, options)
    deadline = time.time() + 60 * options.minutes if options.minutes else math.inf
    distillation = Distillation(workers)
    networks = {"adapter": distillation.adapter, "fake": distillation.fake}
    samples = options.samples or SAMPLES["quick" if options.quick else "full"]
    run = Run(
        "turbo",
        networks,
        workers,
        samples,
        BATCH,
        LEARNING_RATE,
        options.run,
        warmup=20,
        rates={"adapter": RATE},
        momentum=0.5,
    )
    done = run.train(
        lambda progress, rng, generator: distillation.losses(run.batch, rng, generator), deadline
    )
    if done and rank == 0:
        average = run.average["adapter"]
        assert isinstance(average, LowRank)
        export(average, distillation.teacher, options.out)
        workers.log(f"written to {options.out}")


def main() -> None:
    description = "Distil the embedded model, or resume its distillation."
    args = command_line(description, "adapter", "images that the student draws in training").parse_args()
    run = args.run or HERE / "run" / ("quick" if args.quick else "")
    out = args.out or (run / TURBO_FILE.name if args.quick else TURBO_FILE)
    if args.export:
        return export_checkpoint(run, out)
    run.mkdir(parents=True, exist_ok=True)
    options = Options(run, out, args.quick, args.samples, None, args.minutes, time.time_ns())
    start(work, args.workers, options)


if __name__ == "__main__":
    main()
