"""Settings that suit a family of bases, and what a card's memory leaves for training. docs/training.md says why."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..agd_core.config import BaseInfo
from ..agd_core.families import FAMILIES, Family, find_family
from .config import KINDS, TrainConfig, foreign_settings, settings_of_kind
from .options import SettingsError

# GB (10^9 bytes) that training may use on cards of so many GiB: the rest is the screen's and the CUDA context's.
CARDS = {"8 GB": 7.5, "12 GB": 11.5, "16 GB": 15.0, "24 GB": 22.0, "32 GB": 30.0}
# Factors of the usual number of iterations: docs/quality.md has what each brings.
QUALITIES = {"quick": 1 / 3, "normal": 1.0, "best": 3.0}
COMMON_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")

_LISTED = 3  # families with a default of their own that help names one by one


@dataclass(frozen=True)
class Preset:
    """`settings` in place of TrainConfig's defaults for the bases, or the kind of adapter, that `title` says."""

    title: str
    settings: dict[str, Any]


# Flow matching is sampled so: by Euler's method or DPM++ 2M, along schedules that are even in the model's own time.
_FLOW = Preset("flow matching", {"schedulers": ("simple", "normal"), "solvers": ("euler", "dpmpp_2m")})
# The first block of each stack is enough (benchmarks/deep_stacks.py), and SDXL's have up to ten.
_IN_STACKS = Preset("UNets", {"attention_every": 10})
_WITH_VECTOR = Preset("transformers that have one", {"vector": 128})
_UNREACHED = Preset("transformers whose attentions aren't known", {"kind": "low_rank"})
_OF_KIND = {
    # Few numbers that are found fast.
    "scale": Preset("scale", {"iterations": 150, "learning_rate": 2e-2, "preview_every": 0, "attention_every": 1}),
}
_PRESETS = (_FLOW, _IN_STACKS, _WITH_VECTOR, _UNREACHED, *_OF_KIND.values())


def settings_for(base: BaseInfo, chosen: dict, quality: str = "normal") -> TrainConfig:
    """`chosen` settings, the others as they suit the base. Chosen sizes are not spread over aspect ratios.

    `quality`, one of QUALITIES, decides on the iterations where none are chosen.

    A family of which nothing is known is trained as SD 1.5. Raises `SettingsError` where a chosen setting is none of
    the adapter's kind, or there is no such quality.
    """
    family = find_family(base.family) or Family(base.family, base.family)
    suited = trajectories_of(base) | _adapter_for(base) | _suited(family)
    kind = chosen.get("kind") or suited.get("kind", TrainConfig.kind)
    check_kind(kind, chosen)
    if kind in _OF_KIND:
        suited |= _OF_KIND[kind].settings
    if quality not in QUALITIES:
        raise SettingsError(f"quality is {quality!r:.60}, but must be one of {', '.join(QUALITIES)}.")
    suited["iterations"] = round(default_of_kind("iterations", kind) * QUALITIES[quality])
    if "width" in chosen or "height" in chosen:
        suited |= {"aspect_ratios": ()}
    return TrainConfig(**{**suited, **chosen})


def default_of_kind(name: str, kind: str) -> Any:
    """A setting's default for a kind of adapter."""
    own = _OF_KIND[kind].settings if kind in _OF_KIND else {}
    return own.get(name, getattr(TrainConfig, name))


def check_chosen(chosen: dict) -> TrainConfig:
    """The settings with the defaults of no family. Raises `SettingsError` where `chosen` can't work with any base."""
    config = TrainConfig(**chosen)
    if "kind" in chosen:
        check_kind(config.kind, chosen)
    return config


def check_for_two_experts(config: TrainConfig) -> None:
    """Raises `SettingsError` where the other expert of two would never be evaluated."""
    if config.learns_everywhere:
        raise SettingsError(
            "There is an other expert, but the model is trained at all noise levels, so that the other one has none: "
            "choose high noise or low noise under noise levels (--sigma-from or --sigma-to), or leave the other out."
        )


def check_kind(kind: str, chosen: dict) -> None:
    """Raises `SettingsError` naming the settings that were chosen and that this kind of adapter doesn't have."""
    if kind in KINDS and (foreign := foreign_settings(kind, chosen)):
        raise SettingsError(
            f"An adapter of kind {kind} has no {' and no '.join(foreign)}: leave that out, or choose another kind. "
            f"It has {', '.join(settings_of_kind(kind))}."
        )


def trajectories_of(base: BaseInfo) -> dict:
    """The settings of trajectories that are other ones than most bases'."""
    return dict(_FLOW.settings) if base.prediction == "FLOW" else {}


def _adapter_for(base: BaseInfo) -> dict:
    """Of UNets: where in their stacks; of transformers: the vector of the timestep, and attentions where they are
    reached."""
    if base.layout == "unet":
        return dict(_IN_STACKS.settings)
    reached = any(layer.reads_prompt for layer in base.layers)
    vector = _WITH_VECTOR.settings if base.vector else {}
    return vector | ({} if reached else _UNREACHED.settings)


def _suited(family: Family) -> dict:
    """Pictures have the size that the base was made for."""
    sizes = {"width": family.side, "height": family.side}
    return sizes | ({"aspect_ratios": COMMON_RATIOS} if family.aspect_ratios else {}) | family.settings


def defaults_of(name: str) -> str:
    """A setting's default, and where bases or kinds of adapters have others: what a run will really have, for help.

    Of a setting that not all kinds have, those that do.
    """
    default = getattr(TrainConfig, name)
    others = [f"{preset.title}: {_shown(preset.settings[name])}" for preset in _PRESETS if name in preset.settings]
    return "; ".join([*_by_family(name, default), *others, *_kinds_with(name)])


def _kinds_with(name: str) -> Iterator[str]:
    kinds = [kind for kind in KINDS if name in settings_of_kind(kind)]
    if kinds and len(kinds) < len(KINDS):
        yield f"kinds {', '.join(kinds)} only"


def _by_family(name: str, default: Any) -> Iterator[str]:
    own = {family.title: value for family in FAMILIES if (value := _suited(family).get(name, default)) != default}
    if len(own) <= _LISTED:
        yield _shown(default)
        yield from (f"{title}: {_shown(value)}" for title, value in own.items())
    elif isinstance(default, tuple):
        yield f"by the base's family: none, or {_shown(next(iter(own.values())))}"
    else:
        yield f"by the base's family: {default} to {max(own.values())}"


def _shown(value: Any) -> str:
    return (" ".join(value) or "none") if isinstance(value, tuple) else f"{value}"
