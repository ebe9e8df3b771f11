"""See `api`, `scores` and `groups`."""

from saccade.ops.decode_attend.api import decode_attend
from saccade.ops.decode_attend.groups import attend_groups
from saccade.ops.decode_attend.scores import decode_scores

__all__ = ["attend_groups", "decode_attend", "decode_scores"]
