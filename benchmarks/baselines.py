"""What AGD is compared with: other ways to sample with guidance, and the distillation of a whole model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.samplers
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
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.agd_core.layers import sinusoidal, zero_init
from comfyui_agd.examples.toy import model as toy
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.distributed import Ranks
from comfyui_agd.training.model import DeviceMemory, EncodedPrompts
from comfyui_agd.training.recording import RecordedBatches
from comfyui_agd.training.run_state import RunState
from comfyui_agd.training.training_step import TrainingStep

_KEY = "agd_baseline"
# Castillo et al. have 0.991 for a latent model of 512x512 pixels. Here both branches agree by 0.998 from the first
# step on, so that threshold would switch guidance off at once; at 0.999 it lasts for about half of the steps.
AGREEMENT = 0.999
NAG_TAU, NAG_ALPHA = 2.5, 0.25  # as published


def limited_interval(model: comfy.model_patcher.ModelPatcher, rule: GuidanceRule) -> comfy.model_patcher.ModelPatcher:
    """CFG where rule.sigma_min < sigma <= rule.sigma_max, one pass elsewhere (Kynkäänniemi et al. 2024)."""
    clone = model.clone()

    def predict_noise(executor, x, timestep, model_options={}, seed=None):
        if rule.sigma_min < float(timestep.flatten()[0]) <= rule.sigma_max:
            return executor(x, timestep, model_options, seed)
        with with_cfg(executor.class_obj, 1.0):  # at which ComfyUI leaves out the negative
            return executor(x, timestep, model_options, seed)

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, predict_noise)
    return clone


class AdaptiveGuidance:
    """Castillo et al. 2023 (arXiv 2312.12487): once the noise predictions of both branches agree, a picture goes on
    without the second pass. Each picture decides for itself, and only the others' rows are evaluated twice.
    """

    def __init__(self, agreement: float = AGREEMENT):
        self.agreement = agreement
        self.guided: torch.Tensor | None = None  # (b,) bool, of the sampling that is going on

    def __call__(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_calc_cond_batch_function`: [denoised with the prompt, with the negative one]."""
        x, sigma, (positive, negative) = args["input"], args["sigma"], args["conds"]
        if negative is None:  # at cfg 1
            return comfy.samplers.calc_cond_batch(args["model"], args["conds"], x, sigma, args["model_options"])
        if self.guided is None:
            self.guided = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rows = self.guided.nonzero()[:, 0]

        def evaluate(conds: list, x: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
            return comfy.samplers.calc_cond_batch(args["model"], conds, x, sigma, args["model_options"])

        if len(rows) == len(x):
            cond, uncond = evaluate([positive, negative], x, sigma)
        else:
            (cond,) = evaluate([positive], x, sigma)
            uncond = cond.clone()  # no guidance
            if len(rows):
                (uncond[rows],) = evaluate([_of_rows(negative, rows, len(x))], x[rows], sigma[rows])
        eps = ((x - denoised).flatten(1) for denoised in (cond, uncond))  # times sigma
        self.guided = self.guided & (torch.cosine_similarity(*eps) <= self.agreement)
        return [cond, uncond]

    def start(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: every sampling begins with guidance."""
        self.guided = None
        return executor(*args, **kwargs)


def _of_rows(conds: list[dict], rows: torch.Tensor, count: int) -> list[dict]:
    """Conditions for these rows of a batch of `count`, of which each row may have a prompt of its own."""

    def chosen(cond):
        return cond._copy_with(cond.cond[rows.to(cond.cond.device)]) if len(cond.cond) == count else cond

    return [{**cond, "model_conds": {key: chosen(c) for key, c in cond["model_conds"].items()}} for cond in conds]


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


def adaptive(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    clone, guidance = model.clone(), AdaptiveGuidance()
    clone.set_model_sampler_calc_cond_batch_function(guidance)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, guidance.start)
    return clone


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
