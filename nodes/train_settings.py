"""AGD Train Settings: what few people change of a training, in a node of its own."""

import functools
from dataclasses import dataclass, field
from typing import Any

from comfy_api.v0_0_2 import io

from ..agd_core.comfyui import folders
from ..training.arguments import PromptSettings
from ..training.config import KINDS, PRECISIONS, RULES, TrainConfig, settings_of_kind
from ..training.presets import COMMON_RATIOS, default_of_kind, defaults_of
from .common import number_input

_DEFAULTS = TrainConfig()
_NEW = "a new adapter"
_BY_QUALITY, _BY_NUMBER = "as quality says", "this many iterations"
_OWN_SIZE, _BY_SIDES = "the model's own", "width and height"
_ALL_NOISE, _HIGH_NOISE, _LOW_NOISE = "all", "high noise", "low noise"

TrainSettingsType = io.Custom("AGD_TRAIN_SETTINGS")
_number = functools.partial(number_input, TrainConfig)


@dataclass(frozen=True)
class TrainSettings:
    """`chosen`: of `TrainConfig`, by name; the others are as they suit the model. `start`: the adapter's name."""

    chosen: dict[str, Any] = field(default_factory=dict)
    negative: str = ""
    prompt_count: int = PromptSettings.prompt_count
    start: str | None = None
    other_expert: Any = None  # a MODEL


def _length() -> io.Input:
    tooltip = (
        "How long to train. 'as quality says' goes by AGD Train's quality: normal has "
        f"{_DEFAULTS.iterations} iterations, and {default_of_kind('iterations', 'scale')} for kind 'scale'."
    )
    iterations = _number("iterations", "Optimiser steps. This number wins over AGD Train's quality.")
    options = [io.DynamicCombo.Option(_BY_QUALITY, []), io.DynamicCombo.Option(_BY_NUMBER, [iterations])]
    return io.DynamicCombo.Input("length", options=options, tooltip=tooltip)


def _kind() -> io.Input:
    tooltip = (
        "What the adapter is made of. 'delta' is the usual one. 'scale' is tiny and trains in a tenth of the time. "
        "Both use the negative prompt; the others ignore it. 'low_rank' is a LoRA whose strength follows cfg, "
        "'cross_attention' and 'offset' are earlier ones of ours, 'paper_attention' and 'paper_additive' those of the "
        "paper's authors."
    )
    return io.DynamicCombo.Input("kind", options=[_of_kind(kind) for kind in KINDS], tooltip=tooltip)


def _of_kind(kind: str) -> io.DynamicCombo.Option:
    """The kind with the settings that it has."""
    inputs = [
        _number(
            "hidden",
            "Channels inside each layer of the adapter. 128 makes a file of about 2 % of SDXL's size.",
            called="adapter_size",
        ),
        _number(
            "rank",
            "Rank of the changes to the model's linear layers, as of a LoRA. They cost no time in sampling. 0: none, "
            "with kind 'delta'.",
        ),
    ]
    own = [each for each, name in zip(inputs, ("hidden", "rank"), strict=True) if name in settings_of_kind(kind)]
    return io.DynamicCombo.Option(kind, [*own, _learning_rate(default_of_kind("learning_rate", kind))])


def _learning_rate(default: float) -> io.Input:
    tooltip = "Largest learning rate of AdamW, after a warm-up; then it falls to 0 along a cosine."
    return _number("learning_rate", tooltip, default=default, min=1e-5, step=1e-5)


def _picture_size() -> io.Input:
    tooltip = (
        f"Size of the pictures to train with. 'the model's own' is the size it was made for (pixels a side "
        f"{defaults_of('width')}), in the common aspect ratios where the model knows them."
    )
    sides = [_number(side, f"{side.capitalize()} in pixels.", default=1024, step=8) for side in ("width", "height")]
    ratios = io.Boolean.Input(
        "aspect_ratios", default=True, tooltip="Also train the common aspect ratios, with the area of width x height."
    )
    options = [io.DynamicCombo.Option(_OWN_SIZE, []), io.DynamicCombo.Option(_BY_SIDES, [*sides, ratios])]
    return io.DynamicCombo.Input("picture_size", options=options, display_name="picture size", tooltip=tooltip)


def _noise_levels() -> io.Input:
    tooltip = (
        "For a model in two files, such as Wan 2.2 14B: the noise levels (sigma) of the one that is trained. 'all' for "
        "every other model."
    )
    above = _number(
        "sigma_from",
        "Train at this noise level and above: 0.875 for Wan 2.2 text to video, 0.9 for image to video.",
        default=0.875,
        step=0.005,
    )
    below = _number(
        "sigma_to",
        "Train below this noise level: 0.875 for Wan 2.2 text to video, 0.9 for image to video.",
        default=0.875,
        step=0.005,
    )
    options = {_ALL_NOISE: [], _HIGH_NOISE: [above], _LOW_NOISE: [below]}
    return io.DynamicCombo.Input(
        "noise_levels",
        options=[io.DynamicCombo.Option(*each) for each in options.items()],
        display_name="noise levels",
        tooltip=tooltip,
        extra_dict={"advanced": True},
    )


class AGDTrainSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDTrainSettings",
            display_name="AGD Train Settings",
            category="model/training",
            description="More settings for AGD Train. It shows the usual values; most people need none of it.",
            search_aliases=["agd", "training settings"],
            inputs=[
                _length(),
                _kind(),
                _picture_size(),
                _number(
                    "omega_max",
                    "The largest guidance scale (cfg) that you will sample with. The adapter learns all from 1 to it.",
                    called="guidance_scale_up_to",
                    display_name="guidance scale up to",
                    min=1.1,
                    step=0.5,
                ),
                _number("seed", "The same seed and settings give the same adapter.", control_after_generate=False),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    display_name="negative prompts",
                    tooltip=(
                        "Negative prompts to train with, one per line, beside the empty one. Empty: parts of the "
                        "prompts, and what people usually don't want."
                    ),
                ),
                number_input(
                    PromptSettings,
                    "prompt_count",
                    "How many prompts are made from wildcards, or when AGD Train's prompts are empty.",
                    display_name="made prompts",
                    advanced=True,
                ),
                io.Combo.Input(
                    "start",
                    options=[_NEW, *folders.adapters()],
                    default=_NEW,
                    display_name="start from",
                    tooltip="An adapter to go on from: of the same kind and size, or a 'scale' adapter for 'delta'.",
                ),
                _number("batch", "Pictures per iteration.", display_name="batch size", advanced=True),
                _number(
                    "reuse",
                    "How often each picture is trained with, each time at another cfg. Less is slower and no better.",
                    display_name="uses of each picture",
                    advanced=True,
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=_DEFAULTS.precision,
                    advanced=True,
                    tooltip="'base' computes in the model's own precision, 'bf16' in bf16.",
                ),
                io.Combo.Input(
                    "guidance_rule",
                    options=list(RULES),
                    default=_DEFAULTS.teacher,
                    display_name="guidance rule",
                    advanced=True,
                    tooltip="The guidance that the adapter learns: plain CFG, or another rule; see docs/training.md.",
                ),
                _number(
                    "on_policy",
                    "Share of the pictures that are sampled with the adapter itself instead of CFG.",
                    display_name="sampled with the adapter",
                    step=0.05,
                    advanced=True,
                ),
                _number(
                    "evaluate_every",
                    "Iterations between two measurements on prompts kept out of training. The best adapter is saved. "
                    "0: only at the end.",
                    display_name="measure every",
                    advanced=True,
                ),
                _number(
                    "patience",
                    "Stop after so many measurements without a better adapter. 0: never.",
                    advanced=True,
                ),
                _number(
                    "preview_every",
                    "Iterations between two previews: one prompt by CFG and by the adapter. 0: none.",
                    display_name="preview every",
                    advanced=True,
                ),
                _number(
                    "save_every",
                    "Iterations between two saved states, from which a stopped training goes on. 0: only when you "
                    "interrupt it.",
                    display_name="save every",
                    advanced=True,
                ),
                _number(
                    "frames",
                    "For a video model: how many frames its latent has in training. All of them take memory. 1: a "
                    "picture.",
                    advanced=True,
                ),
                _noise_levels(),
                io.Model.Input(
                    "other_expert",
                    optional=True,
                    display_name="other expert",
                    tooltip=(
                        "For a model in two files, such as Wan 2.2 14B: the one that isn't trained here. Choose the "
                        "noise levels of the other one as well."
                    ),
                ),
            ],
            outputs=[TrainSettingsType.Output("settings", tooltip="For AGD Train.")],
        )

    @classmethod
    def execute(
        cls,
        length,
        kind,
        picture_size,
        noise_levels,
        guidance_scale_up_to,
        guidance_rule,
        negative,
        prompt_count,
        start,
        other_expert=None,
        **others,
    ) -> io.NodeOutput:
        chosen = {**others, **_of(length, "length"), **_of(picture_size, "picture_size"), **kind}
        chosen |= _of(noise_levels, "noise_levels")
        chosen |= {"omega_max": guidance_scale_up_to, "teacher": guidance_rule}
        if "adapter_size" in chosen:
            chosen["hidden"] = chosen.pop("adapter_size")
        if "aspect_ratios" in chosen:
            chosen["aspect_ratios"] = COMMON_RATIOS if chosen["aspect_ratios"] else ()
        begin = None if start == _NEW else start
        return io.NodeOutput(TrainSettings(chosen, negative, prompt_count, begin, other_expert))


def _of(choice: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields that a choice of the input `name` has, without the choice itself."""
    return {key: value for key, value in choice.items() if key != name}
