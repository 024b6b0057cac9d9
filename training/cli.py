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
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..agd_core import adapter_file, lora
from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.attention_guidance import attention_guidance
from . import authors
from . import prompts as prompt_sources
from .arguments import UsageError, parse
from .assess import AssessConfig, Candidate, PromptTexts, assess, rule_of
from .base_source import BaseSource
from .config import TrainConfig
from .distributed import Ranks
from .gap import Evaluation
from .job import Job, check_disk_space, check_output
from .presets import CARDS, settings_for
from .recording import SETTINGS as RECORDED
from .recording import Recording, size_in_bytes
from .trainer import Callbacks, Progress

_PICTURES = (".png", ".jpg", ".webp")


class ProgressBar:
    """tqdm with loss, gap closed and time left. A signal ends the run after the iteration, so that it can go on."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.bar: tqdm | None = None
        self.phase = ""
        self.stopped = False

    def stop(self, *_: object) -> None:
        self.stopped = True

    def __call__(self, progress: Progress) -> None:
        if progress.phase not in ("encode", "measure"):  # these come in between; the bar of training stays
            self._show(progress)
        if self.stopped:
            raise KeyboardInterrupt

    def _show(self, progress: Progress) -> None:
        bar = self._bar_of(progress)
        bar.total = progress.total  # a run that goes by the clock may change it
        shown = {}
        if progress.loss is not None:
            shown["loss"] = f"{progress.loss:.4f}"
        if progress.gap_closed is not None:
            shown["gap"] = f"{progress.gap_closed:.3f}"
        if progress.memory is not None:
            shown["memory"] = f"{progress.memory / 1e9:.1f}GB"
        bar.set_postfix(shown, refresh=False)
        bar.update(progress.step - bar.n)

    def _bar_of(self, progress: Progress) -> tqdm:
        if self.bar is None or progress.phase != self.phase:
            self.close()
            self.phase, first = progress.phase, max(0, progress.step - 1)
            self.bar = tqdm(total=progress.total, desc=progress.phase, initial=first, disable=self.quiet)
        return self.bar

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        closed = ", ".join(f"{value:.3f} at cfg {omega:g}" for omega, value in evaluation.gap_closed.items())
        if not self.quiet:
            tqdm.write(f"step {step}: gap closed {closed}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

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


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The trainer's settings that were given by flags or the config file."""
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if v is not None}
    if args.card:
        chosen.setdefault("memory", CARDS[args.card])
    return chosen


def _prompts(args: argparse.Namespace, seed: int) -> list[str]:
    count = args.prompt_count or 2000
    if args.prompts is None:
        return prompt_sources.generate(count, seed)
    if args.verbatim:
        return prompt_sources.read_prompts(args.prompts, verbatim=True)
    return prompt_sources.expand(prompt_sources.read_prompts(args.prompts), count, seed, args.wildcards)


def _negatives(args: argparse.Namespace, seed: int, count: int) -> list[str]:
    if args.negative and args.negatives:
        raise UsageError("Give --negative or --negatives, not both.")
    if args.negatives == "built-in":
        return prompt_sources.generate_negatives(min(count, 1000), seed)
    if args.negatives:
        lines = prompt_sources.read_prompts(Path(args.negatives))
        return prompt_sources.expand(lines, args.prompt_count or 2000, seed, args.wildcards)
    return list(args.negative or [])


def _job(args: argparse.Namespace, output: Path, recording: Recording | None = None) -> Job:
    """Everything a run needs, checked as far as it can be before the base is loaded."""
    from ..agd_core.comfyui.runtime import use_comfyui

    chosen, source = _chosen(args), BaseSource.given(args)
    early = TrainConfig(**chosen)  # refused now, if it can't work with any base
    seed = chosen.get("seed", TrainConfig.seed)
    if recording is None:
        prompts = _prompts(args, seed)
        negative = _negatives(args, seed, len(prompts))
    else:
        prompts, negative = recording.identity["prompts"], recording.identity["negative"]
    use_comfyui(source.comfyui)
    from ..agd_core.comfyui.model.comfy_model import ComfyModel

    loaded = source.load()
    other = None if loaded.other_expert is None else (loaded.other_expert, early.learns_at)
    early = early if recording is None else recording.config(early)
    how: dict[str, Any] = {"autocast": early.autocast, "frames": early.frames}
    model = ComfyModel(loaded.model, loaded.clip, **how, vae=loaded.vae, other_expert=other)
    config = settings_for(model.base, chosen)
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
    check_output(args.output)
    with Ranks() as ranks:  # before ComfyUI, which takes the current device for its own
        job = _job(args, args.output, Recording.open(args.recording) if args.recording else None)
        planned = job.plan()
        if ranks.first:
            print(planned.describe(), flush=True)
        if args.dry_run:
            return
        bar = ProgressBar(quiet=not ranks.first)
        try:
            with bar.stopped_by_signals():
                trained = job.run(Callbacks(on_progress=bar, on_evaluation=bar.evaluated), planned, _rerun(args))
        except KeyboardInterrupt:
            raise UsageError(f"Stopped; the same command goes on from {job.folder}.") from None
    if ranks.first:
        print(job.report(trained), end="")
        print(f"Wrote {args.output}; plots, previews and measurements are in {job.folder}.")


