"""The methods that `quality.py` compares: what each is in a line, and how to get it ready. Adding one is one entry."""

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
from comfyui_agd.agd_core.adapter_file import replacing
from comfyui_agd.agd_core.alternating import AGREES, NEAR
from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.sampling.guided_sampling import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.training_free import alternate
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import baselines
from comfyui_agd.benchmarks.lab import CFG, Lab, Prompts, Ready
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.evaluate import Evaluation, TrajectoryState, evaluate, omegas_of
from comfyui_agd.training.model import EncodedPrompts
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train

# Adapters whose width can be chosen have at most this share of the base's parameters, in percent.
BUDGET = 5.0
OURS = {"kind": "delta", "rank": 4}
DELTA = {**OURS, "rank": 0}
# Widths of an encoder of omega and t that leave something of a budget of so many percent for the rest, and ranks.
SMALL_ENCODERS = {1: 8, 2: 16}
_SMALL_RANKS = {1: 1, 2: 2}
# The paper's choice of what can be switched; the adapter's form stays ours (docs/method.md).
PAPER_SETTINGS = {
    "gain": False,
    "omega_embedding": "fourier",
    "shared_encoder": False,
    "loss": "plain",
    "omega_sampling": "uniform",
}


@dataclass(frozen=True)
class Method:
    """`make(lab, name)` trains it unless the work folder has it. `omegas`: None is those of the run."""

    what: str
    make: Callable[[Lab, str], Ready]
    omegas: tuple[float, ...] | None = None


def sampled(
    patch: Callable[[comfy.model_patcher.ModelPatcher], comfy.model_patcher.ModelPatcher], **settings
) -> Callable[[Lab, str], Ready]:
    """The base itself, sampled in another way. `settings`: what another value of gives other pictures."""
    return lambda lab, name: Ready(patch(lab.parts.model), {"sampling": settings})


def ruled(patch: Callable, rule: GuidanceRule) -> Callable[[Lab, str], Ready]:
    """The base, with both passes combined by a teacher's rule."""
    return sampled(lambda model: patch(model, rule), way=patch.__name__, rule=dataclasses.asdict(rule))


def adapter(
    settings: dict,
    *,
    hears_negative: bool,
    partial: bool = False,
    percent: float = BUDGET,
    learning_rates: tuple[float, ...] = (2e-3,),
) -> Callable[[Lab, str], Ready]:
    """An adapter trained with these settings; of several learning rates the best one's.

    `hears_negative`: whether to learn from random negative prompts too. Those that ignore them learn from empty
    ones only: what differs by something unseen could only blur what they learn. `partial`: whether from captions
    that leave something open, too.
    """

    def make(lab: Lab, name: str) -> Ready:
        hidden = widest(lab, settings, percent)
        configs = [lab.train_config(**settings, hidden=hidden, learning_rate=rate) for rate in learning_rates]
        prompts = lab.prompts(negatives=hears_negative, partial=partial)
        config, file = _best(lab, name, configs, prompts, train_adapter)
        info, state = adapter_file.load_state(file)
        model = apply_adapter(lab.parts.model, info, state, source=file.name)
        ready = measured(lab, model, info, state, {"weights": checksum(file)}, config.rule)
        return dataclasses.replace(ready, file=file)

    return make


def untrained(lab: Lab, name: str) -> Ready:
    """The adapter that AGD Adapter Loader has without a file."""
    info, state = attention_guidance(lab.host().base)
    model = apply_adapter(lab.parts.model, info, state, source=name)
    return measured(lab, model, info, state, {"attention-guidance": _sum_of(state)})


def nag(lab: Lab, name: str) -> Ready:
    patched = baselines.normalised(lab.parts.model, lab.host().base)
    return Ready(patched, {"nag": [baselines.NAG_TAU, baselines.NAG_ALPHA]})


def measured(lab: Lab, model, info, state: dict, identity: dict, rule: GuidanceRule = CFG) -> Ready:
    adapter, denoiser = Adapter(info.config).eval().requires_grad_(False), lab.host().denoiser
    adapter.load_state_dict(state)
    adapter.to(denoiser.device)

    def at(states: Sequence[TrajectoryState]) -> Evaluation:
        with denoiser.session():
            return evaluate(denoiser, adapter, states)

    return Ready(model, identity, adapter.parameter_count(), at, rule)


def _sum_of(state: dict[str, torch.Tensor]) -> float:
    return sum(value.double().sum().item() for value in state.values())


def meng(lab: Lab, name: str) -> Ready:
    """Full-model guidance distillation."""
    configs = [lab.train_config(learning_rate=rate) for rate in (5e-4, 1e-4)]
    _, file = _best(lab, name, configs, lab.prompts(negatives=False), _train_model)
    student = baselines.GuidedModel.of_base(lab.host().denoiser.device)
    student.unet.load_state_dict(load_file(file))
    student.unet.requires_grad_(False)
    count = sum(parameter.numel() for parameter in student.unet.parameters())
    identity = {"weights": checksum(file)}
    return Ready(student.patcher(), identity, count, lambda states: evaluate(student, None, states))


