"""A ComfyUI MODEL as the trainer sees it: noise levels, evaluations of the frozen base and of the student."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import merge_nested_dicts
from torch import nn

from ...adapter import Adapter
from ...config import AdapterConfig
from ...guidance import per_row
from ...text import logger
from ..apply_model import register
from ..backbones import Backbone, backbone_of, check_adapter
from ..fused_attention import FUSED_ATTENTION
from ..guided_step import ActiveAdapter, GuidedStep, with_step
from ..prompt import Prompt
from ..sampling.compile_guard import without_compile
from ..sampling.negatives import WeightedNegative
from .activation_checkpointing import checkpointed
from .text_encoder import EncodedPrompt
from .trainable import trainable

log = logger(__name__)


@contextmanager
def _without_inference_tensors(module: nn.Module) -> Iterator[None]:
    """Inside, parameters that were made under `torch.inference_mode`, as ComfyUI's loader nodes make them, are copies.

    Autograd refuses to save such tensors for the backward pass, even frozen. The values stay the same to the bit.
    """
    replaced = []
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_inference():
                child._parameters[name] = _copied(parameter)
                replaced.append((child, name))
    try:
        yield
    finally:
        # Quantised weights go back: in inference mode, as nodes run, ComfyUI can't move those that weren't made there.
        with torch.inference_mode():
            for child, name in replaced:
                parameter = child._parameters[name]
                if parameter is not None and type(parameter) is not nn.Parameter:
                    child._parameters[name] = _copied(parameter)


def _copied(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.clone(), requires_grad=False)


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth its rounding there: without AVX-512 an x86 CPU emulates it, a hundred times slower."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def options_of(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The transformer_options that a sampler would build for a MODEL with our hooks, idle without a step."""
    model = model.clone()
    register(model)
    options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
    merge_nested_dicts(options.setdefault("wrappers", {}), model.wrappers, copy_dict1=False)
    merge_nested_dicts(options.setdefault("callbacks", {}), model.callbacks, copy_dict1=False)
    return {**without_compile(options), **FUSED_ATTENTION}


def at_sigma(options: dict, sigma: torch.Tensor) -> dict:
    """transformer_options for an evaluation at sigma (b,), one prompt per row."""
    described = {"cond_or_uncond": [0] * len(sigma), "uuids": [], "sigmas": sigma, "sample_sigmas": sigma}
    return {**options, **described}


def with_adapter(
    options: dict, adapter: Adapter, omega: torch.Tensor, wanted: dict, unwanted: dict | None = None
) -> dict:
    """`options` with the adapter in them.

    The conditions of the prompts, `wanted`, and of the negative ones, `unwanted`, if it uses them, have a row for each
    omega (b,).
    """
    negatives = (WeightedNegative(Prompt(unwanted)),) if adapter.uses_negative and unwanted else ()
    active = ActiveAdapter(adapter, omega, torch.ones(1, device=omega.device), negatives)
    prompts = {None: Prompt(wanted)} if adapter.guides_attention else {}
    return with_step(options, GuidedStep((active,), prompts=prompts))


