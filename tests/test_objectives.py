"""Objectives against numbers computed by hand, finite differences and other libraries' divergences;
drivers against plain sampling; a user's own function, and every way to name one wrongly."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minsd.app import options, requests
from minsd.app.jobs import identity, plan
from minsd.config import MODELS
from minsd.generate import main
from minsd.guidance import counted
from minsd.noise import best, drivers, layout, look, losses, pairs, regularizers, steer
from minsd.noise.initial import noise, read_noise
from minsd.noise.look import Ask, Lift, Look
from minsd.noise.objectives import NAMES, boxes, contrast, divide, find, nlg, overlap, saga, syngen
from minsd.noise.pairs import Group
from minsd.samplers import ddim

PROMPT = "a red circle and a blue square"
NEAR = {"abs": 1e-6}


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- the equations -------------------------------------------------------------------------------

TOKENS = double(
    [[[0, 0], [0, 0]], [[0.4, 0.1], [0.1, 0.4]], [[0.3, 0.2], [0.2, 0.3]], [[0.1, 0.4], [0.4, 0.1]]]
    + [[[0.25, 0.25], [0.25, 0.25]]]
)


def test_syngen_numbers():
    dist = syngen.distances(TOKENS[1:], range(4))
    assert [dist[0, k].item() for k in (1, 2, 3)] == pytest.approx([0.098083, 0.831777, 0.207944], **NEAR)
    assert [dist[1, k].item() for k in (2, 3)] == pytest.approx([0.358352, 0.020273], **NEAR)
    for group, outside, expected in (
        (Group([[1]], [2]), [3, 4], -0.256504),
        (Group([[1]], [2, 3]), [4], 0.623832),
        (Group([], [2]), [1, 3, 4], -0.158903),
        (Group([[1]], [2]), [], 0.098083),
    ):
        assert syngen.binding(TOKENS, group, outside).item() == pytest.approx(expected, **NEAR)
    zero = torch.nn.functional.one_hot(torch.tensor([0, 3]), 4).double().view(2, 2, 2)
    assert syngen.distances(zero, [0]).isfinite().all()  # a KL of infinity, cut off


def test_syngens_distance_is_the_divergence_of_torch():
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    each = [torch.distributions.Categorical(probs=m.flatten()) for m in maps]
    kl = torch.distributions.kl_divergence
    expected = torch.stack([torch.stack([(kl(a, b) + kl(b, a)) / 2 for b in each]) for a in each])
    assert (syngen.distances(maps, range(5)) - expected).abs().max() < 1e-12


def test_boxdiff_numbers():
    rows = [[0, 0.1, 0.2, 0], [0.1, 0.6, 0.4, 0.1], [0, 0.8, 0.5, 0.2], [0.3, 0, 0.1, 0]]
    for box, p, reach, expected in (
        ((1, 1, 3, 3), 0.5, 1, (0.3, 0.166667, 0.575, 1.041667)),
        ((0, 0, 2, 4), 0.3, 1, (0.3, 0.45, 0.875, 1.625)),
        ((0, 0, 2, 2), 0.5, 0, (0.65, 0.4, 0.7, 1.75)),
    ):
        mask = torch.zeros(4, 4, dtype=torch.float64)
        mask[box[1] : box[3], box[0] : box[2]] = 1
        found = [value.item() for value in boxes.terms(double(rows), mask, p, reach)]
        assert [*found, sum(found)] == pytest.approx(expected, **NEAR)
    assert boxes.terms(double(rows), torch.ones(4, 4).double(), 0.01)[0] == 1 - 0.8  # k is at least 1


def test_divide_and_bind_numbers():
    f = double([[0, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 0]])
    g = double([[0.2, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.2]])
    assert divide.variation(torch.stack([f, g])).tolist() == pytest.approx([6.0, 1.6], **NEAR)
    assert divide.divergence(f, g).item() == pytest.approx(0.150159, **NEAR)
    assert divide.divergence(f, g, softmax=True).item() == pytest.approx(0.008117, **NEAR)


def test_conform_numbers():
    vectors = double([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1, 0], [0, 0.6, 0.8, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    for t, expected in ((0.5, 0.409776), (0.07, 0.000947)):
        assert contrast.contrastive(vectors, labels, t).item() == pytest.approx(expected, **NEAR)
    assert contrast.contrastive(vectors[[0, 2]], labels[[0, 2]]).item() == 0
    g = torch.Generator().manual_seed(0)
    mixed = torch.rand(6, 9, generator=g, dtype=torch.float64)
    of = torch.tensor([0, 0, 1, 1, 2, 2])
    s = torch.nn.functional.normalize(mixed).mm(torch.nn.functional.normalize(mixed).T).tolist()
    pairs_of = [(a, p) for a in range(6) for p in range(6) if a != p and of[a] == of[p]]
    for t in (0.05, 0.5, 2.0):  # as the formula is written

        def part(a, p, t=t):
            e = math.exp(s[a][p] / t)
            return -math.log(e / (e + sum(math.exp(s[a][n] / t) for n in range(6) if of[n] != of[a])))

        mean = sum(part(*pair) for pair in pairs_of) / len(pairs_of)
        assert contrast.contrastive(mixed, of, t).item() == pytest.approx(mean, rel=1e-12)
    for t in (1e-3, 1e-6):  # e^{1/T} is beyond any dtype; in the limit the largest gap decides
        small = mixed.float().requires_grad_()
        loss = contrast.contrastive(small, of, t)
        gaps = [max(0, max(s[a][n] - s[a][p] for n in range(6) if of[n] != of[a])) for a, p in pairs_of]
        assert t * loss.item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-2)
        assert torch.autograd.grad(loss, small)[0].isfinite().all()
    with pytest.raises(ValueError, match="t must be 1e-06 or more"):
        contrast.Contrast(None, asked(), t=0.0)
    # The pair form, by hand: 1 - 0.8 twice, and the one positive cosine of two groups, 0.36.
    assert contrast.contrastive(vectors, labels, form="pairs").item() == pytest.approx(0.2 + 0.36, **NEAR)


def test_overlap_numbers():
    a, b = double([[0.6, 0.2], [0.2, 0]]), double([[0.1, 0.2], [0.3, 0.4]])
    both = torch.stack([a, b])[None]
    assert overlap.overlap(both, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(0.25, **NEAR)
    assert losses.cross_response(both).item() == pytest.approx(0.6, **NEAR)
    mask = double([[1, 1], [0, 0]])
    assert overlap.retention(a[None], mask[None]).item() == pytest.approx(0.733333, **NEAR)
    assert overlap.retention(mask[None], mask[None]).item() == 0.5
    x0, mu = double([1, -1, 2, -2]), double([3, -3, 5, -5])
    expected = [1.150447, -1.150447, 1.917412, -1.917412]
    assert saga.bounded(mu, x0.std()).tolist() == pytest.approx(expected, **NEAR)
    assert torch.equal(saga.bounded(x0, mu.std()), x0)  # never up


def test_noise_level_guidance_and_neighbours_by_hand():
    x, c, u = (
        double(row).view(1, 4, 1, 1) for row in ([1, -1, 0.5, 1.5], [0.9, -0.8, 0.5, 1], [0.5, -0.8, 0.8, 1])
    )
    lift = SimpleNamespace(asked=set())
    for clip, expected in (
        (0.5, [0.582086, -0.970143, 0.776114, 1.455214]),
        (0.25, [0.770470, -0.963087, 0.626006, 1.444630]),
    ):
        how = drivers.Optimizing(steps=1, lr=1.0, clip=clip, norm="unit", keep="last")

        def slope(x, rows):
            seen = Look(lift, x.requires_grad_(), rows, 999)
            seen._held = {"eps": c, "uncond": u}
            loss, _ = nlg.NoiseLevelGuidance(None, [])(seen)
            return {"loss": loss.detach()}, torch.autograd.grad(loss.sum(), x)[0]

        [result] = drivers.optimize(
            slope,
            lambda x, rows: {"loss": x.sum((1, 2, 3))},
            x.clone(),
            torch.arange(1),
            how,
            device=torch.device("cpu"),
            dtype=torch.float64,
        )
        assert result.noise.flatten().tolist() == pytest.approx(expected, **NEAR)
    found = drivers.beside(double([3, 0, 4]), double([1, 1, 0]), 0.95)
    assert found.tolist() == pytest.approx([3.630, 1.219, 3.215], abs=1e-3)
    one = noise([3], (4, 8, 8)).double()
    around = drivers.neighbours(one, 5, 0.9, torch.Generator().manual_seed(0))
    norms = around.flatten(1).norm(dim=1) / one.norm()
    cosines = (around.flatten(1) @ one.flatten()) / one.norm() ** 2
    assert (norms - 1).abs().max() < 1e-12 and (cosines - 0.9).abs().max() < 1e-12


def test_regularizers_numbers_and_gradients():
    x = double([3, 0, 4, 0]).view(1, 4).requires_grad_()
    value = regularizers.norm(x, x)
    assert value.item() == pytest.approx(7.671686, **NEAR)
    assert torch.autograd.grad(value, x)[0].flatten().tolist() == pytest.approx([2.64, 0, 3.52, 0], **NEAR)
    assert regularizers.white(torch.ones(1, 64).double(), x, 0).item() == pytest.approx(10, **NEAR)
    assert regularizers.white(2 * torch.eye(4).double().view(1, 16), x, 0).item() == pytest.approx(
        2 * math.log(2), **NEAR
    )
    # The specification's table: a shift of 0.05 and a scale of 1.05, of 16384 numbers.
    z = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z *= 1.0083 * 128 / z.norm()
    for moved, norm, kl in ((z + 0.05, 1.2, 0.00125), (1.05 * z, 55.6, 0.00127), (z, 1.2, 0)):
        found = {name: value.item() for name, value in regularizers.measures(moved, z).items()}
        assert found["norm"] == pytest.approx(norm, rel=0.2) and found["kl"] == pytest.approx(kl, rel=0.01)
        assert found["white"] == pytest.approx(regularizers.white(moved, z).item())
    spread = {name: value.item() for name, value in regularizers.moments(double([[1, 1, 1, 5]])).items()}
    assert spread == pytest.approx({"norm": 7**0.5, "mean": 2, "std": 2})
    far = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.7
    for pull, _ in regularizers.REGULARIZERS.values():
        start = far + 1
        assert torch.autograd.gradcheck(pull, (far.clone().requires_grad_(), start))


# --- objectives on maps that are given -----------------------------------------------------------

SQUARE = {
    "prompt": "two",
    "regions": [
        {"prompt": "a circle", "box": [0, 0, 16, 32]},
        {"prompt": "a square", "box": [16, 0, 32, 32]},
    ],
}


def made(name, asks, lengths):
    """An objective, made without a model: tokens are words."""
    sd = SimpleNamespace(
        text=SimpleNamespace(
            places=lambda prompt: range(1, lengths[prompt] - 1),
            positions=lambda prompt, word: [{"circle": 3, "square": 4}[word]],
        ),
        config=SimpleNamespace(conflict_limit=0.3, update_scale=20.0),
    )
    options = {"retention": True} if name == "retention" else {}
    return find(name if name in NAMES else "overlap")(sd, asks, **options)


def maps_of(seed, n=2):
    g = torch.Generator().manual_seed(seed)
    cross = (2 * torch.randn(n, 4, 4, 8, generator=g, dtype=torch.float64)).softmax(-1)
    own = (2 * torch.randn(n, 4, 4, 16, generator=g, dtype=torch.float64)).softmax(-1)
    return 0.2 * cross, own


def asked():
    """Two images with different numbers of subjects and groups."""
    lay = layout.load(SQUARE).sized(32, 32)
    first = Ask("two", 0, [[3], [4]], [Group([[1]], [3]), Group([[2], [5]], [4])], lay)
    return [first, Ask("three", 1, [[3], [4], [1, 2]], [Group([], [3]), Group([[5, 6]], [1])], lay)]


def judged(objective, asks, cross, own, phase="update"):
    select = losses.selector([one.subjects for one in asks], 8)
    lift = SimpleNamespace(asked=set(), asks=asks, select=select, name="it")
    seen = Look(lift, torch.zeros(len(asks), 4, 4, 4), torch.arange(len(asks)), 981, 0, phase)
    seen._held = {"cross": cross, "self": own}
    result = objective(seen)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    "name", ["excite", "initno", "syngen", "boxes", "divide", "contrast", "overlap", "retention"]
)
def test_gradients_are_right_and_a_batch_is_its_images(name):
    lengths = {"two": 8, "three": 8}
    cross, own = maps_of(4)
    both = judged(made(name, asked(), lengths), asked(), cross, own)
    turned = judged(made(name, asked()[::-1], lengths), asked()[::-1], cross.flip(0), own.flip(0))
    for b in range(2):
        alone = asked()[b : b + 1]
        part = slice(b, b + 1)
        found = judged(made(name, alone, lengths), alone, cross[part], own[part])
        assert torch.allclose(found, both[part], atol=1e-12) and torch.allclose(
            turned[1 - b], both[b], atol=1e-12
        )
    for phase in ("update", "repeat") if name == "boxes" else ("update",):

        def loss(c, o, phase=phase):
            return judged(made(name, asked(), lengths), asked(), c, o, phase).sum()

        inputs = cross.clone().requires_grad_(), own.clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_conform_remembers_the_step_before():
    cross, own = maps_of(1, 1)
    later, _ = maps_of(2, 1)
    asks = asked()[:1]
    objective = made("contrast", asks, {})
    select = losses.selector([asks[0].subjects], 8)
    lift = SimpleNamespace(asked=set(), asks=asks, select=select)

    def at(i, maps):
        seen = Look(lift, torch.zeros(1, 4, 4, 4), torch.arange(1), 981, i, "update")
        seen._held = {"cross": maps, "self": own}
        return objective(seen).item(), seen.maps_of(0, [[1], [3], [2], [5], [4]], sharp=False).flatten(1)

    (first, a), (_, b), (last, _) = at(0, cross), at(0, later), at(1, cross)
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert first == pytest.approx(contrast.contrastive(a, labels).item())
    assert last == pytest.approx(contrast.contrastive(torch.cat([a, b]), labels.repeat(2)).item())
    objective.begin()
    assert at(0, cross)[0] == pytest.approx(first)


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, found",
    [
        ("a red circle and a blue square", "red circle; blue square"),
        ("a checkered bowl on a red and blue table", "checkered bowl; red blue table"),
        ("a photo of a cat and a black dog", "cat; black dog"),
        ("cats and dogs", "cats; dogs"),
        ("two big dogs next to the house, a cat", "big dogs; house; cat"),
        ("a cat and a cat", "cat#1; cat#2"),
    ],
)
def test_pairs_are_found(prompt, found):
    assert "; ".join(" ".join([*m, n]) for m, n in pairs.named_groups(prompt)) == found


def test_pairs_are_read(shapes):
    text = shapes.text
    assert pairs.read_groups(text, PROMPT, "red circle; blue: square") == [
        Group([[2]], [3]),
        Group([[6]], [7]),
    ]
    assert pairs.find_groups(text, PROMPT) == pairs.read_groups(text, PROMPT, "red circle; blue square")
    for wrong, says in (
        ("red circle;", "is empty"),
        ("red cat", "not in the prompt"),
        ("red circle; blue circle", "share a word"),
        ("red:", "is empty"),
    ):
        with pytest.raises(ValueError, match=says):
            pairs.read_groups(text, PROMPT, wrong)


# --- looks and drivers ---------------------------------------------------------------------------


def test_only_what_is_read_is_computed(shapes):
    x = noise([0, 1], (4, 16, 16))
    asks = look.ask(shapes, [PROMPT] * 2, [0, 1])
    for reads, first, later in (
        ((), [], []),
        (("cross",), [2], [2]),
        (("claims", "maps"), [2], [2]),
        (("eps",), [2], [2]),
        (("x0",), [4], [4]),
        (("cross", "x0"), [2, 4], [4]),  # one evaluation is spent on finding out what is read
    ):
        lift = Lift(
            shapes,
            asks,
            lambda seen, reads=reads: sum((getattr(seen, r).flatten(1)[:, 0] for r in reads), torch.zeros(2)),
            guidance=2.0,
        )
        for expected in (first, later):
            with counted(shapes.unet) as rows:
                lift.score(x, torch.arange(2), 981)
            assert rows == expected
        kinds = (
            {"stopped"}
            if reads and reads[0] in ("cross", "claims")
            else {"full"} & set("full" for _ in first)
        )
        assert kinds <= set(lift.rows)
    lift = Lift(shapes, asks, lambda seen: seen.x.sum((1, 2, 3)))
    with counted(shapes.unet) as rows:
        _, gradient = lift.slope(x, torch.arange(2), 981)
    assert not rows and torch.equal(gradient, torch.ones_like(x))


def test_slopes_equal_finite_differences(shapes):
    """Of maps, guided clean latents and pixels, through the embedded network in float64."""
    sd = copy.copy(shapes)
    sd.unet, sd.vae = copy.deepcopy(shapes.unet).double(), copy.deepcopy(shapes.vae).double()

    def objective(seen):
        maps = seen.words(losses.selector([[[3]]], 77).expand(2, -1, -1), sharp=True).amax((1, 2, 3))
        return maps + 1e-2 * seen.x0.square().mean((1, 2, 3)) + seen.picture[:, 0, ::7].mean((1, 2))

    lift = Lift(sd, look.ask(sd, [PROMPT] * 2, [0, 1]), objective, guidance=3.0)
    x, rows = noise([0, 1], (4, 16, 16)).double(), torch.arange(2)
    _, gradient = lift.slope(x, rows, 500)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down = (lift.score(x + h * way, rows, 500)["loss"] for h in (1e-5, -1e-5))
    claimed = (gradient * way).flatten(1).sum(dim=1)
    assert (claimed - (up - down) / 2e-5).abs().max() < 1e-5 * claimed.abs().max()
    assert all(p.grad is None for p in sd.unet.parameters())


def pixels(images):
    return [np.asarray(image) for image in images]


def test_without_updates_the_image_is_that_of_plain_sampling(shapes):
    run = {"seeds": [3, 4], "steps": 2}
    plain = pixels(shapes(PROMPT, **run))
    for name in NAMES:
        kind = getattr(find(name), "driver", "refine")
        settings = {"steps": 0} if kind == "optimize" else {"until": 0}
        if name in ("boxes", "saga"):
            continue
        same = pixels(shapes(PROMPT, **run, objective=name, settings=settings))
        assert all(map(np.array_equal, plain, same)), name
    for driver, settings in (
        ("select", {"candidates": 1}),
        ("optimize", {"steps": 0}),
        ("refine", {"scale": 0}),
    ):
        same = pixels(shapes(PROMPT, **run, objective="syngen", driver=driver, settings=settings))
        assert all(map(np.array_equal, plain, same)), driver


def left(seen):
    """A user's own: the circle's attention in the left half, of the whole."""
    maps = seen.maps[:, 0]
    return maps[:, :, 8:].sum((1, 2)) / maps.sum((1, 2))


def test_a_users_own_function_on_each_driver(shapes):
    asks = look.ask(shapes, [PROMPT] * 2, [5, 6])
    start = noise([5, 6], (4, 16, 16))
    judge = Lift(shapes, asks, left)
    t = shapes.schedule.timesteps(50)[0]
    rows = torch.arange(2)
    before = judge.score(start, rows, t)["loss"]
    run = steer.Run(shapes, steer.choose(left, driver="optimize", settings={"steps": 4}), asks)
    found = run.noise([5, 6], (4, 16, 16))
    after = judge.score(found, rows, t)["loss"]
    assert (after < before).all() and run.records[0]["before"]["loss"] == pytest.approx(
        before[0].item(), abs=1e-4
    )
    assert run.records[0]["rows"] == {"gradient": 4.0, "stopped": 1.0}
    assert torch.allclose(found.flatten(1).norm(dim=1), start.flatten(1).norm(dim=1), rtol=1e-5)
    run = steer.Run(shapes, steer.choose(left, driver="select", settings="candidates=6"), asks)
    [one, _] = run.select([range(6), range(6, 9)], (4, 16, 16), lambda message: None)
    assert (
        one.score
        == min(one.scores.values())
        == pytest.approx(judge.score(one.noise, rows[:1], t)["loss"].item(), abs=1e-5)
    )
    run = steer.Run(shapes, steer.choose(left), asks, steps=50)
    moved = run.refine()[0](0, t, start)
    share = (moved - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
    assert share.tolist() == pytest.approx([0.02, 0.02], rel=1e-4)  # 2 % of the norm at each step
    assert (judge.score(moved, rows, t)["loss"] < before).all()


def test_a_search_can_be_replayed(shapes):
    lift = Lift(shapes, look.ask(shapes, [PROMPT], [7]), left)

    def score(x):
        return lift.score(x, torch.zeros(len(x), dtype=torch.long), 981)["loss"].tolist()

    with counted(shapes.unet) as rows:
        found = drivers.search(score, 7, (4, 16, 16), rounds=3, count=2, near=0.9)
    assert sum(rows) == 7 and found.score == min(found.scores.values()) and found.path
    again = drivers.replay(7, found.path, (4, 16, 16), rounds=3, count=2, near=0.9)
    assert torch.equal(again, found.noise)


def test_best_takes_the_first_draft_that_is_good_enough(shapes):
    """Looks in order, drafts until one attends to all subjects, whatever the other images do."""
    prompts = [PROMPT, "a green star and a pink heart"]
    listed = [[1, 2, 3], [4, 5, 6]]
    course = best.Course(10, "ddim", guidance_scale=5.0)
    shape = (4, 16, 16)
    tried = [best.choose(shapes, prompts, [None] * 2, listed, shape, course, drafts=3, limit=0.0)]
    for b, one in enumerate(tried[0]):
        order = sorted(listed[b], key=one.scores.__getitem__)
        assert list(one.drafts) == order and not one.met and one.seed == min(one.drafts, key=one.drafts.get)
        x = shapes.guided(prompts[b], guidance_scale=5.0)
        first = noise(order[:1], shape)
        step = next(ddim.sample(x, first, shapes.schedule, 10))[2]
        judge = Lift(
            shapes, look.ask(shapes, prompts[b : b + 1], [0]), lambda seen: losses.cross_response(seen.maps)
        )
        cross = judge.score(step, torch.zeros(1, dtype=torch.long), shapes.schedule.timesteps(10)[1])[
            "loss"
        ].item()
        assert one.drafts[order[0]] == pytest.approx(cross, abs=1e-4)
    limit = sorted(tried[0][0].drafts.values())[1] + 1e-3  # the first image's second draft at the latest
    with counted(shapes.unet) as rows:
        found = best.choose(shapes, prompts, [None] * 2, listed, shape, course, limit=limit)
    assert sum(rows) == 6 + sum(3 * len(one.drafts) for one in found)
    for one, all_drafts in zip(found, tried[0]):
        values = list(all_drafts.drafts.values())
        good = [k for k, value in enumerate(values) if value < limit]
        assert len(one.drafts) == (good[0] + 1 if good else 3) and one.met == bool(good)
        assert one.scores == pytest.approx(all_drafts.scores, abs=1e-6)
    assert (
        found[0].met
        and len(best.choose(shapes, prompts[:1], [None], [[9]], shape, course, drafts=0)[0].drafts) == 0
    )


def test_best_from_the_command_line(tmp_path, shapes, capfd):
    how = [*"--seed 3 --steps 4 --candidates 2 --init-noise best --out".split(), str(tmp_path)]
    assert main([PROMPT, *how]) == 0 and "subjects: circle, square" in capfd.readouterr().err
    [row] = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert (
        row["asked_seed"] == 3 and row["drafts"] and row["score_is"] == "loss" and len(row["candidates"]) == 2
    )
    assert row["seed"] == min(row["drafts"], key=lambda draft: draft["cross"])["seed"]
    assert main([PROMPT, *how, "--resume", "--quiet"]) == 0
    assert main(["--like", str(tmp_path / row["file"]), "--quiet", "--out", str(tmp_path / "again")]) == 0
    [again] = [json.loads(line) for line in (tmp_path / "again" / "runs.jsonl").read_text().splitlines()]
    assert again["seed"] == row["seed"] and identity(again) == identity(row)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    assert main(["a red circle", *how[:-1], str(tmp_path / "one")]) == 0
    assert "with a single subject it looks only" in capfd.readouterr().err


def test_halving_drafts_the_best_eighth(shapes):
    run = steer.Run(
        shapes,
        steer.choose(left, driver="select", settings="search=halving,part=0.1"),
        look.ask(shapes, [PROMPT], [0]),
        steps=10,
    )
    with counted(shapes.unet) as rows:
        [found] = run.select([range(16)], (4, 16, 16), lambda message: None)
    assert sum(rows) == 16 + 2 * (2 + 1)
    first = Lift(shapes, run.asks, left).score(
        noise(range(16), (4, 16, 16)), torch.zeros(16, dtype=torch.long), shapes.schedule.timesteps(10)[0]
    )["loss"]
    assert found.seed in first.argsort()[:2].tolist() and torch.equal(
        found.noise, noise([found.seed], (4, 16, 16))
    )


def test_halving_keeps_the_best_of_each_stage():
    seen = []

    def stage(key):
        return lambda seeds: [seen.append(seed) or key(seed) for seed in seeds]

    found = drivers.halve([1, 2, 3, 4], [(stage(lambda s: -s), 2), (stage(lambda s: s), 1)])
    assert found.seed == 3 and seen == [1, 2, 3, 4, 4, 3] and found.stages[1] == {4: 4.0, 3: 3.0}


def test_an_image_that_meets_its_limits_rests_and_one_that_is_not_finite_is_left(recwarn):
    start = torch.stack([torch.full((1, 2, 2), v) for v in (1.0, 0.0625, math.nan)]).double()
    seen = []

    def slope(x, rows):
        seen.append(x[:, 0, 0, 0].tolist())
        return {"loss": x.sum((1, 2, 3))}, torch.ones_like(x)

    how = drivers.Optimizing(steps=3, lr=0.1, norm=None, limits={"loss": 0.5}, keep="last")
    run = {"device": torch.device("cpu"), "dtype": torch.float64}
    results = drivers.optimize(slope, lambda x, rows: slope(x, rows)[0], start, torch.arange(3), how, **run)
    assert [x[1] for x in seen] == [0.0625] * 4 and results[1].met and not results[0].met
    assert results[0].noise[0, 0, 0, 0].item() == pytest.approx(0.7)
    assert results[2].note and "not finite" in str(recwarn.list[0].message)


# --- the command line ----------------------------------------------------------------------------

OWN = """
import torch
def good(look):
    return look.cross[..., 3].mean((1, 2))
