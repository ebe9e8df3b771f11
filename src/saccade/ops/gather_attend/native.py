"""`gather_attend` on the C++ engine: keys are read in place, each once for all the queries that share a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.ops.gather_attend.eager import Lists, check_range
from saccade.types import Boxes


def refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    if isinstance(call["index"], Boxes):
        if call["softcap"] is not None:
            return "softcap is not in the C++ engine's boxes"
        return "the problem is empty" if 0 in call["q"].shape or call["v"].shape[3] == 0 else unusable(call["q"])
    tensors = (call["q"], call["k"], call["v"], call["index"].indices)
    if any(0 in x.shape for x in tensors):
        return "the problem is empty"
    return unusable(call["q"])


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: Lists) -> tuple[Tensor, Tensor]:
    """As `eager.forward`; poison it keeps apart by itself."""
    group = min(lists.group, lists.queries)
    if cpu.gathers(q, k.shape[1], v.shape[3], lists.indices, group, lists.causal):
        return cpu.gathering(
            q, k, v, lists.indices, scale=lists.scale, group=group, causal=lists.causal, softcap=lists.softcap,
            sinks=sinks,
        )  # fmt: skip
    check_range(lists.indices, lists.keys)
    out, lse = cpu.decoding(
        q, k, v, scale=lists.scale, right=0 if lists.causal else -1, softcap=lists.softcap, lists=lists.indices,
        group=group,
    )  # fmt: skip
    if sinks is not None:
        joint = torch.logaddexp(lse, sinks.float()[:, None])
        out = out * torch.exp(lse - joint.masked_fill(joint == -torch.inf, 0.0))[..., None]
        lse = joint
    return out.to(q.dtype), lse
