"""Trains two small additions to the embedded model, with the library's own parts, and writes them as files like any others.

    python -m minsd.weights.shapes.extras control     # a ControlNet: outlines say where shapes go -> extras/outlines/
    python -m minsd.weights.shapes.extras style       # a LoRA: every shape gets a hole in its middle -> extras/pierced.safetensors

The ControlNet (Zhang et al. 2023) begins as a copy of the UNet's way down, joined on by convolutions of zero. It sees white
outlines of the objects on black, with the captions that the model itself was trained on: colours stay the caption's affair.
The LoRA (Hu et al. 2021) of rank 8 is on attention and convolutions of the UNet; its lower halves are random, its upper ones
begin at zero. It needs no word of its own: it acts where it is given. The model itself stays frozen.
Minutes on a CPU; bench/control.py counts what they do.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

import minsd
from minsd.attention import Attention
from minsd.controlnet import ControlNet
from minsd.weights import lora
from minsd.weights.shapes import data
from minsd.weights.shapes.train import attention_in_full

HERE = Path(__file__).parent / "extras"
SEED = 31  # of pictures the model has not seen
HIDDEN = (16, 16, 32, 64)  # channels inside the embedding of control images
RANK, LAYERS = (
    8,
    ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2", "conv_shortcut"),
)
EXAMPLE = (
    data.Object("red", "circle", 40, 46, 22, 0.0),
    data.Object("blue", "square", 88, 82, 24, 0.1),
)  # to try the ControlNet on
HOLE = 0.42  # radius of the hole, of the object's


def outlines(objects: tuple[data.Object, ...], width: float = 2.0) -> Image.Image:
    """White outlines, `width` pixels wide, on black: a control image."""
    k = 4  # supersampling
    canvas = Image.new("L", (data.SIZE * k, data.SIZE * k))
    for o in objects:
        points = [tuple(p) for p in (data.outline(o.shape, o.turn) * o.radius + (o.x, o.y)) * k]
        ImageDraw.Draw(canvas).line([*points, *points[:2]], fill=255, width=round(width * k), joint="curve")
    return canvas.reduce(k).convert("RGB")


def pierced(example: data.Example) -> np.ndarray:
    """The picture (SIZE,SIZE,3) uint8 of an example with a round hole in each object's middle, through to the ground."""
    picture = example.render()[0].astype(np.float32)
    y, x = np.mgrid[: data.SIZE, : data.SIZE]
    for o in example.objects:
        hole = np.clip(HOLE * o.radius - np.hypot(x - o.x, y - o.y) + 0.5, 0, 1)[
            ..., None
        ]  # coverage, anti-aliased
        picture += hole * (np.array(example.ground, np.float32) - picture)
    return picture.round().astype(np.uint8)


@torch.no_grad()
def examples(sd, count: int, draw) -> tuple[torch.Tensor, torch.Tensor, list[data.Example]]:
    """`count` pictures and captions, coded: latents (n,4,16,16), text states (n,77,D)."""
    made = [data.example(SEED, i) for i in range(count)]
    latents = torch.cat(
        [sd.encode([Image.fromarray(draw(e)) for e in made[i : i + 32]]) for i in range(0, count, 32)]
    )
    texts = torch.cat([sd.encode_prompt([e.caption for e in made[i : i + 32]]) for i in range(0, count, 32)])
    return latents, texts, made


def train(sd, parameters: list[torch.Tensor], predict, latents, args, lr: float) -> None:
    """Least squares of the noise, weighted as the model's own training weights it (train.py). `predict(x, t, pick)` -> eps.
    Every 50 steps it writes down where it is, for the same command to go on from."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    steps, batch, minutes, state = args.steps, args.batch, args.minutes, args.out / f"{args.what}.state"
    start, shown, first = time.time(), None, 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        optimizer.load_state_dict(kept["optimizer"])
        for p, value in zip(parameters, kept["parameters"], strict=True):
            p.data.copy_(value)
        first, shown, start = kept["step"], kept["shown"], start - kept["seconds"]
    for step in range(first, steps):
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        if progress >= 1:
            break
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[pick].shape, generator=generator)
        x = sd.schedule.add_noise(latents[pick], noise, t)
        with torch.autocast(sd.device.type, dtype=torch.bfloat16):
            eps = predict(x, t, pick).float()
        error = (eps - noise).square().mean(dim=(1, 2, 3))  # (B,)
        loss = (error * sd.schedule.alphas_cumprod[t].rsqrt()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = loss.item() if shown is None else 0.97 * shown + 0.03 * loss.item()
        if (step + 1) % 25 == 0:
            print(f"{step + 1}/{steps} weighted {shown:.4f}, {time.time() - start:.0f} s", flush=True)
        if (step + 1) % 50 == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            kept = {
                "step": step + 1,
                "shown": shown,
                "seconds": time.time() - start,
                "optimizer": optimizer.state_dict(),
            }
            torch.save(kept | {"parameters": [p.data for p in parameters]}, state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)
    state.unlink(missing_ok=True)


def drop(texts: torch.Tensor, pick: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Text states of a batch, every tenth the empty prompt's, for guidance."""
    keep = torch.arange(len(pick)) % 10 > 0
    return torch.where(keep[:, None, None], texts[pick], empty)


