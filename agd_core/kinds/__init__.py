"""The kinds of adapters. Each says in `place` where it works:

- "output": adds to what a cross-attention returns, knowing its input `h` (the paper's two adapters).
- "attention": adds to what a cross-attention hands to `to_out`, knowing `h` and `delta`, and so the negative prompt.
- "linear": adds to what the transformer blocks' linear layers return, knowing their inputs.
"""

from .cross_attention import CrossAttentionAdapter
from .delta import DeltaAdapter
from .low_rank import LowRankAdapter
from .offset import OffsetAdapter
from .scale import ScaleAdapter

KINDS = {
    "cross_attention": CrossAttentionAdapter,
    "offset": OffsetAdapter,
    "delta": DeltaAdapter,
    "low_rank": LowRankAdapter,
    "scale": ScaleAdapter,
}


def hears_negative(kind: str) -> bool:
    """Whether adapters of that kind know the negative prompt."""
    return KINDS[kind].place == "attention"
