"""KVStore: the keys and values one layer has kept, and what is known about each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype


class KVStore:
    """What one layer keeps of its past. Slots are in ascending order of position, so causality stays bottom-right.

    Every head holds the same number of slots, but each may hold other positions.

    Args:
        track_attention: Also keep, per slot, the attention it has received (`attention`).

    Attributes:
        keys: `[B, G, n, D]`, or None before the first `append`.
        values: `[B, G, n, E]`, or None.
        positions: int64 `[B, G, n]`, place in the sequence of the token in each slot, or None.
        attention: `[B, G, n]` fp32 (fp64 for fp64 keys), or None unless tracked.
        seen: Tokens ever appended; the next one has this position.
    """

    def __init__(self, *, track_attention: bool = False) -> None:
        self.track_attention = track_attention
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None
        self.attention: Tensor | None = None
        self.seen = 0

    def __len__(self) -> int:
        """Slots per head, n."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory really held: the storages of all tensors, not only the parts in view."""
        held = (self.keys, self.values, self.positions, self.attention)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one key and its value, for one batch entry and head; 0 while empty."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.shape[3] * self.keys.element_size() + self.values.shape[3] * self.values.element_size()

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the next tokens, copied.

        Args:
            k: `[B, G, m, D]`.
            v: `[B, G, m, E]`.

        Returns:
            All keys and values now stored.

        Raises:
            ValueError: If they do not fit each other or what is stored.
        """
        self._check(k, v)
        batch, heads, count, _ = k.shape
        places = torch.arange(self.seen, self.seen + count, device=k.device).expand(batch, heads, count)
        fresh = {"keys": k, "values": v, "positions": places}
        if self.track_attention:
            fresh["attention"] = torch.zeros(k.shape[:3], dtype=accumulation_dtype(k.dtype), device=k.device)
        joined = {name: _joined(getattr(self, name), new) for name, new in fresh.items()}
        for name, tensor in joined.items():
            setattr(self, name, tensor)
        self.seen += count
        return joined["keys"], joined["values"]

    def add_attention(self, received: Tensor) -> None:
        """Add to `attention`.

        Args:
            received: `[B, G, n]`.

        Raises:
            ValueError: If attention is not tracked, or the shape is not that of the slots.
        """
        if self.attention is None:
            raise ValueError(f"received: expected a store with track_attention=True and tokens, not {self!r}")
        if received.shape != self.attention.shape:
            raise ValueError(f"received of shape {tuple(received.shape)}: expected {tuple(self.attention.shape)}")
        self.attention = self.attention + received.to(self.attention.dtype)

    def evict(self, keep: Tensor) -> None:
        """Keep only some slots; the memory of the others is freed.

        Args:
            keep: int64 `[B, G, m]`, slots in [0, n), ascending within each head.

        Raises:
            ValueError: If `keep` has the wrong shape or dtype, is not ascending, or a slot is out of range.
        """
        self._check_keep(keep)
        for name in ("keys", "values", "positions", "attention"):
            old = getattr(self, name)
            if old is None:
                continue
            index = keep if old.ndim == 3 else keep[..., None].expand(*keep.shape, old.shape[3])
            setattr(self, name, old.gather(2, index))

    def _check(self, k: Tensor, v: Tensor) -> None:
        """Refuse tokens that do not fit."""
        if k.ndim != 4 or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"k of shape {tuple(k.shape)} and v of shape {tuple(v.shape)}: expected [B, G, m, D] and [B, G, m, E]"
            )
        for name, new, old in (("k", k, self.keys), ("v", v, self.values)):
            if old is None:
                continue
            expected = (old.shape[0], old.shape[1], new.shape[2], old.shape[3])
            if new.shape != expected or new.dtype != old.dtype or new.device != old.device:
                raise ValueError(
                    f"{name} of shape {tuple(new.shape)}, {new.dtype} on {new.device}: "
                    f"expected {expected}, {old.dtype} on {old.device}, as stored"
                )

    def _check_keep(self, keep: Tensor) -> None:
        """Refuse slots that `evict` could not keep."""
        if self.keys is None:
            raise ValueError("keep: the store is empty, expected tokens to evict from")
        heads = tuple(self.keys.shape[:2])
        if keep.dtype != torch.int64 or keep.ndim != 3 or tuple(keep.shape[:2]) != heads:
            raise ValueError(f"keep of shape {tuple(keep.shape)}, {keep.dtype}: expected {[*heads, 'm']}, torch.int64")
        if keep.shape[2] == 0:
            return
        if int(keep.min()) < 0 or int(keep.max()) >= len(self):
            raise ValueError(f"keep in [{int(keep.min())}, {int(keep.max())}]: expected slots in [0, {len(self)})")
        if not bool((keep.diff(dim=-1) > 0).all()):
            raise ValueError("keep: expected ascending slots within each head, without repeats")

    def __repr__(self) -> str:
        """Sizes, not the contents."""
        return f"KVStore(slots={len(self)}, seen={self.seen}, nbytes={self.nbytes})"


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    """`old` followed by `new`; a clone where there is no `old`, lest a view keep all of a larger tensor alive."""
    return new.clone(memory_format=torch.contiguous_format) if old is None else torch.cat([old, new], 2)
