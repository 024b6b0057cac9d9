"""The toy model as a node pack of its own, for the demo and the tests: one loader node, MODEL, CLIP and VAE."""


async def comfy_entrypoint():
    from .nodes import ToyExtension

    return ToyExtension()
