"""AGD for ComfyUI: guidance without the second pass. This file is ComfyUI's entry point and nothing else."""

import sys

if "comfy" in sys.modules:
    # At import, because a ComfyUI that is too old may not know the entry point below.
    from .agd_core.comfyui.runtime import require_comfyui

    require_comfyui()

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import AGDExtension

    return AGDExtension()
