"""AGD Train: MODEL, CLIP and prompts in, an adapter file and its loss plot out."""

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.v0_0_2 import io

from ..agd_core import checkpoint
from ..agd_core.comfyui import folders
from ..agd_core.comfyui.host import ComfyHost
from ..training.config import PRECISIONS, TrainConfig
from ..training.plot import loss_plot
from ..training.trainer import Callbacks, Progress, train
from .common import AdapterType, AdapterValue, show_on_node, use_adapter

_DEFAULTS = TrainConfig()


def _callbacks(node_id: str) -> Callbacks:
    """Shows progress on the node and in ComfyUI's own bar, and lets an interrupt through at every step."""
    bar: comfy.utils.ProgressBar | None = None

    def on_progress(progress: Progress) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        text = f"Rolling out the first trajectories: {progress.step}/{progress.total}"
        if progress.phase == "train":
            bar = bar or comfy.utils.ProgressBar(progress.total, node_id=node_id)
            bar.update_absolute(progress.step, progress.total)
            text = f"Iteration {progress.step}/{progress.total}, loss {progress.loss:.4f}"
        show_on_node(node_id, text)

    return Callbacks(on_progress)


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
                io.Model.Input("model", tooltip="The base whose guidance is distilled. It stays as it is."),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line, of the kind you will sample with; many and varied ones are best.",
                ),
                io.String.Input(
                    "adapter_name",
                    default="my_adapter",
                    tooltip="The file's name in models/agd. An older file of that name is replaced at the very end.",
                ),
                io.Int.Input(
                    "iterations",
                    default=_DEFAULTS.iterations,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps. More close more of the gap to true guidance.",
                ),
                io.Int.Input("batch", default=_DEFAULTS.batch, min=1, max=256, tooltip="States per optimiser step."),
                io.Int.Input(
                    "width", default=_DEFAULTS.width, min=16, max=8192, step=8, tooltip="Width of the pictures."
                ),
                io.Int.Input(
                    "height", default=_DEFAULTS.height, min=16, max=8192, step=8, tooltip="Height of the pictures."
                ),
                io.Float.Input(
                    "omega_max",
                    default=_DEFAULTS.omega_max,
                    min=1.1,
                    max=100.0,
                    step=0.5,
                    tooltip="The largest guidance scale (cfg) that you will use. Training covers 1 to this.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=_DEFAULTS.learning_rate,
                    min=1e-6,
                    max=1.0,
                    step=1e-6,
                    tooltip="Peak of AdamW's learning rate, after a warm-up and before a cosine decay to 0.",
                ),
                io.Int.Input(
                    "hidden",
                    default=_DEFAULTS.hidden,
                    min=8,
                    max=512,
                    step=8,
                    tooltip="Width of the adapter: 128 is about 2 % of SDXL.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of everything random in the training.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    advanced=True,
                    tooltip="The negative prompt of the guidance that is distilled. Empty suits most uses.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=_DEFAULTS.precision,
                    advanced=True,
                    tooltip="'base' computes in the model's own precision, 'bf16' under bf16 autocast.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the new adapter, as AGD Adapter Loader would give it."),
                io.String.Output("adapter_name", tooltip="The name of the file in models/agd."),
                io.Image.Output("loss_plot", tooltip="Loss by iteration: the share of the guidance gap still open."),
                AdapterType.Output("adapter", tooltip="The adapter itself, for AGD Apply Adapter."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, clip, prompts, adapter_name, iterations, batch, width, height, omega_max, learning_rate, hidden,
        seed, negative, precision,
    ) -> io.NodeOutput:  # fmt: skip
        config = TrainConfig(
            iterations=iterations,
            batch=batch,
            width=width,
            height=height,
            omega_max=omega_max,
            learning_rate=learning_rate,
            hidden=hidden,
            seed=seed,
            precision=precision,
        )
        node_id, path = cls.hidden.unique_id, folders.new_adapter_path(adapter_name)
        host = ComfyHost(model, clip, autocast=config.autocast)
        trained = train(
            host,
            prompts.splitlines(),
            config,
            _callbacks(node_id),
            negative=[negative],
            state=path.with_suffix(".state"),
        )
        checkpoint.save(path, trained.adapter, trained.info)
        adapter = AdapterValue(trained.info, trained.adapter.state_dict(), f"of AGD Train, {path.name}")
        patched = use_adapter(model, adapter, node_id, guidance_scale=0)
        plot = torch.from_numpy(np.asarray(loss_plot(trained.losses), dtype=np.float32) / 255)[None]
        return io.NodeOutput(patched, path.name, plot, adapter)
