"""`block_attend` by its definition: the dense mask and the whole score matrix. For small sizes; plain autograd."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.attend.reference import reference_attention
from saccade.types import BlockLayout


def reference_block_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    softcap: float | None,
    workspace: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Out and lse; all M x N pairs are there at once, whatever `workspace` says."""
    return reference_attention(q, k, v, layout.to_dense(), scale=scale, softcap=softcap)