def _rerun(args: argparse.Namespace) -> dict[str, Any]:
    """What `--config` has to hold besides the settings, the prompts and the output, to repeat this run."""
    recording = {"recording": str(args.recording.absolute())} if args.recording else {}
    return BaseSource.given(args).settings() | recording


def _record(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("Give the folder to record into: --output FOLDER.")
    job = _job(args, args.output)
    batches = args.batches or math.ceil(job.config.iterations / job.config.reuse)
    size = size_in_bytes(job.model.denoiser, job.config, batches)
    check_disk_space(args.output, size, "record fewer batches (--batches)")
    rows = batches * job.config.batch
    print(f"{rows:,} states, {2 * rows:,} teacher evaluations, {size / 1e9:.2f} GB in {args.output}.", flush=True)
    if args.dry_run:
        return
    bar = ProgressBar()
    try:
        with bar.stopped_by_signals():
            recording = job.record(batches, lambda done, total: bar(Progress("record", done, total)))
    except KeyboardInterrupt:
        raise UsageError(f"Stopped; the same command goes on from the whole shards in {args.output}.") from None
    print(f"Recorded {recording.batches:,} batches; train with `agd train --recording {args.output}`.")


def _evaluate(args: argparse.Namespace) -> None:
    from ..agd_core.comfyui.runtime import use_comfyui

    settings = {f.name: getattr(args, f.name) for f in fields(AssessConfig) if f.name != "omegas"}
    config = AssessConfig(tuple(args.omega or ()), **{name: v for name, v in settings.items() if v is not None})
    for path, suffixes in ((args.json, (".json",)), (args.picture, _PICTURES)):
        if path is not None and (path.suffix.lower() not in suffixes or not path.absolute().parent.is_dir()):
            raise UsageError(
                f"{path} can't be written: it must end in {' or '.join(suffixes)}, in a folder that exists."
            )
    prompts = PromptTexts(_given(args.prompts, config), args.negative or [""])
    source = BaseSource.given(args)
    from_file = None if str(args.adapter) == ATTENTION_GUIDANCE else authors.read_adapter(args.adapter)
    use_comfyui(source.comfyui)
    from ..agd_core.comfyui.model.comfy_model import ComfyModel
    from ..agd_core.comfyui.model.sampler import ComfySampler

    loaded = source.load(with_vae=args.picture is not None)
    name, bar = str(args.adapter), ProgressBar()
    model = ComfyModel(loaded.model, loaded.clip, vae=loaded.vae)
    info, weights = from_file or attention_guidance(model.base)
    sampler = ComfySampler(loaded.model, info, weights, source=name, rule=rule_of(info))
    try:
        with bar.stopped_by_signals():
            found = assess(model, sampler, Candidate(info, weights, name), prompts, config, bar)
    except KeyboardInterrupt:
        raise UsageError("Stopped; nothing was written.") from None
    print(found.report(), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    if args.picture is not None:
        found.picture.save(args.picture)


def _given(texts: list[str] | None, config: AssessConfig) -> list[str]:
    """The prompts of a file, or those that were given themselves; wildcards drawn."""
    if not texts:
        raise UsageError("Give prompts to evaluate with: --prompts FILE, or the prompts themselves.")
    is_file = len(texts) == 1 and (texts[0].endswith(".txt") or os.path.isfile(texts[0]))
    return prompt_sources.expand(prompt_sources.read_prompts(texts[0]) if is_file else texts, config.count, config.seed)


def _inspect(args: argparse.Namespace) -> None:
    if authors.is_authors(args.file):
        print(authors.describe(args.file))
    else:
        print(adapter_file.describe(adapter_file.load_weights(args.file)[0], args.file))


def _import(args: argparse.Namespace) -> None:
    check_output(args.output)
    info, weights = authors.load(args.source)
    adapter_file.save_weights(args.output, weights, info)
    print(f"Wrote {args.output}: {info.config.kind.describe()}, for {info.base.family_name}.")


def _export(args: argparse.Namespace) -> None:
    check_output(args.output)
    lora.export(args.adapter, args.output, args.omega)
    low, high = adapter_file.read_info(args.adapter).omega_range
    outside = "" if low <= args.omega <= high else f" It was trained for guidance {low:g} to {high:g} only."
    print(f"Wrote {args.output}: at strength 1 and cfg 1 it is guidance {args.omega:g}.{outside}")


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
        print(f"agd: {error}", file=sys.stderr)
        return 1
    return 0
