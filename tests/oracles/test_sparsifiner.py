"""Sparsifiner, query by query: the sketch of its row of the attention map, the keys it names, and softmax over them."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where import sparsifiner
from saccade.mechanisms.where.sparsifiner import Sparsifiner


def row_of_map(weights, heads, q, keys, coefficients=None):
    """C of one query, all but the largest dropped if `coefficients` is given: a plain list."""
    low = weights["sketch_query.weight"] @ q + weights["sketch_query.bias"]
    short = [weights["sketch_key.weight"] @ key + weights["sketch_key.bias"] for key in keys]
    scores = []
    for row in weights["gather_tokens"]:
        gathered = sum(share * key for share, key in zip(row, short, strict=True))
        scores.append(low @ gathered / math.sqrt(heads))
    found = torch.softmax(torch.stack(scores), 0).tolist()
    if coefficients is not None:
        kept = sorted(range(len(found)), key=lambda n: (-found[n], n))[:coefficients]
        found = [value if n in kept else 0.0 for n, value in enumerate(found)]
    return found


def oracle(layer, x, keep, coefficients, threshold, class_tokens):
    weights = dict(layer.named_parameters())
    batch, count, dim = x.shape
    depth, budget = dim // layer.heads, math.ceil(keep * count)
    basis = [[abs(value) if abs(value) > threshold else 0.0 for value in row] for row in weights["basis"].tolist()]
    out = torch.empty_like(x)
    for b in range(batch):
        qkv = [(weights["qkv.weight"] @ token + weights.get("qkv.bias", 0)).split(dim) for token in x[b]]
        for i in range(count):
            heads = []
            for h in range(layer.heads):
                mine = slice(h * depth, (h + 1) * depth)
                query, keys = qkv[i][0][mine], [key[mine] for _, key, _ in qkv]
                seen = list(range(count))
                if i >= class_tokens:
                    found = row_of_map(
                        weights, layer.heads, query.detach(), [key.detach() for key in keys], coefficients
                    )
                    sketch = [sum(c * row[j] for c, row in zip(found, basis, strict=True)) for j in range(count)]
                    seen = sorted(seen, key=lambda j: (-sketch[j], j))[:budget]
                scores = torch.stack([query @ keys[j] / depth**0.5 for j in seen])
                heads.append(torch.softmax(scores, 0) @ torch.stack([qkv[j][2][mine] for j in seen]))
            out[b, i] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = Sparsifiner(**{"dim": 4, "tokens": 9, "heads": 2, "reduce_tokens": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize("workspace", [1, 2**24])  # one row of scores at a time, all of them
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.5, "coefficients": 2, "threshold": 0.3, "class_tokens": 1},
        {"keep": 0.2, "coefficients": 3, "threshold": 0.0, "class_tokens": 0},
        {"keep": 0.6, "coefficients": 1, "threshold": 1.0, "class_tokens": 3},
    ],
)
def test_sparse_attention_equals_the_paper(settings, workspace, monkeypatch):
    monkeypatch.setattr(sparsifiner, "WORKSPACE", workspace)
    layer = build(**settings)
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.qkv.parameters(), *layer.projection.parameters()]
    out, wanted = layer(x), oracle(layer, x, **settings)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_keeping_all_is_attention():
    layer = build(keep=1.0)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    dense = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
    torch.testing.assert_close(layer(x), layer.projection(dense.transpose(1, 2).flatten(2)))


def test_known_choice():
    """A basis of two rows, each naming two keys: a query that takes one row attends to its keys."""
    layer = build(dim=2, tokens=4, heads=1, keep=0.5, coefficients=1, class_tokens=0)
    with torch.no_grad():
        layer.basis.copy_(torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 1.0, 0.0]]))
        layer.gather_tokens.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        for part in (layer.sketch_query, layer.sketch_key):
            part.weight.fill_(1)
            part.bias.zero_()
    q = torch.tensor([[1.0, 0], [-1.0, 0]], dtype=torch.float64).view(1, 1, 2, 2)
    k = torch.tensor([[1.0, 0], [0, 0], [5.0, 0], [5.0, 0]], dtype=torch.float64).view(1, 1, 4, 2)
    assert layer.connectivity(q, k).tolist() == [[[[0, 3], [1, 2]]]]


@pytest.mark.parametrize("workspace", [1, 2**24])
def test_reconstruction_loss_equals_the_paper(workspace, monkeypatch):
    monkeypatch.setattr(sparsifiner, "WORKSPACE", workspace)
    layer = build()
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    weights = dict(layer.named_parameters())
    q, k, _ = layer.qkv(x)[0].detach().unflatten(1, (3, 2, 2)).permute(1, 2, 0, 3)
    wanted = 0.0
    for h in range(2):
        for i in range(1, 9):
            attention = torch.softmax(k[h] @ q[h, i] / 2**0.5, 0)
            found = torch.tensor(row_of_map(weights, 2, q[h, i], list(k[h])), dtype=torch.float64)
            wanted += float((found @ weights["basis"].detach() - attention).square().sum())
    loss = layer.reconstruction_loss(x)
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    loss.backward()
    assert layer.qkv.weight.grad is None
    assert all(getattr(layer, name).weight.grad.abs().sum() > 0 for name in ("sketch_query", "sketch_key"))
    assert layer.basis.grad.abs().sum() > 0
    assert layer.gather_tokens.grad.abs().sum() > 0


def test_a_trained_predictor_beats_random_keys():
    """Tokens of four kinds, each seeing its own: after training, errors are less than half those of random keys."""
    torch.manual_seed(0)
    tokens, dim = 32, 16
    layer = Sparsifiner(dim, tokens, heads=2, keep=0.25, reduce_tokens=4, class_tokens=0)
    with torch.no_grad():
        layer.qkv.weight[: 2 * dim] = torch.eye(dim).repeat(2, 1) * 2.5
        layer.qkv.bias.zero_()
        layer.projection.weight.copy_(torch.eye(dim))
        layer.projection.bias.zero_()
    kinds = torch.randn(4, dim)
    place = torch.arange(tokens) // 8

    def batch(size):
        return kinds[place] + 0.3 * torch.randn(size, tokens, dim)

    predictor = [layer.basis, layer.gather_tokens, *layer.sketch_query.parameters(), *layer.sketch_key.parameters()]
    optimiser = torch.optim.Adam(predictor, lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        layer.reconstruction_loss(batch(8)).backward()
        optimiser.step()
    with torch.no_grad():
        x = batch(8)
        q, k, v = layer.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 8**-0.5
        dense = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = torch.ones_like(scores, dtype=torch.bool)
        hidden.scatter_(-1, torch.rand_like(scores).topk(8, -1).indices, value=False)
        random = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert (layer(x) - dense).norm() < 0.5 * (random - dense).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"tokens": 0}, "tokens=0: expected at least 1"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"keep": 0.0}, r"keep=0.0: expected a fraction of the keys in \(0, 1\]"),
        ({"reduce_tokens": 10}, "reduce_tokens=10: expected from 1 to tokens=9"),
        ({"reduce_channels": 3}, "reduce_channels=3: expected from 1 to 2, those of a head"),
        ({"coefficients": 0}, "coefficients=0: expected at least 1"),
        ({"threshold": -0.1}, "threshold=-0.1: expected at least 0"),
        ({"class_tokens": 10}, "class_tokens=10: expected from 0 to tokens=9"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sparsifiner(**{"dim": 4, "tokens": 9, "heads": 2} | settings)


def test_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"x of shape \(1, 8, 4\): expected \[B, 9, 4\]"):
        build()(torch.zeros(1, 8, 4, dtype=torch.float64))
