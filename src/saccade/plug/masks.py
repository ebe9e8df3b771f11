"""What a model's attention mask means, without building it.

Transformers hands each mask builder a *mask function* (a closure over query and key positions) and the 2-D padding
mask. Saccade's builder returns a `MaskPlan`: it holds these arguments, reads causality, window and segments off them
when a layer needs those, and lets the model's former builder make its M x N mask only if a layer runs its former
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function

from saccade.types import Geometry


class UnreadableMaskError(Exception):
    """A mask that causality, window and segments cannot express; the message says why."""


@dataclass(frozen=True)
class Reading:
    """What a mask lets queries see.

    Args:
        geometry: Causality and segments (-1 for padding).
        keys: Only the first `keys` keys hold tokens (a static cache is longer).
        window: Tokens that each query sees back, itself included; None without a window, or where it hides nothing.
    """

    geometry: Geometry
    keys: int
    window: int | None = None

    def to(self, device: torch.device) -> Reading:
        """The same with its segments on `device` (layers of one model may lie on several)."""
        q_segments, kv_segments = self.geometry.q_segments, self.geometry.kv_segments
        if q_segments is None or kv_segments is None or q_segments.device == device:
            return self
        moved = self.geometry.replace(q_segments=q_segments.to(device), kv_segments=kv_segments.to(device))
        return Reading(moved, self.keys, self.window)


class MaskPlan:
    """Stands for the mask of one forward pass; all layers that share the mask share the plan.

    With a compileable cache, `generate` builds masks ahead and passes them where a model expects a tensor of 4
    dimensions; `ndim`, `shape` and `contiguous` are what transformers asks of it on that way.

    Args:
        arguments: What transformers called the mask builder with.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._former: dict[str, Any] = {}
        self._reading: Reading | UnreadableMaskError | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the mask it stands for, `[B, 1, M, N]`."""
        return self.arguments["batch_size"], 1, _queries(self.arguments)[0], self.arguments["kv_length"]

    def contiguous(self) -> MaskPlan:
        """Itself."""
        return self

    def former(self, implementation: str) -> Any:
        """The mask that the model's former implementation would have got; built on first use."""
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None
        if implementation not in self._former:
            self._former[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._former[implementation]

    def read(self, device: torch.device) -> Reading:
        """Causality, window and segments, on `device`.

        Args:
            device: Where the layer that asks lies.

        Returns:
            The same reading for every layer that shares the plan.

        Raises:
            UnreadableMaskError: If these cannot express the mask.
        """
        if self._reading is None:
            try:
                self._reading = _read(self.arguments)
            except UnreadableMaskError as reason:
                self._reading = reason
        if isinstance(self._reading, UnreadableMaskError):
            raise self._reading
        return self._reading.to(device)


def build_plan(**arguments: Any) -> MaskPlan:
    """The mask builder that is registered with transformers."""
    given = arguments.get("attention_mask")
    if isinstance(given, MaskPlan):
        return given
    # A static cache counts its tokens in place, and the plan is read only after it has grown.
    held = {name: value.clone() for name, value in arguments.items() if name == "q_offset" and torch.is_tensor(value)}
    return MaskPlan(arguments | held)


def read_bare(mask: Any, is_causal: bool, queries: int, keys: int) -> Reading:
    """What a mask means that did not come from Saccade's builder.

    Args:
        mask: What the layer was given.
        is_causal: Whether the layer hides the future when it gets no mask.
        queries: M.
        keys: N.

    Returns:
        The reading.

    Raises:
        UnreadableMaskError: If it is a tensor of the caller's own, or None with an alignment that is not bottom-right.
    """
    if mask is not None:
        raise UnreadableMaskError(f"a mask of the caller's own, {type(mask).__name__} of shape {tuple(mask.shape)}")
    causal = is_causal and queries > 1
    if causal and queries != keys:
        raise UnreadableMaskError(f"causal without a mask, with {queries} queries and {keys} keys: aligned top-left")
    return Reading(Geometry(causal=causal), keys)


@dataclass
class _Parts:
    """What the closures of a mask function hold."""

    causal: bool = False
    window: int | None = None
    chunk: tuple[int, Tensor] | None = None
    packed: Tensor | None = None


def _collect(function: Callable[..., Any], parts: _Parts, inside_packed: bool = False) -> None:
    """Take a mask function apart by the names transformers gives its closures."""
    if function is causal_mask_function:
        parts.causal = True
        return
    if function is bidirectional_mask_function:
        return
    name = getattr(function, "__qualname__", repr(function))
    held: dict[str, Any] = {}
    if getattr(function, "__module__", None) == masking_utils.__name__ and function.__closure__ is not None:
        cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
        held = {key: cell.cell_contents for key, cell in cells}
    match name.split(".")[0], held:
        case "and_masks", {"mask_functions": functions}:
            for part in functions:
                _collect(part, parts, inside_packed)
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            parts.window = window
        case "chunked_overlay", {"chunk_size": int(size), "left_padding": left} if not inside_packed:
            parts.chunk = (size, left)
        case "packed_sequence_mask_function", {"packed_sequence_mask": segments}:
            parts.packed = segments
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            _collect(inner, parts, inside_packed=True)
        case _:
            raise UnreadableMaskError(f"the model's mask has a part that Saccade does not know: {name}")


def _read(arguments: dict[str, Any]) -> Reading:
    parts = _Parts()
    _collect(arguments["mask_function"], parts)
    queries, first = _queries(arguments)
    kv_offset, keys = arguments.get("kv_offset", 0), arguments["kv_length"]
    if parts.causal:
        # Keys after the last query hold no tokens yet.
        keys = min(first - kv_offset + queries, keys)
        if first < kv_offset or keys != first - kv_offset + queries:
            raise UnreadableMaskError(
                f"queries {first} to {first + queries} do not end where the keys do, at {kv_offset + keys}"
            )
    elif parts.window is not None or parts.chunk is not None or parts.packed is not None:
        raise UnreadableMaskError("a window, chunk or packing without causality")
    q_segments, kv_segments = _segments(arguments, parts, queries, first, keys)
    window = parts.window if parts.window is not None and parts.window < keys else None
    return Reading(Geometry(causal=parts.causal, q_segments=q_segments, kv_segments=kv_segments), keys, window)


def _queries(arguments: dict[str, Any]) -> tuple[int, int]:
    """Number of queries and the position of the first (releases before 5.6 pass all positions instead)."""
    if "cache_position" in arguments:
        positions = arguments["cache_position"]
        return positions.shape[0], int(positions[0])
    return arguments["q_length"], int(arguments.get("q_offset", 0))


def _segments(
    arguments: dict[str, Any], parts: _Parts, queries: int, first: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """Segment ids of queries and keys, or None twice if every pair that causality allows is visible."""
    kv_offset = arguments.get("kv_offset", 0)
    padding, segments = arguments.get("attention_mask"), parts.packed
    if parts.chunk is not None:
        size, left = parts.chunk
        if first + queries <= size and not bool(left.any()):
            segments = None
        else:
            places = torch.arange(kv_offset, kv_offset + keys, device=left.device)
            segments = torch.div(places - left[:, None], size, rounding_mode="floor")
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + keys].bool()
        if padding.shape[1] < keys:
            padding = torch.nn.functional.pad(padding, (0, keys - padding.shape[1]))
        if not bool(padding.all()):
            base = torch.zeros_like(padding, dtype=torch.int64) if segments is None else segments
            segments = base.masked_fill(~padding, -1)
    if segments is None:
        return None, None
    if not parts.causal and queries != keys:
        return segments.new_zeros(segments.shape[0], queries), segments
    return segments[:, segments.shape[1] - queries :], segments
