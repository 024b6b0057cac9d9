"""Parts of a network in whose place another node has put compiled ones, by object patches of the MODEL.

Hooks inside come and go unseen there, and their weights have other names, so that no LoRA finds them.
"""

from typing import Any

from comfy.model_patcher import ModelPatcher


def with_original_parts(model: ModelPatcher) -> ModelPatcher:
    """A MODEL with the originals, or `model` itself where nothing is compiled like this."""
    compiled = {name: part for name, part in model.object_patches.items() if _is_compiled(part)}
    if not compiled:
        return model
    original = model.clone()
    for name, part in compiled.items():
        original.object_patches[name] = part._orig_mod
    original.unpatch_model(unpatch_weights=False)  # the last sampling has left the compiled ones in place
    return original


def _is_compiled(part: Any) -> bool:
    return "_orig_mod" in getattr(part, "_modules", ())
