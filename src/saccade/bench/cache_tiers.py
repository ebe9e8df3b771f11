"""Rows of `saccade bench decode` for caches half of whose pages are in a file, fetched ahead or only when read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.bench.cache_layer import filled_paged, llama_layers
from saccade.bench.cache_rows import Candidate
from saccade.mechanisms.cache.attention import make_store
from saccade.mechanisms.cache.tiers import Disk

RESIDENT = 0.5
"""Part of the pages that is in memory."""

DEPTH = 2
"""Layers: while one computes, a thread fetches what the next is expected to read, and after the last the first."""

STEPS = 3
"""Decoded tokens of one timed call, after which what was begun is waited for: nothing is fetched while nobody looks."""

AHEAD = {True: "half on disk", False: "half on disk, not ahead"}


@dataclass(frozen=True, eq=False)
class TieredRows:
    """What is timed.

    Args:
        calls: By label, `STEPS` tokens through `DEPTH` layers.
        nbytes: By label, bytes that a layer holds in memory.
        drop: Makes the system forget what it remembers of the files, so that reading them reads the disk.
    """

    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    nbytes: Callable[[], dict[str, int]] = dict
    drop: Callable[[], None] = lambda: None


@contextmanager
def tiered_rows(
    chosen: Sequence[Candidate], past: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype,
    disk: str | os.PathLike[str],
) -> Iterator[TieredRows]:  # fmt: skip
    """Caches with half of their pages on a disk: of everything, and of all policies that only select.

    Each call decodes tokens that are as good as unrelated, so that what a selecting policy reads changes with each; in
    text it changes less.

    Args:
        chosen: Rows in memory; those that have no second tier are passed over.
        past: What the caches are filled with: queries, keys and values.
        dtype: Of the weights.
        disk: Directory for the files.

    Yields:
        The calls. Files are gone afterwards.
    """
    caches: dict[str, Any] = {}
    with llama_layers(DEPTH, dtype) as (_, model):
        for one in chosen:
            for ahead, words in AHEAD.items():
                tier = Disk(disk, resident=RESIDENT, ahead=ahead)
                if _can_lie_elsewhere(one, tier):
                    caches[f"{one.label}, {words}"] = filled_paged(model, one.policy, *past, tier=tier)
        calls = {label: _call(model, cache) for label, cache in caches.items()}
        yield TieredRows(
            calls,
            lambda: {label: cache.nbytes // DEPTH for label, cache in caches.items()},
            lambda: _drop(caches.values()),
        )


def _can_lie_elsewhere(one: Candidate, tier: Disk) -> bool:
    if one.label != "everything" and one.effects != {"selecting"}:
        return False
    try:
        make_store(one.policy, tier)
    except ValueError:
        return False
    return True


def _call(model: Any, cache: Any) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size

    def decode() -> None:
        for _ in range(STEPS):
            token = torch.randint(vocabulary, (1, 1), generator=generator)
            model(input_ids=token, past_key_values=cache)
        for layer in cache.layers:
            layer.store.pool.settle()

    return decode


def _drop(caches: Any) -> None:
    """Where the system cannot be told, its memory of the files is what is read."""
    if not hasattr(os, "posix_fadvise"):
        return
    for cache in caches:
        for layer in cache.layers:
            number = layer.store.pool.backing.file.fileno()
            os.fdatasync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


__all__ = ["DEPTH", "STEPS", "TieredRows", "tiered_rows"]
