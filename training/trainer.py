"""The one function that distils an adapter. The node, the command line and the demo all call it."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..agd_core import adapter_file
from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo
from .config import TrainConfig
from .distributed import Ranks
from .evaluate import Evaluation, State, evaluate, follow_teacher, omegas_of, sample
from .fitting import Teacher
from .host import Host, encode
from .plan import Plan
from .plot import preview, training_plot
from .pool import TrajectoryPool
from .recording import Recording, checksum_of
from .run import Best, Run, check_same_run
from .run_folder import RunFolder

_KEPT_STEPS = 8  # of the held-out trajectories' twenty: to measure at
_RECENT, _EXPLODED = 20, 20.0  # so many iterations with so many times the loss of no adapter: that won't come back


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `phase`: "encode" (prompts), "rollout" (filling the pool), "measure" (on held-out prompts) or
    "train", after an iteration.

    `loss` is the mean of the last 50 iterations', `gap_closed` the last measured, its mean over omega; `memory` in
    bytes, the most so far.
    """

    phase: str
    step: int
    total: int
    loss: float | None = None
    gap_closed: float | None = None
    memory: int | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Callbacks:
    """What a caller hears of a run. Raising from `on_progress` stops it; its state is saved first.

    `on_start` is called once it is clear that the run's folder is this run's. `iterations` is asked before each one for
    the number of all: the step and the config's number go in, and the learning rate falls to 0 at what comes out. All
    processes of a run have to be told the same.
    """

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_evaluation: Callable[[int, Evaluation], None] = lambda step, evaluation: None
    on_preview: Callable[[int, Image.Image], None] = lambda step, image: None
    on_start: Callable[[], None] = lambda: None
    iterations: Callable[[int, int], int] = lambda step, planned: planned


@dataclass
class Trained:
    """A finished adapter on the CPU, the best that was measured or else the last, and what its file should say.

    `history` holds a dict per measurement: step, gap_closed and direction_cosine by omega.
    """

    adapter: Adapter
    info: AdapterInfo
    losses: list[float] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)
    evaluation: Evaluation | None = None

    def plot(self) -> Image.Image:
        return training_plot(self.losses, self.history)


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


