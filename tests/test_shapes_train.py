"""Training the embedded model: the loss on attention maps; a resumed run ends as an unbroken one."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minsd
from minsd.weights.shapes import train as training


class Maps:
    def __init__(self, cross):
        self.cross = cross


def test_attention_loss_is_least_at_the_calibrated_map():
    torch.manual_seed(0)
    masks = (torch.rand(2, 3, 16, 16) < 0.1).float()
    # (B, subjects, colour and shape word)
    places = torch.tensor([[[2, 3], [6, 7], [-1, -1]], [[-1, 2], [-1, 5], [-1, 8]]])
    best = torch.zeros(2, 16, 16, 77)
    for b in range(2):
        for k in range(3):
            for kind, level in enumerate((0.10, 0.20)):
                if places[b, k, kind] >= 0:
                    best[b, :, :, places[b, k, kind]] = level * masks[b, k]
    assert training.attention_loss(Maps(best), masks, places) == 0
    worse = best.clone()
    worse[0, :, :, 3] = best[0, :, :, 7]  # one shape's map on the other's object
    assert training.attention_loss(Maps(worse), masks, places) > 0.1
    elsewhere = best.clone()
    elsewhere[..., 20] = 0.9  # tokens that name no object do not count
    assert training.attention_loss(Maps(elsewhere), masks, places) == 0


def run(folder, minutes=None):
    """Trains a few steps without a break, or stopped after every step and resumed until the model is
    written -> (its folder, the number of calls)."""
    options = training.Options(folder / "run", folder / "model", samples=24, vae_samples=12, minutes=minutes)
    options.run.mkdir(parents=True)
    calls = 0
    while not (options.out / "model_index.json").exists():
        training.work(0, 1, "cpu", options)
        calls += 1
        assert calls < 12
    return options.out, calls


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "PICTURES", 64)
    monkeypatch.setattr(training, "VAE_BATCH", 4)
    monkeypatch.setattr(training, "UNET_BATCH", 8)


def test_interrupted_training_ends_with_the_same_weights(tmp_path, small):
    threads = torch.get_num_threads()
    try:
        unbroken, once = run(tmp_path / "a")
        resumed, calls = run(tmp_path / "b", minutes=1e-9)
    finally:
        torch.set_num_threads(threads)
    assert once == 1 and calls >= 6  # 3 steps of the VAE, 3 of the UNet
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        a, b = load_file(unbroken / f"{name}.safetensors"), load_file(resumed / f"{name}.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    sd = minsd.load(str(unbroken), device="cpu")  # training writes a whole model
    config = json.loads((unbroken / "vae/config.json").read_text())
    assert sd.config.vae.scaling_factor == config["scaling_factor"]
    assert sd("a red circle", steps=2)[0].size == (128, 128)
