"""Combiner: near tokens are attended to directly, all others through summaries of their regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Mixer, require
from saccade.ops import attend, gather_attend, merge
from saccade.types import AttentionOutput, Kind, TokenIndex


@register(
    "combiner",
    Kind.MIXER,
    summary="Direct attention to own segment and, in the same softmax, to summaries that stand for all other regions.",
    papers=("Combiner: Full Attention Transformer with Sparse Computation Cost",),
    year=2021,
    code="google-research/google-research",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa"}),
    exact_when='form = "fixed", segment >= N',
    complexity="N^1.5",
    deviations=(
        (
            "The forms fixed and logsparse; the axial ones (mixtures of rows and columns of an image) are not built, "
            "and neither are learned poolings (the authors' deepset)."
        ),
        (
            "When not causal, a segment's own summary is not attended to beside its tokens, so that each token counts "
            "once, as in the paper; the authors' code adds it."
        ),
        "segment=None is the power of two next above sqrt(N); the authors' segments are a setting that divides N.",
        "No dropout on the weights.",
    ),
    example={"form": "fixed"},
    exact=lambda n: {"form": "fixed", "segment": max(n, 1)},
)
@dataclass(frozen=True)
class Combiner(Mixer):
    """out_i = softmax([q_i . k_j over direct j, q_i . K_r over regions r] / sqrt(D)) [v_j, V_r].

    Direct tokens and regions split all that token i sees, so that the weights are those of one distribution. A region r
    has K_r = pool(k_j in r) and V_r = softmax(Q_r . k_j / sqrt(D)) v_j, Q_r = pool(q_j in r): an attention of its own.

    - *fixed*: direct are the tokens of i's segment, regions are the other segments (those before it when causal).
    - *logsparse*, causal only: direct is token i alone, regions are the runs of 2^l tokens that the binary digits of i
      cut what is before it into, the shorter the nearer. A run of one token is that token.

    Args:
        form: Which.
        segment: Tokens of a segment of the fixed form; None grows with sqrt(N).
        pool: Over the tokens of a region, channel by channel.
    """

    form: Literal["fixed", "logsparse"] = "fixed"
    segment: int | None = None
    pool: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        require(self.form in ("fixed", "logsparse"), "form", self.form, "'fixed' or 'logsparse'")
        require(self.segment is None or self.segment >= 1, "segment", self.segment, "at least 1 token, or None")
        require(self.segment is None or self.form == "fixed", "segment", self.segment, "None with form='logsparse'")
        require(self.pool in ("max", "mean"), "pool", self.pool, "'max' or 'mean'")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, None]:  # noqa: ARG002
        """As many queries as keys."""
        queries, keys = q.shape[2], k.shape[2]
        if queries != keys:  # a text made of sizes for `require` would fix them when this is traced
            raise ValueError(f"queries={queries}: expected {keys}, as many as keys: regions are pooled from both")
        require(causal or self.form == "fixed", "form", self.form, "'fixed' unless causal")
        if keys == 0:
            return v.new_zeros(*q.shape[:3], v.shape[3]), None
        return (self._fixed(q, k, v, causal) if self.form == "fixed" else self._logsparse(q, k, v)), None

    def _fixed(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Own segment, and the summaries of the others."""
        batch, heads, tokens, _ = q.shape
        size = _next_root(tokens) if self.segment is None else min(self.segment, tokens)
        pieces = [_cut(x, size) for x in (q, k, v)]
        hidden = _padding(tokens, size, batch, q.device)
        inside: Any = attend(*pieces, causal=causal, q_segments=hidden, kv_segments=hidden, return_lse=True)
        near = AttentionOutput(*(_joined(x, batch)[:, :, :tokens] for x in inside))
        own = torch.arange(tokens, device=q.device)[:, None] // size
        region = torch.arange(-(-tokens // size), device=q.device)
        bias = torch.zeros(tokens, len(region), dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(region >= own if causal else region == own, -torch.inf)
        far: Any = attend(q, *self._summaries(pieces, hidden, batch, heads), bias=bias, return_lse=True)
        return merge([near, far]).out

    def _logsparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each token itself and one run for each binary digit of its place, gathered from all runs."""
        batch, heads, tokens, _ = q.shape
        share = heads // k.shape[1]
        keys, values = [k.repeat_interleave(share, 1)], [v.repeat_interleave(share, 1)]
        place = torch.arange(tokens, device=q.device)
        lists, first, size = [place, torch.where(place % 2 == 1, place - 1, -1)], tokens, 2
        while size < tokens:
            runs = tokens // size
            pieces = [_cut(x[:, :, : runs * size], size) for x in (q, k, v)]
            for parts, found in zip((keys, values), self._summaries(pieces, None, batch, heads), strict=True):
                parts.append(found)
            lists.append(torch.where(place // size % 2 == 1, first + place // size - 1, -1))
            first, size = first + runs, 2 * size
        index = TokenIndex(torch.stack(lists, -1)[None, None], tokens, first)
        return gather_attend(q, torch.cat(keys, 2), torch.cat(values, 2), index)

    def _summaries(
        self, pieces: list[Tensor], segments: Tensor | None, batch: int, heads: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of regions, `[B, H, regions, .]` each, from their tokens `[B * regions, heads, size, .]`."""
        q, k, v = pieces
        asked, key = (self._pooled(x, segments) for x in (q, k))
        options: dict[str, Any] = {} if segments is None else {"q_segments": segments[:, :1], "kv_segments": segments}
        value = attend(asked, k, v, **options)
        key = key.repeat_interleave(heads // k.shape[1], 1)
        return _joined(key, batch), _joined(value, batch)

    def _pooled(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """Over the real tokens of `[B * regions, heads, size, C]`, kept as one token."""
        if segments is None:
            return x.amax(2, keepdim=True) if self.pool == "max" else x.mean(2, keepdim=True)
        real = (segments >= 0)[:, None, :, None]
        if self.pool == "max":
            return x.masked_fill(~real, torch.finfo(x.dtype).min).amax(2, keepdim=True)
        return x.sum(2, keepdim=True) / real.sum(2, keepdim=True)  # padding is zeros


def _next_root(tokens: int) -> int:
    """The power of two next to sqrt(N), not below it."""
    size = 1
    while size * size < tokens:
        size *= 2
    return size


def _cut(x: Tensor, size: int) -> Tensor:
    """`[B, heads, N, C]` in pieces of `size` tokens, zeros behind: `[B * pieces, heads, size, C]`."""
    return pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def _joined(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_cut`, padding included, for `[B * pieces, heads, size, ...]`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _padding(tokens: int, size: int, batch: int, device: torch.device) -> Tensor | None:
    """Segment ids `[B * pieces, size]` that hide what `_cut` adds; None if it adds nothing."""
    if tokens % size == 0:
        return None
    place = torch.arange(-(-tokens // size) * size, device=device)
    return torch.where(place < tokens, 0, -1).view(-1, size).repeat(batch, 1)
