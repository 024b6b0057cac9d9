"""A ComfyUI MODEL and CLIP as the trainer sees them: prompts, noise levels, teacher and student evaluations."""

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils
import psutil
import torch
from comfy.patcher_extension import merge_nested_dicts
from PIL import Image
from torch import nn

from ...adapter import Adapter
from ...config import AdapterConfig
from ..backbones import Backbone, backbone_of, describe_base, fingerprint
from ..evaluation import register
from ..sampling.compile_guard import without_compile
from ..sampling.negatives import Negative, WeightedNegative
from ..step import ActiveAdapter, GuidedStep, with_step
from . import tracing
from .activation_checkpointing import checkpointed, largest_block_bytes

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


BASE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def load_checkpoint(
    path: Path, loras: Sequence[tuple[Path, float]] = (), dtype: str | None = None, *, with_vae: bool = False
):
    """(MODEL, CLIP, VAE) of a full checkpoint file, as CheckpointLoaderSimple loads it, with LoRAs and their strengths.

    `dtype`: one of `BASE_DTYPES` for the diffusion model's weights; None leaves the choice to ComfyUI. The VAE is None
    unless asked for. Raises `ValueError`.
    """
    options = {"dtype": BASE_DTYPES[dtype]} if dtype else {}
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=with_vae, model_options=options)
    if model is None or clip is None:
        raise ValueError(f"{path} lacks a diffusion model or a text encoder; AGD needs a full checkpoint.")
    for file, strength in loras:
        before = len(model.patches)
        model, clip = comfy.sd.load_lora_for_models(model, clip, _lora(file), strength, strength)
        if len(model.patches) == before:
            raise ValueError(f"{file} changes nothing in the diffusion model of {path}; it is a LoRA of another base.")
    return model, clip, vae


def _lora(file: Path) -> dict[str, torch.Tensor]:
    try:
        return comfy.utils.load_torch_file(str(file), safe_load=True)
    except Exception as error:  # ComfyUI lets through whatever its readers raise
        raise ValueError(f"{file} can't be read as a LoRA ({error}).") from error