def wide(look):
    return look.cross[..., 3]
def loose(look):
    return torch.zeros(len(look.x))
def numbers(look):
    return 3.0
def three(look):
    return good(look), {}, {}
def report(look):
    return good(look), {"a": 0.5}
def leaf(look):
    return torch.zeros(len(look.x), requires_grad=True)
def const(look):
    return 0 * good(look)
def nan(look):
    return (good(look) - 2).log()
class Needs:
    def __init__(self, sd, asks, weight):
        self.weight = weight
    def __call__(self, look):
        return self.weight * good(look)
class Bare(Needs):
    def __init__(self):
        pass
class Uncalled:
    def __init__(self, sd, asks):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    return tmp_path


SEARCH = "--objective syngen --init-noise select --objective-set "


@pytest.mark.parametrize(
    "given, says",
    [
        ("--objective synge", "no objective is called 'synge'; choose from initno, excite, syngen"),
        ("--objective none.py:my", "there is no file none.py"),
        ("--objective own.py:my", "no function my; its functions are: Bare, Needs, Uncalled, const, good"),
        ("--objective own.py", "its functions are: Bare, Needs, Uncalled, const"),
        ("--objective broken.py:my", "broken.py cannot be imported: ZeroDivisionError"),
        ("--objective syngen --score attention", "--score and --objective both say"),
        ("--objective syngen --excite", "--excite is --objective excite"),
        ("--objective syngen --no-excite", "--excite is --objective excite"),
        ("--objective syngen --objective-set until=3,foo=2", "called 'foo'; known: until, scale"),
        ("--objective syngen --objective-set until=x", "until must be a whole number, not 'x'"),
        ("--objective syngen --objective-set until", "takes settings such as lr=5,steps=50, not 'until'"),
        ("--objective syngen --objective-set until=1,until=2", "gives until twice"),
        ("--objective syngen --objective-set lr=1,scale=2", "lr and scale are the same"),
        ("--objective nlg --optimize-steps 3 --objective-set steps=2", "are the same: give one"),
        ("--objective nlg --init-noise initno", "would as well: give one"),
        ("--objective saga --init-noise select", "has updates of its own"),
        ("--objective nlg --optimize-mode full", "leave out --objective"),
        ("--objective nlg --objective-set lr=word", "lr must be a number"),
        ("--objective nlg --objective-set norm=3", "norm must be a word"),
        ("--objective nlg --objective-set norm=big", "norm must be one of keep, unit, none"),
        ("--objective syngen --objective-set until=none", "until cannot be none"),
        ("--objective syngen --objective-set lr=nan", "lr must be a number"),
        ("--objective nlg --objective-set clip=-1", "clip must be 0 or more"),
        ("--objective-set lr=2", "--objective-set is for --objective"),
        ("--pairs x", "--pairs is for --objective"),
        ("--objective=", "no objective is called ''"),
        ("--init-noise=", "--init-noise: invalid choice: ''"),
        ("--objective own.py:Needs", "needs the setting weight: give --objective-set weight=VALUE"),
        ("--objective own.py:Bare", "define __init__(self, sd, asks)"),
        ("--objective own.py:Uncalled", "define __call__(self, look)"),
        (f"{SEARCH}search=zero-order --candidates 4", "has no candidates: set its size by"),
        (f"{SEARCH}rounds=2", "rounds is a setting of search=zero-order"),
        (f"{SEARCH}search=zero-order,part=0.1", "part is a setting of search=halving"),
    ],
)
def test_what_is_wrong_with_an_objective_is_said_before_a_model_is_loaded(own, given, says):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        requests.read(options.parse([PROMPT, *given.split()]))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, driver, says",
    [
        ("own.py:wide", None, r"own.py:wide returned shape \(1, 16, 16\) for 1 images: one value per image"),
        ("own.py:numbers", None, "returned a float for 1 images"),
        ("own.py:loose", "optimize", "does not depend on the latents"),
        ("own.py:leaf", "optimize", "does not depend on the latents"),
        ("own.py:three", None, "must return the loss, or the loss and a dict"),
        ("own.py:report", None, r"reports 'a': a tensor of shape \(1,\) is wanted"),
        ("boxes", None, "give --layout"),
    ],
)
def test_what_a_users_function_returns_is_checked(own, shapes, name, driver, says):
    with pytest.raises(ValueError, match=says):
        shapes(PROMPT, seeds=[0], steps=2, objective=name, driver=driver)


