"""The toy's one node."""

from comfy_api.v0_0_2 import ComfyExtension, io

from . import model as toy


class AGDToyLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDToyLoader",
            display_name="AGD Toy Loader",
            category="model/loaders",
            description="A small text-to-image model of coloured shapes, 64x64, for trying and testing AGD.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The toy's diffusion model."),
                io.Clip.Output(tooltip="The toy's text encoder; it knows few words and names them in its error."),
                io.Vae.Output(tooltip="The toy's autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(toy.load_unet(), toy.load_clip(), toy.load_vae())


class ToyExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AGDToyLoader]
