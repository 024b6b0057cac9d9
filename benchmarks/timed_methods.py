"""Ways to take a step of sampling, on one base: unguided, with CFG, with adapters, and with caches of steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from comfyui_agd.benchmarks.machine import error_text, release_memory
from comfyui_agd.benchmarks.random_bases import RandomBase

ADAPTERS = {
    "agd": {"kind": "delta", "rank": 16, "attention_every": 10},
    # What it costs in the attentions of all blocks, and where low-rank changes can't be in the weights.
    "agd-in-all": {"kind": "delta", "rank": 16, "attention_every": 1},
    "agd-modulated": {"kind": "delta", "rank": 16, "attention_every": 10, "modulated": True},
    # The paper authors' own, as wide as they publish figures of, and by their default.
    "paper-128": {"kind": "paper_attention", "hidden": 128},
    "paper-320": {"kind": "paper_attention", "hidden": 320},
}
# All of it can be in the weights.
LOW_RANK_ALONE = "low-rank"
_LOW_RANK = {"kind": "low_rank", "rank": 16, "vector": 0}
# Beside CFG and these adapters: what others leave out of CFG, and of the default adapter.
CACHED = ("training-free", "easy-cache", "agd-easy-cache")
OMEGA = 7.0
CACHED_STEPS = 10  # of 20: a cache that may be used from a share of the schedule on has begun to be
FORCED = 1e9  # what a forecast's error may be, and how much a cache's input may change
_SMALL = 1e-3  # of weights that begin at zero: an adapter at work, whose pictures stay finite


@dataclass(frozen=True)
class ModelAtSize:
    """A model, the size of its pictures or videos, how many rounds of `steps` are measured, and whether people sample
    at larger sizes. `frames`: of a video's latents."""

    model: str
    width: int
    height: int
    rounds: int
    frames: int = 1
    steps: int = 2
    reduced: bool = False

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" + (f", {4 * self.frames - 3} frames" if self.frames > 1 else "")


@dataclass
class Method:
    """One way to take a step. `adapter` is the module at work, if there is one. `steps`: of a round; `seconds`: of its
    mean step, for each round; `timed`: its steps, one by one. `messages`: that users would see.
    `failed`: why there is nothing of it, or no more."""

    name: str
    sampling: Callable[[int], list["TimedStep"]] | None = None
    rows: object = None  # a RowCounter, where nothing is compiled
    adapter: torch.nn.Module | None = None
    steps: int = 2
    seconds: list[float] = field(default_factory=list)
    timed: list["TimedStep"] = field(default_factory=list)
    found: dict = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    failed: str | None = None

    def attempt(self, measurement: Callable[["Method"], object]) -> None:
        """One that fails ends this method's measuring, not the others'."""
        if self.failed is None:
            try:
                measurement(self)
            except Exception as error:
                self.failed = error_text(error)
                print(f"  {self.name} failed: {self.failed}", flush=True)
                release_memory()


@dataclass(frozen=True)
class TimedStep:
    """`rows`: that the model evaluated; None where they aren't counted."""

    seconds: float
    rows: int | None


