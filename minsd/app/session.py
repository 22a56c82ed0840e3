"""Loads what a run needs: the model, its ControlNet, and the LoRAs of layouts' regions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from minsd.adapters import split_name, split_scale
from minsd.app.ranks import local_rank
from minsd.app.requests import Command, Request
from minsd.controlnet import ControlNet
from minsd.pipeline import StableDiffusion, load
from minsd.weights import embedding, lora
from minsd.weights.controlnet import load_controlnet


@dataclass
class Session:
    """The loaded model of a run, with the run's settings, the ControlNet, and the LoRAs of layouts'
    regions."""

    sd: StableDiffusion
    command: Command
    quiet: bool  # --quiet, or not the first of several processes
    controlnet: ControlNet | None = None
    adapters: dict[Path, lora.LoRA] = field(default_factory=dict)  # those of layouts' regions, by path


def open_session(command: Command, requests: Sequence[Request], quiet: bool) -> Session:
    """Loads the model with the VAE, tokenizer, LoRAs, embeddings and ControlNet that the command
    names, and the LoRAs for regions in the layouts of the requests (the settings of each prompt).
    `quiet` turns progress bars and messages off in the run. Raises FileNotFoundError for a missing
    file, and ValueError for one that cannot be loaded or for options that do not suit the device.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = command.device or ("cuda" if torch.cuda.is_available() else "cpu")
    number = local_rank()
    if device == "cuda" and number is not None:  # torchrun: one GPU per process
        device = f"cuda:{number}"
    if command.attention == "triton" and device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("--attention triton is for a GPU: leave it out")
    sd = load(
        command.model,
        device,
        getattr(torch, command.dtype) if command.dtype else None,
        vae=command.vae,
        tokenizer=command.tokenizer,
        prediction_type=command.prediction_type,
    )
    if sd.device.type == "cuda":
        torch.cuda.set_device(sd.device)  # otherwise every process would also create a CUDA context on GPU 0
    sd.text.prompt_weights = command.prompt_weights
    if command.clip_skip is not None:
        sd.text.skip(command.clip_skip)
    session = Session(sd, command, quiet)
    layouts = [request.layout for request in requests if request.layout is not None]
    paths = {path for layout in layouts for region in layout.regions for path, _ in region.lora}
    session.adapters = {path: lora.read(path, sd) for path in paths}
    named = [split_scale(text) for text in command.lora]
    if named:
        lora.merge([(lora.read(path, sd), scale) for path, scale in named])
    words = [embedding.read(*split_name(text), sd) for text in command.embedding]
    for path in sorted({*paths, *(path for path, _ in named)}):
        words += embedding.bundled(path, sd)
    sd.notes += [embedding.add(word, sd) for word in words]
    if command.controlnet is not None:
        session.controlnet = load_controlnet(
            command.controlnet, device=sd.device, dtype=sd.dtype, unet=sd.unet
        )
    sd.set_attention(command.attention, *([] if session.controlnet is None else [session.controlnet]))
    if command.compile:
        sd.compile()
    return session
