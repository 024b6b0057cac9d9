"""AGD Adapter Loader: MODEL in, MODEL with guidance embedded out."""

from comfy_api.v0_0_2 import io

from ..agd_core import adapter_file
from ..agd_core.comfyui.sampling.settings import GuidanceSettings
from ..agd_core.comfyui.sampling.training_free import DESCRIPTION, apply_training_free
from ..agd_core.comfyui.sampling.training_free import NAME as TRAINING_FREE
from .common import adapter_fingerprint, adapter_names, named_adapter, notices, use_adapter, use_inputs, why_no_adapter


class AGDAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDAdapterLoader",
            display_name="AGD Adapter Loader",
            category="model/patch",
            description=(
                "Makes sampling faster: an adapter takes one model evaluation per step instead of two, and "
                "'training-free', which needs no file, leaves out steps. Put it between the checkpoint (and LoRAs) and "
                "the sampler; leave cfg and prompts as they are."
            ),
            search_aliases=[
                *("agd", "guidance distillation", "distilled cfg", "one pass", "single pass cfg", "skip cfg", "no cfg"),
                *("skip negative prompt", "speed up", "faster", "faster cfg", "2x", "turbo"),
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. An adapter must be made for its family."),
                io.Combo.Input(
                    "adapter_name",
                    options=[TRAINING_FREE, *adapter_names()],
                    tooltip=(
                        "An adapter file from models/agd: one model evaluation per step; AGD Train makes one from your "
                        "own checkpoint. 'training-free' needs no file and works on any model: 1 to 1.4 evaluations "
                        "per step at 20 steps, two with few steps or samplers that add noise. On two small test models "
                        "it was nearer to CFG's pictures than CFG with as many evaluations. 'attention-guidance' needs "
                        "no file either, on UNets, but gives only a part of the guidance; above cfg 2 it may be "
                        "further from CFG than no guidance."
                    ),
                ),
                *use_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, sampling with guidance in fewer model evaluations."),
                io.String.Output("info", tooltip="What the file says of itself: its base, its training, its range."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapter_name=None):
        return adapter_name in (None, TRAINING_FREE) or why_no_adapter(adapter_name) or True

    @classmethod
    def fingerprint_inputs(cls, adapter_name, **kwargs):
        return adapter_fingerprint(adapter_name)

    @classmethod
    def execute(cls, model, adapter_name, guidance_scale, **use) -> io.NodeOutput:
        if adapter_name == TRAINING_FREE:
            settings = GuidanceSettings(guidance_scale or None, **use)
            patched = apply_training_free(model, settings, notify=notices(cls.hidden.unique_id))
            return io.NodeOutput(patched, DESCRIPTION)
        adapter = named_adapter(adapter_name, model)
        patched = use_adapter(model, adapter, cls.hidden.unique_id, guidance_scale=guidance_scale, **use)
        return io.NodeOutput(patched, adapter_file.describe(adapter.info, adapter.source))
