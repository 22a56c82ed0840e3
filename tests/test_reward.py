"""Rewards of the drawn image: gradients against finite differences, memory against the largest
segment, the optimised image against the image drawn from the saved noise, ReNO's formula by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import Live
from PIL import Image

import minsd
from minsd import judges
from minsd.generate import main
from minsd.judges import soft_shapes
from minsd.noise import look, steer
from minsd.noise.initial import noise
from minsd.noise.look import Course, Lift
from minsd.noise.objectives import reward
from minsd.weights.shapes import data

PROMPT = "a red circle and a blue square"
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def turbo():
    return minsd.load("shapes-turbo", device="cpu")


def lifted(sd, objective, course, seeds=(0, 1), prompt=PROMPT):
    asks = look.ask(sd, [prompt] * len(seeds), seeds)
    made = objective(sd, asks) if isinstance(objective, type) else objective
    return Lift(sd, asks, made, course=course)


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


# --- gradients and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("course", [Course(2, "euler_a", guidance_scale=1.0), Course(2, "dpmpp_2m")])
def test_gradients_equal_finite_differences(turbo, course):
    """In float64 through sampler, network, guidance, decoder and reward. Fresh noise of the sampler is
    the same at every evaluation."""
    sd = copy.copy(turbo)
    sd.unet, sd.vae = copy.deepcopy(turbo.unet).double(), copy.deepcopy(turbo.vae).double()
    lift = lifted(sd, reward.of("soft-shapes"), course, [0])
    x, rows = noise([0], SHAPE).double(), torch.arange(1)
    _, gradient = lift.slope(x, rows, 999)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down = (lift.score(x + h * way, rows, 999)["loss"] for h in (1e-6, -1e-6))
    claimed = (gradient * way).flatten(1).sum(dim=1)
    assert claimed.abs().min() > 1e-3
    assert (claimed - (up - down) / 2e-6).abs().max() < 1e-5 * claimed.abs().max()
    assert all(p.grad is None for p in [*sd.unet.parameters(), *sd.vae.parameters()])


def peak(step):
    with Live() as live:
        step()
    return live.peak


def test_peak_memory_is_that_of_the_largest_segment(turbo, monkeypatch):
    def alone(segment, x):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(segment(leaf).sum(), leaf)

    def slope(steps):
        lift = lifted(turbo, reward.of("soft-shapes"), Course(steps, "euler", guidance_scale=1.0), [0])
        return lambda: lift.slope(x, torch.zeros(1, dtype=torch.long), 999)

    x = noise([0], SHAPE)
    context = turbo.encode_prompt([PROMPT])
    segments = [
        peak(lambda: alone(lambda y: turbo.unet(y, 999, context), x)),
        peak(lambda: alone(turbo.vae.decode, x)),
        peak(lambda: alone(lambda y: soft_shapes.reward(y, [PROMPT]), torch.rand(1, 3, 128, 128))),
    ]
    assert peak(slope(1)) < 1.1 * max(segments)
    assert peak(slope(4)) < 1.1 * max(segments)
    monkeypatch.setattr(look, "recomputed", lambda function, x, *more: function(x, *more))
    assert peak(slope(4)) > sum(segments)  # the measure sees activations that are kept


# --- the image that is judged is the image that is drawn ------------------------------------------


def test_the_optimised_image_is_drawn_from_the_saved_noise(tmp_path, capsys):
    words = ["--model", "shapes-turbo", "--steps", "2", "--seed", "3", "--quiet"]
    by_reward = ["--objective", "reward:soft-shapes", "--optimize-steps", "3", "--save-noise"]
    assert main([PROMPT, *words, *by_reward, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.png")
    record = json.loads((tmp_path / "runs.jsonl").read_text())["objective"]
    assert record["after"]["soft-shapes"] > record["before"]["soft-shapes"]
    assert set(record["regularizers"]) == {"norm", "kl", "white"}
    assert record["rows"] == {"full": 2, "gradient": 3 * 2 * 2}  # every step is computed twice
    [saved] = (path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".npy", ".safetensors"))
    assert main([PROMPT, *words, "--noise", str(saved), "--out", str(tmp_path / "again")]) == 0
    [again] = (tmp_path / "again").glob("*.png")
    first, second = (Image.open(one).convert("RGB") for one in (path, again))
    assert np.array_equal(first, second)
    value = soft_shapes.reward(pixels([first]), [PROMPT]).item()
    assert value == pytest.approx(record["after"]["soft-shapes"], abs=0.02)  # 8 bits


def test_a_selection_by_reward_judges_each_candidates_own_image(turbo):
    """Under a sampler that draws noise from the candidate's seed."""
    run = {"steps": 2, "sampler": "euler_a"}
    chosen = steer.Run(
        turbo,
        steer.choose("reward:soft-shapes", driver="select"),
        look.ask(turbo, [PROMPT], [5]),
        2,
        "euler_a",
    ).select([[5, 6, 7]], SHAPE, lambda message: None)[0]
    images = turbo(PROMPT, seeds=[5, 6, 7], **run)
    expected = soft_shapes.reward(pixels(images), [PROMPT] * 3)
    assert list(chosen.scores.values()) == pytest.approx((-expected).tolist(), abs=0.02)
    assert chosen.seed == 5 + int(expected.argmax())


