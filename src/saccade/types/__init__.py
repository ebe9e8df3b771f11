"""The words Saccade speaks, fixed once.

Shape legend, used in every docstring:

| letter | means |
|---|---|
| B | batch |
| H | query heads |
| G | key/value heads; G divides H, head h reads key/value head h // (H / G) |
| M | queries |
| N | keys and values; in self-attention without a cache M = N |
| D | head dim of queries and keys |
| E | head dim of values |
| C | channels of a feature map `[B, C, *grid]` or of a token sequence `[B, N, C]` |

Conventions: queries `[B, H, M, D]`, keys `[B, G, N, D]`, values `[B, G, N, E]`. Masks: True = attend. Causal is
bottom-right aligned: query i sees keys j <= i + N - M. Windows are `(left, right)` in tokens, the token itself always
included, -1 = unbounded. `scale=None` means D^-0.5. A budget or density is the fraction *kept*, in [0, 1].
A row with nothing to attend to gives output 0, LSE -inf and gradient 0; NaN or inf in masked keys and values never
reaches an output or a gradient. Inputs keep their dtype, accumulation is at least fp32.
"""

from saccade.types.base import AttentionOutput, Geometry, Kind, Pattern, TokenIndex
from saccade.types.boxes import Boxes
from saccade.types.layout import BlockLayout
from saccade.types.pages import KVPages

__all__ = ["AttentionOutput", "BlockLayout", "Boxes", "Geometry", "KVPages", "Kind", "Pattern", "TokenIndex"]
