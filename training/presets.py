"""Settings that suit a family of bases, and what a card's memory leaves for training. docs/training.md says why."""

from ..agd_core.config import BaseInfo
from ..agd_core.families import Family, find_family
from .config import TrainConfig

# GB (10^9 bytes) that training may use on cards of so many GiB: the rest is the screen's and the CUDA context's.
CARDS = {"8 GB": 7.5, "12 GB": 11.5, "24 GB": 22.0}
COMMON_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")

_ANY = {"iterations": 1500, "batch": 4, "learning_rate": 5e-4, "reuse": 4}
# For kind "scale": few numbers that are found fast.
_SCALE = {"iterations": 150, "learning_rate": 2e-2, "preview_every": 0}


def settings_for(base: BaseInfo, chosen: dict) -> TrainConfig:
    """`chosen` settings, the others as they suit the base. Chosen sizes are not spread over aspect ratios.

    A family of which nothing is known is trained as SD 1.5.
    """
    suited = _suited(find_family(base.family) or Family(base.family, base.family))
    if chosen.get("kind") == "scale":
        suited |= _SCALE
    if "width" in chosen or "height" in chosen:
        suited |= {"aspect_ratios": ()}
    return TrainConfig(**{**suited, **chosen})


def _suited(family: Family) -> dict:
    """Pictures have the size that the base was made for."""
    sizes = {"width": family.side, "height": family.side}
    return _ANY | sizes | ({"aspect_ratios": COMMON_RATIOS} if family.aspect_ratios else {}) | family.settings
