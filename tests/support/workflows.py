"""The rows of docs/compatibility.md, each as the workflow that it names, run through ComfyUI's own nodes.

A workflow is `run(agd, base, variant)`: it puts `agd` in the loader's place and returns the sampled latent.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import nodes
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_context_windows,
    nodes_differential_diffusion,
    nodes_eps,
    nodes_freelunch,
    nodes_fresca,
    nodes_hooks,
    nodes_hypertile,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_model_merging,
    nodes_nag,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_tcfg,
)
from comfy_extras import nodes_custom_sampler as custom

from comfyui_agd.tests.support import runtime
from comfyui_agd.tests.support.companions import ImagePrompt, clip, control_net, gligen
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    Prompts,
    TwoWidths,
    custom_sampler,
    in_dtype,
    ksampler,
    ksampler_advanced,
    latent,
    random_prompts,
    tiny,
)

CFG_PP = tuple(name for name in comfy.samplers.SAMPLER_NAMES if name.endswith("_cfg_pp"))
TWICE = (
    "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral", "sa_solver_pece",
)  # fmt: skip
TWICE = tuple(name for name in TWICE if name in comfy.samplers.SAMPLER_NAMES)
SAMPLERS = tuple(name for name in comfy.samplers.SAMPLER_NAMES if name not in CFG_PP + TWICE)
AROUND = ("before", "after")  # the other node is before or after the loader
LORA, OTHER_LORA = "tiny.safetensors", "other.safetensors"  # in a folder that the tests make
# The steps that training-free guidance is counted over, and the share of them that it evaluates where all can be
# forecast: three, then every third one.
TRAINING_FREE_STEPS, SMOOTH = 12, 6 / 12
PROMPTS = random_prompts()
LONG = random_prompts(lengths=(48, 16))
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Row:
    """`without`, `with_agd`: evaluations per prediction that the sampler asks for, and per picture.

    `training_free`: the same of guidance that needs no adapter, over TRAINING_FREE_STEPS; None is what is taken where
    all steps can be forecast, 0 that it is refused.
    `needs_both`: what needs both predictions, as the message names it; `own_evaluation`: what evaluates the prompts
    in its own way, likewise; `as_base`: the result is the base's own; `since`: the oldest tested ComfyUI that has it,
    and has it so; `warns`: whether training-free guidance has a message about it, `within`: how exactly it keeps its
    number whatever the variant; `says`: how a message about an adapter begins that is none of those. Without `run` the
    row is tested in compatibility/test_compile.py, which needs processes of its own.
    """

    what: str
    without: float
    with_agd: float
    run: Callable | None
    variants: tuple[str, ...] = ("",)
    needs_both: str | None = None
    own_evaluation: str | None = None
    as_base: bool = False
    since: str | None = None
    training_free: float | None = None
    warns: bool = False
    within: float = 0.005
    says: str | None = None

    @property
    def with_training_free(self) -> float:
        return self.without * SMOOTH if self.training_free is None else self.training_free

    @property
    def training_free_warns(self) -> bool:
        return self.warns or self.with_training_free == self.without


ROWS: list[Row] = []


def row(what: str, without: float, with_agd: float, variants=("",), **kind):
    def register(run):
        ROWS.append(Row(what, without, with_agd, run, tuple(variants), **kind))
        return run

    return register


class EvaluationCounter:
    """Counts rows of the diffusion model against the pictures that predictions were asked for.

    `at`: the wrapper that sees those rows. Not every transformer runs the one around the diffusion model.
    """

    def __init__(self, at: str = WrappersMP.DIFFUSION_MODEL):
        self.rows: list[int] = []
        self.pictures, self.at = 0, at

    @property
    def evaluations(self) -> float:
        return sum(self.rows) / self.pictures

    def __call__(self, model):
        def evaluate(executor, x, *args, **kwargs):
            self.rows.append(x.shape[0])
            return executor(x, *args, **kwargs)

        def predict_noise(executor, x, *args, **kwargs):
            before = len(self.rows)
            try:
                predicted = executor(x, *args, **kwargs)
            except BaseException:
                del self.rows[before:]  # a sampling that begins again: once, at its first step
                raise
            self.pictures += x.shape[0]
            return predicted

        clone = model.clone()
        for kind, wrapper in ((self.at, evaluate), (WrappersMP.PREDICT_NOISE, predict_noise)):
            clone.remove_wrappers_with_key(kind, "evaluation_counter")
            clone.add_wrapper_with_key(kind, "evaluation_counter", wrapper)
        return clone


def placed(where: str, agd, node, base):
    return agd(node(base)) if where == "before" else node(agd(base))


def no_agd(model, **options):
    return model


def noise(batch: int = 1, height: int = 8, width: int = 8) -> dict:
    generator = torch.Generator().manual_seed(height * width)
    return {"samples": torch.randn(1, 12, height, width, generator=generator).repeat(batch, 1, 1, 1)}


# Samplers, schedulers, guiders


@row("Samplers that ask once at a noise level", 2, 1, SAMPLERS, within=0.25)
def sampler(agd, base, name):
    denoise = 0.2 if name == "dpm_adaptive" else 1.0  # this one chooses its own number of steps
    return ksampler(agd(base), PROMPTS, sampler=name, steps=3, denoise=denoise)


@row("Samplers that ask twice, or go back up", 2, 1, TWICE, training_free=1.1, within=0.2)
def sampler_that_asks_twice(agd, base, name):
    return ksampler(agd(base), PROMPTS, sampler=name, steps=12)


@row("The `*_cfg_pp` samplers", 2, 2, CFG_PP, needs_both="the sampler {}", training_free=2)
def cfg_pp(agd, base, name):
    return ksampler(agd(base), PROMPTS, sampler=name, steps=3)


@row("Every scheduler", 2, 1, comfy.samplers.SCHEDULER_NAMES, within=0.1)
def scheduler(agd, base, name):
    return ksampler(agd(base), PROMPTS, scheduler=name, steps=3)


@row("KSampler (Advanced), split in two with leftover noise", 2, 1, training_free=4 / 3)
def split(agd, base, _=""):
    model = agd(base)
    return ksampler_advanced(model, PROMPTS, ksampler_advanced(model, PROMPTS, latent(), 0, 2), 2)["samples"]


@row("Image to image, denoise below 1", 2, 1)
def image_to_image(agd, base, _):
    return ksampler(agd(base), PROMPTS, at=noise(), denoise=0.5, steps=2)


@row("Inpainting masks", 2, 1, ("Set Latent Noise Mask", "Differential Diffusion"))
def inpainting(agd, base, kind=""):
    mask = torch.linspace(0, 1, 64)[None, None, :].expand(1, 64, 64).clone()
    mask[..., :24] = 0
    at = nodes.SetLatentNoiseMask().set_mask(noise(), mask)[0]
    model = agd(base)
    if kind == "Differential Diffusion":
        model = nodes_differential_diffusion.DifferentialDiffusion.execute(model).args[0]
    return ksampler(model, PROMPTS, at=at)


@row("SamplerCustom", 2, 1)
def sampler_custom(agd, base, _):
    return custom_sampler(agd(base), PROMPTS, "SamplerCustom")


@row("SamplerCustomAdvanced with CFGGuider", 2, 1)
def cfg_guider(agd, base, _):
    return custom_sampler(agd(base), PROMPTS, "CFGGuider")


@row("SamplerCustomAdvanced with BasicGuider", 1, 1, training_free=1)
def basic_guider(agd, base, _):
    return custom_sampler(agd(base, guidance_scale=CFG), PROMPTS, "BasicGuider")


def sample_custom(guider, at=None, steps: int = STEPS):
    steps = max(steps, runtime.FEWEST_STEPS)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    euler = comfy.samplers.sampler_object("euler")
    noise = custom.RandomNoise.execute(7).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, at or latent()).args[0]["samples"]


@torch.inference_mode()
def predict_from(model, prompts: Prompts, noise: torch.Tensor):
    """One step from the highest noise level to 0, from this noise."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 1)
    euler = comfy.samplers.sampler_object("euler")
    zeros = torch.zeros_like(noise)
    return comfy.sample.sample_custom(model, noise, CFG, euler, sigmas, prompts.positive, prompts.negative, zeros)


