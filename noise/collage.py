"""NoiseCollage (Shirakawa & Uchida, CVPR 2024, arXiv 2403.03485): crop and merge predicted noises.

A layout (noise/layout.py) has a caption for the whole image, k = 0, and regions k = 1..N with a
caption and a mask each. In every step the UNet is evaluated once per caption, on the same latents;
the evaluation with caption k is called pass k. The predicted noises eps_k of all passes are merged
into one:

    eps_k = u_k + g (c_k - u_k)        eps = sum_k M_k eps_k        M_k = w_k a_k / sum_j w_j a_j

Here c_k is the conditional prediction of pass k, u_k the unconditional one, and g the guidance
scale. In each latent cell a_k is the fraction of the cell inside region k (a_0 = 1), w_k the
region's weight, and w_0 the background weight. Any sampler can take its steps with the merged
noise.

In pass k >= 1 cross-attention is masked. A cell inside region k attends to the region's caption. A
cell outside attends to the image's caption or to the empty prompt; which of the two is chosen at
random for each latent cell, step and region. Self-attention is not masked. The unconditional
prediction u_k is masked in the same way, with the negative prompts instead of the captions. If all
u_k are equal, u is computed once, and a step takes N + 2 UNet rows instead of 2 (N + 1). All rows
run as one batch. A map for each row holds the number of the text that each cell attends to.

A region's pass sees the whole latents (the paper's "fixed" crop), and may place its subject outside
the region. With a crop margin (the paper's "flex" crop is a margin of 0) the pass runs on a crop of
the latents, the region's box plus the margin, as if that were the image. Once objects are placed (t
< 500) all passes see the whole latents again, which blends the crops.

Passes can differ in more than their texts: a ControlNet (noise/collage_control.py) can have another
control image in each pass, and a LoRA (weights/lora.py, `by_region`) another scale
(minsd/adapters.py).

A collage can start from noise that was optimised by InitNO, or selected by a score, for the caption
of the whole image, because pass 0 is the plain run of that caption. The initial noise largely
decides where things appear, and a collage does not move them far. noise/arrange.py composes noise
with which things appear where the layout puts them.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minsd.adapters import Adapters
from minsd.config import CELL
from minsd.guidance import Model, Predictor, TextKV, eps_from_output, rescaled
from minsd.noise.layout import CROP_MARGIN_MOST, Layout, SizedLayout, SizedRegion, coverage, ensure_sized

OWN, WHOLE, EMPTY = 0, 1, 2  # the texts of a masked pass: the region's, the image's, the empty prompt
CROP_UNTIL = 500  # the timestep down to which a crop margin applies: objects are placed by then
ROWS_AT_ONCE = 16 * 64 * 64  # latent cells of all rows of a batch on a CPU; more would be no faster

Grid = tuple[int, int]  # rows and columns of an attention layer's cells
LevelMaps = dict[Grid, Tensor]  # a map for the grid of each level with cross-attention
# One LevelMaps for the whole network, or one for its encoder half and one for the rest. An empty
# list means that attention is not masked.
Halves = list[LevelMaps]
Place = tuple  # (..., rows, columns): an index into latents
Row = tuple[list[str], int]  # the texts that the cells of a row may attend to, and the row's pass
Cut = Callable[[int, Place], Model]  # (pass k, the crop that pass k sees) -> the model to use


@dataclass(frozen=True)
class Scheme:
    """Settings of a collage, which predicts the noise by one UNet evaluation per caption (a pass)
    and merges the predictions. They state how cross-attention is masked in each pass, whether a
    pass sees only a crop of the latents, and how the predictions are weighted. The constructor
    raises ValueError for settings that are out of range or exclude one another."""

    # w_0, the weight of pass 0, which has the caption of the whole image.
    background_weight: float
    # The probability with which a cell outside the region attends to the empty prompt.
    background_drop: float
    # How it is decided which cells of the attention grids belong to a region: "direct"
    # (`direct_cells`), or "compat" (`carry`), as in the published program.
    ladder: str
    # If not None, replaces `background_drop`: the cells that attend to the empty prompt are exactly
    # those further from the region's box than `pad` times the box's width or height.
    pad: float | None
    # False means that all cells of pass k attend to caption k.
    masked: bool
    # True replaces the passes by a single one, in which each cell attends to the caption of its
    # region (a cheap ablation).
    attention_only: bool
    # If not None: while t >= crop_until, pass k is not masked and sees only the region's box,
    # widened on each side by crop_margin times the box's size. A step then has 2 (N + 1) rows, most
    # of them small.
    crop_margin: float | None
    crop_until: float

    def __post_init__(self) -> None:
        if self.ladder not in ("direct", "compat"):
            raise ValueError(f"no ladder is called {self.ladder!r}; choose from direct, compat")
        if not 0 <= self.background_weight < math.inf:
            raise ValueError(f"background_weight must be 0 or more, not {self.background_weight}")
        if not 0 <= self.background_drop <= 1:
            raise ValueError(f"background_drop must be from 0 to 1, not {self.background_drop}")
        if self.pad is not None and not 0 <= self.pad < math.inf:
            raise ValueError(f"pad must be 0 or more, not {self.pad}")
        if self.attention_only and not self.masked:
            raise ValueError("attention_only is one masked pass: it does not go with masked=False")
        if self.crop_margin is None:
            return
        if not 0 <= self.crop_margin <= CROP_MARGIN_MOST:
            raise ValueError(
                f"crop_margin must be from 0 to {CROP_MARGIN_MOST:g}, such as 0.25, not {self.crop_margin}"
            )
        if self.attention_only or self.ladder == "compat":
            raise ValueError(
                "crop_margin goes neither with attention_only nor with the ladder compat, "
                "whose passes see everything"
            )


def predictor(
    sd: Model,
    layout: Layout,
    *,
    guidance_scale: float = 7.5,
    background_weight: float = 0.1,
    background_drop: float = 0.75,
    ladder: str = "direct",
    seed: int | Sequence[int] = 0,
    pad: float | None = None,
    attention_only: bool = False,
    masked: bool = True,
    crop_margin: float | None = None,
    crop_until: float = CROP_UNTIL,
    adapters: Adapters | None = None,
    cut: Cut | None = None,
) -> Predictor:
    """Returns a collage's predictor: the function predict(x, t) -> eps that a sampler calls, with
    latents x (B,4,h,w) of the layout's size at timestep t, and the merged predicted noise eps
    (B,4,h,w). A collage predicts the noise in several passes. A pass is one UNet evaluation with
    one caption: that of the image in pass 0, that of region k in pass k.

    In pass k, a cell outside region k attends to the image's caption or to the empty prompt. This
    choice is random, and determined by t, k and `seed`, which is one number for all images, or a
    list with one per image. `Scheme` explains the other settings from `background_weight` to
    `crop_until`.

    `adapters` is needed if LoRAs or ControlNets differ from pass to pass: it tells the LoRAs and
    ControlNets which pass each row of the UNet's batch belongs to (`lora.by_region` yields such an
    object). With `adapters`, each pass computes its own unconditional prediction. `cut(k, place)`
    returns the model to use while pass k sees only the crop latents[place]; if `cut` is None, the
    model is `sd`.

    Raises ValueError, before any network runs, for settings that are out of range, exclude one
    another, or do not fit the layout.
    """
    if sd.config.unet.guidance_dim:
        raise ValueError("a layout needs guidance by a second text, which this distilled model has not")
    scheme = Scheme(
        background_weight=background_weight,
        background_drop=background_drop,
        ladder=ladder,
        pad=pad,
        masked=masked,
        attention_only=attention_only,
        crop_margin=crop_margin,
        crop_until=crop_until,
    )
    layout = ensure_sized(layout, sd.config.size)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    _check(layout, seeds, guidance_scale, attention_only, adapters)
    if not layout.regions and adapters is None:
        return single_pass(sd, layout, _size(layout), guidance_scale, None, 0)
    if attention_only:
        predict = attention_only_pass(sd, layout, ladder, guidance_scale)
    else:
        predict = masked_passes(sd, layout, scheme, guidance_scale, seeds, adapters)
    if crop_margin is not None:
        crops = _crops(sd, layout, scheme, guidance_scale, adapters, cut)
        predict = cropped(predict, crops, crop_until)
    return _fitting(predict, _size(layout), seeds)


def _check(
    layout: SizedLayout,
    seeds: list[int],
    guidance_scale: float,
    attention_only: bool,
    adapters: Adapters | None,
) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a number, not {guidance_scale}")
    if not seeds or any(not isinstance(s, int) or s < 0 for s in seeds):
        raise ValueError(f"seeds must be whole numbers from 0, not {seeds}")
    if attention_only and adapters is not None:
        raise ValueError("attention_only is one pass for all regions: it does not go with adapters")
    for k, region in enumerate(layout.regions, 1):
        if region.lora and adapters is None:
            raise ValueError(
                f"region {k} has an adapter of its own (lora): "
                "give the collage the adapters of lora.by_region"
            )
    if any(layout.control_images):
        warnings.warn("no ControlNet was given: the layout's control images are not used", stacklevel=3)


def _size(layout: SizedLayout) -> Grid:
    """Returns the layout's size in latent cells, (rows, columns)."""
    return layout.height // CELL, layout.width // CELL


