"""FFT convolution in portable PyTorch, zero-padded so that nothing wraps around, as `torch.library` ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype


def fast_length(minimum: int) -> int:
    """Smallest even 2^a 3^b 5^c >= `minimum`: lengths at which FFTs are fast."""
    best = 1 << max(minimum - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            length = three << max(1, (-(-minimum // three) - 1).bit_length())
            best = min(best, length)
            three *= 3
        five *= 5
    return best


def _lengths(x: Tensor, kernel: Tensor) -> list[int]:
    return [fast_length(n + taps - 1) for n, taps in zip(x.shape[2:], kernel.shape[1:], strict=True)]


def _place(x: Tensor, lengths: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """`x` `[..., *grid]` with zeros around it, so that it starts at `offsets` in a box of `lengths`."""
    pad: list[int] = []
    for size, length, offset in zip(
        reversed(x.shape[-len(lengths) :]), reversed(lengths), reversed(offsets), strict=True
    ):
        pad += [offset, length - size - offset]
    return torch.nn.functional.pad(x, pad)


def _crop(x: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        x = x.narrow(axis - len(sizes), offset, size)
    return x


def _axes(lengths: Sequence[int]) -> list[int]:
    return list(range(-len(lengths), 0))


@torch.library.custom_op("saccade::long_conv", mutates_args=())
def fft_conv(x: Tensor, kernel: Tensor, offsets: Sequence[int]) -> Tensor:
    """y_i = sum_j kernel_j x_{i + offset - j}, in x's dtype, 0 outside; x `[B, C, *grid]`, kernel `[C, *taps]`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    dtype, lengths = accumulation_dtype(x.dtype), _lengths(x, kernel)
    spectrum = torch.fft.rfftn(x.to(dtype), lengths, _axes(lengths))
    spectrum = spectrum * torch.fft.rfftn(kernel.to(dtype), lengths, _axes(lengths))
    full = torch.fft.irfftn(spectrum, lengths, _axes(lengths))
    return out.copy_(_crop(full, offsets, x.shape[2:]))


@fft_conv.register_fake
def _(x, kernel, offsets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("saccade::long_conv_backward", mutates_args=())
def fft_conv_backward(x: Tensor, kernel: Tensor, offsets: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel: correlations of `dout` with the other one."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(kernel)
    dtype, lengths = accumulation_dtype(x.dtype), _lengths(x, kernel)
    zeros, axes = [0] * len(lengths), _axes(lengths)
    spectrum = torch.fft.rfftn(_place(dout.to(dtype), lengths, offsets), lengths, axes)
    of_x = torch.fft.irfftn(spectrum * torch.fft.rfftn(kernel.to(dtype), lengths, axes).conj(), lengths, axes)
    of_kernel = (spectrum * torch.fft.rfftn(x.to(dtype), lengths, axes).conj()).sum(0)
    of_kernel = torch.fft.irfftn(of_kernel, lengths, axes)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(_crop(of_x, zeros, x.shape[2:]))
    dkernel = torch.empty(kernel.shape, dtype=kernel.dtype, device=kernel.device)
    return dx, dkernel.copy_(_crop(of_kernel, zeros, kernel.shape[1:]))


@fft_conv_backward.register_fake
def _(x, kernel, offsets, dout):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(kernel.shape, dtype=kernel.dtype, device=kernel.device)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    x, kernel, ctx.offsets = inputs
    ctx.save_for_backward(x, kernel)


def _backward(ctx, dout):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return (*fft_conv_backward(*ctx.saved_tensors, ctx.offsets, dout), None)


fft_conv.register_autograd(_backward, setup_context=_setup)
