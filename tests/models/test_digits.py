"""Digits in noise and behind haze."""

from __future__ import annotations

import sys

import pytest
import torch

from saccade.models.digits import CONTRAST, Digits, load_digits

TOY = Digits(torch.arange(128).view(2, 8, 8) / 128, torch.tensor([3, 7]))


def test_each_canvas_shows_its_digit_in_its_slot():
    canvases = TOY.canvases(20, 3, torch.Generator().manual_seed(0))
    assert canvases.pixels.shape == (20, 24, 24)
    assert set(canvases.labels.tolist()) == {3, 7}
    assert canvases.places.flatten(1).sum(1).tolist() == [1] * 20
    for pixels, label, places in zip(canvases.pixels, canvases.labels, canvases.places, strict=True):
        ((row, column),) = places.nonzero().tolist()
        shown = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(shown, TOY.images[[3, 7].index(int(label))])


def test_the_rest_is_noise():
    canvases = TOY.canvases(50, 3, torch.Generator().manual_seed(1))
    rest = canvases.pixels[~canvases.marked(1)]
    assert 0 <= rest.min() < 0.01 < 0.99 < rest.max() <= 1
    assert rest.mean() == pytest.approx(0.5, abs=0.01)
    assert rest.var() == pytest.approx(1 / 12, abs=0.002)


def test_patches_of_a_canvas():
    canvases = TOY.canvases(2, 2, torch.Generator().manual_seed(2))
    patches, marked = canvases.patches(4), canvases.marked(4)
    assert patches.shape == (2, 4, 4, 16)
    assert torch.equal(patches[1, 2, 3], canvases.pixels[1, 8:12, 12:16].flatten())
    assert marked.flatten(1).sum(1).tolist() == [4, 4]
    image = TOY.images[[3, 7].index(int(canvases.labels[0]))]
    corner = marked[0].nonzero()[0]
    assert torch.equal(patches[0, corner[0], corner[1]], image[:4, :4].flatten())


def test_haze_is_one_line_for_all_pixels():
    hazed, clear = TOY.hazed(30, 12, torch.Generator().manual_seed(3))
    assert hazed.shape == clear.shape == (30, 12, 12)
    assert hazed.min() >= 0
    assert hazed.max() <= 1
    for seen, true in zip(hazed.flatten(1), clear.flatten(1), strict=True):
        line = torch.stack([true, torch.ones_like(true)], 1)
        found = torch.linalg.lstsq(line, seen[:, None]).solution
        torch.testing.assert_close((line @ found)[:, 0], seen, atol=1e-5, rtol=0)
        assert CONTRAST[0] - 1e-4 < float(found[0]) < CONTRAST[1] + 1e-4
        assert any(torch.equal(true[true > 0].sort().values, image[image > 0]) for image in TOY.images.flatten(1))


def test_held_out_digits_are_others():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    train, held_out = load_digits()
    assert (len(train.labels), len(held_out.labels)) == (1297, 500)
    assert train.images.shape == (1297, 8, 8)
    assert (train.images.min(), train.images.max()) == (0, 1)
    assert set(held_out.labels.tolist()) == set(range(10))
    assert torch.equal(load_digits()[1].images, held_out.images)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"the digits need scikit-learn: pip install 'saccade\[digits\]'"):
        load_digits()