def train_control(sd, args) -> None:
    torch.manual_seed(SEED)
    net = ControlNet(sd.config.unet, HIDDEN)
    theirs = sd.unet.state_dict()
    net.load_state_dict({name: theirs.get(name, p) for name, p in net.state_dict().items()})
    # The embedding's last layer begins at zero too in the paper. There need be no second lock on the door: nothing comes out
    # at first either way, and with one the first hundreds of steps teach next to nothing.
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    whole_attention(net)
    latents, texts, made = examples(sd, args.pictures, lambda e: e.render()[0])
    images = torch.from_numpy(
        np.stack([np.asarray(outlines(e.objects).convert("L")) for e in made])
    )  # (n, 128, 128)
    empty = sd.encode_prompt("")

    def predict(x, t, pick):
        context, pictures = drop(texts, pick, empty), images[pick, None].expand(-1, 3, -1, -1) / 255
        return sd.unet(x, t, context, control=net(x, t, context, net.embed(pictures)))

    train(sd, list(net.parameters()), predict, latents, args, args.lr or 1e-3)
    c, folder = sd.config.unet, args.out / "outlines"
    config = {
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    outlines(EXAMPLE).save(folder / "example.png")
    write(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def train_style(sd, args) -> None:
    torch.manual_seed(SEED)
    fused = {
        layer: m for m in sd.unet.modules() if isinstance(m, Attention) for layer in (m.to_q, m.to_k, m.to_v)
    }
    parts = []
    for name, module in sd.unet.named_modules():
        if name.endswith(LAYERS):
            shape = module.weight.shape
            down = nn.Parameter(torch.randn(RANK, *shape[1:]) / math.sqrt(shape[1:].numel()))
            up = nn.Parameter(torch.zeros(shape[0], RANK, *[1] * (len(shape) - 2)))
            parts.append(lora.LowRank(name, module, fused.get(module), down, up, 1.0))
    whole_attention(sd.unet)
    latents, texts, _ = examples(sd, args.pictures, pierced)
    empty = sd.encode_prompt("")
    with lora.per_row([(lora.LoRA("pierced", tuple(parts)), [1.0])]):
        parameters = [p for part in parts for p in (part.down, part.up)]
        train(
            sd,
            parameters,
            lambda x, t, pick: sd.unet(x, t, drop(texts, pick, empty)),
            latents,
            args,
            args.lr or 2e-3,
        )
    tensors = {}  # as kohya names them
    for part in parts:
        key = "lora_unet_" + part.name.replace(".", "_")
        tensors |= {
            f"{key}.lora_down.weight": part.down,
            f"{key}.lora_up.weight": part.up,
            f"{key}.alpha": torch.tensor(float(RANK)),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    write(tensors, args.out / "pierced.safetensors")


def whole_attention(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, Attention):
            m.attend = attention_in_full


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(
        {name: p.detach().half().contiguous() for name, p in tensors.items()}, temporary, {"format": "pt"}
    )
    temporary.chmod(0o644)  # save_file makes them their owner's alone
    os.replace(temporary, path)
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("control", "style"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pictures", type=int, default=4000, help="different ones")
    parser.add_argument("--lr", type=float)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="end by then, the learning rate falling in time"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = minsd.load("shapes", "cpu")
    {"control": train_control, "style": train_style}[args.what](sd, args)


if __name__ == "__main__":
    main()
