"""BASED against its kernel, 1 + s + s^2 / 2 with s = q . k / sqrt(D), summed pair by pair."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.state.based import Based
from saccade.types import Geometry

pytestmark = pytest.mark.quick

CAUSAL = Geometry(causal=True)


@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 2, 4), (4, 2, 5), (3, 1, 1)])
@pytest.mark.parametrize("tokens", [1, 8, 29])
def test_based_equals_the_taylor_kernel(heads: int, groups: int, dim: int, tokens: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, tokens, dim, dtype=torch.float64)
    k, v = (torch.randn(2, groups, tokens, size, dtype=torch.float64) for size in (dim, 3))
    wanted = torch.zeros(2, heads, tokens, 3, dtype=torch.float64)
    for h in range(heads):
        group = h // (heads // groups)
        for i in range(tokens):
            s = torch.einsum("bd,bjd->bj", q[:, h, i], k[:, group, : i + 1]) / dim**0.5
            weight = 1 + s + s * s / 2
            weight = weight / weight.sum(1, keepdim=True)
            wanted[:, h, i] = torch.einsum("bj,bje->be", weight, v[:, group, : i + 1])
    out = Based(chunk=8)(q, k, v, geometry=CAUSAL)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


def test_zero_queries_give_the_running_mean() -> None:
    v = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 1, 5, 1)
    q, k = torch.zeros(1, 1, 5, 2, dtype=torch.float64), torch.randn(1, 1, 5, 2, dtype=torch.float64)
    out = Based(chunk=2)(q, k, v, geometry=CAUSAL)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64))


def test_the_state_continues_a_sequence_and_has_half_the_products() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 21, 4, dtype=torch.float64) for _ in range(3))
    mix = Based(chunk=8)
    state, parts = None, []
    for piece in (slice(0, 10), slice(10, 11), slice(11, 21)):
        out, state = mix(*(x[:, :, piece] for x in (q, k, v)), geometry=CAUSAL, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), mix(q, k, v, geometry=CAUSAL))
    assert state.s.shape == (1, 2, 1 + 4 + 10, 4)


def test_inputs_keep_their_dtype() -> None:
    x = torch.randn(1, 1, 6, 4, dtype=torch.bfloat16)
    out, state = Based()(x, x, x, geometry=CAUSAL, return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.s.dtype == torch.float32


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk=0: expected at least 1 token"):
        Based(chunk=0)


def test_noncausal_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="causal=False .* based is defined for causal-self"):
        Based()(x, x, x)