def train(
    host: Host,
    prompts: Sequence[str],
    config: TrainConfig,
    callbacks: Callbacks = Callbacks(),
    *,
    negative: Sequence[str] = ("",),
    held_out: Sequence[str] | None = None,
    folder: Path | None = None,
    recording: Recording | None = None,
    plan: Plan | None = None,
    start: Path | None = None,
) -> Trained:
    """Distil the base's guidance into a new adapter by online rollouts (the method: arXiv 2503.07274).

    `negative` are the prompts of the unconditional branch, drawn for each trajectory; the default is empty. `held_out`
    are the prompts to measure on, by default some of `prompts`, which are then not trained with. With
    `folder`, the run keeps its files there: its state is saved every `config.save_every` iterations and whenever it is
    stopped, and if it is called again it goes on from there, to the same result. `DifferentRun` is raised if the
    folder is another run's. With `recording`, the states come from there instead of from rollouts. `plan` says how
    a step fits into memory; without one it is taken at once, unless the config says otherwise. With `start`, an adapter
    file, the new adapter begins as that one. Started by `torchrun`, all processes train one adapter; each returns it.
    """
    ranks, negative = Ranks(), list(negative)
    started = adapter_file.load_state(start) if start is not None else None
    lanes = ranks.lanes(config.batch)
    host.check_schedulers(config.schedulers)
    _check_interval(host, config)
    if recording is not None and config.on_policy:
        raise ValueError("A recording can't follow the student: train from one with on_policy 0.")
    files = RunFolder(folder) if folder is not None else None
    if files is not None and ranks.first:
        files.prepare()
    identity = _identity(config, {"prompts": prompts, "negative": negative, "measured": held_out}, host, recording)
    identity |= {"start": f"{start.name}, {checksum_of(start)[:12]}"} if start is not None else {}
    saved = files.load_state() if files is not None else None
    if saved is not None:
        check_same_run(saved, identity, files.path)
    if ranks.first:
        callbacks.on_start()
    if held_out is None:
        prompts, held_out = split_prompts(prompts, config)
    if recording is not None:
        recording.check_texts(split_prompts(recording.identity["prompts"], config)[0], prompts, negative)

    def told(done: int, total: int) -> None:
        callbacks.on_progress(Progress("encode", done, total))

    encoded = {
        "positive": encode(host, prompts, "positive", told),
        "negative": encode(host, negative, "negative", told),
    }
    unconditional = encoded["negative"][negative.index("") if "" in negative else 0]
    shown = encode(host, held_out or prompts[:1], "positive", told)
    host.release_text_encoder()
    shortest = min(len(host.context(prompt)) for prompt in [*encoded["positive"], *encoded["negative"]])
    rows, checkpointing = len(lanes), plan.checkpointing if plan else config.checkpointing == "on"
    with host.session(checkpointing=checkpointing, memory=plan.reserve if plan else 0):
        run = Run(
            host,
            config,
            config.adapter_config(host.base, prompt_tokens=shortest),
            encoded,
            ranks,
            micro_batch=plan.micro_batch if plan else config.micro_batch or rows,
            teacher=Teacher(host, plan.teacher_rows if plan else 2 * rows),
            unconditional=unconditional,
        )
        if started is not None:
            adapter_file.check_base(started[0], host.base, start)
            run.start_from(*started, start)
        if recording is not None:
            run.source = recording.source(config, lanes)
        else:
            run.source = TrajectoryPool(host, *encoded.values(), config, lanes, run.teacher)
        lab = Lab(run, shown, measured=len(held_out))
        info = AdapterInfo(
            config=run.adapter_config,
            base=host.base,
            omega_range=(config.omega_min, config.omega_max),
            unconditional=_describe_unconditional(negative),
            negative_mode="used" if run.adapter.uses_negative else "ignored",
            resolutions=tuple(dict.fromkeys(host.latent_shape(w, h)[1:] for w, h in config.buckets())),
        )
        try:
            if saved is not None:
                run.restore(saved)
            if files is not None and ranks.first:
                files.start_metrics(run.step, _measured(run))
            if saved is None:
                spent = run.source.fill(lambda done, total: callbacks.on_progress(Progress("rollout", done, total)))
                run.evaluations += spent if recording is not None else int(ranks.sum(torch.tensor(spent)))
            run.whole = True
            _fit(run, lab, callbacks, files, identity, info)
        except BaseException:  # ComfyUI's interrupt and KeyboardInterrupt among them
            # Several ranks save together or not at all: `_fit` has done it where they agreed to stop.
            if files is not None and run.whole and ranks.count == 1:
                files.save_state(run.step, run.state(identity), config.keep_states)
            raise
        finally:
            if files is not None:
                files.close()
        adapter = run.average.cpu()
    if run.best is not None:
        adapter.load_state_dict(run.best.weights)
    summary = _summary(run, len(prompts), len(held_out))
    trained = Trained(adapter, _with_training(info, summary), run.losses, run.history, run.evaluation)
    if files is not None and ranks.first:
        files.save_image("training.png", trained.plot())
    return trained


def _check_interval(host: Host, config: TrainConfig) -> None:
    """Raises `ValueError` where guidance is limited to noise levels that the base doesn't have."""
    sigmas = host.sigmas("normal", config.steps_max)[:-1]
    low, high = config.interval_sigma_min, config.interval_sigma_max
    if config.teacher == "interval" and not ((sigmas > low) & (sigmas <= high)).any():
        raise ValueError(
            f"No step of a trajectory is guided: its noise levels go from {sigmas[-1]:.3g} to {sigmas[0]:.3g}, the "
            f"interval of guidance from {low:g} to {high:g}; set another interval_sigma_min and interval_sigma_max."
        )


def _summary(run: Run, prompts: int, held_out: int) -> dict:
    """What the adapter's file says of its training."""
    summary = {
        "iterations": run.step,
        "best_step": run.best.step if run.best else run.step,
        "batch": run.config.batch,
        "prompts": prompts,
        "held_out_prompts": held_out,
        "teacher_evaluations": run.evaluations,
        "seconds": round(run.seconds),
        "final_loss": round(run.recent_loss(), 5),
        "config": run.config.result_settings(),
    }
    if run.best is not None:
        measured = next(entry for entry in run.history if entry["step"] == run.best.step)
        summary |= {key: measured[key] for key in ("gap_closed", "direction_cosine") if key in measured}
    return summary | ({"teacher": run.host.teacher} if run.host.teacher else {})


