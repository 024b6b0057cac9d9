"""What the nodes share: the inputs of an adapter in use, the adapter as a value, messages on the node."""

import html
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from comfy_api.v0_0_2 import io
from server import PromptServer

from ..agd_core.adapter_file import AdapterInfo
from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.attention_guidance import attention_guidance
from ..agd_core.comfyui import folders
from ..agd_core.comfyui.backbones import describe_base, is_trained_on
from ..agd_core.comfyui.sampling.apply import apply_adapter
from ..agd_core.comfyui.sampling.settings import GuidanceSettings
from ..agd_core.text import logger, one_line, printable
from ..training.authors import read_adapter
from ..training.options import Settings

log = logger(__name__)

AdapterType = io.Custom("AGD_ADAPTER")
AdapterName = io.Custom("STRING,COMBO")  # a text that may be linked to a list of names, as the loader's


class AdapterValue(NamedTuple):
    """An adapter on its way between nodes. `source` is its name in messages."""

    info: AdapterInfo
    weights: dict[str, torch.Tensor]
    source: str


def adapter_names() -> list[str]:
    """The adapters that can be named: the files, and what needs none."""
    return [ATTENTION_GUIDANCE, *folders.adapters()]


def why_no_adapter(name: str) -> str | None:
    """Why there is no adapter of that name, in one sentence, or None if there is one."""
    return None if name == ATTENTION_GUIDANCE else folders.why_missing(name)


def adapter_fingerprint(name: str | None) -> str:
    """Another one when the file has changed on disk, so that it is loaded again. None: the name is linked."""
    if name is None:  # it may be any of them
        return ", ".join(map(adapter_fingerprint, folders.adapters()))
    if name == ATTENTION_GUIDANCE or folders.why_missing(name):
        return name
    stat = folders.adapter_path(name).stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def named_adapter(name: str, model) -> AdapterValue:
    """For this MODEL. Raises `FileNotFoundError`, or `AdapterFileError` where the file is no adapter's."""
    if name == ATTENTION_GUIDANCE:
        base = describe_base(model.model, model.get_model_object("model_sampling"))
        return AdapterValue(*attention_guidance(base), source=name)
    return AdapterValue(*read_adapter(folders.adapter_path(name)), source=name)


def number_input(
    settings: type[Settings], name: str, tooltip: str, *, step: float = 1, called: str = "", **options
) -> io.Input:
    """A number among `settings`, with its default and limits. `called`: the input's name, if it isn't the setting's."""
    f = next(f for f in fields(settings) if f.name == name)
    low, high = f.metadata["limits"]
    shown = {"default": f.default, "min": low, "max": high, "step": step, **options}
    return (io.Int if f.type is int else io.Float).Input(called or name, tooltip=tooltip, **shown)


def use_inputs() -> list[io.Input]:
    """How an adapter is used: the inputs of every node that applies one, by `apply_adapter`'s names."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="Multiplies what the adapter adds. 0 is the model without this node, cfg and all.",
        ),
        io.Float.Input(
            "guidance_scale",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            advanced=True,
            tooltip=(
                "The guidance scale. 0 takes the sampler's own cfg. Set it where the sampler has no cfg, as with "
                "BasicGuider."
            ),
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in sampling the adapter begins. Before it the model runs as without this node.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in sampling the adapter ends. After it the model runs as without this node.",
        ),
        io.Boolean.Input(
            "forecast",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Faster still: steps that follow from those before them are forecast. 20 steps take about 9 to 14 "
                "model evaluations, for nearly the same picture. Where they would be wrong, all steps are evaluated. "
                "'training-free' forecasts with or without it."
            ),
        ),
    ]


def show_on_node(node_id: str, text: str) -> None:
    """The browser takes such a text for HTML; it may hold names and texts of files, which are to be read only.

    Lines end in two spaces: one of the editor's renderers takes the text for Markdown, where others run together.
    """
    text = html.escape(printable(text), quote=False).replace("\n", "  \n")
    if PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def notices(node_id: str) -> Callable[[str], None]:
    """For `apply_adapter`'s `notify`: what the user should know goes to the log and, all of it, onto the node.

    The last comes first, for it is about the sampling that runs, and ComfyUI's classic canvas shows the beginning only.
    """
    said: list[str] = []

    def notify(message: str) -> None:
        log.warning("AGD: %s", message)
        said.insert(0, one_line(message[0].upper() + message[1:]))
        show_on_node(node_id, "\n\n".join(said))

    return notify


def use_adapter(model, adapter: AdapterValue, node_id: str, *, guidance_scale: float, **settings):
    """The patched clone of `model` for a node with `use_inputs`."""
    notify = notices(node_id)
    patched = apply_adapter(
        model,
        adapter.info,
        adapter.weights,
        GuidanceSettings(guidance_scale or None, **settings),
        source=adapter.source,
        notify=notify,
    )
    if not is_trained_on(adapter.info.base, model):
        notify(
            "trained on other weights: see how it fits with AGD Evaluate. This model is another checkpoint than the "
            "adapter's own, of the same family, or the same in another precision."
        )
    return patched
