"""The engines: six operators that do the arithmetic of every mechanism."""

from saccade.ops.attend import attend
from saccade.ops.block_attend import block_attend
from saccade.ops.decode_attend import attend_groups, decode_attend, decode_scores
from saccade.ops.dispatch import RunRecord, recording
from saccade.ops.gather_attend import gather_attend
from saccade.ops.long_conv import long_conv
from saccade.ops.merge import merge
from saccade.ops.scan import ScanState, scan

__all__ = [
    "RunRecord", "ScanState", "attend", "attend_groups", "block_attend", "decode_attend", "decode_scores",
    "gather_attend", "long_conv", "merge", "recording", "scan",
]  # fmt: skip