def test_what_is_no_objective_is_refused_and_a_needed_setting_is_taken(own, shapes):
    with pytest.raises(TypeError, match="a name, FILE.py:NAME, a function or a class, not of type int"):
        shapes(PROMPT, objective=5)
    assert steer.choose("own.py:Needs", settings="weight=2.5").options() == {"weight": 2.5}
    line = [PROMPT, *"--objective syngen --init-noise best --candidates 3".split()]
    assert requests.read(options.parse(line))[1][0].method.candidates == 3


@pytest.mark.parametrize("setting", [{"scale": -3.0}, {"share": -1.0}, {"scale": math.inf}])
def test_updates_never_climb(setting):
    with pytest.raises(ValueError, match="must be 0 or more"):
        drivers.Refining(**setting)


def test_records_of_searches(own):
    how = "--seed 1 --steps 4 --quiet --out o --init-noise select --objective".split()
    assert main([PROMPT, *how, "own.py:const", "--objective-set", "search=zero-order"]) == 0
    assert main([PROMPT, *how, "own.py:good", "--objective-set", "search=halving", "--candidates", "4"]) == 0
    nowhere, halved = (json.loads(text) for text in (own / "o" / "runs.jsonl").read_text().splitlines())
    assert nowhere["candidates"] == [{"seed": 1, "score": 0.0}] and nowhere["objective"]["path"] == []
    looks = {one["seed"]: one["score"] for one in halved["candidates"]}
    drafts = {one["seed"]: one["loss"] for one in halved["objective"]["drafts"]}
    assert len(looks) == 4 and set(drafts) == set(sorted(looks, key=lambda seed: looks[seed])[:2])
    assert halved["seed"] == min(drafts, key=lambda seed: drafts[seed])
    assert halved["objective"]["rows"] == {"full": 4, "stopped": 6}  # two drafts of one guided step


