"""The methods that `frontier.py` compares, each at several settings. Adding one is one entry of `FRONTIER`."""

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_patcher
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.forecast import MOST_IN_A_ROW, TOLERANCE
from comfyui_agd.benchmarks import sparse_guidance, step_caches
from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt, ToyExperiment
from comfyui_agd.benchmarks.methods import METHODS
from comfyui_agd.benchmarks.sparse_guidance import AGREEMENT, LinearEstimate, SparseGuidance
from comfyui_agd.benchmarks.step_caches import AS_PUBLISHED, SpectrumSettings
from comfyui_agd.examples.toy.sampling import BATCH, encode, sample_latents

ADAPTER = "ours"  # the one that is combined with caches
FEWEST, MOST = 4, 30
ADAPTER_STEPS = (FEWEST, 5, 6, 8, 10, 15, 20, MOST)
_FIT_SEED = 110_000

Model = comfy.model_patcher.ModelPatcher


class Group(enum.Enum):
    """Whose a method is; the value names it in tables."""

    CFG = "CFG"
    WITHOUT_US = "others"
    TRAINING_FREE = "training-free"
    ADAPTER = "adapter"
    ADAPTER_WITH_CACHE = "adapter with a cache"


class FrontierStudy:
    """`experiment`: its pictures; `trained`: an experiment whose work folder `quality.py`'s adapters are in."""

    def __init__(self, experiment: ToyExperiment, trained: ToyExperiment):
        self.experiment, self.trained = experiment, trained

    @functools.cache  # noqa: B019, a study lives as long as its process
    def adapter(self, name: str) -> PreparedMethod:
        """One of `METHODS`, trained if it is missing."""
        return METHODS[name].prepare(self.trained, name)

    @functools.cache  # noqa: B019
    def forecasting(self, name: str) -> PreparedMethod:
        """The same as AGD Adapter Loader has it with `forecast`."""
        adapter = self.adapter(name)
        info, weights = adapter_file.load_weights(adapter.file)
        model = apply_adapter(self._base, info, weights, GuidanceSettings(forecast=True), source=adapter.file.name)
        return PreparedMethod(model, adapter.identity | {"forecast": [TOLERANCE, MOST_IN_A_ROW]})

    def linear_weights(self, at: SampledAt) -> Sequence[torch.Tensor]:
        """LinearAG's, fitted to one batch of CFG's samplings in this setting, of captions that the training had."""
        rows = min(BATCH, 4 * self.experiment.sizes.pictures)
        identity = {"omega": at.omega, "steps": at.steps, "rows": rows} | at.named

        def make() -> dict[str, torch.Tensor]:
            guidance, model = SparseGuidance(sparse_guidance.always, sparse_guidance.no_guidance), self._base.clone()
            model.set_model_sampler_calc_cond_batch_function(guidance)
            clip, captions = self.experiment.parts.clip, self.experiment.training_captions()[:rows]
            positive, negative = encode(clip, captions)[0], encode(clip, [""])[0]
            sample_latents(model, positive, negative, at.settings(_FIT_SEED, self.experiment.base))
            weights = sparse_guidance.fit_weights(guidance.history)
            return {f"{index:03}": each for index, each in enumerate(weights)}

        name = "-".join(map(str, [f"omega{at.omega:g}-steps{at.steps}", *at.named.values()]))
        kept = self.experiment.work.tensors("linear_ag", name, identity, make)
        return [kept[key] for key in sorted(kept)]

    @property
    def _base(self) -> Model:
        return self.experiment.parts.model


Prepare = Callable[[FrontierStudy, SampledAt], PreparedMethod]


@dataclass(frozen=True)
class Setting:
    """A point of a method's curve. `name`: in tables and of files, beside the number of steps."""

    steps: int
    prepare: Prepare
    name: str = ""

    @property
    def title(self) -> str:
        return f"{self.steps} steps, {self.name}" if self.name else f"{self.steps} steps"


@dataclass(frozen=True)
class FrontierMethod:
    """`of_unets`: whether it has no effect on the toy transformer. ComfyUI's EasyCache has none: the network of SD 3.5
    doesn't call the wrappers that it needs (DIFFUSION_MODEL)."""

    what: str
    group: Group
    settings: tuple[Setting, ...]
    of_unets: bool = False


def on_base(patch: Callable[..., Model], *values: Any, **identity: Any) -> Prepare:
    """The base, sampled in another way: `patch(model, *values)`. `identity`: what another value of gives others."""

    def prepare(study: FrontierStudy, at: SampledAt) -> PreparedMethod:
        return PreparedMethod(patch(study.experiment.parts.model, *values), {"sampling": identity})

    return prepare


def from_methods(name: str) -> Prepare:
    """A method of `quality.py`."""
    return lambda study, at: study.adapter(name)


