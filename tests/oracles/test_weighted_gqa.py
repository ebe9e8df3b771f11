"""Weighted grouped-query attention against loops over heads; folded projections against unfolded ones."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.heads.weighted_gqa import WeightedGQA

HEADS, GROUPS, DIM, VALUE_DIM, CHANNELS = 6, 2, 3, 4, 5
SETTINGS = {
    "scalar": {},
    "column": {"weighting": "column", "head_dim": DIM, "value_dim": VALUE_DIM},
    "row": {"weighting": "row", "model_dim": CHANNELS},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(weighting):
    heads = WeightedGQA(HEADS, GROUPS, **SETTINGS[weighting], dtype=torch.float64)
    with torch.no_grad():
        for seed, weight in enumerate(heads.parameters()):
            weight.copy_(draw(*weight.shape, seed=10 + seed))
    return heads


def weighted_sums(x, weight):
    """`[B, G, N, D]` one head, group and channel at a time; `weight` is `[H]` or `[H, D]`."""
    size = HEADS // GROUPS
    out = torch.zeros(x.shape[0], GROUPS, *x.shape[2:], dtype=x.dtype)
    for h in range(HEADS):
        for d in range(x.shape[3]):
            factor = weight[h] if weight.ndim == 1 else weight[h, d]
            out[:, h // size, :, d] += factor.detach() * x[:, h, :, d]
    return out


@pytest.mark.parametrize("weighting", ["scalar", "column"])
def test_share_is_the_weighted_sum_of_neighbouring_heads(weighting):
    heads, k, v = trained(weighting), draw(2, HEADS, 7, DIM), draw(2, HEADS, 7, VALUE_DIM, seed=1)
    shared_k, shared_v = heads.share(k, v)
    torch.testing.assert_close(shared_k, weighted_sums(k, heads.key_weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(shared_v, weighted_sums(v, heads.value_weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["scalar", "column"])
def test_starts_as_the_mean(weighting):
    heads = WeightedGQA(HEADS, GROUPS, **SETTINGS[weighting], dtype=torch.float64)
    k, v = draw(1, HEADS, 4, DIM), draw(1, HEADS, 4, VALUE_DIM, seed=1)
    for shared, full in zip(heads(k, v), (k, v), strict=True):
        torch.testing.assert_close(shared, full.reshape(1, GROUPS, 3, 4, -1).mean(2))


@pytest.mark.parametrize("weighting", ["scalar", "column"])
@pytest.mark.parametrize("which", ["key", "value"])
def test_folded_projection_equals_projecting_and_sharing(weighting, which):
    heads, dim = trained(weighting), DIM if which == "key" else VALUE_DIM
    weight, bias, x = draw(HEADS * dim, CHANNELS), draw(HEADS * dim, seed=1), draw(2, 7, CHANNELS, seed=2)
    full = (x @ weight.T + bias).reshape(2, 7, HEADS, dim).transpose(1, 2)
    learned = heads.key_weight if which == "key" else heads.value_weight
    expected = weighted_sums(full, learned)
    folded = x @ heads.fold(weight, which).T + heads.fold(bias, which)
    torch.testing.assert_close(folded.reshape(2, 7, GROUPS, dim).transpose(1, 2), expected, rtol=0, atol=1e-12)


def test_row_weights_scale_the_channels_of_the_model():
    heads, weight, x = trained("row"), draw(HEADS * DIM, CHANNELS), draw(7, CHANNELS, seed=2)
    expected = torch.zeros(7, GROUPS, DIM, dtype=torch.float64)
    for h in range(HEADS):
        expected[:, h // 3] += (x * heads.key_weight[h].detach()) @ weight[h * DIM : (h + 1) * DIM].T
    actual = (x @ heads.fold(weight, "key").T).reshape(7, GROUPS, DIM)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match='weighting="row": .* expected `fold` instead of `share`'):
        heads.share(draw(1, HEADS, 2, DIM), draw(1, HEADS, 2, DIM))


@pytest.mark.parametrize("weighting", ["scalar", "column"])
def test_gradients_reach_the_weights(weighting):
    heads, k, v = trained(weighting), draw(1, HEADS, 2, DIM), draw(1, HEADS, 2, VALUE_DIM, seed=1)

    def pooled(k, v, key_weight, value_weight):
        weights = {"key_weight": key_weight, "value_weight": value_weight}
        return torch.func.functional_call(heads, weights, (k, v))

    inputs = (k, v, heads.key_weight.detach(), heads.value_weight.detach())
    assert torch.autograd.gradcheck(pooled, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 0, "groups": 1}, "heads=0: expected at least 1"),
        ({"heads": 4, "groups": 3}, "groups=3: expected a divisor of heads=4"),
        ({"heads": 4, "groups": 2, "weighting": "diagonal"}, "weighting='diagonal': expected one of"),
        ({"heads": 4, "groups": 2, "weighting": "column"}, "head_dim=None: expected a size"),
        ({"heads": 4, "groups": 2, "value_dim": 3}, "value_dim=3: expected None unless"),
        ({"heads": 4, "groups": 2, "weighting": "row"}, "model_dim=None: expected a size"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightedGQA(**settings)


def test_bad_inputs_are_named():
    heads = WeightedGQA(4, 2)
    with pytest.raises(ValueError, match="k heads=2: expected heads=4"):
        heads.share(draw(1, 2, 3, 2), draw(1, 4, 3, 2))
    with pytest.raises(ValueError, match="v heads=2: expected heads=4"):
        heads.share(draw(1, 4, 3, 2), draw(1, 2, 3, 2))
    with pytest.raises(ValueError, match="which='query': expected 'key' or 'value'"):
        heads.fold(draw(8, 3), "query")
    with pytest.raises(ValueError, match="weight rows=7: expected a multiple of 4 heads"):
        heads.fold(draw(7, 3), "key")
    with pytest.raises(ValueError, match="weight dims=3: expected 2, or 1 for a bias"):
        heads.fold(draw(8, 3, 2), "key")
    with pytest.raises(ValueError, match="weight channels per head=2: expected 3"):
        WeightedGQA(4, 2, "column", head_dim=3).fold(draw(8, 3), "key")
