"""The engines: five operators that do the arithmetic of every mechanism."""

from saccade.ops.attend import attend
from saccade.ops.block_attend import block_attend
from saccade.ops.dispatch import RunRecord, recording
from saccade.ops.gather_attend import gather_attend
from saccade.ops.merge import merge

__all__ = ["RunRecord", "attend", "block_attend", "gather_attend", "merge", "recording"]
