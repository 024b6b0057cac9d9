"""The folder of a training run: its settings, its saved states, what was measured, its pictures.

config.toml           every setting of the run; `agd train --config` runs it again
prompts.txt           the prompts, with all wildcards drawn
state-000250.pt       the last few states, from which the run goes on; gone when it ends
best.safetensors      the best adapter so far; the output takes its place when the run ends
metrics.jsonl         a line per logged iteration and per measurement
previews/             CFG beside AGD; training.png: loss and gap closed by iteration; report.txt
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..agd_core.adapter_file import replacing
from ..agd_core.errors import AGDError
from ..agd_core.text import logger

log = logger(__name__)

_RUN_STATE = re.compile(r"state-(\d+)\.pt")


class RunFolderError(AGDError, ValueError):
    """A run can't be kept in that folder, or what is in it belongs to another run."""


def folder_of(output: Path) -> Path:
    """Where the run that makes `output` keeps its files."""
    return output.with_suffix(".run")


def longest_files_of(output: Path) -> list[Path]:
    """Of the run that makes `output`, the files whose paths are the longest in either folder."""
    return [folder_of(output) / "best.safetensors", folder_of(output) / "previews" / "step-1000000.png"]


class RunFolder:
    """Files are replaced whole: killed at any moment, what was written before is still there."""

    def __init__(self, path: Path):
        self.path = path
        self._board: Any = None  # TensorBoard's writer, where it is installed

    def prepare(self) -> None:
        """Make the folder and try to write to it. Raises `RunFolderError`. Remains of a killed process are removed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "previews").mkdir(exist_ok=True)
            for remains in [*self.path.glob(".*.part"), *(self.path / "previews").glob(".*.part")]:
                remains.unlink()
            with replacing(self.path / "writable") as temporary:
                Path(temporary).write_text("yes")
            (self.path / "writable").unlink()
        except OSError as error:
            raise RunFolderError(
                f"The training's folder can't be written to: choose another output. Details: {self.path} ({error})."
            ) from error

    def run_states(self) -> list[Path]:
        """The saved ones, the newest first."""
        found = {path: _RUN_STATE.fullmatch(path.name) for path in self.path.glob("state-*.pt")}
        steps = {path: int(match[1]) for path, match in found.items() if match}
        return sorted(steps, key=lambda path: steps[path], reverse=True)

    def save_run_state(self, step: int, saved: dict, keep: int) -> None:
        """Raises `RunFolderError` where it can't be written; older states stay."""
        try:
            with replacing(self.path / f"state-{step:06d}.pt") as temporary:
                torch.save(saved, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError on a full disk
            raise RunFolderError(
                f"The state of step {step} could not be saved in {self.path} ({str(error).splitlines()[0]}); make room "
                "there, and the same command goes on from the last state that was."
            ) from error
        for old in self.run_states()[keep:]:
            old.unlink()

    def load_run_state(self) -> dict | None:
        """The newest state that can be read, or None if there is none. Raises `RunFolderError` if all are damaged."""
        saved = self.run_states()
        for path in saved:
            try:
                with torch.inference_mode(False):  # in which nodes run: nothing could be trained on from there
                    return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file makes torch raise
                log.warning("AGD: %s is damaged (%s); an older state is used.", path, type(error).__name__)
        if saved:
            raise RunFolderError(f"No state in {self.path} can be read; delete the folder to start anew.")
        return None

    def clear(self) -> None:
        """Remove what only an unfinished run needs."""
        for path in [*self.run_states(), self.path / "best.safetensors"]:
            path.unlink(missing_ok=True)

    def start_metrics(self, step: int, measured: bool) -> None:
        """Keep only the lines up to `step`, with its measurement if it was `measured`: others will be written again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that a killed process left half written
                values = json.loads(line)
                if values["step"] < step or (values["step"] == step and (measured or "score" not in values)):
                    kept.append(line)
        with replacing(path) as temporary:
            Path(temporary).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = _tensorboard(self.path / "tensorboard", step)

    def add_metrics(self, step: int, **values) -> None:
        """A line of `metrics.jsonl`, and TensorBoard's scalars where it is installed."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in _flat(values):
                self._board.add_scalar(name, value, step)

    def save_text(self, name: str, text: str) -> None:
        with replacing(self.path / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")

    def save_image(self, name: str, image: Image.Image) -> None:
        with replacing(self.path / name) as temporary:
            image.save(temporary, format="PNG")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _flat(values: dict, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{key}", value))
    return found


def _tensorboard(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
