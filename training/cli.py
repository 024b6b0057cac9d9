"""The `agd` command. ComfyUI is loaded, through the bridge, only once a command needs it."""

import argparse
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..agd_core import adapter_file, lora
from ..agd_core.atomic import write_text
from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.attention_guidance import attention_guidance
from ..agd_core.text import one_line, printable
from . import authors
from . import prompts as prompt_sources
from .arguments import ExportSettings, PromptSettings, RecordSettings, UsageError, given, given_values, parse
from .assess import AssessConfig, Candidate, PromptTexts, assess, learnt_by
from .base_source import BaseSource
from .config import TrainConfig
from .distributed import Ranks
from .gap import Evaluation
from .job import Job, check_disk_space, check_is_other_file, check_output, check_replaceable, check_writable
from .presets import CARDS, check_chosen, check_for_two_experts, settings_for
from .progress import PHASES, Progress, ProgressLines
from .recording import SETTINGS as RECORDED
from .recording import Recording, can_go_on, size_in_bytes
from .run_folder import RunFolder, longest_files_of
from .trainer import Callbacks

_PICTURES = (".png", ".jpg", ".webp")


# Bars that stay, while those of other phases come and go below them.
_WHOLE = ("train", "record")
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class ProgressBar:
    """A bar for each phase, or where nobody watches a line now and then. A signal ends the run at the next report, so
    that it can go on.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.stopped = quiet, False
        self.bars: dict[str, tqdm] = {}
        self.lines = ProgressLines(lambda line: _say(line, stream=sys.stderr))

    def stop(self, *_: object) -> None:
        self.stopped = True

    def __call__(self, progress: Progress) -> None:
        if not self.quiet:
            show = self._show if sys.stderr.isatty() else self.lines
            show(progress)
        if self.stopped:
            raise KeyboardInterrupt

    def _show(self, progress: Progress) -> None:
        for phase in [each for each in self.bars if each not in (progress.phase, *_WHOLE)]:
            self.bars.pop(phase).close()
        bar = self._bar_of(progress)
        bar.total = progress.total  # a run that goes by the clock may change it
        bar.set_postfix_str(", ".join(progress.details()), refresh=False)
        bar.update(progress.step - bar.n)

    def _bar_of(self, progress: Progress) -> tqdm:
        if progress.phase not in self.bars:
            self.bars[progress.phase] = tqdm(
                total=progress.total,
                desc=PHASES[progress.phase],
                initial=progress.step,
                leave=progress.phase in _WHOLE,
                bar_format=_BAR,
                dynamic_ncols=True,
            )
        return self.bars[progress.phase]

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        closed = ", ".join(f"{value:.3f} at cfg {omega:g}" for omega, value in evaluation.gap_closed.items())
        if not self.quiet:
            tqdm.write(f"step {step}: gap closed {closed}")

    def close(self) -> None:
        for bar in reversed(self.bars.values()):
            bar.close()
        self.bars.clear()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Ctrl-C, and the SIGTERM by which torchrun and batch systems stop a process."""
        before = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.close()
            for each, handler in before.items():
                signal.signal(each, handler)


