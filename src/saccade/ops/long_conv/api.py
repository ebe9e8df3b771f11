"""`long_conv`: depthwise convolution with kernels as long as the sequence or image."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from saccade.ops.dispatch import Implementation, RunRecord, choose, record
from saccade.ops.long_conv.eager import fft_conv
from saccade.ops.long_conv.reference import reference_long_conv

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "eager": Implementation("eager", lambda x, kernel, offsets: fft_conv(x, kernel, list(offsets))),
    "reference": Implementation("reference", reference_long_conv),
}


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    causal: bool = True,
    skip: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Depthwise convolution by FFT, O(N log N), zero-padded: nothing wraps around.

    Causal: y_i = sum_j kernel_j x_{i-j}; kernel_0 weighs the token itself. Centred: y_i = sum_j kernel_j x_{i-j+c} with
    c = (K - 1) // 2 along each axis, what NumPy calls "same". It is a convolution: the kernel is flipped, unlike in
    `torch.nn.functional.conv1d`.

    Args:
        x: `[B, C, N]`, or `[B, C, Y, X]` when not causal.
        kernel: `[C, K]`, or `[C, Ky, Kx]`; K may be smaller or larger than N. Dtype as x.
        causal: Only past and present; 1-D only.
        skip: `[C]`, the direct term of state-space layers: adds skip * x.
        impl: "auto", "eager" or "reference" (tap by tap).

    Returns:
        Shape and dtype of x; transforms are in fp32, fp64 for fp64.

    Raises:
        ValueError: Naming the argument, what it is and what is expected.
    """
    _check(x, kernel, causal, skip)
    implementation, refused = choose("long_conv", IMPLEMENTATIONS, impl, {"x": x, "kernel": kernel})
    record(RunRecord("long_conv", implementation.name, refused))
    offsets = tuple(0 if causal else (taps - 1) // 2 for taps in kernel.shape[1:])
    if causal:
        kernel = kernel[:, : max(x.shape[2], 1)]
    out = implementation.run(x, kernel, offsets)
    if skip is not None:
        out = out + x * skip.view(-1, *([1] * (x.ndim - 2)))
    return out


def _check(x: Tensor, kernel: Tensor, causal: bool, skip: Tensor | None) -> None:
    """Refuse bad arguments before any work."""
    if x.ndim not in (3, 4) or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected floating [B, C, N] or [B, C, Y, X]")
    if kernel.ndim != x.ndim - 1 or kernel.shape[0] != x.shape[1] or 0 in kernel.shape[1:]:
        taps = "K" if x.ndim == 3 else "Ky, Kx"
        raise ValueError(f"kernel of shape {tuple(kernel.shape)}: expected [{x.shape[1]}, {taps}] with taps")
    if causal and x.ndim == 4:
        raise ValueError("causal=True: an image has no past, expected causal=False for x of 4 dimensions")
    if skip is not None and skip.shape != x.shape[1:2]:
        raise ValueError(f"skip of shape {tuple(skip.shape)}: expected [{x.shape[1]}]")
    for name, tensor in (("kernel", kernel), ("skip", skip)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: expected {x.dtype} on {x.device}, as x")
