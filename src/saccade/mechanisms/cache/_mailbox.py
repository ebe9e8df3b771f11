"""What two processes of attention offloading share: a socket for short JSON messages, memory for tensors."""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at whose multiples tensors begin."""

DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16,
                                          torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)}  # fmt: skip


class Mailbox:
    """One end: messages are JSON with their length before them, tensors lie in shared memory that both map.

    Args:
        channel: Connected stream socket, whose other end the other process has.
        memory: File descriptor of the shared memory.
    """

    def __init__(self, channel: socket.socket, memory: int) -> None:
        self.channel = channel
        self.memory = memory
        self._map: mmap.mmap | None = None

    def send(self, message: dict[str, Any], tensors: Sequence[Tensor] = (), start: int = 0) -> int:
        """Hand over a message and copies of tensors. What was in that part of the memory is overwritten.

        Args:
            message: As JSON; `tensors` is added.
            tensors: Of any shape and device.
            start: Byte at which they begin, past what the other end has not looked at yet.

        Returns:
            Where they end.
        """
        places: list[tuple[int, list[int], str]] = []
        for x in tensors:
            places.append((start, list(x.shape), str(x.dtype)))
            start += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        room = self._room(start)
        for x, (first, shape, dtype) in zip(tensors, places, strict=True):
            view(room, first, shape, dtype).copy_(x)
        text = json.dumps(message | {"tensors": places}).encode()
        self.channel.sendall(len(text).to_bytes(4, "little") + text)
        return start

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The next message; its tensors are views, good until either end sends again.

        Returns:
            Message and tensors.

        Raises:
            EOFError: If the other end is gone.
        """
        message = json.loads(self._exactly(int.from_bytes(self._exactly(4), "little")))
        places = message.pop("tensors")
        room = self._room(os.fstat(self.memory).st_size)
        return message, [view(room, *place) for place in places]

    def _room(self, nbytes: int) -> mmap.mmap:
        """The memory, at least so large; another mapping after it has grown."""
        if self._map is None or len(self._map) < nbytes:
            size = max(mmap.PAGESIZE, nbytes, os.fstat(self.memory).st_size)
            os.posix_fallocate(self.memory, 0, size)  # where memory is short an error, not a signal later
            self._map = mmap.mmap(self.memory, size)
        return self._map

    def _exactly(self, count: int) -> bytes:
        """So many bytes of the socket."""
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self.channel.recv(count - len(parts))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other end is gone")
            parts += part
        return bytes(parts)


def view(memory: mmap.mmap, start: int, shape: Sequence[int], dtype: str) -> Tensor:
    """A tensor in shared memory."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(*shape, dtype=DTYPES[dtype])
    return torch.frombuffer(memory, dtype=DTYPES[dtype], count=count, offset=start).view(*shape)


__all__ = ["Mailbox", "view"]