# --- predictors -----------------------------------------------------------------------------------


def masked_passes(
    sd: Model,
    layout: SizedLayout,
    scheme: Scheme,
    guidance_scale: float,
    seeds: Sequence[int],
    adapters: Adapters | None,
) -> Predictor:
    """Returns a predictor (the noise-prediction function that a sampler calls) for a layout of N
    regions. It runs the N + 1 passes (one UNet evaluation per caption) on the whole latents, masks
    the cross-attention of each pass unless `scheme.masked` is False, and merges the predicted
    noises. `seeds` holds one seed for all images, or one per image; it determines the random choice
    of the text that cells outside a pass's region attend to. `adapters` tells LoRAs and ControlNets
    which pass each row of the UNet's batch belongs to, if they differ from pass to pass."""
    regions = layout.regions
    masked = scheme.masked and bool(regions)
    cells = _PassCells(sd, layout, scheme, seeds) if masked else None
    merge = _merge(sd, layout, scheme)  # (N + 1, 1, 1, h, w)

    def texts(own: str, whole: str) -> list[str]:
        return [own, whole, ""] if masked else [own]

    captions = [layout.prompt, *(region.prompt for region in regions)]
    negatives = [layout.negative_prompt, *(region.negative_prompt for region in regions)]
    rows = [(texts(caption, layout.prompt), k) for k, caption in enumerate(captions)]
    # All u_k are equal where every cell of every pass attends to the same negative prompt.
    attended = {*negatives, ""} if cells is not None and cells.any_empty else set(negatives)
    if guidance_scale != 1 and len(attended) == 1 and adapters is None:
        rows = [([negatives[0]] * len(rows[0][0]), 0), *rows]
    elif guidance_scale != 1:
        rows = [(texts(text, layout.negative_prompt), k) for k, text in enumerate(negatives)] + rows
    run = _Rows(sd, rows, _size(layout), adapters)

    def predict(x: Tensor, t: int | float) -> Tensor:
        eps = run(x, t, [] if cells is None else cells.at(t))  # (rows, B, 4, h, w)
        eps = _guided(sd, eps, len(captions), guidance_scale, x, t)  # (N + 1, B, 4, h, w)
        return (merge.to(eps.dtype) * eps).sum(0)

    return predict


