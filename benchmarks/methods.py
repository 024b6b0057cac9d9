"""The methods that `quality.py` compares: what each is in a line, and how to prepare it. Adding one is one entry."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.atomic import replacing
from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.model.sampler import guided_by
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
from comfyui_agd.agd_core.forecast import MOST_IN_A_ROW, TOLERANCE
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import baselines, sparse_guidance
from comfyui_agd.benchmarks.experiment import CFG, KEPT_STEPS, PreparedMethod, ToyExperiment, TrainingPrompts
from comfyui_agd.examples.toy.gap import CaptionTrajectories, teacher_states
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.gap import Evaluation, TrajectoryState, evaluate, omegas_of
from comfyui_agd.training.model import EncodedPrompts
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train

# Adapters whose width can be chosen have at most this share of the base's parameters, in percent.
BUDGET = 5.0
OURS = {"kind": "delta", "rank": 4}
DELTA = {**OURS, "rank": 0}
# What `OURS` is in a transformer: many more of its parameters are in linear layers.
IN_TRANSFORMERS = {"rank": 2, "vector": 32}
# Widths of an encoder of omega and t that leave something of a budget of so many percent for the rest, and ranks.
SMALL_ENCODERS = {1: 8, 2: 16}
_SMALL_RANKS = {1: 1, 2: 2}
# The adapters of the paper's authors, with the loss that they train by and the best of the learning rates that
# `ablation.py` tries.
AUTHORS = {
    kind: {"kind": kind, "loss": "plain", "omega_sampling": "uniform"} for kind in ("paper_attention", "paper_additive")
}
AUTHORS_RATE = 4e-3
# Of our adapters after the paper's: all that can be switched off.
PLAIN_SETTINGS = {
    "gain": False,
    "omega_embedding": "fourier",
    "shared_encoder": False,
    "loss": "plain",
    "omega_sampling": "uniform",
}
# Widths that a kind can have are multiples of this; of others any.
_WIDTH_STEPS = {"cross_attention": 4, "paper_attention": 2}


Prepare = Callable[[ToyExperiment, str], PreparedMethod]  # of an experiment and the method's name


@dataclass(frozen=True)
class Method:
    """`prepare` trains it unless the work folder has it. `omegas`: None is those of the run; `of_unets`: whether
    transformers have no place for it, or it is about the size of the UNet's adapter."""

    what: str
    prepare: Prepare
    omegas: tuple[float, ...] | None = None
    of_unets: bool = False


@dataclass(frozen=True)
class TrainingTask:
    """A training with this config on these prompts; its files have the `name`.

    `captions`: held out, to measure the gap on for a choice between several trainings; `width`: of the only layers that
    an adapter is for.
    """

    name: str
    config: TrainConfig
    prompts: TrainingPrompts
    captions: list[str]
    width: int | None = None

    @property
    def identity(self) -> dict:
        """As JSON has it: a result with another identity is of another training."""
        identity = {"config": self.config.result_settings(), **self.prompts._asdict()}
        return json.loads(json.dumps(identity | ({"width": self.width} if self.width else {})))


# Trains to a file. Returns the gap closed on the task's captions, or None where the training diverged.
TrainTo = Callable[[ToyExperiment, TrainingTask, Path], float | None]


def base_sampled(
    patch: Callable[[comfy.model_patcher.ModelPatcher], comfy.model_patcher.ModelPatcher], **settings
) -> Prepare:
    """The base itself, sampled in another way. `settings`: what another value of gives other pictures."""
    return lambda experiment, name: PreparedMethod(patch(experiment.parts.model), {"sampling": settings})


def base_guided(patch: Callable, rule: GuidanceRule) -> Prepare:
    """The base, with both passes combined by a teacher's rule."""
    return base_sampled(lambda model: patch(model, rule), way=patch.__name__, rule=dataclasses.asdict(rule))


