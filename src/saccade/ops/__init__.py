"""The engines: six operators that do the arithmetic of every mechanism."""

from saccade.ops.attend import attend
from saccade.ops.block_attend import block_attend
from saccade.ops.decode_attend import KeyGraph, attend_groups, decode_attend, decode_scores, search_graph
from saccade.ops.dispatch import RunRecord, recording
from saccade.ops.gather_attend import gather_attend
from saccade.ops.long_conv import long_conv
from saccade.ops.merge import merge
from saccade.ops.scan import ScanState, scan

__all__ = [
    "KeyGraph", "RunRecord", "ScanState", "attend", "attend_groups", "block_attend", "decode_attend", "decode_scores",
    "gather_attend", "long_conv", "merge", "recording", "scan", "search_graph",
]  # fmt: skip
