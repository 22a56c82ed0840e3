"""The UNet's attention (Vaswani et al. 2017), and the recorder that collects its attention maps.

Layers that record nothing call PyTorch's fused attention and store no probabilities. Layers at the
recorder's resolution also return their attention map, averaged over heads; per-head maps are never
stored (see minsd/kernels).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minsd.kernels import Linear, attention, linear

KV = tuple[Tensor, Tensor]  # keys and values, each (B, M, heads, d)


class AttentionRecorder:
    """Collects the attention maps of a UNet at one resolution, averaged over heads and layers.
    After `unet(x, t, context, record=r)`, the cross-attention `r.cross` is (B,h,w,M) for M text
    positions, and the self-attention `r.self` is (B,h,w,h*w). Row [b,i,j] of a map is the softmax
    for the query at cell (i,j). The maps are float32 (float64 in a float64 network) and
    differentiable.

    `r.cross_layers` and `r.self_layers` list the maps of single layers, averaged over heads only,
    in the order in which the layers run: (B,h*w,M) and (B,h*w,h*w).

    `resolution` is (rows, columns) of cells. If it is None, the recorder chooses the coarsest level
    whose shorter side has at least 16 cells and that has more than one transformer block: 16x16 for
    SD1.x at 512x512. If there is no such level, it chooses the finest one with a transformer block.
    With `only`, the UNet stops after the last layer that records, and returns None. `kinds` lists
    what to record: "cross", "self" or both. Each UNet call discards the earlier maps, so a recorder
    can be used again.
    """

    resolution: tuple[int, int]  # set by `begin`
    total: int  # number of transformer blocks at this resolution

    def __init__(
        self,
        resolution: tuple[int, int] | None = None,
        *,
        only: bool = False,
        kinds: Sequence[str] = ("cross", "self"),
    ):
        self.wanted = resolution
        self.only = only
        self.kinds = frozenset(kinds)
        self.cross_layers: list[Tensor] = []
        self.self_layers: list[Tensor] = []

    def begin(self, grids: list[tuple[int, int]], counts: list[int]) -> None:
        """Chooses the resolution to record and discards earlier maps. The UNet calls this method
        before its first layer.

        `grids` lists the grid of cells (rows, columns) of each UNet level, the finest first.
        `counts` lists how many transformer blocks each level has. Raises ValueError if the
        constructor was given a resolution that no level with a transformer block has.
        """
        levels = [level for level, n in enumerate(counts) if n]
        if self.wanted is None:
            # Levels with a single layer are avoided: one layer gives a poor mean, and SD's coarsest
            # level has only the middle block.
            large = [level for level in levels if min(grids[level]) >= 16 and counts[level] > 1]
            self.resolution = grids[large[-1] if large else levels[0]]
        else:
            h, w = self.wanted
            self.resolution = (h, w)
            offered = [grids[level] for level in levels]
            if self.resolution not in offered:
                names = ", ".join(f"{rows}x{columns}" for rows, columns in offered)
                raise ValueError(f"no attention layer works on {h}x{w} cells; choose from {names}")
        self.total = sum(n for n, grid in zip(counts, grids) if grid == self.resolution)
        self.cross_layers = []
        self.self_layers = []

    def wants(self, grid: tuple[int, int] | None, is_cross: bool) -> bool:
        """Returns True if an attention layer must record its map. This is so if the layer's queries
        are cells at the recorder's resolution, and its kind of attention is one of the recorder's
        `kinds`. `grid` is the layer's grid of cells (rows, columns), or None if unknown; without a
        grid the layer never records. `is_cross` is True for cross-attention, False for
        self-attention."""
        return grid == self.resolution and ("cross" if is_cross else "self") in self.kinds

    @property
    def done(self) -> bool:
        """Returns True if the UNet may stop now: the recorder was made with `only` (attention maps
        are all that is wanted), and every layer that records has run."""
        layers = self.cross_layers if "cross" in self.kinds else self.self_layers
        return self.only and len(layers) == self.total

    def _mean(self, maps: list[Tensor]) -> Tensor:
        """Averages the attention maps (B,h*w,...) of several layers. Returns (B,h,w,...). Raises
        ValueError if `maps` is empty, that is, before the first UNet call with this recorder."""
        if not maps:
            raise ValueError("nothing is recorded yet: call unet(x, t, context, record=recorder) first")
        return (sum(maps[1:], maps[0]) / len(maps)).unflatten(1, self.resolution)

    @property
    def cross(self) -> Tensor:
        """Returns the cross-attention map, averaged over heads and layers: (B,h,w,M) for M text
        positions. Raises ValueError before the first UNet call with this recorder."""
        return self._mean(self.cross_layers)

    @property
    def self(self) -> Tensor:
        """Returns the self-attention map, averaged over heads and layers: (B,h,w,h*w). Raises
        ValueError before the first UNet call with this recorder."""
        return self._mean(self.self_layers)


class Attention(nn.Module):
    """Multi-head attention of image cells to one another (self-attention) or to a text
    (cross-attention). `dim` is the number C of channels of the cells. `context_dim` is the width D
    of the text states, or None for self-attention."""

    # The function that computes attention. The training of the embedded model replaces it with one
    # that is faster where weights need gradients.
    attend: Callable[..., tuple[Tensor, Tensor | None]] = staticmethod(attention)

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.is_cross = context_dim is not None
        self.backend = "auto"
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.fused: Tensor | None = None

    def fuse(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Places the weights of a self-attention layer for queries, keys and values in one buffer,
        so that one matrix product computes all three. Does nothing in a cross-attention layer,
        whose keys and values are computed only once per text.

        The weights keep their names and become views of the buffer. So a loader or an adapter that
        writes into the weights writes into the buffer. Use this method for frozen weights only,
        because gradients would not reach the buffer.

        If the layer is on the meta device, the buffer is made on `device` in `dtype`, without
        values, which are filled in when the weights are loaded. Otherwise both arguments are
        ignored.
        """
        if self.is_cross:
            return
        layers = (self.to_q, self.to_k, self.to_v)
        weights = [layer.weight.detach() for layer in layers]
        if weights[0].is_meta:
            fused = torch.empty(sum(map(len, weights)), weights[0].shape[1], device=device, dtype=dtype)
        else:
            fused = torch.cat(weights)
        for layer, weight in zip(layers, fused.chunk(len(layers))):
            layer.weight = nn.Parameter(weight, requires_grad=False)
        self.fused = fused

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)  # .to() moves each weight separately, so fuse again
        if self.fused is not None:
            self.fuse()
        return self

    def kv(self, context: Tensor) -> KV:
        """Returns (keys, values) for the text states `context`. For one text of M positions per
        image, `context` is (B,M,D) and keys and values are (B,M,heads,d). For R texts per image,
        `context` is (B,R,M,D) and they are (B,R,M,heads,d).

        They are the same at every denoising step, so compute them once (`UNet.text_kv`).
        """
        k = self.to_k(context)
        v = self.to_v(context)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def project(self, x: Tensor, context: Tensor | KV | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (q, k, v), the queries (B,N,heads,d) for N image cells x (B,N,C), and keys and
        values (B,M,heads,d). `context` states what keys and values are made from: None for x itself
        (self-attention, M = N), text states (B,M,D), or the (keys, values) that `kv` has made from
        text states."""
        if context is None and self.fused is not None:
            parts = linear(x, self.fused).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in parts)
            return q, k, v
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        if isinstance(context, tuple):
            return q, *context
        return q, *self.kv(x if context is None else context)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KV | None = None,
        *,
        grid: tuple[int, int] | None = None,
        record: AttentionRecorder | None = None,
        region: Tensor | None = None,
    ) -> Tensor:
        """Computes attention for x (B,N,C), the N cells of `grid` (rows, columns). Returns (B,N,C).

        `context` is None for self-attention. For cross-attention it is text states (B,M,D), or the
        (keys, values) that `kv` has made from them. If `record` is given, and wants maps of this
        resolution and this kind of attention, the layer adds its attention map to it.

        With `region` (B,N), integers, `context` holds R texts per image (B,R,M,D), and cell n of
        row b attends to one of them only, the text with the number region[b,n].
        """
        q, k, v = self.project(x, context)
        if record is not None and not record.wants(grid, self.is_cross):
            record = None
        # `region` is passed only if there is one, because replacements of `attend` may lack it.
        options = {} if region is None else {"region": region}
        probs = None if record is None else "mean"
        out, maps = self.attend(q, k, v, probs=probs, backend=self.backend, **options)
        if record is not None and maps is not None:
            layers = record.cross_layers if self.is_cross else record.self_layers
            layers.append(maps)  # (B, N, M)
        return self.to_out[0](out.flatten(2))  # out: (B, N, heads, d)
