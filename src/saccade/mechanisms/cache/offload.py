"""AttentionWorker: another process that holds keys and values and computes attention over them."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.mechanisms.cache._mailbox import Mailbox


class WorkerError(RuntimeError):
    """The worker is gone, or could not do what it was asked."""


class AttentionWorker:
    """A process with stores of its own; see `_worker`. It ends with this object, or with this process.

    Args:
        threads: Of its engine; None for what PyTorch chooses.

    Attributes:
        process: The process.
    """

    def __init__(self, threads: int | None = None) -> None:
        mine, its = socket.socketpair()
        memory = tempfile.TemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)  # noqa: S108,SIM115
        self._memory = memory
        self._mailbox = Mailbox(mine, memory.fileno())
        self._names = itertools.count()
        self._end = 0  # of what the worker has not answered yet
        source = str(Path(__file__).parents[3])
        path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
        command = [sys.executable, "-m", "saccade.mechanisms.cache._worker", str(its.fileno()), str(memory.fileno())]
        self.process = subprocess.Popen(
            command + ([] if threads is None else [str(threads)]), env=os.environ | {"PYTHONPATH": path},
            pass_fds=(its.fileno(), memory.fileno()), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()

    def __del__(self) -> None:
        """Hang up, on which the worker ends."""
        self._mailbox.channel.close()
        self._memory.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def name(self) -> int:
        """Of a new store."""
        return next(self._names)

    def tell(self, message: dict[str, Any], *tensors: Tensor) -> None:
        """Send what is answered later, see `ask`."""
        try:
            self._end = self._mailbox.send(message, tensors, self._end)
        except OSError as error:
            raise self._gone() from error

    def ask(self, message: dict[str, Any], *tensors: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
        """Send, and wait for the answer.

        Args:
            message: With `do` and `store`.
            *tensors: Copied.

        Returns:
            The answer and its tensors, views of the shared memory: good until the next message.

        Raises:
            WorkerError: If the worker has ended, or says that it failed.
        """
        self.tell(message, *tensors)
        try:
            answer, results = self._mailbox.receive()
        except EOFError as error:
            raise self._gone() from error
        self._end = 0
        if "error" in answer:
            raise WorkerError(f"the attention worker failed to {message['do']}: {answer['error']}")
        return answer, results

    def _gone(self) -> WorkerError:
        try:
            status: int | str = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = "none yet"
        return WorkerError(
            f"the attention worker, process {self.process.pid}, has ended (exit status {status}) and with it the keys "
            "and values it held: expected it to run, start again from the prompt with a new cache"
        )


_RUNNING: dict[int | None, AttentionWorker] = {}


def running_worker(threads: int | None) -> AttentionWorker:
    """A worker that all stores with as many threads share; another one where the last has ended."""
    if threads not in _RUNNING or not _RUNNING[threads].alive:
        _RUNNING[threads] = AttentionWorker(threads)
    return _RUNNING[threads]


__all__ = ["AttentionWorker", "WorkerError", "running_worker"]
