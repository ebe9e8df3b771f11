"""Lamina: decoding's attention is offloaded to another process, which holds the keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.storage import Storage
from saccade.types import Kind, Pattern


@register(
    "lamina",
    Kind.CACHE_POLICY,
    summary="Decoding's attention runs in another process that holds the keys and values; queries and outputs travel.",
    papers=("Efficient and Economic Large Language Model Inference with Attention Offloading",),
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa", "streaming"}),
    training_free=True,
    exact_when="always",
    complexity="N",
    effects=frozenset({"offloading"}),
    deviations=(
        (
            "The paper's workers are other, memory-optimised devices behind a network; here the worker is one process "
            "on the same machine behind shared memory, so that nothing is gained but memory in the model's process."
        ),
        "One worker holds all heads; the paper splits heads over several.",
        (
            "The query is sent before key and value only where the caller says so (`RemoteStore.begin`): transformers "
            "hands all three over at once. The parts over the past and of the new token merge by log-sum-exp."
        ),
        "Requests are not batched or staggered over model replicas: that is a serving engine's work.",
    ),
    example={},
    exact=lambda n: {},  # noqa: ARG005
)
@dataclass(frozen=True)
class Lamina(CachePolicy):
    """out = (S_past out_past + S_new v_new) / (S_past + S_new), S = sum exp(q k): the past while k and v are made.

    Args:
        bits: Bits of a code in the worker, see `Storage`; None for floating point.
        threads: Of the worker's engine; 0 for what PyTorch chooses.
    """

    bits: int | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        require(self.bits in (None, 8, 4), "bits", self.bits, "8, 4, or None for floating point")
        require(self.threads >= 0, "threads", self.threads, "at least 1, or 0 for PyTorch's choice")

    def storage(self) -> Storage:
        """In the worker."""
        return Storage(bits=self.bits)

    def store(self) -> RemoteStore:
        """An empty store in a worker, which starts with the first tokens."""
        return RemoteStore(self.storage(), self.threads or None)
