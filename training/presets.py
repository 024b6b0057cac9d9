"""Settings that suit a family of bases, and what a card's memory leaves for training. docs/training.md says why."""

from ..agd_core.config import BaseInfo
from .config import TrainConfig

# GB (10^9 bytes) that training may use on cards of so many GiB: the rest is the screen's and the CUDA context's.
CARDS = {"8 GB": 7.5, "12 GB": 11.5, "24 GB": 22.0}
COMMON_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")

_ANY = {"iterations": 1500, "batch": 4, "learning_rate": 5e-4, "reuse": 4}
_AT_512 = {**_ANY, "width": 512, "height": 512}
_AT_768 = {**_ANY, "width": 768, "height": 768}
_AT_1024 = {**_ANY, "width": 1024, "height": 1024, "aspect_ratios": COMMON_RATIOS}
# For kind "scale": few numbers that are found fast.
_CALIBRATION = {"iterations": 150, "learning_rate": 2e-2, "preview_every": 0}
# ComfyUI's names of the families. Pictures have the size that the base was made for.
_FAMILIES = {
    "SD15": _AT_512,
    "SD20": _AT_768,
    "SD21UnclipL": _AT_768,
    "SD21UnclipH": _AT_768,
    "SD_X4Upscaler": {**_AT_512, "rank": 0},  # its blocks have no self-attention
    "SDXL": _AT_1024,
    "SDXLRefiner": _AT_1024,
    "SSD1B": _AT_1024,
    "Segmind_Vega": _AT_1024,
    "KOALA_700M": _AT_1024,
    "KOALA_1B": _AT_1024,
}


def settings_for(base: BaseInfo, chosen: dict) -> TrainConfig:
    """`chosen` settings, the others as they suit the base. Chosen sizes are not spread over aspect ratios.

    A family of which nothing is known is trained as SD 1.5.
    """
    suited = next((settings for family, settings in _FAMILIES.items() if _is(base, family)), _AT_512)
    if chosen.get("kind") == "scale":
        suited = {**suited, **_CALIBRATION}
    if "width" in chosen or "height" in chosen:
        suited = {**suited, "aspect_ratios": ()}
    return TrainConfig(**{**suited, **chosen})


def _is(base: BaseInfo, family: str) -> bool:
    """Whether the base is of that family; inpainting and InstructPix2Pix models are named after theirs."""
    return base.family == family or base.family.startswith(f"{family}_")
