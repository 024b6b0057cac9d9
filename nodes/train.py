"""AGD Train: MODEL, CLIP and prompts in, an adapter file and an account of the training out."""

from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from ..agd_core.adapter_name import AdapterNameError
from ..agd_core.comfyui import folders
from ..agd_core.comfyui.model.comfy_model import ComfyModel
from ..agd_core.text import logger
from ..training import prompts as prompt_sources
from ..training.config import TrainConfig
from ..training.job import Job
from ..training.presets import CARDS, QUALITIES, check_chosen, check_for_two_experts, settings_for
from ..training.run_folder import longest_files_of
from ..training.trainer import Callbacks
from .common import AdapterName, AdapterType, AdapterValue, show_on_node, use_adapter
from .progress import NodeProgress
from .train_settings import TrainSettings, TrainSettingsType

log = logger(__name__)

_ALL = "all that is free"
_QUALITY = (
    "How long to train: quick is a third of normal, best three times as long. SDXL takes an RTX 4090 about 13 min, "
    "38 min or 2 h; SD 1.5 takes an RTX 3060 about 8 min, 23 min or 70 min. Before it starts, the node says how long "
    "each takes on this card."
)


class AGDTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDTrain",
            display_name="AGD Train",
            category="model/training",
            description=(
                "Trains an adapter for your own model, from prompts alone; no images are needed. "
                "The adapter is saved in models/agd, where AGD Adapter Loader finds it. An interrupted training goes "
                "on from where it stopped when it is queued again with the same settings."
            ),
            search_aliases=["agd", "train adapter"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train the adapter for, with its LoRAs. It stays as it is."
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "One prompt per line, of the kind you will sample with; many and varied ones are best. "
                        "Wildcards: see this node's help. Empty: the built-in generator's prompts."
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
                        "Memory that training may use. Less makes it slower, not worse: pictures are evaluated in "
                        "smaller parts, and a part of the model stays in system memory."
                    ),
                ),
                io.Combo.Input("quality", options=list(QUALITIES), default="normal", tooltip=_QUALITY),
                TrainSettingsType.Input(
                    "settings", optional=True, tooltip="From AGD Train Settings. Without it: what suits the model."
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
    def execute(cls, model, clip, prompts, adapter_name, card, quality, settings=None, vae=None) -> io.NodeOutput:
        node_id, path = cls.hidden.unique_id, folders.new_adapter_path(adapter_name, longest_files_of)
        settings = settings or TrainSettings()
        trainable, config = _prepared(model, clip, vae, settings, quality, CARDS.get(card, 0.0))
        begin = folders.adapter_path(settings.start) if settings.start else None
        texts = _prompts(prompts, settings.prompt_count, config.seed)
        negatives = prompt_sources.prompts_of(settings.negative, "negative")
        unwanted = prompt_sources.expand_negatives(negatives, settings.prompt_count, config.seed)
        job = Job(trainable, texts, config, path, unwanted, start=begin)
        display = NodeProgress(node_id)
        callbacks = Callbacks(on_progress=display, on_preview=display.show_preview)
        plan = job.plan(callbacks.of_phase("plan"))
        log.info("AGD: %s", plan.describe())
        times = "" if "iterations" in settings.chosen else plan.by_quality(quality)
        display.plan = list(filter(None, [plan.summary(), times]))
        with display.says_where_it_stopped():
            trained = job.run(callbacks, plan, {})
        report = job.report(trained)
        show_on_node(node_id, report)
        log.info("AGD: %s", report.partition("\n")[0])
        adapter = AdapterValue(trained.info, trained.adapter.state_dict(), f"of AGD Train, {folders.name_of(path)}")
        patched = use_adapter(model, adapter, node_id, guidance_scale=0)
        plot = torch.from_numpy(np.asarray(trained.plot(), dtype=np.float32) / 255)[None]
        return io.NodeOutput(patched, folders.name_of(path), plot, adapter, report)


def _prepared(model, clip, vae, settings: TrainSettings, quality: str, memory: float) -> tuple[ComfyModel, TrainConfig]:
    """The base as training sees it, and how it is trained. `memory` is in GB, 0 is all that is free."""
    chosen = settings.chosen | {"memory": memory}
    early = check_chosen(chosen)
    if settings.other_expert is not None:
        check_for_two_experts(early)
    other = None if settings.other_expert is None else (settings.other_expert, early.learns_at)
    how: dict[str, Any] = {"autocast": early.autocast, "frames": early.frames}
    trainable = ComfyModel(model, clip, **how, vae=vae, other_expert=other)
    return trainable, settings_for(trainable.base, chosen, quality)


def _prompts(text: str, count: int, seed: int) -> list[str]:
    lines = prompt_sources.prompts_of(text, "prompts")
    return prompt_sources.expand(lines, count, seed) if lines else prompt_sources.generate(count, seed)
