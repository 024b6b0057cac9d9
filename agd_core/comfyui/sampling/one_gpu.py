"""A MODEL that another node has spread over several GPUs, for a sampling that one of them does."""

from comfy.model_patcher import ModelPatcher

_KEY = "multigpu"  # ComfyUI's, of the copies on other GPUs


def on_one_gpu(model: ModelPatcher) -> ModelPatcher:
    """A clone without the copies, or `model` itself where there are none.

    They share out the conditions of a step, of which a guided one has a single one.
    """
    if not model.additional_models.get(_KEY):
        return model
    clone = model.clone()
    clone.remove_additional_models(_KEY)
    return clone
