"""AGD for ComfyUI: guidance without the second pass. This file is ComfyUI's entry point and nothing else."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import AGDExtension

    return AGDExtension()
