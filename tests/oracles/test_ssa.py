"""SSA against the paper: both modes token by token, and the loss by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.base import Position
from saccade.mechanisms.where.ssa import SSA, alignment_loss


def softmax_of(q: Tensor, keys: list[Tensor]) -> list[float]:
    weights = [math.exp(float(q @ key) / math.sqrt(len(q))) for key in keys]
    return [w / sum(weights) for w in weights]


def chosen_blocks(q: Tensor, k: Tensor, place: int, block: int, topk: int) -> set[int]:
    """For the queries `[share, D]` of one group: own block, and the best of those before, by blocks that are whole."""
    own, whole = place // block, (place + 1) // block
    means = [k[c * block : (c + 1) * block].mean(0) for c in range(whole)]
    totals = [sum(weights) for weights in zip(*(softmax_of(one, means) for one in q), strict=True)] if whole else []
    return {own, *sorted(range(own), key=lambda c: -totals[c])[: topk - 1]}


def oracle(layer: SSA, x: Tensor, mode: str) -> Tensor:
    """Gated outputs `[N, H, D]` of one sequence `[N, C]`."""
    tokens, groups = len(x), layer.groups
    share = layer.heads // groups
    q, k, v = (m(x).view(tokens, -1, layer.query.out_features // layer.heads)
               for m in (layer.query, layer.key, layer.value))  # fmt: skip
    gates = layer.gate(x).sigmoid()
    out = torch.zeros_like(q)
    for g in range(groups):
        mine = list(range(g * share, (g + 1) * share))
        for i in range(tokens):
            blocks = chosen_blocks(q[i, mine], k[:, g], i, layer.block, layer.topk)
            places = [j for j in range(i + 1) if mode == "full" or j // layer.block in blocks]
            for h in mine:
                weights = softmax_of(q[i, h], [k[j, g] for j in places])
                out[i, h] = gates[i, h] * sum(w * v[j, g] for w, j in zip(weights, places, strict=True))
    return out


def build(**settings: int) -> SSA:
    torch.manual_seed(0)
    return SSA(**settings).double()


@pytest.mark.parametrize("tokens", [1, 4, 27, 32])
@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 8, "heads": 4, "kv_heads": 2, "block": 4, "topk": 3},
        {"dim": 8, "heads": 2, "block": 3, "topk": 2},
        {"dim": 6, "heads": 2, "kv_heads": 1, "head_dim": 4, "block": 5, "topk": 1},
        {"dim": 8, "heads": 2, "block": 8, "topk": 9},
    ],
    ids=str,
)
def test_both_modes_and_the_loss(settings: dict[str, int], tokens: int) -> None:
    layer = build(**settings)
    x = 4 * torch.randn(2, tokens, settings["dim"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        outputs = {mode: torch.stack([oracle(layer, one, mode) for one in x]) for mode in ("sparse", "full")}
        for mode, expected in outputs.items():
            layer.mode = mode
            wanted = expected.flatten(2) @ layer.projection.weight.T
            torch.testing.assert_close(layer(x), wanted, atol=1e-10, rtol=0)
            got, loss = layer.aligned(x, mode)
            torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
            apart = (outputs["full"] - outputs["sparse"]).abs()
            smooth = torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean()
            torch.testing.assert_close(loss, 2 * smooth, atol=1e-12, rtol=0)


def test_known_by_hand() -> None:
    """|1 - 4| = 3 costs 2.5 and |0 - 0.5| costs 0.125, on average 1.3125, once in each direction."""
    loss = alignment_loss(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.5]))
    assert float(loss) == pytest.approx(2.625)


def test_each_side_is_pulled_to_the_held_other() -> None:
    full = torch.tensor([1.0, 0.0], requires_grad=True)
    sparse = torch.tensor([4.0, 0.5], requires_grad=True)
    alignment_loss(full, sparse).backward()
    assert full.grad.tolist() == [-0.5, -0.25]
    assert sparse.grad.tolist() == [0.5, 0.25]


def test_keys_that_are_not_selected_get_gradients_from_the_loss_alone() -> None:
    layer = build(dim=8, heads=2, block=4, topk=1)
    x = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    layer(x)[:, 12:].sum().backward()
    assert float(x.grad[:, :12].abs().max()) == 0
    _, loss = layer.aligned(x)
    loss.backward()
    assert float(x.grad[:, :12].abs().min(-1).values.max()) > 0


def test_all_blocks_are_full_attention() -> None:
    layer = build(dim=8, heads=4, kv_heads=2, block=4, topk=8)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    with torch.no_grad():
        sparse, loss = layer.aligned(x, "sparse")
        torch.testing.assert_close(sparse, layer.aligned(x, "full")[0])
        assert float(loss) < 1e-20


def test_positions_turn_queries_and_keys() -> None:
    class Scale(Position):
        def encode(self, x: Tensor, positions: Tensor) -> Tensor:
            return x * (1 + positions.to(x)[:, None])

    plain = build(dim=8, heads=2, block=4, topk=2)
    placed = SSA(dim=8, heads=2, block=4, topk=2, positions=Scale()).double()
    placed.load_state_dict(plain.state_dict())
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(plain(x), placed(x))


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode='dense': expected None, 'sparse' or 'full'"):
        build(dim=8, heads=2).aligned(torch.zeros(1, 4, 8, dtype=torch.float64), "dense")


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 7\): expected \[B, N, 8\]"):
        build(dim=8, heads=2)(torch.zeros(2, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 0}, "heads=0: expected at least 1"),
        ({"kv_heads": 3}, "kv_heads=3: expected a divisor of heads=4"),
        ({"dim": 6}, "dim=6: expected a multiple of heads=4"),
        ({"head_dim": 0}, "head_dim=0: expected at least 1 channel"),
        ({"block": 0}, "block=0: expected at least 1 token"),
        ({"topk": 0}, "topk=0: expected at least 1 block"),
        ({"mode": "dense"}, "mode='dense': expected 'sparse' or 'full'"),
    ],
)
def test_bad_setting(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSA(**{"dim": 16, "heads": 4, **settings})
