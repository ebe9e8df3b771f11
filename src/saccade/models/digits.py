"""scikit-learn's digits hidden in noise or behind haze: tasks for attention that has to choose what it looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIDE, CLASSES = 8, 10
"""Pixels of a digit along each axis, and kinds of digits."""

HELD_OUT = 500
"""Digits that are never drawn in training, of 1,797."""

CONTRAST = (0.1, 0.9)
"""Least and greatest share of its own contrast that haze leaves an image."""


@dataclass(frozen=True)
class Canvases:
    """Noise with one digit each.

    Args:
        pixels: fp32 `[B, height, width]` in [0, 1].
        labels: The digits, int64 `[B]` from 0 to 9.
        places: bool `[B, slots down, slots right]`: where they are, in slots of `SIDE` x `SIDE` pixels.
    """

    pixels: Tensor
    labels: Tensor
    places: Tensor

    def patches(self, size: int) -> Tensor:
        """Patches of `size` x `size` pixels, `[B, down, right, size^2]`."""
        return self.pixels.unfold(1, size, size).unfold(2, size, size).flatten(3)

    def marked(self, size: int) -> Tensor:
        """Whether a patch of `size` x `size` pixels shows the digit, bool `[B, down, right]`."""
        return self.places.repeat_interleave(SIDE // size, 1).repeat_interleave(SIDE // size, 2)


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits.

    Args:
        images: fp32 `[n, 8, 8]` in [0, 1].
        labels: int64 `[n]`.
    """

    images: Tensor
    labels: Tensor

    def canvases(self, count: int, slots: int, generator: torch.Generator) -> Canvases:
        """Draw digits, slots and noise.

        Args:
            count: B.
            slots: Places for the digit along each axis.
            generator: Of the draw.

        Returns:
            Canvases of 8 `slots` pixels a side; pixels beside the digit are uniform in [0, 1].
        """
        drawn = torch.randint(len(self.labels), (count,), generator=generator)
        place = torch.randint(slots * slots, (count,), generator=generator)
        tiles = torch.rand(count, slots * slots, SIDE, SIDE, generator=generator)
        tiles[torch.arange(count), place] = self.images[drawn]
        pixels = tiles.view(count, slots, slots, SIDE, SIDE).transpose(2, 3).reshape(count, slots * SIDE, slots * SIDE)
        places = torch.nn.functional.one_hot(place, slots * slots).bool().view(count, slots, slots)
        return Canvases(pixels, self.labels[drawn], places)

    def hazed(self, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw digits and the haze in front of them: one brightness and one contrast for all pixels of an image.

        Args:
            count: B.
            side: Pixels of an image along each axis, at least 8; the digit is anywhere, on black.
            generator: Of the draw.

        Returns:
            Images behind haze and without it, both fp32 `[B, side, side]` in [0, 1].
        """
        drawn = torch.randint(len(self.labels), (count,), generator=generator)
        corner = torch.randint(side - SIDE + 1, (2, count, 1, 1), generator=generator)
        step = torch.arange(SIDE)
        clear = torch.zeros(count, side, side)
        clear[torch.arange(count)[:, None, None], corner[0] + step[:, None], corner[1] + step] = self.images[drawn]
        contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * torch.rand(count, 1, 1, generator=generator)
        return contrast * clear + (1 - contrast) * torch.rand(count, 1, 1, generator=generator), clear


def load_digits() -> tuple[Digits, Digits]:
    """The digits to train on, and those held out.

    Returns:
        1,297 and 500 of them, always the same.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'saccade[digits]'") from error
    found = datasets.load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])