def test_an_objective_that_is_not_finite_is_named_with_the_image_and_advice(own, capfd):
    said = "the value of own.py:nan, or its gradient, is not finite for seed 7: look in it for a division"
    how = [PROMPT, *"--seed 7 --steps 2 --out o --objective own.py:nan".split()]
    assert main(how) == 0 and f"{said} by 0" in capfd.readouterr().err
    assert main([*how, "--init-noise", "optimize", "--optimize-steps", "1"]) == 0
    assert said in capfd.readouterr().err
    for search in ("none", "zero-order", "halving"):
        asked_for = f"--init-noise select --objective-set search={search}".split()
        assert main([*how, *asked_for]) == 2
        assert f"no candidate has a score: {said}" in capfd.readouterr().err
    texts = (own / "o" / "runs.jsonl").read_text().splitlines()
    strict = [json.loads(text, parse_constant=pytest.fail) for text in texts]  # JSON has no NaN
    assert strict[0]["objective"]["before"] == {"loss": None} and said in strict[1]["objective"]["note"]


def test_an_image_of_saga_that_is_not_finite_is_left_as_it_was(shapes):
    asks = look.ask(shapes, [PROMPT] * 2, [8, 9])
    learner = saga.Saga(shapes, asks)
    learner.iterations = 2
    second = []

    def objective(seen):
        loss, told = learner(seen)
        second.extend(loss[seen.index > 0].tolist())
        return loss.where(seen.index > 0, math.nan), told

    records = [drivers.Result(torch.empty(0)) for _ in range(2)]
    judge = Lift(shapes, asks, objective, name="saga")
    x = noise([8, 9], (4, 16, 16))
    with pytest.warns(UserWarning, match="value of saga, or its gradient, is not finite for seed 8"):
        moved = learner.refine(shapes, judge, 50, records, None)(10, 781, x)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])
    assert not records[0].before and records[1].before.keys() == {"loss", "excite", "second"}
    means = [sum(second[:10]) / 10, sum(second[10:]) / 10]  # of ten draws in each iteration
    assert [records[1].before["loss"], records[1].after["loss"]] == pytest.approx(means)