def on_adapter(patch: Callable[..., Model], *values: Any, **identity: Any) -> Prepare:
    """`ADAPTER`, sampled in another way."""

    def prepare(study: FrontierStudy, at: SampledAt) -> PreparedMethod:
        adapter = study.adapter(ADAPTER)
        return PreparedMethod(patch(adapter.model, *values), adapter.identity | {"sampling": identity})

    return prepare


def forecasting(name: str) -> Prepare:
    """An adapter of `quality.py`, with `forecast`."""
    return lambda study, at: study.forecasting(name)


def at_steps(prepare: Prepare, *counts: int) -> tuple[Setting, ...]:
    return tuple(Setting(steps, prepare) for steps in counts)


On = Callable[..., Prepare]  # on_base or on_adapter


def easy(on: On, *points: tuple[int, float]) -> tuple[Setting, ...]:
    """EasyCache with (steps, threshold)."""
    made = ((steps, value, on(step_caches.easy_cache, value, easy_cache=value)) for steps, value in points)
    return tuple(Setting(steps, prepare, f"threshold {value:g}") for steps, value, prepare in made)


def lazy(on: On, *points: tuple[int, float]) -> tuple[Setting, ...]:
    """LazyCache with (steps, threshold)."""
    made = ((steps, value, on(step_caches.lazy_cache, value, lazy_cache=value)) for steps, value in points)
    return tuple(Setting(steps, prepare, f"threshold {value:g}") for steps, value, prepare in made)


def spectrum(on: On, *points: tuple[int, str, SpectrumSettings]) -> tuple[Setting, ...]:
    """Spectrum with (steps, name, settings)."""
    return tuple(
        Setting(steps, on(step_caches.spectrum, own, spectrum=asdict(own)), name) for steps, name, own in points
    )


def sparse(when: Callable[[Any], Any], estimate: Any, points: Sequence[tuple[int, Any]], text: str = "{:g}"):
    """Guidance with fewer evaluations of the negative: `when(value)` of (steps, value)."""

    def setting(steps: int, value: Any) -> Setting:
        how = {"when": f"{when.__name__} {value}", "estimate": estimate.__name__}
        return Setting(steps, on_base(sparse_guidance.sparse, when(value), estimate, **how), text.format(value))

    return tuple(setting(*point) for point in points)


def linear_guidance(until: float) -> Prepare:
    """LinearAG: evaluated at every other step before `until`, a share of the schedule; no guidance after it."""

    def prepare(study: FrontierStudy, at: SampledAt) -> PreparedMethod:
        estimate = LinearEstimate(study.linear_weights(at), until)
        model = sparse_guidance.sparse(study.experiment.parts.model, sparse_guidance.every(2, until), estimate)
        return PreparedMethod(model, {"sampling": {"linear_ag": until}})

    return prepare


def faster_cache(model: Model) -> Model:
    return sparse_guidance.sparse(model, sparse_guidance.faster_cache, sparse_guidance.growing_difference)


# Of ComfyUI's caches, whose default is 0.2: (steps, threshold).
_THRESHOLDS = ((20, 0.1), (20, 0.2), (20, 0.5), (20, 1.0), (30, 0.2), (30, 0.5))
# Of Spectrum. For few steps the warm-up is shorter than in its users' settings, which are for 25, and gaps are longer.
SHORT, SHORTER = SpectrumSettings(warm_up=6, last=2), SpectrumSettings(warm_up=3, last=1)
FASTER = SpectrumSettings(warm_up=5, window=3.0, flex=0.75, last=2)
FASTEST = SpectrumSettings(warm_up=2, window=3.0, flex=0.5, last=1)
_SPECTRUM = (
    (30, "users'", SpectrumSettings()),
    (20, "published", AS_PUBLISHED),
    (20, "short warm-up", SHORT),
    (20, "long gaps", FASTER),
    (15, "shorter warm-up", SHORTER),
    (10, "shorter warm-up", SHORTER),
    (10, "longer gaps", FASTEST),
    (8, "shorter warm-up", SHORTER),
)