def _say(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print what may hold names and texts of files, in the characters that the terminal has."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The trainer's settings that were given by flags or the config file."""
    chosen = given_values(TrainConfig, args)
    if args.card:
        chosen.setdefault("memory", CARDS[args.card])
    return chosen


def _prompts(args: argparse.Namespace, seed: int) -> list[str]:
    count = given(PromptSettings, args).prompt_count
    if args.prompts is None:
        return prompt_sources.generate(count, seed)
    if args.verbatim:
        return prompt_sources.read_verbatim(args.prompts)
    return prompt_sources.expand(prompt_sources.read_prompts(args.prompts), count, seed, args.wildcards)


def _negatives(args: argparse.Namespace, seed: int, count: int) -> list[str]:
    if args.negative and args.negatives:
        raise UsageError("Give --negative or --negatives, not both.")
    if args.negatives == "built-in":
        return prompt_sources.generate_negatives(min(count, 1000), seed)
    told = prompt_sources.numbered(args.negative or [], "--negative")
    if args.verbatim:
        return prompt_sources.read_verbatim(args.negatives) if args.negatives else [line.text for line in told]
    lines = prompt_sources.read_prompts(args.negatives) if args.negatives else told
    return prompt_sources.expand_negatives(lines, given(PromptSettings, args).prompt_count, seed, args.wildcards)


def _job(args: argparse.Namespace, output: Path, recording: Recording | None = None) -> Job:
    """Everything a run needs, checked as far as it can be before the base is loaded."""
    from ..agd_core.comfyui.runtime import use_comfyui

    chosen, source = _chosen(args), BaseSource.given(args)
    early = check_chosen(chosen)
    if source.other_expert is not None:
        check_for_two_experts(early)
    seed = chosen.get("seed", TrainConfig.seed)
    if recording is None:
        prompts = _prompts(args, seed)
        negative = _negatives(args, seed, len(prompts))
    else:
        prompts, negative = recording.identity["prompts"], recording.identity["negative"]
    use_comfyui(source.comfyui)
    from ..agd_core.comfyui.model.comfy_model import ComfyModel

    loaded = source.load()
    early = early if recording is None else recording.config(early)
    other = None if loaded.other_expert is None else (loaded.other_expert, early.learns_at)
    how: dict[str, Any] = {"autocast": early.autocast, "frames": early.frames}
    model = ComfyModel(loaded.model, loaded.clip, **how, vae=loaded.vae, other_expert=other)
    config = settings_for(model.base, chosen, args.quality)
    if recording is not None:
        own = recording.config(config)
        changed = sorted(key for key in RECORDED if key in chosen and chosen[key] != getattr(own, key))
        if changed:
            raise UsageError(f"The recording {recording.folder} was made with other settings of {', '.join(changed)}.")
        if recording.identity["base"] != model.base.fingerprint:
            raise UsageError(f"The recording {recording.folder} is of another base model.")
        config = own
    if loaded.loras:
        model.base_patches["loras"] = list(loaded.loras)
    return Job(model, prompts, config, output, negative, recording, getattr(args, "start", None))


def _train(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("Give the adapter file to write: --output FILE.safetensors.")
    check_output(args.output, longest_files_of)
    with Ranks() as ranks:  # before ComfyUI, which takes the current device for its own
        job = _job(args, args.output, Recording.open(args.recording) if args.recording else None)
        bar = ProgressBar(quiet=not ranks.first)
        callbacks = Callbacks(on_progress=bar, on_evaluation=bar.evaluated)
        try:
            with bar.stopped_by_signals():
                planned = job.plan(callbacks.of_phase("plan"))
                bar.close()
                if ranks.first:
                    _say(planned.describe())
                if args.dry_run:
                    return
                trained = job.run(callbacks, planned, _rerun(args))
        except KeyboardInterrupt:
            raise UsageError(_stopped(RunFolder(job.folder).run_states(), f"{job.folder}")) from None
    if ranks.first:
        _say(job.report(trained), end="")
        _say(f"Wrote {args.output}; plots, previews and measurements are in {job.folder}.")


def _stopped(can_go_on: object, place: str) -> str:
    if not can_go_on:
        return "Stopped before anything could be kept; the same command starts again."
    return f"Stopped; the same command goes on from {place}."


def _rerun(args: argparse.Namespace) -> dict[str, Any]:
    """What `--config` has to hold besides the settings, the prompts and the output, to repeat this run."""
    recording = {"recording": str(args.recording.absolute())} if args.recording else {}
    return BaseSource.given(args).settings() | recording


def _record(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("Give the folder to record into: --output FOLDER.")
    recorded = given(RecordSettings, args)
    check_writable(args.output / "recording.json")
    job = _job(args, args.output)
    batches = recorded.batches or math.ceil(job.config.iterations / job.config.reuse)
    size = size_in_bytes(job.model.denoiser, job.config, batches)
    check_disk_space(args.output, size, "record fewer batches (--batches)", [*args.output.glob("shard-*.safetensors")])
    rows = batches * job.config.batch
    _say(f"{rows:,} noisy latents, {2 * rows:,} model evaluations, {size / 1e9:.2f} GB in {args.output}.")
    if args.dry_run:
        return
    bar = ProgressBar()
    try:
        with bar.stopped_by_signals():
            recording = job.record(batches, Callbacks(on_progress=bar))
    except KeyboardInterrupt:
        raise UsageError(_stopped(can_go_on(args.output), f"the whole shards in {args.output}")) from None
    _say(f"Recorded {recording.batches:,} batches; train with `agd train --recording {args.output}`.")


def _evaluate(args: argparse.Namespace) -> None:
    from ..agd_core.comfyui.runtime import use_comfyui

    config = given(AssessConfig, args)
    for path, suffixes in ((args.json, (".json",)), (args.picture, _PICTURES)):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes or not os.path.isdir(path.absolute().parent):
            raise UsageError(
                f"{path} can't be written: it must end in {' or '.join(suffixes)}, in a folder that exists."
            )
        check_writable(path)
    negative = prompt_sources.draw_each(prompt_sources.numbered(args.negative or [""], "--negative"), config.seed)
    prompts = PromptTexts(_given(args.prompts, config), negative)
    source = BaseSource.given(args)
    from_file = None if str(args.adapter) == ATTENTION_GUIDANCE else authors.read_adapter(args.adapter)
    use_comfyui(source.comfyui)
    from ..agd_core.comfyui.model.comfy_model import ComfyModel
    from ..agd_core.comfyui.model.sampler import ComfySampler

    loaded = source.load(with_vae=args.picture is not None)
    name, bar = str(args.adapter), ProgressBar()
    frames = 1 if from_file is None else learnt_by(from_file[0]).frames
    model = ComfyModel(loaded.model, loaded.clip, frames=frames, vae=loaded.vae)
    info, weights = from_file or attention_guidance(model.base)
    learnt = learnt_by(info)
    levels = learnt.sigma_from, learnt.sigma_to
    sampler = ComfySampler(loaded.model, info, weights, source=name, rule=learnt.rule, noise_levels=levels)
    try:
        with bar.stopped_by_signals():
            found = assess(model, sampler, Candidate(info, weights, name), prompts, config, bar)
    except KeyboardInterrupt:
        raise UsageError("Stopped; nothing was written.") from None
    _say(found.report(), end="")
    if args.json is not None:
        write_text(args.json, json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
    if args.picture is not None:
        found.picture.save(args.picture)


def _given(texts: list[str] | None, config: AssessConfig) -> list[str]:
    """The prompts of a file, or those that were given themselves; wildcards drawn."""
    if not texts:
        raise UsageError("Give prompts to evaluate with: --prompts FILE, or the prompts themselves.")
    is_file = len(texts) == 1 and (texts[0].endswith(".txt") or os.path.isfile(texts[0]))
    lines = prompt_sources.read_prompts(texts[0]) if is_file else prompt_sources.numbered(texts, "--prompts")
    return prompt_sources.expand(lines, config.count, config.seed)


def _inspect(args: argparse.Namespace) -> None:
    if authors.is_authors(args.file):
        _say(authors.describe(args.file))
    else:
        _say(adapter_file.describe(adapter_file.load_weights(args.file)[0], args.file))


def _import(args: argparse.Namespace) -> None:
    check_output(args.output)
    check_is_other_file(args.output, args.source)
    check_replaceable(args.output)
    info, weights = authors.load(args.source)
    adapter_file.save_weights(args.output, weights, info)
    _say(f"Wrote {args.output}: {info.config.kind.describe()}, for {info.base.family_name}.")


def _export(args: argparse.Namespace) -> None:
    omega = given(ExportSettings, args).omega
    check_output(args.output)
    check_is_other_file(args.output, args.adapter)
    check_replaceable(args.output, lora.is_export, "LoRA of agd export")
    lora.export(args.adapter, args.output, omega)
    low, high = adapter_file.read_info(args.adapter).omega_range
    outside = "" if low <= omega <= high else f" It was trained for guidance {low:g} to {high:g} only."
    _say(f"Wrote {args.output}: at strength 1 and cfg 1 it is guidance {omega:g}.{outside}")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "calibrate": _train,
    "record": _record,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "import": _import,
    "export": _export,
}


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args = parse(argv)
        _COMMANDS[args.command](args)
    except (UsageError, ValueError, OSError, RuntimeError, ArithmeticError) as error:
        _say(one_line(f"agd: {error}"), stream=sys.stderr)
        return 1
    except KeyboardInterrupt:  # where no run catches the signal: while the base is loaded, say
        print("agd: Stopped.", file=sys.stderr)
        return 1
    return 0