def attention_only_pass(sd: Model, layout: SizedLayout, ladder: str, guidance_scale: float) -> Predictor:
    """Returns a predictor (the noise-prediction function that a sampler calls) that evaluates the
    UNet once, instead of once per caption. Each cell attends to the caption of the topmost region
    that holds the cell (see `stacked`), or to the image's caption if no region does. `ladder`
    ("direct" or "compat") is explained in `Scheme`."""
    painted = [
        {grid: _painted(inside, layout.regions) for grid, inside in half.items()}  # (1, 1, cells)
        for half in _region_cells(sd, layout, ladder)
    ]
    cells = sent(painted, sd.device)
    captions = [layout.prompt, *(region.prompt for region in layout.regions)]
    negatives = [layout.negative_prompt, *(region.negative_prompt for region in layout.regions)]
    rows = [(captions, 0)] if guidance_scale == 1 else [(negatives, 0), (captions, 0)]
    run = _Rows(sd, rows, _size(layout), None)
    return lambda x, t: _guided(sd, run(x, t, cells), 1, guidance_scale, x, t)[0]


def single_pass(
    sd: Model,
    captioned: SizedLayout | SizedRegion,
    size: Grid,
    guidance_scale: float,
    adapters: Adapters | None,
    k: int,
) -> Predictor:
    """Returns a predictor (the noise-prediction function that a sampler calls) with one prompt and
    no masks, on latents of `size` (rows, columns). The prompt and negative prompt are those of
    `captioned`, the layout or a region. If `adapters` is given, they act as in pass k of a
    collage."""
    texts = [captioned.prompt], [captioned.negative_prompt]
    if adapters is None:
        cond, uncond = (sd.encode_prompt(text) for text in texts)
        return sd.predictor(cond, uncond, guidance_scale)
    rows = [(texts[0], k)] if guidance_scale == 1 else [(texts[1], k), (texts[0], k)]
    run = _Rows(sd, rows, size, adapters)
    return lambda x, t: _guided(sd, run(x, t, []), 1, guidance_scale, x, t)[0]


