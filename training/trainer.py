"""The one function that distils an adapter. The node, the command line and the demo all call it."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo
from ..agd_core.text import logger
from .config import TrainConfig
from .distributed import Ranks
from .finite import Diverged
from .gap import Evaluation, Measurement
from .held_out import HeldOutEvaluation, check_measurable
from .memory import BothPredictions
from .model import Model, ProgressCallback
from .plan import Plan, StepLayout
from .plot import training_plot
from .pool import BatchSource, TrajectoryPool
from .progress import Progress, TimeLeft
from .run_folder import RunFolder, RunFolderError
from .run_identity import check_same_run, run_identity
from .run_setup import (
    RunOptions,
    RunPrompts,
    RunTexts,
    Start,
    check_settings,
    describe_adapter,
    new_adapter,
)
from .run_state import Best, DamagedState, RunState, check_saved, non_finite_parts
from .training_step import RECENT, TrainingStep, initial_loss_scale

log = logger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """What a caller is told of a run. Raising from `on_progress` stops it; its state is saved first.

    `on_start` is called once it is clear that the run's folder is this run's, `on_end` with the result while it still
    is; on the first of several ranks. `iterations` is asked before each one for
    the number of all: the step and the config's number go in, and the learning rate falls to 0 at what comes out. It
    has to be the same in all processes of a run.
    """

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_evaluation: Callable[[int, Evaluation], None] = lambda step, evaluation: None
    on_preview: Callable[[int, Image.Image], None] = lambda step, image: None
    on_start: Callable[[], None] = lambda: None
    on_end: Callable[["Trained"], None] = lambda trained: None
    iterations: Callable[[int, int], int] = lambda step, planned: planned
    time_left: TimeLeft = field(default_factory=TimeLeft)

    def of_phase(self, phase: str) -> ProgressCallback:
        """For what only counts."""

        def report(done: int, total: int) -> None:
            self.on_progress(Progress(phase, done, total, seconds_left=self.time_left(phase, done, total)))

        return report


@dataclass
class Trained:
    """A finished adapter on the CPU, the best that was measured or else the last, and what its file should say.

    `evaluation`: the last measurement, None if an earlier session of the run made it; `by_sigma`: its gap closed by
    omega and noise level, in any case.
    """

    adapter: Adapter
    info: AdapterInfo
    losses: list[float] = field(default_factory=list)
    history: list[Measurement] = field(default_factory=list)
    evaluation: Evaluation | None = None
    by_sigma: dict[str, list[list[float]]] = field(default_factory=dict)

    def plot(self) -> Image.Image:
        return training_plot(self.losses, self.history, self.info.training["config"]["loss"])


@dataclass
class _Run:
    """What the loop works with. `info`: the adapter's, but for its training; `evaluation`: the last one."""

    model: Model
    config: TrainConfig
    callbacks: Callbacks
    ranks: Ranks
    identity: dict
    files: RunFolder | None
    info: AdapterInfo
    state: RunState
    step: TrainingStep
    held_out: HeldOutEvaluation
    evaluation: Evaluation | None = None
    saved_at: int | None = None  # the step of the newest saved state
    stopped: BaseException | None = None  # what a caller raised in a phase, of several ranks


@dataclass(frozen=True)
class _Begun:
    """What nothing can be refused of any more. `rows`: of the batch, this rank's; `saved`: the state to go on from."""

    ranks: Ranks
    rows: range
    start: Start | None
    identity: dict
    files: RunFolder | None
    saved: dict[str, Any] | None
    texts: RunTexts


