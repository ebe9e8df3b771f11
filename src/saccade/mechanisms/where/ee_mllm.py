"""EE-MLLM's composite attention: visual tokens are keys and values, but ask for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.types import BlockLayout, Geometry, Kind


@register(
    "ee_mllm",
    Kind.SELECTOR,
    summary="Text attends to text and to the image, as before; tokens of the image attend to nothing.",
    papers=("EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",),
    year=2024,
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    exact_when="geometry.grid = None: there are no visual tokens",
    complexity="N^2",
    deviations=(
        (
            "The authors published no code. Visual tokens get no output of the attention, so that only the residual "
            "path and the feed-forward network, which the paper reuses to align them with text, take them on."
        ),
        "The tokens of `geometry.grid` are the visual ones: one image or video per sequence.",
        "The model has to be trained with it, or quality measured; the paper's training-free variant is not built.",
    ),
    example={"block": 16},
    exact=lambda n: {"block": min(64, max(n, 1))},
)
@dataclass(frozen=True)
class CompositeAttention(Selector):
    """Text queries see all keys (the earlier ones, when causal); queries on the grid see none, and their output is 0.

    Args:
        block: Block size of the layout, in tokens.
    """

    block: int = 64

    def __post_init__(self) -> None:
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """The rows of text, whatever the contents."""
        queries, keys = q.shape[2], k.shape[2]
        if geometry.grid is None:
            return BlockLayout.dense(queries, keys, block=self.block, device=q.device)
        cells, text = geometry.grid_tokens or 0, geometry.prefix + geometry.suffix
        expected = f"{cells + text}, the tokens of grid={geometry.grid} with prefix and suffix"
        require(cells + text == keys, "tokens", keys, expected)
        position = torch.arange(keys - queries, keys, device=q.device)
        is_text = (position < geometry.prefix) | (position >= geometry.prefix + cells)
        return BlockLayout.tokens(
            queries, keys, query_tokens=is_text.nonzero()[:, 0], block=self.block, device=q.device
        )  # fmt: skip
