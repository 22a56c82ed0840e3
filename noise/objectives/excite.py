"""Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826): attend to every subject.

    L = max over subjects s of 1 - max M_s

with M_s the sharpened, smoothed map of a subject (`Look.maps`). In each of the first 25 steps the
latents move down the gradient of L. At steps 0, 10 and 20 this is repeated until max M_s of the
least attended subject reaches 0.05, 0.5 and 0.8. The conflict of self-attention is only reported.
"""

from collections.abc import Sequence

from torch import Tensor

from minsd.guidance import Model
from minsd.noise import losses
from minsd.noise.drivers import Refining
from minsd.noise.look import Ask, Look, Told
from minsd.noise.objectives.common import need_subjects


class Excite:
    driver = "refine"
    how = Refining(repeats={0: {"cross": 1 - 0.05}, 10: {"cross": 1 - 0.5}, 20: {"cross": 1 - 0.8}})

    def __init__(self, sd: Model, asks: Sequence[Ask]):
        need_subjects(asks)

    def __call__(self, look: Look) -> tuple[Tensor, Told]:
        conflict = losses.self_conflict(look.claims, look.present)
        loss = losses.cross_response(look.maps, look.present)
        return loss, {"cross": loss, "self": conflict}
