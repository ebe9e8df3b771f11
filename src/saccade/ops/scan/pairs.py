"""Decayed products inside a chunk: P_ij = sum_d a_id k_jd exp(c_id - c_jd) for j <= i, and their gradients.

`c` is the inclusive cumulative log decay. Every exponent that is taken is <= 0 for decays in (0, 1], so nothing
overflows: a scalar decay is applied to the finished product; a per-channel one is split at the middle of ever smaller
blocks, queries of the right half and keys of the left half being scaled relative to it.

Shapes: `groups` `[B, S, n, R, L, D]` are R sets of queries that share the keys `k` `[B, S, n, L, D]` of n chunks of L
tokens; `cumulative` `[B or 1, S, n or 1, L, D or 1]`; products `[B, S, n, R, L, L]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def pair_products(groups: Tensor, k: Tensor, cumulative: Tensor) -> Tensor:
    """P, 0 above the diagonal."""
    if cumulative.shape[-1] > 1:
        return _channel_products(groups, k, cumulative)
    products = fold(groups) @ k.mT
    return unfold(products, groups.shape[3]).mul_(_scalar_decay(cumulative))


def pair_gradients(dproducts: Tensor, groups: Tensor, k: Tensor, cumulative: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of P with respect to `groups` and `k`; the part of `dproducts` above the diagonal is ignored."""
    if cumulative.shape[-1] > 1:
        return _channel_gradients(dproducts, groups, k, cumulative)
    weighted = fold(dproducts * _scalar_decay(cumulative))
    return unfold(weighted @ k, groups.shape[3]), weighted.mT @ fold(groups)


def fold(groups: Tensor) -> Tensor:
    """`[B, S, n, R, L, X]` -> `[B, S, n, R * L, X]`, so that R sets of queries meet their keys in one product."""
    return groups.flatten(3, 4)


def unfold(rows: Tensor, sets: int) -> Tensor:
    """Inverse of `fold`."""
    return rows.unflatten(3, (sets, rows.shape[3] // sets))


def _scalar_decay(cumulative: Tensor) -> Tensor:
    """exp(c_i - c_j) for j <= i, else 0: `[B or 1, S, n or 1, 1, L, L]`."""
    difference = cumulative - cumulative.mT
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill_(future, -torch.inf).exp_().unsqueeze(3)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves `[..., blocks, half, D]` of every block of 2 * half tokens of `x` `[..., L, D]`."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _corners(products: Tensor, half: int) -> Tensor:
    """View `[..., half, half, blocks]` of `products` `[..., L, L]`: each block's right-half rows, left-half columns."""
    blocks = products.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return blocks[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)


def _pad_to_power(x: Tensor, *, repeat: bool = False) -> Tensor:
    """`x` `[..., L, D]` with zeros, or its last row, appended up to a power of two."""
    length = x.shape[-2]
    missing = (1 << max(length - 1, 0).bit_length()) - length
    if not missing:
        return x
    tail = x[..., -1:, :].expand(*x.shape[:-2], missing, x.shape[-1])
    return torch.cat([x, tail if repeat else torch.zeros_like(tail)], -2)


def _levels(cumulative: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each half size: decay from the middle to the right half's tokens, and from the left half's to the middle."""
    half = 1
    while half < cumulative.shape[-2]:
        left, right = _halves(cumulative, half)
        middle = left[..., -1:, :]
        yield half, (right - middle).exp_(), (middle - left).exp_()
        half *= 2


def _channel_products(groups: Tensor, k: Tensor, cumulative: Tensor) -> Tensor:
    length = k.shape[-2]
    groups, k, cumulative = _pad_to_power(groups), _pad_to_power(k), _pad_to_power(cumulative, repeat=True)
    padded = k.shape[-2]
    products = groups.new_zeros(*groups.shape[:-1], padded)
    products.diagonal(dim1=-2, dim2=-1).copy_((groups * k.unsqueeze(3)).sum(-1))
    for half, right_decay, left_decay in _levels(cumulative):
        queries = _halves(groups, half)[1] * right_decay.unsqueeze(3)
        keys = (_halves(k, half)[0] * left_decay).unsqueeze(3)
        _corners(products, half).copy_((queries @ keys.mT).movedim(-3, -1))
    return products[..., :length, :length]


def _channel_gradients(dproducts: Tensor, groups: Tensor, k: Tensor, cumulative: Tensor) -> tuple[Tensor, Tensor]:
    length = k.shape[-2]
    groups, k, cumulative = _pad_to_power(groups), _pad_to_power(k), _pad_to_power(cumulative, repeat=True)
    dproducts = _pad_to_power(_pad_to_power(dproducts).mT).mT
    on_diagonal = dproducts.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dgroups = on_diagonal * k.unsqueeze(3)
    dk = (on_diagonal * groups).sum(3)
    for half, right_decay, left_decay in _levels(cumulative):
        corner = _corners(dproducts, half).movedim(-1, -3)
        keys = (_halves(k, half)[0] * left_decay).unsqueeze(3)
        queries = _halves(groups, half)[1] * right_decay.unsqueeze(3)
        _halves(dgroups, half)[1].add_(corner @ keys * right_decay.unsqueeze(3))
        _halves(dk, half)[0].add_((corner.mT @ queries).sum(3) * left_decay)
    return dgroups[..., :length, :], dk[..., :length, :]
