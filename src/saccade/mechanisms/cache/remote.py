"""RemoteStore: attention offloading, keys and values and the attention over them are in another process.

Lamina's split of decoding: the model's process sends queries, keys and values of new tokens and receives attention's
output; what grows with the context, and is read anew for each token, is elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.checks import check_tokens
from saccade.mechanisms.cache.offload import AttentionWorker, running_worker
from saccade.mechanisms.cache.pagetable import PageLayout, Slots
from saccade.mechanisms.cache.saving import CHANNELS, TOKENS, Parcel, Table
from saccade.mechanisms.cache.storage import Storage, lay_out
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import resolve_scale
from saccade.types import AttentionOutput

PIECE = 2**22
"""Most bytes of keys that travel at once."""

HERE = "expected a cache in this process for that (any policy but Lamina and InstInfer)"


class RemoteTable:
    """What stands for the page table of a `RemoteStore` where it is saved or loaded: rows travel, see `saving.Table`.

    Args:
        ask: Asks the worker.
        lengths: Becomes `lengths`.
        layout: What is held of each token.
    """

    def __init__(self, ask: Callable[..., list[Tensor]], lengths: Tensor, layout: PageLayout) -> None:
        self.ask, self.lengths, self.kept = ask, lengths, layout.parts

    def find(self, slots: Slots) -> Slots:
        """As they are: the worker knows."""
        return slots

    def read(self, name: str, where: Slots) -> Tensor:
        """As `PageTable.read`."""
        return self.ask({"do": "read", "name": name}, *where)[0].to(self.lengths.device, copy=True)

    def resize(self, lengths: Tensor) -> None:
        """As `PageTable.resize`, of a store without tokens."""
        self.ask({"do": "resize"}, lengths)

    def write(self, slots: Slots, parts: dict[str, Tensor]) -> None:
        """As `PageTable.write`."""
        self.ask({"do": "write", "names": list(parts)}, *slots, *parts.values())


class RemoteStore(KVStore):
    """A store in an attention worker: nothing is kept here but how many tokens there are.

    A single new token waits here until its attention is asked for: the query goes first, and the worker attends over
    the past while key and value are on their way, or are still being made where `begin` was called earlier.

    Args:
        storage: As in `KVStore`.
        threads: Of the worker.
        path: Directory of a disk tier in the worker, or None.
        resident: Of that tier.
    """

    def __init__(
        self, storage: Storage | None = None, threads: int | None = None, path: str | None = None, resident: float = 1.0
    ) -> None:
        super().__init__(storage)
        self.threads, self.path, self.resident = threads, path, resident
        self.worker: AttentionWorker | None = None
        self.remote_nbytes = 0
        self._name = -1
        self._slot_nbytes = 0
        self._lengths = self.seen[:, None]
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._begun = False

    def __del__(self) -> None:
        """Its memory there is freed."""
        if self.worker is not None and self.worker.alive and not sys.is_finalizing():
            self.worker.ask({"do": "drop", "store": self._name})

    def __len__(self) -> int:
        """Slots of the longest head."""
        return int(self._lengths.max()) if self._lengths.numel() else 0

    @property
    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self.worker is None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each head, int64 `[B, G]`."""
        return self._lengths

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in this process: those of a token on its way; see `remote_nbytes`."""
        return 0 if self._waiting is None else sum(x.nbytes for x in self._waiting)

    @property
    def slot_nbytes(self) -> int:
        """As `KVStore.slot_nbytes`."""
        return self._slot_nbytes

    @property
    def positions(self) -> Tensor:
        """Slots are in order, nothing was evicted: int64 `[B, G, n]`, -1 past a head's length."""
        return (
            torch.arange(len(self), device=self.seen.device)
            .expand(*self._lengths.shape, -1)
            .masked_fill(~self.present, -1)
        )

    def begin(self, q: Tensor, *, scale: float | None = None, softcap: float | None = None, impl: str = "auto") -> None:
        """Send the next token's query `[B, H, 1, D]` before its key and value are there; `attend` then has to follow.

        Args:
            q: With its position mixed in.
            scale: As in `attend`.
            softcap: As in `attend`.
            impl: As in `attend`.
        """
        self._flushed()
        self._send_query(q, _rules(q, scale, softcap, impl))

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """As `KVStore.append`; one token waits here for `attend`."""
        check_tokens(self, k, v, present)
        k, v = k.detach(), v.detach()
        if self.empty:
            self._open(k, v)
        if not self._begun:
            self._flushed()
        self._waiting = (k, v)
        added = torch.full_like(self.seen, k.shape[2]) if present is None else present.sum(1)
        if k.shape[2] != 1 or present is not None or not len(self):
            self._send(present)
        self.seen, self._lengths = self.seen + added, self._lengths + added[:, None]

    def attend(
        self, q: Tensor, *, scale: float | None = None, softcap: float | None = None, impl: str = "auto"
    ) -> AttentionOutput:
        """Attention of the last M slots' queries `[B, H, M, D]` over everything, from the worker.

        Args:
            q: The queries; not looked at if `begin` has sent them.
            scale: Factor on q k^T; None means D^-0.5.
            softcap: As in `decode_attend`.
            impl: Implementation of the worker's `decode_attend`.

        Returns:
            `out` `[B, H, M, E]` and `lse`.

        Raises:
            WorkerError: If the worker has ended or failed.
        """
        rules = _rules(q, scale, softcap, impl)
        if self._waiting is None or (q.shape[2] > 1 and not self._begun):
            self._flushed()
            out, lse = self._ask({"do": "attend"} | rules, q)
        else:
            if not self._begun:
                self._send_query(q, rules)
            token, self._waiting, self._begun = self._waiting, None, False
            out, lse = self._ask({"do": "finish"}, *token)
        return AttentionOutput(out.to(q.device, copy=True), lse.to(q.device, copy=True))

    def crop(self, count: int) -> None:
        """As `KVStore.crop`."""
        if not self.empty and count:
            self._waiting, self._begun = None, False  # a token that waits is the last
            self.seen = (self.seen - count).clamp(min=0)
            self._ask({"do": "crop"}, self.seen)
            self._lengths = self.seen[:, None].expand_as(self._lengths).clone()

    def select(self, rows: Tensor) -> RemoteStore:
        """As `KVStore.select`, in the worker."""
        other = RemoteStore(self.storage, self.threads, self.path, self.resident)
        if not self.empty:
            other.worker = self._flushed()
            other._name = other.worker.name()
            rows = rows.to(self.seen.device, torch.int64)
            self._ask({"do": "select", "into": other._name}, rows)
            other.seen, other._lengths = self.seen[rows], self._lengths[rows]
            other.dtype, other.dims, other._slot_nbytes = self.dtype, self.dims, self._slot_nbytes
        return other

    def evict(self, keep: Tensor) -> None:
        """Refused, unless all are kept."""
        if not bool(keep[self.present].all()):
            raise ValueError(f"evict: {self!r} is in an attention worker, {HERE}")

    def tables(self) -> dict[str, Table]:
        """As `KVStore.tables`, of what is in the worker."""
        self._flushed()
        return {TOKENS: RemoteTable(self._ask, self._lengths, lay_out(self.storage, self.stats, self.dims, self.dtype))}

    def notes(self) -> dict[str, Tensor]:
        """As `KVStore.notes`."""
        self._flushed()
        found = self._ask({"do": "channels"})
        return {"seen": self.seen} | dict(zip(CHANNELS, (x.clone() for x in found), strict=bool(found)))

    def take_notes(self, parcel: Parcel, counts: dict[str, Tensor]) -> None:
        """As `KVStore.take_notes`; refused where tokens were evicted or moved, which does not happen here."""
        lengths = counts[TOKENS]
        if not self.ordered or not torch.equal(lengths, self.seen[:, None].expand_as(lengths)):
            raise ValueError(f"{TOKENS}: expected all tokens, in order of their positions, in an attention worker")
        channels = [parcel.take(name, (*lengths.shape, dim), self.dtype)
                    for name, dim in zip(CHANNELS, self.dims, strict=True) if self.storage.normalise]  # fmt: skip
        self._ask({"do": "take_notes"}, self.seen, *channels)
        self._lengths = lengths

    def _part(self, name: str) -> Tensor:
        raise ValueError(f"{name}: {self!r} is in an attention worker, {HERE}")

    def _dense(self, number: int) -> Tensor:
        raise ValueError(f"{('keys', 'values')[number]}: {self!r} is in an attention worker, {HERE}")

    def _open(self, k: Tensor, v: Tensor) -> None:
        """Have a store made for tokens like the first ones."""
        self.worker = running_worker(self.threads)
        self._name = self.worker.name()
        form = asdict(self.storage) | {"dtype": None if self.storage.dtype is None else str(self.storage.dtype)}
        self._ask({"do": "new", "storage": form, "path": self.path, "resident": self.resident})
        self.seen = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        self._lengths = torch.zeros(*k.shape[:2], dtype=torch.int64, device=k.device)
        self.dtype, self.dims = k.dtype, (k.shape[3], v.shape[3])

    def _send_query(self, q: Tensor, rules: dict[str, Any]) -> None:
        """Have the worker attend over what it has; the answer comes with the token that waits or will wait here."""
        self.worker.tell({"do": "begin", "store": self._name} | rules, q)  # type: ignore[union-attr]
        self._begun = True

    def _flushed(self) -> AttentionWorker:
        """The worker, which has everything."""
        if self._waiting is not None:
            self._send(None)
        if self.worker is None:
            raise ValueError(f"{self!r}: expected tokens")
        return self.worker

    def _send(self, present: Tensor | None) -> None:
        """What waits, a piece at a time."""
        (k, v), self._waiting = self._waiting, None  # type: ignore[misc]
        count = max(1, PIECE * k.shape[2] // max(1, k.nbytes))
        for first in range(0, max(1, k.shape[2]), count):
            part = slice(first, first + count)
            masks = () if present is None else (present[:, part],)
            self._ask({"do": "append"}, k[:, :, part], v[:, :, part], *masks)

    def _ask(self, message: dict[str, Any], *tensors: Tensor) -> list[Tensor]:
        answer, results = self.worker.ask(message | {"store": self._name}, *tensors)  # type: ignore[union-attr]
        self.remote_nbytes = answer.get("nbytes", self.remote_nbytes)
        self._slot_nbytes = answer.get("slot_nbytes", self._slot_nbytes)
        return results


def _rules(q: Tensor, scale: float | None, softcap: float | None, impl: str) -> dict[str, Any]:
    """Options of `attend_stored` as a message has them."""
    return {"scale": resolve_scale(scale, q.shape[3]), "softcap": softcap, "impl": impl}


__all__ = ["RemoteStore"]
