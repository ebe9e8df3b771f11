"""`saccade::decode_attend` as a `torch.library` operator. There is no backward: a cache is not trained through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend.operator import no_autocast
from saccade.ops.checks import accumulation_dtype
from saccade.ops.decode_attend import eager, native
from saccade.ops.straight import is_plain
from saccade.types import KVPages

FORWARDS = {"cpu": native.forward, "eager": eager.forward}

NO_BACKWARD = "decode_attend has no backward: use attend, on the keys and values themselves"


def _decode_attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    k_zero: Tensor | None, v_zero: Tensor | None, left: int, right: int, softcap: float | None, scale: float,
    workspace: int, impl: str, slots: Tensor | None = None, key_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cache = KVPages(k, v, table, lengths, k_scale, v_scale, k_zero, v_zero, key_table)
    cache.validate()
    with no_autocast(q.device):
        out, lse = FORWARDS[impl](q, cache, left, right, softcap, scale, workspace, slots)
    return out.contiguous(), lse.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    value_dim = v.shape[2] * (2 if v.dtype == torch.uint8 else 1)
    return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _backward(ctx: Any, *grads: Tensor | None) -> Any:  # noqa: ARG001
    raise RuntimeError(NO_BACKWARD)


decode_attend_op = torch.library.custom_op(
    "saccade::decode_attend",
    _decode_attend,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? k_zero, Tensor? v_zero, int left, int right, float? softcap, float scale, int workspace, str impl, "
    "Tensor? slots=None, Tensor? key_table=None) "
    "-> (Tensor, Tensor)",
)
decode_attend_op.register_fake(_fake)
decode_attend_op.register_autograd(_backward)


def run(
    q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float, workspace: int, impl: str,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator on a `KVPages`."""
    call = (
        q, cache.k, cache.v, cache.table, cache.lengths, cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero,
        left, right, softcap, scale, workspace, impl, slots, cache.key_table,
    )  # fmt: skip
    return (_decode_attend if is_plain(*call) else torch.ops.saccade.decode_attend)(*call)


__all__ = ["decode_attend_op", "run"]
