"""Loki against loops with numpy's singular value decomposition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.loki import Loki, principal_components


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, tokens: int, dims: int, centred: bool) -> Tensor:
    batch, heads, total, dim = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // share].numpy(), v[b, h // share]
            known = keys[: prompt + 1]  # what is stored when the first token is decoded
            basis = np.linalg.svd(known - known.mean(0) if centred else known)[2][:dims]
            for i in range(total):
                query = q[b, h, i].numpy()
                ranks = [float((basis @ query) @ (basis @ key)) for key in keys[: i + 1]]
                seen = sorted(range(i + 1), key=lambda j: -ranks[j])[: tokens if i >= prompt else i + 1]
                weights = torch.tensor(keys[seen] @ query / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ values[seen]
    return out


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("heads", "groups", "tokens", "dims"), [(4, 2, 5, 3), (2, 2, 1, 8), (3, 1, 9, 2)])
def test_matches_the_oracle(heads: int, groups: int, tokens: int, dims: int, centred: bool) -> None:
    q, k, v = inputs(heads, groups, 26)
    k = k + k[:, :, :1]  # a mean that matters
    layer = CachedAttention(Loki(tokens=tokens, dims=dims, centred=centred))
    sizes = [17] + [1] * 9
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, oracle(q, k, v, 17, tokens, dims, centred), rtol=0, atol=1e-10)
    ranking = 2 * groups * (26 * dims + 8) * 8  # leading coordinates of all keys, and the new key
    assert layer.bytes_read == 2 * heads * tokens * (8 + 5) * 8 + ranking


def test_given_components_are_used() -> None:
    """Keys differ in channel 0, but the components look at channel 1 only."""
    k = torch.tensor([[9.0, 0], [0, 1], [0, 2]], dtype=torch.float64).view(1, 1, 3, 2)
    basis = torch.tensor([[0.0], [1.0]], dtype=torch.float64)[None]
    layer = CachedAttention(Loki(tokens=1, dims=1, components=(basis,)))
    layer(k, k, k)
    out = layer(*(torch.ones(1, 1, 1, 2, dtype=torch.float64) * s for s in (1, 0, 0)))
    assert out.flatten().tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="components=1: expected one for each layer, also layer 1"):
        Loki(dims=1, components=(basis,)).select(k[:, :, :1], layer.kept, Step(layer=1))
    with pytest.raises(ValueError, match=r"components=\(1, 2, 1\): expected \[1, 2, 2 or more\]"):
        Loki(dims=2, components=(basis,)).select(k[:, :, :1], layer.kept, Step())
    with pytest.raises(ValueError, match="dims=3: expected at most the 2 channels"):
        Loki(dims=3).select(k[:, :, :1], layer.kept, Step())


@pytest.mark.parametrize("centred", [False, True])
def test_components_ignore_what_is_absent(centred: bool) -> None:
    keys = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    present = torch.arange(9)[None, None] < 6
    whole = principal_components(keys[:, :, :6], centred=centred)
    part = principal_components(keys, present, centred=centred)
    torch.testing.assert_close(part.abs(), whole.abs(), rtol=0, atol=1e-9)


def test_a_sink_is_found_only_with_the_mean() -> None:
    """Keys that share a long mean and a first key near zero: a query against the mean attends to the first alone."""
    generator = torch.Generator().manual_seed(0)
    k = 1.5 * torch.randn(1, 1, 200, 8, generator=generator)
    k[..., 7] = 10 + 0.05 * torch.randn(1, 1, 200, generator=generator)
    k[:, :, 0] = 0
    q = torch.randn(1, 1, 1, 8, generator=generator) * 0.1
    q[..., 7] = -3.0
    first = {}
    for centred in (False, True):
        layer = CachedAttention(Loki(tokens=50, dims=4, centred=centred))
        layer(k, k, k)
        first[centred] = bool((layer.policy.select(q, layer.kept, Step()).indices == 0).any())  # type: ignore[attr-defined]
    assert first[False]
    weights = (k @ q.transpose(-1, -2) / math.sqrt(8))[0, 0, :, 0].softmax(0)
    assert float(weights[0]) > 0.9
    assert not first[True]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        Loki(tokens=0)
    with pytest.raises(ValueError, match="dims=0: expected at least 1 component"):
        Loki(dims=0)
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        Loki(dense_layers=-1)
