"""Fixtures shared by the tests, and the check of skipped tests.

The fixtures: a small random Stable Diffusion saved by diffusers itself, for loading and for parity of
the whole pipeline; the embedded model; a measure of memory. With MINSD_CI=1, a skip whose reason is not
in EXPLAINED fails the run.
"""

import copy
import os
import shutil
import weakref

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in minsd/generate.py, before torch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minsd
from minsd.config import UNetConfig
from minsd.unet import UNet

# Skips accepted under MINSD_CI=1 (.ci/run): the beginning of the reason -> why it is accepted.
# Whatever PyPI or Debian can provide is installed there instead.
EXPLAINED = {
    "needs a GPU": "the machine has none",
    "needs a CUDA device": "the machine has none",
    "needs two GPUs": "the machine has fewer",
    "has CUDA": "tests the error on a machine without a GPU",
    "needs Ray": "70 MB and daemons for one test: CONTRIBUTING says how to run it by hand",
    "needs Chromium": "not every machine can install a browser; .ci/run installs it where it can",
    "needs no kernel": "repeated in Triton's interpreter, and has nothing to interpret",
}
unexplained: list[str] = []


def note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Keep a skip whose reason is not in EXPLAINED."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    where = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = where.removeprefix("Skipped: ")
    if not reason.startswith(tuple(EXPLAINED)):
        unexplained.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexplained and os.environ.get("MINSD_CI") == "1":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unexplained and os.environ.get("MINSD_CI") == "1":
        terminalreporter.section("skips that tests/conftest.py does not explain")
        terminalreporter.write("".join(f"{line}\n" for line in unexplained))


@pytest.fixture(scope="session")
def shapes_folder():
    from minsd.weights.load import SHAPES_FOLDER

    return SHAPES_FOLDER


def small_pipeline(tokenizer_folder, prediction_type="epsilon", sd2=False):
    """diffusers' StableDiffusionPipeline with small random networks, initialised by diffusers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    if sd2:
        tokenizer.pad_token = "!"  # id 0
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4, 4) if sd2 else 4,
        use_linear_projection=sd2,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu" if sd2 else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def sdxl_text_encoders(vocab_size):
    """The two text encoders of `sdxl_pipeline`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "projection_dim": 128,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in SDXL's files; to transformers the greatest id, which is the end token's
    }
    first = CLIPTextConfig(**sizes, hidden_size=64, num_attention_heads=1)
    second = CLIPTextConfig(
        **sizes, hidden_size=128, num_attention_heads=2, hidden_act="gelu", pad_token_id=1
    )
    texts = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    for p in (
        p for text in texts for p in text.parameters()
    ):  # CLIP starts with small weights and zero biases
        p.data += 0.1 * torch.randn_like(p)
    return texts


def sdxl_pipeline(tokenizer_folder, turbo=False):
    """diffusers' StableDiffusionXLPipeline with tiny random networks, initialised by diffusers.

    As in SDXL, heads are 64 channels wide, the finest level has no attention, and the depths differ.
    """
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizers = [CLIPTokenizer.from_pretrained(tokenizer_folder) for _ in range(2)]
    tokenizers[1].pad_token = "!"  # id 0
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=192,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 6 * 256,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
    )
    kind = EulerAncestralDiscreteScheduler if turbo else EulerDiscreteScheduler
    scheduler = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing" if turbo else "leading",
        steps_offset=1,
    )
    texts = sdxl_text_encoders(len(tokenizers[0]))
    return StableDiffusionXLPipeline(vae, *texts, *tokenizers, unet, scheduler)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory, shapes_folder):
    """A folder of `sdxl_pipeline`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    sdxl_pipeline(shapes_folder / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl(sdxl_folder):
    return minsd.load(str(sdxl_folder), "cpu")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, shapes_folder):
    folder = tmp_path_factory.mktemp("models") / "small"
    small_pipeline(shapes_folder / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def broken_folder(small_folder, tmp_path):
    """A copy of `small_folder` that a test may damage."""
    return shutil.copytree(small_folder, tmp_path / "broken")


@pytest.fixture(scope="session")
def small(small_folder):
    return minsd.load(str(small_folder), "cpu")


@pytest.fixture(scope="session")
def shapes():
    """The embedded model."""
    return minsd.load("shapes", device="cpu")


class Live(TorchDispatchMode):
    """Bytes of live tensors created within the block, backward passes included: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def tiny(small):
    """A random float64 UNet with four levels, as in Stable Diffusion.

    Its attention is sharpened, so that the text matters.
    """
    torch.manual_seed(1)
    sd = copy.copy(small)
    sd.unet = UNet(
        UNetConfig(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            num_heads=(2,) * 4,
            context_dim=32,
            norm_groups=4,
        )
    )
    sd.unet.requires_grad_(False).double()
    for name, weight in sd.unet.named_parameters():
        if "attn2.to" in name and weight.ndim == 2:
            weight.mul_(4)
    return sd
