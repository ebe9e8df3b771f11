"""TensorForm: what a tensor that a policy keeps between steps looks like, so that one from a file can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorForm:
    """Axes and dtype of a tensor, and the range of whole numbers.

    Args:
        axes: Sizes by name, as "B G n D": B, G, D, E are the store's and n its slots; "n-" is at most and "n+" at least
            n; a number stands for itself; any other name for one size in all tensors of an entry.
        dtype: Or some; None for any floating-point type.
        first: The least number, of whole ones.
        of: The axis, or "seen" for the tokens so far, whose size bounds them; None for no bound.
        beyond: The greatest is the size of `of` - 1 + `beyond`.
    """

    axes: str
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    first: int = 0
    of: str | None = None
    beyond: int = 0


Forms = Mapping[str, Mapping[str, TensorForm]]
"""By names of entries and of their tensors."""


def floats(axes: str) -> TensorForm:
    """Floating point."""
    return TensorForm(axes)


def flags(axes: str) -> TensorForm:
    """True or False."""
    return TensorForm(axes, torch.bool)


def slot_numbers(axes: str, of: str = "n", dtype: torch.dtype = torch.int64) -> TensorForm:
    """Places on the axis `of`; -1 for none."""
    return TensorForm(axes, dtype, -1, of)


def counts(axes: str, of: str = "n") -> TensorForm:
    """How many of the axis `of`, int64."""
    return TensorForm(axes, torch.int64, 0, of, 1)


def check_forms(
    entry: str, forms: Mapping[str, TensorForm], tensors: Mapping[str, Tensor], sizes: dict[str, int]
) -> None:
    """Refuse tensors that are not of the forms.

    Args:
        entry: Named in messages.
        forms: What is expected, by name.
        tensors: What is there, by name.
        sizes: Of the store's axes, and "seen".

    Raises:
        ValueError: Naming the tensor.
    """
    if set(tensors) != set(forms):
        raise ValueError(f"{entry!r} of {sorted(tensors)}: expected {sorted(forms)}")
    known = dict(sizes)
    for name, form in forms.items():
        x, axes = tensors[name], form.axes.split()
        dtypes = form.dtype if isinstance(form.dtype, tuple) else (form.dtype,)
        right = x.ndim == len(axes) and (x.is_floating_point() if form.dtype is None else x.dtype in dtypes)
        if not right or not all(_fits(axis, size, known) for axis, size in zip(axes, x.shape, strict=True)):
            expected = f"[{', '.join(axes)}] with {known} and {form.dtype or 'floating point'}"
            raise ValueError(f"{entry!r}, {name!r} of shape {tuple(x.shape)} and {x.dtype}: expected {expected}")
    for name, form in forms.items():
        x = tensors[name]
        if form.of is not None and x.numel():
            low, high = (int(bound) for bound in x.aminmax())
            most = known[form.of] - 1 + form.beyond
            if low < form.first or high > most:
                raise ValueError(
                    f"{entry!r}, {name!r} in [{low}, {high}]: expected numbers from {form.first} to {most}"
                )


def _fits(axis: str, size: int, known: dict[str, int]) -> bool:
    """Whether a size is right for an axis; one that is named for the first time is noted."""
    if axis.isdigit():
        return size == int(axis)
    if axis in ("n-", "n+") and axis not in known:
        fits = size <= known["n"] if axis == "n-" else size >= known["n"]
        known[axis] = size
        return fits
    return known.setdefault(axis, size) == size


__all__ = ["Forms", "TensorForm", "check_forms", "counts", "flags", "floats", "slot_numbers"]
