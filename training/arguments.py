"""The flags of the `agd` command, and the config files that hold them."""

import argparse
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from ..agd_core.attention_guidance import NAME as ATTENTION_GUIDANCE
from ..agd_core.errors import AGDError
from .assess import AssessConfig
from .base_source import LOADER_NODES
from .config import TrainConfig
from .presets import CARDS

if sys.version_info >= (3, 11):
    import tomllib
else:  # ComfyUI's own requirements bring it
    import tomli as tomllib

Group = argparse._ActionsContainer  # a parser, or a group of its flags
_DTYPES = ("fp32", "fp16", "bf16", "fp8", "fp8_e5m2")


class UsageError(AGDError):
    """Something the user gave that can't work; the message is one sentence and no traceback is shown."""


def _add_file(group: Group, flag: str, help: str) -> None:
    group.add_argument(flag, type=Path, metavar="FILE", help=help)


def _add_folder(group: Group, flag: str, help: str) -> None:
    group.add_argument(flag, type=Path, metavar="FOLDER", help=help)


def _add_count(group: Group, flag: str, help: str) -> None:
    group.add_argument(flag, type=int, metavar="N", help=help)


def _add_negative(group: Group) -> None:
    group.add_argument("--negative", metavar="TEXT", nargs="+", help="negative prompts of the guidance")


def _add_base(parser: argparse.ArgumentParser) -> Group:
    """The fields of `BaseSource`, all but `other_expert`."""
    base = parser.add_argument_group("the base", "A checkpoint, a model's separate files, or a function that loads it.")
    _add_file(base, "--checkpoint", "a full checkpoint file: diffusion model and text encoder")
    _add_file(base, "--diffusion-model", "or a file of the diffusion model alone, with the text encoder's beside it")
    base.add_argument("--text-encoder", type=Path, nargs="+", metavar="FILE", help="its text encoder, up to four files")
    clip_type = f"how the text encoder is used: the type of {LOADER_NODES}, qwen_image for example"
    base.add_argument("--clip-type", metavar="TYPE", help=clip_type)
    _add_file(base, "--vae", "decodes previews and pictures; a checkpoint has its own")
    base.add_argument(
        "--loader", metavar="MODULE:FUNCTION", help="or a Python function: (MODEL, CLIP) or (MODEL, CLIP, VAE)"
    )
    base.add_argument("--lora", nargs="+", metavar="FILE[:STRENGTH]", help="LoRAs that are part of the base")
    base.add_argument("--base-dtype", choices=_DTYPES, help="of its weights in memory; default: ComfyUI's choice")
    _add_folder(base, "--comfyui", "ComfyUI's folder, if it is not found by itself")
    return base


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    _add_file(group, "--prompts", "a text file, one per line; default: the built-in generator's")
    _add_count(group, "--prompt-count", "of the generator, or with wildcards (default: 2000)")
    _add_folder(group, "--wildcards", "folder of lists for __name__ in prompts")
    group.add_argument("--verbatim", action="store_true", default=None, help="prompts without wildcards or comments")
    _add_negative(group)
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


def _add_setting(group: Group, f: Field) -> None:
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
    _add_file(parser, "--start", "an adapter file to begin from: of the same kind, or a scale adapter")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, and whether it fits, and stop")
    _add_folder(parser, "--recording", "a folder of `agd record`, in place of rollouts and prompts")
    _add_run(parser)
    return parser


def _add_record(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "record",
        usage="agd record --checkpoint FILE --output FOLDER [--prompts FILE] [settings]",
        help="record the trajectories that training visits, to train from them many times",
        description="Records what training would visit, with the teacher's predictions: for `agd train --recording`. "
        "Run the same command again to go on after a stop.",
    )
    _add_folder(parser, "--output", "the folder to record into")
    _add_count(parser, "--batches", "how many batches (default: --iterations over --reuse)")
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
    omegas = "guidance scales (cfg) to measure at; default: those that the adapter's training was measured at"
    group.add_argument("--omega", type=float, nargs="+", metavar="X", help=omegas)
    for setting in fields(AssessConfig):
        if setting.name != "omegas":
            _add_setting(group, setting)


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
    parser.add_argument("--omega", type=float, required=True, metavar="X", help="the guidance scale")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What was given by flags, or else by the config file. Its `command` is the command's name."""
    parser = argparse.ArgumentParser(prog="agd", description="Guidance without the second pass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    train, record, calibrate = _add_train(commands), _add_record(commands), _add_calibrate(commands)
    for add in (_add_evaluate, _add_inspect, _add_import, _add_export):
        add(commands)
    args = parser.parse_args(argv)
    if getattr(args, "config", None):
        _read_config(args.config, {"train": train, "record": record, "calibrate": calibrate}[args.command])
        args = parser.parse_args(argv)
    return args


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
    parser.set_defaults(**{key: _value_of(flags[key], value, path) for key, value in settings.items()})


def _value_of(flag: argparse.Action, value: Any, path: Path) -> Any:
    """A setting of a config file as the flag would have it. Raises `UsageError`."""
    several, convert = flag.nargs == "+", flag.type if isinstance(flag.type, type) else None
    if several != isinstance(value, list) or isinstance(value, dict):
        raise UsageError(f"{flag.dest} in {path} is {value!r}, but must be {'a list' if several else 'one value'}.")
    try:
        return value if convert is None or several else convert(value)
    except (TypeError, ValueError) as error:
        expected = "" if convert is None else convert.__name__
        raise UsageError(f"{flag.dest} in {path} is {value!r}, but must be of type {expected}.") from error
