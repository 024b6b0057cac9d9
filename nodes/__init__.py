"""ComfyUI nodes: schema in, one call, result out."""

from comfy_api.v0_0_2 import ComfyExtension, io

from ..agd_core.comfyui import folders
from .apply import AGDApplyAdapter
from .evaluate import AGDEvaluate
from .loader import AGDAdapterLoader
from .train import AGDTrain
from .train_settings import AGDTrainSettings


class AGDExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AGDAdapterLoader, AGDApplyAdapter, AGDEvaluate, AGDTrain, AGDTrainSettings]
