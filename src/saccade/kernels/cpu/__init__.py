"""The C++ engine for CPUs: a plain C interface over pointers, shapes and strides, called through ctypes.

ctypes and not nanobind: the surface is a handful of functions that take one struct each, needs no headers of Python or
PyTorch, and so one built file serves every version of both. Threads are PyTorch's own (see `library`).

Memory of a forward pass beyond its inputs and its result is O(N) for each head: 4 bytes a row for the log-sum-exp, 4 E
more while a 16-bit result is still in fp32, and the threads' scratch, which does not grow with N but in `search`.
Nothing depends on the pairs.
"""

from saccade.kernels.cpu.attention import Rules, attention
from saccade.kernels.cpu.backward import attention_backward
from saccade.kernels.cpu.boxes import boxes_attention, boxes_gradients
from saccade.kernels.cpu.decode_scores import decode_scores
from saccade.kernels.cpu.decoding import Pages, decoding
from saccade.kernels.cpu.gather import gathering, gathers
from saccade.kernels.cpu.groups import GROUP_CHANNELS, attend_groups
from saccade.kernels.cpu.library import INSTRUCTION_SETS, instruction_set, missing, use
from saccade.kernels.cpu.scan import scan, scan_gradient
from saccade.kernels.cpu.search import search

__all__ = [
    "GROUP_CHANNELS", "INSTRUCTION_SETS", "Pages", "Rules", "attend_groups", "attention", "attention_backward",
    "boxes_attention", "boxes_gradients", "decode_scores", "decoding", "gathering", "gathers", "instruction_set",
    "missing", "scan", "scan_gradient", "search", "use",
]  # fmt: skip
