"""The flags of the `agd` command, and the config files that hold them."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.checked import why_wrong
from ..agd_core.errors import AGDError
from ..agd_core.text import one_line
from .assess import AssessConfig
from .base_source import LOADER_NODES
from .config import TrainConfig
from .older_settings import without_other_kinds
from .options import Settings, allowed, option
from .presets import CARDS, QUALITIES, defaults_of

if sys.version_info >= (3, 11):
    import tomllib
else:  # ComfyUI's own requirements bring it
    import tomli as tomllib

Group = argparse._ActionsContainer  # a parser, or a group of its flags
_DTYPES = ("fp32", "fp16", "bf16", "fp8", "fp8_e5m2")
# What runs code that they name: a config file may come from a stranger.
_RUN_CODE = ("loader", "comfyui")
Given = TypeVar("Given", bound=Settings)


class UsageError(AGDError):
    """Something the user gave that can't work; the message is one sentence and no traceback is shown."""


@dataclass(frozen=True)
class PromptSettings(Settings):
    """Of the prompts that are made."""

    prompt_count: int = option(2000, "how many prompts the generator, or the wildcards, make", limits=(1, 1_000_000))


@dataclass(frozen=True)
class RecordSettings(Settings):
    """Of `agd record`, besides a training's."""

    batches: int = option(0, "how many batches; 0: --iterations over --reuse", limits=(0, 10_000_000))


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Of `agd export`."""

    omega: float = option(help="the guidance scale", limits=(0.01, 1000.0))


def given(kind: type[Given], args: argparse.Namespace) -> Given:
    """The settings of that kind that were given, with defaults for the others. Raises `SettingsError`."""
    return kind(**given_values(kind, args))


def given_values(kind: type[Settings], args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given by flags or the config file."""
    values = {f.name: getattr(args, f.name) for f in fields(kind)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}