def widest(lab: Lab, settings: dict, percent: float, width: int | None = None) -> int:
    """The `hidden` with which an adapter of sites of that `width` just stays within that share of the base's."""
    base, fits = lab.host(width).base, 0
    step = 4 if settings["kind"] == "cross_attention" else 1  # its heads share the width
    for hidden in range(step, 513, step):
        config = lab.train_config(**settings, hidden=hidden).adapter_config(base, prompt_tokens=1)
        with torch.device("meta"):
            if Adapter(config).parameter_count() > percent / 100 * lab.base_parameters:
                break
        fits = hidden
    if not fits:
        raise ValueError(f"No width of {settings} has as few parameters as {percent:g} % of the base's.")
    return fits


def _best(lab: Lab, name: str, configs: list[TrainConfig], prompts: Prompts, train_to: Callable) -> tuple:
    """(config, file) of the one that closes most of the gap on captions kept for this choice; trains what is missing.

    `train_to(lab, config, prompts, file, captions)` writes the file and returns the gap closed on those captions, or
    None where the training diverged.
    """
    found = []
    configs = configs if lab.sizes.tuned else configs[-1:]
    captions = lab.choice_captions if len(configs) > 1 else []
    for config in configs:
        gap, file = trained(lab, f"{name}-lr{config.learning_rate:g}", config, prompts, captions, train_to)
        if gap is not None:
            found.append((gap, config, file))
    if not found:
        raise FloatingPointError(f"{name} diverged at every learning rate.")
    return max(found, key=lambda each: each[0])[1:]


def trained(
    lab: Lab,
    stem: str,
    config: TrainConfig,
    prompts: Prompts,
    captions: list[str],
    train_to: Callable,
    **settings,
) -> tuple[float | None, Path]:
    """(gap closed on `captions`, file) of what `train_to` trains, unless the work folder has it; `settings` are its."""
    file, note = (lab.work.path("models", stem + suffix) for suffix in (".safetensors", ".json"))
    told = {"config": config.result_settings(), **prompts._asdict()} | settings
    identity = json.loads(json.dumps(told))
    with lab.work.alone("models", stem):
        known = json.loads(note.read_text()) if note.exists() else {}
        if known.get("identity") != identity or not (file.exists() or known["gap_closed"] is None):
            gap = train_to(lab, config, prompts, file, captions, **settings)
            known = {"identity": identity, "gap_closed": gap}
            with replacing(note) as temporary:
                Path(temporary).write_text(json.dumps(known))
    return known["gap_closed"], file


def train_adapter(
    lab: Lab, config: TrainConfig, prompts: Prompts, file: Path, captions: list[str], width: int | None = None
) -> float | None:
    """The gap closed on `captions`, or None where the training diverged. `width`: of the only sites to adapt."""
    # Trajectories that the student moves on can't be recorded.
    recording, texts = (None, prompts.captions) if config.on_policy else lab.recording(config, prompts)
    # A run that was stopped goes on from its folder.
    known = recording.checksum() if recording else None
    named = json.dumps([config.result_settings(), prompts.negatives, captions, known])
    run = file.with_name(f"{file.stem}-{hashlib.sha256(named.encode()).hexdigest()[:12]}.run")
    with tqdm(desc=f"training {file.stem}", total=config.iterations, leave=False) as bar:

        def show(progress) -> None:
            if progress.phase == "train":
                bar.update(progress.step - bar.n)

        how = {"negative": prompts.negatives, "held_out": captions, "folder": run, "recording": recording}
        try:
            found = train(lab.host(width), texts, config, Callbacks(show), options=RunOptions(**how))
        except FloatingPointError as error:
            tqdm.write(f"{file.stem}: {error}")
            return None
    adapter_file.save(file, found.adapter, found.info)
    shutil.rmtree(run)
    return found.evaluation.score if captions else 0.0


def _train_model(lab: Lab, config: TrainConfig, prompts: Prompts, file: Path, captions: list[str]) -> float | None:
    (recording, texts), base = lab.recording(config, prompts), lab.host()
    torch.manual_seed(config.seed)
    student, encoder = baselines.GuidedModel.of_base(base.denoiser.device), base.text_encoder
    encoded = EncodedPrompts(encoder.encode(texts), encoder.encode(prompts.negatives, "negative"))
    with tqdm(desc=f"training {file.stem}", total=config.iterations, leave=False) as bar:
        batches = recording.source(config, range(config.batch))
        try:
            baselines.distil_model(student, base.memory, encoded, batches, config, lambda step: bar.update())
        except FloatingPointError as error:
            tqdm.write(f"{file.stem}: {error}")
            return None
    with replacing(file) as temporary:
        save_file({key: value.contiguous() for key, value in student.unet.state_dict().items()}, temporary)
    if not captions:
        return 0.0
    states = lab.follow(captions, omegas_of(config), config.rule, seed=1)
    return evaluate(student, None, states).score


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


