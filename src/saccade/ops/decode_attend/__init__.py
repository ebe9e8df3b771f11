"""See `api` and `scores`."""

from saccade.ops.decode_attend.api import decode_attend
from saccade.ops.decode_attend.scores import decode_scores

__all__ = ["decode_attend", "decode_scores"]
