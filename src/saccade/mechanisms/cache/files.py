"""Stores in a file: safetensors, checked before anything is built from it.

The header says format, version, what `about` is, and of each layer its store's form, its policy, and what lies beside
the tensors; `digest` is over all of that and the tensors. Layer n's tensors are "n.tokens.key" and so on: of each page
table the lengths `[B, G]` and, of each part, the rows of all heads, one after the other; then what the store notes
beside them, and as "n.derived NAME.TENSOR" what its policy keeps between steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import Derived
from saccade.mechanisms.cache._first_files import FIRST_VERSION, from_first
from saccade.mechanisms.cache.base import CachePolicy
from saccade.mechanisms.cache.forms import check_forms
from saccade.mechanisms.cache.saving import Parcel, owned, pack_store, raw, told, unpack_store
from saccade.mechanisms.cache.store import KVStore

UNFIT = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, MemoryError)
"""What comes of a header or tensors that are not what they should be."""

VERSION, FORMAT = "2", "saccade-cache"
Layer = tuple[CachePolicy, KVStore]
"""A layer's policy, and the store that it governs."""


class CacheFileError(ValueError):
    """A file that is not a cache, is damaged, or is one for something else."""


def save_stores(path: str | os.PathLike[str], layers: Sequence[Layer], about: Mapping[str, Any]) -> None:
    """Write stores to a file, all or nothing.

    Args:
        path: Where; what is there is replaced once everything is written.
        layers: In order.
        about: What `CacheFile.about` shall be again, as JSON; for example whose cache it is.

    Raises:
        OSError: If the file cannot be written; what was there before still is.
        ValueError: If something is kept between steps that the policy's `derives` does not say.
        WorkerError: If a store is in another process that has ended.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    told_layers = []
    for number, (policy, store) in enumerate(layers):
        layer, parts = _packed(policy, store)
        told_layers.append(layer)
        tensors |= {f"{number}.{name}": part for name, part in parts.items()}
    header = {"format": FORMAT, "version": VERSION, "layers": json.dumps(told_layers), "about": json.dumps(dict(about))}
    header["digest"] = _digest(header, tensors)
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


@dataclass(frozen=True)
class CacheFile:
    """What `save_stores` wrote, read and whole.

    Args:
        path: Where it was.
        about: As it was given.
        layers: What is said of each layer.
        tensors: By name.
    """

    path: str
    about: Any
    layers: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CacheFile:
        """Read a file.

        Args:
            path: Which.
            device: Where its tensors shall lie.

        Returns:
            What is in it.

        Raises:
            CacheFileError: If the file cannot be read, is truncated or damaged, or is not a cache.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                _check_version(header, path)
                mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
                if header["version"] != FIRST_VERSION:
                    _check_digest(header, mapped, path)
                tensors = {name: _copied(x) for name, x in mapped.items()}
            about, layers = json.loads(header["about"]), json.loads(header["layers"])
            if header["version"] == FIRST_VERSION:
                about, layers, tensors = from_first(about, layers, tensors)
            return cls(str(path), about, layers, tensors)
        except CacheFileError:
            raise
        except (SafetensorError, OSError, *UNFIT) as error:
            raise CacheFileError(f"path={str(path)!r}: not a whole cache: {type(error).__name__}: {error}") from error

    def fill(self, layers: Sequence[Layer]) -> None:
        """Put into empty stores what was saved, for policies that store alike.

        What a policy's steps keep beside the tokens (`CachePolicy.derives`) is taken over by a policy that is equal to
        the one it was saved with; another begins anew.

        Args:
            layers: As many as were saved; of no use if this fails.

        Raises:
            CacheFileError: If there are other layers, or a store is of another form than its policy's, or a tensor is
                missing, too many, or not what it has to be.
        """
        if not isinstance(self.layers, list) or len(self.layers) != len(layers):
            raise CacheFileError(f"path={self.path!r}: {len(self.layers)} layers, expected {len(layers)}")
        parcels: list[dict[str, Tensor]] = [{} for _ in layers]
        for name, x in self.tensors.items():
            number, _, rest = name.partition(".")
            if not number.isdecimal() or int(number) >= len(layers):
                raise CacheFileError(f"path={self.path!r}: tensor {name!r}, expected those of {len(layers)} layers")
            parcels[int(number)][rest] = x
        for place, (layer, (policy, store)) in enumerate(zip(self.layers, layers, strict=True)):
            try:
                _unpacked(layer, policy, store, parcels[place])
            except UNFIT as error:
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                raise CacheFileError(f"path={self.path!r}: layer {place} has {kind}{error}") from error


def _packed(policy: CachePolicy, store: KVStore) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer as JSON and tensors."""
    layer: dict[str, Any] = {"form": store.form(), "policy": told(policy), "store": None, "derived": {}}
    if store.empty:
        return layer, {}
    layer["store"], tensors = pack_store(store)
    forms = policy.derives()
    for name, kept in store.derived.items():
        if kept.changes != store.changes:
            continue  # of slots that have moved since: no step looks at it any more
        if name not in forms:
            raise ValueError(f"derived[{name!r}] of {policy!r}: expected one of {sorted(forms)}, see `derives`")
        layer["derived"][name] = sorted(kept.tensors)
        tensors |= {f"derived {name}.{key}": owned(x) for key, x in kept.tensors.items()}
    return layer, tensors


def _unpacked(layer: dict[str, Any], policy: CachePolicy, store: KVStore, tensors: dict[str, Tensor]) -> None:
    """Fill an empty store."""
    form = json.loads(json.dumps(store.form()))
    if layer["form"] != form:
        raise ValueError(f"a store of the form {layer['form']}, expected {form}, as the policy has")
    derived = {
        name: {key: tensors.pop(f"derived {name}.{key}") for key in keys} for name, keys in layer["derived"].items()
    }
    parcel = Parcel(tensors)
    if layer["store"] is not None:
        unpack_store(store, layer["store"], parcel)
    parcel.end()
    if layer["policy"] != json.loads(json.dumps(told(policy))):
        return
    forms, (batch, heads) = policy.derives(), store.lengths.shape
    sizes = {"B": batch, "G": heads, "D": store.dims[0], "E": store.dims[1], "n": len(store)}
    for name, kept in derived.items():
        if name not in forms:
            raise ValueError(f"derived[{name!r}]: expected one of {sorted(forms)}")
        check_forms(name, forms[name], kept, sizes | {"seen": int(store.seen.max())})
        store.derived[name] = Derived(store.changes, kept)


def _copied(x: Tensor) -> Tensor:
    """In memory of its own: one that is kept would hold the whole mapping of the file. Flags are 0 or 1 in it."""
    return x.view(torch.uint8) != 0 if x.dtype == torch.bool else owned(x)


def _check_version(header: Mapping[str, str], path: object) -> None:
    kind, version = header.get("format"), header.get("version")
    if kind != FORMAT or version not in (FIRST_VERSION, VERSION):
        raise CacheFileError(
            f"path={str(path)!r} of format {kind!r}, version {version!r}: expected a cache of Saccade, "
            f"version {VERSION} or {FIRST_VERSION}"
        )


def _check_digest(header: Mapping[str, str], tensors: Mapping[str, Tensor], path: object) -> None:
    if header["digest"] != _digest(header, tensors):
        raise CacheFileError(f"path={str(path)!r}: not a whole cache: its contents are not those of its digest")


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of all that a file says."""
    digest = hashlib.sha256(json.dumps([header["version"], header["layers"], header["about"]]).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(raw(tensors[name]))
    return digest.hexdigest()


__all__ = ["CacheFile", "CacheFileError", "save_stores"]
