"""A base at its true size on the meta device: as a plan of training asks for it, and as sampling evaluates it.

Nothing is computed or allocated. Costs are counted on fake tensors by `agd_core/comfyui/model/tracing.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from comfyui_agd.agd_core.config import AdapterConfig

if TYPE_CHECKING:
    from comfyui_agd.agd_core.comfyui.model import tracing

CPU = torch.device("cpu")
# How weights are stored, and what they are cast to for computing.
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
OMEGA = 7.0


class MetaModel:
    """Implements what a plan needs of `training.model.Model`, of a model in `tests.support.architectures`.

    `frames`: of a video's latents; 1 is a picture. Each cost is traced once. `prompt`: all that it is given.
    """

    def __init__(self, name: str, dtype: str = "bf16", frames: int = 1):
        import comfy.model_patcher

        from comfyui_agd.agd_core.comfyui.backbones import describe_base
        from comfyui_agd.agd_core.comfyui.model.denoiser import ComfyDenoiser
        from comfyui_agd.agd_core.comfyui.model.memory import ComfyMemory
        from comfyui_agd.agd_core.comfyui.model.text_encoder import EncodedPrompt
        from comfyui_agd.tests.support.architectures import ARCHITECTURES
        from comfyui_agd.tests.support.checkpoints import on_meta

        self.model = on_meta(name, *DTYPES[dtype])
        self.patcher = comfy.model_patcher.ModelPatcher(self.model, load_device=CPU, offload_device=CPU)
        self.base = describe_base(self.model)
        self._denoiser = ComfyDenoiser(self.patcher, frames=frames)
        self.prompt = EncodedPrompt(ARCHITECTURES[name].prompt.condition(), "positive")
        self.memory = ComfyMemory(self.patcher, self._denoiser)
        for trace in ("trace_base", "trace_student"):
            setattr(self.memory, trace, functools.cache(getattr(self.memory, trace)))
        self.memory.matmul_rate = lambda: 0.0  # it is on no device: what that computes in a second is unknown

    @property
    def denoiser(self) -> "MetaModel":
        return self

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """(c, h, w), of video (c, frames, h, w)."""
        return self._denoiser.latent_shape(width, height)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.diffusion_model.parameters())

    def cost(self, shape: Sequence[int], config: AdapterConfig | None, steps: int) -> "tracing.Traced":
        """Of so many steps of one sampling of a latent of `shape`, with an adapter of this config or without one."""
        from comfyui_agd.agd_core.comfyui.model import tracing

        return tracing.base(self.model, self.steps(shape, config, steps), tuple(shape), 1)

    def steps(self, shape: Sequence[int], config: AdapterConfig | None, steps: int) -> Callable:
        """(x, sigma) -> the last of so many evaluations, for tensors without values."""
        from comfyui_agd.agd_core.comfyui.model.denoiser import options_of

        conds, options = self._denoiser.conditions([self.prompt], (1, *shape)), options_of(self.patcher)
        dtype = self.model.get_dtype_inference()

        def evaluate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            own = options if config is None else _with_adapter(options, config, conds, dtype)
            for _ in range(steps):
                out = self._denoiser.evaluate(x, sigma, conds, own)
            return out

        return evaluate


def _with_adapter(options: dict, config: AdapterConfig, conds: dict, dtype: torch.dtype) -> dict:
    """As a sampler has it: what can be in the base's weights is there, and its own weights are in the dtype that is
    computed in."""
    import comfy.ops

    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.comfyui.guided_step import ActiveAdapter, GuidedStep, with_step
    from comfyui_agd.agd_core.comfyui.prompt import Prompt
    from comfyui_agd.agd_core.comfyui.sampling.negatives import WeightedNegative

    adapter = Adapter(config, comfy.ops.manual_cast)
    adapter.load_state_dict(
        {name: torch.empty_like(weight, dtype=dtype) for name, weight in adapter.state_dict().items()}, assign=True
    )
    negatives = (WeightedNegative(Prompt(conds)),) if adapter.uses_negative else ()
    prompts = {None: Prompt(conds)} if adapter.guides_attention else {}
    active = ActiveAdapter(adapter, torch.full((1,), OMEGA), torch.ones(1), negatives, merged=config.kind.merges)
    return with_step(options, GuidedStep((active,), prompts=prompts))
