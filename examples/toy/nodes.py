"""The toys' one node."""

from comfy_api.v0_0_2 import ComfyExtension, io

from . import model as toy
from .bases import BASES


class AGDToyLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDToyLoader",
            display_name="AGD Toy Loader",
            category="model/loaders",
            description="A small text-to-image model of coloured shapes, 64x64, for trying and testing AGD.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(BASES),
                    default="toy",
                    optional=True,  # workflows of before there were two have none
                    tooltip="toy: a UNet with eps-prediction, like SDXL. toy-dit: a flow transformer, like SD3.5.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The toy's diffusion model."),
                io.Clip.Output(tooltip="The toy's text encoder; it knows few words and names them in its error."),
                io.Vae.Output(tooltip="The toy's autoencoder."),
            ],
        )

    @classmethod
    def execute(cls, model: str = "toy") -> io.NodeOutput:
        return io.NodeOutput(BASES[model].load(), toy.load_clip(), toy.load_vae())


class ToyExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AGDToyLoader]
