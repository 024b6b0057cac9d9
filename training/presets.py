"""Settings that suit a family of bases, and what a card's memory leaves for training. docs/training.md says why."""

from ..agd_core.config import BaseInfo
from ..agd_core.families import Family, find_family
from .config import TrainConfig

# GB (10^9 bytes) that training may use on cards of so many GiB: the rest is the screen's and the CUDA context's.
CARDS = {"8 GB": 7.5, "12 GB": 11.5, "24 GB": 22.0}
COMMON_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")

_ANY = {"iterations": 1500, "batch": 4, "learning_rate": 5e-4, "reuse": 4}
# Flow matching is sampled so: by Euler's method or DPM++ 2M, along schedules that are even in the model's own time.
_FLOW = {"schedulers": ("simple", "normal"), "solvers": ("euler", "dpmpp_2m")}
_RANK, _VECTOR = 16, 128  # of transformers' adapters
# For kind "scale": few numbers that are found fast.
_SCALE = {"iterations": 150, "learning_rate": 2e-2, "preview_every": 0}


def settings_for(base: BaseInfo, chosen: dict) -> TrainConfig:
    """`chosen` settings, the others as they suit the base. Chosen sizes are not spread over aspect ratios.

    A family of which nothing is known is trained as SD 1.5.
    """
    family = find_family(base.family) or Family(base.family, base.family)
    suited: dict = _ANY | trajectories_of(base)
    suited |= _adapter_for(base, chosen.get("kind")) | _suited(family)
    if chosen.get("kind") == "scale":
        suited |= _SCALE
    if "width" in chosen or "height" in chosen:
        suited |= {"aspect_ratios": ()}
    return TrainConfig(**{**suited, **chosen})


def trajectories_of(base: BaseInfo) -> dict:
    """The settings of trajectories that are other ones than most bases'."""
    return dict(_FLOW) if base.prediction == "FLOW" else {}


def _adapter_for(base: BaseInfo, kind: str | None) -> dict:
    """Of transformers: low-rank changes, the vector of the timestep, and attentions where they are reached.

    `kind`: if one was chosen.
    """
    if base.layout != "transformer":
        return {}
    kind = kind or ("delta" if any(layer.reads_prompt for layer in base.layers) else "low_rank")
    rank = {"hidden": _RANK} if kind == "low_rank" else {"rank": _RANK}
    return {"kind": kind, "vector": _VECTOR if base.vector else 0, **rank}


def _suited(family: Family) -> dict:
    """Pictures have the size that the base was made for."""
    sizes = {"width": family.side, "height": family.side}
    return sizes | ({"aspect_ratios": COMMON_RATIOS} if family.aspect_ratios else {}) | family.settings