def adapter(
    settings: dict,
    *,
    uses_negative: bool,
    partial: bool = False,
    percent: float = BUDGET,
    learning_rates: tuple[float, ...] = (2e-3,),
) -> Prepare:
    """An adapter trained with these settings; of several learning rates the best one's.

    `uses_negative`: whether to learn from random negative prompts too. Those that ignore them learn from empty
    ones only: what differs by something unseen could only blur what they learn. `partial`: whether from captions
    that leave something open, too.
    """

    def prepare(experiment: ToyExperiment, name: str) -> PreparedMethod:
        own = settings_in(experiment.model().base.layout, settings)
        hidden = widest(experiment, own, percent)
        configs = [experiment.train_config(**sized(own, hidden), learning_rate=rate) for rate in learning_rates]
        prompts = experiment.prompts(negatives=uses_negative, partial=partial)
        config, file = best_trained(experiment, name, configs, prompts, train_adapter)
        info, weights = adapter_file.load_weights(file)
        model = apply_adapter(experiment.parts.model, info, weights, source=file.name)
        identity = {"weights": checksum(file)}
        return dataclasses.replace(prepared(experiment, model, info, weights, identity), rule=config.rule, file=file)

    return prepare


def settings_in(layout: str, settings: dict = OURS) -> dict:
    """What `settings` are in a base of this layout."""
    return settings | IN_TRANSFORMERS if layout == "transformer" and OURS.items() <= settings.items() else settings


def untrained(experiment: ToyExperiment, name: str) -> PreparedMethod:
    """The adapter that AGD Adapter Loader has without a file."""
    info, weights = attention_guidance(experiment.model().base)
    model = apply_adapter(experiment.parts.model, info, weights, source=name)
    return prepared(experiment, model, info, weights, {"attention-guidance": _sum_of(weights)})


def nag(experiment: ToyExperiment, name: str) -> PreparedMethod:
    patched = baselines.normalised(experiment.parts.model, experiment.model().base)
    return PreparedMethod(patched, {"nag": [baselines.NAG_TAU, baselines.NAG_ALPHA]})


def prepared(experiment: ToyExperiment, model, info, weights: dict, identity: dict) -> PreparedMethod:
    """An adapter, its `info` and `weights`, that `model` is patched with."""
    adapter, denoiser = Adapter(info.config).eval().requires_grad_(False), experiment.model().denoiser
    adapter.load_state_dict(weights)
    adapter.to(denoiser.device)

    def at(states: Sequence[TrajectoryState]) -> Evaluation:
        with denoiser.session():
            return evaluate(denoiser, adapter, states)

    return PreparedMethod(model, identity, adapter.parameter_count(), at)


def _sum_of(weights: dict[str, torch.Tensor]) -> float:
    return sum(value.double().sum().item() for value in weights.values())


def meng(experiment: ToyExperiment, name: str) -> PreparedMethod:
    """Full-model guidance distillation."""
    configs = [experiment.train_config(learning_rate=rate) for rate in (5e-4, 1e-4)]
    _, file = best_trained(experiment, name, configs, experiment.prompts(negatives=False), _train_model)
    student = baselines.GuidedModel.of_base(experiment.model().denoiser.device)
    student.unet.load_state_dict(load_file(file))
    student.unet.requires_grad_(False)
    count = sum(parameter.numel() for parameter in student.unet.parameters())
    identity = {"weights": checksum(file)}
    return PreparedMethod(student.patcher(), identity, count, lambda states: evaluate(student, None, states))


def sized(settings: dict, size: int) -> dict:
    """With that width, or rank, of the adapter."""
    name = TrainConfig(kind=settings["kind"]).size_setting
    return settings | ({name: size} if name else {})


def widest(experiment: ToyExperiment, settings: dict, percent: float, width: int | None = None) -> int:
    """The size (`sized`) with which an adapter of layers of that `width` just stays within that share of the base's."""
    base, largest = experiment.model(width).base, 0
    step = _WIDTH_STEPS.get(settings["kind"], 1)
    for hidden in range(step, 513, step):
        config = experiment.train_config(**sized(settings, hidden)).adapter_config(base, prompt_tokens=1)
        with torch.device("meta"):
            if Adapter(config).parameter_count() > percent / 100 * experiment.base_parameters:
                break
        largest = hidden
    if not largest:
        raise ValueError(f"No width of {settings} has as few parameters as {percent:g} % of the base's.")
    return largest


def best_trained(
    experiment: ToyExperiment, name: str, configs: list[TrainConfig], prompts: TrainingPrompts, train_to: TrainTo
) -> tuple[TrainConfig, Path]:
    """(config, file) of what closes most of the gap on captions kept for this choice; trains what is missing."""
    found = []
    configs = configs if experiment.sizes.tuned else configs[-1:]
    captions = experiment.choice_captions if len(configs) > 1 else []
    for config in configs:
        task = TrainingTask(f"{name}-lr{config.learning_rate:g}", config, prompts, captions)
        gap, file = trained(experiment, task, train_to)
        if gap is not None:
            found.append((gap, config, file))
    if not found:
        raise FloatingPointError(f"{name} diverged at every learning rate.")
    return max(found, key=lambda each: each[0])[1:]


