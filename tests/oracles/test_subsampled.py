"""Stochastically subsampled attention against its figure, pair by pair."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.subsampled import Subsampled, self_ensemble
from saccade.types import Geometry


def oracle(q, k, v, mechanism: Subsampled, causal: bool) -> torch.Tensor:
    """One head, for the order that the mechanism draws."""
    order, tokens = mechanism._order(len(k)).tolist(), len(k)
    out = torch.zeros(len(q), v.shape[1], dtype=v.dtype)
    for row in range(len(q)):
        i = row + tokens - len(q)
        first = i // mechanism.size * mechanism.size if mechanism.form == "local" else 0
        seen = [j for j in order[first : first + mechanism.size] if j <= i or not causal]
        if seen:
            out[row] = (q[row] @ k[seen].T / q.shape[1] ** 0.5).softmax(0) @ v[seen]
    return out


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, n, tokens, 8) for n in (4, 2, 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 45])
@pytest.mark.parametrize(
    "settings",
    [{"size": 8, "sigma": 5.0}, {"size": 7, "sigma": 0.0}, {"form": "unbiased", "size": 6, "seed": 3}],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_rule(settings: dict, tokens: int, causal: bool) -> None:
    mechanism = Subsampled(**settings)
    for late in (0, tokens // 3 if causal else 0):
        q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens)]
        out = mechanism(q[:, :, late:], k, v, geometry=Geometry(causal=causal))
        wanted = torch.stack([
            torch.stack([oracle(q[b, h, late:], k[b, h // 2], v[b, h // 2], mechanism, causal) for h in range(4)])
            for b in range(2)
        ])  # fmt: skip
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
        cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
            torch.testing.assert_close(got, gradient, rtol=0, atol=1e-11)


def test_the_figure() -> None:
    """Figure 3: the first shuffles of both panels, and the keys that they leave to each query."""
    unbiased = Subsampled(form="unbiased", size=4)._lists(torch.tensor([3, 6, 1, 5, 2, 7, 0, 4]))
    assert unbiased.tolist() == [[1, 3, 5, 6]]
    local = Subsampled(size=2)._lists(torch.tensor([1, 3, 0, 4, 2, 6, 7, 5]))
    assert local.tolist() == [[1, 3], [0, 4], [2, 6], [5, 7]]


def test_a_seed_is_a_draw_and_sigma_its_reach() -> None:
    def reach(sigma: float) -> float:
        return float((Subsampled(sigma=sigma)._order(1000) - torch.arange(1000)).abs().double().mean())

    assert reach(0.0) == 0.0 < reach(3.0) < reach(30.0) < 60
    orders = [Subsampled(form="unbiased", seed=seed)._order(8) for seed in range(400)]
    first = torch.stack(orders)[:, :4].flatten().bincount(minlength=8)
    assert int((first - 200).abs().max()) < 50  # 200 of each, on the average


def test_an_ensemble_is_nearer_to_full_attention_than_its_members() -> None:
    q, k, v = inputs(64)
    exact = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).softmax(-1) @ v.repeat_interleave(2, 1)
    mechanism = Subsampled(size=16, sigma=16.0)
    errors = [float((self_ensemble(lambda one: one(q, k, v), mechanism, n) - exact).norm()) for n in (1, 8)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "global"}, "form='global': expected 'local' or 'unbiased'"),
        ({"size": 0}, "size=0: expected at least 1 token"),
        ({"sigma": -1.0}, r"sigma=-1\.0: expected a number of at least 0"),
        ({"seed": -1}, "seed=-1: expected a number in"),
    ],
)
def test_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subsampled(**settings)
    with pytest.raises(ValueError, match="members=0: expected at least 1"):
        self_ensemble(lambda one: torch.zeros(one.size), Subsampled(), 0)


@pytest.mark.parametrize("form", ["local", "unbiased"])
def test_no_tokens(form: str) -> None:
    q, k, v = inputs(0)
    assert Subsampled(form=form)(q, k, v).shape == q.shape
