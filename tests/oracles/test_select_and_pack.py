"""SPA against its definition: image by image, container by container."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.select_and_pack import SelectAndPack


def oracle(layer, x, previous=None):
    """Evaluation: `[B, N, C]`, and how many tokens each image keeps."""
    weights, depth = dict(layer.named_parameters()), layer.dim // layer.heads
    out, kept = torch.zeros_like(x), []
    for b in range(len(x)):
        scores = (x[b] @ weights["gate.weight"].T + weights["gate.bias"])[:, 0]
        if previous is not None:
            scores = torch.stack([max(a, c) for a, c in zip(scores, previous[b], strict=True)])
        chosen = [i for i in range(x.shape[1]) if torch.sigmoid(scores[i]) > layer.threshold]
        kept.append(len(chosen))
        for start in range(0, len(chosen), layer.container):
            mine = chosen[start : start + layer.container]
            tokens = torch.sigmoid(scores[mine])[:, None] * x[b, mine]
            qkv = tokens @ weights["qkv.weight"].T + weights["qkv.bias"]
            for h in range(layer.heads):
                q, k, v = (qkv[:, p * layer.dim + h * depth : p * layer.dim + (h + 1) * depth] for p in range(3))
                found = torch.softmax(q @ k.T / depth**0.5, 1) @ v
                for row, token in enumerate(mine):
                    out[b, token, h * depth : (h + 1) * depth] = found[row]
    return out @ weights["projection.weight"].T + weights["projection.bias"], kept


def build(**settings):
    torch.manual_seed(0)
    layer = SelectAndPack(**{"dim": 6, "heads": 2, "container": 4} | settings).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize(
    ("tokens", "settings"), [(13, {}), (14, {"container": 3, "threshold": 0.6}), (5, {"heads": 1})]
)
def test_equals_the_paper(tokens, settings, with_previous):
    layer = build(**settings)
    x = torch.randn(3, tokens, 6, dtype=torch.float64, requires_grad=True)
    given = (x, torch.randn(3, tokens, dtype=torch.float64)) if with_previous else (x,)
    wanted, kept = oracle(layer, *given)
    assert len(set(kept)) > 1  # images keep different numbers of tokens
    out = layer(*given)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, 0), (0.0, 11)])
def test_none_or_all_of_the_tokens(threshold, kept):
    layer = build(threshold=threshold)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    wanted, counts = oracle(layer, x)
    assert counts == [kept] * 2
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_only_as_many_containers_as_the_images_need():
    """Of 12 tokens one image keeps 5, the other 1: containers of 4 make 2 and 1, where a grid would take 6."""
    layer = build()
    kept = torch.zeros(2, 12, dtype=torch.bool)
    kept[0, [0, 2, 3, 7, 11]] = True
    kept[1, 5] = True
    slot, count = layer._slots(kept)
    assert count == 3
    assert slot.view(2, 12)[0].tolist() == [0, 12, 1, 2, 12, 12, 12, 3, 12, 12, 12, 4]
    assert slot.view(2, 12)[1].tolist() == [12] * 5 + [8] + [12] * 6


def test_training_reaches_the_gate_through_the_choice():
    """With gated tokens held fixed, the task's gradient alone moves the gate: it passes straight through."""
    layer = build().train()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    through_both = layer.gate.weight.grad.clone()
    torch.manual_seed(1)
    layer.zero_grad()
    noisy = layer._chance(layer.scores(x))
    (noisy * torch.randn_like(noisy)).sum().backward()
    assert through_both.abs().sum() > 0
    assert layer.gate.weight.grad.abs().sum() > 0


def test_the_selection_loss_teaches_the_gate():
    layer = build()
    x = torch.randn(8, 16, 6, dtype=torch.float64)
    labels = x[..., 0] > 0.3
    optimizer = torch.optim.Adam([*layer.gate.parameters()], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = layer.selection_loss(layer.scores(x), labels)
        loss.backward()
        optimizer.step()
    assert ((layer.scores(x).sigmoid() > 0.5) == labels).double().mean() > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0, "heads": 1}, "dim=0: expected at least 1"),
        ({"heads": 4}, "heads=4: expected a divisor of dim=6"),
        ({"container": 0}, "container=0: expected at least 1 token"),
        ({"threshold": 1.5}, r"threshold=1\.5: expected a probability"),
        ({"temperature": 0.0}, r"temperature=0\.0: expected above 0"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectAndPack(**{"dim": 6, "heads": 2} | settings)


def test_refuses_other_shapes():
    layer = build()
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 3\): expected tokens \[B, N, 6\]"):
        layer(torch.zeros(2, 5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"previous of shape \(2, 4\): expected \(2, 5\)"):
        layer(torch.zeros(2, 5, 6, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))