def trained(experiment: ToyExperiment, task: TrainingTask, train_to: TrainTo) -> tuple[float | None, Path]:
    """What `train_to` returns, and the file that it writes, unless the work folder has both."""
    file, note = (experiment.work.path("models", task.name + suffix) for suffix in (".safetensors", ".json"))
    with experiment.work.locked("models", task.name):
        known = json.loads(note.read_text()) if note.exists() else {}
        if known.get("identity") != task.identity or not (file.exists() or known["gap_closed"] is None):
            known = {"identity": task.identity, "gap_closed": train_to(experiment, task, file)}
            with replacing(note) as temporary:
                Path(temporary).write_text(json.dumps(known))
    return known["gap_closed"], file


def train_adapter(experiment: ToyExperiment, task: TrainingTask, file: Path) -> float | None:
    """A `TrainTo`. A training that was stopped goes on from its run folder."""
    config, prompts = task.config, task.prompts
    # Trajectories that the student moves on can't be recorded.
    recording, texts = (None, prompts.captions) if config.on_policy else experiment.recording(config, prompts)
    known = recording.checksum() if recording else None
    named = json.dumps([config.result_settings(), prompts.negatives, task.captions, known])
    run = file.with_name(f"{file.stem}-{hashlib.sha256(named.encode()).hexdigest()[:12]}.run")
    with tqdm(desc=f"training {file.stem}", total=config.iterations, leave=False) as bar:

        def show(progress) -> None:
            if progress.phase == "train":
                bar.update(progress.step - bar.n)

        options = RunOptions(prompts.negatives, task.captions, run, recording)
        try:
            found = train(experiment.model(task.width), texts, config, Callbacks(show), options)
        except FloatingPointError as error:
            tqdm.write(f"{file.stem}: {error}")
            return None
    adapter_file.save(file, found.adapter, found.info)
    shutil.rmtree(run)
    return found.evaluation.score if task.captions else 0.0


def _train_model(experiment: ToyExperiment, task: TrainingTask, file: Path) -> float | None:
    """A `TrainTo`, of a copy of the base."""
    config, base = task.config, experiment.model()
    recording, texts = experiment.recording(config, task.prompts)
    torch.manual_seed(config.seed)
    student, encoder = baselines.GuidedModel.of_base(base.denoiser.device), base.text_encoder
    encoded = EncodedPrompts(encoder.encode(texts), encoder.encode(task.prompts.negatives, "negative"))
    with tqdm(desc=f"training {file.stem}", total=config.iterations, leave=False) as bar:
        batches = recording.source(config, range(config.batch))
        try:
            baselines.distil_model(student, base.memory, encoded, batches, config, lambda step: bar.update())
        except FloatingPointError as error:
            tqdm.write(f"{file.stem}: {error}")
            return None
    with replacing(file) as temporary:
        save_file({key: value.contiguous() for key, value in student.unet.state_dict().items()}, temporary)
    if not task.captions:
        return 0.0
    wanted = CaptionTrajectories(task.captions, omegas_of(config), rule=config.rule, keep=KEPT_STEPS)
    return evaluate(student, None, teacher_states(experiment.model(), wanted)).score


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


