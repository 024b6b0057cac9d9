"""AGD Train: MODEL, CLIP and prompts in, an adapter file and an account of the training out."""

import time
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.v0_0_2 import io
from PIL import Image

from ..agd_core.comfyui import folders
from ..agd_core.comfyui.model.comfy_model import ComfyModel
from ..training import prompts as prompt_sources
from ..training.config import KINDS, PRECISIONS, RULES, TrainConfig
from ..training.job import Job
from ..training.plan import Plan
from ..training.presets import CARDS, COMMON_RATIOS, settings_for
from ..training.trainer import Callbacks, Progress
from .common import AdapterName, AdapterType, AdapterValue, show_on_node, use_adapter

_DEFAULTS = TrainConfig()
_ALL = "all that is free"
_NEW = "a new adapter"
_AUTO = "auto"
_SUITED = " 0 takes what suits the model's family."


class _Display:
    """Shows a run on the node and in ComfyUI's own bar, and lets an interrupt through at every step."""

    def __init__(self, node_id: str, plan: Plan):
        self.node_id, self.plan = node_id, plan
        self.bar: comfy.utils.ProgressBar | None = None
        self.preview: Image.Image | None = None
        self.shown = 0.0

    def callbacks(self) -> Callbacks:
        return Callbacks(on_progress=self.progress, on_preview=self.show_preview)

    def progress(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if progress.phase == "train":
            self.bar = self.bar or comfy.utils.ProgressBar(progress.total, node_id=self.node_id)
            self._update(self.bar, progress.step, progress.total)
        now = time.monotonic()
        # A hundred messages a second would slow the browser down.
        if now - self.shown > 0.2 or progress.step == progress.total:
            self.shown = now
            show_on_node(self.node_id, f"{_describe(progress)}\n\n{self.plan.describe()}")

    def show_preview(self, step: int, image: Image.Image) -> None:
        self.preview = image
        if self.bar is not None:
            self._update(self.bar, step, self.bar.total)

    def _update(self, bar: comfy.utils.ProgressBar, step: int, total: int) -> None:
        # Without its picture a message would take an earlier one off the node.
        shown = ("PNG", self.preview, None) if self.preview is not None else None
        bar.update_absolute(step, total, shown)


_PHASES = {
    "encode": "Encoding prompts",
    "rollout": "Rolling out the first trajectories",
    "measure": "Measuring on held-out prompts",
}


def _describe(progress: Progress) -> str:
    """What matters most comes first: ComfyUI's classic canvas shows about 60 characters."""
    parts = [f"{progress.step}/{progress.total}"]
    if progress.phase in _PHASES:
        return f"{_PHASES[progress.phase]}: {parts[0]}"
    if progress.seconds_left is not None:
        minutes = progress.seconds_left / 60
        parts.append(f"{minutes:.0f} min left" if minutes > 1.5 else f"{progress.seconds_left:.0f} s left")
    if progress.gap_closed is not None:
        parts.append(f"gap closed {progress.gap_closed:.0%}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.memory is not None:
        parts.append(f"memory {progress.memory / 1e9:.1f} GB")
    return ", ".join(parts)


def _number(kind, name: str, high, tooltip: str, *, suited: bool = True, **options):
    """A setting of TrainConfig; where it is `suited`, 0 stands for what suits the model's family."""
    default = 0 if suited else getattr(_DEFAULTS, name)
    tooltip += _SUITED if suited else ""
    chosen = {"min": 0, "step": 1, "advanced": True, **options}
    return kind.Input(name, default=default, max=high, tooltip=tooltip, **chosen)


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
                _number(
                    io.Int,
                    "iterations",
                    1_000_000,
                    "Optimiser steps. More close more of the gap to true guidance.",
                    advanced=False,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of everything random in the training.",
                ),
                _number(io.Int, "batch", 256, "States per optimiser step."),
                _number(io.Int, "width", 8192, "Width of the pictures.", step=8),
                _number(io.Int, "height", 8192, "Height of the pictures.", step=8),
                io.Boolean.Input(
                    "aspect_ratios",
                    default=True,
                    advanced=True,
                    tooltip="Also train the common aspect ratios, with the area of width x height.",
                ),
                io.Float.Input(
                    "omega_max",
                    default=_DEFAULTS.omega_max,
                    min=1.1,
                    max=100.0,
                    step=0.5,
                    advanced=True,
                    tooltip="The largest guidance scale (cfg) that you will use. Training covers 1 to this.",
                ),
                _number(
                    io.Float,
                    "learning_rate",
                    1.0,
                    "Peak of AdamW's learning rate, after a warm-up and before a cosine decay to 0.",
                    step=1e-6,
                ),
                io.Int.Input(
                    "hidden",
                    default=_DEFAULTS.hidden,
                    min=8,
                    max=512,
                    step=8,
                    advanced=True,
                    tooltip="Width of the adapter: 128 is about 2 % of SDXL.",
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
                io.Int.Input(
                    "prompt_count",
                    default=2000,
                    min=1,
                    max=100_000,
                    advanced=True,
                    tooltip="How many prompts the generator or the wildcards make.",
                ),
                _number(
                    io.Int,
                    "reuse",
                    64,
                    "Optimiser steps per evaluation of the model: states come again, each time with another cfg.",
                ),
                io.Float.Input(
                    "on_policy",
                    default=_DEFAULTS.on_policy,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of trajectories that follow the adapter instead of CFG, after a quarter of the run.",
                ),
                _number(
                    io.Int,
                    "evaluate_every",
                    1_000_000,
                    "Iterations between two measurements on prompts that are not trained with; the best adapter is "
                    "kept. 0: at the end.",
                    suited=False,
                ),
                _number(
                    io.Int,
                    "patience",
                    1000,
                    "Measurements without a better adapter before training stops early. 0: never.",
                    suited=False,
                ),
                _number(
                    io.Int,
                    "preview_every",
                    1_000_000,
                    "Iterations between two pictures of one prompt by CFG and by the adapter. 0: none.",
                    suited=False,
                ),
                _number(
                    io.Int,
                    "save_every",
                    1_000_000,
                    "Iterations between two saved states, from which a killed training goes on. 0: on interrupt only.",
                    suited=False,
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
                        "The adapter. 'auto' is what suits the model's family, hidden and rank included where they are "
                        "left as they are. 'delta' uses the negative prompt; 'scale' is tiny, trained in a tenth of "
                        "the time; 'low_rank' is a LoRA scaled by cfg that ignores the negative prompt, as the others "
                        "do: 'paper_attention' and 'paper_additive' are the paper authors' own, the rest ours after "
                        "them."
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
                io.Int.Input(
                    "rank",
                    default=_DEFAULTS.rank,
                    min=0,
                    max=512,
                    advanced=True,
                    tooltip=(
                        "Of 'delta': of changes of the blocks' linear layers beside it, which bring it closer to CFG. "
                        "Samplers have them in the model's weights, as a LoRA, so that they cost no step any time."
                    ),
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
                    io.Float,
                    "sigma_from",
                    1000.0,
                    "Learn at this noise level and above only: 0.875 for Wan 2.2's high-noise expert (0.9 of image to "
                    "video).",
                    suited=False,
                    step=0.005,
                    optional=True,  # workflows of before there were experts have none
                ),
                _number(
                    io.Float,
                    "sigma_to",
                    1000.0,
                    "Learn below this noise level only: 0.875 for Wan 2.2's low-noise expert. 0: at any.",
                    suited=False,
                    step=0.005,
                    optional=True,
                ),
                _number(
                    io.Int,
                    "frames",
                    257,
                    "Of a video model: learn on so many frames of its latent, which takes memory for all of them. "
                    "1: on a picture.",
                    suited=False,
                    min=1,
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
        return adapter_name is None or folders.why_not_writable(adapter_name) or True

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompts,
        adapter_name,
        card,
        seed,
        aspect_ratios,
        negative,
        prompt_count,
        start,
        other_expert=None,
        vae=None,
        **settings,
    ) -> io.NodeOutput:
        node_id, path = cls.hidden.unique_id, folders.new_adapter_path(adapter_name)
        suited = ("iterations", "batch", "width", "height", "learning_rate", "reuse")
        chosen = {key: value for key, value in settings.items() if value or key not in suited}
        usual = {"kind": _AUTO, "hidden": _DEFAULTS.hidden, "rank": _DEFAULTS.rank}
        chosen = {key: value for key, value in chosen.items() if key not in usual or usual[key] != value}
        chosen |= {"seed": seed, "memory": CARDS.get(card, 0.0)}
        early = TrainConfig(**chosen)
        other = None if other_expert is None else (other_expert, early.learns_at)
        how: dict[str, Any] = {"autocast": early.autocast, "frames": early.frames}
        trainable = ComfyModel(model, clip, **how, vae=vae, other_expert=other)
        chosen |= {"aspect_ratios": COMMON_RATIOS} if aspect_ratios and "width" in chosen else {}
        chosen |= {} if aspect_ratios else {"aspect_ratios": ()}
        config = settings_for(trainable.base, chosen)
        begin = folders.adapter_path(start) if start != _NEW else None
        job = Job(trainable, _prompts(prompts, prompt_count, seed), config, path, _lines(negative), start=begin)
        show_on_node(node_id, "Counting what a step takes")
        plan = job.plan()
        trained = job.run(_Display(node_id, plan).callbacks(), plan, {})
        report = job.report(trained)
        show_on_node(node_id, report)
        adapter = AdapterValue(trained.info, trained.adapter.state_dict(), f"of AGD Train, {folders.name_of(path)}")
        patched = use_adapter(model, adapter, node_id, guidance_scale=0)
        plot = torch.from_numpy(np.asarray(trained.plot(), dtype=np.float32) / 255)[None]
        return io.NodeOutput(patched, folders.name_of(path), plot, adapter, report)


def _lines(text: str) -> list[str]:
    return prompt_sources.prompts_of(text)


def _prompts(text: str, count: int, seed: int) -> list[str]:
    lines = _lines(text)
    return prompt_sources.expand(lines, count, seed) if lines else prompt_sources.generate(count, seed)