class _Parser(argparse.ArgumentParser):
    """Its errors repeat what was given, names of files among it."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def _add_file(group: Group, flag: str, help: str) -> None:
    group.add_argument(flag, type=Path, metavar="FILE", help=help)


def _add_folder(group: Group, flag: str, help: str) -> None:
    group.add_argument(flag, type=Path, metavar="FOLDER", help=help)


def _add_negative(group: Group) -> None:
    group.add_argument("--negative", metavar="TEXT", nargs="+", help="negative prompts")


def _add_base(parser: argparse.ArgumentParser) -> Group:
    """The fields of `BaseSource`, all but `other_expert`."""
    base = parser.add_argument_group("the base", "A checkpoint, a model's separate files, or a function that loads it.")
    _add_file(base, "--checkpoint", "a full checkpoint file: diffusion model and text encoder")
    _add_file(base, "--diffusion-model", "or a file of the diffusion model alone, with the text encoder's beside it")
    base.add_argument("--text-encoder", type=Path, nargs="+", metavar="FILE", help="its text encoder, up to four files")
    clip_type = f"how the text encoder is used: the type of {LOADER_NODES}, qwen_image for example"
    base.add_argument("--clip-type", metavar="TYPE", help=clip_type)
    _add_file(
        base,
        "--vae",
        "decodes previews and pictures, which else are approximate; `agd evaluate` takes a checkpoint's own",
    )
    base.add_argument(
        "--loader", metavar="MODULE:FUNCTION", help="or a Python function: (MODEL, CLIP) or (MODEL, CLIP, VAE)"
    )
    base.add_argument("--lora", nargs="+", metavar="FILE[:STRENGTH]", help="LoRAs that are part of the base")
    base.add_argument(
        "--base-dtype", choices=_DTYPES, help="dtype of the base's weights in memory; default: ComfyUI's choice"
    )
    _add_folder(base, "--comfyui", "ComfyUI's folder, if it is not found by itself")
    return base


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    _add_file(group, "--prompts", "a text file, one per line; default: the built-in generator's")
    _add_settings_of(group, PromptSettings)
    _add_folder(group, "--wildcards", "folder of lists for __name__ in prompts")
    group.add_argument("--verbatim", action="store_true", default=None, help="prompts without wildcards or comments")
    _add_negative(group)
    group.add_argument("--negatives", metavar="FILE", help="or a text file of them; 'built-in' for the generator's")


# The settings that most people set come first in the help text; what is named nowhere is "advanced".
_METAVARS = {int: "N", float: "X"}
_MAIN = ("iterations", "batch", "learning_rate", "width", "height", "aspect_ratios", "omega_max", "hidden", "seed")
_MEMORY = ("memory", "micro_batch", "checkpointing", "precision")
_FILES = ("held_out", "evaluate_every", "patience", "preview_every", "save_every", "keep_states")
_SUITED = "Defaults in brackets, those of all bases first."


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = {f.name: f for f in fields(TrainConfig)}
    advanced = tuple(name for name in settings if name not in _MAIN + _MEMORY + _FILES)
    groups = {"training": _MAIN, "memory": _MEMORY, "measuring, showing, saving": _FILES, "advanced": advanced}
    for title, names in groups.items():
        group = parser.add_argument_group(title, _SUITED if names is _MAIN else None)
        if names is _MAIN:
            how_long = "a third of the usual iterations, as many, or three times as many; --iterations wins [normal]"
            group.add_argument("--quality", choices=QUALITIES, default="normal", help=how_long)
        if names is _MEMORY:
            group.add_argument("--card", choices=CARDS, help="the same as --memory for a card of that size")
        for name in names:
            _add_setting(group, settings[name], defaults_of(name))


def _add_settings_of(group: Group, kind: type[Settings]) -> None:
    for f in fields(kind):
        _add_setting(group, f, "" if f.default in (MISSING, ()) else f"{f.default}")


def _add_setting(group: Group, f: Field, default: str) -> None:
    """`default`: as help shows it."""
    flag, several, item = _flag(f), get_origin(f.type) is tuple, (get_args(f.type) or (f.type,))[0]
    how: dict[str, Any] = {"dest": f.name, "help": f"{f.metadata['help']}{f' [{default}]' if default else ''}"}
    if item is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, **how)
        return
    how |= {"type": item, "metavar": _METAVARS.get(item)}
    if several:
        how |= {"nargs": "+", "metavar": how["metavar"] or ("NAME" if f.default else "W:H")}
    else:
        how |= {"choices": f.metadata["choices"], "required": f.default is MISSING}
    group.add_argument(flag, **how)


def _flag(f: Field) -> str:
    return "--" + (f.metadata["called"] or f.name).replace("_", "-")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What the commands that visit trajectories have in common."""
    _add_file(parser, "--config", "a TOML file with any of these flags by name; flags win")
    other = "of a model of two experts the other's file: see --sigma-from and --sigma-to"
    _add_file(_add_base(parser), "--other-expert", other)
    _add_prompts(parser)
    _add_settings(parser)


def _add_train(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        usage="agd train --checkpoint FILE --output FILE.safetensors [--prompts FILE] [settings]",
        help="distil the guidance of a checkpoint into an adapter",
        description="Distils the guidance of a checkpoint into an adapter, from prompts alone. "
        "Run the same command again to go on after a stop. With several GPUs: torchrun --nproc-per-node N -m "
        "comfyui_agd.training train ...",
    )
    _add_file(parser, "--output", "the adapter file to write; its run's folder is beside it")
    _add_file(parser, "--start", "an adapter to begin from: of the same kind, or a scale adapter")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, and whether it fits, and stop")
    _add_folder(parser, "--recording", "a folder of `agd record`, to learn from that instead of sampling")
    _add_run(parser)
    return parser


def _add_record(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "record",
        usage="agd record --checkpoint FILE --output FOLDER [--prompts FILE] [settings]",
        help="record what training learns from, to train from it many times",
        description="Records what training would learn from, the teacher's predictions too: `agd train --recording`. "
        "Run the same command again to go on after a stop.",
    )
    _add_folder(parser, "--output", "the folder to record into")
    _add_settings_of(parser, RecordSettings)
    parser.add_argument("--dry-run", action="store_true", help="say how large it will be, and stop")
    _add_run(parser)
    return parser


def _add_calibrate(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "calibrate",
        usage="agd calibrate --checkpoint FILE --output FILE.safetensors [--prompts FILE] [settings]",
        help="fit a tiny adapter in a tenth of the time",
        description="Fits how strongly each attention guides: a tiny adapter, in a tenth of the time. It is `agd train "
        "--kind scale`, and takes all of its flags. `agd train --start FILE` goes on from there.",
    )
    _add_file(parser, "--output", "the adapter file to write; its run's folder is beside it")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, and whether it fits, and stop")
    _add_run(parser)
    parser.set_defaults(recording=None, kind="scale")
    return parser


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        usage="agd evaluate ADAPTER --checkpoint FILE --prompts FILE [settings]",
        help="measure an adapter on a checkpoint and prompts of yours",
        description="Measures how much of the guidance an adapter gives on a checkpoint, its own or another one, with "
        "your prompts, and how fast; shows it beside CFG. No images are needed.",
    )
    parser.add_argument("adapter", type=Path, help=f"the adapter file, or '{ATTENTION_GUIDANCE}'")
    _add_file(parser, "--json", "write all that was measured there")
    _add_file(parser, "--picture", "write unguided, CFG's and AGD's images there, side by side")
    _add_base(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="a text file, one per line, or the prompts themselves"
    )
    _add_negative(group)
    group = parser.add_argument_group("measuring", "Defaults in brackets.")
    _add_settings_of(group, AssessConfig)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="check an adapter file and show what it says of itself")
    parser.add_argument("file", type=Path, help="an adapter file, or a .pt of the paper authors' code")


def _add_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="write an adapter of the paper authors' code as a file of AGD's",
        description="Writes an adapter that the public code of the paper's authors has trained, for SD 2.1 or SDXL, as "
        "an adapter file.",
    )
    parser.add_argument("source", type=Path, help="the run's folder, of which the newest checkpoint is taken, or a .pt")
    parser.add_argument("output", type=Path, help="the adapter file to write")


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a low_rank adapter as a LoRA for one guidance scale",
        description="Writes an adapter that was trained with --kind low_rank as a LoRA that any loader takes: at "
        "strength 1 and cfg 1 the model samples with that guidance.",
    )
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    _add_settings_of(parser, ExportSettings)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What was given by flags, or else by the config file. Its `command` is the command's name."""
    parser = _Parser(prog="agd", description="Guidance in one model evaluation per step.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    train, record, calibrate = _add_train(commands), _add_record(commands), _add_calibrate(commands)
    for add in (_add_evaluate, _add_inspect, _add_import, _add_export):
        add(commands)
    args = parser.parse_args(argv)
    if getattr(args, "config", None):
        command = {"train": train, "record": record, "calibrate": calibrate}[args.command]
        command.set_defaults(**_read_config(args, command))
        args = parser.parse_args(argv)
    if args.command == "calibrate" and args.kind != "scale":
        raise UsageError(f"agd calibrate trains kind scale: for kind {args.kind} there is `agd train`.")
    return args


def _read_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the config file of `args` holds, by the names of `parser`'s flags. Raises `UsageError`."""
    flags = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    settings, path = _load_toml(args.config), args.config
    unknown = sorted(settings.keys() - flags.keys())
    if unknown:
        raise UsageError(f"The config file {path} has unknown settings: {', '.join(unknown)}; see `agd train --help`.")
    if wrong := [phrase for key, value in settings.items() for phrase in _why_wrong(flags[key], value)]:
        raise UsageError(f"The config file {path} can't be used: {'; '.join(wrong)}.")
    _refuse_code(settings, args)
    return without_other_kinds(settings)


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"The config file {path} can't be read ({error}).") from error


def _why_wrong(flag: argparse.Action, value: Any) -> Iterator[str]:
    """What keeps a config file's value from being the flag's, a phrase each."""
    several = flag.nargs == "+"
    if several != isinstance(value, list):
        yield f"{flag.dest} is {value!r:.60}, but must be {'a list' if several else 'one value'}"
        return
    kind = bool if flag.nargs == 0 else flag.type if flag.type in (int, float) else str
    found = [why_wrong(allowed(kind, flag.choices), each) for each in (value if several else [value])]
    yield from (f"{flag.dest} {phrase}" for phrase in found if phrase)


def _refuse_code(settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises `UsageError` where a config file names code to run that the command line doesn't."""
    if named := [name for name in _RUN_CODE if settings.get(name) and not getattr(args, name)]:
        flags = " ".join(f"--{name} {shlex.quote(settings[name])}" for name in named)
        raise UsageError(
            f"The config file {args.config} names code to run: if you trust it, say so on the command line, with "
            f"{flags}."
        )