def _fit(
    run: Run,
    lab: "Lab",
    callbacks: Callbacks,
    files: RunFolder | None,
    identity: dict,
    info: AdapterInfo,
) -> None:
    """The loop. Each iteration ends whole: a run that stops there goes on to the same result."""
    ranks, source = run.ranks, run.source
    shares, clock, begun, at_start = [], time.monotonic(), run.step, run.seconds
    while True:
        config = replace(run.config, iterations=callbacks.iterations(run.step, run.config.iterations))
        # Measured before anything else, so that a run stopped at this step measures here when it goes on.
        ended = run.step >= config.iterations
        if _due(run.step, config.evaluate_every, ended) and not _measured(run):
            lab.measure(callbacks, files, info)
        if _due(run.step, config.preview_every, ended) and config.preview_every and run.step > begun:
            lab.show(callbacks, files)
        if ended or _had_enough(run):
            return
        for group in run.optimiser.param_groups:
            group["lr"] = learning_rate(run.step, config)
        try:
            batch = source.next(run.step)
            student, loss, share = run.learn(batch)
            shares = [*shares, share][-_RECENT:]
            _check_loss(loss, shares, run)
        except BaseException:
            source.undo()  # ComfyUI's layers raise on interrupt: leave the state of the last whole iteration
            raise
        run.whole = False
        nn.utils.clip_grad_norm_(run.adapter.parameters(), config.clip)
        run.optimiser.step()
        run.evaluations += ranks.count * source.advance(batch, student, run.step / config.iterations)
        run.step += 1
        run.losses.append(loss)
        run.update_average()
        run.seconds = at_start + time.monotonic() - clock
        run.whole = True

        if files is not None and ranks.first:
            rate = run.optimiser.param_groups[0]["lr"]
            files.add_metrics(run.step, loss=loss, learning_rate=rate, seconds=round(run.seconds, 2))
        left = (config.iterations - run.step) * (time.monotonic() - clock) / (run.step - begun)
        stop = _tell(callbacks, run, config.iterations, left)
        stopping = ranks.any(stop is not None)
        regular = config.save_every and run.step % config.save_every == 0
        # Alone, a stopped run is saved by `train`; several ranks save together, here, where all know of the stop.
        if files is not None and (regular or (stopping and ranks.count > 1)):
            state = run.state(identity)
            if ranks.first:
                files.save_state(run.step, state, config.keep_states)
                files.save_image("training.png", training_plot(run.losses, run.history))
        if stopping:
            raise stop or KeyboardInterrupt


def _due(step: int, every: int, ended: bool) -> bool:
    return ended or (every > 0 and step > 0 and step % every == 0)


def _measured(run: Run) -> bool:
    return bool(run.history) and run.history[-1]["step"] == run.step


def _tell(callbacks: Callbacks, run: Run, total: int, seconds_left: float) -> BaseException | None:
    """Report an iteration. What the caller raises, to stop, is returned."""
    gap, memory = (run.history[-1]["score"] if run.history else None), run.host.memory_used()
    try:
        callbacks.on_progress(Progress("train", run.step, total, run.recent_loss(), gap, memory, seconds_left))
    except BaseException as error:
        return error
    return None