@dataclass(frozen=True)
class Crop:
    """A pass (the UNet evaluation for one caption) that sees only a part of the latents. Holds the
    index `place` of that part, the predictor for the part, and the weights by which the predicted
    noise is multiplied before it is added to the noise for the whole latents."""

    place: Place
    weights: Tensor  # (h,w) of the part
    predict: Predictor


def cropped(inner: Predictor, crops: Sequence[Crop], until: float) -> Predictor:
    """Returns a predictor (the noise-prediction function that a sampler calls). While t >= `until`,
    its result is the sum of the weighted predictions of all crops; at smaller t, it is the result
    of the predictor `inner` on the whole latents."""

    def predict(x: Tensor, t: int | float) -> Tensor:
        if t < until:
            return inner(x, t)
        parts = [crop.weights.to(x.dtype) * crop.predict(x[crop.place], t) for crop in crops]
        total = torch.zeros_like(x, dtype=parts[0].dtype)
        for crop, part in zip(crops, parts):
            total[crop.place] += part
        return total

    return predict


def _crops(
    sd: Model,
    layout: SizedLayout,
    scheme: Scheme,
    guidance_scale: float,
    adapters: Adapters | None,
    cut: Cut | None,
) -> list[Crop]:
    assert scheme.crop_margin is not None
    merge = _merge(sd, layout, scheme)[:, 0, 0]  # (N + 1, h, w)
    crops = []
    for k, place in enumerate(crop_places(layout, scheme.crop_margin)):
        _, rows, columns = place
        size = rows.stop - rows.start, columns.stop - columns.start
        model = copy.copy(sd if cut is None else cut(k, place))
        # SDXL is given the size of the whole image in every pass: a small size would mean blur.
        model.encode_prompt = partial(model.encode_prompt, size=(layout.height, layout.width))
        captioned = layout.regions[k - 1] if k else layout
        predict = single_pass(model, captioned, size, guidance_scale, adapters, k)
        crops.append(Crop(place, merge[k][place], predict))  # M_k is 0 outside the crop
    return crops


