"""Trains the embedded model with minsd's own networks and writes it beside this file as a diffusers
folder.

    python -m minsd.weights.shapes.train [--quick] [--samples N] [--minutes M] [--export] [--out DIR]

The VAE (Kingma & Welling 2014) is trained first, then the UNet and the text encoder together (Ho et
al. 2020, Rombach et al. 2022) on the VAE's latents. Training uses one GPU, or every CPU core, with
one process of one thread per core; these processes average their gradients over gloo. Checkpoints
go to `run/`. The same command resumes from the newest checkpoint and ends with the same weights as
without the interruption. `--minutes` stops early, to be resumed later; `--export` writes the folder
from the newest checkpoint.

README.md explains what this model needs beyond plain denoising: a schedule shifted for 16x16
latents (config.py); errors weighted towards the noisy end, where layout is decided; captions that
sometimes name absent objects (data.py); and attention maps that are supervised for the first third
of the training.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from transformers import CLIPTextConfig, CLIPTextModel

from minsd.attention import Attention, AttentionRecorder
from minsd.config import MODELS
from minsd.samplers.schedule import Schedule
from minsd.unet import UNet
from minsd.vae import VAE
from minsd.weights.shapes import data

HERE = Path(__file__).parent
ROW = MODELS["shapes"]
SEED = 2026
VAE_BATCH = 32  # images per step, over all processes
UNET_BATCH = 96
PICTURES = 48_000  # number of different images; the UNet sees their latents several times
VAE_SAMPLES = {"full": 40_000, "quick": 20_000}
UNET_SAMPLES = {"full": 480_000, "quick": 80_000}
# Target attention of an object's cells to the object's colour word, and to its shape word.
LEVELS = (0.10, 0.20)
# The weight of the attention loss at the start. It falls linearly to 0 at the fraction
# ATTENTION_UNTIL of the run.
ATTENTION_WEIGHT = 0.05
ATTENTION_UNTIL = 1 / 3
EMA = 0.995  # decay of the moving average of weights, per step
VOCABULARY = json.loads((HERE / "tokenizer" / "vocab.json").read_text())

# A function losses(progress, rng, generator) -> {name: (loss, weight)}; progress is the fraction of
# the run that is done, and all random numbers come from the NumPy and the PyTorch generator.
Losses = Callable[[float, np.random.Generator, torch.Generator], dict[str, tuple[Tensor, float]]]


@dataclass(frozen=True)
class Options:
    """The options of one training: where to write, how long to train, and on how many images."""

    run: Path  # folder of the checkpoints
    out: Path  # folder of the finished model
    quick: bool = False
    samples: int | None = None  # images to train the UNet on; None: the default
    vae_samples: int | None = None
    minutes: float | None = None  # None: until the training is complete
    token: int = 0  # makes the name of the file through which the processes find each other


def token_ids(words: Iterable[str]) -> list[int]:
    """Returns the 77 token ids of a caption, which is given as its words: the id of the start
    token, one id for each word, and the id of the end token, repeated up to the length 77. Each
    word of the captions is one token, so no tokenizer is needed."""
    ids = [ROW.text.vocab_size - 2] + [VOCABULARY[f"{w}</w>"] for w in words]
    return ids + [ROW.text.eos_token_id] * (ROW.text.max_length - len(ids))


class Workers:
    """This process as one of several that train together. `rank` is its number, `world` the number
    of all processes, and `device` where it computes ("cpu" or "cuda")."""

    def __init__(self, rank: int, world: int, device: str):
        self.rank = rank
        self.world = world
        self.device = device

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradient of each parameter by the mean of this gradient over all
        processes."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    def log(self, *words: object) -> None:
        """Prints the time of day and then the words. Only the process of rank 0 prints; in the
        others this does nothing."""
        if self.rank == 0:
            print(time.strftime("%H:%M:%S"), *words, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)


class Run:
    """The training of one or several networks together: their optimiser, the moving average of
    their weights, and their checkpoint file."""

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        workers: Workers,
        samples: int,
        batch: int,
        lr: float,
        out: Path,
        warmup: int = 100,
        rates: Mapping[str, float] | None = None,
        momentum: float = 0.9,
    ):
        """Prepares the training of the networks `modules` (name -> network). If the checkpoint file
        `out`/`name`.pt exists, the training resumes from it.

        `samples` is the number of training images, where a repeated image counts again, and `batch`
        the number of images per step. Both are totals over all processes. `lr` is the highest
        learning rate, which is reached after `warmup` steps. `rates` (name of a network -> factor)
        gives some networks another learning rate, the factor times `lr`. `momentum` is Adam's beta
        1.
        """
        self.name = name
        self.modules = modules
        self.workers = workers
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        self.average = {key: copy.deepcopy(m).requires_grad_(False) for key, m in modules.items()}
        rates = rates or {}
        groups = [{"params": [*m.parameters()], "rate": rates.get(key, 1.0)} for key, m in modules.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.99), weight_decay=1e-2)
        self.batch = batch // workers.world
        self.steps = samples // batch
        self.step = 0
        self.lr = lr
        self.warmup = warmup
        self.path = out / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=workers.device, weights_only=True)
            for key, m in modules.items():
                m.load_state_dict(state["modules"][key])
                self.average[key].load_state_dict(state["average"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            workers.log(f"{name}: resumes at step {self.step} of {self.steps}")

    def save(self) -> None:
        """Writes the checkpoint file. Only the process of rank 0 writes; in the others this does
        nothing."""
        if self.workers.rank:
            return
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "step": self.step,
            "average": {k: m.state_dict() for k, m in self.average.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def train(self, losses: Losses, deadline: float) -> bool:
        """Trains until the last step, but no longer than until `deadline`, a time as time.time()
        states it. The function `losses` computes the losses of one step. Saves a checkpoint about
        every two minutes and at the end. Returns True after the last step, and False if the
        deadline came first."""
        start = saved = time.time()
        first = self.step
        shown: dict[str, float] = {}
        while self.step < self.steps:
            for k, (loss, _) in self._one_step(losses).items():
                shown[k] = 0.98 * shown.get(k, loss.item()) + 0.02 * loss.item()
            if self.step % 50 == 0 or self.step == self.steps:
                rate = (self.step - first) * self.batch * self.workers.world / (time.time() - start)
                figures = [f"{k} {v:.4f}" for k, v in shown.items()]
                self.workers.log(f"{self.name} {self.step}/{self.steps}", *figures, f"{rate:.0f} samples/s")
            stop = torch.tensor([time.time() > deadline, time.time() - saved > 120], dtype=torch.int32)
            if self.workers.world > 1:
                dist.broadcast(stop, 0)  # the process of rank 0 decides for all
            if stop[1] or stop[0]:
                self.save()
                saved = time.time()
            if stop[0]:
                return False
        self.save()
        return True

    def _one_step(self, losses: Losses) -> dict[str, tuple[Tensor, float]]:
        """Takes one step of the optimiser and updates the moving averages of the weights. The
        function `losses` computes the losses of the step. Returns its result, a dict of name ->
        (loss, weight)."""
        for group in self.optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            rate = self.lr * group["rate"]
            group["lr"] = rate * min(1.0, (self.step + 1) / self.warmup) * (0.02 + 0.98 * cosine)
        # All random numbers of a step are determined by the step's index, so that a resumed run
        # draws the same ones.
        key = (SEED, self.step, self.workers.rank)
        generator = torch.Generator().manual_seed(hash(key) & (2**63 - 1))
        parts = losses(self.step / self.steps, np.random.default_rng(key), generator)
        self.optimizer.zero_grad(set_to_none=True)
        terms = [loss * weight for loss, weight in parts.values() if weight]
        sum(terms[1:], terms[0]).backward()
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.workers.average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, m in self.modules.items():
                for a, p in zip(self.average[name].parameters(), m.parameters()):
                    a.lerp_(p, 1 - decay)
        self.step += 1
        return parts


# --- the VAE --------------------------------------------------------------------------------------


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """Converts n images (128,128,3) with values from 0 to 255 to one tensor (n,3,128,128) with
    values from -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(workers: Workers, samples: int, out: Path, deadline: float) -> tuple[bool, VAE]:
    """Trains the VAE on `samples` images, where a repeated image counts again. The checkpoint file
    is in the folder `out`. Stops at `deadline`, a time as time.time() states it. Returns (done,
    vae): whether the training is complete, and a VAE with the moving average of the trained
    weights."""
    torch.manual_seed(SEED)
    vae = VAE(ROW.vae).to(workers.device)
    run = Run("vae", {"vae": vae}, workers, samples, VAE_BATCH, 1.5e-3, out)

    def losses(
        progress: float, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, tuple[Tensor, float]]:
        indices = rng.integers(PICTURES, size=run.batch)
        x = to_tensor([data.example(SEED, int(i)).render()[0] for i in indices]).to(workers.device)
        with workers.autocast():
            mean, logvar = vae.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(workers.device)
            y = vae.decode(mean + (0.5 * logvar).exp() * noise).float()
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {"l1": (F.l1_loss(y, x), 1.0), "mse": (F.mse_loss(y, x), 1.0), "kl": (kl, 1e-3)}

    done = run.train(losses, deadline)
    average = run.average["vae"]
    assert isinstance(average, VAE)
    return done, average


