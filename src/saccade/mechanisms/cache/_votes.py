"""Prompts compressed by the votes of an observation window: what SnapKV, PyramidKV, Ada-KV and TOVA share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS, is_few
from saccade.ops.checks import accumulation_dtype, resolve_scale

PROTOCOLS = (
    "One choice per key/value head: the votes of its query heads are added, then pooled. The authors expand "
    "grouped-query attention away and let each query head keep its own tokens, which saves no memory there."
)
"""Deviation of every policy that compresses prompts."""


@dataclass(frozen=True)
class PromptCompression(CachePolicy):
    """After a prompt keep its last tokens, the window, and of the earlier ones those that the window attends to most.

    A token's votes are the softmax attention it receives from the window's queries, added over them and over the query
    heads that share its key; they are pooled over neighbours, as tokens count with their context. Prompts of at most
    `tokens` tokens stay whole; what is decoded after the prompt is kept.

    What the prompt is decides the protocol. *Question-aware*: the question ends the prompt, so the window is the
    question's and keeps what answers it. *Question-agnostic*: the context alone is the prompt, the question comes in a
    later call and reads what was kept for no question in particular; one cache then serves many. With `prompt=None`
    the first call is the prompt, whatever follows it: pass context and question together, or one after the other. With
    a number the votes of calls that share a prompt add up, so that a prompt in chunks is compressed as one fed whole.

    Args:
        tokens: Kept of a prompt per key/value head, the window included.
        window: Last tokens of the prompt, which vote and stay.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        pooling: "mean", with zeros beyond the ends, or "max".
        prompt: Tokens of each sequence's prompt, padding not counted; None for all of the first call.
    """

    tokens: int = 2048
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    prompt: int | None = None
    stats: ClassVar[tuple[str, ...]] = ("votes",)

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "at least 1 token")
        require(self.tokens > self.window, "tokens", self.tokens, f"more than window={self.window}")
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", self.kernel, "an odd number, at least 1")
        require(self.pooling in ("mean", "max"), "pooling", self.pooling, "'mean' or 'max'")
        require(self.prompt is None or self.prompt >= 1, "prompt", self.prompt, "at least 1 token, or None")

    @abstractmethod
    def budgets(self, votes: Tensor, prompt: Tensor, step: Step) -> Tensor:
        """Tokens to keep beside the window.

        Args:
            votes: `[B, G, n]`, pooled; -inf for slots that are not to choose from.
            prompt: int64 `[B]`, tokens of the prompts.
            step: Says which layer runs.

        Returns:
            int64 `[B, 1 or G]`.
        """

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """Collect votes; at the end of the prompt keep the window, the best, and what came after the prompt."""
        prompt = prompt_of(self.prompt, q, store)
        if prompt is None:
            return None
        new = window_votes(q, store, step.scale, prompt - self.window, prompt)
        if new is not None:
            store.set_stat("votes", store.stat("votes") + new)
        ready = complete(prompt, store) & (prompt > self.tokens)
        if not bool(ready.any()):
            return None
        positions = store.positions
        choice = (positions >= 0) & (positions < (prompt - self.window)[:, None, None])
        votes = pooled(store.stat("votes").masked_fill(~choice, 0.0), self.kernel, self.pooling)
        votes = votes.masked_fill(~choice, -torch.inf)
        return best(votes, self.budgets(votes, prompt, step)) | ~choice | ~ready[:, None, None]


def prompt_of(setting: int | None, q: Tensor, store: KVStore) -> Tensor | None:
    """The prompts that a call belongs to.

    Args:
        setting: Tokens of each prompt; None for all of the first call.
        q: `[B, H, M, D]`, the queries of the last M tokens.
        store: With these tokens.

    Returns:
        Their tokens, int64 `[B]`; None if the call belongs to none.
    """
    before = store.seen - q.shape[2]  # below 0 by as much as the call was padded
    if setting is not None:
        return torch.full_like(before, setting) if bool((before < setting).any()) else None
    return store.seen if bool((before <= 0).all()) else None


def complete(prompt: Tensor, store: KVStore) -> Tensor:
    """Whether all of a prompt has come and nothing of it has gone, bool `[B]`."""
    return (store.lengths == store.seen[:, None]).all(1) & (store.seen >= prompt)


def pooled(votes: Tensor, kernel: int, pooling: str) -> Tensor:
    """Mean, with zeros beyond the ends, or maximum of each `kernel` neighbours of `[B, G, n]`."""
    pool = avg_pool1d if pooling == "mean" else max_pool1d
    return pool(votes, kernel, stride=1, padding=kernel // 2)


@torch.no_grad()
def window_votes(q: Tensor, store: KVStore, scale: float | None, first: Tensor, stop: Tensor) -> Tensor | None:
    """Softmax attention that each slot receives from some queries, added over them and the heads that share its key.

    Scores are computed anew in bounded chunks of queries, without the model's softcap and sinks: the call itself may
    have been sparse.

    Args:
        q: `[B, H, M, D]`, the queries of the last M tokens.
        store: With these tokens.
        scale: Factor on q k^T; None means D^-0.5.
        first: int64 `[B]`, the first position that votes.
        stop: int64 `[B]`, the position after the last.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64), or None if no query of this call votes.
    """
    batch, heads, queries, dim = q.shape
    place = store.seen[:, None] + torch.arange(-queries, 0, device=q.device)
    voting = (place >= first.clamp(min=0)[:, None]) & (place < stop[:, None])
    columns = voting.any(0).nonzero()[:, 0]
    if not len(columns):
        return None
    dtype, groups = accumulation_dtype(q.dtype), store.lengths.shape[1]
    last = queries - int(columns[0])
    if is_few(last, batch * heads * len(store)):
        weights = score_stored(q[:, :, -last:], store, scale=scale).softmax(-1)
        weights = weights.masked_fill(~voting[:, None, -last:, None], 0.0)
        return weights.unflatten(1, (groups, -1)).sum((2, 3))
    keys = store.keys.to(dtype).transpose(-1, -2)
    positions = store.positions.masked_fill(~store.present, torch.iinfo(torch.int64).max)[:, :, None, None]
    total = torch.zeros(batch, groups, len(store), dtype=dtype, device=q.device)
    for some in columns.split(max(1, SCORE_ELEMENTS // max(1, batch * heads * len(store)))):
        wide = q[:, :, some].to(dtype).reshape(batch, groups, -1, dim) * resolve_scale(scale, dim)
        scores = (wide @ keys).unflatten(2, (heads // groups, len(some)))
        weights = scores.masked_fill(positions > place[:, None, None, some, None], -torch.inf).softmax(-1)
        total += weights.masked_fill(~voting[:, None, None, some, None], 0.0).sum((2, 3))
    return total


__all__ = ["PROTOCOLS", "PromptCompression", "complete", "pooled", "prompt_of", "window_votes"]
