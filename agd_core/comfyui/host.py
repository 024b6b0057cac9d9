"""A ComfyUI MODEL and CLIP as the trainer sees them: conditions, noise levels, teacher and student evaluations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import merge_nested_dicts
from torch import nn

from ..adapter import Adapter
from .patch import Active, Step, register, take_part, without_compile
from .sites import describe_base, fingerprint

log = logging.getLogger(__name__)


def _without_inference_tensors(module: nn.Module) -> None:
    """Replace parameters that were made under `torch.inference_mode`, as ComfyUI's loader nodes make them.

    Autograd refuses to save such tensors for the backward pass, even frozen. The values stay the same to the bit.
    """
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_inference():
                child._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth its rounding there: without AVX-512 an x86 CPU emulates it, a hundred times slower."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def load_checkpoint(path: Path):
    """(MODEL, CLIP) of a full checkpoint file, as CheckpointLoaderSimple loads it. Raises `ValueError`."""
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
    if model is None or clip is None:
        raise ValueError(f"{path} lacks a diffusion model or a text encoder; AGD needs a full checkpoint.")
    return model, clip


class ComfyHost:
    """Implements `training.host.Host`. Conditions are dicts of ComfyUI's own COND objects, one dict per prompt."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, clip, *, autocast: torch.dtype | None = None):
        """`autocast`: compute the evaluations in this dtype; None leaves the base as ComfyUI loaded it.

        On a CPU that would only emulate bf16 the base's own precision is used instead, and the log says so.
        """
        described = describe_base(model.model, model.get_model_object("model_sampling"))
        self.base = replace(described, fingerprint=fingerprint(model.model.diffusion_model))
        self.device = model.load_device
        self._model = model.clone()
        self._clip = clip
        if autocast is torch.bfloat16 and not computes_bf16(self.device):
            log.warning("AGD: this CPU can't compute in bf16, so the model's own precision is used, which is faster.")
            autocast = None
        self._autocast = autocast
        self._options: dict = {}  # transformer_options with our hooks, which do nothing without a step

    @property
    def _sampling(self):
        return self._model.get_model_object("model_sampling")

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a picture of width x height pixels."""
        latent = self._model.get_model_object("latent_format")
        factor = latent.spacial_downscale_ratio
        return latent.latent_channels, height // factor, width // factor

    def encode(self, prompts: list[str], shape: tuple[int, int, int], kind: str = "positive") -> list[dict]:
        """Conditions for latents of `shape` (c, h, w); `kind` is "positive" or "negative"."""
        noise = torch.zeros(1, *shape)
        encoded = []
        with torch.inference_mode(False), torch.no_grad():
            for prompt in prompts:
                conds = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(prompt))
                conds = comfy.sampler_helpers.convert_cond(conds)
                make = self._model.model.extra_conds
                conds = comfy.samplers.encode_model_conds(
                    make, conds, noise, self.device, kind, latent_image=noise, denoise_mask=None
                )
                encoded.append(conds[0]["model_conds"])
        return encoded

    def context(self, condition: dict) -> torch.Tensor:
        """The prompt tokens (m, d) of a condition that `encode` made."""
        return condition["c_crossattn"].cond[0]

    @contextmanager
    def session(self) -> Iterator[None]:
        """The base is loaded and ready for gradients inside; what was set up for that is undone after."""
        with torch.inference_mode(False), torch.enable_grad():
            comfy.model_management.load_models_gpu([self._model], force_full_load=True)
            _without_inference_tensors(self._model.model)
            self._model.model.requires_grad_(False)  # ComfyUI itself freezes its models from 0.30 on
            self._model.pre_run()
            self._options = self._build_options()
            try:
                yield
            finally:
                self._model.cleanup()
                self._options = {}

    def _build_options(self) -> dict:
        """The transformer_options that a sampler would build for the model with our hooks."""
        model = self._model.clone()
        register(model)
        options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
        merge_nested_dicts(options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
        merge_nested_dicts(options.setdefault("callbacks", {}), model.callbacks, copy_dict1=False)
        return without_compile(options)

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        """(steps + 1,) noise levels of one of ComfyUI's schedulers, the last one 0."""
        return comfy.samplers.calculate_sigmas(self._sampling, scheduler, steps).float().cpu()

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Where a sampler starts: unit noise (b, c, h, w) brought to sigma (b,)."""
        sigma = sigma.reshape(-1, 1, 1, 1).to(noise)
        return self._sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)

    def _evaluate(self, x: torch.Tensor, sigma: torch.Tensor, conditions: list[dict], options: dict) -> torch.Tensor:
        rows = [{k: cond.process_cond(batch_size=1, area=None) for k, cond in row.items()} for row in conditions]
        conds = comfy.samplers.cond_cat(rows)  # apply_model brings them to the device
        options = {
            **options,
            "cond_or_uncond": [0] * len(rows),
            "uuids": [],
            "sigmas": sigma,
            "sample_sigmas": sigma,
        }
        x, sigma = x.to(self.device), sigma.to(self.device)
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._model.model.apply_model(x, sigma, transformer_options=options, **conds).float()

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, conditions: list[dict]) -> torch.Tensor:
        """f(x, sigma, c): the frozen base. x (b, c, h, w), sigma (b,), one condition per row -> (b, c, h, w) fp32."""
        return self._evaluate(x, sigma, conditions, self._options)

    def student(
        self, adapter: Adapter, x: torch.Tensor, sigma: torch.Tensor, conditions: list[dict], omega: torch.Tensor
    ) -> torch.Tensor:
        """f_psi(x, sigma, c, omega): as `denoise`, with the adapter's hooks and its gradients. omega: (b,)."""
        active = Active(adapter, omega.to(self.device), torch.ones(1, device=self.device))
        return self._evaluate(x, sigma, conditions, take_part(self._options, Step((active,))))