def train(
    model: Model,
    prompts: Sequence[str],
    config: TrainConfig,
    callbacks: Callbacks = Callbacks(),
    options: RunOptions = RunOptions(),
) -> Trained:
    """Distil the base's guidance into a new adapter by online rollouts (the method: arXiv 2503.07274).

    Started by `torchrun`, all processes train one adapter; each returns it. Raises `DifferentRun` if the folder of the
    options is another run's, `FolderInUse` while another process trains there, `BaseNotFinite`, and `Diverged`, after
    which the same folder can be trained into again.
    """
    # What can be refused is, before any evaluation.
    ranks = Ranks()
    rows = ranks.rows(config.batch)
    start = Start.load(options.start, model.base, config) if options.start is not None else None
    check_settings(model.denoiser, config, options.recording)
    texts = RunTexts.split(prompts, config, options)
    check_measurable(model.denoiser, config, texts.held_out, texts.negative)
    identity = run_identity(model, prompts, config, options)
    files = RunFolder(options.folder) if options.folder is not None else None
    with files.held() if files is not None and ranks.first else nullcontext():
        saved = _saved_state(files, identity)
        if ranks.first:
            callbacks.on_start()
        begun = _Begun(ranks, rows, start, identity, files, saved, texts)
        try:
            trained = _trained(model, config, callbacks, options, begun)
            if ranks.first:
                callbacks.on_end(trained)
        except Diverged as error:
            raise _with_remedy(error, begun, config.learning_rate) from error
        except BaseException:
            if files is not None and ranks.first:
                log.info("AGD: the training stopped; the same one %s (%s).", files.next_run(), files.path)
            raise
        if files is not None and ranks.first:
            files.save_image("training.png", trained.plot())
    return trained


def _trained(model: Model, config: TrainConfig, callbacks: Callbacks, options: RunOptions, begun: _Begun) -> Trained:
    """The run itself."""
    ranks, rows, files, saved, texts = begun.ranks, begun.rows, begun.files, begun.saved, begun.texts
    encoded = RunPrompts.encode(texts, model.text_encoder, callbacks.of_phase("encode"))

    layout = options.plan or StepLayout.of_config(config, len(rows))
    work = max(0, layout.peak_bytes - layout.base_bytes_on_device - layout.other_bytes_on_device)
    with model.denoiser.session(checkpointing=layout.checkpointing, memory=layout.reserve, work=work):
        adapter_config = config.adapter_config(model.base, prompt_tokens=encoded.shortest)
        model.denoiser.check_adapter(adapter_config)
        adapter = new_adapter(adapter_config, config.seed, encoded.unconditional, model.denoiser.device)
        if begun.start is not None:
            begun.start.copy_into(adapter)
        both = BothPredictions(model.denoiser, model.memory, layout.teacher_rows)
        if options.recording is not None:
            source: BatchSource = options.recording.source(config, rows)
        else:
            kept = _kept_batches(config, layout, ranks)
            source = TrajectoryPool(model.denoiser, encoded.training, replace(config, reuse_from=kept), rows, both)
        loss_scale = initial_loss_scale(model.denoiser.computes_in)
        state = RunState.begin(adapter, source, config.learning_rate, loss_scale)
        state.evaluations = options.recording.evaluations if options.recording is not None else 0
        step = TrainingStep(model.denoiser, model.memory, encoded.training, config, ranks, layout.micro_batch)
        held_out = HeldOutEvaluation(model, config, encoded.held_out, both)
        info = describe_adapter(adapter, model, config, texts)
        run = _Run(model, config, callbacks, ranks, begun.identity, files, info, state, step, held_out)
        try:
            if saved is not None:
                _go_on(state, saved, rows, files)
                run.saved_at = state.step
            if files is not None and ranks.first:
                files.start_metrics(state.step, state.is_measured)
            state.resumable = saved is not None  # before the first iteration there is nothing to go on from
            _train_loop(run)
            _save_end(run)
        except Diverged:
            raise  # from a state that leads nowhere
        except BaseException:  # ComfyUI's interrupt and KeyboardInterrupt among them
            # Several ranks save together or not at all: `_train_loop` has done it where they agreed to stop.
            if state.resumable and ranks.count == 1:
                _save(run)
            raise
        adapter = state.average.cpu()
    if state.best is not None:
        adapter.load_state_dict(state.best.weights)
    info = replace(info, training=_summary(run, texts))
    return Trained(adapter, info, state.losses, state.history, run.evaluation, state.by_sigma)


def _kept_batches(config: TrainConfig, layout: StepLayout | Plan, ranks: Ranks) -> int:
    """How many batches wait to come again: as planned, on all ranks as on the first."""
    planned = layout.kept_batches or config.reuse_from
    return int(ranks.broadcast(torch.tensor([float(planned)], dtype=torch.float64)).item())


