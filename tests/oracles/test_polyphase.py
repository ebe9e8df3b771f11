"""Polyphase anchoring: the strongest phase by slicing, Twins on the rolled map, and equivariance to every shift."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.polyphase import Polyphase, anchored, strongest_phase
from saccade.mechanisms.where.swin_attention import SwinAttention


def oracle(layer, x):
    """Each map alone: the phase of largest norm to the front, the attention, and back."""
    size, outs = layer.size, []
    for each in x:
        norms = {(i, j): each[:, i::size, j::size].norm().item() for i in range(size) for j in range(size)}
        i, j = max(norms, key=norms.get)
        moved = torch.cat(
            [torch.cat([each[:, i:], each[:, :i]], 1)[:, :, j:], torch.cat([each[:, i:], each[:, :i]], 1)[:, :, :j]], 2
        )
        out = layer.layer(moved[None])[0]
        if layer.restore:
            height, width = out.shape[1:]
            out = torch.cat([out[:, height - i :], out[:, : height - i]], 1)
            out = torch.cat([out[:, :, width - j :], out[:, :, : width - j]], 2)
        outs.append(out)
    return torch.stack(outs)


def build(**settings):
    torch.manual_seed(0)
    layer = Polyphase(**{"dim": 4, "heads": 2, "size": 3} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize("form", ["local", "global"])
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (3, 6)])
def test_anchored_attention_equals_the_paper(shape, restore, form):
    layer = build(form=form, restore=restore)
    x = torch.randn(3, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def all_shifts(x):
    return [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]


@pytest.mark.parametrize("form", ["local", "global"])
def test_every_circular_shift_shifts_the_output(form):
    """100 % consistency: each of the 54 shifts of three maps."""
    layer = build(form=form)
    x = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    out = layer(x)
    for shift in all_shifts(x):
        torch.testing.assert_close(layer(x.roll(shift, (2, 3))), out.roll(shift, (2, 3)), rtol=1e-11, atol=1e-11)


def test_without_anchoring_shifts_change_predictions():
    """A classifier over the largest features always agrees with itself, the same one on plain windows does not."""
    layer = build(dim=8, form="local")
    with torch.no_grad():
        for part in (layer.layer.query, layer.layer.key_value, layer.layer.projection):
            part.bias.zero_()
    x = torch.randn(8, 8, 6, 6, dtype=torch.float64)
    agreed = {}
    for name, model in (("anchored", layer), ("plain", layer.layer)):
        wanted = model(x).amax((2, 3)).argmax(1)
        same = [model(x.roll(shift, (2, 3))).amax((2, 3)).argmax(1) == wanted for shift in all_shifts(x)]
        agreed[name] = torch.stack(same).double().mean().item()
    assert agreed["anchored"] == 1.0
    assert agreed["plain"] < 0.9


@pytest.mark.parametrize("shift", [(1, 0), (2, 5), (4, 3)])
def test_anchors_any_layer_and_any_stride(shift):
    """Swin's windows, and a patch embedding, whose output moves by whole patches."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 9, dtype=torch.float64)
    swin = SwinAttention(4, heads=2, window=3).double()
    torch.testing.assert_close(anchored(swin, x.roll(shift, (2, 3)), 3), anchored(swin, x, 3).roll(shift, (2, 3)))
    patches = torch.nn.Conv2d(4, 5, 3, 3).double()
    before, after = (anchored(patches, each, 3, restore=False) for each in (x, x.roll(shift, (2, 3))))
    for b in range(2):
        gaps = [(after[b].roll((i, j), (1, 2)) - before[b]).abs().max() for i in range(2) for j in range(3)]
        assert min(gaps) < 1e-12


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_anchors_follow_shifts_in_low_precision(dtype, spread):
    """Of many phases that are nearly as strong, the same one is found after each shift."""
    torch.manual_seed(0)
    x = (1 + spread * torch.randn(16, 4, 16, 16)).to(dtype)
    for shift in ((1, 0), (3, 2), (0, 7)):
        expected = (strongest_phase(x, 4) + torch.tensor(shift)) % 4
        assert torch.equal(strongest_phase(x.roll(shift, (2, 3)), 4), expected)


def test_known_anchor():
    """One bright pixel at (3, 2): phase (1, 0) of two."""
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 3, 2] = 1
    assert strongest_phase(x, 2).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"size": 0}, "size=0: expected at least 1 pixel"),
        ({"form": "grid"}, "form='grid': expected 'local' or 'global'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Polyphase(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 6, 6\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"x of shape \(1, 4, 6, 7\): expected height and width that are multiples of 3"
    ):
        build()(torch.zeros(1, 4, 6, 7, dtype=torch.float64))
