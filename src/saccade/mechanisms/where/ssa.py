"""SSA: trained with sparse and with full attention, whose outputs are drawn together at every layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, Position, require
from saccade.mechanisms.where._blocks import head_scores, largest, mean_pool
from saccade.mechanisms.where._compressed import attend_blocks, past_windows
from saccade.ops import attend
from saccade.types import Kind, Pattern


def alignment_loss(full: Tensor, sparse: Tensor) -> Tensor:
    """Smooth L1 from full to held sparse outputs (sparser attention) and from sparse to held full ones (commitment).

    Args:
        full: Outputs of full attention, any shape.
        sparse: Those of sparse attention, the same shape.

    Returns:
        The sum of the two means, a scalar. The authors add 10 times its mean over the layers to the loss.
    """
    smooth_l1 = nn.functional.smooth_l1_loss
    return smooth_l1(full, sparse.detach()) + smooth_l1(full.detach(), sparse)


@register(
    "ssa",
    Kind.LAYER,
    summary="Gated attention with a sparse and a full mode, and a loss that aligns their outputs in training.",
    papers=("SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space",),
    year=2025,
    code="zhenyi4/ssa",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "streaming"}),
    exact_when="topk >= N / block",
    complexity="N^2",
    deviations=(
        "`forward` has one mode; choosing one at random for each training step, for all layers alike, is the model's.",
    ),
    example={"dim": 16, "heads": 4, "kv_heads": 2, "block": 4, "topk": 3},
)
class SSA(Layer):
    """o_i = sigmoid(W_g x_i) Attention(q_i, K, V), then a projection; attention is full or to `topk` blocks.

    A block's score is the sum, over the query heads of a key/value head, of softmax(q_i . mean(k_j for j in block) /
    sqrt(D)) over the blocks that end at or before the query; its own is always kept. Gate and weights serve both modes.

    In training, take `aligned(x, mode)` with a mode drawn with equal chance for each step: the output of that mode, and
    the loss between both.

    Args:
        dim: Channels C, in and out.
        heads: Query heads H.
        kv_heads: Key/value heads G; None means `heads`. The query heads of one share their choice.
        head_dim: D of each head; None means dim / heads.
        block: Keys per block.
        topk: Blocks a query attends to, its own included.
        mode: What `forward` computes.
        positions: Encodes queries and keys (for example RoPE); None leaves them as they are.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 16,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int = 16,
        topk: int = 16,
        mode: Literal["sparse", "full"] = "sparse",
        positions: Position | None = None,
    ) -> None:
        super().__init__()
        require(heads >= 1, "heads", heads, "at least 1")
        groups = heads if kv_heads is None else kv_heads
        require(groups >= 1 and heads % groups == 0, "kv_heads", kv_heads, f"a divisor of heads={heads}")
        size = dim // heads if head_dim is None else head_dim
        require(dim >= 1 and (head_dim is not None or dim % heads == 0), "dim", dim, f"a multiple of heads={heads}")
        require(size >= 1, "head_dim", head_dim, "at least 1 channel")
        require(block >= 1, "block", block, "at least 1 token")
        require(topk >= 1, "topk", topk, "at least 1 block, the query's own")
        require(mode in ("sparse", "full"), "mode", mode, "'sparse' or 'full'")
        self.dim, self.heads, self.groups = dim, heads, groups
        self.block, self.topk, self.mode = block, topk, mode
        self.positions = positions
        self.query = nn.Linear(dim, heads * size, bias=False)
        self.key = nn.Linear(dim, groups * size, bias=False)
        self.value = nn.Linear(dim, groups * size, bias=False)
        self.gate = nn.Linear(dim, heads, bias=False)
        self.projection = nn.Linear(heads * size, dim, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`, in the layer's mode."""
        (x,) = inputs
        return self._project(self._attention(*self._heads(x), self.mode))

    def aligned(self, x: Tensor, mode: str | None = None) -> tuple[Tensor, Tensor]:
        """The output of one mode, and the alignment loss between both.

        Args:
            x: `[B, N, C]`.
            mode: "sparse" or "full"; None means the layer's.

        Returns:
            `[B, N, C]` and a scalar.
        """
        chosen = self.mode if mode is None else mode
        require(chosen in ("sparse", "full"), "mode", mode, "None, 'sparse' or 'full'")
        heads = self._heads(x)
        outputs = {name: self._attention(*heads, name) for name in ("sparse", "full")}
        return self._project(outputs[chosen]), alignment_loss(outputs["full"], outputs["sparse"])

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and gates `[B, H, N, 1]`."""
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected [B, N, {self.dim}]")
        q, k, v, gate = (
            layer(x).unflatten(2, (heads, -1)).transpose(1, 2)
            for layer, heads in (
                (self.query, self.heads), (self.key, self.groups), (self.value, self.groups), (self.gate, self.heads),
            )
        )  # fmt: skip
        if self.positions is not None:
            places = torch.arange(x.shape[1], device=x.device)
            q, k = self.positions.encode(q, places), self.positions.encode(k, places)
        return q, k, v, gate.sigmoid()

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mode: str) -> Tensor:
        """Gated attention `[B, H, N, D]`."""
        if mode == "full":
            return gate * attend(q, k, v, causal=True)
        return gate * attend_blocks(q, k, v, self._choose(q.detach(), k.detach()), self.block, self.topk)

    def _choose(self, q: Tensor, k: Tensor) -> Tensor:
        """Blocks that each query attends to, bool `[B, G, N, blocks]`."""
        tokens = q.shape[2]
        pooled = mean_pool(k, self.block)
        places = torch.arange(tokens, device=q.device)
        hidden = ~past_windows(places, pooled.shape[2], self.block, self.block)
        scores = head_scores(q.to(pooled.dtype), pooled) * q.shape[3] ** -0.5
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        weights = weights.unflatten(1, (self.groups, -1)).sum(2)
        block, own = torch.arange(pooled.shape[2], device=q.device), (places // self.block)[:, None]
        weights = weights.masked_fill(block == own, float("inf")).masked_fill(block > own, -float("inf"))
        return largest(weights, self.topk) & (block <= own)

    def _project(self, out: Tensor) -> Tensor:
        """Heads `[B, H, N, D]` to tokens `[B, N, C]`."""
        return self.projection(out.transpose(1, 2).flatten(2))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Two dozen tokens and one of the example's channels."""
        return (torch.randn(batch, 25, 16, generator=generator).to(device, dtype),)