def _saved_state(files: RunFolder | None, identity: dict) -> dict[str, Any] | None:
    """What to go on from. Raises `DifferentRun`."""
    saved = files.load_run_state(check_saved) if files is not None else None
    if files is not None and saved is not None:
        check_same_run(saved, identity, files.path)
    return saved


def _go_on(state: RunState, saved: dict[str, Any], rows: range, files: RunFolder | None) -> None:
    """Raises `RunFolderError` where that can't be gone on from."""
    step = saved["step"]
    try:
        state.load_state_dict(saved, rows)
        saved.clear()  # it would keep in memory, to the end, the batches of then
    except DamagedState as error:
        place = files.path if files is not None else None
        raise RunFolderError(
            "The saved state of this training is damaged or of something else: delete it to go on from an older one, "
            f"or all states to start anew. Details: state {step} in {place} ({error})."
        ) from error


def _with_remedy(error: Diverged, begun: _Begun, learning_rate: float) -> Diverged:
    """Says what to do. The states of the last iterations go: from there it would diverge again."""
    remedy = f" Train again with a smaller learning rate than {learning_rate:g}"
    if begun.files is None or not begun.ranks.first:
        return Diverged(error.what, error.step, f"{remedy}.")
    begun.files.remove_run_states(after=error.step - RECENT)
    return Diverged(error.what, error.step, f"{remedy}: the same output {begun.files.next_run()}.")


def _train_loop(run: _Run) -> None:
    """The loop. Each iteration ends complete: a run that stops there goes on to the same result."""
    state, config, callbacks = run.state, run.config, run.callbacks
    clock, seconds_before = time.monotonic(), state.seconds
    _of_phase(run, "train")(state.step, config.iterations)
    while True:
        iterations = callbacks.iterations(state.step, config.iterations)
        # Measured before anything else, so that a run stopped at this step measures here when it goes on.
        ended = state.step >= iterations
        if _at_interval(state.step, config.evaluate_every, ended) and not state.is_measured:
            _measure(run)
        if config.preview_every and _at_interval(state.step, config.preview_every, ended) and state.shown < state.step:
            _show(run)
            state.shown = state.step
        if ended or _out_of_patience(state, config.patience):
            return
        run.step(state, iterations, _of_phase(run, "rollout"))
        state.seconds = seconds_before + time.monotonic() - clock

        if run.files is not None and run.ranks.first:
            rate, seconds = state.optimiser.param_groups[0]["lr"], round(state.seconds, 2)
            run.files.add_metrics(state.step, loss=state.losses[-1], learning_rate=rate, seconds=seconds)
        error = _report(run, iterations)
        stopping = run.ranks.any(error is not None)
        regular = config.save_every and state.step % config.save_every == 0
        # Alone, a stopped run is saved by `train`; several ranks save together, here, where all know of the stop.
        if regular or (stopping and run.ranks.count > 1):
            _save(run, plotted=True)
        if stopping:
            raise error or KeyboardInterrupt


def _at_interval(step: int, every: int, ended: bool) -> bool:
    return ended or (every > 0 and step > 0 and step % every == 0)


def _out_of_patience(state: RunState, patience: int) -> bool:
    """Whether `patience` measurements in a row brought no better adapter."""
    since_best = [measured for measured in state.history if state.best and measured.step > state.best.step]
    return 0 < patience <= len(since_best)


def _report(run: _Run, iterations: int) -> BaseException | None:
    """Report an iteration. What the caller raises, to stop, is returned."""
    state, memory = run.state, run.model.memory.used()
    gap = state.history[-1].score if state.history else None
    left = _seconds_left(run, iterations)
    try:
        run.callbacks.on_progress(Progress("train", state.step, iterations, state.recent_loss(), gap, memory, left))
    except BaseException as error:
        return error
    return run.stopped


def _seconds_left(run: _Run, iterations: int) -> float | None:
    """Of the iterations, and of what comes in between them."""
    time_left, step, config = run.callbacks.time_left, run.state.step, run.config
    of_iterations = time_left("train", step, iterations)
    if of_iterations is None:
        return None
    measured = _times_left(step, config.evaluate_every, iterations) * time_left.of_whole("measure")
    shown = _times_left(step, config.preview_every, iterations) if config.preview_every else 0
    return of_iterations + measured + shown * time_left.of_whole("preview")


