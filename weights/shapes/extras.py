"""Trains two small additions to the embedded model and writes them as ordinary files.

    python -m minsd.weights.shapes.extras control     # a ControlNet -> extras/outlines/
    python -m minsd.weights.shapes.extras style       # a LoRA -> extras/pierced.safetensors

The ControlNet (Zhang et al. 2023) lets outlines determine the places of shapes. It starts as a copy
of the UNet's encoder half, joined to the UNet by convolutions that start at zero. Its control
images are white outlines of the objects on black, with the kind of captions that the embedded model
was trained on, so colours still come from the caption.

The LoRA (Hu et al. 2021) puts a hole into the middle of every shape. It has rank 8, on attention
layers and convolutions of the UNet; its `down` matrices start at random, its `up` matrices at zero.
It has no trigger word. The weights of the model stay frozen.

Training takes minutes on a CPU; bench/control.py measures the effect of the ControlNet and of the
LoRA.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

import minsd
from minsd.controlnet import ControlNet
from minsd.guidance import Model
from minsd.weights import lora
from minsd.weights.shapes import data
from minsd.weights.shapes.train import use_attention_in_full

HERE = Path(__file__).parent / "extras"
SEED = 31  # gives images that the model was not trained on
HIDDEN = (16, 16, 32, 64)  # channels inside the embedding of control images
RANK = 8
# The ends of the names of the layers that the LoRA adapts.
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2", "conv_shortcut")
# An example to try the ControlNet on.
EXAMPLE = (data.Object("red", "circle", 40, 46, 22, 0.0), data.Object("blue", "square", 88, 82, 24, 0.1))
HOLE = 0.42  # radius of the hole, as a fraction of the object's

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, indices of the images) -> eps


@dataclass(frozen=True)
class Options:
    """The options of one training: which addition to the embedded model to train, for how long, and
    where to write it."""

    what: str  # "control" or "style"
    out: Path
    steps: int
    batch: int
    pictures: int  # number of different images
    minutes: float  # the time limit; the learning-rate schedule ends there at the latest
    lr: float | None  # None: the default


def outlines(objects: tuple[data.Object, ...], width: float = 2.0) -> Image.Image:
    """Draws a control image (128x128, RGB). It shows the outlines of the objects as white lines on
    black, `width` pixels wide."""
    k = 4  # supersampling
    canvas = Image.new("L", (data.SIZE * k, data.SIZE * k))
    for o in objects:
        points = [tuple(p) for p in (data.outline(o.shape, o.turn) * o.radius + (o.x, o.y)) * k]
        ImageDraw.Draw(canvas).line([*points, *points[:2]], fill=255, width=round(width * k), joint="curve")
    return canvas.reduce(k).convert("RGB")


def plain(example: data.Example) -> np.ndarray:
    """Draws an example's shapes without any change, as in the images that the embedded model (the
    package's own small model of coloured shapes) was trained on. Returns the image, (SIZE,SIZE,3)
    uint8."""
    return example.render()[0]


def pierced(example: data.Example) -> np.ndarray:
    """Draws the image of an example with a round hole in the middle of each object. Returns the
    image, (SIZE,SIZE,3) uint8."""
    picture = plain(example).astype(np.float32)
    y, x = np.mgrid[: data.SIZE, : data.SIZE]
    for o in example.objects:
        coverage = np.clip(HOLE * o.radius - np.hypot(x - o.x, y - o.y) + 0.5, 0, 1)  # anti-aliased
        picture += coverage[..., None] * (np.array(example.ground, np.float32) - picture)
    return picture.round().astype(np.uint8)


@torch.no_grad()
def examples(
    sd: Model, count: int, draw: Callable[[data.Example], np.ndarray]
) -> tuple[Tensor, Tensor, list[data.Example]]:
    """Makes `count` training examples, draws their images with the function `draw`, and encodes
    images and captions with the model `sd`. Returns (latents, texts, made): the latents of the
    images (count,4,16,16), the text states of the captions (count,77,D), and the list of
    examples."""
    made = [data.example(SEED, i) for i in range(count)]
    parts = [made[i : i + 32] for i in range(0, count, 32)]
    latents = torch.cat([sd.encode([Image.fromarray(draw(e)) for e in part]) for part in parts])
    texts = torch.cat([sd.encode_prompt([e.caption for e in part]) for part in parts])
    return latents, texts, made


def train(
    sd: Model, parameters: list[nn.Parameter], predict: Predict, latents: Tensor, options: Options, lr: float
) -> None:
    """Trains `parameters`, on which the results of `predict` depend, to predict noise. The loss is
    the weighted squared error of `noise_loss`. predict(x, t, rows) returns the noise that is
    predicted in noisy latents x at timesteps t. `rows` are indices into `latents` (n,4,16,16), the
    latents of all training images, and state which images the rows of x are. `lr` is the highest
    learning rate.

    The state of the training is saved every 50 steps. A call with the same `options` resumes from
    it.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    state = options.out / f"{options.what}.state"
    start = time.time()
    shown: float | None = None
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        optimizer.load_state_dict(kept["optimizer"])
        for p, value in zip(parameters, kept["parameters"], strict=True):
            p.data.copy_(value)
        first = kept["step"]
        shown = kept["shown"]
        start -= kept["seconds"]
    for step in range(first, options.steps):
        progress = max(step / options.steps, (time.time() - start) / (60 * options.minutes))
        if progress >= 1:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (0.02 + 0.98 * cosine)
        loss = noise_loss(sd, predict, latents, options.batch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = loss.item() if shown is None else 0.97 * shown + 0.03 * loss.item()
        seconds = time.time() - start
        if (step + 1) % 25 == 0:
            print(f"{step + 1}/{options.steps} weighted {shown:.4f}, {seconds:.0f} s", flush=True)
        if (step + 1) % 50 == 0:
            options.out.mkdir(parents=True, exist_ok=True)
            kept = {"step": step + 1, "shown": shown, "seconds": seconds, "optimizer": optimizer.state_dict()}
            torch.save(kept | {"parameters": [p.data for p in parameters]}, state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)
    state.unlink(missing_ok=True)


def noise_loss(sd: Model, predict: Predict, latents: Tensor, batch: int, step: int) -> Tensor:
    """Returns the loss of one training step. Chooses `batch` rows of `latents` and a timestep for
    each at random, adds noise, and lets `predict` (see `train`) predict the noise. The loss is the
    squared error of this prediction, averaged with a weight for each timestep: more for noisy ones,
    as in train.py. `step` is the number of the training step and determines all random numbers."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    pick = torch.randint(len(latents), (batch,), generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    noise = torch.randn(latents[pick].shape, generator=generator)
    x = sd.schedule.add_noise(latents[pick], noise, t)
    with torch.autocast(sd.device.type, dtype=torch.bfloat16):
        eps = predict(x, t, pick).float()
    error = (eps - noise).square().mean(dim=(1, 2, 3))  # (B,)
    return (error * sd.schedule.alphas_cumprod[t].rsqrt()).mean()


def drop(texts: Tensor, pick: Tensor, empty: Tensor) -> Tensor:
    """Returns the text states (B,77,D) of a batch: those rows of `texts` whose indices are in
    `pick` (B,). Every tenth row is replaced by `empty`, the text states of the empty prompt,
    because guidance needs a model that was also trained on it."""
    keep = torch.arange(len(pick)) % 10 > 0
    return torch.where(keep[:, None, None], texts[pick], empty)


def train_control(sd: Model, options: Options) -> None:
    """Trains a ControlNet for the embedded model `sd`, and writes it into the folder outlines/ in
    `options.out`."""
    torch.manual_seed(SEED)
    net = ControlNet(sd.config.unet, HIDDEN)
    theirs = sd.unet.state_dict()
    net.load_state_dict({name: theirs.get(name, p) for name, p in net.state_dict().items()})
    # In the paper the last layer of the control image's embedding starts at zero as well. But one
    # zero-initialised layer is enough for the output to start at zero, and with two in sequence the
    # ControlNet learns next to nothing in the first hundreds of steps.
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        for p in conv.parameters():
            nn.init.zeros_(p)
    use_attention_in_full(net)
    latents, texts, made = examples(sd, options.pictures, plain)
    drawn = [np.asarray(outlines(e.objects).convert("L")) for e in made]
    images = torch.from_numpy(np.stack(drawn))  # (n, 128, 128)
    empty = sd.encode_prompt("")

    def predict(x: Tensor, t: Tensor, pick: Tensor) -> Tensor:
        context = drop(texts, pick, empty)
        pictures = images[pick, None].expand(-1, 3, -1, -1) / 255
        return sd.unet(x, t, context, control=net(x, t, context, net.embed(pictures)))

    train(sd, list(net.parameters()), predict, latents, options, options.lr or 1e-3)
    folder = options.out / "outlines"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(control_json(sd), indent=2) + "\n")
    outlines(EXAMPLE).save(folder / "example.png")
    write(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def control_json(sd: Model) -> dict[str, Any]:
    """Returns what the config.json of the trained ControlNet has to contain. `sd` is the embedded
    model."""
    c = sd.config.unet
    return {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        "attention_head_dim": c.num_heads,
        "block_out_channels": c.block_out_channels,
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": HIDDEN,
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": c.context_dim,
        "down_block_types": [("CrossAttn" if on else "") + "DownBlock2D" for on in c.cross_attention],
        "in_channels": c.in_channels,
        "layers_per_block": c.layers_per_block,
        "norm_num_groups": c.norm_groups,
        "norm_eps": c.norm_eps,
        "use_linear_projection": c.linear_projection,
    }


def train_style(sd: Model, options: Options) -> None:
    """Trains a LoRA for the embedded model `sd`, and writes it to the file pierced.safetensors in
    `options.out`."""
    torch.manual_seed(SEED)
    fused = lora.fused_layers(sd.unet)
    parts = []
    parameters = []
    for name, module in sd.unet.named_modules():
        if name.endswith(LAYERS):
            assert isinstance(module, nn.Linear | nn.Conv2d)
            shape = module.weight.shape
            down = nn.Parameter(torch.randn(RANK, *shape[1:]) / math.sqrt(shape[1:].numel()))
            up = nn.Parameter(torch.zeros(shape[0], RANK, *[1] * (len(shape) - 2)))
            parts.append(lora.LowRank(name, module, fused.get(module), down, up, 1.0))
            parameters += [down, up]
    use_attention_in_full(sd.unet)
    latents, texts, _ = examples(sd, options.pictures, pierced)
    empty = sd.encode_prompt("")

    def predict(x: Tensor, t: Tensor, pick: Tensor) -> Tensor:
        return sd.unet(x, t, drop(texts, pick, empty))

    with lora.per_row([(lora.LoRA("pierced", tuple(parts)), [1.0])]):
        train(sd, parameters, predict, latents, options, options.lr or 2e-3)
    tensors = {}  # with kohya's names
    for part in parts:
        key = "lora_unet_" + part.name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = part.down
        tensors[f"{key}.lora_up.weight"] = part.up
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    options.out.mkdir(parents=True, exist_ok=True)
    write(tensors, options.out / "pierced.safetensors")


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors in fp16 to the safetensors file `path`. If the call is interrupted, an earlier
    file at `path` stays whole."""
    temporary = path.with_suffix(".tmp")
    halves = {name: p.detach().half().contiguous() for name, p in tensors.items()}
    save_file(halves, temporary, {"format": "pt"})
    temporary.chmod(0o644)  # save_file makes files that only their owner can read
    os.replace(temporary, path)
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two small additions to the embedded model.")
    a = parser.add_argument
    a("what", choices=("control", "style"))
    a("--steps", type=int, default=600)
    a("--batch", type=int, default=48)
    a("--pictures", type=int, default=4000, help="number of different images")
    a("--lr", type=float, help="learning rate")
    a(
        "--minutes",
        type=float,
        default=60.0,
        help="stop after this time; the learning rate is scheduled for it",
    )
    a("--threads", type=int, default=torch.get_num_threads())
    a("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = Options(args.what, args.out, args.steps, args.batch, args.pictures, args.minutes, args.lr)
    sd = minsd.load("shapes", "cpu")
    if options.what == "control":
        train_control(sd, options)
    else:
        train_style(sd, options)


if __name__ == "__main__":
    main()
