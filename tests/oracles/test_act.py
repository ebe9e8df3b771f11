"""ACT against a loop over heads and rows written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.steer.act import ACT
from saccade.types import Geometry

pytestmark = pytest.mark.quick


def softmax_map(q, k, causal):
    """`[B][H]` lists of rows of floats; 0 where hidden."""
    batch, heads, queries, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    whole = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if causal else keys)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = [j for j in range(keys) if seen[i, j]]
                exps = [math.exp(float(q[b, h, i] @ k[b, h // share, j]) / math.sqrt(dim)) for j in visible]
                for j, value in zip(visible, exps, strict=True):
                    whole[b, h, i, j] = value / sum(exps)
    return whole, seen


def oracle(weights, seen, alpha, beta, chosen):
    """Calibrated maps and the sinks of every head."""
    batch, heads, queries, keys = weights.shape
    out, found = weights.clone(), []
    for b in range(batch):
        for h in range(heads):
            sinks = []
            for j in range(1, keys):
                mean = float(weights[b, h, :, j].sum()) / int(seen[:, j].sum())
                if h in chosen and mean > alpha / keys:
                    sinks.append(j)
            found.append(sinks)
            for i in range(queries):
                rest = [j for j in range(keys) if j not in sinks]
                kept = sum(float(weights[b, h, i, j]) for j in rest)
                freed = sum(float(weights[b, h, i, j]) * (1 - beta) for j in sinks)
                for j in range(keys):
                    own = float(weights[b, h, i, j])
                    out[b, h, i, j] = beta * own if j in sinks else own + freed * own / kept
    return out, found


def inputs(queries, keys, groups):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, queries, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 5, generator=generator, dtype=torch.float64)
    k[:, :, keys // 2] += 2 * q.mean((1, 2))[:, None]
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "groups"), [(9, 9, 4), (11, 11, 2)])
@pytest.mark.parametrize(("alpha", "beta", "heads"), [(1.2, 0.4, None), (1.5, 0.0, (1, 3)), (1.2, 0.9, ())])
def test_agrees_with_the_equations(causal, queries, keys, groups, alpha, beta, heads):
    q, k, v = inputs(queries, keys, groups)
    weights, seen = softmax_map(q, k, causal)
    expected, found = oracle(weights, seen, alpha, beta, range(4) if heads is None else heads)
    assert any(found) == (heads != ())
    act = ACT(alpha, beta, heads)
    out = act(q, k, v, geometry=Geometry(causal=causal))
    torch.testing.assert_close(out, expected @ v.repeat_interleave(4 // groups, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(act.edit(weights, seen[None, None]), expected, rtol=0, atol=1e-12)


def test_queries_over_a_cache():
    q, k, v = inputs(3, 9, 4)
    weights, seen = softmax_map(q, k, causal=True)
    expected, _ = oracle(weights, seen, 1.2, 0.4, range(4))
    out = ACT(alpha=1.2)(q, k, v, geometry=Geometry(causal=True))
    torch.testing.assert_close(out, expected @ v, rtol=0, atol=1e-10)


def test_many_chunks_of_queries_agree_with_the_whole_map():
    generator = torch.Generator().manual_seed(0)
    q, k, v = 2 * torch.randn(3, 1, 1, 600, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(600, 600, dtype=torch.bool).tril()
    weights = (q @ k.mT / 2).masked_fill(~mask, -math.inf).softmax(-1)
    importance = weights.sum(2) / torch.arange(600, 0, -1)
    sinks = (importance > 3 / 600) & (torch.arange(600) > 0)
    assert sinks.any()
    freed = 0.6 * (weights * sinks).sum(-1, keepdim=True)
    rest = weights * ~sinks
    expected = torch.where(sinks, 0.4 * weights, rest * (1 + freed / rest.sum(-1, keepdim=True))) @ v
    out = ACT(alpha=3.0)(q, k, v, geometry=Geometry(causal=True))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_hand_worked_row():
    """Key 1 of 4 holds 0.5 > 1.5 / 4: 0.3 of it is freed and goes 2 : 2 : 1 to keys of 0.2, 0.2 and 0.1."""
    weights = torch.tensor([[[[0.2, 0.5, 0.2, 0.1]]]], dtype=torch.float64)
    out = ACT(alpha=1.5, beta=0.4).edit(weights, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.32, 0.2, 0.32, 0.16], dtype=torch.float64))


def test_the_first_token_is_never_a_sink_and_rows_of_sinks_stay():
    weights = torch.tensor([[[[0.9, 0.1, 0.0], [0.0, 1.0, 0.0]]]])
    out = ACT(alpha=1.5).edit(weights, torch.ones(1, 1, 2, 3, dtype=torch.bool))
    torch.testing.assert_close(out, torch.tensor([[[[0.96, 0.04, 0.0], [0.0, 1.0, 0.0]]]]))


def test_gradients_with_the_sinks_held():
    q, k, v = (x[:1].requires_grad_() for x in inputs(5, 5, 2))
    act = ACT(alpha=1.2)
    assert act.find(q, k).any()
    assert torch.autograd.gradcheck(lambda *x: act(*x, geometry=Geometry(causal=True)), (q, k, v))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"alpha=0\.0: expected more than 0"),
        ({"beta": 1.5}, r"beta=1\.5: expected a fraction in \[0, 1\]"),
        ({"heads": (0, -1)}, r"heads=\(0, -1\): expected numbers of at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ACT(**settings)


def test_bad_calls_are_named():
    q, k, v = inputs(5, 5, 4)
    with pytest.raises(ValueError, match=r"heads=\(4,\): expected numbers below 4"):
        ACT(heads=(4,))(q, k, v)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="q_segments: act does not support"):
        ACT()(q, k, v, geometry=Geometry(q_segments=ids, kv_segments=ids))