def options_of(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The transformer_options that a sampler would build for a MODEL with our hooks, idle without a step."""
    model = model.clone()
    register(model)
    options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
    merge_nested_dicts(options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
    merge_nested_dicts(options.setdefault("callbacks", {}), model.callbacks, copy_dict1=False)
    return {**without_compile(options), **tracing.FUSED_ATTENTION}


def at_sigma(options: dict, sigma: torch.Tensor) -> dict:
    """transformer_options for an evaluation at sigma (b,), one prompt per row."""
    told = {"cond_or_uncond": [0] * len(sigma), "uuids": [], "sigmas": sigma, "sample_sigmas": sigma}
    return {**options, **told}


@dataclass(frozen=True)
class EncodedPrompt:
    """What the text encoder made of a prompt, on the CPU; `kind` is "positive" or "negative"."""

    cond: dict
    kind: str


class ComfyHost:
    """Implements `training.host.Host`."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, clip, *, autocast: torch.dtype | None = None, vae=None):
        """`autocast`: compute the evaluations in this dtype; None leaves the base as ComfyUI loaded it.

        On a CPU that would only emulate bf16 the base's own precision is used instead, and the log says so. `vae`:
        decodes previews; without it they are ComfyUI's fast approximation.
        """
        described = describe_base(model.model, model.get_model_object("model_sampling"))
        self.base = replace(described, fingerprint=fingerprint(model.model))
        self.device = model.load_device
        self.teacher = {"patched_weights": len(model.patches)} if model.patches else {}
        self._model = model.clone()
        self._clip, self._vae = clip, vae
        if autocast is torch.bfloat16 and not computes_bf16(self.device):
            log.warning("AGD: this CPU can't compute in bf16, so the model's own precision is used, which is faster.")
            autocast = None
        self._autocast = autocast
        self._options: dict = {}  # transformer_options with our hooks, which do nothing without a step
        self._example: EncodedPrompt | None = None

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the base's activations."""
        return self._autocast or self._model.model.get_dtype_inference()

    @property
    def _backbone(self) -> Backbone:
        return backbone_of(self._model.model)

    @property
    def _sampling(self):
        return self._model.get_model_object("model_sampling")

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a picture of width x height pixels."""
        return self._backbone.latent_shape(self._model.get_model_object("latent_format"), width, height)

    def check_schedulers(self, names: Sequence[str]) -> None:
        """Raises `ValueError` for one that ComfyUI doesn't have."""
        for name in names:
            if name not in comfy.samplers.SCHEDULER_NAMES:
                known = ", ".join(comfy.samplers.SCHEDULER_NAMES)
                raise ValueError(f"There is no scheduler {name!r}; ComfyUI has {known}.")

    def encode(self, prompts: list[str], kind: str = "positive") -> list[EncodedPrompt]:
        """Prompts for pictures of any size; `kind` is "positive" or "negative"."""
        if self._clip is None:
            raise ValueError("This host has released its text encoder; make another one for another run.")
        dtype, encoded = self._model.model.get_dtype_inference(), []
        with torch.inference_mode(False), torch.no_grad():
            for prompt in prompts:
                conds = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(prompt))
                cond = comfy.sampler_helpers.convert_cond(conds)[0]
                # As the model will cast them; thousands of prompts wait in memory.
                encoded.append(EncodedPrompt({**cond, "cross_attn": cond["cross_attn"].to("cpu", dtype)}, kind))
        self._example = encoded[-1] if encoded else self._example
        return encoded

    def release_text_encoder(self) -> None:
        """No prompts will be encoded any more: the text encoder leaves the device, and memory if it is ours alone."""
        self._clip = None
        gc.collect()
        if self.device.type != "cpu":
            comfy.model_management.free_memory(1e30, self.device)
            comfy.model_management.soft_empty_cache()

    def context(self, prompt: EncodedPrompt) -> torch.Tensor:
        """The prompt tokens (m, d) of a prompt that `encode` made."""
        return prompt.cond["cross_attn"][0]

    @contextmanager
    def session(self, *, checkpointing: bool = False, memory: int = 0) -> Iterator[None]:
        """The base is loaded and ready for gradients inside; what was set up for that is undone after.

        `checkpointing`: compute activations again in the backward pass. `memory`: bytes of the device to leave free, if
        need be by leaving a part of the base in system memory; 0 loads all of it.
        """
        with torch.inference_mode(False), torch.enable_grad():
            comfy.model_management.load_models_gpu(
                [self._model],
                memory_required=memory,
                minimum_memory_required=memory or None,
                force_full_load=not memory,
            )
            _without_inference_tensors(self._model.model)
            self._model.model.requires_grad_(False)  # ComfyUI itself freezes its models from 0.30 on
            self._model.pre_run()
            self._options = options_of(self._model)
            twice = checkpointing or not self._is_whole()
            try:
                with checkpointed(self._backbone) if twice else nullcontext():
                    yield
            finally:
                self._model.cleanup()
                self._options = {}

    def _is_whole(self) -> bool:
        """Whether all weights stay on the device. Others come into a buffer that the next layer's overwrite, and what
        autograd kept of them would be wrong in the backward pass; checkpointed, they are fetched again.
        """
        dynamic = getattr(self._model, "is_dynamic", lambda: False)()  # ComfyUI's dynamic VRAM may move any of them
        return not dynamic and self._model.loaded_size() >= self._model.model_size()

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        """(steps + 1,) noise levels of one of ComfyUI's schedulers, the last one 0."""
        return comfy.samplers.calculate_sigmas(self._sampling, scheduler, steps).float().cpu()

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Where a sampler starts: unit noise (b, c, h, w) brought to sigma (b,)."""
        sigma = sigma.reshape(-1, 1, 1, 1).to(noise)
        return self._sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)

    def _conditions(self, prompts: Sequence[EncodedPrompt], shape: torch.Size) -> dict:
        """The arguments of `apply_model` for one prompt per row of latents of `shape` (b, c, h, w)."""
        noise, rows = torch.zeros(1, *shape[1:]), []
        for prompt in prompts:
            made = comfy.samplers.encode_model_conds(
                self._model.model.extra_conds, [prompt.cond], noise, self.device, prompt.kind,
                latent_image=noise, denoise_mask=None,
            )[0]["model_conds"]  # fmt: skip
            rows.append({key: cond.process_cond(batch_size=1, area=None) for key, cond in made.items()})
        return comfy.samplers.cond_cat(rows)  # apply_model brings them to the device

    def _evaluate(self, x: torch.Tensor, sigma: torch.Tensor, conds: dict, options: dict) -> torch.Tensor:
        options = at_sigma(options, sigma)
        with torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None):
            return self._model.model.apply_model(x, sigma, transformer_options=options, **conds).float()

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
        """f(x, sigma, c): the frozen base. x (b, c, h, w), sigma (b,), one prompt per row -> (b, c, h, w) fp32."""
        conds = self._conditions(prompts, x.shape)
        return self._evaluate(x.to(self.device), sigma.to(self.device), conds, self._options)

    def student(
        self,
        adapter: Adapter,
        x: torch.Tensor,
        sigma: torch.Tensor,
        prompts: Sequence[EncodedPrompt],
        negative: Sequence[EncodedPrompt],
        omega: torch.Tensor,
    ) -> torch.Tensor:
        """f_psi(x, sigma, c, omega, c_neg): as `denoise`, with the adapter's hooks and its gradients. omega: (b,)."""
        conds = self._conditions(prompts, x.shape)
        unwanted = self._conditions(negative, x.shape) if adapter.uses_negative else {}
        options = self._with(adapter, omega.to(self.device), unwanted, self._options)
        return self._evaluate(x.to(self.device), sigma.to(self.device), conds, options)

    @staticmethod
    def _with(adapter: Adapter, omega: torch.Tensor, unwanted: dict, options: dict) -> dict:
        """`options` with the adapter in them; `unwanted`: the conditions of the negative prompts, if it uses them."""
        negatives = (WeightedNegative(Negative(unwanted["c_crossattn"])),) if unwanted else ()
        return with_step(
            options, GuidedStep((ActiveAdapter(adapter, omega, torch.ones(1, device=omega.device), negatives),))
        )

    def picture(self, latent: torch.Tensor) -> Image.Image:
        """A latent (1, c, h, w) as the sampler leaves it, as a picture: decoded, or approximated without a VAE."""
        if self._vae is not None:
            image = self._vae.decode(self._model.model.process_latent_out(latent.float()))[0]
        else:
            image = _approximate_picture(latent[0].float(), self._model.get_model_object("latent_format"))
        return Image.fromarray((image.float().cpu().clamp(0, 1) * 255).round().byte().numpy())

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def free_unused_memory(self) -> None:
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def memory_used(self) -> int:
        """The most bytes of the GPU's memory that were in use so far; on a CPU what the process has now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def memory_free(self) -> int | None:
        """The bytes that training could have on the device, with every other model moved out; None on a CPU."""
        if self.device.type == "cpu":
            return None
        loaded = comfy.model_management.loaded_models()
        movable = sum(model.loaded_size() for model in loaded if model.load_device == self.device)
        return comfy.model_management.get_free_memory(self.device) + movable

    def base_bytes(self) -> int:
        """What the base's weights take."""
        return self._model.model_size()

    def largest_block_bytes(self) -> int:
        """What the largest part of the base takes that has to be on the device at a time."""
        return largest_block_bytes(self._backbone)

    def trace_student(
        self, config: AdapterConfig, shape: tuple[int, int, int], rows: int, checkpointing: bool
    ) -> tracing.Traced:
        """What the student's forward and backward pass take for `rows` latents of `shape`; nothing is computed.

        Here and in `trace_teacher` the prompt is the last that was encoded.
        """
        conds, options = self._conditions([self._example] * rows, torch.Size([rows, *shape])), options_of(self._model)

        def evaluate(adapter, x, sigma, omega):
            unwanted = conds if adapter.uses_negative else {}
            return self._evaluate(x, sigma, conds, self._with(adapter, omega, unwanted, options))

        return tracing.student(self._model.model, evaluate, config, shape, rows, checkpointing=checkpointing)

    def trace_teacher(self, shape: tuple[int, int, int], rows: int) -> tracing.Traced:
        """As `trace_student`, for `denoise`."""
        conds, options = self._conditions([self._example] * rows, torch.Size([rows, *shape])), options_of(self._model)
        return tracing.teacher(
            self._model.model, lambda x, sigma: self._evaluate(x, sigma, conds, options), shape, rows
        )

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product in the dtype that the base computes in."""
        dtype = self.computes_in
        size = 1024 if self.device.type == "cpu" else 4096
        a = torch.ones(size, size, dtype=dtype, device=self.device)
        seconds, products = 0.0, 0
        _finish(a @ a)
        while seconds < 0.2:
            start = time.perf_counter()
            _finish(a @ a)
            seconds, products = seconds + time.perf_counter() - start, products + 1
        return products * 2 * size**3 / seconds


def _finish(result: torch.Tensor) -> None:
    """Wait until a device has computed `result`."""
    result[0, 0].item()


def _approximate_picture(latent: torch.Tensor, latent_format) -> torch.Tensor:
    """(c, h, w) -> (8 h, 8 w, 3) in [0, 1]: ComfyUI's linear map from latent channels to colours, enlarged.

    A latent format without such a map shows its first three channels.
    """
    if latent_format.latent_rgb_factors is not None:
        factors = torch.tensor(latent_format.latent_rgb_factors)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        image = torch.einsum("chw,cr->rhw", latent.cpu(), factors) + bias[:, None, None]
    else:
        image = latent[:3].cpu() / 3
    image = nn.functional.interpolate((image[None] + 1) / 2, scale_factor=8, mode="bilinear")
    return image[0].movedim(0, -1)