class ComfyDenoiser:
    """Implements `training.model.Denoiser`."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, autocast: torch.dtype | None = None, frames: int = 1):
        """`autocast`: compute the evaluations in this dtype; None leaves the base as ComfyUI loaded it. `frames`: of a
        video's latents.

        On a CPU that would only emulate bf16 the base's own precision is used instead, and the log says so.
        """
        self.device = model.load_device
        self.model, self._frames = model, frames
        if autocast is torch.bfloat16 and not computes_bf16(self.device):
            log.warning("AGD: this CPU can't compute in bf16, so the model's own precision is used, which is faster.")
            autocast = None
        self._autocast = autocast
        self._options: dict = {}  # transformer_options with our hooks, which do nothing without a step
        # What `_ready` has set up, and with which arguments.
        self._session, self._session_settings = ExitStack(), (False, 0, 0)

    @property
    def is_flow(self) -> bool:
        """Whether x is (1 - sigma) x_0 + sigma noise, as in flow matching, instead of x_0 + sigma noise."""
        return isinstance(self._sampling, comfy.model_sampling.CONST)

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the base's activations."""
        return self._autocast or self.model.model.get_dtype_inference()

    @property
    def backbone(self) -> Backbone:
        return backbone_of(self.model.model)

    @property
    def _sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Of the latent of a picture of width x height pixels: (c, h, w), of video (c, t, h, w).

        Further channels hold the sound of a video, where it has one.
        """
        latent_format = self.model.get_model_object("latent_format")
        return self.backbone.latent_shape(latent_format, width, height, self._frames)

    def check_adapter(self, config: AdapterConfig) -> None:
        """Raises `UnsupportedModel` where the base has no place for such an adapter."""
        check_adapter(self.backbone, config)

    def check_schedulers(self, names: Sequence[str]) -> None:
        """Raises `ValueError` for one that ComfyUI doesn't have."""
        for name in names:
            if name not in comfy.samplers.SCHEDULER_NAMES:
                known = ", ".join(comfy.samplers.SCHEDULER_NAMES)
                raise ValueError(f"There is no scheduler {name!r}; ComfyUI has {known}.")

    @contextmanager
    def session(self, *, checkpointing: bool = False, memory: int = 0, work: int = 0) -> Iterator[None]:
        """The base is loaded and ready for gradients inside; what was set up for that is undone after.

        `checkpointing`: compute activations again in the backward pass. `memory`: bytes of the device to leave free, if
        need be by leaving a part of the base in system memory; 0 loads all of it. `work`: bytes that what is loaded
        beside the base leaves free. There is no session inside of another, which would end both.
        """
        if self._options:
            raise RuntimeError("This base is in a session already.")
        with torch.inference_mode(False), torch.enable_grad(), self._session:
            self._session_settings = (checkpointing, memory, work)
            self._session.enter_context(self._ready(*self._session_settings))
            yield

    @contextmanager
    def while_others_load(self) -> Iterator[None]:
        """Inside of a session, around whatever loads another model: ComfyUI may make room for that one by moving the
        base out, with its LoRAs and patches off. After it the base is loaded and ready as it was when the session
        began. Outside of a session nothing happens.
        """
        in_session = bool(self._options)
        self._session.close()
        yield
        if in_session:
            self._session.enter_context(self._ready(*self._session_settings))

    @contextmanager
    def _ready(self, checkpointing: bool, memory: int, work: int) -> Iterator[None]:
        """Inside, the base is loaded and set up as `session` says."""
        self._load(memory)
        self.model.model.requires_grad_(False)  # ComfyUI itself freezes its models from 0.30 on
        self.model.pre_run()
        self._options = options_of(self.model)
        twice = checkpointing or not self._is_fully_loaded()
        try:
            with (
                _without_inference_tensors(self.model.model),
                trainable(self.backbone),
                checkpointed(self.backbone) if twice else nullcontext(),
            ):
                yield
        finally:
            self.model.cleanup()
            self._options = {}

    def _load(self, memory: int) -> None:
        comfy.model_management.load_models_gpu(
            [self.model],
            memory_required=memory,
            minimum_memory_required=memory or None,
            force_full_load=not memory,
        )

    def _is_fully_loaded(self) -> bool:
        """Whether all weights stay on the device. Others come into a buffer that the next layer's overwrite, and what
        autograd kept of them would be wrong in the backward pass; checkpointed, they are fetched again.
        """
        dynamic = getattr(self.model, "is_dynamic", lambda: False)()  # ComfyUI's dynamic VRAM may move any of them
        return not dynamic and self.model.loaded_size() >= self.model.model_size()

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        """(steps + 1,) noise levels of one of ComfyUI's schedulers, the last one 0."""
        return comfy.samplers.calculate_sigmas(self._sampling, scheduler, steps).float().cpu()

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Where a sampler starts: unit noise (b, c, h, w) brought to sigma (b,)."""
        return self._sampling.noise_scaling(per_row(sigma, noise), noise, torch.zeros_like(noise), max_denoise=True)

    def prediction_unit(self, sigma: torch.Tensor) -> torch.Tensor:
        """The error of the denoised prediction (b,) at sigma (b,) that an error of 1 in what the loss is of makes."""
        return self.backbone.prediction_unit(sigma)

    def conditions(self, prompts: Sequence[EncodedPrompt], shape: Sequence[int]) -> dict:
        """The arguments of `apply_model` for one prompt per row of latents of `shape` (b, c, h, w).

        The prompts are of lengths that ComfyUI evaluates together: shorter ones are repeated to a common multiple.
        """
        return comfy.samplers.cond_cat(self._rows_of(prompts, shape))  # apply_model brings them to the device

    def _rows_of(self, prompts: Sequence[EncodedPrompt], shape: Sequence[int]) -> list[dict]:
        """Each prompt's conditions, for one row."""
        noise, latent_shapes = self._packed(torch.zeros(1, *shape[1:]))
        rows = []
        for prompt in prompts:
            made = comfy.samplers.encode_model_conds(
                self.model.model.extra_conds, [prompt.cond], noise, self.device, prompt.kind,
                latent_image=noise, denoise_mask=None, latent_shapes=latent_shapes,
            )[0]["model_conds"]  # fmt: skip
            rows.append({key: cond.process_cond(batch_size=1, area=None) for key, cond in made.items()})
        return rows

    def _together(self, shape: Sequence[int], *prompts: Sequence[EncodedPrompt]) -> Iterator[tuple[list[int], list]]:
        """Groups of rows whose prompts are of equal lengths, so that no token is evaluated that isn't a prompt's own.

        Gives the rows' numbers, and of each kind of `prompts` the arguments of `apply_model`.
        """
        each = [self._rows_of(own, shape) for own in prompts]
        groups: list[list[int]] = []
        for row in range(shape[0]):
            group = next((g for g in groups if all(_equal_lengths(own[g[0]], own[row]) for own in each)), None)
            if group is None:
                groups.append([row])
            else:
                group.append(row)
        for group in groups:
            yield group, [comfy.samplers.cond_cat([own[row] for row in group]) for own in each]

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor, conds: dict, options: dict) -> torch.Tensor:
        """The model's denoised prediction, fp32, with those conditions and transformer_options."""
        options = at_sigma(options, sigma)
        packed, latent_shapes = self._packed(x)
        with torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None):
            out = self.model.model.apply_model(packed, sigma, transformer_options=options, **conds).float()
        return self.backbone.join(comfy.utils.unpack_latents(out, latent_shapes))

    def _packed(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Size]]:
        """x as ComfyUI's samplers have it, several latents packed into one, and the shapes of its latents."""
        latents = self.backbone.split(x)
        return comfy.utils.pack_latents(latents) if len(latents) > 1 else (x, [x.shape])

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
        """f(x, sigma, c): the frozen base. x (b, c, h, w), sigma (b,), one prompt per row -> (b, c, h, w) fp32."""
        x, sigma = x.to(self.device), sigma.to(self.device)
        parts = {}
        for rows, (conds,) in self._together(x.shape, prompts):
            parts[tuple(rows)] = self.evaluate(x[rows], sigma[rows], conds, self._options)
        return in_order(parts)

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
        x, sigma, omega = (each.to(self.device) for each in (x, sigma, omega))
        parts = {}
        for rows, (wanted, *unwanted) in self._together(
            x.shape, prompts, *([negative] if adapter.uses_negative else [])
        ):
            options = with_adapter(self._options, adapter, omega[rows], wanted, *unwanted)
            parts[tuple(rows)] = self.evaluate(x[rows], sigma[rows], wanted, options)
        return in_order(parts)


def _equal_lengths(one: dict, other: dict) -> bool:
    """Whether ComfyUI would evaluate two rows' conditions together, without repeating the tokens of either.

    It repeats to the least common multiple of all lengths, which of 2, 3 and 4 chunks of CLIP's is 12, though it
    compares two at a time.
    """
    return comfy.samplers.cond_equal_size(one, other) and all(one[key].size() == other[key].size() for key in one)


def in_order(parts: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Parts of a batch, by the numbers of their rows, as the batch."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    order = torch.tensor([row for rows in parts for row in rows]).argsort()
    whole = torch.cat(list(parts.values()))
    return whole[order.to(whole.device)]
