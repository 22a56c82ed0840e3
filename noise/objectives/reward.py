"""Rewards of the finished image, optimised through the whole run (ReNO, Eyring et al. 2024, arXiv
2406.04312).

    L(x) = - sum over rewards r of w_r r(image(x), prompt)

image(x) is what the run draws from the noise x, with the run's own sampler, steps and guidance. ReNO
takes 49 steps of SGD with Nesterov momentum 0.9, lr 5, the gradient's norm clipped to 0.1 for the
16,384 numbers of SD's latents, and adds 0.01 times the regularizer `norm`. Within a run (the driver
refine) the image is that of the predicted clean latents.

A reward is any function reward(image, prompts) -> (b,), with images (b,3,H,W) in 0..1; higher is
better. The rewards with a name are judges that are differentiable, and soft-shapes for the embedded
model. An optimised image says nothing good of its own reward: judge it by another.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from minsd import judges
from minsd.guidance import Model
from minsd.noise.drivers import Optimizing
from minsd.noise.look import Ask, Look, Told, recomputed

Reward = Callable[[Tensor, Sequence[str]], Tensor]
SOFT = "soft-shapes"
KNOWN = (SOFT, *(name for name, row in judges.JUDGES.items() if row.module in ("clip", "blip")))
# ReNO's weights, for the scales of the judges (5 for a cosine is 0.05 for HPSv2, which is 100 cosines).
WEIGHTS = {"hpsv2.1": 0.05, "hpsv2": 0.05, "imagereward": 1.0, "clip-h14": 1.0, "pickscore": 0.05}
SUMS = {"reno": "hpsv2.1+imagereward+clip-h14+pickscore"}


def of(reward: str | Reward) -> type["Rewarded"]:
    """Returns an objective (a class for noise/steer.py) that maximises a reward. `reward` is a
    function, a name in KNOWN, several such names joined by "+", or "reno" for the weighted sum of
    rewards that ReNO uses. Raises ValueError for an unknown name."""
    if not isinstance(reward, str):
        return type("Rewarded", (Rewarded,), {"parts": {getattr(reward, "__name__", "reward"): reward}})
    names = SUMS.get(reward, reward).split("+")
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"there is no reward {name!r}: choose from {', '.join((*KNOWN, *SUMS))}")
    return type("Rewarded", (Rewarded,), {"parts": dict.fromkeys(names)})


class Rewarded:
    """An objective that maximises a sum of rewards; `of` makes a subclass for given rewards. Some
    rewards are judges, which are networks. `weights` names files to load a judge from, in place of
    its published weights, such as "clip-b16=FOLDER;bert=FILE"."""

    driver = "optimize"
    parts: Mapping[str, Reward | None] = {}  # name -> function, None for a built-in reward

    def __init__(self, sd: Model, asks: Sequence[Ask], weights: str = ""):
        if any(one.layout is not None for one in asks):
            raise ValueError("a reward judges the image that a prompt alone draws: leave out --layout")
        d = sd.config.unet.in_channels * sd.config.unet.sample_size**2
        clip = 0.1 * (d / 16384) ** 0.5
        self.how = Optimizing(
            49, lr=5.0, momentum=0.9, nesterov=True, clip=clip, norm=None, regularizer="norm"
        )
        self.rewards: dict[str, Reward] = {}
        self.identity: dict[str, Any] = {}
        for name, function in self.parts.items():
            if name == SOFT and function is None:
                from minsd.judges import soft_shapes

                for one in asks:
                    soft_shapes.subjects(one.prompt)  # its error
                function = soft_shapes.reward
            elif function is None:
                judge = _judge(name, weights, str(sd.device))
                self.identity[name] = judge.identity
                function = judge.score
            self.rewards[name] = function

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        image = look.drawn if look.i is None else look.picture
        prompts = [one.prompt for one in look.asks]
        told = {name: recomputed(reward, image, prompts) for name, reward in self.rewards.items()}
        total = sum(
            (WEIGHTS.get(name, 1.0) * value.to(image) for name, value in told.items()), image.new_zeros(())
        )
        return -total, told


@cache
def _judge(name: str, weights: str, device: str) -> Any:
    """Loads the judge called `name`, and caches it. `weights` lists files to use in place of
    published weights, such as "clip-b16=FOLDER;bert=FILE". Raises ValueError and FileNotFoundError
    as `judges.load` does."""
    given: dict[str, str] = {}
    for part in filter(None, weights.split(";")):
        key, _, place = part.partition("=")
        given[key] = place
    try:
        return judges.load(name, given, device, fetch=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("--weights ", "--objective-set weights=")) from None
