"""FoPE against a loop over heads, tokens and frequencies, and against RoPE as a rotation of complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.positions.fope import FoPE

pytestmark = pytest.mark.quick


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(head_dim=8, heads=2, **settings):
    torch.manual_seed(0)
    return FoPE(head_dim, heads, **settings, dtype=torch.float64)


def oracle(x, places, fope, train_length, theta):
    """Cosine and sine series one number at a time; `places` is `[B][M]`."""
    batch, heads, tokens, dim = x.shape
    half, share = dim // 2, heads // fope.cos_coef.shape[0]
    waves = [w for w in (theta ** (-2 * i / dim) for i in range(half)) if w >= 2 * math.pi / train_length]
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                for m in range(half):
                    cos, sin = 1.0, 0.0
                    if m < len(waves):
                        n, coefficients = places[b][t], (fope.cos_coef[h // share], fope.sin_coef[h // share])
                        cos = sum(float(coefficients[0][i, m]) * math.cos(w * n) for i, w in enumerate(waves))
                        sin = sum(float(coefficients[1][i, m]) * math.sin(w * n) for i, w in enumerate(waves))
                    first, second = x[b, h, t, m], x[b, h, t, m + half]
                    out[b, h, t, m] = first * cos - second * sin
                    out[b, h, t, m + half] = second * cos + first * sin
    return out


@pytest.mark.parametrize(("heads", "train_length"), [(2, 64), (4, 64), (2, 10**9), (2, 4)])
def test_agrees_with_the_series(heads, train_length):
    fope, x = build(train_length=train_length, gain=0.5), draw(2, heads, 5, 8)
    expected = oracle(x, [[3, 4, 5, 6, 70]] * 2, fope, train_length, 10000.0)
    torch.testing.assert_close(fope.encode(x, torch.tensor([3, 4, 5, 6, 70])), expected, rtol=0, atol=1e-10)


def test_positions_of_each_sequence():
    fope, x, places = build(theta=100.0, train_length=40), draw(2, 2, 3, 8), [[0, 1, 2], [9, 5, 30]]
    torch.testing.assert_close(
        fope(x, torch.tensor(places)), oracle(x, places, fope, 40, 100.0), rtol=0, atol=1e-10
    )  # fmt: skip


def test_identity_coefficients_give_rope():
    fope, x = build(gain=0.0, frequencies=4), draw(1, 2, 7, 8)
    places = torch.arange(11, 18)
    angles = places[:, None].double() * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(fope(x, places), torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-12)


def test_hand_worked_quarter_turn():
    """One pair, frequency 1: place 0 leaves it, and coefficient 2 on the cosine doubles it there."""
    fope = FoPE(2, 1, gain=0.0, frequencies=1)
    x = torch.tensor([[[[3.0, 4.0]]]])
    assert fope(x, torch.tensor([0])).flatten().tolist() == [3.0, 4.0]
    with torch.no_grad():
        fope.cos_coef.fill_(2.0)
    assert fope(x, torch.tensor([0])).flatten().tolist() == [6.0, 8.0]


def test_pairs_below_the_floor_do_not_turn():
    """D = 8, theta 10000: frequencies 1, 0.1, 0.01, 0.001; a training length of 64 keeps those above 0.098."""
    fope, x = build(train_length=64), draw(1, 2, 3, 8)
    out = fope(x, torch.tensor([5, 50, 500]))
    still = [2, 3, 6, 7]
    assert fope.cos_coef.shape == (2, 2, 2)
    torch.testing.assert_close(out[..., still], x[..., still], rtol=0, atol=0)
    assert (out[..., [0, 1, 4, 5]] != x[..., [0, 1, 4, 5]]).any()


def test_coefficients_are_fixed_unless_learned_and_gradients_are_right():
    assert not any(weight.requires_grad for weight in build().parameters())
    fope, places = build(train_length=64, learned=True), torch.tensor([3, 9])

    def encode(x, cos_coef, sin_coef):
        return torch.func.functional_call(fope, {"cos_coef": cos_coef, "sin_coef": sin_coef}, (x, places))

    inputs = (draw(1, 2, 2, 8), fope.cos_coef.detach(), fope.sin_coef.detach())
    assert torch.autograd.gradcheck(encode, tuple(x.clone().requires_grad_() for x in inputs))


def test_far_positions_keep_their_phase_in_low_precision():
    fope, x = FoPE(2, 1, gain=0.0, frequencies=1), torch.tensor([[[[1.0, 0.0]]]])
    place = 2**24 + 1
    out = fope.to(torch.bfloat16)(x, torch.tensor([place])).flatten()
    torch.testing.assert_close(out, torch.tensor([math.cos(place), math.sin(place)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 7}, "head_dim=7: expected an even number"),
        ({"heads": 0}, "heads=0: expected at least 1"),
        ({"train_length": 0}, "train_length=0: expected at least 1 token"),
        ({"theta": 0.0}, r"theta=0\.0: expected more than 0"),
        ({"gain": -1.0}, r"gain=-1\.0: expected at least 0"),
        ({"frequencies": 5}, "frequencies=5: expected 0 to head_dim / 2 = 4"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_bad_inputs_are_named():
    fope = build()
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 8\): expected \[B, a multiple of 2, M, 8\]"):
        fope(draw(1, 3, 5, 8), torch.arange(5))
    with pytest.raises(ValueError, match=r"positions of shape \(4,\): expected \[5\] or \[1, 5\]"):
        fope(draw(1, 2, 5, 8), torch.arange(4))
    with pytest.raises(ValueError, match=r"positions of dtype torch.float32: expected an integer dtype"):
        fope(draw(1, 2, 5, 8), torch.arange(5.0))