class Clock:
    """Seconds between two moments, by the device's own events on a GPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def moment(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def timed_sampler(clock: Clock, counter, steps: list[TimedStep]):
    """A ComfyUI sampler of Euler steps that notes the seconds of each evaluation of the guided model."""
    import comfy.samplers

    def evaluated() -> int:
        return 0 if counter is None else counter.total

    class Timed(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest):
            x, moments = noise * sigmas[0], []
            for i in range(len(sigmas) - 1):
                start, before = clock.moment(), evaluated()
                denoised = model_wrap(x, sigmas[i].expand(x.shape[0]), **extra_args)
                moments.append((start, clock.moment(), evaluated() - before))
                x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            for start, end, rows in moments:
                steps.append(TimedStep(clock.between(start, end), None if counter is None else rows))
            return x

    return Timed()


def sampling_of(model, cfg: float, base: RandomBase, at: ModelAtSize, clock: Clock, counter=None):
    """A function that takes so many steps and returns them."""
    import comfy.samplers

    from comfyui_agd.agd_core.comfyui.model.denoiser import ComfyDenoiser

    positive, negative = base.prompt(1), base.prompt(2)
    shape = ComfyDenoiser(model, frames=at.frames).latent_shape(at.width, at.height)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)

    @torch.inference_mode()
    def run(steps: int) -> list[TimedStep]:
        taken: list[TimedStep] = []
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampler = timed_sampler(clock, counter, taken)
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas[: steps + 1], disable_pbar=True)
        return taken

    return run


class Methods:
    """Makes methods by their names, on one base."""

    def __init__(self, base: RandomBase, at: ModelAtSize, dtype: str, device: torch.device, compiled: bool):
        from comfyui_agd.agd_core.comfyui.backbones import describe_base

        self.base, self.at, self.compiled, self.clock = base, at, compiled, Clock(device)
        self.patcher = base.patcher(dtype, device)
        self.described = describe_base(self.patcher.model)
        self.adapters = adapters_of(self.described)

    @property
    def names(self) -> list[str]:
        """Caches are measured where rows are counted."""
        return ["unguided", "cfg", *self.adapters, *([] if self.compiled else CACHED)]

    def make(self, name: str) -> Method:
        """Raises what making it raises, and `ValueError` where the base has no such method."""
        from comfyui_agd.agd_core.comfyui.guided_step import KEY
        from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
        from comfyui_agd.benchmarks.step_caches import easy_cache

        if name not in self.names:
            raise ValueError(f"There is no {name} here; there are {', '.join(self.names)}.")
        method = Method(name, steps=max(self.at.steps, CACHED_STEPS) if name in CACHED else self.at.steps)
        if name == "training-free":
            model = apply_training_free(self.patcher, notify=method.messages.append)
        elif name == "easy-cache":
            model = easy_cache(self.patcher, FORCED)
        elif name == "agd-easy-cache":
            model = easy_cache(self._with_adapter("agd", method), FORCED)
        else:
            model = self._with_adapter(name, method) if name in self.adapters else self.patcher
        if patchers := model.get_additional_models_with_key(KEY):
            method.adapter = patchers[0].model
        return self._sampled(method, model, 1.0 if name == "unguided" else OMEGA)

    def _with_adapter(self, name: str, method: Method):
        from comfyui_agd.agd_core.adapter import Adapter
        from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter

        tokens = self.base.prompt(2)[0][0].shape[1]
        info = info_of(self.described, self.adapters[name], tokens)
        adapter, generator = Adapter(info.config), torch.Generator().manual_seed(0)
        for _, parameter in adapter.trained():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=_SMALL, generator=generator)
        return apply_adapter(self.patcher, info, adapter.state_dict(), source=name, notify=method.messages.append)

    def _sampled(self, method: Method, model, cfg: float) -> Method:
        from comfyui_agd.agd_core.comfyui.counting import counted

        if self.compiled:
            from comfy_extras.nodes_torch_compile import TorchCompileModel

            model = TorchCompileModel.execute(model, "inductor").args[0]
        else:
            model, method.rows = counted(model)
        method.sampling = sampling_of(model, cfg, self.base, self.at, self.clock, method.rows)
        return method


def adapters_of(described) -> dict[str, dict]:
    """By name, the settings of those that a base is measured with: on transformers the default one in place of those
    that are for UNets."""
    return (ADAPTERS if described.layout == "unet" else {"agd": {}}) | {LOW_RANK_ALONE: _LOW_RANK}


def info_of(described, settings: dict, tokens: int):
    """An adapter of that base, as training would make it with negative prompts of so many tokens."""
    from comfyui_agd.agd_core.adapter_file import AdapterInfo
    from comfyui_agd.training.presets import settings_for

    training = settings_for(described, settings)
    config, omegas = training.adapter_config(described, tokens), (training.omega_min, training.omega_max)
    mode = "used" if config.kind.uses_negative else "ignored"
    return AdapterInfo(config=config, base=described, omega_range=omegas, negative_mode=mode)
