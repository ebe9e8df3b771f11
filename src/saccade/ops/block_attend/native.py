"""The C++ engine over a `BlockLayout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.types import BlockLayout


def native_refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    if 0 in call["q"].shape or 0 in call["k"].shape or call["v"].shape[3] == 0:
        return "the problem is empty"
    return unusable(call["q"])


def native_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None,
    workspace: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `eager_forward`; its temporaries are a few tiles per thread."""
    return cpu.attention(q, k, v, scale=scale, softcap=softcap, layout=layout)