class Lab:
    """Measures and shows the adapter on prompts that are not trained with: fixed prompts, seeds and noise levels.

    What the teacher does there is computed once, when it is first needed, on the first rank.
    """

    def __init__(self, run: Run, shown: list, measured: int):
        """`shown`: encoded prompts, the first for the preview; the first `measured` for measuring."""
        self.run, self.shown, self.measured = run, shown, measured
        self.shape = run.host.latent_shape(*run.config.buckets()[0])
        self.states: list[State] = []
        self.guided: torch.Tensor | None = None

    def measure(self, callbacks: Callbacks, files: RunFolder | None, info: AdapterInfo) -> None:
        """Gap closed per omega and sigma; the best adapter so far is remembered, and written to the run's folder."""
        run = self.run
        if not self.measured:
            return
        score, progress = torch.zeros(1, dtype=torch.float64), self._progress(callbacks)
        if run.ranks.first:
            if not self.states:
                prompts, drawn = self.shown[: self.measured], run.prompts["negative"]
                # Evenly spread over the negatives of the training.
                negative = [drawn[i * len(drawn) // self.measured] for i in range(self.measured)]
                omegas, rows = omegas_of(run.config), max(1, run.teacher.rows // 2)
                self.states = follow_teacher(
                    run.host,
                    prompts,
                    negative,
                    self.shape,
                    omegas,
                    rule=run.config.rule,
                    keep=_KEPT_STEPS,
                    batch=rows,
                    progress=progress,
                )
            run.evaluation = evaluate(run.host, run.average, self.states, progress)
            score[0] = run.evaluation.score
        score = run.ranks.share(score).item()
        found = run.evaluation.summary() if run.evaluation else {}
        run.history.append({"step": run.step, "score": score, **found})
        if run.best is None or score > run.best.score:
            weights = {key: value.detach().cpu().clone() for key, value in run.average.state_dict().items()}
            run.best = Best(score, run.step, weights)
            if run.ranks.first and files is not None:
                measured = _with_training(info, {"step": run.step, **found})
                adapter_file.save(files.path / "best.safetensors", run.average, measured)
        if run.ranks.first:
            if files is not None:
                files.add_metrics(run.step, score=score, **found, by_sigma=run.evaluation.sigmas())
            callbacks.on_evaluation(run.step, run.evaluation)

    def _progress(self, callbacks: Callbacks) -> Callable[[int, int], None]:
        """Lets the caller stop in between. Of several ranks none may stop alone."""
        if self.run.ranks.count > 1:
            return lambda done, total: None
        return lambda done, total: callbacks.on_progress(Progress("measure", done, total))

    @torch.no_grad()
    def show(self, callbacks: Callbacks, files: RunFolder | None) -> None:
        """A picture of one prompt by the teacher beside the same by the adapter."""
        run = self.run
        if not run.ranks.first:
            return
        omega = omegas_of(run.config)[-2] if len(omegas_of(run.config)) > 1 else run.config.omega_max
        what = run.host, self.shown[0], run.unconditional, self.shape, omega
        if self.guided is None:
            self.guided = sample(*what, None, rule=run.config.rule, progress=self._progress(callbacks))
        own = sample(*what, run.average, progress=self._progress(callbacks))
        teacher = run.config.teacher.replace("_", " ").upper()
        pictures = {f"{teacher} {omega:g}": self.guided, f"AGD {omega:g}, step {run.step}": own}
        image = preview({name: run.host.picture(latent) for name, latent in pictures.items()})
        if files is not None:
            files.save_image(f"previews/step-{run.step:06d}.png", image)
        callbacks.on_preview(run.step, image)


def _identity(config: TrainConfig, texts: dict, host: Host, recording: Recording | None) -> dict:
    """What must be equal for a saved state to be this run's."""
    identity = config.result_settings() | {name: list(prompts or ()) for name, prompts in texts.items()}
    identity |= {"base": host.base.fingerprint, "patches": host.teacher}
    identity |= {"recording": recording.checksum() if recording else ""}
    return json.loads(json.dumps(identity))


def _describe_unconditional(negative: Sequence[str]) -> str:
    distinct = sorted(dict.fromkeys(negative), key=bool)  # an empty one first
    if not any(distinct):
        return "empty prompt"
    if len(distinct) == 1:
        return f"negative prompt {distinct[0]!r}"
    if distinct[0]:
        return f"{len(distinct)} negative prompts of training"
    return f"empty prompt, and {len(distinct) - 1} negative prompts of training"


def _with_training(info: AdapterInfo, training: dict) -> AdapterInfo:
    return AdapterInfo(**{**vars(info), "training": training})


def _had_enough(run: Run) -> bool:
    """Whether `patience` measurements in a row brought no better adapter."""
    since_best = [entry for entry in run.history if run.best and entry["step"] > run.best.step]
    return 0 < run.config.patience <= len(since_best)


def _check_loss(loss: float, shares: list[float], run: Run) -> None:
    """Raises `FloatingPointError` where training can't succeed. `shares`: recent losses over that of no adapter."""
    remedy = f"train again with a smaller learning rate than {run.config.learning_rate:g}"
    if not math.isfinite(loss):
        raise FloatingPointError(f"The loss became {loss} at iteration {run.step + 1}; {remedy}.")
    middle = statistics.median(shares)
    if len(shares) == _RECENT and middle > _EXPLODED:
        raise FloatingPointError(
            f"The loss exploded: at iteration {run.step + 1} it is {middle:.0f} times that of no adapter; {remedy}."
        )
