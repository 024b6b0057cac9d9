"""The one function that distils an adapter. The node, the command line and the demo all call it."""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..agd_core.adapter import Adapter
from ..agd_core.checkpoint import AdapterInfo, replacing
from ..agd_core.config import AdapterConfig
from ..agd_core.guidance import balanced_loss, plain_loss
from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .host import Host
from .pool import TrajectoryPool, ask_teacher

_LOSSES = {"balanced": balanced_loss, "plain": plain_loss}
_STATE_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration. `phase` is "rollout" (filling the pool) or "train".

    `loss` is the mean of the last 50 iterations', for a single one tells little.
    """

    phase: str
    step: int
    total: int
    loss: float | None = None


@dataclass(frozen=True)
class Callbacks:
    """What a caller hears of a run. Raising from `on_progress` stops it; its state is saved first."""

    on_progress: Callable[[Progress], None] = lambda progress: None


@dataclass
class Trained:
    """A finished adapter (its moving average, on the CPU) and what its file should say."""

    adapter: Adapter
    info: AdapterInfo
    losses: list[float] = field(default_factory=list)
    evaluation: Evaluation | None = None


class DifferentRun(ValueError):
    """A saved state belongs to a run with other settings."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0 at the end. `step` counts from 0."""
    rising = max(1, round(config.warmup * config.iterations))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, config.iterations - rising)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def split_prompts(prompts: Sequence[str], config: TrainConfig) -> tuple[list[str], list[str]]:
    """(training, held-out). At most a fifth is held out, and a lone prompt never. Raises where there is none."""
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("There are no prompts to train with; give at least one line of text.")
    count = min(config.held_out, len(prompts) // 5)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [prompts[i] for i in order[count:]], [prompts[i] for i in order[:count]]


def _run_identity(config: TrainConfig, prompts: Sequence[str], negative: Sequence[str], host: Host) -> dict:
    """What must be equal for a saved state to be this run's. `save_every` changes nothing of the result."""
    settings = {key: value for key, value in asdict(config).items() if key != "save_every"}
    identity = settings | {"prompts": list(prompts), "negative": list(negative), "base": host.base.fingerprint}
    return json.loads(json.dumps(identity))


class _Run:
    """All that changes while training, and how it is saved and restored."""

    def __init__(self, host: Host, config: TrainConfig, adapter_config: AdapterConfig, pool: TrajectoryPool):
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.adapter = Adapter(adapter_config).to(host.device)
        self.average = copy.deepcopy(self.adapter).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.pool, self.step, self.evaluations, self.losses = pool, 0, 0, []
        self.whole = False  # whether this is the state after an iteration, from which a run goes on unchanged

    def remember_unconditional(self, contexts: Sequence[torch.Tensor]) -> None:
        """`contexts`: (m, d) each."""
        mean = torch.stack([context.float().mean(0) for context in contexts]).mean(0)
        for adapter in (self.adapter, self.average):
            adapter.unconditional.copy_(mean)

    def recent_loss(self) -> float:
        recent = self.losses[-50:]
        return sum(recent) / len(recent)

    def update_average(self, decay: float) -> None:
        # Early on the average would be mostly the zero start; it may follow faster there.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for mean, live in zip(self.average.parameters(), self.adapter.parameters(), strict=True):
            mean.lerp_(live.detach(), 1 - decay)

    def save(self, path: Path, identity: dict) -> None:
        state = {
            "version": _STATE_VERSION,
            "identity": identity,
            "step": self.step,
            "evaluations": self.evaluations,
            "losses": self.losses,
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "pool": self.pool.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, identity: dict) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DifferentRun(
                f"{path} is no readable training state ({type(error).__name__}); delete it to start anew."
            ) from error
        if state.get("version") != _STATE_VERSION or state.get("identity") != identity:
            saved = state.get("identity", {})
            changed = sorted(key for key in identity.keys() | saved.keys() if identity.get(key) != saved.get(key))
            short = [f"{key}: {saved.get(key)!r:.60} then, {identity.get(key)!r:.60} now" for key in changed]
            raise DifferentRun(
                f"{path} is the state of another run ({'; '.join(short)}). "
                "Use the settings of then to go on with it, or delete it to start anew."
            )
        self.step, self.evaluations, self.losses = state["step"], state["evaluations"], state["losses"]
        self.adapter.load_state_dict(state["adapter"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.pool.load_state_dict(state["pool"])


def train(
    host: Host,
    prompts: Sequence[str],
    config: TrainConfig,
    callbacks: Callbacks = Callbacks(),
    *,
    negative: Sequence[str] = ("",),
    state: Path | None = None,
) -> Trained:
    """Distil the base's guidance into a new adapter by online rollouts (the method: arXiv 2503.07274).

    `negative` are the prompts of the unconditional branch, dealt out to `prompts` in turn; the default is empty.
    With `state`, the run is saved there every `config.save_every` iterations and whenever it is stopped, goes on from
    there if it is called again, to the same result, and removes it at the end. `DifferentRun` is raised if the file
    is another run's.
    """
    training_prompts, held_out = split_prompts(prompts, config)
    negative, shape = list(negative), host.latent_shape(config.width, config.height)
    positive = host.encode(training_prompts, shape)
    unconditional = host.encode(negative, shape, "negative")
    held_out_conditions = host.encode(held_out, shape)
    away_from = [host.context(condition) for condition in unconditional]
    shortest = min(len(host.context(condition)) for condition in positive + unconditional)
    adapter_config = config.adapter_config(host.base, prompt_tokens=shortest)
    identity, start = _run_identity(config, prompts, negative, host), time.monotonic()
    with host.session():
        pool = TrajectoryPool(host, positive, unconditional, shape, config)
        run = _Run(host, config, adapter_config, pool)
        run.remember_unconditional(away_from)
        try:
            if state is not None and state.exists():
                run.restore(state, identity)
            else:
                run.evaluations += run.pool.fill(
                    lambda done, total: callbacks.on_progress(Progress("rollout", done, total))
                )
            run.whole = True
            _fit(host, run, config, callbacks, state, identity)
            evaluation = _evaluate_held_out(host, run, config, held_out_conditions, unconditional[0], shape)
        except BaseException:  # ComfyUI's interrupt and KeyboardInterrupt among them
            if state is not None and run.whole:
                run.save(state, identity)
            raise
        adapter = run.average.cpu()
    if state is not None:
        state.unlink(missing_ok=True)
    summary = {
        "iterations": config.iterations,
        "batch": config.batch,
        "prompts": len(training_prompts),
        "held_out_prompts": len(held_out),
        "teacher_evaluations": run.evaluations,
        "seconds_of_last_session": round(time.monotonic() - start),
        "final_loss": round(run.recent_loss(), 5),
        **(evaluation.summary() if evaluation else {}),
        "config": asdict(config),
    }
    info = AdapterInfo(
        config=adapter_config,
        base=host.base,
        omega_range=(config.omega_min, config.omega_max),
        unconditional=_describe_unconditional(negative),
        resolutions=(shape[1:],),
        training=summary,
    )
    return Trained(adapter, info, run.losses, evaluation)


def _describe_unconditional(negative: Sequence[str]) -> str:
    if not any(negative):
        return "empty prompt"
    return f"negative prompt {negative[0]!r}" if len(negative) == 1 else f"{len(negative)} negative prompts of training"


def _evaluate_held_out(
    host: Host, run: _Run, config: TrainConfig, positive: list, negative: object, shape: tuple[int, int, int]
) -> Evaluation | None:
    if not positive:
        return None
    middle = round(math.sqrt(max(1.0, config.omega_min) * config.omega_max), 1)
    return evaluate(host, run.average, positive, negative, shape, sorted({middle, config.omega_max}))


def _fit(host: Host, run: _Run, config: TrainConfig, callbacks: Callbacks, state: Path | None, identity: dict) -> None:
    loss_of = _LOSSES[config.loss]
    while run.step < config.iterations:
        for group in run.optimiser.param_groups:
            group["lr"] = learning_rate(run.step, config)
        visit = run.pool.draw()
        try:
            teacher = ask_teacher(host, visit)
            student = host.student(run.adapter, visit.x, visit.sigma, visit.positive, visit.omega)
            loss = loss_of(student, teacher.cond, teacher.target, visit.sigma)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss became {value} at iteration {run.step + 1}; "
                    f"train again with a smaller learning rate than {config.learning_rate:g}."
                )
        except BaseException:
            run.pool.undo_draw()  # ComfyUI's layers raise on interrupt: leave the state of the last whole iteration
            raise
        run.whole = False
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(run.adapter.parameters(), config.clip)
        run.optimiser.step()
        run.pool.advance(visit, teacher.target, student)
        run.step += 1
        run.evaluations += 2 * len(visit.slots)
        run.losses.append(value)
        run.update_average(config.ema)
        run.whole = True
        if state is not None and config.save_every and run.step % config.save_every == 0:
            run.save(state, identity)
        callbacks.on_progress(Progress("train", run.step, config.iterations, run.recent_loss()))
