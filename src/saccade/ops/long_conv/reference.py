"""Oracle of `long_conv`: the sum over kernel taps, one tap after the other. Imports nothing fast."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def reference_long_conv(x: Tensor, kernel: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """y_i = sum_j kernel_j x_{i + offset - j}, x being 0 outside; x `[B, C, *grid]`, kernel `[C, *taps]`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grid, taps = x.shape[2:], kernel.shape[1:]
    pad = [side for size in reversed(taps) for side in (size, size)]
    padded = torch.nn.functional.pad(x.to(dtype), pad)
    out = x.new_zeros(x.shape, dtype=dtype)
    for index, tap in enumerate(product(*map(range, taps))):
        shifted = padded
        for axis, (j, offset, size, reach) in enumerate(zip(tap, offsets, grid, taps, strict=True)):
            shifted = shifted.narrow(2 + axis, reach + offset - j, size)
        weight = kernel.flatten(1)[:, index].to(dtype)
        out = out + shifted * weight.view(-1, *([1] * len(grid)))
    return out.to(x.dtype)
