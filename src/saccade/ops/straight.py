"""Calling the function behind a `torch.library` operator straight, where nobody asks for more than its values.

PyTorch takes a call of an operator written in Python through several more layers of Python before any work is done:
tens of microseconds, and several times that where other work has emptied the caches. They serve gradients, traces,
transforms, modes and profilers; with none of these about, the function alone gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)

_ONLOOKERS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,  # noqa: SLF001  torch has no public way to ask for any of these
    torch._C._len_torch_function_stack,  # noqa: SLF001
    torch._C._functorch.peek_interpreter_stack,  # noqa: SLF001
    torch._C._is_tracing,  # noqa: SLF001
    torch.autograd._profiler_enabled,  # noqa: SLF001
)
"""What is true where someone looks on: modes, function transforms, the tracer, the profiler."""


def is_plain(*args: Any) -> bool:
    """Whether the function of an operator may be called on `args` itself.

    Args:
        *args: Those of the operator.

    Returns:
        Whether its values are all that is asked for: no gradient, trace, transform, mode, profiler or tensor subclass.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta or (grad and x.requires_grad)):
            return False
    return not any(looks_on() for looks_on in _ONLOOKERS)


__all__ = ["is_plain"]
