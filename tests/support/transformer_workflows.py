"""The rows of docs/compatibility.md about transformers, as `workflows.py` has those about UNets.

A variant is a family of `tiny_families.py`, with ", before" or ", after" where another node is before or after the
loader.
"""

import comfy.sd
import nodes
import torch
from comfy_extras import nodes_cfg, nodes_context_windows, nodes_differential_diffusion, nodes_model_advanced, nodes_slg
from comfy_extras.nodes_torch_compile import TorchCompileModel

from comfyui_agd.agd_core.comfyui.fused_attention import FUSED_ATTENTION
from comfyui_agd.agd_core.lora import lora as lora_of

from .family_adapters import adapter_of
from .runtime import STEPS, Prompts, ksampler, ksampler_advanced
from .tiny_controls import CONTROL_PATCHES, TINY_CONTROLS, controlled, with_control_patch
from .tiny_families import TINY_FAMILIES, conditioning, empty_latent
from .workflows import SMOOTH, Row, placed

JOINT, CROSS = "sd3", "wan2.1-t2v"  # in whose attentions the prompt is beside the image, and apart
BOTH = (JOINT, CROSS)
EDITING = ("flux2", "qwen-image", "omnigen2")
TRANSFORMER_ROWS: list[Row] = []


def row(what: str, without: float, with_agd: float, variants=BOTH, **kind):
    def register(run):
        TRANSFORMER_ROWS.append(Row(what, without, with_agd, run, tuple(variants), **kind))
        return run

    return register


def around(*families: str) -> tuple[str, ...]:
    return tuple(f"{family}, {where}" for family in families for where in ("before", "after"))


def prompts(family: str, positive: str = "a fox") -> Prompts:
    return Prompts(conditioning(family, positive), conditioning(family, "blurry, dark"))


def noise(family: str) -> dict:
    return {"samples": torch.randn(1, *TINY_FAMILIES[family].latent, generator=torch.Generator().manual_seed(0))}


def sample(family: str, model, given: Prompts | None = None, **options) -> torch.Tensor:
    return ksampler(model, given or prompts(family), **{"at": empty_latent(family), **options})


def beside(node):
    """The workflow with a node before or after the loader."""

    def run(agd, base, variant):
        family, where = variant.split(", ")
        return sample(family, placed(where, agd, lambda model: node(family, model), base))

    return run


@row("Samplers", 2, 1, [f"{family}, {name}" for family in BOTH for name in ("euler_ancestral", "dpmpp_2m", "uni_pc")])
def sampler(agd, base, variant):
    family, name = variant.split(", ")
    return sample(family, agd(base), sampler=name)


