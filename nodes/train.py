"""AGD Train: MODEL, CLIP and prompts in, an adapter file and an account of the training out."""

import functools
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from ..agd_core.adapter_name import AdapterNameError
from ..agd_core.comfyui import folders
from ..agd_core.comfyui.model.comfy_model import ComfyModel
from ..agd_core.text import logger
from ..training import prompts as prompt_sources
from ..training.arguments import PromptSettings
from ..training.config import KINDS, PRECISIONS, RULES, TrainConfig
from ..training.job import Job
from ..training.options import SettingsError
from ..training.presets import CARDS, COMMON_RATIOS, check_chosen, defaults_of, settings_for
from ..training.run_folder import longest_files_of
from ..training.trainer import Callbacks
from .common import AdapterName, AdapterType, AdapterValue, number_input, show_on_node, use_adapter
from .progress import NodeProgress

log = logger(__name__)

_DEFAULTS = TrainConfig()
_ALL = "all that is free"
_NEW = "a new adapter"
_AUTO = "auto"
_OPTIONS = {f.name: f for f in fields(TrainConfig)}
_BY_MODEL = ("iterations", "batch", "width", "height", "learning_rate", "hidden", "reuse", "rank")
# The numbers that, in workflows of before they had the word, stood for 'auto' beside 0.
_ONCE_AUTO = {"hidden": 128, "rank": 4}


_number = functools.partial(number_input, TrainConfig, advanced=True)


def _number_or_auto(name: str, tooltip: str, *, advanced: bool = True) -> io.Input:
    """A setting of TrainConfig whose default goes by the model, as a text that says so; numbers may be linked."""
    tooltip = f"{tooltip} A number, or 'auto': what suits the model ({defaults_of(name)})."
    return io.MultiType.Input(
        io.String.Input(name, default=_AUTO, tooltip=tooltip, advanced=advanced), [io.Int, io.Float]
    )


def _given(name: str, value: str | float) -> float | None:
    """What such an input says, or None for 'auto'. Raises `SettingsError`.

    0 is 'auto' where it is no value of the setting; and a number that is no text may be what once stood for it.
    """
    if _ONCE_AUTO.get(name) == value:
        return None
    number, (least, _) = _number_of(name, value), _OPTIONS[name].metadata["limits"]
    return None if number == 0 and least > 0 else number


def _number_of(name: str, value: str | float) -> float | None:
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("", _AUTO):
        return None
    try:
        return int(value) if _OPTIONS[name].type is int else float(value)
    except ValueError:
        raise SettingsError(f"{name} is {value!r:.60}, but must be a number or '{_AUTO}'.") from None


