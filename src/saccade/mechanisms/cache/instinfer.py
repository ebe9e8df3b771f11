"""InstInfer: decoding's attention runs in the drive that holds the keys and values; here a process plays the drive."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.tiers import Disk
from saccade.types import Kind, Pattern


@register(
    "instinfer",
    Kind.CACHE_POLICY,
    summary="Keys and values are in a drive that computes attention beside them; played by a process with a file.",
    papers=("InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference",),
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa", "streaming"}),
    training_free=True,
    exact_when="always",
    complexity="N",
    effects=frozenset({"offloading"}),
    deviations=(
        (
            "It needs a computational storage drive (flash with an attention engine inside, and peer-to-peer transfers "
            "between it and the accelerator). Here a process with a file plays the drive, behind the same interface: "
            "what travels is right, time is not, every page that is read passes the host's memory."
        ),
        "SparF, its sparse attention by parts of a query's channels and by flash pages, is not built: all is read.",
        "Keys and values lie in pages of the store, not in the drive's layout of two orders for channels and tokens.",
    ),
    example={"resident": 0.5},
    exact=lambda n: {"resident": 0.25},  # noqa: ARG005
)
@dataclass(frozen=True)
class InstInfer(CachePolicy):
    """Exact attention where the cache is: q, k and v go to the drive, attention's output comes back.

    Args:
        path: Directory on the drive; "" for that of temporary files.
        resident: Part of the pages in the drive's own memory.
    """

    path: str = ""
    resident: float = 0.05

    def __post_init__(self) -> None:
        require(0 < self.resident <= 1, "resident", self.resident, "a part of the pages, above 0 and at most 1")
        if self.path:
            Disk(self.path)  # refuses what is no directory

    def store(self) -> RemoteStore:
        """An empty store in a worker, whose pages are in a file."""
        return RemoteStore(self.storage(), None, self.path or tempfile.gettempdir(), self.resident)
