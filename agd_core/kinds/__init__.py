"""The kinds of adapters, by the names that users choose them by. A new one: docs/architecture.md, "A new kind"."""

from ..config import KindConfig
from .adapter_kind import AdapterKind
from .cross_attention import CrossAttentionAdapter
from .delta import DeltaAdapter
from .low_rank import LowRankAdapter
from .offset import OffsetAdapter
from .paper_additive import PaperAdditiveAdapter
from .paper_attention import PaperAttentionAdapter
from .scale import ScaleAdapter

_OURS = (DeltaAdapter, LowRankAdapter, ScaleAdapter, CrossAttentionAdapter, OffsetAdapter)
KINDS: dict[str, type[AdapterKind]] = {
    kind.Config.name: kind for kind in (*_OURS, PaperAttentionAdapter, PaperAdditiveAdapter)
}


def kind_config(kind: str, **settings) -> KindConfig:
    """The settings of a kind by its name. Raises `ValueError` where there is no such kind, or they can't work."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    return KINDS[kind].Config(**settings)
