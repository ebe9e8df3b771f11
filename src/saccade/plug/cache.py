"""PagedCache: a transformers cache whose layers are governed by cache policies and really shrink.

`update` only hands a layer's new keys and values on; Saccade's attention function, which a recipe puts into the model,
finds the layer through them, stores the tokens, and lets decoding read the store in place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from saccade.mechanisms.cache.attention import make_store
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.files import CacheFile, CacheFileError, save_stores
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore, fetch_ahead, report
from saccade.mechanisms.cache.tiers import Tier
from saccade.plug.cache_recipe import counted, in_words
from saccade.plug.fingerprint import fingerprint
from saccade.plug.layers import attention_layers
from saccade.plug.state import STATE

LAYER = "_saccade_layer"
"""Attribute of new keys that names their `PagedLayer`."""


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`.

    Args:
        policy: What is kept, read and stored.
        number: Which layer, from 0.
        step: What all layers share.
        tier: Where pages live that are not read, None for memory.

    Attributes:
        store: The layer's `KVStore`.
        length: Places so far, padding and what was evicted included: what masks count.
        pending: How many of them are of a call that has not ended.
        cut: How many there were when tokens were last evicted, merged or packed; only later ones can be taken back.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, policy: CachePolicy, number: int, step: Step, tier: Tier | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.tier = tier
        self.number = number
        self.step = step
        self.reset()

    @property
    def is_croppable(self) -> bool:
        """Whether the last token can be taken back as if it had not come."""
        return self.length == 0 or self.cut < self.length

    def reset(self) -> None:
        """Forget everything."""
        self.store = make_store(self.policy, self.tier)
        self.length = self.pending = self.cut = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the store lays itself out when the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Hand the new tokens on to the attention function, which stores them."""
        key_states = key_states[:]  # another object in the same memory, to carry the attribute
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Places so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that masks are for, and where they begin."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, or above 0 all but the first so many."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.length - tokens_to_remove)
        if count > self.length - self.cut and self.cut:
            raise ValueError(
                f"crop({tokens_to_remove}): layer {self.number} has given tokens up since ({self.policy!r}), expected "
                f"at most {self.length - self.cut}, or a policy that keeps what is decoded (assisted generation)"
            )
        self.store.crop(count)
        self.length -= min(count, self.length)
        self.pending = 0

    def fork(self, step: Step) -> PagedLayer:
        """Another layer with the same tokens; pages are shared until one of the two writes to them."""
        other = PagedLayer(self.policy, self.number, step, self.tier)
        other.store = self.store.fork()
        other.length, other.pending, other.cut = self.length, self.pending, self.cut
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Entries in another order; what beams share stays shared."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each entry so many times."""
        self.batch_select_indices(torch.arange(len(self.store.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these entries."""
        self.store = self.store.select(indices)


class PagedCache(Cache):
    """A cache for `model.generate(past_key_values=...)`: paged, ragged, and governed by policies.

        with saccade.apply(model, recipe):
            model.generate(**inputs, past_key_values=saccade.PagedCache(model, H2O(heavy=256, recent=256)))

    Prefill attends as the recipe says. Each decoded token reads the store in place, as the policy's `read` says; after
    the prompt and after each token what `keep` leaves out is evicted and its memory freed. Layers with a sliding window
    of their own keep exactly that. Padding is not stored.

    With a tier, what steps do not read lives on a disk (or an accelerator's host), within bounded memory:

        cache = saccade.PagedCache(model, Quest(tokens=1024), tier=Disk("/scratch", resident=0.25))

    Where a step fails midway, the next call takes its tokens back first, so that it can be repeated.

    Args:
        model: With a recipe applied, so that Saccade's attention runs in all its layers.
        policy: For all layers, or one per layer.
        tier: Where pages live that are not read; None for memory.

    Raises:
        ValueError: If no recipe is applied to the model, there are not as many policies as layers, or one has no tier.
    """

    def __init__(self, model: nn.Module, policy: CachePolicy | Sequence[CachePolicy], tier: Tier | None = None) -> None:
        config = getattr(model, "config", None)
        modules = [m for m in attention_layers(model).values() if getattr(m, "layer_idx", None) is not None]
        if config is None or not modules:
            raise ValueError(f"model of type {type(model).__name__}: expected a transformers model with a cache")
        self._model = model
        self._modules = modules
        self._check_applied()
        count = int(config.get_text_config().num_hidden_layers)
        policies = [policy] * count if isinstance(policy, CachePolicy) else list(policy)
        if len(policies) != count or not all(isinstance(item, CachePolicy) for item in policies):
            raise ValueError(f"policy={policy!r}: expected a CachePolicy, or one for each of {count} layers")
        self.step = Step(layers=count)
        self.tier = tier
        super().__init__(layers=[PagedLayer(item, number, self.step, tier) for number, item in enumerate(policies)])

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A fork, as `copy.deepcopy(prompt)` before each of several questions; its pages are held once."""
        other = copy(self)
        memo[id(self)] = other
        other.step = Step(layers=self.step.layers)
        other.layers = [layer.fork(other.step) for layer in self.layers]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, with those of its forks."""
        return sum(layer.store.nbytes for layer in self.layers)

    @property
    def away_nbytes(self) -> int:
        """Bytes of keys and values that are in the tier only."""
        return sum(layer.store.away_nbytes for layer in self.layers if isinstance(layer.store, TieredStore))

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Places that all layers are done with."""
        return min(layer.length - layer.pending for layer in self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See `PagedLayer.update`; refused where another attention than Saccade's would get the tokens."""
        self._check_applied()
        if layer_idx == 0:
            self._begin()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is cached to a safetensors file, all or nothing; see `load`.

        Args:
            path: Where.

        Raises:
            OSError: If it cannot be written (a full disk); the file that was there still is, and so is the cache.
            WorkerError: If layers are in another process (Lamina, InstInfer) that has ended.
        """
        self._take_back()
        about = {
            "model": asdict(fingerprint(self._model)), "length": self.get_seq_length(),
            "cuts": [layer.cut for layer in self.layers],
        }  # fmt: skip
        save_stores(path, [(layer.policy, layer.store) for layer in self.layers], about)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace what is cached by what was saved, for the same model and policies that store alike.

        Decoding goes on as it would have without, to the bit, with policies equal to those it was saved with. Others
        begin anew with what their steps keep beside the tokens (indices, lists, summaries).

        Args:
            path: A file of `save`.

        Raises:
            CacheFileError: If it is no such file, or a damaged one; the cache is as before.
        """
        file = CacheFile.read(path, next(self._modules[0].parameters()).device)
        about = file.about
        if not isinstance(about, dict) or about.get("model") != asdict(fingerprint(self._model)):
            raise CacheFileError(f"path={str(path)!r}: a cache of another model, expected one of this")
        stores = [make_store(layer.policy, self.tier) for layer in self.layers]
        file.fill([(layer.policy, store) for layer, store in zip(self.layers, stores, strict=True)])
        length, cuts = _places(about, stores, path)
        for layer, store, cut in zip(self.layers, stores, cuts, strict=True):
            layer.store, layer.length, layer.pending, layer.cut = store, length, 0, cut

    def _begin(self) -> None:
        """Before a step: nothing is left of one that failed midway, tiers say what troubles them."""
        self.step.picked = None
        self._take_back()
        if self.tier is not None:
            stores = [layer.store for layer in self.layers]
            fetch_ahead(stores)
            report(stores)

    def _take_back(self) -> None:
        """Forget tokens of a step that failed midway."""
        shortest = self.get_seq_length()
        for layer in self.layers:
            if layer.length > shortest == 0:
                layer.reset()
            layer.crop(shortest - layer.length)

    def _check_applied(self) -> None:
        if not all(STATE in module.__dict__ for module in self._modules):
            raise ValueError("model: no recipe is applied, expected saccade.apply(model, recipe) before a PagedCache")


def _places(about: dict[str, Any], stores: Sequence[KVStore], path: object) -> tuple[int, list[int]]:
    """`PagedLayer.length` of all layers, and `cut` of each, from what a file says."""
    length, seen = about.get("length"), stores[0].seen
    if not all(torch.equal(store.seen, seen) for store in stores):
        raise CacheFileError(f"path={str(path)!r}: layers have seen different tokens, expected one text in all")
    if type(length) is not int or not int(seen.max() if len(seen) else 0) <= length < 2**31:
        raise CacheFileError(f"path={str(path)!r}: length={length!r}, expected at least {seen.tolist()} tokens")
    cuts = about.get("cuts", [0 if store.complete else length for store in stores])
    right = isinstance(cuts, list) and [type(cut) for cut in cuts] == [int] * len(stores)
    if not right or not 0 <= min(cuts) <= max(cuts) <= length:
        raise CacheFileError(f"path={str(path)!r}: cuts={cuts!r}, expected a number up to {length} for each layer")
    return length, cuts


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds: a `PagedCache`, or one of transformers."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    kept = (x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)
    return sum(x.numel() * x.element_size() for x in kept)


def cache_in_words(cache: Any) -> str:
    """Which cache it is: `DynamicCache`, or as `PagedCache: store bits=8 in 28 layers; everything in 2`."""
    kind = type(cache).__name__
    if not isinstance(cache, PagedCache):
        return kind
    return f"{kind}: {counted(in_words(layer.policy) for layer in cache.layers)}"


__all__ = ["LAYER", "PagedCache", "PagedLayer", "cache_bytes", "cache_in_words"]
