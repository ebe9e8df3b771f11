"""Prefix sharing: a prompt once, and several responses to it that do not see each other, in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.types import BlockLayout, Geometry, Kind, Pattern

Lengths = Sequence[Sequence[int]]
"""Of each packed sequence: tokens of the shared prefix, and of each of its branches."""


@register(
    "prefix_sharing",
    Kind.SELECTOR,
    summary="Chosen and rejected responses see their shared prompt, which is computed once, and not each other.",
    papers=("Accelerating Direct Preference Optimization with Prefix Sharing",),
    year=2024,
    code="frankxwang/dpo-prefix-sharing",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    exact_when="lengths = ()",
    complexity="N^2",
    deviations=(
        (
            "One packing for all sequences of a batch; `prefix_layout` builds the layout where each has its own, as "
            "the authors' collator does."
        ),
        "Any number of branches; the paper has two, the authors' code is written for two.",
        "Tokens behind the last packed sequence are one more sequence, plainly causal; the authors have padding there.",
    ),
    example={"lengths": ((2, 2, 1), (1, 1, 1)), "block": 16},
    exact=lambda n: {"lengths": (), "block": 16},  # noqa: ARG005
)
@dataclass(frozen=True)
class PrefixSharing(Selector):
    """Token i sees token j <= i of its own packed sequence if j is in the prefix, or in i's own branch.

    What a branch gives equals what prefix and branch alone give, if tokens have the places of `prefix_positions`: those
    of each branch count on from the end of the prefix.

    Args:
        lengths: Of each packed sequence in turn, the tokens of its prefix and of each branch.
        block: Block size of the layout: changes the work, never the result.
    """

    lengths: tuple[tuple[int, ...], ...] = ()
    block: int = 64

    def __post_init__(self) -> None:
        for row in self.lengths:
            require(len(row) >= 1 and min(row) >= 0, "lengths", row, "a prefix and branches of at least 0 tokens each")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:  # noqa: ARG002  fixed beforehand
        """The pattern of the lengths."""
        return prefix_layout([self.lengths], k.shape[2], queries=q.shape[2], block=self.block, device=q.device)


def prefix_layout(
    lengths: Sequence[Lengths],
    tokens: int,
    *,
    queries: int | None = None,
    block: int = 64,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The causal pattern of packed sequences with shared prefixes.

    Args:
        lengths: For each item of the batch, or for all of them, its packed sequences.
        tokens: N; those behind the last sequence of an item are one more of their own.
        queries: M, the last tokens; None means all.
        block: Block size in tokens.
        device: Of the layout.

    Returns:
        A layout for a batch of `len(lengths)`, the same for all heads.

    Raises:
        ValueError: If an item's sequences are longer than `tokens`.
    """
    sequence, branch = (
        torch.stack(rows).to(device) for rows in zip(*(_ids(row, tokens) for row in lengths), strict=True)
    )
    first = 0 if queries is None else tokens - queries
    past = BlockLayout.window(tokens - first, tokens, -1, 0, block=block, device=device)
    apart = sequence * (int(branch.max()) + 1 if tokens else 1) + branch
    own = past.within(Geometry(q_segments=apart[:, first:], kv_segments=apart))
    prefix = torch.where(branch == 0, sequence, -1)
    return own | past.within(Geometry(q_segments=sequence[:, first:], kv_segments=prefix))


def prefix_positions(lengths: Lengths, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Place of each token in its own response, int64 `[N]`: every branch counts on from the end of its prefix."""
    places = []
    for prefix, *branches in lengths:
        places += [torch.arange(prefix), *(torch.arange(prefix, prefix + count) for count in branches)]
    return torch.cat([*places, torch.arange(tokens - sum(map(len, places)))]).to(device)


def _ids(lengths: Lengths, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each token: number of its packed sequence, and of its branch there (0: prefix), int64 `[N]` each."""
    counts = torch.tensor([count for row in lengths for count in row], dtype=torch.int64)
    used = int(counts.sum())
    require(used <= tokens, "lengths", lengths, f"at most {tokens} tokens, it has {used}")
    counts = torch.cat([counts, torch.tensor([tokens - used])])
    sequence = torch.tensor([number for number, row in enumerate(lengths) for _ in row] + [len(lengths)])
    branch = torch.tensor([number for row in lengths for number in range(len(row))] + [0])
    return sequence.repeat_interleave(counts), branch.repeat_interleave(counts)
