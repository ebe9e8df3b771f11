"""`search_graph`: the stored keys that a query scores highest, found through a graph, not by reading them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.ops.checks import accumulation_dtype
from saccade.ops.decode_attend.native import engine_pages
from saccade.ops.dispatch import Implementation, choose
from saccade.types import KVPages

Call = Mapping[str, Any]
Slots = tuple[Tensor, Tensor, Tensor]


class KeyGraph(NamedTuple):
    """Which keys some queries score highest, for each key/value head; -1 stands for none.

    Args:
        lists: int32 `[B, G, S, degree]`, slots of a query's keys.
        links: int32 `[B, G, n, each]`, of each slot the queries through which a search goes on from it.
        entries: int32 `[B, G, first]`, slots that a search begins with.
    """

    lists: Tensor
    links: Tensor
    entries: Tensor


class Found(NamedTuple):
    """What a search found, and what it read for that.

    Args:
        slots: int64 `[B, H, width]`, by falling score; -1 where there are fewer.
        keys: Keys that were scored, over all heads.
        numbers: Numbers of the graph that were read.
    """

    slots: Tensor
    keys: int
    numbers: int


def _refuses(call: Call) -> str | None:
    """Why the engine cannot serve the call, or None."""
    if call["cache"] is None:
        return "keys do not lie in pages that can be read in place"
    return "the problem is empty" if 0 in (*call["q"].shape, call["cache"].longest) else unusable(call["q"])


def _run_cpu(call: Call) -> Found:
    """The C++ engine: one search after the other, each key read in place."""
    cache: KVPages = call["cache"]
    q, factors = call["q"], call["channels"]
    if factors is not None:
        q = q * factors.repeat_interleave(q.shape[1] // factors.shape[1], 1)[:, :, None]
    slots, looked = cpu.search(q, cache.k, engine_pages(cache), call["graph"], call["width"], call["expand"])
    keys, numbers = looked.sum((0, 1)).tolist()
    return Found(slots, keys, numbers)


def _run_eager(call: Call) -> Found:
    """All searches at once, round by round; of keys only those are copied that are new."""
    q, lengths, width, graph = call["q"], call["lengths"], call["width"], call["graph"]
    (batch, heads), device = q.shape[:2], q.device
    entry, query = torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
    group = torch.div(query, heads // lengths.shape[1], rounding_mode="floor")
    limit = lengths.clamp(max=graph.links.shape[2])[entry, group]
    nowhere = graph.links.shape[2]
    found = torch.full((batch, heads, width), -1, device=device)
    scores = q.new_full((batch, heads, width), -torch.inf, dtype=accumulation_dtype(q.dtype))
    open_ = torch.zeros_like(found, dtype=torch.bool)
    met = torch.zeros(batch, heads, nowhere + 1, dtype=torch.bool, device=device)
    met[:, :, -1] = True
    last = torch.zeros_like(met, dtype=torch.int32)
    near, keys, numbers = graph.entries[entry[..., 0], group[:, 0]].long(), 0, 0
    while True:
        near = near.where((near >= 0) & (near < limit), nowhere)
        place = torch.arange(near.shape[2], device=device, dtype=torch.int32).expand_as(near)
        last.scatter_(2, near, place)  # a key that is near for two reasons is read once
        new = ~met.gather(2, near) & (last.gather(2, near) == place)
        met.scatter_(2, near, value=True)
        b, h, i = new.nonzero(as_tuple=True)
        keys += len(b)
        rows = call["keys"]((b, group[h, 0], near[b, h, i])).to(scores.dtype)
        fresh = torch.full_like(near, -torch.inf, dtype=scores.dtype)
        fresh[b, h, i] = (rows * q[b, h, 0].to(scores.dtype)).sum(-1)
        scores, order = torch.cat([scores, fresh], -1).topk(width, dim=-1)
        found = torch.cat([found, near.where(new, -1)], -1).gather(2, order)
        open_ = torch.cat([open_, new], -1).gather(2, order)
        if not bool(open_.any()):
            return Found(found, keys, numbers)
        rank, next_ = scores.masked_fill(~open_, -torch.inf).topk(min(call["expand"], width), dim=-1)
        chosen = found.gather(2, next_).masked_fill(rank == -torch.inf, -1)
        open_ = open_.scatter(2, next_, value=False)
        asked = graph.links[entry, group, chosen.clamp(min=0)].masked_fill((chosen < 0)[..., None], -1).flatten(2)
        lists = graph.lists[entry, group, asked.clamp(min=0).long()].masked_fill((asked < 0)[..., None], -1)
        near = lists.flatten(2).long()
        numbers += int((asked >= 0).sum()) + int(((near >= 0) & (near < limit)).sum())


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", _run_cpu, _refuses),
    "eager": Implementation("eager", _run_eager),
}
"""By preference."""


@torch.no_grad()
def search_graph(
    q: Tensor, graph: KeyGraph, lengths: Tensor, keys: Callable[[Slots], Tensor], width: int, expand: int, *,
    cache: KVPages | None = None, channels: Tensor | None = None, impl: str = "auto",
) -> Found:  # fmt: skip
    """A best-first search for each query head: the `width` best keys met so far are kept.

    Round by round the `expand` best whose neighbours were not looked at yet are followed: through the queries that a
    key is linked with to the keys of these. Ends when there are none, as searches in graphs of neighbours do.

    Args:
        q: `[B, H, 1, D]`.
        graph: Over the slots of each key/value head.
        lengths: int64 `[B, G]`, keys of each head.
        keys: Reads some, `[R, D]`: batch entries, heads and slots in int64 `[R]` each.
        width: Keys kept.
        expand: Keys followed in a round.
        cache: The same keys in pages that the engine may read in place, floats or codes; None for none.
        channels: `[B, G, D]`, what the keys in pages are to be multiplied by; None for 1.
        impl: "auto", "cpu" (the C++ engine) or "eager".

    Returns:
        The slots found, and what was read.

    Raises:
        ValueError: If an argument does not fit the others, or `impl` cannot run the call.
    """
    if q.ndim != 4 or q.shape[2] != 1 or lengths.shape[0] != q.shape[0] or q.shape[1] % max(1, lengths.shape[1]):
        raise ValueError(
            f"q of shape {tuple(q.shape)}: expected [B, H, 1, D] with lengths {tuple(lengths.shape)} [B, G], G a "
            "divisor of H"
        )
    for name, x in zip(graph._fields, graph, strict=True):
        if x.dtype != torch.int32 or x.shape[:2] != lengths.shape or x.ndim != (3 if name == "entries" else 4):
            raise ValueError(
                f"graph.{name} of shape {tuple(x.shape)}, {x.dtype}: expected int32, beginning with "
                f"{tuple(lengths.shape)}"
            )
    for name, count in (("width", width), ("expand", expand)):
        if count < 1:
            raise ValueError(f"{name}={count}: expected at least 1")
    call = {
        "q": q, "graph": graph, "lengths": lengths, "keys": keys, "width": width, "expand": expand, "cache": cache,
        "channels": channels,
    }  # fmt: skip
    chosen, _ = choose("search_graph", IMPLEMENTATIONS, impl, call)
    if cache is not None:
        cache.validate()
    found: Found = chosen.run(call)
    return found


__all__ = ["IMPLEMENTATIONS", "Found", "KeyGraph", "search_graph"]
