"""The attention worker: a process that holds keys and values and answers with attention over them.

Started by `offload.AttentionWorker` as `python -m saccade.mechanisms.cache._worker SOCKET MEMORY`, two inherited file
descriptors. It ends when the socket does.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache._mailbox import DTYPES, Mailbox
from saccade.mechanisms.cache.reading import attend_stored
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore, report
from saccade.mechanisms.cache.tiers import Disk
from saccade.ops import merge
from saccade.types import AttentionOutput


class Server:
    """The stores of the other process, and what it may ask of them: each public method is a message's `do`."""

    def __init__(self) -> None:
        self._stores: dict[int, KVStore] = {}
        self._begun: dict[int, tuple[Tensor, AttentionOutput, dict[str, Any]]] = {}

    def handle(self, message: dict[str, Any], tensors: list[Tensor]) -> list[Tensor] | None:
        """What to answer with: tensors; or None for no answer."""
        asked: dict[str, Callable[..., list[Tensor] | None]]
        asked = {"new": self._new, "append": self._append, "begin": self._begin, "finish": self._finish,
                 "attend": self._attend, "crop": self._crop, "select": self._select, "drop": self._drop,
                 "channels": self._channels, "read": self._read, "take_notes": self._take_notes,
                 "resize": self._resize, "write": self._write}  # fmt: skip
        return asked[message.pop("do")](*tensors, **message)

    def size(self, store: int) -> dict[str, int]:
        """Bytes that a store holds, and of one token."""
        kept = self._stores.get(store)
        return {} if kept is None else {"nbytes": kept.nbytes, "slot_nbytes": kept.slot_nbytes}

    def _new(self, store: int, storage: dict[str, Any], path: str | None, resident: float) -> list[Tensor]:
        form = Storage(**(storage | {"dtype": DTYPES.get(storage["dtype"])}))
        self._stores[store] = KVStore(form) if path is None else TieredStore(Disk(path, resident=resident), form)
        return []

    def _append(self, k: Tensor, v: Tensor, present: Tensor | None = None, *, store: int) -> list[Tensor]:
        report([self._stores[store]])
        self._stores[store].append(k.clone(), v.clone(), None if present is None else present.clone())
        return []

    def _begin(self, q: Tensor, *, store: int, **options: Any) -> None:
        """Attention of the next token's query over the tokens before it, while its key and value are being made."""
        q = q.clone()
        self._begun[store] = q, attend_stored(q, self._stores[store], **options), options

    def _finish(self, k: Tensor, v: Tensor, *, store: int) -> list[Tensor]:
        """Take the token in and give its query's attention over all: two parts, merged by their log-sum-exp."""
        q, past, options = self._begun.pop(store)
        self._append(k, v, store=store)
        kept = self._stores[store]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in kept.gather(kept.lengths[..., None] - 1))
        wide = torch.promote_types(q.dtype, torch.float32)
        own, softcap = (q.to(wide) * k.to(wide)).sum(-1) * options["scale"], options["softcap"]
        own = own if softcap is None else softcap * torch.tanh(own / softcap)
        return list(merge([past, AttentionOutput(v.to(q.dtype), own)]))  # type: ignore[arg-type]

    def _attend(self, q: Tensor, *, store: int, **options: Any) -> list[Tensor]:
        return list(attend_stored(q.clone(), self._stores[store], **options))  # type: ignore[arg-type]

    def _crop(self, seen: Tensor, *, store: int) -> list[Tensor]:
        """To so many tokens of each sequence, which are fewer by one number for all, or there already."""
        kept = self._stores[store]
        if not kept.empty:
            kept.crop(int((kept.seen - seen).max()))
        self._begun.pop(store, None)
        return []

    def _select(self, rows: Tensor, *, store: int, into: int) -> list[Tensor]:
        self._stores[into] = self._stores[store].select(rows.clone())
        return []

    def _channels(self, *, store: int) -> list[Tensor]:
        return list(self._stores[store].channels or ())

    def _read(self, *slots: Tensor, store: int, name: str) -> list[Tensor]:
        table = self._stores[store].table
        return [table.read(name, table.find(slots))]  # type: ignore[arg-type]

    def _take_notes(self, seen: Tensor, *channels: Tensor, store: int) -> list[Tensor]:
        """Of a store that is about to be filled by `_resize` and `_write`."""
        kept = self._stores[store]
        kept.seen = seen.clone()
        kept.channels = (channels[0].clone(), channels[1].clone()) if channels else None
        return []

    def _resize(self, lengths: Tensor, *, store: int) -> list[Tensor]:
        self._stores[store].table.resize(lengths.clone())
        return []

    def _write(self, *tensors: Tensor, store: int, names: list[str]) -> list[Tensor]:
        entry, head, slot, *parts = tensors
        self._stores[store].table.write((entry, head, slot), dict(zip(names, parts, strict=True)))
        return []

    def _drop(self, *, store: int) -> list[Tensor]:
        self._stores.pop(store, None)
        self._begun.pop(store, None)
        return []


def serve(mailbox: Mailbox) -> None:
    """Answer until the other end is gone. What fails is told in the answer, that of `begin` in the next."""
    server, failed = Server(), None
    while True:
        try:
            message, tensors = mailbox.receive()
        except EOFError:
            return
        store, quiet, answer = message["store"], message["do"] == "begin", None
        if failed is None or quiet:
            try:
                answer = server.handle(message, tensors)
            except Exception as error:  # noqa: BLE001  told to the caller, whatever it is
                failed = f"{type(error).__name__}: {error}"
        if not quiet:
            mailbox.send(server.size(store) if failed is None else {"error": failed}, answer or ())
            failed = None


def main() -> None:
    """Serve on the file descriptors of the command line."""
    channel, memory = int(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        torch.set_num_threads(int(sys.argv[3]))
    torch.set_grad_enabled(False)
    serve(Mailbox(socket.socket(fileno=channel), memory))


if __name__ == "__main__":
    main()
