"""`block_attend` by its definition: the dense mask and the whole score matrix. For small sizes; plain autograd."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.attend.reference import reference_attention
from saccade.types import BlockLayout


def reference_block_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None, workspace: int
) -> tuple[Tensor, Tensor]:
    """Out and lse; `workspace` is not honoured, all M x N pairs are there at once."""
    return reference_attention(q, k, v, layout.to_dense(), scale=scale, softcap=softcap)
