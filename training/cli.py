"""The `agd` command: train, inspect. ComfyUI is loaded, through the bridge, only once a command needs it."""

import argparse
import importlib
import json
import logging
import signal
import sys
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from ..agd_core import checkpoint
from .config import TrainConfig
from .plot import loss_plot
from .trainer import Callbacks, Progress, train


class UsageError(Exception):
    """Something the user gave that can't work; the message is one sentence and no traceback is shown."""


class ProgressBar:
    """tqdm with loss and time left. Ctrl-C ends the run at the end of the iteration, so that it can go on later."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.phase = ""
        self.stopped = False

    def stop(self, *_) -> None:
        self.stopped = True

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self.phase:
            self.close()
            self.phase = progress.phase
            self.bar = tqdm(total=progress.total, desc=progress.phase, initial=progress.step - 1)
        if progress.loss is not None:
            self.bar.set_postfix(loss=f"{progress.loss:.4f}", refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if self.stopped:
            raise KeyboardInterrupt

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    for f in fields(TrainConfig):
        flag, help = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: %(default)s)"
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, nargs="+", default=f.default, help=help)
        else:
            choices = f.metadata["choices"]
            parser.add_argument(flag, type=type(f.default), default=f.default, choices=choices, help=help)


def _config(args: argparse.Namespace) -> TrainConfig:
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one per line.")
    return prompts


def _load_base(args: argparse.Namespace):
    """(MODEL, CLIP) from a checkpoint file, or from a function for bases that are no checkpoint file."""
    if args.loader:
        module, _, function = args.loader.partition(":")
        try:
            return getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--loader {args.loader} names no function MODULE:FUNCTION ({error}).") from error
    from ..agd_core.comfyui.host import load_checkpoint

    if not args.checkpoint.is_file():
        raise UsageError(f"There is no checkpoint {args.checkpoint}.")
    return load_checkpoint(args.checkpoint)


def _train(args: argparse.Namespace) -> None:
    from ..agd_core.comfyui.runtime import use_comfyui

    prompts, config = _read_prompts(args.prompts), _config(args)
    use_comfyui(args.comfyui)
    from ..agd_core.comfyui.host import ComfyHost

    model, clip = _load_base(args)
    host = ComfyHost(model, clip, autocast=config.autocast)
    progress, state = ProgressBar(), args.output.with_suffix(".state")
    before = signal.signal(signal.SIGINT, progress.stop)
    try:
        trained = train(host, prompts, config, Callbacks(progress), negative=[args.negative], state=state)
    except KeyboardInterrupt:
        raise UsageError(f"Stopped; the same command goes on from {state}.") from None
    finally:
        progress.close()
        signal.signal(signal.SIGINT, before)
    checkpoint.save(args.output, trained.adapter, trained.info)
    plot = args.output.with_suffix(".png")
    loss_plot(trained.losses).save(plot)
    print(f"Wrote {args.output} and {plot}.")
    if trained.evaluation:
        held_out = trained.info.training["held_out_prompts"]
        print(f"On {held_out} held-out prompts: {json.dumps(trained.evaluation.summary())}")


def _inspect(args: argparse.Namespace) -> None:
    print(checkpoint.describe(checkpoint.load_state(args.file)[0], args.file))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agd", description="Guidance without the second pass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train_ = commands.add_parser(
        "train",
        help="distil the guidance of a checkpoint into an adapter",
        description="Distils the guidance of a checkpoint into an adapter, from prompts alone. "
        "Run the same command again to go on after a stop.",
    )
    base = train_.add_mutually_exclusive_group(required=True)
    base.add_argument("--checkpoint", type=Path, help="a full checkpoint file: diffusion model and text encoder")
    base.add_argument("--loader", metavar="MODULE:FUNCTION", help="a Python function that returns (MODEL, CLIP)")
    train_.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt per line")
    train_.add_argument("--output", type=Path, required=True, help="the adapter file to write")
    train_.add_argument("--negative", default="", help="the negative prompt whose guidance is distilled")
    train_.add_argument("--comfyui", type=Path, help="ComfyUI's folder, if it is not found by itself")
    _add_config_options(train_.add_argument_group("settings"))
    train_.set_defaults(run=_train)
    inspect = commands.add_parser("inspect", help="check an adapter file and show what it says of itself")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_inspect)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (UsageError, ValueError, OSError, RuntimeError, ArithmeticError) as error:
        print(f"agd: {error}", file=sys.stderr)
        return 1
    return 0
