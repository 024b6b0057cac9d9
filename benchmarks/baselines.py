"""What AGD is compared with: other ways to sample with guidance, and the distillation of a whole model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import nn

from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.fused_attention import FUSED_ATTENTION
from comfyui_agd.agd_core.comfyui.guided_step import KEY as AGD
from comfyui_agd.agd_core.comfyui.model.text_encoder import EncodedPrompt
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.guider import with_cfg
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.agd_core.layers import sinusoidal, zero_init
from comfyui_agd.examples.toy import model as toy
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.distributed import Ranks
from comfyui_agd.training.model import DeviceMemory, EncodedPrompts
from comfyui_agd.training.recording import RecordedBatches
from comfyui_agd.training.run_state import RunState
from comfyui_agd.training.training_step import TrainingStep

_KEY = "agd_baseline"
NAG_TAU, NAG_ALPHA = 2.5, 0.25  # as published


def normalised(
    model: comfy.model_patcher.ModelPatcher, base: BaseInfo, tau: float = NAG_TAU, alpha: float = NAG_ALPHA
) -> comfy.model_patcher.ModelPatcher:
    """Normalised attention guidance (Chen et al. 2025, arXiv 2505.21179) at one evaluation per step, with omega for its
    scale: the guided attention's norm is limited to tau times that without guidance, and alpha of it is mixed in.
    """
    patched = apply_adapter(model, *attention_guidance(base), source="nag")
    (patcher,) = patched.get_additional_models_with_key(AGD)
    patcher.model.guide = NormalisedGuide(tau, alpha)
    return patched


@dataclass(frozen=True)
class NormalisedGuide:
    """In place of `Adapter.guide`."""

    tau: float
    alpha: float

    def __call__(self, name, out: torch.Tensor, delta: torch.Tensor, h, prepared) -> torch.Tensor:
        """out and delta (b, n, w) -> (b, n, w)."""
        guided = out + prepared.gain * delta
        ratio = guided.abs().sum(-1, keepdim=True) / out.abs().sum(-1, keepdim=True)
        guided = guided * (ratio.clamp(max=self.tau) / ratio)
        return torch.lerp(out, guided, self.alpha)


class GuidedTimeEmbedding(nn.Module):
    """A UNet's time embedding plus one of omega, which is zero before training."""

    WIDTH = 64

    def __init__(self, time_embed: nn.Sequential):
        super().__init__()
        out = time_embed[-1].out_features
        self.time_embed = time_embed
        self.first, self.last = (comfy.ops.manual_cast.Linear(width, out) for width in (self.WIDTH, out))
        nn.Linear.reset_parameters(self.first)  # ComfyUI's layers skip it
        zero_init(self.last)
        self.omega: torch.Tensor | None = None  # (1,) or (b,), of the evaluation that comes next

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """A timestep's sines and cosines (b, c) -> (b, 4 c)."""
        embedded = sinusoidal(10 * self.omega.clamp(min=1e-2).log(), self.WIDTH, max_period=100)
        return self.time_embed(t) + self.last(F.silu(self.first(embedded.to(t))))


@dataclass(frozen=True)
class GuidedModel:
    """The student of Meng et al. 2023 (arXiv 2210.03142), stage one: a copy of the base that omega goes into."""

    model: comfy.model_base.BaseModel
    device: torch.device

    @classmethod
    def of_base(cls, device: torch.device) -> "GuidedModel":
        model = toy.build_model()
        model.load_model_weights(comfy.utils.load_torch_file(str(toy.WEIGHTS / "unet.safetensors")))
        model.diffusion_model.time_embed = GuidedTimeEmbedding(model.diffusion_model.time_embed)
        return cls(model.to(device), device)

    @property
    def unet(self) -> nn.Module:
        return self.model.diffusion_model

    def prediction_unit(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma

    def student(
        self,
        adapter: object,
        x: torch.Tensor,
        sigma: torch.Tensor,
        prompts: Sequence[EncodedPrompt],
        negative: Sequence[EncodedPrompt],
        omega: torch.Tensor,
    ) -> torch.Tensor:
        """As a denoiser's `student`, to train and measure it; without an adapter, and without negatives."""
        context = torch.cat([prompt.cond["cross_attn"] for prompt in prompts])
        x, sigma, context, omega = (v.to(self.device) for v in (x, sigma, context, omega))
        self.unet.time_embed.omega = omega
        return self.model.apply_model(x, sigma, c_crossattn=context, transformer_options=dict(FUSED_ATTENTION)).float()

    def patcher(self) -> comfy.model_patcher.ModelPatcher:
        """A MODEL that takes omega from the sampler's cfg, in one pass."""
        patcher = comfy.model_patcher.ModelPatcher(self.model, self.device, self.device)

        def predict_noise(executor, x, timestep, model_options={}, seed=None):
            guider = executor.class_obj
            self.unet.time_embed.omega = torch.full((1,), guider.cfg, device=x.device)
            with with_cfg(guider, 1.0):
                return executor(x, timestep, model_options, seed)

        patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, predict_noise)
        return patcher


def distil_model(
    student: GuidedModel,
    memory: DeviceMemory,
    prompts: EncodedPrompts,
    batches: RecordedBatches,
    config: TrainConfig,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Train all of the student's weights from recorded batches, by the steps that `train` trains an adapter by: the
    student has their moving average in the end.
    """
    state = RunState.begin(student.unet.requires_grad_(True), batches, config.learning_rate)
    step = TrainingStep(student, memory, prompts, config, Ranks(), micro_batch=config.batch)
    while state.step < config.iterations:
        step(state, config.iterations)
        progress(state.step)
    student.unet.requires_grad_(False).load_state_dict(state.average.state_dict())
