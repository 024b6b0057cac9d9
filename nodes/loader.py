"""AGD Adapter Loader: MODEL in, MODEL with guidance embedded out."""

from comfy_api.v0_0_2 import io

from ..agd_core.comfyui import folders
from ..agd_core import checkpoint
from ..agd_core.comfyui.embedded import apply_adapter


class AGDAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDAdapterLoader",
            display_name="AGD Adapter Loader",
            category="model/patch",
            description=(
                "Samples with guidance at one model evaluation per step instead of two. Put it between the checkpoint "
                "(and LoRAs) and the sampler; leave cfg and prompts as they are."
            ),
            search_aliases=["agd", "guidance distillation", "faster cfg", "single pass cfg", "adapter guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. The adapter must be made for its family."),
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapters(),
                    tooltip="An adapter file from models/agd. AGD Train makes one from your own checkpoint.",
                ),
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
                        "The guidance scale (omega). 0 takes the sampler's own cfg. Set it where the sampler has no "
                        "cfg, as with BasicGuider."
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
            ],
            outputs=[io.Model.Output(tooltip="The model, sampling with guidance at one evaluation per step.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name, **kwargs):
        # A file that changed on disk is loaded again.
        stat = folders.adapter_path(adapter_name).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, model, adapter_name, strength, guidance_scale, start_percent, end_percent) -> io.NodeOutput:
        path = folders.adapter_path(adapter_name)
        patched = apply_adapter(
            model,
            *checkpoint.load_state(path),
            source=str(path),
            guidance_scale=guidance_scale or None,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
        )
        return io.NodeOutput(patched)