def test_a_run_records_the_regularizers_of_the_noise_it_ends_with(own):
    how = "--seed 1 --steps 2 --quiet --out o --save-noise --init-noise optimize --optimize-steps 3".split()
    assert main([PROMPT, *how, "--objective", "excite", "--objective-set", "regularizer=kl"]) == 0
    [row] = [json.loads(text) for text in (own / "o" / "runs.jsonl").read_text().splitlines()]
    start = noise([1], (4, 16, 16))
    x = read_noise(next((own / "o" / "extra").glob("*.safetensors")), start.shape[1:])
    kept, told = row["objective"]["noise"], row["objective"]["regularizers"]
    assert kept["norm"] == pytest.approx(x.norm().item() / 32, abs=1e-4)
    assert kept["mean"] == pytest.approx(x.mean().item(), abs=1e-4)
    kl = 0.5 * (x - start).square().mean().item()
    assert kl > 1e-4 and told["kl"] == pytest.approx(kl, abs=1e-5)
    assert told.keys() == {"norm", "kl", "white"}


def test_what_drafts_refuses_a_layout_and_a_single_step(own, capfd):
    lay = {"prompt": PROMPT, "regions": [{"prompt": "a red circle", "box": [0, 0, 0.5, 1]}]}
    (own / "lay.json").write_text(json.dumps(lay))
    halving = ["--init-noise", "select", "--objective-set", "search=halving", "--objective"]
    drafts = "drafts the prompt without the layout's regions: use --init-noise select"
    for given, says in (
        (["--init-noise", "best"], f"--init-noise best {drafts}"),
        ([*halving, "excite"], f"search=halving {drafts}"),
    ):
        with pytest.raises(ValueError, match=says):
            requests.read(options.parse(["--layout", "lay.json", *given]))
    requests.read(
        options.parse(["--layout", "lay.json", *halving, "boxes"])
    )  # the layout steers nothing else
    one = [PROMPT, *"--steps 1 --seed 1 --out o".split()]
    for given in (["--init-noise", "best"], [*halving, "excite"]):
        assert main([*one, *given]) == 2
        assert "drafts the first steps of a run: give 2 --steps or more" in capfd.readouterr().err
    assert not (own / "o").exists()


