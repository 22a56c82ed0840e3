"""The UNet's attention (Vaswani et al. 2017), and the recorder that asks it where it looked.

Layers that record nothing call PyTorch's fused attention and hold no probabilities. A layer whose query grid is the
recorder's gets `probs="mean"`: the mean over heads only, never all heads (see minsd/kernels).
"""

import torch
from torch import nn

from minsd.kernels import attention
from minsd.kernels.onednn import Linear, linear


class AttentionRecorder:
    """Collects head- and layer-mean attention probabilities at one resolution, differentiably.

    `resolution` is (rows, columns) in cells; by default the coarsest level with cross-attention whose shorter side is
    at least 16 (16x16 for SD1.x at 512x512), or the finest such level where none is that large. With `only`, the UNet
    stops after the last layer that records and returns None. A recorder can be used again: every UNet call starts it
    afresh.

    After `unet(x, t, context, record=r)`: `r.cross` is (B,h,w,M) over the M text positions, `r.self` (B,h,w,h*w),
    both float32; `r.self[b,i,j]` is the softmax row of the query at cell (i,j). `r.cross_layers` and `r.self_layers`
    list each layer's own head mean (B,h*w,...), in the order in which the layers run.
    """

    def __init__(self, resolution: tuple[int, int] | None = None, *, only: bool = False):
        self.wanted, self.only = resolution, only
        self.cross_layers, self.self_layers = [], []

    def begin(self, grids: list[tuple[int, int]], counts: list[int]) -> None:
        """Called by the UNet: the query grid of each level, finest first, and how many transformer blocks work on it."""
        levels = [level for level, n in enumerate(counts) if n]
        if self.wanted is None:
            # Where the middle's single block is all there is (SD's coarsest level), one layer makes a poor mean.
            large = [level for level in levels if min(grids[level]) >= 16 and counts[level] > 1]
            self.resolution = grids[large[-1] if large else levels[0]]
        else:
            self.resolution = tuple(self.wanted)
            if self.resolution not in (offered := [grids[level] for level in levels]):
                names = ", ".join(f"{h}x{w}" for h, w in offered)
                raise ValueError(
                    f"no attention layer works on {self.wanted[0]}x{self.wanted[1]} cells; choose from {names}"
                )
        self.total = sum(n for n, grid in zip(counts, grids) if grid == self.resolution)
        self.cross_layers, self.self_layers = [], []

    def wants(self, grid: tuple[int, int]) -> bool:
        return grid == self.resolution

    @property
    def done(self) -> bool:
        """All layers that record have run and nothing else is wanted: the UNet may stop."""
        return self.only and len(self.cross_layers) == self.total

    def _mean(self, maps: list[torch.Tensor]) -> torch.Tensor:
        if not maps:
            raise ValueError("nothing is recorded yet: call unet(x, t, context, record=recorder) first")
        return (sum(maps[1:], maps[0]) / len(maps)).unflatten(1, self.resolution)

    @property
    def cross(self) -> torch.Tensor:
        return self._mean(self.cross_layers)  # (B, h, w, M)

    @property
    def self(self) -> torch.Tensor:
        return self._mean(self.self_layers)  # (B, h, w, h*w)


class Attention(nn.Module):
    """Multi-head attention of image cells, to one another (`attn1`) or to the text (`attn2`, with `context_dim`)."""

    attend = staticmethod(attention)  # training, whose weights take gradients, has its own

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads, self.is_cross, self.backend = num_heads, context_dim is not None, "auto"
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.fused = None

    def fuse(self, device=None, dtype=None) -> None:
        """Lay the projections that share an input side by side in one buffer, so that one product serves them all.

        The weights stay where they were by name, as views of that buffer: what writes to them (a loader, an adapter)
        writes to it. For frozen weights only: gradients would not find their way back to the views. A module on the
        meta device gets an empty buffer on `device` in `dtype`, to be filled through the weights.
        """
        layers = (self.to_k, self.to_v) if self.is_cross else (self.to_q, self.to_k, self.to_v)
        weights = [layer.weight.detach() for layer in layers]
        if weights[0].is_meta:
            self.fused = torch.empty(sum(map(len, weights)), weights[0].shape[1], device=device, dtype=dtype)
        else:
            self.fused = torch.cat(weights)
        for layer, weight in zip(layers, self.fused.chunk(len(layers))):
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to() moves each weight by itself
        if self.fused is not None:
            self.fuse()
        return self

    def keys(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (B,M,heads,d) of what is looked at, (B,M,D): of a text the same at every step."""
        k, v = (
            (self.to_k(context), self.to_v(context))
            if self.fused is None
            else linear(context, self.fused).chunk(2, dim=-1)
        )
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def project(self, x: torch.Tensor, context):
        """-> q (B,N,heads,d), k and v (B,M,heads,d): views of as few products as the weights allow."""
        if context is None and self.fused is not None:
            return [y.unflatten(-1, (self.num_heads, -1)) for y in linear(x, self.fused).chunk(3, dim=-1)]
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        return q, *(context if isinstance(context, tuple) else self.keys(x if context is None else context))

    def forward(
        self,
        x,
        context=None,
        *,
        grid=None,
        record: AttentionRecorder | None = None,
        region: torch.Tensor | None = None,
    ):
        """x (B,N,C); context (B,M,D) or its `keys`; with `region` (B,N), each cell's text among several, (B,R,M,D)."""
        q, k, v = self.project(x, context)
        recording = record is not None and record.wants(grid)
        more = {} if region is None else {"region": region}
        out, probs = self.attend(
            q, k, v, probs="mean" if recording else None, backend=self.backend, **more
        )  # (B, N, heads, d)
        if recording:
            (record.cross_layers if self.is_cross else record.self_layers).append(probs)  # (B, N, M)
        return self.to_out[0](out.flatten(2))