METHODS: dict[str, Method] = {
    "unguided": Method("the base without guidance", sampled(lambda model: model), omegas=(1.0,)),
    "cfg": Method("classifier-free guidance, two evaluations per step", sampled(lambda model: model)),
    "cfg_interval": Method(
        f"CFG at {CFG.sigma_min} < sigma <= {CFG.sigma_max}, one evaluation elsewhere (Kynkäänniemi et al. 2024)",
        ruled(baselines.limited_interval, CFG),
    ),
    "adaptive": Method(
        "Adaptive Guidance: no second evaluation once the cosine of both noise predictions is above "
        f"{baselines.AGREEMENT} (Castillo et al. 2023)",
        sampled(baselines.adaptive, agreement=baselines.AGREEMENT),
    ),
    **{
        f"teacher_{rule}": Method(
            f"the teacher of `delta_{rule}`, two evaluations per step",
            ruled(baselines.guided_by, GuidanceRule(rule)),
        )
        for rule in ("rescale", "apg", "cfg_zero")
    },
    "meng": Method("a copy of the whole base, fine-tuned with an embedding of omega (Meng et al. 2023)", meng),
    "static_lora": Method(
        "a LoRA on all linear layers of the blocks, of strength omega - 1",
        adapter({"kind": "low_rank", "modulated": False}, hears_negative=False, learning_rates=(2e-3, 5e-4)),
    ),
    **{
        f"paper_{kind}": Method(
            f"our re-implementation of the paper's {kind.replace('_', '-')} adapter (arXiv 2503.07274), which differs "
            "from the authors' own in size and form",
            adapter({"kind": kind, **PAPER_SETTINGS}, hears_negative=False, learning_rates=(1e-4, 2e-3)),
        )
        for kind in ("cross_attention", "offset")
    },
    "training_free": Method(
        "prompt and negative take turns, and CFG combines what was evaluated with what the steps around it tell of the "
        "other; nothing trained",
        sampled(alternate, way="alternating", near=NEAR, agrees=AGREES),
    ),
    "attention_guidance": Method("guidance in the attention with constants, nothing trained", untrained),
    "nag": Method(
        f"normalised attention guidance (Chen et al. 2025) in one evaluation: tau {baselines.NAG_TAU:g}, alpha "
        f"{baselines.NAG_ALPHA:g}, omega for its scale",
        nag,
    ),
    "calibrated": Method(
        "`attention_guidance` with a few numbers per channel, fitted in 150 iterations",
        adapter({"kind": "scale", "iterations": 150}, hears_negative=True, learning_rates=(2e-2,)),
    ),
    "ours": Method(f"the default adapter, at most {BUDGET:g} % of the base", adapter(OURS, hears_negative=True)),
    "ours_third": Method(
        "`ours` with a third of the iterations and teacher evaluations",
        adapter({**OURS, "iterations": 400}, hears_negative=True),
    ),
    "ours_longer": Method(
        "`ours` with three times the iterations and teacher evaluations",
        adapter({**OURS, "iterations": 3600}, hears_negative=True, learning_rates=(3e-3,)),
    ),
    **{
        f"ours_{percent}pct": Method(
            f"`ours`, at most {percent} %, with rank {_SMALL_RANKS[percent]}",
            adapter(
                {**OURS, "encoder_width": width, "rank": _SMALL_RANKS[percent]}, hears_negative=True, percent=percent
            ),
        )
        for percent, width in SMALL_ENCODERS.items()
    },
    "ours_open": Method(
        "`ours` with a quarter of the captions leaving something open",
        adapter(OURS, hears_negative=True, partial=True),
    ),
    "modulated": Method(
        "`ours` with its low-rank part modulated by t and omega",
        adapter({**OURS, "modulated": True}, hears_negative=True),
    ),
    "modulated_longer": Method(
        "`ours_longer` with its low-rank part modulated by t and omega",
        adapter({**OURS, "modulated": True, "iterations": 3600}, hears_negative=True, learning_rates=(3e-3,)),
    ),
    "delta": Method("`ours`, wider, without its low-rank part", adapter(DELTA, hears_negative=True)),
    "delta_longer": Method(
        "`ours_longer`, wider, without its low-rank part",
        adapter({**DELTA, "iterations": 3600}, hears_negative=True, learning_rates=(3e-3,)),
    ),
    **{
        f"delta_{rule}": Method(
            f"`delta`, learnt from the teacher `{rule}`", adapter({**DELTA, "teacher": rule}, hears_negative=True)
        )
        for rule in ("interval", "rescale", "apg", "cfg_zero")
    },
}
QUICK = ("unguided", "cfg", "cfg_interval", "adaptive", "teacher_apg", "meng", "paper_cross_attention", "ours")
