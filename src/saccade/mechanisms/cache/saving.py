"""What of a store goes into a file and comes back: its form, its page tables row by row, what it knows beside them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.mechanisms.cache.pagetable import PageTable, Part, Slots
from saccade.mechanisms.cache.storage import Storage

PIECE = 2**24
"""Most bytes of a part that are copied at once."""

TOKENS, POSITION = "tokens", "position"
"""Name of the table that every store has, and of its part that says where in the text tokens are."""

MOST_CHANNELS = 2**20
"""Of a head: a file that says more is none of ours."""

CHANNELS = ("key_channels", "value_channels")
"""Names of what divides channels, see `Storage.normalise`."""

FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16,
                                                                torch.float16)}  # fmt: skip
"""What keys and values may be, by name."""


class Table(Protocol):
    """What is asked of a `PageTable`, or of what stands for one in another process."""

    @property
    def lengths(self) -> Tensor:
        """As of `PageTable`."""

    @property
    def kept(self) -> dict[str, Part]:
        """As of `PageTable`."""

    def find(self, slots: Slots) -> tuple[Tensor, ...]:
        """As of `PageTable`: what `read` takes."""

    def read(self, name: str, where: Any) -> Tensor:
        """As of `PageTable`."""

    def resize(self, lengths: Tensor) -> None:
        """As of `PageTable`."""

    def write(self, slots: Slots, parts: dict[str, Tensor]) -> None:
        """As of `PageTable`."""


class Parcel:
    """Tensors by name, of which those that are expected are taken, one after the other, each checked.

    Args:
        tensors: What is there.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        """Whether it is there and was not taken."""
        return name in self._left

    def take(self, name: str, shape: Sequence[int | None], dtype: torch.dtype | None) -> Tensor:
        """One of them.

        Args:
            name: Which.
            shape: Expected; None for any size.
            dtype: Expected; None for any floating-point type.

        Returns:
            The tensor.

        Raises:
            ValueError: If it is not there, or of another shape or dtype.
        """
        if name not in self._left:
            raise ValueError(f"{name!r} is missing, expected beside {sorted(self._left)}")
        x = self._left.pop(name)
        fits = x.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, x.shape, strict=True))
        if not fits or (not x.is_floating_point() if dtype is None else x.dtype != dtype):
            wanted = f"{tuple(shape)} and {dtype or 'floating point'}"
            raise ValueError(f"{name!r} of shape {tuple(x.shape)} and {x.dtype}: expected {wanted}")
        return x

    def end(self) -> None:
        """Refuse what nobody has taken."""
        if self._left:
            raise ValueError(f"{sorted(self._left)}: expected no such tensors")


class Savable(ABC):
    """What `save_stores` needs to know of a store; a store of a form of its own says what it has beside this."""

    storage: Storage
    stats: tuple[str, ...]
    seen: Tensor
    ordered: bool
    channels: tuple[Tensor, Tensor] | None
    dtype: torch.dtype
    dims: tuple[int, int]
    table: PageTable

    def form(self) -> dict[str, Any]:
        """What its policy has decided of it, as JSON: tokens of one store fit into another of the same form."""
        return {"kind": "pages", "storage": told(self.storage), "stats": list(self.stats)}

    def tables(self) -> dict[str, Table]:
        """Where its tokens lie, by name."""
        return {TOKENS: self.table}

    def notes(self) -> dict[str, Tensor]:
        """What it knows beside them, by name."""
        channels = {} if self.channels is None else dict(zip(CHANNELS, self.channels, strict=True))
        return {"seen": self.seen} | channels

    def take_notes(self, parcel: Parcel, counts: dict[str, Tensor]) -> None:
        """Take over what `notes` has said, of a store that is laid out and holds no tokens yet.

        Args:
            parcel: What there is.
            counts: int64 `[B, G]`, the rows that each of `tables` is about to hold.

        Raises:
            ValueError: If something is missing or cannot be.
        """
        if self.channels is not None:
            batch, heads = counts[TOKENS].shape
            self.channels = (
                parcel.take(CHANNELS[0], (batch, heads, self.dims[0]), self.dtype),
                parcel.take(CHANNELS[1], (batch, heads, self.dims[1]), self.dtype),
            )

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """See `KVStore.append`."""