@pytest.mark.parametrize(
    "given, noted",
    [
        ("--model shapes-turbo --objective syngen", True),
        ("--model shapes-turbo --init-noise initno", True),
        ("--model shapes-turbo --excite", True),
        ("--model shapes-turbo --init-noise select", True),
        ("--sampler lcm --steps 4 --excite", True),
        ("--model shapes-turbo --objective nlg", False),
        ("--model shapes-turbo", False),
        ("--steps 4 --excite", False),
    ],
)
def test_a_note_where_attention_meets_a_model_of_few_steps(given, noted, shapes):
    command, lines = requests.read(options.parse([PROMPT, "--seed", "1", *given.split()]))
    sd = copy.copy(shapes)
    sd.config = MODELS[command.model]
    _, notes = plan(sd, command, lines)
    assert any("were made for models of many steps" in note for note in notes) == noted


def test_the_examples_of_the_pages_work_as_written(own, shapes):
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (own / "mine.py").write_text(re.search(r"works with every driver:\n\n```python\n(.*?)```", page, re.S)[1])
    one = "a red circle"
    run = steer.Run(
        shapes,
        steer.choose("mine.py:Apart", driver="select", settings={"weight": 2}),
        look.ask(shapes, [PROMPT, one], [1, 2]),
    )
    x, rows = noise([1, 2], (4, 16, 16)), torch.arange(2)
    lift, _ = run._lift(run.asks)
    told = lift.score(x, rows, 981)
    a, b = Look(lift, x, rows, 981).maps[0].detach()
    assert told["shared"].tolist() == pytest.approx([a.minimum(b).sum().item(), 0], rel=1e-4)
    assert torch.allclose(told["loss"], told["seen"] + 2 * told["shared"])
    how = steer.choose("mine.py:Apart").how(lift.objective)
    assert how.share == 0.02 and steer.choose("mine.py:Apart", settings="lr=1").how(None).share is None
    assert len(shapes(one, seeds=[1], steps=1, objective="mine.py:Apart")) == 1
    front = (Path(__file__).parents[1] / "README.md").read_text()
    (own / "left.py").write_text(re.search(r"```python\n(def left\(look\):.*?)```", front, re.S)[1])
    theirs, _ = steer.Run(shapes, steer.choose("left.py:left"), run.asks)._lift(run.asks)
    assert torch.equal(
        theirs.score(x, rows, 981)["loss"], Lift(shapes, run.asks, left).score(x, rows, 981)["loss"]
    )


