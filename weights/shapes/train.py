"""Trains the embedded model on minsd's own networks and writes it beside this file in the diffusers folder layout.

    python -m minsd.weights.shapes.train [--quick] [--samples N] [--minutes M] [--export] [--out DIR]

First the VAE (Kingma & Welling 2014), then the UNet and the text encoder together (Ho et al. 2020, Rombach et al. 2022)
on its latents. Runs on every CPU core as processes of one thread (gradients averaged over gloo) or on one GPU by itself.
Checkpoints go to `run/`; started again, it goes on where it was and ends with the same weights. `--minutes` stops early,
to be taken up again; `--export` writes the folder from the newest checkpoint.

What this model needs beyond plain denoising, and why, is in README.md: a schedule shifted for 16x16 latents (config.py),
errors weighted towards the noisy end, where layout is decided, captions that sometimes name what is not there (data.py),
and attention maps supervised for the first third.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
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
VAE_BATCH, UNET_BATCH = 32, 96  # over all processes
PICTURES = 48_000  # different pictures seen; the UNet goes over their latents several times
VAE_SAMPLES = {"full": 40_000, "quick": 20_000}
UNET_SAMPLES = {"full": 480_000, "quick": 80_000}
LEVELS = (0.10, 0.20)  # of attention wanted at the cells of an object: its colour word, its shape word
ATTENTION_WEIGHT, ATTENTION_UNTIL = 0.05, 1 / 3  # falls linearly to 0 at this share of the run
EMA = 0.995
VOCABULARY = json.loads((HERE / "tokenizer" / "vocab.json").read_text())


def token_ids(words) -> list[int]:
    """Every caption word is one token, so no tokenizer is needed: start, words, end, padding with the end."""
    ids = [ROW.text.vocab_size - 2] + [VOCABULARY[f"{w}</w>"] for w in words]
    return ids + [ROW.text.eos_token_id] * (ROW.text.max_length - len(ids))


class Workers:
    """This process among its equals: which share is its own, and sums over all."""

    def __init__(self, rank: int, world: int, device: str):
        self.rank, self.world, self.device = rank, world, device

    def average_gradients(self, parameters) -> None:
        if self.world == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.world
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))

    def say(self, *words) -> None:
        if self.rank == 0:
            print(time.strftime("%H:%M:%S"), *words, flush=True)

    def autocast(self):
        return torch.autocast(self.device, dtype=torch.bfloat16)


class Run:
    """A model under training with its optimiser, its average, its checkpoints: one loop for both stages."""

    def __init__(self, name, modules, workers, samples, batch, lr, out, warmup=100):
        self.name, self.modules, self.workers, self.out = name, modules, workers, out
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        self.average = {key: copy.deepcopy(m).requires_grad_(False) for key, m in modules.items()}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.batch, self.steps, self.step, self.lr, self.warmup = (
            batch // workers.world,
            samples // batch,
            0,
            lr,
            warmup,
        )
        self.path = out / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=workers.device, weights_only=True)
            for key, m in modules.items():
                m.load_state_dict(state["modules"][key])
                self.average[key].load_state_dict(state["average"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            workers.say(f"{name}: goes on at step {self.step} of {self.steps}")

    def save(self) -> None:
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

    def train(self, losses, deadline: float) -> bool:
        """`losses(step, rng, generator) -> {name: (loss, weight)}`. True when the run is complete."""
        saved = start = time.time()
        first, shown = self.step, {}
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                rest = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
                group["lr"] = self.lr * min(1.0, (self.step + 1) / self.warmup) * (0.02 + 0.98 * rest)
            # Everything random in a step comes from its number: a resumed run draws what an unbroken one would.
            key = (SEED, self.step, self.workers.rank)
            parts = losses(
                self.step / self.steps,
                np.random.default_rng(key),
                torch.Generator().manual_seed(hash(key) & (2**63 - 1)),
            )
            self.optimizer.zero_grad(set_to_none=True)
            sum(loss * weight for loss, weight in parts.values() if weight).backward()
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.workers.average_gradients(self.parameters)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            decay = min(EMA, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, m in self.modules.items():
                    for a, p in zip(self.average[key].parameters(), m.parameters()):
                        a.lerp_(p, 1 - decay)
            self.step += 1
            for k, (loss, _) in parts.items():
                shown[k] = 0.98 * shown.get(k, loss.item()) + 0.02 * loss.item()
            if self.step % 50 == 0 or self.step == self.steps:
                rate = (self.step - first) * self.batch * self.workers.world / (time.time() - start)
                figures = [f"{k} {v:.4f}" for k, v in shown.items()]
                self.workers.say(f"{self.name} {self.step}/{self.steps}", *figures, f"{rate:.0f} samples/s")
            stop = torch.tensor([time.time() > deadline, time.time() - saved > 120], dtype=torch.int32)
            if self.workers.world > 1:
                dist.broadcast(stop, 0)
            if stop[1] or stop[0]:
                self.save()
                saved = time.time()
            if stop[0]:
                return False
        self.save()
        return True


def pictures(indices) -> torch.Tensor:
    """Pictures of the training set (n,3,128,128) in -1..1."""
    rendered = np.stack([data.example(SEED, int(i)).render()[0] for i in indices])
    return torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(workers, samples, out, deadline):
    torch.manual_seed(SEED)
    vae = VAE(ROW.vae).to(workers.device)
    run = Run("vae", {"vae": vae}, workers, samples, VAE_BATCH, 1.5e-3, out)

    def losses(progress, rng, generator):
        x = pictures(rng.integers(PICTURES, size=run.batch)).to(workers.device)
        with workers.autocast():
            mean, logvar = vae.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(workers.device)
            y = vae.decode(mean + (0.5 * logvar).exp() * noise).float()
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        mse = F.mse_loss(y, x)
        return {"l1": (F.l1_loss(y, x), 1.0), "mse": (mse, 1.0), "kl": (kl, 1e-3)}

    done = run.train(losses, deadline)
    return done, run.average["vae"]


@torch.no_grad()
def confused(vae, workers) -> list[str]:
    """Colours that a picture loses on its way through the VAE: training can end in a state where green is black."""
    palette, lost = torch.tensor(list(data.COLOURS.values())).float(), []
    for index, colour in enumerate(data.COLOURS):
        square = data.Object(colour, "square", data.SIZE / 2, data.SIZE / 2, 30.0, 0.0)
        picture = torch.from_numpy(data.Example((square,), (238, 238, 238), (), ()).render()[0]).permute(
            2, 0, 1
        )[None]
        seen = vae.decode(vae.encode(picture.to(workers.device).float() / 127.5 - 1)[0])[
            0, :, data.SIZE // 2, data.SIZE // 2
        ]
        if int((palette - (seen.cpu() + 1) * 127.5).square().sum(1).argmin()) != index:
            lost.append(colour)
    return lost


@torch.no_grad()
def latents_of(vae, workers, out, count):
    """This process's share of the training set, encoded once: latents, token ids, and what the maps should show."""
    path = out / f"latents-{workers.rank}-of-{workers.world}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    store = {"latents": [], "ids": [], "masks": [], "places": []}
    for start in range(workers.rank * 64, count, 64 * workers.world):
        examples = [data.example(SEED, i) for i in range(start, start + 64)]
        rendered = [e.render() for e in examples]
        x = torch.from_numpy(np.stack([r[0] for r in rendered])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with workers.autocast():
            store["latents"].append(vae.encode(x.to(workers.device))[0].float().cpu())
        for e, (_, masks) in zip(examples, rendered):
            cells = F.avg_pool2d(torch.from_numpy(masks), data.SIZE // 16)  # (n, 16, 16)
            wanted, places = torch.zeros(3, 16, 16), torch.full((3, 2), -1)
            for k, (colour_place, shape_place, index) in enumerate(e.named):
                places[k] = torch.tensor(
                    [-1 if colour_place is None else colour_place + 1, shape_place + 1]
                )  # 0: start
                if index is not None:
                    wanted[k] = cells[index]
            store["masks"].append((wanted * 255).round().to(torch.uint8))
            store["places"].append(places.to(torch.int8))
            store["ids"].append(torch.tensor(token_ids(e.words)))
    store = {k: torch.cat(v) if k == "latents" else torch.stack(v) for k, v in store.items()}
    torch.save(store, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return store


def attention_in_full(q, k, v, *, probs=None, backend=None):
    """What minsd.kernels.attention computes, with every probability kept for the backward pass, in autocast's bfloat16.
    The weights take gradients here, the latents are small: on a CPU nothing in minsd.kernels is as fast at that."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, N, d)
    p = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)  # (B, heads, N, M)
    return (p @ v).transpose(1, 2), p.mean(dim=1) if probs else None


def text_model() -> CLIPTextModel:
    c = ROW.text
    return CLIPTextModel(
        CLIPTextConfig(
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
            attn_implementation="eager",
        )
    )


def attention_loss(recorder, masks, places):
    """How far the 16x16 maps of the caption's words are from level x mask, as squared error over all cells.

    The least squared error is at the map that equals level x P(object here | what is visible in the noise): the loss
    calibrates maps rather than sharpening them, and a word whose object is absent should draw none. Divided by what an
    object of ordinary size (16 cells) at full level weighs, so that it starts near 1.
    """
    total, count = 0.0, 0
    maps = recorder.cross.float()  # (B, 16, 16, 77)
    for kind, level in enumerate(LEVELS):
        for k in range(places.shape[1]):
            position = places[:, k, kind].long()  # (B,), -1 where the caption has no such word
            there = position >= 0
            m = maps.gather(3, position.clamp(min=0)[:, None, None, None].expand(-1, 16, 16, 1))[..., 0]
            error = ((m - level * masks[:, k]) ** 2).sum((1, 2)) / (level**2 * 16)
            total, count = total + (error * there).sum(), count + there.sum()
    return total / count


def train_unet(workers, samples, out, deadline, scale, store):
    torch.manual_seed(SEED + 1)
    unet, text = UNet(ROW.unet).to(workers.device), text_model().to(workers.device).train()
    torch.nn.init.zeros_(unet.conv_out.weight)  # start by predicting nothing
    for module in unet.modules():
        if isinstance(module, Attention) and workers.device == "cpu":
            module.attend = attention_in_full
    run = Run("unet", {"unet": unet, "text": text}, workers, samples, UNET_BATCH, 1e-3, out)
    schedule = Schedule(ROW.schedule)
    latents = store["latents"] * scale
    empty = torch.tensor(token_ids([]))

    def losses(progress, rng, generator):
        n = run.batch
        pick = torch.from_numpy(rng.integers(len(latents), size=n))
        x0, ids = latents[pick].to(workers.device), store["ids"][pick]
        keep = torch.from_numpy(rng.random(n) >= 0.1)  # one caption in ten is empty, for guidance
        ids = torch.where(keep[:, None], ids, empty).to(workers.device)
        t = torch.randint(1000, (n,), generator=generator).to(workers.device)
        noise = torch.randn(x0.shape, generator=generator).to(workers.device)
        weight = ATTENTION_WEIGHT * max(0.0, 1 - progress / ATTENTION_UNTIL)
        recorder = AttentionRecorder() if weight else None
        with workers.autocast():
            context = text(ids).last_hidden_state
            eps = unet(schedule.add_noise(x0, noise, t), t, context, record=recorder)
        # A squared error of eps makes little of layout: where it is decided, the noise is nearly all there is to see, and
        # easily told. One of v would weigh it by 1/abar, and neglect outlines; halfway serves both.
        weights = schedule.alphas_cumprod[t.cpu()].rsqrt().to(workers.device)  # (B,)
        error = (eps.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        parts = {"eps": (error.mean(), 0.0), "weighted": ((weights * error).mean(), 1.0)}
        if weight:
            k = keep.to(workers.device)
            masks, places = (
                store["masks"][pick].to(workers.device).float() / 255,
                store["places"][pick].to(workers.device),
            )
            parts["attention"] = (
                attention_loss(recorder, masks, torch.where(k[:, None, None], places, -1)),
                weight,
            )
        return parts

    done = run.train(losses, deadline)
    return done, run.average


def export(vae, unet, text, scale, folder):
    """The diffusers folder: fp16 safetensors and the JSON files that say how to build the networks around them."""
    u, v, t, s = ROW.unet, ROW.vae, ROW.text, ROW.schedule
    kinds = ["CrossAttn" if cross else "" for cross in u.cross_attention]
    unet_config = {
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
    levels = len(v.block_out_channels)
    vae_config = {
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
    scheduler_config = {
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
    text_config = {
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
    index = {
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

    def write(path, content):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

    def weights(path, state):
        save_file(
            {k: p.detach().half().cpu().contiguous() for k, p in state.items()},
            folder / path,
            {"format": "pt"},
        )
        (folder / path).chmod(0o644)  # save_file makes them their owner's alone

    write("model_index.json", index)
    write("unet/config.json", unet_config)
    write("vae/config.json", vae_config)
    write("scheduler/scheduler_config.json", scheduler_config)
    write("text_encoder/config.json", text_config)
    weights("unet/diffusion_pytorch_model.safetensors", unet.state_dict())
    weights("vae/diffusion_pytorch_model.safetensors", vae.state_dict())
    # Checkpoints carry the prefix "text_model."; newer transformers' modules do not.
    state = {
        f"text_model.{k.removeprefix('text_model.')}": p
        for k, p in text.state_dict().items()
        if "position_ids" not in k
    }
    weights("text_encoder/model.safetensors", state)
    if folder.resolve() != HERE.resolve():
        shutil.copytree(HERE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def export_checkpoint(run, out):
    """The folder from the newest checkpoint of a run that is not finished."""
    vae, unet, text = VAE(ROW.vae), UNet(ROW.unet), text_model()
    state = torch.load(run / "unet.pt", map_location="cpu", weights_only=True)
    unet.load_state_dict(state["average"]["unet"])
    text.load_state_dict(state["average"]["text"])
    vae.load_state_dict(torch.load(run / "vae.pt", map_location="cpu", weights_only=True)["average"]["vae"])
    export(vae, unet, text, json.loads((run / "scale.json").read_text()), out)
    print(f"written to {out} from step {state['step']}")


def work(rank, world, device, args):
    if device == "cpu":
        torch.set_num_threads(1)
        torch.backends.mkldnn.set_flags(True)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{args.run.resolve()}/rendezvous-{args.token}",
            rank=rank,
            world_size=world,
        )
    workers = Workers(rank, world, device)
    deadline = time.time() + 60 * args.minutes if args.minutes else float("inf")
    kind = "quick" if args.quick else "full"
    start = time.time()
    done, vae = train_vae(workers, args.vae_samples or VAE_SAMPLES[kind], args.run, deadline)
    if not done:
        return
    if kind == "full" and args.vae_samples is None and (lost := confused(vae, workers)):
        raise SystemExit(
            f"the VAE cannot tell {', '.join(lost)} from other colours: take another SEED, or more samples"
        )
    store = latents_of(vae, workers, args.run, PICTURES // (4 if args.quick else 1))
    z = store["latents"].double()
    moments = torch.stack([z.sum(), z.square().sum(), torch.tensor(z.numel(), dtype=torch.float64)])
    if world > 1:
        dist.all_reduce(moments)
    mean, square = moments[0] / moments[2], moments[1] / moments[2]
    scale = round(float((square - mean**2) ** -0.5), 5)
    if rank == 0:
        (args.run / "scale.json").write_text(json.dumps(scale))
    workers.say(f"latents: scaling_factor {scale}, {time.time() - start:.0f} s so far")
    unet_samples = args.samples or UNET_SAMPLES[kind]
    done, average = train_unet(workers, unet_samples, args.run, deadline, scale, store)
    if rank == 0 and done:
        export(vae, average["unet"], average["text"], scale, args.out)
        workers.say(f"written to {args.out} after {time.time() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a worse model in about 15 minutes")
    parser.add_argument("--samples", type=int, help="pictures the UNet sees in all")
    parser.add_argument("--vae-samples", type=int, help="pictures the VAE sees in all")
    parser.add_argument("--minutes", type=float, help="stop after so long, to be resumed by the same command")
    parser.add_argument(
        "--run", type=Path, help="checkpoints (default: run/ beside this file, run/quick/ with --quick)"
    )
    parser.add_argument(
        "--out", type=Path, help="the finished folder (default: this one, or the checkpoints' with --quick)"
    )
    parser.add_argument(
        "--export", action="store_true", help="write the folder from the newest checkpoint, and stop"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core, or one GPU)")
    args = parser.parse_args()
    args.run = args.run or HERE / "run" / ("quick" if args.quick else "")
    args.out = args.out or (args.run if args.quick else HERE)
    if args.export:
        return export_checkpoint(args.run, args.out)
    args.run.mkdir(parents=True, exist_ok=True)
    args.token = time.time_ns()
    if torch.cuda.is_available():
        work(0, 1, "cuda", args)
    else:
        world = args.workers or len(os.sched_getaffinity(0))
        # fork: a spawned process would not find minsd in a bare checkout, whose root is off sys.path by now
        torch.multiprocessing.start_processes(work, (world, "cpu", args), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
