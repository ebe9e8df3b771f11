"""HyperAttention: queries and keys that hash alike meet in blocks, and sampled keys stand for all others."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, SELF_PATTERNS, Selector, require, require_pattern
from saccade.ops import attend, block_attend, merge
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, TokenIndex


class Squares(NamedTuple):
    """All squares of one size on the causal recursion's level, or the one that is everything."""

    size: int | None
    """Queries and keys of a square; None: no recursion, all queries and all keys."""
    rows: Tensor
    """Queries in the order of their hashes, int64 `[B * squares, H, size]`."""
    columns: Tensor
    """Keys likewise, `[B * squares, G, size]`."""
    height: int
    """Queries of a block."""


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """At N = 2048 about 13, 22, 36 and 56 % of the causal area; on SmolLM2 samples buy more than blocks."""
    return tuple(
        {"min_tokens": max(2 * n // part, 2), "block": max(n // (4 * part), 1), "samples": max(n // part, 1)}
        for part in (64, 32, 16, 8)
    )


@register(
    "hyper_attention",
    Kind.SELECTOR,
    summary="Blocks of queries and keys sorted by a hash, plus uniformly sampled keys that stand for the rest.",
    papers=("HyperAttention: Long-context Attention in Near-Linear Time",),
    year=2023,
    code="insuhan/hyper-attn",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "a query's block depends on how many others of its half hash below it, later ones too, and where the halves "
        "lie depends on the length of the prompt"
    ),
    training_free=True,
    exact_when="min_tokens > N",
    complexity="N log N",
    deviations=(
        (
            "Hashes are sorted so that neighbouring buckets differ in one bit, as the paper has it; the authors' code "
            "applies the Gray code where its inverse is meant."
        ),
        (
            "Hash directions and samples are drawn from `seed`, the same for all heads; the authors draw directions "
            "once for each layer, and samples anew for each head and call."
        ),
        (
            "Keys sampled from a query's own block are hidden, as the paper and the authors' half-precision path have "
            "it; their fp32 and CUDA paths count them twice. Padding has no part in anything; theirs is zeros, which "
            "are sorted and attended to."
        ),
        "All chunks of the recursion are as long as the first; the authors halve odd lengths one by one.",
        (
            "`select` gives the pairs that are computed exactly, as lists: for pictures and laws. A call sorts tokens "
            "and runs on dense blocks, and adds the samples."
        ),
    ),
    example={"projections": 4, "block": 8, "samples": 8, "min_tokens": 16},
    exact=lambda n: {"min_tokens": n + 2},
    ladder=_ladder,
)
@dataclass(frozen=True)
class HyperAttention(Selector):
    """out_i = (sum_{j in B_i} e_ij v_j + n / m sum_{j in S - B_i} e_ij v_j) / (the same sums of e_ij alone).

    Here e_ij = exp(scale q_i . k_j). A token's hash is the place of its signs on `projections` random directions in
    Gray code. n queries and n keys, both sorted by it, are cut into as many blocks; B_i are the keys of query i's
    block, and S are m = `samples` keys drawn uniformly. When causal, the sequence is halved until a half would be
    shorter than `min_tokens`; what is left is attended to exactly, and the second half of each cut to its first half
    by the rule above.

    Args:
        projections: Bits of the hash.
        block: Keys per block.
        samples: Keys that stand for those outside a query's block; 0 leaves these out.
        min_tokens: Shortest sequences, and halves, that are approximated.
        seed: Of directions and samples; give each layer its own.
    """

    adds = True

    projections: int = 7
    block: int = 256
    samples: int = 256
    min_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.projections <= 30, "projections", self.projections, "between 1 and 30 bits")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        require(self.samples >= 0, "samples", self.samples, "at least 0 tokens")
        require(self.min_tokens >= 2, "min_tokens", self.min_tokens, "at least 2 tokens")
        require(0 <= self.seed < 2**31, "seed", self.seed, "a number in [0, 2^31)")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> TokenIndex:
        """The pairs that are computed exactly."""
        tokens = q.shape[2]
        chunk, levels = self._plan(q, k, geometry.causal)
        places = torch.arange(tokens, device=q.device)
        near = places[:, None] // max(chunk, 1) * chunk + torch.arange(min(chunk, tokens), device=q.device)
        hidden = (near > places[:, None]) if geometry.causal else (near >= tokens)
        lists = [near.masked_fill(hidden, -1).expand(*q.shape[:2], -1, -1)]
        lists += [self._listed(level, q.shape[0], q.shape[1], tokens) for level in levels]
        return TokenIndex(torch.cat(lists, -1), tokens, tokens)

    def _plan(self, q: Tensor, k: Tensor, causal: bool) -> tuple[int, list[Squares]]:
        """Tokens of the exact chunks, and what is approximated."""
        tokens = q.shape[2]
        if not causal:
            return (tokens, []) if tokens < self.min_tokens else (0, [self._sort(q, k, None)])
        chunk, halvings = tokens, 0
        while -(-chunk // 2) >= self.min_tokens:
            chunk, halvings = -(-chunk // 2), halvings + 1
        return chunk, [self._sort(q, k, chunk * 2**level) for level in range(halvings)]

    def _pairs(self, tokens: int, chunk: int, levels: list[Squares], causal: bool) -> float:
        """Pairs of a head that are computed, samples included."""
        exact = tokens * ((chunk + 1) / 2 if causal else chunk)
        queries = sum(tokens if level.size is None else tokens / 2 for level in levels)
        return exact + queries * (self.block + self.samples)

    def _sort(self, q: Tensor, k: Tensor, size: int | None) -> Squares:
        """Queries and keys of each square by their hashes; padding goes last."""
        rows, columns = self._hash(q), self._hash(k)
        if size is not None:
            behind = (0, -q.shape[2] % (2 * size))
            rows, columns = (
                _half(pad(rows, behind, value=2**self.projections), size, 1),
                _half(pad(columns, behind), size, 0),
            )
        blocks = max(-(-columns.shape[2] // self.block), 1)
        height = max(-(-rows.shape[2] // blocks), 1)
        return Squares(size, rows.argsort(dim=-1, stable=True), columns.argsort(dim=-1, stable=True), height)

    def _hash(self, x: Tensor) -> Tensor:
        """Place of each token's signs in Gray code, int64 `[B, heads, N]`."""
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(x.shape[3], self.projections, generator=generator, dtype=torch.float64)
        signs = x.to(accumulation_dtype(x.dtype)) @ directions.to(x.device, accumulation_dtype(x.dtype)) > 0
        code = (signs * 2 ** torch.arange(self.projections, device=x.device)).sum(-1)
        for shift in (16, 8, 4, 2, 1):
            code = code ^ (code >> shift)
        return code

    def _listed(self, level: Squares, batch: int, heads: int, tokens: int) -> Tensor:
        """The keys of each query's block, int64 `[B, H, N, block]`, -1 where there are none."""
        rows, columns, size = level.rows, level.columns, level.size
        blocks = -(-columns.shape[2] // self.block)
        keys = pad(columns, (0, blocks * self.block - columns.shape[2]), value=-1).unflatten(2, (blocks, -1))
        keys = keys.repeat_interleave(heads // keys.shape[1], 1)
        mine = (rows.argsort(-1) // level.height)[..., None].expand(*rows.shape, self.block)
        found = keys.gather(2, mine)
        if size is None:
            return found
        first = torch.arange(len(found) // batch, device=found.device).repeat(batch)[:, None, None, None] * 2 * size
        return _whole(torch.where(found < 0, -1, found + first), batch, tokens, -1)

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        started = time.perf_counter()
        chunk, levels = self._plan(q.detach(), k.detach(), geometry.causal)
        if is_recording():
            seconds, tokens = time.perf_counter() - started, q.shape[2]
            density = self._pairs(tokens, chunk, levels, geometry.causal) / max(tokens, 1) ** 2
            record(RunRecord("select", self.card.name, density=density, select_seconds=seconds))
        batch, tokens = q.shape[0], q.shape[2]
        options: dict[str, Any] = {"scale": scale, "return_lse": True, "impl": impl}
        if not geometry.causal:
            out, lse = self._approximate(q, k, v, levels[0], options) if levels else attend(q, k, v, **options)
            return AttentionOutput(out, lse) if return_lse else out
        if not levels:
            exact = attend(q, k, v, causal=True, **options)
            return exact if return_lse else exact.out
        pieces = [_chunks(x, chunk) for x in (q, k, v)]
        out, lse = attend(*pieces, causal=True, **options)
        parts = [tuple(x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :tokens] for x in (out, lse))]
        for level in levels:
            halves = [_half(_padded(x, 2 * level.size), level.size, side) for x, side in ((q, 1), (k, 0), (v, 0))]  # type: ignore[operator,arg-type]
            out, lse = self._approximate(halves[0], halves[1], halves[2], level, options)
            parts.append((_whole(out, batch, tokens, 0.0), _whole(lse[..., None], batch, tokens, -math.inf)[..., 0]))
        merged = merge(parts)  # type: ignore[arg-type]
        return merged if return_lse else merged.out

    def _approximate(self, q: Tensor, k: Tensor, v: Tensor, level: Squares, options: dict[str, Any]) -> Any:
        """All queries to all keys: blocks, and samples for what is outside of them."""
        queries, keys = q.shape[2], k.shape[2]
        q, k, v = _take(q, level.rows), _take(k, level.columns), _take(v, level.columns)
        blocks = -(-queries // level.height)
        diagonal = torch.arange(blocks, device=q.device).view(1, 1, blocks, 1)
        layout = BlockLayout.from_indices(diagonal, queries, keys, (level.height, self.block))
        part: Any = block_attend(q, k, v, layout, **options)
        if self.samples and keys > self.block:
            drawn = torch.randint(keys, (self.samples,), generator=torch.Generator().manual_seed(self.seed + 1))
            drawn = drawn.to(q.device)
            own = torch.arange(queries, device=q.device)[:, None] // level.height == drawn // self.block
            hidden = torch.zeros(own.shape, dtype=q.dtype, device=q.device).masked_fill(own, -math.inf)
            out, lse = attend(q, k[:, :, drawn], v[:, :, drawn], bias=hidden, **options)
            part = merge([part, (out, lse + math.log(keys / self.samples))])
        back = level.rows.argsort(-1)
        return _take(part.out, back), part.lse.gather(2, back)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of `[B, heads, N, C]` in the order `[B, heads, n]`."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`[B, heads, N, C]` with zeros behind up to a multiple of tokens."""
    return pad(x, (0, 0, 0, -x.shape[2] % multiple))


def _chunks(x: Tensor, size: int) -> Tensor:
    """`[B, heads, N, C]` cut into pieces `[B * pieces, heads, size, C]`."""
    return _padded(x, size).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def _half(x: Tensor, size: int, side: int) -> Tensor:
    """First (0) or second (1) halves of the squares of `[B, heads, N, ...]`: `[B * squares, heads, size, ...]`."""
    return x.unflatten(2, (-1, 2, size))[:, :, :, side].transpose(1, 2).flatten(0, 1)


def _whole(x: Tensor, batch: int, tokens: int, fill: float) -> Tensor:
    """Second halves `[B * squares, heads, size, C]` as `[B, heads, N, C]`, `fill` in the first halves."""
    x = x.unflatten(0, (batch, -1)).transpose(1, 2)
    return torch.stack([torch.full_like(x, fill), x], 3).flatten(2, 4)[:, :, :tokens]