def _times_left(step: int, every: int, iterations: int) -> int:
    """How often what comes `_at_interval` does from `step` on."""
    every = every or iterations
    return math.ceil(iterations / every) - math.ceil(step / every) + 1


def _save(run: _Run, plotted: bool = False) -> None:
    """Save the run's state, of all ranks, in its folder, if it has one."""
    if run.files is None:
        return
    saved, run.saved_at = run.state.state_dict(run.identity, run.ranks), run.state.step
    if saved is not None:
        if wrong := next(non_finite_parts(saved), None):
            raise Diverged(f"{wrong} of step {run.state.step} holds NaN or infinity", run.state.step)
        run.files.save_run_state(run.state.step, saved, run.config.keep_states)
        if plotted:
            run.files.save_image("training.png", training_plot(run.state.losses, run.state.history, run.config.loss))


def _save_end(run: _Run) -> None:
    """Save the state after the last iteration: where writing the adapter fails, the run goes on from there."""
    if run.saved_at == run.state.step:
        return
    try:
        _save(run)
    except RunFolderError as error:  # the adapter may find a place all the same
        log.warning("AGD: %s", error)


def _of_phase(run: _Run, phase: str) -> ProgressCallback:
    """Lets the caller stop in between. Of several ranks none may stop alone: they do after the iteration."""
    report = run.callbacks.of_phase(phase)

    def report_and_go_on(done: int, total: int) -> None:
        try:
            report(done, total)
        except BaseException as error:
            run.stopped = error

    return report if run.ranks.count == 1 else report_and_go_on


def _measure(run: _Run) -> None:
    """On the first rank. The best adapter so far is remembered, and written to the run's folder."""
    if not run.held_out.prompts.measured:
        return
    state, files = run.state, run.files if run.ranks.first else None
    if run.ranks.first:
        run.evaluation = run.held_out.measure(state.average, partial(_of_phase, run))
    found = run.evaluation.summary() if run.evaluation else {}
    own_score = torch.tensor([run.evaluation.score if run.evaluation else 0.0], dtype=torch.float64)
    score = run.ranks.broadcast(own_score).item()
    if not math.isfinite(score):
        raise Diverged(f"what the adapter closes of the gap is {score} at step {state.step}", state.step)
    state.history.append(Measurement(state.step, score, **found))
    if state.best is None or score > state.best.score:
        weights = {key: value.detach().cpu().clone() for key, value in state.average.state_dict().items()}
        state.best = Best(score, state.step, weights)
        if files is not None:
            info = replace(run.info, training={"step": state.step, **found})
            files.save_best(state.average, info)
    if run.evaluation is not None:
        state.by_sigma = run.evaluation.sigmas()
        if files is not None:
            files.add_metrics(state.step, score=score, **found, by_sigma=state.by_sigma)
        run.callbacks.on_evaluation(state.step, run.evaluation)


def _show(run: _Run) -> None:
    """A picture by the teacher beside the same by the adapter, on the first rank."""
    if not run.ranks.first:
        return
    step = run.state.step
    image = run.held_out.show(run.state.average, step, partial(_of_phase, run))
    if run.files is not None:
        run.files.save_image(f"previews/step-{step:06d}.png", image)
    run.callbacks.on_preview(step, image)


def _summary(run: _Run, texts: RunTexts) -> dict[str, Any]:
    """What the adapter's file says of its training."""
    state = run.state
    summary = {
        "iterations": state.step,
        "best_step": state.best.step if state.best else state.step,
        "batch": run.config.batch,
        "prompts": len(texts.positive),
        "held_out_prompts": len(texts.held_out),
        "teacher_evaluations": state.evaluations,
        "seconds": round(state.seconds),
        "final_loss": round(state.recent_loss(), 5),
        "config": run.config.result_settings(),
    }
    if state.best is not None:
        best = next(measured for measured in state.history if measured.step == state.best.step)
        found = {name: getattr(best, name) for name in ("gap_closed", "gap_closed_se", "direction_cosine")}
        summary |= {key: value for key, value in found.items() if value}
    return summary | ({"base_patches": run.model.base_patches} if run.model.base_patches else {})
