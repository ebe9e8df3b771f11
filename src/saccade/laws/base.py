"""What a law is made of: problems, subjects, and the three ways it can end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import profiler_legacy

from saccade.types import Geometry, Pattern


class NotApplicable(Exception):  # noqa: N818  an outcome, not an error
    """The law says nothing about this mechanism; the message is the reason, taken from the card."""


class Broken(Exception):  # noqa: N818  an outcome, not an error
    """The law does not hold; the message says where and by how much."""


@dataclass(frozen=True)
class Verdict:
    """How one law ended for one mechanism: "passed", "failed" or "skipped" (then `detail` is the reason)."""

    law: int
    title: str
    status: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call: q `[B, H, M, D]`, k `[B, G, N, D]`, v `[B, G, N, E]` and their geometry."""

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry = Geometry()  # noqa: RUF009  frozen

    def having(self, q: Tensor, k: Tensor, v: Tensor) -> Problem:
        """Other inputs, the same geometry."""
        return replace(self, q=q, k=k, v=v)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in `dtype`."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def with_grad(self) -> Problem:
        """Fresh leaves that ask for gradients."""
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in ("q", "k", "v")}
        return replace(self, **leaves)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v."""
        return self.q, self.k, self.v


def make_problem(
    *,
    queries: int = 96,
    keys: int | None = None,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Seeded inputs whose neighbours resemble each other, as tokens of a text or an image do."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)

    def smooth(*shape: int) -> Tensor:
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (noise + 0.5 * noise.roll(1, -2) + 0.25 * noise.roll(2, -2)).to(dtype).to(device)

    return Problem(
        smooth(batch, heads, queries, dim), smooth(batch, groups, keys, dim), smooth(batch, groups, keys, dim),
        Geometry(causal=causal),
    )  # fmt: skip


def is_causal_capable(patterns: frozenset[Pattern]) -> bool:
    """Whether the card lists causal self-attention."""
    return Pattern.CAUSAL_SELF in patterns


def expect(condition: bool, detail: str) -> None:
    """Raise `Broken(detail)` unless `condition`."""
    if not condition:
        raise Broken(detail)


def expect_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Largest difference at most `tolerance` of the largest wanted value, and no NaN."""
    expect(got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    if got.numel() == 0:
        return
    expect(bool(torch.isfinite(got).all()), f"{what}: not finite")
    got, wanted = got.detach(), wanted.detach()
    error = float((got.double() - wanted.double()).abs().max())
    scale = max(float(wanted.double().abs().max()), 1e-6)
    expect(error <= tolerance * scale, f"{what}: differs by {error:.3g} where values reach {scale:.3g}")


def expect_equal(got: Tensor, wanted: Tensor, what: str) -> None:
    """Bit-equal."""
    got, wanted = got.detach(), wanted.detach()
    expect(got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    if not torch.equal(got, wanted):
        raise Broken(
            f"{what}: differs by {float((got.double() - wanted.double()).abs().max()):.3g}, expected bit-equal"
        )


def expect_refusal(call: Callable[[], Any], words: str, what: str) -> str:
    """`call` raises a ValueError that holds `words`; returns `what`, for the note."""
    try:
        call()
    except ValueError as error:
        expect(words in str(error), f"{what}: the error does not name {words!r}: {error}")
        return what
    raise Broken(f"{what}: ran without an error")


def expect_falling(errors: Sequence[float]) -> str:
    """Errors along a ladder fall, but for a tenth where they are close."""
    for lower, higher in pairwise(errors):
        expect(higher <= 1.1 * lower + 1e-6, f"error grows along the ladder: {[round(e, 4) for e in errors]}")
    return "errors " + " > ".join(f"{error:.3f}" for error in errors)


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, `torch.use_deterministic_algorithms` is on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def counted_work(call: Callable[[], Any]) -> float:
    """Floating-point operations of products, convolutions and sums, also those inside custom operators."""
    with profiler_legacy.profile(with_flops=True) as profiled:
        call()
    return float(sum(event.flops or 0 for event in profiled.function_events))


GROWTH = {"1": 1.0, "N": 2.0, "N log N": 2.0 * 11 / 10, "N^1.5": 2.0**1.5, "N^2": 4.0, "N^3": 8.0}
"""How much more work the declared complexities allow at twice N (N log N: from 1024 to 2048)."""


def expect_growth(declared: str, small: float, large: float, sizes: str) -> str:
    """Work of `large` over `small` is within what the card declares, edges (weighing less as N grows) allowed for."""
    if declared not in GROWTH:
        raise NotApplicable(f"complexity {declared!r} is not a power of N alone")
    if not small:
        raise NotApplicable("nothing that could be counted: no product, convolution or sum of tensors")
    ratio = large / small
    low, high = GROWTH[declared] * 0.8, GROWTH[declared] * 1.25
    expect(ratio <= high, f"work grows {ratio:.2f}x from {sizes}, {declared} allows {high:.2f}x")
    return f"{ratio:.2f}x from {sizes}, declared {declared}" + ("" if ratio >= low else " (less than declared)")


def gradients(run: Callable[[Problem], Tensor], problem: Problem, seed: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and the gradients of q, k, v against a seeded cotangent."""
    leaves = problem.with_grad()
    out = run(leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves.leaves, cotangent.to(out), allow_unused=True)
    filled = tuple(
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.leaves, grads, strict=True)
    )
    return out.detach(), filled


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (or the largest integer), so that an unwritten element shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return wrapped

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield
