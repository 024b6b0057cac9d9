"""The `agd` command. ComfyUI is loaded, through the bridge, only once a command needs it."""

import argparse
import importlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path

from tqdm import tqdm

from ..agd_core import adapter_file, lora
from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.attention_guidance import attention_guidance
from ..agd_core.errors import AGDError
from . import prompts as prompt_sources
from .assess import AssessConfig, assess, rule_of
from .config import TrainConfig
from .distributed import Ranks
from .evaluate import Evaluation
from .job import Job, check_output, check_room
from .presets import CARDS, settings_for
from .recording import SETTINGS as RECORDED
from .recording import Recording, size_in_bytes
from .trainer import Callbacks, Progress

try:
    import tomllib
except ImportError:  # Python 3.10, where ComfyUI's own requirements bring it
    import tomli as tomllib

_FILE, _FOLDER = {"type": Path, "metavar": "FILE"}, {"type": Path, "metavar": "FOLDER"}
_COUNT = {"type": int, "metavar": "N"}
_NEGATIVE = {"metavar": "TEXT", "nargs": "+", "help": "negative prompts of the guidance"}
_DTYPES = ("fp32", "fp16", "bf16", "fp8")
_PICTURES = (".png", ".jpg", ".webp")


class UsageError(AGDError):
    """Something the user gave that can't work; the message is one sentence and no traceback is shown."""


class ProgressBar:
    """tqdm with loss, gap closed and time left. A signal ends the run after the iteration, so that it can go on."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.bar: tqdm | None = None
        self.phase = ""
        self.stopped = False

    def stop(self, *_) -> None:
        self.stopped = True

    def __call__(self, progress: Progress) -> None:
        if progress.phase not in ("encode", "measure"):  # these come in between; the bar of training stays
            self._show(progress)
        if self.stopped:
            raise KeyboardInterrupt

    def _show(self, progress: Progress) -> None:
        if progress.phase != self.phase:
            self.close()
            self.phase = progress.phase
            self.bar = tqdm(
                total=progress.total, desc=progress.phase, initial=max(0, progress.step - 1), disable=self.quiet
            )
        self.bar.total = progress.total  # a run that goes by the clock may change it
        shown = {}
        if progress.loss is not None:
            shown["loss"] = f"{progress.loss:.4f}"
        if progress.gap_closed is not None:
            shown["gap"] = f"{progress.gap_closed:.3f}"
        if progress.memory is not None:
            shown["memory"] = f"{progress.memory / 1e9:.1f}GB"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(progress.step - self.bar.n)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        closed = ", ".join(f"{value:.3f} at cfg {omega:g}" for omega, value in evaluation.gap_closed.items())
        self.say(f"step {step}: gap closed {closed}")

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

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


def _add_base(parser: argparse.ArgumentParser) -> None:
    base = parser.add_argument_group("the base")
    base.add_argument("--checkpoint", **_FILE, help="a full checkpoint file: diffusion model and text encoder")
    base.add_argument(
        "--loader", metavar="MODULE:FUNCTION", help="or a Python function: (MODEL, CLIP) or (MODEL, CLIP, VAE)"
    )
    base.add_argument("--lora", nargs="+", metavar="FILE[:STRENGTH]", help="LoRAs that are part of the teacher")
    base.add_argument("--base-dtype", choices=_DTYPES, help="of its weights in memory; default: ComfyUI's choice")
    base.add_argument("--comfyui", **_FOLDER, help="ComfyUI's folder, if it is not found by itself")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompts", **_FILE, help="a text file, one per line; default: the built-in generator's")
    group.add_argument("--prompt-count", **_COUNT, help="of the generator, or with wildcards (default: 2000)")
    group.add_argument("--wildcards", **_FOLDER, help="folder of lists for __name__ in prompts")
    group.add_argument("--verbatim", action="store_true", default=None, help="prompts without wildcards or comments")
    group.add_argument("--negative", **_NEGATIVE)
    group.add_argument("--negatives", metavar="FILE", help="or a text file of them; 'built-in' for the generator's")


# The settings that most people set come first in the help text; what is named nowhere is "advanced".
_MAIN = ("iterations", "batch", "learning_rate", "width", "height", "aspect_ratios", "omega_max", "hidden", "seed")
_MEMORY = ("memory", "micro_batch", "checkpointing", "precision")
_FILES = ("held_out", "evaluate_every", "patience", "preview_every", "save_every", "keep_states")
_SUITED = "Defaults in brackets; for iterations, batch, learning_rate, sizes and reuse the base's family has its own."


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = {f.name: f for f in fields(TrainConfig)}
    advanced = tuple(name for name in settings if name not in _MAIN + _MEMORY + _FILES)
    groups = {"training": _MAIN, "memory": _MEMORY, "measuring, showing, saving": _FILES, "advanced": advanced}
    for title, names in groups.items():
        group = parser.add_argument_group(title, _SUITED if names is _MAIN else None)
        if names is _MEMORY:
            group.add_argument("--card", choices=CARDS, help="the same as --memory for a card of that size")
        for name in names:
            _add_setting(group, settings[name])


def _add_setting(group, f: Field) -> None:
    flag, default = "--" + f.name.replace("_", "-"), f.default
    shown = " ".join(default) if isinstance(default, tuple) else default
    help = f"{f.metadata['help']} [{shown}]" if shown != "" else f.metadata["help"]
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
    elif isinstance(default, tuple):
        group.add_argument(flag, nargs="+", metavar="NAME" if default else "W:H", help=help)
    else:
        choices, metavar = f.metadata["choices"], {int: "N", float: "X"}.get(type(default))
        group.add_argument(flag, type=type(default), choices=choices, metavar=metavar, help=help)


def _chosen(args: argparse.Namespace) -> dict:
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


def _load_base(args: argparse.Namespace, *, with_vae: bool = False):
    """(MODEL, CLIP, VAE or None, names of LoRAs)."""
    if bool(args.loader) == bool(args.checkpoint):
        raise UsageError("Give the base: either --checkpoint FILE or --loader MODULE:FUNCTION.")
    loras = [_lora(text) for text in args.lora or []]
    for path in [args.checkpoint, *(path for path, _ in loras)] if args.checkpoint else []:
        if not path.is_file():
            raise UsageError(f"There is no {'checkpoint' if path == args.checkpoint else 'LoRA'} {path}.")
    if args.checkpoint:
        from ..agd_core.comfyui.model.host import load_checkpoint

        loaded = load_checkpoint(args.checkpoint, loras, args.base_dtype, with_vae=with_vae)
        return *loaded, [f"{p.name}:{s:g}" for p, s in loras]
    if loras or args.base_dtype:
        raise UsageError("--lora and --base-dtype belong to --checkpoint; a --loader function sees to that itself.")
    module, _, function = args.loader.partition(":")
    try:
        load = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--loader {args.loader} names no function MODULE:FUNCTION ({error}).") from error
    model, clip, *vae = load()
    return model, clip, *(vae or [None]), []


def _lora(text: str) -> tuple[Path, float]:
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # the colon is the path's own


def _job(args: argparse.Namespace, output: Path, recording: Recording | None = None) -> Job:
    """Everything a run needs, checked as far as it can be before the base is loaded."""
    from ..agd_core.comfyui.runtime import use_comfyui

    chosen = _chosen(args)
    TrainConfig(**chosen)  # refused early, if it can't work with any base
    seed = chosen.get("seed", TrainConfig.seed)
    if recording is None:
        prompts = _prompts(args, seed)
        negative = _negatives(args, seed, len(prompts))
    else:
        prompts, negative = recording.identity["prompts"], recording.identity["negative"]
    use_comfyui(args.comfyui)
    from ..agd_core.comfyui.model.host import ComfyHost

    model, clip, vae, loras = _load_base(args)
    host = ComfyHost(model, clip, autocast=TrainConfig(**chosen).autocast, vae=vae)
    config = settings_for(host.base, chosen)
    if recording is not None:
        own = recording.config(config)
        changed = sorted(key for key in RECORDED if key in chosen and chosen[key] != getattr(own, key))
        if changed:
            raise UsageError(f"The recording {recording.folder} was made with other settings of {', '.join(changed)}.")
        if recording.identity["base"] != host.base.fingerprint:
            raise UsageError(f"The recording {recording.folder} is of another base model.")
        config = own
    if loras:
        host.teacher["loras"] = loras
    return Job(host, prompts, config, output, negative, recording, getattr(args, "start", None))


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


def _rerun(args: argparse.Namespace) -> dict:
    """What `--config` has to hold besides the settings, the prompts and the output, to repeat this run."""
    paths = {name: getattr(args, name) for name in ("checkpoint", "recording", "comfyui")}
    settings = {name: str(path.absolute()) for name, path in paths.items() if path}
    return settings | {"loader": args.loader, "lora": args.lora, "base_dtype": args.base_dtype}


def _record(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("Give the folder to record into: --output FOLDER.")
    job = _job(args, args.output)
    batches = args.batches or math.ceil(job.config.iterations / job.config.reuse)
    size = size_in_bytes(job.host, job.config, batches)
    check_room(args.output, size, "record fewer batches (--batches)")
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
    prompts = _given(args.prompts, config)
    from_file = None if str(args.adapter) == ATTENTION_GUIDANCE else adapter_file.load_state(args.adapter)
    use_comfyui(args.comfyui)
    from ..agd_core.comfyui.model.host import ComfyHost
    from ..agd_core.comfyui.model.sampler import ComfySampler

    model, clip, vae, _ = _load_base(args, with_vae=args.picture is not None)
    source, bar = str(args.adapter), ProgressBar()
    host = ComfyHost(model, clip, vae=vae)
    info, state = from_file or attention_guidance(host.base)
    sampler = ComfySampler(model, info, state, source=source, rule=rule_of(info))
    what = host, sampler, info, state, prompts, config
    try:
        with bar.stopped_by_signals():
            found = assess(*what, source=source, negative=args.negative or [""], progress=bar)
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
    print(adapter_file.describe(adapter_file.load_state(args.file)[0], args.file))


def _export(args: argparse.Namespace) -> None:
    check_output(args.output)
    lora.export(args.adapter, args.output, args.omega)
    low, high = adapter_file.read_info(args.adapter).omega_range
    outside = "" if low <= args.omega <= high else f" It was trained for guidance {low:g} to {high:g} only."
    print(f"Wrote {args.output}: at strength 1 and cfg 1 it is guidance {args.omega:g}.{outside}")


def _read_config(path: Path, parser: argparse.ArgumentParser) -> None:
    """Make what a TOML file holds the defaults of `parser`, whose flags it names. Raises `UsageError`."""
    flags = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    try:
        settings = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"The config file {path} can't be read ({error}).") from error
    unknown = sorted(settings.keys() - flags.keys())
    if unknown:
        raise UsageError(f"The config file {path} has unknown settings: {', '.join(unknown)}; see `agd train --help`.")
    for key, value in settings.items():
        convert, several = flags[key].type, flags[key].nargs == "+"
        if several != isinstance(value, list) or isinstance(value, dict):
            raise UsageError(f"{key} in {path} is {value!r}, but must be {'a list' if several else 'one value'}.")
        try:
            settings[key] = convert(value) if convert and not several else value
        except (TypeError, ValueError) as error:
            raise UsageError(f"{key} in {path} is {value!r}, but must be of type {convert.__name__}.") from error
    parser.set_defaults(**settings)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands that take a config file."""
    parser = argparse.ArgumentParser(prog="agd", description="Guidance without the second pass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    train_ = commands.add_parser(
        "train",
        usage="agd train --checkpoint FILE --output FILE.safetensors [--prompts FILE] [settings]",
        help="distil the guidance of a checkpoint into an adapter",
        description="Distils the guidance of a checkpoint into an adapter, from prompts alone. "
        "Run the same command again to go on after a stop. With several GPUs: torchrun --nproc-per-node N -m "
        "comfyui_agd.training train ...",
    )
    train_.add_argument("--output", **_FILE, help="the adapter file to write; its run's folder is beside it")
    train_.add_argument("--start", **_FILE, help="an adapter file to begin from: of the same kind, or a calibrated one")
    train_.add_argument("--dry-run", action="store_true", help="say what it takes, and whether it fits, and stop")
    train_.add_argument("--recording", **_FOLDER, help="a folder of `agd record`, in place of rollouts and prompts")
    train_.set_defaults(run=_train)
    record_ = commands.add_parser(
        "record",
        usage="agd record --checkpoint FILE --output FOLDER [--prompts FILE] [settings]",
        help="record the trajectories that training visits, to train from them many times",
        description="Records what training would visit, with the teacher's predictions: for `agd train --recording`. "
        "Run the same command again to go on after a stop.",
    )
    record_.add_argument("--output", **_FOLDER, help="the folder to record into")
    record_.add_argument("--batches", **_COUNT, help="how many batches (default: --iterations over --reuse)")
    record_.add_argument("--dry-run", action="store_true", help="say how large it will be, and stop")
    record_.set_defaults(run=_record)
    calibrate = commands.add_parser(
        "calibrate",
        usage="agd calibrate --checkpoint FILE --output FILE.safetensors [--prompts FILE] [settings]",
        help="fit a tiny adapter in a tenth of the time",
        description="Fits how strongly each attention guides: a tiny adapter, in a tenth of the time. It is `agd train "
        "--kind scale`, and takes all of its flags. `agd train --start FILE` goes on from there.",
    )
    calibrate.add_argument("--output", **_FILE, help="the adapter file to write; its run's folder is beside it")
    calibrate.add_argument("--dry-run", action="store_true", help="say what it takes, and whether it fits, and stop")
    calibrate.set_defaults(run=_train, recording=None)
    for command in (train_, calibrate, record_):
        command.add_argument("--config", **_FILE, help="a TOML file with any of these flags by name; flags win")
        _add_base(command)
        _add_prompts(command)
        _add_settings(command)
    calibrate.set_defaults(kind="scale")
    evaluate = commands.add_parser(
        "evaluate",
        usage="agd evaluate ADAPTER --checkpoint FILE --prompts FILE [settings]",
        help="measure an adapter on a checkpoint and prompts of yours",
        description="Measures how much of the guidance an adapter gives on a checkpoint, its own or another one, with "
        "your prompts, and how fast; shows it beside CFG. No images are needed.",
    )
    evaluate.add_argument("adapter", type=Path, help=f"the adapter file, or '{ATTENTION_GUIDANCE}'")
    evaluate.add_argument("--json", **_FILE, help="write all that was measured there")
    evaluate.add_argument("--picture", **_FILE, help="write unguided, CFG's and AGD's images there, side by side")
    evaluate.set_defaults(run=_evaluate)
    _add_base(evaluate)
    group = evaluate.add_argument_group("prompts")
    group.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="a text file, one per line, or the prompts themselves"
    )
    group.add_argument("--negative", **_NEGATIVE)
    group = evaluate.add_argument_group("measuring", "Defaults in brackets.")
    omegas = "guidance scales (cfg) to measure at; default: those that the adapter's training was measured at"
    group.add_argument("--omega", type=float, nargs="+", metavar="X", help=omegas)
    for setting in fields(AssessConfig):
        if setting.name != "omegas":
            _add_setting(group, setting)
    inspect = commands.add_parser("inspect", help="check an adapter file and show what it says of itself")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser(
        "export",
        help="write a low_rank adapter as a LoRA for one guidance scale",
        description="Writes an adapter that was trained with --kind low_rank as a LoRA that any loader takes: at "
        "strength 1 and cfg 1 the model samples with that guidance.",
    )
    export.add_argument("adapter", type=Path)
    export.add_argument("output", type=Path)
    export.add_argument("--omega", type=float, required=True, metavar="X", help="the guidance scale")
    export.set_defaults(run=_export)
    return parser, {"train": train_, "calibrate": calibrate, "record": record_}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    args = parser.parse_args(argv)
    if getattr(args, "config", None):
        _read_config(args.config, commands[args.command])
        args = parser.parse_args(argv)
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args = _parse(argv)
        args.run(args)
    except (UsageError, ValueError, OSError, RuntimeError, ArithmeticError) as error:
        print(f"agd: {error}", file=sys.stderr)
        return 1
    return 0