@row("KSampler (Advanced), split in two with leftover noise", 2, 1, training_free=4 / 3)
def split(agd, base, family):
    model, given = agd(base), prompts(family)
    first = ksampler_advanced(model, given, empty_latent(family), 0, STEPS // 2)
    return ksampler_advanced(model, given, first, STEPS // 2)["samples"]


@row("Image to image, denoise below 1", 2, 1)
def image_to_image(agd, base, family):
    return sample(family, agd(base), at=noise(family), denoise=0.5)


@row("Inpainting masks", 2, 1)
def inpainting(agd, base, family):
    mask = torch.linspace(0, 1, 64)[None, None, :].expand(1, 64, 64).clone()
    mask[..., :24] = 0
    at = nodes.SetLatentNoiseMask().set_mask(noise(family), mask)[0]
    return sample(family, nodes_differential_diffusion.DifferentialDiffusion.execute(agd(base)).args[0], at=at)


@row("Reference latents", 2, 1, EDITING)
def reference_latents(agd, base, family):
    given, reference = prompts(family), noise(family)["samples"]
    for _, entries in (*given.positive, *given.negative):
        entries["reference_latents"] = [reference]
    return sample(family, agd(base), given)


@row("Start image of a video", 2, 1, ("wan2.1-i2v",))
def start_image(agd, base, family):
    given, start = prompts(family), noise(family)["samples"]
    for _, entries in (*given.positive, *given.negative):
        entries["concat_latent_image"] = start
        entries["concat_mask"] = torch.zeros(1, 1, *start.shape[2:])
    return sample(family, agd(base), given)


@row("Batches", 2, 1)
def batch(agd, base, family):
    return sample(family, agd(base), at=empty_latent(family, 2))


@row("Context windows", 4, 2, (CROSS,), since="0.26.0")
def context_windows(agd, base, family):
    """Of two frames of latents, three of them."""
    node = nodes_context_windows.ContextWindowsManualNode
    windows = node.execute(agd(base), 2, 1, "standard_static", 1, False, "pyramid", 2, False).args[0]
    return sample(family, windows, at={"samples": torch.zeros(1, 16, 3, 8, 8)})


@row("ConditioningCombine", 3, 2)
def combine(agd, base, family):
    given, other = prompts(family), prompts(family, "a dog")
    return sample(family, agd(base), Prompts(given.positive + other.positive, given.negative))


@row("Regional prompts: masks", 3, 2)
def masks(agd, base, family, **options):
    given, other, left = prompts(family), prompts(family, "a dog"), torch.zeros(1, 64, 64)
    left[..., :32] = 1
    set_mask = nodes.ConditioningSetMask().append
    halves = [set_mask(each.positive, mask, "default", 1.0)[0] for each, mask in ((given, left), (other, 1 - left))]
    return sample(family, agd(base), Prompts(halves[0] + halves[1], given.negative), **options)


@row("ControlNet", 2, 1, TINY_CONTROLS)
def control(agd, base, name):
    family = TINY_CONTROLS[name].family
    return sample(family, agd(base), controlled(name, prompts(family)))


row("ControlNet in the model: DiffSynth, Fun, LLLite, Uni3C", 2, 1, around(*CONTROL_PATCHES))(
    beside(with_control_patch)
)


@row("LoRA, before or after the loader", 2, 1, around(*BOTH))
def lora(agd, base, variant):
    def load(family, model):
        other = lora_of(*adapter_of(family, "low_rank", vector=0), 2.0)
        return comfy.sd.load_lora_for_models(model, None, other, 1.0, 0.0)[0]

    return beside(load)(agd, base, variant)


def _shifted(family, model):
    return nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)[0]


row("ModelSamplingSD3", 2, 1, around(*BOTH))(beside(_shifted))


def _skipping(family, model):
    return nodes_slg.SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1").args[0]


row("SkipLayerGuidanceDiT (SLG)", 3, 2, around(*BOTH), training_free=2 + SMOOTH, warns=True)(beside(_skipping))


def _zero_star(family, model):
    return nodes_cfg.CFGZeroStar.execute(model).args[0]


row("CFGZeroStar", 2, 2, around(*BOTH), needs_both="CFGZeroStar", training_free=2)(beside(_zero_star))


@row("The `*_cfg_pp` samplers", 2, 2, needs_both="the sampler euler_cfg_pp", training_free=2)
def cfg_pp(agd, base, family):
    return sample(family, agd(base), sampler="euler_cfg_pp")


@row("cfg 1", 1, 1, as_base=True, training_free=1)
def cfg_1(agd, base, family):
    return sample(family, agd(base), cfg=1.0)


@row("Strength 0", 2, 2, as_base=True, training_free=2)
def strength_0(agd, base, family):
    return sample(family, agd(base, strength=0.0))


def _compiled(family, model):
    """With PyTorch's attention, as on NVIDIA cards: ComfyUI's for CPUs breaks graphs."""
    compiled = TorchCompileModel.execute(model, "eager").args[0]
    compiled.model_options["transformer_options"].update(FUSED_ATTENTION)
    return compiled


row("torch.compile (TorchCompileModel)", 2, 1, around(*BOTH))(beside(_compiled))
