"""Stores in a file: safetensors, checked before anything is built from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache._packed import PackedStore
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore

VERSION = "1"
FORMAT = "saccade-cache"
Make = Callable[[Storage, Sequence[str]], KVStore]


class CacheFileError(ValueError):
    """A file that is not a cache, is damaged, or is one for something else."""


def save_stores(path: str | os.PathLike[str], stores: Sequence[KVStore], about: Mapping[str, Any]) -> None:
    """Write stores to a file, all or nothing.

    Args:
        path: Where; what is there is replaced once everything is written.
        stores: One per layer.
        about: What `load_stores` shall find again, as JSON; for example whose cache it is.

    Raises:
        OSError: If the file cannot be written; what was there before still is.
        ValueError: If a store packs groups of tokens, shares keys, or is in another process.
    """
    from safetensors.torch import save_file

    if any(isinstance(store, PackedStore | RemoteStore | SharedKeyStore) for store in stores):
        raise ValueError(
            "stores: expected KVStores without packed groups (KIVI, ZipCache) or shared keys (CHAI) and not in another "
            "process (Lamina, InstInfer), which have no file format"
        )
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, store in enumerate(stores):
        form = asdict(store.storage) | {"dtype": _name(store.storage.dtype)}
        layers.append({"empty": store.empty, "storage": form, "stats": store.stats, "ordered": store.ordered,
                       "dtype": _name(store.dtype), "dims": store.dims})  # fmt: skip
        if not store.empty:
            parts = {name: store.table.whole(name) for name in store.table.layout.parts}
            parts |= {"lengths": store.lengths, "seen": store.seen}
            if store.channels is not None:
                parts |= dict(zip(("key_channels", "value_channels"), store.channels, strict=True))
            tensors |= {f"{number}.{name}": part.contiguous() for name, part in parts.items()}
    header = {"format": FORMAT, "version": VERSION, "layers": json.dumps(layers), "about": json.dumps(dict(about))}
    target = Path(path)
    part_file = target.with_name(target.name + ".part")
    try:
        save_file(tensors, part_file, metadata=header)
        part_file.replace(target)
    except Exception as error:
        part_file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"path={str(path)!r}: cannot be written: {error}") from error


def load_stores(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", make: Make = KVStore
) -> tuple[list[KVStore], Any]:
    """Read what `save_stores` wrote.

    Args:
        path: The file.
        device: Where the stores shall lie.
        make: Builds an empty store of a `Storage` and names of stats.

    Returns:
        The stores and `about`.

    Raises:
        CacheFileError: If the file cannot be read, is truncated, or is not a whole cache.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _checked(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        layers, about = json.loads(header["layers"]), json.loads(header["about"])
        return [_store(layer, f"{number}.", tensors, make) for number, layer in enumerate(layers)], about
    except CacheFileError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CacheFileError(f"path={str(path)!r}: not a whole cache: {type(error).__name__}: {error}") from error


def _checked(header: dict[str, str], path: object) -> dict[str, str]:
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise CacheFileError(f"path={str(path)!r}: not a cache of Saccade, version {VERSION}")
    return header


def _store(layer: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor], make: Make) -> KVStore:
    """One store, from tensors of the shapes and dtypes that its description asks for."""
    storage = Storage(**(layer["storage"] | {"dtype": _dtype(layer["storage"]["dtype"])}))
    store = make(storage, layer["stats"])
    if layer["empty"]:
        return store
    mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    lengths, seen = mine.pop("lengths"), mine.pop("seen")
    (batch, heads), longest = lengths.shape, int(lengths.max())
    dims, dtype = tuple(layer["dims"]), _dtype(layer["dtype"])
    empty = [torch.zeros(batch, heads, 0, dim, dtype=dtype, device=seen.device) for dim in dims]
    store.append(*empty)
    if storage.normalise:
        store.channels = (
            _shaped(mine.pop("key_channels"), (batch, heads, dims[0]), dtype),
            _shaped(mine.pop("value_channels"), (batch, heads, dims[1]), dtype),
        )
    if set(mine) != set(store.table.layout.parts) or seen.shape != (batch,) or int(lengths.min()) < 0:
        raise CacheFileError(f"layer {prefix[:-1]}: holds {sorted(mine)}, expected {sorted(store.table.layout.parts)}")
    for name, part in store.table.layout.parts.items():
        _shaped(mine[name], (batch, heads, longest, part.width), part.dtype)
    store.table.resize(lengths.to(torch.int64))
    slots = store.present.nonzero(as_tuple=True)
    store.table.write(slots, {name: part[slots] for name, part in mine.items()})  # type: ignore[arg-type]
    store.seen, store.ordered = seen.to(torch.int64), bool(layer["ordered"])
    return store


def _shaped(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise CacheFileError(f"a tensor of shape {tuple(x.shape)} and {x.dtype}: expected {shape} and {dtype}")
    return x


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    known = {_name(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    return None if name is None else known[name]


__all__ = ["CacheFileError", "load_stores", "save_stores"]