def pack_store(store: Savable) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `unpack_store` needs: JSON, and tensors of their own memory by name, of a store with tokens."""
    about = {"dtype": str(store.dtype).removeprefix("torch."), "dims": list(store.dims)}
    tensors = {name: owned(x) for name, x in store.notes().items()}
    for name, table in store.tables().items():
        tensors[f"{name}.lengths"] = owned(table.lengths)
        for part, (_, width, dtype) in table.kept.items():
            pieces = [table.read(part, table.find(slots)) for slots in _pieces(table.lengths, width * dtype.itemsize)]
            tensors[f"{name}.{part}"] = torch.cat(pieces)
    return about, tensors


def unpack_store(store: Savable, about: dict[str, Any], parcel: Parcel) -> None:
    """Fill an empty store with what `pack_store` took from one of the same form.

    Args:
        store: Of no use afterwards if something is wrong.
        about: As JSON was.
        parcel: The tensors.

    Raises:
        ValueError: If a tensor is missing, of another shape or dtype, or holds what cannot be.
    """
    seen = parcel.take("seen", (None,), torch.int64)
    lengths = parcel.take(f"{TOKENS}.lengths", (len(seen), None), torch.int64)
    dims, dtype = about["dims"], FLOATS[about["dtype"]]
    if len(dims) != 2 or not all(type(dim) is int and 0 < dim <= MOST_CHANNELS for dim in dims):
        raise ValueError(f"dims={dims}: expected two head dims")
    _check_range("seen", seen, 0, torch.iinfo(torch.int32).max)
    store.append(*(torch.zeros(*lengths.shape, 0, dim, dtype=dtype, device=seen.device) for dim in dims))
    store.seen = seen
    tables, counts, parts = store.tables(), {TOKENS: lengths}, {}
    for name, table in tables.items():
        if name != TOKENS:
            counts[name] = parcel.take(f"{name}.lengths", lengths.shape, torch.int64)
        _check_range(f"{name}.lengths", counts[name], 0, int(seen.max()) if len(seen) else 0)
        rows = int(counts[name].sum())
        parts[name] = {p: parcel.take(f"{name}.{p}", (rows, x.width), x.dtype) for p, x in table.kept.items()}
        if POSITION in parts[name]:
            _check_positions(f"{name}.{POSITION}", parts[name][POSITION], counts[name], seen)
    store.ordered = _in_order(parts[TOKENS][POSITION], lengths)
    store.take_notes(parcel, counts)
    for name, table in tables.items():
        table.resize(counts[name])
        first, nbytes = 0, sum(x.shape[1] * x.itemsize for x in parts[name].values())
        for slots in _pieces(counts[name], nbytes):
            stop = first + len(slots[0])
            table.write(slots, {part: x[first:stop] for part, x in parts[name].items()})
            first = stop


def told(x: Any) -> Any:
    """Settings as JSON that is equal for what is equal: a policy, a `Storage`, or what they hold."""
    if is_dataclass(x):
        return {"is": type(x).__name__} | _told_all({field.name: getattr(x, field.name) for field in fields(x)})
    if isinstance(x, Tensor):
        return {"is": "tensor", "digest": hashlib.sha256(raw(x)).hexdigest()}
    if isinstance(x, tuple | list):
        return [told(item) for item in x]
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    return x if isinstance(x, str | int | float | None) else {"is": type(x).__name__} | _told_all(vars(x))


def _told_all(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Each `told`."""
    return {name: told(x) for name, x in settings.items()}


def raw(x: Tensor) -> Any:
    """The bytes of a tensor."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def owned(x: Tensor) -> Tensor:
    """A contiguous copy, in memory that nothing shares."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def rows_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The head, counted over the batch, and the place in it of each of `counts` `[B, G]` rows, head by head."""
    flat = counts.flatten()
    head = torch.arange(len(flat), device=flat.device).repeat_interleave(flat)
    return head, torch.arange(len(head), device=flat.device) - (flat.cumsum(0) - flat)[head]


def _pieces(counts: Tensor, nbytes: int) -> Iterator[Slots]:
    """All slots of a table, in the order of `rows_of`, a few at a time; one piece without any where there are none."""
    head, place = rows_of(counts)
    size, heads = max(1, PIECE // max(1, nbytes)), max(1, counts.shape[1])
    for some, slot in zip(head.split(size), place.split(size), strict=True):
        entry = torch.div(some, heads, rounding_mode="floor")
        yield entry, some - entry * heads, slot


def _check_range(name: str, x: Tensor, least: int, most: int) -> None:
    if x.numel() and not least <= int(x.min()) <= int(x.max()) <= most:
        raise ValueError(f"{name!r} in [{int(x.min())}, {int(x.max())}]: expected numbers from {least} to {most}")


def _check_positions(name: str, positions: Tensor, counts: Tensor, seen: Tensor) -> None:
    """Refuse positions `[rows, width]` of tokens that have not come, and two tokens of a head at one."""
    head = rows_of(counts)[0][:, None].expand_as(positions)
    entry = torch.div(head, max(1, counts.shape[1]), rounding_mode="floor")
    places = head * 2**31 + positions
    if bool((positions < 0).any() | (positions >= seen[entry]).any()) or len(places.unique()) < positions.numel():
        raise ValueError(f"{name!r}: expected positions of different tokens, from 0 to those that were seen")


def _in_order(positions: Tensor, counts: Tensor) -> bool:
    """Whether the positions `[rows, 1]` of each head rise."""
    head, rising = rows_of(counts)[0], positions.flatten().diff() > 0
    return bool((rising | (head.diff() > 0)).all())


__all__ = [
    "CHANNELS", "FLOATS", "TOKENS", "Parcel", "Savable", "Table", "owned", "pack_store", "raw", "rows_of", "told",
    "unpack_store",
]  # fmt: skip
