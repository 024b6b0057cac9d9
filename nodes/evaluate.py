"""AGD Evaluate: MODEL, CLIP, an adapter and prompts in, an account of how good the adapter is here out."""

import functools

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from ..agd_core.comfyui.model.comfy_model import ComfyModel
from ..agd_core.comfyui.model.sampler import ComfySampler
from ..training import prompts as prompt_sources
from ..training.assess import AssessConfig, Candidate, PromptTexts, assess, learnt_by
from .common import AdapterType, adapter_fingerprint, adapter_names, named_adapter, number_input, show_on_node
from .progress import NodeProgress

_number = functools.partial(number_input, AssessConfig)


def _size(name: str) -> io.Input:
    tooltip = f"{name.capitalize()} of the pictures. 0 takes the size that the adapter was trained at."
    return _number(name, tooltip, step=8, advanced=True)


class AGDEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDEvaluate",
            display_name="AGD Evaluate",
            category="model/training",
            description=(
                "Measures how much of the guidance an adapter gives on your model with your prompts, and how fast; "
                "shows its pictures beside those of CFG; says whether an adapter of another checkpoint fits this one."
            ),
            search_aliases=["agd", "evaluate adapter", "compare cfg", "transfer score"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to try the adapter on, with its LoRAs, but without the adapter."
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line, as you sample with. Wildcards: see this node's help.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="The negative prompt of the guidance; of several lines each prompt has one in turn.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=1.1,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The guidance scale to compare at.",
                ),
                _number("count", "Pictures by each method; the prompts take turns. More make the figures surer."),
                _number("steps", "Of every sampling, by Euler."),
                _number("seed", "Seed of the first picture; the next one has the next.", control_after_generate=False),
                _size("width"),
                _size("height"),
                io.Combo.Input(
                    "adapter_name",
                    options=adapter_names(),
                    optional=True,
                    tooltip="An adapter file from models/agd, or 'attention-guidance', which needs no file.",
                ),
                AdapterType.Input(
                    "adapter", optional=True, tooltip="Straight from AGD Train, in place of the file of adapter_name."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures; without it they are approximate."),
            ],
            outputs=[
                io.String.Output("report", tooltip="All figures with their standard errors, and what they mean."),
                io.Image.Output(
                    "picture", tooltip="A row per prompt: without guidance, CFG, AGD, and how AGD differs from CFG."
                ),
                io.Float.Output("gap_closed", tooltip="0 is no guidance, 1 exactly that of CFG."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapter_name=None):
        # Whether an adapter is linked, in place of a file, isn't known here: a missing file is an error when it runs.
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name="", **kwargs):
        return adapter_fingerprint(adapter_name)

    @classmethod
    def execute(
        cls, model, clip, prompts, negative, cfg, count, steps, seed, width, height,
        adapter_name="", adapter=None, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        config = AssessConfig((cfg,), steps=steps, count=count, seed=seed, width=width, height=height)
        texts = prompt_sources.expand(prompt_sources.prompts_of(prompts, "prompts"), count, seed)
        unwanted = prompt_sources.draw_each(prompt_sources.prompts_of(negative, "negative"), seed) or [""]
        candidate = Candidate(*(adapter or named_adapter(adapter_name, model)))
        info, weights, source = candidate.info, candidate.weights, candidate.source
        learnt = learnt_by(info)
        levels = learnt.sigma_from, learnt.sigma_to
        sampler = ComfySampler(model, info, weights, source=source, rule=learnt.rule, noise_levels=levels)
        base = ComfyModel(model, clip, frames=learnt.frames, vae=vae)
        display, node_id = NodeProgress(cls.hidden.unique_id), cls.hidden.unique_id
        prompt_texts = PromptTexts(texts, unwanted)
        found = assess(base, sampler, candidate, prompt_texts, config, display)
        show_on_node(node_id, found.report())
        picture = torch.from_numpy(np.asarray(found.picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(found.report(), picture, found.gap_closed)