METHODS: dict[str, Method] = {
    "unguided": Method("the base without guidance", base_sampled(lambda model: model), omegas=(1.0,)),
    "cfg": Method("classifier-free guidance, two evaluations per step", base_sampled(lambda model: model)),
    "cfg_interval": Method(
        f"CFG at {CFG.sigma_min} < sigma <= {CFG.sigma_max}, one evaluation elsewhere (Kynkäänniemi et al. 2024)",
        base_guided(sparse_guidance.limited_interval, CFG),
    ),
    "adaptive": Method(
        "Adaptive Guidance: no second evaluation once the cosine of both noise predictions is above "
        f"{sparse_guidance.AGREEMENT} (Castillo et al. 2023)",
        base_sampled(sparse_guidance.adaptive, agreement=sparse_guidance.AGREEMENT),
    ),
    **{
        f"teacher_{rule}": Method(
            f"the teacher of `delta_{rule}`, two evaluations per step",
            base_guided(guided_by, GuidanceRule(rule)),
        )
        for rule in ("rescale", "apg", "cfg_zero")
    },
    "meng": Method(
        "a copy of the whole base, fine-tuned with an embedding of omega (Meng et al. 2023)", meng, of_unets=True
    ),
    "static_lora": Method(
        "a LoRA on all linear layers of the blocks, of strength omega - 1",
        adapter({"kind": "low_rank", "modulated": False}, uses_negative=False, learning_rates=(2e-3, 5e-4)),
    ),
    **{
        kind: Method(
            f"the {kind.removeprefix('paper_')} adapter of the paper's authors (arXiv 2503.07274), as their code has "
            "it, trained by their loss",
            adapter(settings, uses_negative=False, learning_rates=(AUTHORS_RATE,)),
            of_unets=True,
        )
        for kind, settings in AUTHORS.items()
    },
    "training_free": Method(
        "CFG whose steps are forecast from earlier ones where that is accurate; nothing trained",
        base_sampled(apply_training_free, way="forecast", tolerance=TOLERANCE, in_a_row=MOST_IN_A_ROW),
    ),
    "attention_guidance": Method("guidance in the attention with constants, nothing trained", untrained),
    "nag": Method(
        f"normalised attention guidance (Chen et al. 2025) in one evaluation: tau {baselines.NAG_TAU:g}, alpha "
        f"{baselines.NAG_ALPHA:g}, omega for its scale",
        nag,
        of_unets=True,
    ),
    "calibrated": Method(
        "`attention_guidance` with a few numbers per channel, fitted in 150 iterations",
        adapter({"kind": "scale", "iterations": 150}, uses_negative=True, learning_rates=(2e-2,)),
    ),
    "ours": Method(f"the default adapter, at most {BUDGET:g} % of the base", adapter(OURS, uses_negative=True)),
    "ours_third": Method(
        "`ours` with a third of the iterations and teacher evaluations",
        adapter({**OURS, "iterations": 400}, uses_negative=True),
    ),
    "ours_longer": Method(
        "`ours` with three times the iterations and teacher evaluations",
        adapter({**OURS, "iterations": 3600}, uses_negative=True, learning_rates=(3e-3,)),
    ),
    "ours_reused": Method(
        "`ours` with three times the iterations and its own teacher evaluations, each state 12 times",
        adapter({**OURS, "iterations": 3600, "reuse": 12}, uses_negative=True),
    ),
    **{
        f"ours_{percent}pct": Method(
            f"`ours`, at most {percent} %, with rank {_SMALL_RANKS[percent]}",
            adapter(
                {**OURS, "encoder_width": width, "rank": _SMALL_RANKS[percent]}, uses_negative=True, percent=percent
            ),
            of_unets=True,
        )
        for percent, width in SMALL_ENCODERS.items()
    },
    "ours_open": Method(
        "`ours` with a quarter of the captions leaving something open",
        adapter(OURS, uses_negative=True, partial=True),
    ),
    "modulated": Method(
        "`ours` with its low-rank part modulated by t and omega",
        adapter({**OURS, "modulated": True}, uses_negative=True),
    ),
    "modulated_longer": Method(
        "`ours_longer` with its low-rank part modulated by t and omega",
        adapter({**OURS, "modulated": True, "iterations": 3600}, uses_negative=True, learning_rates=(3e-3,)),
    ),
    "delta": Method("`ours`, wider, without its low-rank part", adapter(DELTA, uses_negative=True)),
    "delta_longer": Method(
        "`ours_longer`, wider, without its low-rank part",
        adapter({**DELTA, "iterations": 3600}, uses_negative=True, learning_rates=(3e-3,)),
    ),
    **{
        f"delta_{rule}": Method(
            f"`delta`, learnt from the teacher `{rule}`", adapter({**DELTA, "teacher": rule}, uses_negative=True)
        )
        for rule in ("interval", "rescale", "apg", "cfg_zero")
    },
}


def methods_for(experiment: ToyExperiment) -> dict[str, Method]:
    """Those that have a place in its base."""
    unet = experiment.model().base.layout == "unet"
    return {name: method for name, method in METHODS.items() if unet or not method.of_unets}


QUICK = ("unguided", "cfg", "cfg_interval", "adaptive", "teacher_apg", "meng", "paper_attention", "ours")
