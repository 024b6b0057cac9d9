"""Bases with random weights, for what does not depend on their values: time and memory.

At their true sizes, or tiny ones of the same layout, which show in seconds that a command runs to its end.
"""

from dataclasses import dataclass

import torch

# How weights are stored, and what they are cast to for computing.
DTYPES = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
# By the names of `tests.support.architectures`; of transformers the row of `tests.support.tiny_families`.
NAMES = ("SD 1.5", "SDXL", "Qwen-Image", "Wan 2.2 14B")
_TINY_FAMILIES = {"Qwen-Image": "qwen-image", "Wan 2.2 14B": "wan2.1-t2v"}
TINY_PIXELS = 64
_TINY_POOLED = 1280  # as SDXL's own class of its pooled vector takes it for granted


@dataclass(frozen=True)
class RandomBase:
    """`name`: one of `NAMES`. `tiny`: a few channels wide, in fp32 whatever is asked for."""

    name: str
    tiny: bool = False

    def patcher(self, dtype: str, device: torch.device):
        """A MODEL that computes on `device`. Its weights are in system memory, from where ComfyUI loads them as it
        does a file's: what it finds on the device already it would count twice."""
        import comfy.model_patcher

        from comfyui_agd.tests.support.checkpoints import random_model

        cpu = torch.device("cpu")
        model = self._tiny_model() if self.tiny else random_model(self.name, cpu, *DTYPES[dtype])
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=cpu)

    def _tiny_model(self):
        from comfyui_agd.tests.support.runtime import TinyUNet, TinyXL, tiny
        from comfyui_agd.tests.support.tiny_families import tiny_model

        if self.name in _TINY_FAMILIES:
            return tiny_model(_TINY_FAMILIES[self.name]).model
        return tiny(TinyXL() if self.name == "SDXL" else TinyUNet()).model

    def prompt(self, seed: int) -> list:
        """A CONDITIONING, as the base's text encoder makes it in shape. Prompts of another seed are as long."""
        from comfyui_agd.tests.support.architectures import ARCHITECTURES
        from comfyui_agd.tests.support.runtime import random_prompts
        from comfyui_agd.tests.support.tiny_families import conditioning

        if self.tiny:
            if self.name in _TINY_FAMILIES:
                return conditioning(_TINY_FAMILIES[self.name], f"prompt {seed}")
            return random_prompts(pooled=_TINY_POOLED, seed=seed).positive
        condition = ARCHITECTURES[self.name].prompt.condition()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(condition.pop("cross_attn").shape, generator=generator)
        del condition["model_conds"]
        return [[tokens, {key: _drawn(value, generator) for key, value in condition.items()}]]


def _drawn(value, generator: torch.Generator):
    """Random values in a vector's shape; anything else as it is."""
    return torch.randn(value.shape, generator=generator) if isinstance(value, torch.Tensor) else value