@row("DualCFGGuider", 3, 3, ("regular", "nested"), own_evaluation="the guider Guider_DualCFG", training_free=3)
def dual_cfg_guider(agd, base, style):
    node, other = custom.DualCFGGuider, random_prompts(lengths=(32, 32))
    model = agd(base)
    return sample_custom(
        node.execute(model, PROMPTS.positive, other.positive, PROMPTS.negative, CFG, 3.0, style).args[0]
    )


@row("DualModelGuider", 2, 2, own_evaluation="the guider Guider_DualModel", since="0.26.0", training_free=2)
def dual_model_guider(agd, base, _):
    node = custom.DualModelGuider
    return sample_custom(node.execute(agd(base), PROMPTS.positive, CFG, other_model(), PROMPTS.negative).args[0])


@row("PerpNegGuider", 3, 3, own_evaluation="the guider Guider_PerpNeg", training_free=3)
def perp_neg_guider(agd, base, _):
    node, empty = nodes_perpneg.PerpNegGuider, random_prompts(lengths=(32, 32)).negative
    return sample_custom(node.execute(agd(base), PROMPTS.positive, PROMPTS.negative, empty, CFG, 1.0).args[0])


# What is sampled


@row("Batches", 2, 1, ("2", "3"))
def batch(agd, base, size):
    return ksampler(agd(base), PROMPTS, at=latent(int(size)), steps=2)