FRONTIER: dict[str, FrontierMethod] = {
    "cfg": FrontierMethod(
        "CFG with fewer steps", Group.CFG, at_steps(from_methods("cfg"), 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
    ),
    "ours": FrontierMethod("the default adapter", Group.ADAPTER, at_steps(from_methods("ours"), *ADAPTER_STEPS)),
    "ours_longer": FrontierMethod(
        "the default adapter, three times the training",
        Group.ADAPTER,
        at_steps(from_methods("ours_longer"), *ADAPTER_STEPS),
    ),
    **{
        f"{name}_forecast": FrontierMethod(
            f"`{name}`, with AGD Adapter Loader's `forecast`",
            Group.ADAPTER_WITH_CACHE,
            at_steps(forecasting(name), *ADAPTER_STEPS),
        )
        for name in ("ours", "ours_longer")
    },
    "training_free": FrontierMethod(
        "`training-free`: CFG whose steps are forecast where that is accurate",
        Group.TRAINING_FREE,
        at_steps(from_methods("training_free"), 6, 10, 15, 20, 30),
    ),
    "easy_cache": FrontierMethod(
        "ComfyUI's EasyCache on CFG",
        Group.WITHOUT_US,
        easy(on_base, *_THRESHOLDS),
        of_unets=True,
    ),
    "lazy_cache": FrontierMethod(
        "ComfyUI's LazyCache on CFG",
        Group.WITHOUT_US,
        lazy(on_base, *_THRESHOLDS),
    ),
    "spectrum": FrontierMethod(
        "Spectrum on CFG (arXiv 2603.01623): the model's output forecast along Chebyshev polynomials; as its users "
        "have it, with shorter warm-ups and longer gaps, and as published",
        Group.WITHOUT_US,
        spectrum(on_base, *_SPECTRUM),
    ),
    "faster_cache": FrontierMethod(
        "FasterCache's CFG-Cache (arXiv 2410.19355): after a third of the steps the negative at every fifth, and "
        "between them its difference to the prompt, whose low, then high frequencies grow by a tenth with every step",
        Group.WITHOUT_US,
        at_steps(on_base(faster_cache, way="faster_cache"), 8, 10, 15, 20),
    ),
    "stale_difference": FrontierMethod(
        "the negative at every k-th step, between them its last difference to the prompt",
        Group.WITHOUT_US,
        sparse(
            sparse_guidance.every,
            sparse_guidance.same_difference,
            [(20, 2), (20, 3), (20, 5), (10, 2), (10, 3)],
            "k = {}",
        ),
    ),
    "every_other": FrontierMethod(
        "the negative at every k-th step, between them no guidance; k = 2 takes 1.5 evaluations per step",
        Group.WITHOUT_US,
        sparse(sparse_guidance.every, sparse_guidance.no_guidance, [(20, 2), (20, 4), (10, 2)], "k = {}"),
    ),
    "adaptive": FrontierMethod(
        "Adaptive Guidance (arXiv 2312.12487): no guidance once the cosine of both is above a threshold",
        Group.WITHOUT_US,
        sparse(
            sparse_guidance.until_agreement,
            sparse_guidance.no_guidance,
            [(20, 0.95), (20, 0.991), (20, AGREEMENT), (10, 0.991), (10, AGREEMENT)],
            "threshold {:g}",
        ),
    ),
    "linear_ag": FrontierMethod(
        "LinearAG (ibid.): every other negative is a sum of the predictions before, with fitted weights; as published "
        "in the first half of the steps with no guidance after it, or in all of them",
        Group.WITHOUT_US,
        tuple(
            Setting(steps, linear_guidance(until), name)
            for steps in (10, 20)
            for until, name in ((0.5, "first half"), (1.0, "all steps"))
        ),
    ),
    "early_only": FrontierMethod(
        "guidance in the first steps only (arXiv 2506.08351: Step AG), a share of them",
        Group.WITHOUT_US,
        sparse(
            sparse_guidance.first,
            sparse_guidance.no_guidance,
            [(20, 0.3), (20, 0.5), (10, 0.5), (10, 0.7)],
            "share {:g}",
        ),
    ),
    "thinned": FrontierMethod(
        "guidance on a coarser schedule (arXiv 2511.04117): the difference is evaluated at two fifths of the steps, "
        "further and further apart, and kept between them",
        Group.WITHOUT_US,
        sparse(
            sparse_guidance.thinned,
            sparse_guidance.same_difference,
            [(30, 0.4), (20, 0.4), (15, 0.4), (10, 0.4)],
            "share {:g}",
        ),
    ),
    "ours_easy_cache": FrontierMethod(
        "ComfyUI's EasyCache on the adapter",
        Group.ADAPTER_WITH_CACHE,
        easy(on_adapter, *_THRESHOLDS, (10, 0.2), (10, 0.5)),
        of_unets=True,
    ),
    "ours_lazy_cache": FrontierMethod(
        "ComfyUI's LazyCache on the adapter",
        Group.ADAPTER_WITH_CACHE,
        lazy(on_adapter, *_THRESHOLDS, (10, 0.2), (10, 0.5)),
    ),
    "ours_spectrum": FrontierMethod(
        "Spectrum on the adapter",
        Group.ADAPTER_WITH_CACHE,
        spectrum(on_adapter, *_SPECTRUM),
    ),
}


def methods_for(experiment: ToyExperiment) -> dict[str, FrontierMethod]:
    """Those that have an effect on its base."""
    unet = experiment.model().base.layout == "unet"
    return {name: method for name, method in FRONTIER.items() if unet or not method.of_unets}


QUICK = ("cfg", "ours", "easy_cache", "stale_difference", "ours_easy_cache")