def crop_places(layout: SizedLayout, margin: float) -> list[Place]:
    """Returns an index into latents (..., h, w) for each pass (one UNet evaluation per caption). It
    selects the part that the pass sees: for pass 0 the whole latents, and for each region the
    region's box in whole cells, widened on each side by `margin` times the box's size."""
    places = [(..., slice(0, layout.height // CELL), slice(0, layout.width // CELL))]
    for region in layout.regions:
        x0, y0, x1, y1 = region.bounds
        place = []
        for start, stop, size in ((y0, y1, layout.height), (x0, x1, layout.width)):
            low = start // CELL
            high = -(-stop // CELL)
            more = round(margin * (high - low))
            place.append(slice(max(low - more, 0), min(high + more, size // CELL)))
        places.append((..., *place))
    return places


def _guided(
    sd: Model, eps: Tensor, conditional: int, guidance_scale: float, x: Tensor, t: int | float
) -> Tensor:
    """Applies guidance, with the rescaling that `sd.guidance_rescale` asks for, to noises eps
    (rows,B,4,h,w) predicted for latents x (B,4,h,w) at timestep t. The last `conditional` rows are
    the conditional predictions. The rows before them are the unconditional ones: a single row for
    all, or one per conditional row; none are needed if the guidance scale is 1. Returns
    (conditional,B,4,h,w)."""
    u, c = eps[:-conditional], eps[-conditional:]
    if guidance_scale == 1:
        return c
    return rescaled(u + guidance_scale * (c - u), c, x, t, sd.guidance_rescale, sd.schedule)


def _fitting(inner: Predictor, size: Grid, seeds: list[int]) -> Predictor:
    """Returns a predictor that checks the latents and then calls the predictor `inner`. It raises
    ValueError if the latents are not of `size` (rows, columns), or if the number of `seeds` is
    neither 1 nor the number of images."""

    def predict(x: Tensor, t: int | float) -> Tensor:
        if tuple(x.shape[-2:]) != size:
            raise ValueError(
                f"the layout has {size[0]}x{size[1]} latent cells: "
                f"latents of shape {tuple(x.shape)} do not fit it"
            )
        if len(seeds) not in (1, len(x)):
            raise ValueError(
                f"the collage was given {len(seeds)} seeds for {len(x)} images: give one, or one per image"
            )
        return inner(x, t)

    return predict


# --- masks on the latent grid: the weight of each region's noise ----------------------------------


def _fill(layout: SizedLayout, ladder: str) -> np.ndarray:
    """Returns, for each of N regions, the fraction of each latent cell that lies inside the region,
    (N,h,w). `ladder` is "direct" for exact fractions, or "compat" for those of NoiseCollage's
    published program (`compat_fill`)."""
    compat = ladder == "compat"
    fill = [compat_fill(r.pixels) if compat else coverage(r.pixels, CELL) for r in layout.regions]
    return np.array(fill).reshape(len(layout.regions), *_size(layout))


def _merge(sd: Model, layout: SizedLayout, scheme: Scheme) -> Tensor:
    """Returns the weights by which a collage's passes (one UNet evaluation per caption) are merged,
    for a layout of N regions: (N+1,1,1,h,w) on the model's device. In each latent cell, the noise
    predicted by pass k is multiplied by weight k, and the products are summed."""
    weights = [scheme.background_weight, *(region.weight for region in layout.regions)]
    merge = merge_weights(_fill(layout, scheme.ladder), weights)
    return torch.from_numpy(merge).to(sd.device, sd.dtype)[:, None, None]


def compat_fill(pixels: np.ndarray) -> np.ndarray:
    """Resizes a mask `pixels` (H,W) to the latent grid as NoiseCollage's published program does.
    Returns the fraction of each cell that counts as inside, (h,w) float64. The mask is resized as
    an 8-bit image by Pillow's antialiased bicubic filter. Pillow filters one axis after the other,
    and rounds and clips to 0..255 after each."""
    high, wide = (n // CELL for n in pixels.shape)
    picture = Image.fromarray(pixels.astype(np.uint8) * 255)
    return np.asarray(picture.resize((wide, high), Image.Resampling.BICUBIC)) / 255


def merge_weights(fill: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Returns the weights M (N+1,h,w) by which the predicted noises of the image's caption and of N
    regions are merged. They sum to 1 in each cell. `fill` (N,h,w) is the fraction of each latent
    cell inside each region, and `weights` holds the background weight w_0 and the regions' weights
    w_1 ... w_N.

    Raises ValueError if w_0 is 0 and some cell is in no region, because the weights of that cell
    would sum to 0.
    """
    m = np.asarray(weights)[:, None, None] * np.concatenate([np.ones((1, *fill.shape[1:])), fill])
    total = m.sum(0)
    if not total.all():
        raise ValueError(
            f"no region covers {100 * np.mean(total == 0):.1f} % of the image, and background_weight is 0: "
            "give it a weight such as 0.1, or regions that cover everything"
        )
    return m / total


# --- cells of the attention grids: which text each attends to -------------------------------------


class _PassCells:
    """The text that each cell attends to in every pass (one UNet evaluation per caption): the
    region's caption, the image's caption, or the empty prompt. `any_empty` is True if some cell may
    attend to the empty prompt."""

    def __init__(self, sd: Model, layout: SizedLayout, scheme: Scheme, seeds: Sequence[int]):
        self.size = _size(layout)
        self.levels = _levels(sd, self.size)
        self.compat = scheme.ladder == "compat"
        self.inside = _region_cells(sd, layout, scheme.ladder)
        self.drop = scheme.background_drop
        self.seeds = seeds
        self.device = sd.device
        self.count = len(layout.regions)
        self.fixed: Halves | None = None  # None: chosen anew in every step
        self.any_empty = True
        outside = fixed_surroundings(layout.regions, self.size, scheme.background_drop, scheme.pad)
        if outside is not None:
            self.fixed = self._assigned(outside)  # on the device once: no step copies them again
            self.any_empty = bool((outside == EMPTY).any())

    def at(self, t: int | float) -> Halves:
        """Returns the number of the text that each cell attends to at timestep t: OWN (the pass's
        caption), WHOLE (the image's caption) or EMPTY (the empty prompt). For each attention grid,
        the numbers of the N + 1 passes are (N+1,B,cells), or (N+1,1,cells) if they are the same for
        all images. They are on the model's device."""
        if self.fixed is not None:
            return self.fixed
        drawn = [
            torch.stack([drawn_surroundings(self.size, self.drop, seed, t, k) for seed in self.seeds])
            for k in range(self.count)
        ]
        return self._assigned(torch.stack(drawn))

    def _assigned(self, outside: Tensor) -> Halves:
        return sent(_assign(self.inside, carry(outside, self.levels, self.compat)), self.device)


def sent(halves: Halves, device: torch.device) -> Halves:
    """Copies the maps in `halves`, each (...,cells), from the CPU to `device` in a single transfer.
    Returns the copies in the same structure. On a CPU, `halves` itself is returned.

    The transfer to a CUDA GPU is asynchronous, from pinned memory. So the CPU can prepare and
    launch further work meanwhile.
    """
    maps = [cells for half in halves for cells in half.values()]
    if device.type == "cpu" or not maps:
        return halves
    packed = torch.cat(maps, dim=-1)
    packed = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed.to(device)
    parts = iter(packed.split([cells.shape[-1] for cells in maps], dim=-1))
    return [{grid: next(parts) for grid in half} for half in halves]


def _levels(sd: Model, size: Grid) -> list[Grid]:
    """Returns the grids (rows, columns) of those UNet levels that have cross-attention, finest
    first, for latents of `size` (rows, columns)."""
    grids = sd.unet.grids(size)
    return [grid for grid, blocks in zip(grids, sd.unet.attention_blocks) if blocks]


def _region_cells(sd: Model, layout: SizedLayout, ladder: str) -> Halves:
    """Returns which attention cells belong to each of N regions, as dicts of grid -> boolean map
    (N,h,w), with a grid (h,w) for each UNet level with cross-attention. If `ladder` is "direct",
    the list holds one dict; if it is "compat", two: one for the encoder half of the UNet and one
    for the rest (see `carry`)."""
    size = _size(layout)
    if ladder == "compat":
        return carry(torch.from_numpy(_fill(layout, ladder) == 1), _levels(sd, size), True)
    found = {}
    for level, (grid, blocks) in enumerate(zip(sd.unet.grids(size), sd.unet.attention_blocks)):
        if blocks:
            inside = [direct_cells(region.pixels, CELL << level) for region in layout.regions]
            found[grid] = torch.from_numpy(np.stack(inside))
    return [found]


def direct_cells(pixels: np.ndarray, cell: int) -> np.ndarray:
    """Returns which cells (squares of `cell` pixels) belong to a mask `pixels` (H,W), as booleans
    (h,w). A cell belongs to it if at least half of the cell lies inside the mask. If there is no
    such cell, the cell at the mask's centre belongs to it."""
    inside = coverage(pixels, cell) >= 0.5
    if not inside.any():
        row, column = (int((places.mean() + 0.5) // cell) for places in np.nonzero(pixels))
        inside[row, column] = True
    return inside


def nearest(maps: Tensor, grid: Grid) -> Tensor:
    """Resizes maps (...,h,w) to a grid of (rows, columns) by nearest neighbours. Row i of the
    result is row floor(i * h / rows) of the maps; columns are chosen likewise."""
    rows, columns = (torch.arange(out) * n // out for n, out in zip(maps.shape[-2:], grid))
    return maps[..., rows[:, None], columns]


def carry(maps: Tensor, levels: list[Grid], compat: bool) -> Halves:
    """Resizes maps (...,h,w) of the latent cells to the attention grids `levels`, which are given
    finest first. Without `compat`, each grid's map is resized from the latent cells. The result is
    a list with one dict, grid -> map.

    With `compat`, as in the published program, each map is resized from the map before it, in the
    order in which the UNet runs: down through the encoder half, then up through the rest. So the
    maps of the rest have no more detail than the coarsest grid. The result is a list with two such
    dicts, for the encoder half and for the rest.
    """
    if not compat:
        return [{grid: nearest(maps, grid) for grid in levels}]
    halves = []
    for order in (levels, levels[::-1]):
        half = {}
        for grid in order:
            maps = nearest(maps, grid)
            half[grid] = maps
        halves.append(half)
    return halves


def drawn_surroundings(size: Grid, drop: float, seed: int, t: int | float, k: int) -> Tensor:
    """Chooses at random the text that cells outside region number `k` attend to. Returns a number
    for every latent cell, (h,w), where (h,w) is `size`: EMPTY (the empty prompt) with probability
    `drop`, otherwise WHOLE (the image's caption). The choice is determined by `seed`, the timestep
    `t` and `k`. Cells inside the region get a number too, which is not used."""
    draws = np.random.default_rng((seed, round(float(t) * 2**20), k)).random(size)
    return torch.from_numpy(np.where(draws < drop, EMPTY, WHOLE))


def fixed_surroundings(
    regions: Sequence[SizedRegion], size: Grid, drop: float, pad: float | None
) -> Tensor | None:
    """Returns the text that every latent cell attends to if it lies outside region k, for each of N
    regions, (N,1,h,w): WHOLE (the image's caption) or EMPTY (the empty prompt).

    If `pad` is given, cells further from the region's box than `pad` times the box's width or
    height get EMPTY, and the others WHOLE. If `pad` is None, `drop` is the probability of EMPTY:
    with 0 all cells get WHOLE, and with 1 all get EMPTY. With any other `drop` the text has to be
    chosen at random in each step (`drawn_surroundings`), and the result is None.
    """
    if pad is None and drop not in (0, 1):
        return None
    maps = torch.full((len(regions), 1, *size), WHOLE if pad is None and drop == 0 else EMPTY)
    if pad is None:
        return maps
    y, x = (CELL * (torch.arange(n) + 0.5) for n in size)  # the cells' centres, in pixels
    for each, region in zip(maps, regions):
        x0, y0, x1, y1 = region.bounds
        wide = pad * (x1 - x0)
        high = pad * (y1 - y0)
        near = ((y >= y0 - high) & (y <= y1 + high))[:, None] & (x >= x0 - wide) & (x <= x1 + wide)
        each[0, near] = WHOLE
    return maps


def _assign(inside: Halves, outside: Halves) -> Halves:
    """Combines the texts inside and outside the regions. Returns for each attention grid
    (N+1,B,h*w): the number (OWN, WHOLE or EMPTY) of the text that each cell attends to in each
    pass. A pass is one UNet evaluation with one caption. `inside` holds the cells of each region as
    booleans (N,h,w); they get OWN, which stands for the pass's caption. `outside` (N,B,h,w) holds
    the numbers of the other cells. In pass 0, whose caption is the image's, every cell gets OWN."""
    halves = []
    for own, others in zip(inside, outside, strict=True):
        half = {}
        for grid in own:
            texts = torch.where(own[grid][:, None], OWN, others[grid]).flatten(2)  # (N, B, h*w)
            half[grid] = torch.cat([torch.zeros_like(texts[:1]), texts])
        halves.append(half)
    return halves


def stacked(regions: Sequence[SizedRegion]) -> list[int]:
    """Returns the indices of the regions in the order in which they cover one another, bottom
    first. The region with the greatest weight is on top; of regions with the same weight, a smaller
    one covers a larger one."""
    ranks = [(region.weight, -int(region.pixels.sum())) for region in regions]
    return sorted(range(len(regions)), key=ranks.__getitem__)


def _painted(inside: Tensor, regions: Sequence[SizedRegion]) -> Tensor:
    """Returns the number of the caption that each cell attends to, (1,1,h*w): k = 1..N if region k
    is the topmost region that holds the cell, and 0 (the image's caption) if no region does.
    `inside` (N,h,w), boolean, holds the cells of each region."""
    cells = torch.zeros(inside.shape[1:], dtype=torch.long)
    for k in stacked(regions):
        cells[inside[k]] = k + 1
    return cells.flatten()[None, None]


# --- rows of one step through the network ---------------------------------------------------------


class _Part:
    """One UNet evaluation for a part of the batch's rows. A row is one image with the texts of one
    pass. The tensors that the evaluation needs are kept on the model's device, because a copy in
    every step would make the program wait for the GPU."""

    def __init__(self, passes: list[int], image: list[int], text_kv: TextKV, device: torch.device):
        self.passes = passes  # of each row
        self.text_kv = text_kv
        self.pass_of_row = torch.tensor(passes, device=device)
        self.image = torch.tensor(image, device=device)
        self.cells: Halves | None = None  # the maps that `region` was taken from
        self.region: LevelMaps | tuple[LevelMaps, LevelMaps] | None = None

    def region_of(self, cells: Halves) -> LevelMaps | tuple[LevelMaps, LevelMaps] | None:
        """Returns the argument `region` of the UNet: the number of the text that each cell attends
        to in each row of this part, (rows,h*w) for each attention grid. A row is one image with the
        texts of one pass.

        `cells` holds the numbers for all passes of the collage and all images, (passes,B,h*w) or
        (passes,1,h*w) for each grid. If `cells` is empty, attention is not masked, and the result
        is None. The latest result is cached, and returned again if the same object `cells` is
        given.
        """
        if cells is not self.cells:
            rows = [{grid: self._chosen(maps) for grid, maps in half.items()} for half in cells]
            self.region = (rows[0], rows[1]) if len(rows) == 2 else next(iter(rows), None)
            self.cells = cells
        return self.region

    def _chosen(self, maps: Tensor) -> Tensor:
        if maps.shape[1] == 1:
            return maps[self.pass_of_row, 0]
        return maps[self.pass_of_row, self.image]


class _Rows:
    """Runs the UNet for all passes of a collage and all images of a batch. The constructor's
    argument `rows` lists (texts, pass number) pairs, conditional and unconditional ones. Each pair
    gives one row of the UNet's batch per image. As many rows run at once as memory allows. The
    cross-attention keys and values of the texts are computed at the first step and kept."""

    def __init__(self, sd: Model, rows: Sequence[Row], size: Grid, adapters: Adapters | None):
        self.sd = sd
        self.passes = [k for _, k in rows]
        self.adapters = Adapters() if adapters is None else adapters
        self.known: dict[int, list[_Part]] = {}  # by number of images
        # With adapters a text's states may differ from pass to pass.
        keys = [[(text, 0 if adapters is None else k) for text in texts] for texts, k in rows]
        unique = sorted({key for row in keys for key in row})
        with self.adapters.rows([k for _, k in unique]):
            states = dict(zip(unique, sd.encode_prompt([text for text, _ in unique])))
        context = torch.stack([torch.stack([states[key] for key in row]) for row in keys])
        self.context = (
            context if context.shape[1] > 1 else context[:, 0]
        )  # (rows, R, 77, D), or (rows, 77, D)
        images = sd.batch_size(CELL * size[0], CELL * size[1])  # two rows each
        at_once = ROWS_AT_ONCE // (size[0] * size[1]) if sd.device.type == "cpu" else 0
        self.limit = max(2 * images, at_once)

    def parts(self, n: int) -> list[_Part]:
        """Returns the UNet evaluations into which a batch of n images is split. Its rows, one per
        image and item of the constructor's argument `rows`, may not all fit into memory at once."""
        if n not in self.known:
            device = self.sd.device
            with self.adapters.rows(self.passes):
                text_kv = self.sd.unet.text_kv(self.context)
            self.known = {n: []}
            for part in torch.arange(len(self.context) * n).split(self.limit):
                row = part // n
                index = row.to(device)
                kv = {layer: (k[index], v[index]) for layer, (k, v) in text_kv.items()}
                passes = [self.passes[k] for k in row.tolist()]
                self.known[n].append(_Part(passes, (part % n).tolist(), kv, device))
        return self.known[n]

    def __call__(self, x: Tensor, t: int | float, cells: Halves) -> Tensor:
        """Returns the noise predicted for latents x (B,4,h,w) at timestep t, (R,B,4,h,w): one
        prediction per image for each of the R (texts, pass number) pairs in the constructor's
        argument `rows`.

        `cells` holds the number of the text that every cell attends to in each pass, (passes,B,h*w)
        or (passes,1,h*w) for each attention grid. It is an empty list if each pair has a single
        text.
        """
        out = []
        for part in self.parts(len(x)):
            latents = x[part.image]
            with self.adapters.rows(part.passes):
                output = self.sd.unet(latents, t, part.text_kv, region=part.region_of(cells))
            out.append(eps_from_output(output, latents, t, self.sd.schedule))
        return torch.cat(out).unflatten(0, (len(self.context), len(x)))
