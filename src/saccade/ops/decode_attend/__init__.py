"""See `api`, `scores`, `groups` and `search`."""

from saccade.ops.decode_attend.api import decode_attend
from saccade.ops.decode_attend.groups import attend_groups
from saccade.ops.decode_attend.scores import decode_scores
from saccade.ops.decode_attend.search import KeyGraph, search_graph

__all__ = ["KeyGraph", "attend_groups", "decode_attend", "decode_scores", "search_graph"]
