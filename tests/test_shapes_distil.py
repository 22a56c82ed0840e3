"""The distillation of the embedded model, and shapes-turbo, the model that it made."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minsd
from minsd.generate import main
from minsd.samplers import euler
from minsd.weights import load, lora
from minsd.weights.shapes import data, detector, distil
from minsd.weights.shapes import train as training

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
from bench.shapes import cases, sentence  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`


@pytest.fixture(scope="module")
def distillation():
    return distil.Distillation(training.Workers(0, 1, "cpu"))


@pytest.fixture(scope="module")
def turbo():
    return minsd.load("shapes-turbo", device="cpu")


# -- training


def test_no_prompt_of_the_bench_is_trained_on():
    without = distil.benched()
    asked = [sentence(subjects) for group in ("two", "three") for subjects in cases(group, 200)]
    assert {tuple(text.replace(",", " ,").split()) for text in asked} == without
    rng = np.random.default_rng(0)
    drawn = [tuple(distil.draw_prompt(rng, without)) for _ in range(1000)]
    assert not without & {*drawn} and len({*drawn}) > 400
    for words in drawn:
        training.token_ids(words)  # KeyError for a word without a token
        assert not any(f"{c} {s}" in " ".join(words) for c, s in data.HELD_OUT)


def test_the_student_draws_as_the_sampler_does(distillation):
    torch.manual_seed(0)
    noise = torch.randn(2, 4, 16, 16)
    context = distillation.encode([["a", "red", "star"], ["a", "heart"]])
    weights = distillation.adapter.weights(distillation.teacher)
    with torch.no_grad():
        ours = distillation.draw(weights, noise, context, 3, 2)

    def predict(x, t):
        return distillation.predict(distillation.teacher, x, torch.full((2,), t), context)

    with torch.no_grad():
        *_, (_, _, theirs) = euler.sample(predict, noise, distillation.schedule, 3)
    # The student's levels are float32, and networks in bfloat16 enlarge the difference.
    assert (ours - theirs).abs().mean() < 0.02 * theirs.abs().mean()


def test_gradient_vanishes_where_the_two_predictions_agree(distillation, monkeypatch):
    def losses():
        parts = distillation.losses(2, np.random.default_rng(0), torch.Generator().manual_seed(0))
        match, weight = parts["match"]
        (gradient,) = torch.autograd.grad(weight * match, distillation.adapter.up[0])
        return parts["gap"][0], gradient

    gap, gradient = losses()
    assert gap > 0 and gradient.abs().max() > 0
    # Before training the copy is the embedded model, and guidance 1 is no guidance.
    monkeypatch.setattr(distil, "GUIDANCE", 1.0)
    gap, gradient = losses()
    assert gap < 0.02 and gradient.abs().max() < 1e-3


def test_interrupted_distillation_ends_with_the_same_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "BATCH", 2)

    def run(name, minutes=None):
        out = tmp_path / name / "turbo.safetensors"
        options = training.Options(tmp_path / name, out, samples=4, minutes=minutes)
        options.run.mkdir()
        calls = 0
        while not out.exists():
            distil.work(0, 1, "cpu", options)
            calls += 1
            assert calls < 5
        return load_file(out), calls

    threads = torch.get_num_threads()
    try:
        unbroken, once = run("a")
        resumed, calls = run("b", minutes=1e-9)
    finally:
        torch.set_num_threads(threads)
    assert once == 1 and calls >= 2
    assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
    assert any(matrix.any() for name, matrix in unbroken.items() if "lora_B" in name)


# -- the model


def test_the_adapter_is_small_and_is_added_to_the_weights(turbo):
    assert load.TURBO_FILE.stat().st_size < 3e6
    adapter = load_file(load.TURBO_FILE)
    plain = minsd.load("shapes", device="cpu").unet.state_dict()
    for name in ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"):
        down, up = (adapter[f"unet.{name}.lora_{half}.weight"].float().flatten(1) for half in "AB")
        expected = plain[f"{name}.weight"] + (up @ down).view_as(plain[f"{name}.weight"])
        assert torch.allclose(turbo.unet.get_submodule(name).weight, expected, atol=1e-6)
    assert len(adapter) == 2 * sum(p.ndim > 1 for p in turbo.unet.parameters())
    assert turbo.config.schedule.timestep_spacing == "trailing" and turbo.schedule.timesteps(1) == [999]


def test_it_draws_what_is_asked_for_in_few_steps(turbo):
    subjects = [[data.COMBINATIONS[i]] for i in range(0, 40, 4)]
    prompts = [f"a {colour} {shape}" for ((colour, shape),) in subjects]
    for steps, least in ((1, 7), (4, 8)):
        images = turbo(prompts, seeds=range(10), steps=steps)
        right = sum(detector.judge(image, s).no_neglect for image, s in zip(images, subjects))
        assert right >= least


def test_an_adapter_of_the_users_can_be_added(tmp_path):
    sd = minsd.load("shapes-turbo", device="cpu", dtype=torch.float16)
    before = sd.unet.conv_in.weight.clone()
    parts = {"A": torch.ones(1, 4, 3, 3), "B": torch.ones(64, 1, 1, 1)}
    save_file({f"unet.conv_in.lora_{k}.weight": p for k, p in parts.items()}, tmp_path / "mine.safetensors")
    kept = lora.merge([(lora.read(tmp_path / "mine.safetensors", sd), 0.5)])
    assert torch.allclose(sd.unet.conv_in.weight, before + 0.5, atol=1e-3)
    lora.unmerge(kept)
    assert torch.equal(sd.unet.conv_in.weight, before)


def test_the_command_draws_in_few_steps_and_warns_of_guidance(tmp_path, capfd):
    command = ["a red circle", "--model", "shapes-turbo", "--seed", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "guidance" not in capfd.readouterr().err
    (row,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (row["model"], row["steps"], row["sampler"]) == ("shapes-turbo", 4, "euler")
    assert row["guidance_scale"] == 1 and row["unet_rows"] == 4
    assert main([*command, "--guidance-scale", "3", "--steps", "1"]) == 0
    assert "distilled to draw without guidance: --guidance-scale 3" in capfd.readouterr().err