def _chosen(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those that are left to what suits the model. Raises `SettingsError`."""
    chosen = {name: _given(name, value) if name in _BY_MODEL else value for name, value in settings.items()}
    return {name: value for name, value in chosen.items() if value not in (None, _AUTO)}


class AGDTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDTrain",
            display_name="AGD Train",
            category="model/training",
            description=(
                "Distils the guidance of your own model into an adapter, from prompts alone; no images are needed. "
                "The adapter is saved in models/agd, where AGD Adapter Loader finds it. An interrupted training goes "
                "on from where it stopped when it is queued again with the same settings."
            ),
            search_aliases=["agd", "guidance distillation", "distill cfg", "train adapter"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base whose guidance is distilled, with its LoRAs. It stays as it is."
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "One prompt per line, of the kind you will sample with; many and varied ones are best. "
                        "{red|blue} and __animal__ are wildcards. Empty: the built-in generator's prompts."
                    ),
                ),
                io.String.Input(
                    "adapter_name",
                    default="my_adapter",
                    tooltip=(
                        "The file's name in models/agd, such as my_adapter or sdxl/my_adapter. An older file of that "
                        "name is replaced at the very end."
                    ),
                ),
                io.Combo.Input(
                    "card",
                    options=[_ALL, *CARDS],
                    default=_ALL,
                    tooltip=(
                        "Memory that training may use. Less makes it slower, not worse: the batch is evaluated in "
                        "smaller parts, activations are computed twice, part of the model stays in system memory."
                    ),
                ),
                _number_or_auto(
                    "iterations", "Optimiser steps. More close more of the gap to true guidance.", advanced=False
                ),
                _number(
                    "seed", "Seed of everything random in the training.", control_after_generate=False, advanced=False
                ),
                _number_or_auto("batch", "States per optimiser step."),
                _number_or_auto("width", "Width of the pictures in pixels."),
                _number_or_auto("height", "Height of the pictures in pixels."),
                io.Boolean.Input(
                    "aspect_ratios",
                    default=True,
                    advanced=True,
                    tooltip="Also train the common aspect ratios, with the area of width x height.",
                ),
                _number(
                    "omega_max",
                    "The largest guidance scale (cfg) that you will use. Training covers 1 to this.",
                    min=1.1,
                    step=0.5,
                ),
                _number_or_auto(
                    "learning_rate", "Peak of AdamW's learning rate, after a warm-up and before a cosine decay to 0."
                ),
                _number_or_auto(
                    "hidden", "Width of the adapter, but for kinds low_rank and scale: 128 is about 2 % of SDXL."
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip=(
                        "Negative prompts to train with, one per line, beside the empty one. Empty: parts of the "
                        "prompts and what people usually don't want."
                    ),
                ),
                number_input(
                    PromptSettings,
                    "prompt_count",
                    "How many prompts the generator or the wildcards make.",
                    advanced=True,
                ),
                _number_or_auto(
                    "reuse",
                    "Optimiser steps per evaluation of the model: states come again, each time with another cfg.",
                ),
                _number(
                    "on_policy",
                    "Share of trajectories that follow the adapter instead of CFG, after a quarter of the run.",
                    step=0.05,
                ),
                _number(
                    "evaluate_every",
                    "Iterations between two measurements on prompts that are not trained with; the best adapter is "
                    "kept. 0: at the end.",
                ),
                _number(
                    "patience",
                    "Measurements without a better adapter before training stops early. 0: never.",
                ),
                _number(
                    "preview_every",
                    "Iterations between two pictures of one prompt by CFG and by the adapter. 0: none.",
                ),
                _number(
                    "save_every",
                    "Iterations between two saved states, from which a killed training goes on. 0: on interrupt only.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=_DEFAULTS.precision,
                    advanced=True,
                    tooltip="'base' computes in the model's own precision, 'bf16' under bf16 autocast.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[_AUTO, *KINDS],
                    default=_AUTO,
                    tooltip=(
                        "The adapter. 'auto' is what suits the model's family. 'delta' uses the negative prompt; "
                        "'scale' is tiny, trained in a tenth of the time; 'low_rank' is a LoRA scaled by cfg that "
                        "ignores the negative prompt, as the others do: 'paper_attention' and 'paper_additive' are the "
                        "paper authors' own, the rest ours after them."
                    ),
                ),
                io.Combo.Input(
                    "teacher",
                    options=list(RULES),
                    default=_DEFAULTS.teacher,
                    advanced=True,
                    tooltip="What is distilled: plain CFG, or another guidance rule; docs/training.md explains them.",
                ),
                io.Combo.Input(
                    "start",
                    options=[_NEW, *folders.adapters()],
                    default=_NEW,
                    advanced=True,
                    tooltip="An adapter to begin from: of the same kind and width, or a scale adapter for 'delta'.",
                ),
                _number_or_auto(
                    "rank",
                    "Of kind low_rank, or beside 'delta': of changes of the blocks' linear layers, which bring it "
                    "closer to CFG. Samplers have them in the model's weights, as a LoRA, so that they cost no step "
                    "any time. 0 leaves out those beside 'delta'.",
                ),
                io.Model.Input(
                    "other_expert",
                    optional=True,
                    tooltip=(
                        "Of a model of two experts (Wan 2.2 14B) the one that isn't trained here. Set sigma_from or "
                        "sigma_to as well: trajectories go through both, and those noise levels are learnt."
                    ),
                ),
                _number(
                    "sigma_from",
                    "Learn at this noise level and above only: 0.875 for Wan 2.2's high-noise expert (0.9 of image to "
                    "video).",
                    step=0.005,
                    optional=True,  # workflows of before there were experts have none
                ),
                _number(
                    "sigma_to",
                    "Learn below this noise level only: 0.875 for Wan 2.2's low-noise expert. 0: at any.",
                    step=0.005,
                    optional=True,
                ),
                _number(
                    "frames",
                    "Of a video model: learn on so many frames of its latent, which takes memory for all of them. "
                    "1: on a picture.",
                    optional=True,
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the previews; without it they are approximate."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the new adapter, as AGD Adapter Loader would give it."),
                AdapterName.Output("adapter_name", tooltip="The file's name, as AGD Adapter Loader takes it."),
                io.Image.Output("plot", tooltip="By iteration: the loss (share of the gap still open), gap closed."),
                AdapterType.Output("adapter", tooltip="The adapter itself, for AGD Apply Adapter."),
                io.String.Output("report", tooltip="What was trained, how long, how much of the gap is closed."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapter_name=None):
        # Settings are checked when the node runs: ComfyUI would repeat a refusal for each input that is named here.
        try:
            if adapter_name is not None:  # otherwise it is linked
                folders.new_adapter_path(adapter_name, longest_files_of)
        except AdapterNameError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompts,
        adapter_name,
        card,
        aspect_ratios,
        negative,
        prompt_count,
        start,
        other_expert=None,
        vae=None,
        **settings,
    ) -> io.NodeOutput:
        node_id, path = cls.hidden.unique_id, folders.new_adapter_path(adapter_name, longest_files_of)
        chosen = _chosen(settings) | {"memory": CARDS.get(card, 0.0)}
        early = check_chosen(chosen)
        other = None if other_expert is None else (other_expert, early.learns_at)
        how: dict[str, Any] = {"autocast": early.autocast, "frames": early.frames}
        trainable = ComfyModel(model, clip, **how, vae=vae, other_expert=other)
        chosen |= {"aspect_ratios": COMMON_RATIOS} if aspect_ratios and "width" in chosen else {}
        chosen |= {} if aspect_ratios else {"aspect_ratios": ()}
        config = settings_for(trainable.base, chosen)
        begin = folders.adapter_path(start) if start != _NEW else None
        count = PromptSettings(prompt_count).prompt_count
        texts = _prompts(prompts, count, early.seed)
        negatives = prompt_sources.prompts_of(negative, "negative")
        unwanted = prompt_sources.expand_negatives(negatives, count, early.seed)
        job = Job(trainable, texts, config, path, unwanted, start=begin)
        display = NodeProgress(node_id)
        callbacks = Callbacks(on_progress=display, on_preview=display.show_preview)
        plan = job.plan(callbacks.of_phase("plan"))
        display.below = plan.describe()
        trained = job.run(callbacks, plan, {})
        report = job.report(trained)
        show_on_node(node_id, report)
        log.info("AGD: %s", report.partition("\n")[0])
        adapter = AdapterValue(trained.info, trained.adapter.state_dict(), f"of AGD Train, {folders.name_of(path)}")
        patched = use_adapter(model, adapter, node_id, guidance_scale=0)
        plot = torch.from_numpy(np.asarray(trained.plot(), dtype=np.float32) / 255)[None]
        return io.NodeOutput(patched, folders.name_of(path), plot, adapter, report)


def _prompts(text: str, count: int, seed: int) -> list[str]:
    lines = prompt_sources.prompts_of(text, "prompts")
    return prompt_sources.expand(lines, count, seed) if lines else prompt_sources.generate(count, seed)