@row("Latents of any size", 2, 1, ("7x9", "5x16", "13x3"))
def latent_size(agd, base, size):
    height, width = map(int, size.split("x"))
    return ksampler(agd(base), PROMPTS, at=latent(1, height, width), steps=2)


@row("Mixed sizes in one session", 2, 1)
def mixed_sizes(agd, base, _=""):
    model = agd(base)
    samples = [ksampler(model, PROMPTS, at=latent(n, h, w), steps=2) for n, h, w in ((1, 8, 8), (2, 6, 10), (1, 8, 8))]
    return torch.cat([sample.flatten() for sample in samples])


@row("Context windows", 3, 1.5, since="0.26.0")
def context_windows(agd, base, _=""):
    node = nodes_context_windows.ContextWindowsManualNode
    model = node.execute(agd(base), 4, 2, "standard_static", 1, False, "pyramid", 0, False).args[0]
    return ksampler(model, PROMPTS, at=latent(6))


# Prompts


@row("Prompts of different lengths", 2, 1)
def lengths(agd, base, _):
    return ksampler(agd(base), Prompts(LONG.positive, PROMPTS.negative))


@row("ConditioningConcat", 2, 1)
def concat(agd, base, _):
    both = nodes.ConditioningConcat().concat(PROMPTS.positive, LONG.positive)[0]
    return ksampler(agd(base), Prompts(both, PROMPTS.negative))


@row("ConditioningCombine", 3, 2)
def combine(agd, base, _):
    both = nodes.ConditioningCombine().combine(PROMPTS.positive, LONG.positive)[0]
    return ksampler(agd(base), Prompts(both, PROMPTS.negative))


