"""Lightning Attention-2 against its definition: a masked product with weights exp(-slope * distance)."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.state.lightning2 import Lightning2
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)
EIGHT = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
SLOPES = {
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    3: [1 / 16, 1 / 256, 1 / 4],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
    8: EIGHT,
}
"""ALiBi's published slopes by number of heads."""


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (3, 3), (6, 2), (8, 8)])
@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (2, 5)])
def test_lightning2_equals_decayed_products(heads: int, groups: int, tokens: int, layer: int, layers: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, tokens, 5, dtype=torch.float64)
    k, v = (torch.randn(2, groups, tokens, size, dtype=torch.float64) for size in (5, 3))
    depth = 1.0 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
    wanted = torch.zeros(2, heads, tokens, 3, dtype=torch.float64)
    for h in range(heads):
        group = h // (heads // groups)
        for i in range(tokens):
            for j in range(i + 1):
                weight = torch.exp(torch.tensor(-SLOPES[heads][h] * depth * (i - j), dtype=torch.float64))
                score = (q[:, h, i] * k[:, group, j]).sum(-1, keepdim=True)
                wanted[:, h, i] += weight * score * v[:, group, j]
    out = Lightning2(layer=layer, layers=layers, tile=16)(q, k, v, geometry=CAUSAL)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


def test_ones_sum_a_geometric_series() -> None:
    """All ones, one head: out_t = sum of r^i, r = e^(-1/256)."""
    ones = torch.ones(1, 1, 100, 1, dtype=torch.float64)
    ratio = torch.exp(torch.tensor(-1 / 256, dtype=torch.float64))
    series = (1 - ratio ** torch.arange(1, 101)) / (1 - ratio)
    torch.testing.assert_close(Lightning2(tile=16)(ones, ones, ones, geometry=CAUSAL)[0, 0, :, 0], series)


def test_the_state_continues_a_sequence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 4, dtype=torch.float64) for _ in range(3))
    mix = Lightning2(tile=8)
    state, parts = None, []
    for piece in (slice(0, 19), slice(19, 20), slice(20, 40)):
        out, state = mix(*(x[:, :, piece] for x in (q, k, v)), geometry=CAUSAL, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), mix(q, k, v, geometry=CAUSAL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers=0: expected at least 1"),
        ({"layer": 3, "layers": 3}, r"layer=3: expected a layer in \[0, 3\)"),
        ({"tile": 0}, "tile=0: expected at least 1 token"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lightning2(**settings)


def test_noncausal_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="causal=False .* lightning2 is defined for causal-self"):
        Lightning2()(x, x, x)
