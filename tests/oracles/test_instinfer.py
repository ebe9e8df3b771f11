"""InstInfer without SparF is exact attention, computed where the keys and values are: in another process, on a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.catalog.papers import papers
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.instinfer import InstInfer


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Softmax attention of the last query, head by head."""
    out = np.zeros((*q.shape[:2], v.shape[3]))
    for entry in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            weights = np.exp(k[entry, group] @ q[entry, head, -1] / q.shape[3] ** 0.5)
            out[entry, head] = weights @ v[entry, group] / weights.sum()
    return out


def test_attention_is_exact_and_nothing_is_held_here(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 2100, 16, generator=generator) for heads in (4, 2, 2))
    layer = CachedAttention(InstInfer(str(tmp_path), resident=0.1))
    layer(*(x[:, :, :2096] for x in (q, k, v)))
    for token in range(2096, 2100):
        out = layer(*(x[:, :, token : token + 1] for x in (q, k, v)))
        expected = oracle(*(x[:, :, : token + 1].double().numpy() for x in (q, k, v)))
        np.testing.assert_allclose(out[:, :, 0].numpy(), expected, atol=1e-5)
    assert layer.nbytes == 0
    assert layer.kept.remote_nbytes < 0.35 * 2 * k.nbytes
    assert list(tmp_path.iterdir()) == []


def test_the_catalogue_says_what_it_needs() -> None:
    (paper,) = [paper for paper in papers() if paper.title in InstInfer.card.papers]
    assert "computational storage" in paper.missing
    assert "SparF" in paper.missing


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path='.*nowhere': expected a directory that exists"):
        InstInfer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="resident=2: expected a part of the pages"):
        InstInfer(resident=2)
