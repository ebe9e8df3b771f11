"""Combiner against its factorisation, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.laws.base import counted_work
from saccade.mechanisms.where.combiner import Combiner
from saccade.types import Geometry


def regions(i: int, tokens: int, mechanism: Combiner, causal: bool) -> tuple[list[int], list[list[int]]]:
    """Tokens that token i attends to directly, and regions."""
    if mechanism.form == "logsparse":
        found, stop, size = [], i, 1
        while stop:
            if (stop // size) % 2:  # the lowest digit left cuts off the run next to what is cut already
                found.append(list(range(stop - size, stop)))
                stop -= size
            size *= 2
        return [i], found
    size = mechanism.segment
    if size is None:
        size = next(2**p for p in range(20) if 4**p >= tokens)
    segments = [list(range(s, min(s + size, tokens))) for s in range(0, tokens, size)]
    own = segments[i // size]
    others = segments[: i // size] if causal else [s for s in segments if s is not own]
    return [j for j in own if j <= i or not causal], others


def pooled(x: torch.Tensor, mechanism: Combiner) -> torch.Tensor:
    return x.amax(0) if mechanism.pool == "max" else x.mean(0)


def oracle(q, k, v, mechanism: Combiner, causal: bool) -> torch.Tensor:
    """One head."""
    tokens, dim = q.shape
    rows = []
    for i in range(tokens):
        direct, far = regions(i, tokens, mechanism, causal)
        keys, values = [k[j] for j in direct], [v[j] for j in direct]
        for region in far:
            keys.append(pooled(k[region], mechanism))
            values.append((pooled(q[region], mechanism) @ k[region].T / math.sqrt(dim)).softmax(0) @ v[region])
        rows.append((q[i] @ torch.stack(keys).T / math.sqrt(dim)).softmax(0) @ torch.stack(values))
    return torch.stack(rows)


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, n, tokens, c) for n, c in ((4, 6), (2, 6), (2, 5)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 2, 8, 23, 32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"segment": 8}, {"segment": 5, "pool": "mean"}, {"form": "logsparse"}], ids=str
)
def test_output_and_gradients_are_those_of_the_rule(settings: dict, causal: bool, tokens: int) -> None:
    mechanism = Combiner(**settings)
    if mechanism.form == "logsparse" and not causal:
        pytest.skip("causal only")
    q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens)]
    out = mechanism(q, k, v, geometry=Geometry(causal=causal))
    wanted = torch.stack([
        torch.stack([oracle(q[b, h], k[b, h // 2], v[b, h // 2], mechanism, causal) for h in range(4)])
        for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_weights_are_a_distribution() -> None:
    """Values of ones give ones, however they are split."""
    q, k, v = inputs(41)
    for settings in ({}, {"form": "logsparse"}):
        out = Combiner(**settings)(q, k, torch.ones_like(v), geometry=Geometry(causal=True))
        torch.testing.assert_close(out, torch.ones_like(out))


def test_known_by_hand() -> None:
    """Queries of 0 weigh all alike: direct tokens one each, and each region as one, with its mean value."""
    v = torch.arange(8.0)[None, None, :, None]
    zeros = torch.zeros(1, 1, 8, 4)
    fixed = Combiner(segment=4)(zeros, zeros, v, geometry=Geometry(causal=True))[0, 0, :, 0]
    torch.testing.assert_close(fixed[4:], torch.tensor([(1.5 + 4) / 2, (1.5 + 9) / 3, (1.5 + 15) / 4, (1.5 + 22) / 5]))
    log = Combiner(form="logsparse")(zeros, zeros, v, geometry=Geometry(causal=True))[0, 0, :, 0]
    torch.testing.assert_close(log[7], torch.tensor((7 + 6 + 4.5 + 1.5) / 4))  # itself, {6}, {4, 5}, {0 .. 3}


@pytest.mark.parametrize(("form", "most"), [("fixed", 2**1.5 * 1.1), ("logsparse", 2 * 12 / 11 * 1.1)])
def test_work_grows_as_stated(form: str, most: float) -> None:
    """From 1024 to 4096 tokens, per doubling."""
    work = []
    for tokens in (1024, 4096):
        x = torch.zeros(1, 1, tokens, 8)
        work.append(counted_work(lambda: Combiner(form=form)(x, x, x, geometry=Geometry(causal=True))))  # noqa: B023
    assert (work[1] / work[0]) ** 0.5 < most


def test_refuses() -> None:
    for settings, message in (
        ({"form": "axial"}, "form='axial': expected 'fixed' or 'logsparse'"),
        ({"segment": 0}, "segment=0: expected at least 1 token, or None"),
        ({"form": "logsparse", "segment": 4}, "segment=4: expected None with form='logsparse'"),
        ({"pool": "sum"}, "pool='sum': expected 'max' or 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            Combiner(**settings)
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match="form='logsparse': expected 'fixed' unless causal"):
        Combiner(form="logsparse")(q, k, v)
    with pytest.raises(ValueError, match="queries=4: expected 6, as many as keys"):
        Combiner()(q[:, :, 2:], k, v, geometry=Geometry(causal=True))


def test_no_tokens() -> None:
    q, k, v = inputs(0)
    assert Combiner()(q, k, v, geometry=Geometry(causal=True)).shape == (2, 4, 0, 5)