@torch.no_grad()
def confused(vae: VAE, workers: Workers) -> list[str]:
    """Tests whether the VAE keeps the colours of the palette apart. Returns the names of those
    colours that, after encoding and decoding, are nearer to another colour of the palette. This can
    happen: some trainings end in a state where green becomes black."""
    palette = torch.tensor(list(data.COLOURS.values())).float()
    lost = []
    for index, colour in enumerate(data.COLOURS):
        square = data.Object(colour, "square", data.SIZE / 2, data.SIZE / 2, 30.0, 0.0)
        picture = data.Example((square,), (238, 238, 238), (), ()).render()[0]
        decoded = vae.decode(vae.encode(to_tensor([picture]).to(workers.device))[0])
        middle = (decoded[0, :, data.SIZE // 2, data.SIZE // 2].cpu() + 1) * 127.5
        if int((palette - middle).square().sum(1).argmin()) != index:
            lost.append(colour)
    return lost


@torch.no_grad()
def latents_of(vae: VAE, workers: Workers, out: Path, count: int) -> dict[str, Tensor]:
    """Makes the training set of the UNet. Encodes this process's share of the first `count`
    training images with the VAE, and stores the result in a file in the folder `out`. If the file
    exists, loads it.

    Returns a dict of four tensors for n images: `latents` (n,4,16,16), the token ids `ids` (n,77)
    of the captions, `masks` (n,3,16,16) and `places` (n,3,2). The last two describe the objects, at
    most 3, that a caption names. `masks` has the fraction of each latent cell that the object
    covers, times 255. It is 0 everywhere for an object that is not in the image. `places` has the
    positions of two tokens: of the object's colour word and of its shape word. A position is -1 if
    the caption lacks that word.
    """
    path = out / f"latents-{workers.rank}-of-{workers.world}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    latents, ids, all_masks, all_places = [], [], [], []
    for start in range(workers.rank * 64, count, 64 * workers.world):
        examples = [data.example(SEED, i) for i in range(start, start + 64)]
        rendered = [e.render() for e in examples]
        x = to_tensor([picture for picture, _ in rendered])
        with workers.autocast():
            latents.append(vae.encode(x.to(workers.device))[0].float().cpu())
        for e, (_, masks) in zip(examples, rendered):
            cells = F.avg_pool2d(torch.from_numpy(masks), data.SIZE // 16)  # (n, 16, 16)
            wanted = torch.zeros(3, 16, 16)
            places = torch.full((3, 2), -1)
            for k, (colour_place, shape_place, index) in enumerate(e.named):
                if colour_place is not None:
                    places[k, 0] = colour_place + 1  # the start token is at 0
                places[k, 1] = shape_place + 1
                if index is not None:
                    wanted[k] = cells[index]
            all_masks.append((wanted * 255).round().to(torch.uint8))
            all_places.append(places.to(torch.int8))
            ids.append(torch.tensor(token_ids(e.words)))
    store = {
        "latents": torch.cat(latents),
        "ids": torch.stack(ids),
        "masks": torch.stack(all_masks),
        "places": torch.stack(all_places),
    }
    torch.save(store, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return store


# --- the UNet and the text encoder ----------------------------------------------------------------


def attention_in_full(
    q: Tensor, k: Tensor, v: Tensor, *, probs: str | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Computes attention in full, without a fused kernel. It replaces minsd.kernels.attention in
    this training, where it is faster on a CPU, because all probabilities are kept for the backward
    pass and the latents are small.

    q is (B,N,heads,d); k and v are (B,M,heads,d). Returns (out, averages): the output
    (B,N,heads,d), and the attention probabilities averaged over heads (B,N,M). `averages` is None
    if `probs` is None. `backend` is ignored.
    """
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, N, d)
    p = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)  # (B, heads, N, M)
    return (p @ v).transpose(1, 2), p.mean(dim=1) if probs else None


def use_attention_in_full(network: nn.Module) -> None:
    """Makes all attention layers of `network` compute with the function `attention_in_full`."""
    for module in network.modules():
        if isinstance(module, Attention):
            # This instance attribute replaces the class's static method, which pyright forbids.
            module.attend = attention_in_full  # pyright: ignore[reportAttributeAccessIssue]


def text_model() -> CLIPTextModel:
    """Builds the text encoder of the embedded model, with random weights."""
    c = ROW.text
    config = CLIPTextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        max_position_embeddings=c.max_length,
        hidden_act=c.hidden_act,
        projection_dim=c.hidden_size,
        bos_token_id=c.vocab_size - 2,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]  # one of its **kwargs
    )
    return CLIPTextModel(config)


def attention_loss(recorder: AttentionRecorder, masks: Tensor, places: Tensor) -> Tensor:
    """Returns the attention loss of a batch of B images: how far the attention maps of caption
    words are from target maps. `recorder` holds the attention maps (16x16 cells) of all words.

    `masks` (B,3,16,16) states which fraction of a cell each of up to 3 objects covers, from 0 to 1.
    `places` (B,3,2) states the token positions of the object's colour word and shape word, or -1
    for no word. The target map of such a word is the object's mask times the number in `LEVELS` for
    colour words or for shape words. It is zero for an object that is not in the image.

    The loss is the squared difference of map and target, summed over the cells and averaged over
    the words. It is divided by the value that a map of zeros would give for an object of 16 cells,
    so that it starts near 1.
    """
    total = count = masks.new_zeros(())
    maps = recorder.cross.float()  # (B, 16, 16, 77)
    for kind, level in enumerate(LEVELS):
        for k in range(places.shape[1]):
            position = places[:, k, kind].long()  # (B,), -1 where the caption has no such word
            there = position >= 0
            m = maps.gather(3, position.clamp(min=0)[:, None, None, None].expand(-1, 16, 16, 1))[..., 0]
            error = ((m - level * masks[:, k]) ** 2).sum((1, 2)) / (level**2 * 16)
            total = total + (error * there).sum()
            count = count + there.sum()
    return total / count


def train_unet(
    workers: Workers, samples: int, out: Path, deadline: float, scale: float, store: dict[str, Tensor]
) -> tuple[bool, dict[str, nn.Module]]:
    """Trains the UNet and the text encoder together on `samples` images, where a repeated image
    counts again. `store` is the training set that `latents_of` returns, and `scale` the factor that
    brings its latents to unit variance. The checkpoint file is in the folder `out`. Stops at
    `deadline`, a time as time.time() states it.

    Returns (done, average): whether the training is complete, and a dict of the two networks,
    "unet" and "text", with the moving average of the trained weights.
    """
    torch.manual_seed(SEED + 1)
    device = workers.device
    unet = UNet(ROW.unet).to(device)
    text = text_model().to(device).train()  # pyright: ignore[reportArgumentType]  # .to is decorated
    nn.init.zeros_(unet.conv_out.weight)  # the UNet starts by predicting zero
    if device == "cpu":
        use_attention_in_full(unet)
    run = Run("unet", {"unet": unet, "text": text}, workers, samples, UNET_BATCH, 1e-3, out)
    schedule = Schedule(ROW.schedule)
    latents = store["latents"] * scale
    empty = torch.tensor(token_ids([]))

    def losses(
        progress: float, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, tuple[Tensor, float]]:
        n = run.batch
        pick = torch.from_numpy(rng.integers(len(latents), size=n))
        x0 = latents[pick].to(device)
        keep = torch.from_numpy(rng.random(n) >= 0.1)  # one caption in ten is empty, for guidance
        ids = torch.where(keep[:, None], store["ids"][pick], empty).to(device)
        t = torch.randint(1000, (n,), generator=generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        attention_weight = ATTENTION_WEIGHT * max(0.0, 1 - progress / ATTENTION_UNTIL)
        recorder = AttentionRecorder() if attention_weight else None
        with workers.autocast():
            context = text(ids).last_hidden_state
            eps = unet(schedule.add_noise(x0, noise, t), t, context, record=recorder)
        # The plain squared error of eps gives little weight to layout, because layout is decided
        # where the input is nearly all noise, and then eps is easy to predict. Training on the
        # error of v would mean the weight 1/abar (abar: the cumulative product of 1 - beta at t),
        # which neglects outlines. The square root of that weight is a compromise.
        weights = schedule.alphas_cumprod[t.cpu()].rsqrt().to(device)  # (B,)
        error = (eps.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        parts = {"eps": (error.mean(), 0.0), "weighted": ((weights * error).mean(), 1.0)}
        if recorder is not None:
            masks = store["masks"][pick].to(device).float() / 255
            places = torch.where(keep.to(device)[:, None, None], store["places"][pick].to(device), -1)
            parts["attention"] = (attention_loss(recorder, masks, places), attention_weight)
        return parts

    done = run.train(losses, deadline)
    return done, run.average


# --- the finished folder --------------------------------------------------------------------------


def unet_json() -> dict[str, Any]:
    """Returns what the config.json of the embedded model's UNet has to contain."""
    u = ROW.unet
    kinds = ["CrossAttn" if cross else "" for cross in u.cross_attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": u.num_heads,
        "block_out_channels": u.block_out_channels,
        "cross_attention_dim": u.context_dim,
        "down_block_types": [f"{k}DownBlock2D" for k in kinds],
        "up_block_types": [f"{k}UpBlock2D" for k in reversed(kinds)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": u.norm_groups,
        "norm_eps": u.norm_eps,
        "layers_per_block": u.layers_per_block,
        "sample_size": u.sample_size,
        "use_linear_projection": u.linear_projection,
        "upcast_attention": u.upcast_attention,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
        "downsample_padding": 1,
    }


def vae_json(scale: float) -> dict[str, Any]:
    """Returns what the config.json of the embedded model's VAE has to contain. `scale` is the
    factor that brings the VAE's latents to unit variance."""
    v = ROW.vae
    levels = len(v.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": v.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": v.latent_channels,
        "layers_per_block": v.layers_per_block,
        "norm_num_groups": v.norm_groups,
        "sample_size": data.SIZE,
        "scaling_factor": scale,
    }


def scheduler_json() -> dict[str, Any]:
    """Returns what the embedded model's scheduler_config.json has to contain."""
    s = ROW.schedule
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": s.num_train_timesteps,
        "beta_start": s.beta_start,
        "beta_end": s.beta_end,
        "beta_schedule": s.beta_schedule,
        "clip_sample": False,
        "steps_offset": s.steps_offset,
        "set_alpha_to_one": s.set_alpha_to_one,
        "skip_prk_steps": True,
        "prediction_type": s.prediction_type,
        "timestep_spacing": s.timestep_spacing,
        "trained_betas": None,
    }


def text_json() -> dict[str, Any]:
    """Returns what the config.json of the embedded model's text encoder has to contain."""
    t = ROW.text
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": t.vocab_size,
        "hidden_size": t.hidden_size,
        "intermediate_size": t.intermediate_size,
        "num_hidden_layers": t.num_layers,
        "num_attention_heads": t.num_heads,
        "max_position_embeddings": t.max_length,
        "hidden_act": t.hidden_act,
        "projection_dim": t.hidden_size,
        "layer_norm_eps": 1e-5,
        "bos_token_id": t.vocab_size - 2,
        "eos_token_id": t.eos_token_id,
        "pad_token_id": t.pad_token_id,
    }


def index_json() -> dict[str, Any]:
    """Returns what the embedded model's model_index.json has to contain."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def export(vae: nn.Module, unet: nn.Module, text: nn.Module, scale: float, folder: Path) -> None:
    """Writes the model into `folder` in the diffusers layout: the weights in fp16 as safetensors,
    and JSON files about the networks. `scale` is the factor that brings the VAE's latents to unit
    variance. The tokenizer, which lies beside this script, is copied too if `folder` is another
    folder."""
    for name, content in {
        "model_index.json": index_json(),
        "unet/config.json": unet_json(),
        "vae/config.json": vae_json(scale),
        "scheduler/scheduler_config.json": scheduler_json(),
        "text_encoder/config.json": text_json(),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    # Checkpoints carry the prefix "text_model."; the modules of newer transformers do not.
    text_state = {
        f"text_model.{name.removeprefix('text_model.')}": p
        for name, p in text.state_dict().items()
        if "position_ids" not in name
    }
    for name, state in {
        "unet/diffusion_pytorch_model.safetensors": unet.state_dict(),
        "vae/diffusion_pytorch_model.safetensors": vae.state_dict(),
        "text_encoder/model.safetensors": text_state,
    }.items():
        state = {k: p.detach().half().cpu().contiguous() for k, p in state.items()}
        save_file(state, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)  # save_file makes files that only their owner can read
    if folder.resolve() != HERE.resolve():
        shutil.copytree(HERE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def export_checkpoint(run: Path, out: Path) -> None:
    """Writes the model from the checkpoints in the folder `run` into the folder `out`, in the
    diffusers layout. The training may still be incomplete."""
    vae, unet, text = VAE(ROW.vae), UNet(ROW.unet), text_model()
    state = torch.load(run / "unet.pt", map_location="cpu", weights_only=True)
    unet.load_state_dict(state["average"]["unet"])
    text.load_state_dict(state["average"]["text"])
    vae.load_state_dict(torch.load(run / "vae.pt", map_location="cpu", weights_only=True)["average"]["vae"])
    export(vae, unet, text, json.loads((run / "scale.json").read_text()), out)
    print(f"written to {out} from step {state['step']}")


# --- processes ------------------------------------------------------------------------------------


def begin(rank: int, world: int, device: str, options: Options) -> Workers:
    """Prepares this process for training: process number `rank` of `world`. `device` is "cpu" or
    "cuda". Connects the process with the others, and returns its `Workers` object."""
    if device == "cpu":
        torch.set_num_threads(1)
        torch.backends.mkldnn.set_flags(True)
    if world > 1:
        rendezvous = f"file://{options.run.resolve()}/rendezvous-{options.token}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    return Workers(rank, world, device)


def start(work: Callable[[int, int, str, Options], None], workers: int | None, options: Options) -> None:
    """Calls work(rank, world, device, options), once in this process if there is a GPU. Without a
    GPU, calls it on the CPU in several processes at the same time: `workers` of them, or one per
    CPU core if `workers` is None."""
    if torch.cuda.is_available():
        work(0, 1, "cuda", options)
    else:
        world = workers or len(os.sched_getaffinity(0))
        # Processes are forked, because a spawned process would not find minsd in a checkout that is
        # not installed, where the root of the package is not on sys.path.
        start_processes(work, (world, "cpu", options), nprocs=world, start_method="fork")


def work(rank: int, world: int, device: str, options: Options) -> None:
    """Runs the whole training in one process: process number `rank` of `world`. `device` is "cpu"
    or "cuda"."""
    workers = begin(rank, world, device, options)
    began = time.time()
    deadline = began + 60 * options.minutes if options.minutes else math.inf
    kind = "quick" if options.quick else "full"
    done, vae = train_vae(workers, options.vae_samples or VAE_SAMPLES[kind], options.run, deadline)
    if not done:
        return
    lost = confused(vae, workers) if kind == "full" and options.vae_samples is None else []
    if lost:
        raise SystemExit(
            f"the VAE cannot tell {', '.join(lost)} from other colours: take another SEED, or more samples"
        )
    store = latents_of(vae, workers, options.run, PICTURES // (4 if options.quick else 1))
    z = store["latents"].double()
    moments = torch.stack([z.sum(), z.square().sum(), torch.tensor(z.numel(), dtype=torch.float64)])
    if world > 1:
        dist.all_reduce(moments)
    mean = moments[0] / moments[2]
    square = moments[1] / moments[2]
    scale = round(float((square - mean**2) ** -0.5), 5)
    if rank == 0:
        (options.run / "scale.json").write_text(json.dumps(scale))
    workers.log(f"latents: scaling_factor {scale}, {time.time() - began:.0f} s so far")
    samples = options.samples or UNET_SAMPLES[kind]
    done, average = train_unet(workers, samples, options.run, deadline, scale, store)
    if rank == 0 and done:
        export(vae, average["unet"], average["text"], scale, options.out)
        workers.log(f"written to {options.out} after {time.time() - began:.0f} s")


def command_line(description: str, product: str, samples: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that all training scripts share. `description` tells what the
    script does, `product` is a word for what it writes ("model" or "adapter"), and `samples` is the
    help text of its option --samples."""
    parser = argparse.ArgumentParser(description=description)
    a = parser.add_argument
    a("--quick", action="store_true", help=f"a worse {product} in less time, for trying changes")
    a("--samples", type=int, help=samples)
    a("--minutes", type=float, help="stop after this time; the same command resumes")
    a("--run", type=Path, help="checkpoints (default: run/ beside this file, run/quick/ with --quick)")
    a("--out", type=Path, help=f"finished {product} (default: beside this file, with --quick in the run)")
    a("--export", action="store_true", help=f"write the {product} from the newest checkpoint, and stop")
    a("--workers", type=int, help="processes (default: one per core, or one GPU)")
    return parser


def main() -> None:
    description = "Train the embedded model, or resume its training."
    parser = command_line(description, "model", "images to train the UNet on, repetitions counted")
    parser.add_argument("--vae-samples", type=int, help="images to train the VAE on, repetitions counted")
    args = parser.parse_args()
    run = args.run or HERE / "run" / ("quick" if args.quick else "")
    out = args.out or (run if args.quick else HERE)
    if args.export:
        return export_checkpoint(run, out)
    run.mkdir(parents=True, exist_ok=True)
    token = time.time_ns()
    options = Options(run, out, args.quick, args.samples, args.vae_samples, args.minutes, token)
    start(work, args.workers, options)


if __name__ == "__main__":
    main()