# --- rewards --------------------------------------------------------------------------------------


def test_soft_shapes_tells_right_captions_from_wrong_ones():
    """On images of the training set's own generator, with one colour or one shape of the caption
    exchanged for another."""
    right = total = 0
    for index in range(60):
        example = data.example(7, index)
        colours, shapes = data.COLOURS, data.SHAPES
        if any(k is None or c is None for c, _, k in example.named):
            continue
        image = torch.from_numpy(example.render()[0]).permute(2, 0, 1)[None] / 255
        c, s, _ = example.named[0]
        for place, names in ((c, list(colours)), (s, list(shapes))):
            words = list(example.words)
            unused = [name for name in names if name not in words]
            words[place] = unused[index % len(unused)]
            wrong = " ".join(words).replace(" ,", ",")
            if soft_shapes.read_caption(wrong) is None:  # "a orange", left as it is
                continue
            a, b = soft_shapes.reward(image.repeat(2, 1, 1, 1), [example.caption, wrong])
            assert a <= 0.02
            right, total = right + int(a > b), total + 1
    assert total > 40 and right >= 0.97 * total


def test_renos_sum_is_its_formula(turbo, monkeypatch):
    """Eyring et al.: 5 (1 - HPSv2.1 cosine) + (2 - ImageReward) + 0.01 (100 - CLIP logit)
    + 0.05 (30 - PickScore logit), up to a constant; steps of 49, lr 5, momentum 0.9."""

    class Judge:
        def __init__(self, name):
            self.identity = {"judge": name}
            self.place = {"hpsv2.1": 0, "imagereward": 1, "clip-h14": 2, "pickscore": 3}[name]

        def score(self, x, prompts):
            value = x.mean((1, 2, 3)) * (self.place + 1) + self.place
            return 100 * value if self.place in (0, 3) else value

    reward._judge.cache_clear()
    monkeypatch.setattr(judges, "load", lambda name, *more, **how: Judge(name))
    lift = lifted(turbo, reward.of("reno"), Course(1, "euler", guidance_scale=1.0))
    told = lift.score(noise([0, 1], SHAPE), torch.arange(2), 999)
    reward._judge.cache_clear()
    hps, image_reward, cosine, pick = (told[n] for n in ("hpsv2.1", "imagereward", "clip-h14", "pickscore"))
    formula = 5 * (1 - hps / 100) + (2 - image_reward) + 0.01 * (100 - 100 * cosine) + 0.05 * (30 - pick)
    assert torch.allclose((told["loss"] - formula).diff(), torch.zeros(1), atol=1e-5)
    how = lift.objective.how
    assert (how.steps, how.lr, how.momentum, how.nesterov, how.regularizer) == (49, 5, 0.9, True, "norm")
    assert how.clip == pytest.approx(0.1 / 4)  # 1,024 numbers in place of 16,384
    assert lift.objective.identity["pickscore"] == {"judge": "pickscore"}


def test_any_function_is_a_reward(turbo):
    def dark(image, prompts):
        assert image.shape == (len(prompts), 3, 128, 128)
        return 1 - image.mean((1, 2, 3))

    run = {"seeds": [4], "steps": 1}
    [plain] = turbo(PROMPT, **run)
    [found] = turbo(PROMPT, **run, objective=reward.of(dark), settings={"steps": 2, "lr": 40})
    assert np.mean(found) < np.mean(plain) - 0.5


def drawn(seen):
    return seen.drawn.mean((1, 2, 3))


def test_wrong_rewards_are_one_line(turbo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judges, "_fetched", lambda *args: None)  # as offline
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"prompt": PROMPT, "regions": [{"prompt": PROMPT, "box": [0, 0, 1, 1]}]}))
    for words, message in (
        (["--objective", "reward:shapes"], "there is no reward 'shapes': choose from soft-shapes, clip"),
        (["--objective", "reward:clip"], "--objective-set weights=clip-b16=FOLDER"),
        (["--objective", "reward:soft-shapes", "--layout", str(layout)], "leave out --layout"),
        (["a cat and a dog", "--objective", "reward:soft-shapes"], "needs a prompt such as 'a red circle'"),
    ):
        prompt = [PROMPT] if words[0] == "--objective" and "--layout" not in words else []
        assert main([*prompt, *words, "--model", "shapes-turbo", "--out", str(tmp_path), "--quiet"]) == 2
        out = capsys.readouterr().err.splitlines()
        assert len(out) == 1 and message in out[0], out
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="does not exist within a run: use --init-noise"):
        turbo(PROMPT, seeds=[0], steps=1, objective=drawn, driver="refine")