def masked(left: list, right: list) -> list:
    """`left` and `right` for their halves of an 8 x 8 latent."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    halves = [
        nodes.ConditioningSetMask().append(cond, mask, "default", 1.0)[0]
        for cond, mask in ((left, mask), (right, 1 - mask))
    ]
    return nodes.ConditioningCombine().combine(*halves)[0]


@row("Regional prompts: masks", 3, 2)
def masks(agd, base, _):
    return ksampler(agd(base), Prompts(masked(PROMPTS.positive, LONG.positive), PROMPTS.negative))


def areas_of(left: list, right: list) -> list:
    halves = [nodes.ConditioningSetArea().append(cond, 32, 64, x, 0, 1.0)[0] for cond, x in ((left, 0), (right, 32))]
    return nodes.ConditioningCombine().combine(*halves)[0]


@row("Regional prompts: areas", 5, 2)
def areas(agd, base, _):
    return ksampler(agd(base), Prompts(areas_of(PROMPTS.positive, LONG.positive), PROMPTS.negative))


@row("Timestep ranges of prompts", 2, 1)
def timestep_ranges(agd, base, _=""):
    set_range = nodes.ConditioningSetTimestepRange().set_range
    parts = set_range(PROMPTS.positive, 0.0, 0.5)[0], set_range(LONG.positive, 0.5, 1.0)[0]
    both = nodes.ConditioningCombine().combine(*parts)[0]
    return ksampler(agd(base), Prompts(both, PROMPTS.negative))


# What works on the conditions


def hooked(prompt: list, lora: str = LORA) -> list:
    """A prompt with a LoRA hook that begins in the middle."""
    hooks = nodes_hooks.CreateHookLoraModelOnly().create_hook_model_only(lora, 1.0)[0]
    first = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(0.0, 0.0)[0]
    frames = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(1.0, 0.5, first)[0]
    hooks = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
    return nodes_hooks.ConditioningSetProperties().set_properties(prompt, 1.0, "default", hooks=hooks)[0]


@row("LoRA hooks with keyframes", 2, 1)
def hooks(agd, base, _=""):
    return ksampler(agd(base), Prompts(hooked(PROMPTS.positive), PROMPTS.negative))


@row("GLIGEN", 2, 1)
def boxes(agd, base, _=""):
    apply = nodes.GLIGENTextBoxApply().append
    positive = apply(PROMPTS.positive, clip(), gligen(), "red circle", 32, 32, 8, 16)[0]
    return ksampler(agd(base), Prompts(positive, PROMPTS.negative))


def controlled(*nets, strength: float = 1.0) -> Prompts:
    positive, negative = PROMPTS.positive, PROMPTS.negative
    for net in nets:
        apply = nodes.ControlNetApplyAdvanced().apply_controlnet
        positive, negative = apply(positive, negative, net, PICTURE, strength, 0.0, 1.0)
    return Prompts(positive, negative)


@row("ControlNet", 2, 1)
def control(agd, base, _=""):
    return ksampler(agd(base), controlled(control_net()))


@row("Two chained ControlNets", 2, 1)
def two_controls(agd, base, _=""):
    return ksampler(agd(base), controlled(control_net(), control_net(1)))


@row("ControlNet on the positive only", 2, 1)
def control_on_positive(agd, base, _=""):
    return ksampler(agd(base), Prompts(controlled(control_net()).positive, PROMPTS.negative))


# Nodes that change the model


def load_lora(model, name: str = LORA):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]


@row("LoRA, before or after the loader", 2, 1, AROUND)
def lora(agd, base, where):
    return ksampler(placed(where, agd, load_lora, base), PROMPTS, steps=2)


@functools.cache
def other_model():
    return tiny(TwoWidths(), seed=1)


@row("Model merging, before or after the loader", 2, 1, AROUND)
def merging(agd, base, where):
    def merge(model):
        return nodes_model_merging.ModelMergeSimple().merge(model, other_model(), 0.6)[0]

    return ksampler(placed(where, agd, merge, base), PROMPTS, steps=1)


NODES = {
    "FreeU": lambda m: nodes_freelunch.FreeU.execute(m, 1.3, 1.4, 0.9, 0.2).args[0],
    "FreeU_V2": lambda m: nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2).args[0],
    "HyperTile": lambda m: nodes_hypertile.HyperTile.execute(m, 32, 2, 1, False)[0],
    "Deep Shrink": lambda m: nodes_model_downscale.PatchModelAddDownscale.execute(
        m, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"
    ).args[0],
    "Epsilon Scaling": lambda m: nodes_eps.EpsilonScaling.execute(m, 1.1).args[0],
    "TSR": lambda m: nodes_eps.TemporalScoreRescaling.execute(m, 0.9, 1.0).args[0],
    "CFGNorm": lambda m: nodes_cfg.CFGNorm.execute(m, 1.0).args[0],
    "PAG": lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0).args[0],
    "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
    "NAGuidance": lambda m: nodes_nag.NAGuidance.execute(m, 5.0, 0.5, 1.5).args[0],
    "SelfAttentionGuidance": lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0).args[0],
    "APG": lambda m: nodes_apg.APG.execute(m, 0.5, 5.0, 0.0).args[0],
    "TCFG": lambda m: nodes_tcfg.TCFG.execute(m).args[0],
    "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m).args[0],
    "CFGZeroStar": lambda m: nodes_cfg.CFGZeroStar.execute(m).args[0],
    "CFGNorm, pre_cfg": lambda m: nodes_cfg.CFGNorm.execute(m, 1.0, pre_cfg=True).args[0],
    "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.5, 3).args[0],
    "PerpNeg": lambda m: nodes_perpneg.PerpNeg.execute(m, random_prompts(lengths=(16, 32)).negative, 1.0).args[0],
    "CFGOverride": lambda m: custom.CFGOverride.execute(m, 3.0, 0.0, 0.5).args[0],
    "attn2 replacement": lambda m: ImagePrompt().install(m),
}


WORKS_BESIDE = ("FreeU", "FreeU_V2", "HyperTile", "Deep Shrink", "Epsilon Scaling", "TSR", "PAG", "attn2 replacement")


def beside(name: str):
    """The workflow with the node `name` before or after the loader."""
    at = latent(1, 16, 16)
    return lambda agd, base, where: ksampler(placed(where, agd, NODES[name], base), PROMPTS, at=at, steps=2)


for what, without, with_agd, name, needs_both in (
    ("FreeU", 2, 1, "FreeU", None),
    ("FreeU_V2", 2, 1, "FreeU_V2", None),
    ("HyperTile", 2, 1, "HyperTile", None),
    ("Kohya Deep Shrink (PatchModelAddDownscale)", 2, 1, "Deep Shrink", None),
    ("Epsilon Scaling", 2, 1, "Epsilon Scaling", None),
    ("TSR", 2, 1, "TSR", None),
    ("CFGOverride", 2, 1, "CFGOverride", None),
    ("attn2 replacement, as IP-Adapter packs install it", 2, 1, "attn2 replacement", None),
    ("PerturbedAttentionGuidance (PAG)", 3, 2, "PAG", None),
    ("CFGNorm", 2, 2, "CFGNorm", "CFGNorm"),
    ("CFGNorm with `pre_cfg`", 2, 2, "CFGNorm, pre_cfg", "CFGNorm"),
    ("RescaleCFG", 2, 2, "RescaleCFG", "RescaleCFG"),
    ("NAGuidance (NAG)", 2, 2, "NAGuidance", "NAGuidance"),
    ("SelfAttentionGuidance (SAG)", 3, 3, "SelfAttentionGuidance", "SelfAttentionGuidance"),
    ("PerpNeg", 3, 3, "PerpNeg", "PerpNeg"),
    ("APG", 2, 2, "APG", "APG"),
    ("TCFG", 2, 2, "TCFG", "TCFG"),
    ("Mahiro", 2, 2, "Mahiro", "Mahiro"),
    ("CFGZeroStar", 2, 2, "CFGZeroStar", "CFGZeroStar"),
    ("FreSca", 2, 2, "FreSca", "FreSca"),
):
    new = what in ("CFGOverride", "CFGNorm with `pre_cfg`")
    # With evaluations of their own, beside PAG's the prompt's where both are forecast; or with both in every step.
    own = {"PAG": 1 + 2 * SMOOTH + (1 - SMOOTH), "PerpNeg": 3, "SelfAttentionGuidance": 3}
    own = {**own, "NAGuidance": 2, "Mahiro": 2, "CFGZeroStar": 2, "CFGOverride": 4 / 3}.get(name)
    kind = {"needs_both": needs_both, "since": "0.26.0" if new else None, "training_free": own, "warns": name == "PAG"}
    row(what, without, with_agd, AROUND, **kind)(beside(name))


# The loader itself


@row("cfg 1", 1, 1, as_base=True, training_free=1)
def cfg_1(agd, base, _):
    return ksampler(agd(base), PROMPTS, cfg=1.0)


@row("Strength 0", 2, 2, as_base=True, training_free=2)
def strength_0(agd, base, _):
    return ksampler(agd(base, strength=0.0), PROMPTS)


@row("Steps outside `start_percent` and `end_percent`", 2, 1.5, training_free=5 / 3)
def part_of_the_sampling(agd, base, _):
    return ksampler(agd(base, end_percent=0.5), PROMPTS)


@row("Two loaders in a row, at strength 0.5 each", 2, 1, training_free=0)
def two_loaders(agd, base, _=""):
    return ksampler(agd(agd(base, strength=0.5), strength=0.5), PROMPTS)


@row("Two loaders in a row, one for each part of the sampling", 2, 1, training_free=0)
def two_parts(agd, base, _=""):
    return ksampler(agd(agd(base, end_percent=0.5), start_percent=0.5), PROMPTS)


DTYPES = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8, computed in fp32": (torch.float8_e4m3fn, torch.float32),
    "fp8, computed in fp16": (torch.float8_e4m3fn, torch.float16),
    "fp8, computed in bf16": (torch.float8_e4m3fn, torch.bfloat16),
}


@row("Bases in fp32, fp16, bf16 and fp8", 2, 1, tuple(DTYPES))
def dtype(agd, base, name):
    return ksampler(agd(in_dtype(base, TwoWidths, *DTYPES[name])), PROMPTS, steps=2)


ROWS.append(Row("torch.compile (TorchCompileModel)", 2, 1, run=None, variants=()))
