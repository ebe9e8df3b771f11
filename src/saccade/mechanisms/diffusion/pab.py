"""Pyramid Attention Broadcast: attention outputs are used again for a few steps, longer where they change less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.diffusion.base import OutputReuse
from saccade.types import Kind


@register(
    "pab",
    Kind.INTERVENTION,
    summary="Computes spatial, temporal and cross attention only every 2nd, 4th and 6th denoising step.",
    papers=("Real-Time Video Generation with Pyramid Attention Broadcast",),
    year=2024,
    code="NUS-HPC-AI-Lab/VideoSys",
    training_free=True,
    exact_when="every range is 1, or the window is never entered",
    deviations=(
        "Attention only: the authors' code can also broadcast the MLPs of chosen blocks at chosen timesteps.",
        "One window for all kinds; the authors' code has one per kind. Use one PAB per kind where they differ.",
        "The paper's sequence parallelism, which saves the communication of what is not computed, is not part of it.",
    ),
    example={"spatial_range": 2, "temporal_range": 3, "cross_range": 4, "window": (100, 800)},
    exact=lambda n: {"spatial_range": 1, "temporal_range": 1, "cross_range": 1},  # noqa: ARG005
)
@dataclass(frozen=True)
class PAB(OutputReuse):
    """Step n (from 0) computes if n % range == 0 or its timestep is outside the window; else the last output serves.

    Args:
        spatial_range: Steps that share one output of spatial self-attention; 1 = computed every step.
        temporal_range: The same for temporal self-attention.
        cross_range: The same for cross-attention.
        window: Timesteps (low, high), both exclusive, between which outputs are reused; of 1000 by convention.
    """

    kinds: ClassVar[tuple[str, ...]] = ("spatial", "temporal", "cross")

    spatial_range: int = 2
    temporal_range: int = 4
    cross_range: int = 6
    window: tuple[float, float] = (100, 800)

    def __post_init__(self) -> None:
        for name in (f"{kind}_range" for kind in self.kinds):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 step")
        require(len(self.window) == 2 and self.window[0] <= self.window[1], "window", self.window, "(low, high)")

    def reuses(self, count: int, timestep: float, kind: str) -> bool:
        """Whether the last output serves.

        Args:
            count: Steps taken before this one.
            timestep: Diffusion time, in the unit of `window`.
            kind: "spatial", "temporal" or "cross".

        Returns:
            True if nothing need be computed.

        Raises:
            ValueError: If `kind` is another.
        """
        require(kind in self.kinds, "kind", kind, f"one of {list(self.kinds)}")
        return count % getattr(self, f"{kind}_range") != 0 and self.window[0] < timestep < self.window[1]