def test_only_the_conflict_loss_warns_of_a_single_subject(shapes, recwarn):
    asks = look.ask(shapes, ["a circle"], [0])
    find("excite")(shapes, asks), find("syngen")(shapes, asks)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="'a circle' has a single subject, so InitNO's loss of conflicts"):
        find("initno")(shapes, asks)


def test_a_box_smaller_than_a_cell_of_the_maps_is_drawn(own, capfd):
    boxes = [{"prompt": "a red circle", "box": [0.1, 0.1, 0.5, 0.5]}]
    boxes.append({"prompt": "a blue square", "box": [0.55, 0.2, 0.58, 0.23]})
    (own / "small.json").write_text(json.dumps({"prompt": PROMPT, "regions": boxes}))
    size = ["--height", "512", "--width", "512", "--steps", "1", "--seed", "1", "--quiet", "--out", "o"]
    assert main(["--layout", "small.json", "--objective", "boxes", *size]) == 0, capfd.readouterr().err


def test_neither_a_prompts_file_nor_an_image_runs_a_file(own, shapes, capfd):
    (own / "lines.jsonl").write_text(json.dumps({"prompt": PROMPT, "objective": "own.py:good"}) + "\n")
    with pytest.raises(ValueError, match="cannot name a file to run"):
        requests.read(options.parse(["--prompts", "lines.jsonl", "--seed", "1"]))
    (own / "lines.jsonl").write_text(json.dumps({"prompt": PROMPT, "objective": "syngen"}) + "\n")
    _, [line] = requests.read(options.parse(["--prompts", "lines.jsonl", "--seed", "1"]))
    assert line.steer.name == "syngen"
    how = [*"--seed 1 --steps 2 --quiet --out o --objective-set until=1 --objective".split()]
    for name in ("own.py:good", "syngen"):
        assert main([PROMPT, *how, name]) == 0
    rows = [json.loads(text) for text in (own / "o" / "runs.jsonl").read_text().splitlines()]
    assert rows[0]["objective"]["sha256"] and rows[0]["objective"]["rows"] == {"gradient": 1.0}
    assert identity(rows[0]) != identity(rows[1])
    changed = rows[0] | {"objective": rows[0]["objective"] | {"sha256": "other"}}
    assert identity(changed) != identity(rows[0])
    assert main(["--like", f"o/{rows[0]['file']}", "--out", "p"]) == 2
    error = capfd.readouterr().err
    assert "made with own.py:good (sha256" in error and "give --objective yourself" in error
    assert main(["--like", f"o/{rows[1]['file']}", "--quiet", "--out", "p"]) == 0
    [again] = [json.loads(text) for text in (own / "p" / "runs.jsonl").read_text().splitlines()]
    assert identity(again) == identity(rows[1])
    assert (own / "p" / again["file"]).read_bytes()[-4000:-400] == (own / "o" / rows[1]["file"]).read_bytes()[
        -4000:-400
    ]
    assert main([PROMPT, *how, "syngen", "--resume"]) == 0
    assert len((own / "o" / "runs.jsonl").read_text().splitlines()) == 2
