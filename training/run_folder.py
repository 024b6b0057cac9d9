"""The folder of a training run: its settings, its saved states, what was measured, its pictures.

One process at a time has it (`held`).

config.toml           every setting of the run; `agd train --config` runs it again
prompts.txt           the prompts, with all wildcards drawn
state-000250.pt       the last few states, from which the run goes on; gone when it ends
best.safetensors      the best adapter so far; the output takes its place when the run ends
metrics.jsonl         a line per logged iteration and per measurement
previews/             CFG beside AGD; training.png: loss and gap closed by iteration; report.txt
holder.txt            who trains here, while one does
"""

import importlib.util
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..agd_core import adapter_file
from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterFileError, AdapterInfo
from ..agd_core.atomic import NotWritten, append_text, read_torch, remove_remains, write_bytes, write_text, write_torch
from ..agd_core.errors import AGDError
from ..agd_core.text import logger
from . import folder_lock

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
    """Files are replaced whole: killed at any moment, what was written before is still there.

    A run depends on its states alone. The other files only show it: where one can't be written, on Windows because a
    viewer has it open, say, the log says so and the run goes on.
    """

    def __init__(self, path: Path):
        self.path = path
        self._board: Any = None  # TensorBoard's writer, where it is installed
        self._not_written: set[str] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process has the folder, and it can be written to. Raises `FolderInUse`, `RunFolderError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "previews").mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".", suffix=".part") as file:
                file.write(b"yes")
        except OSError as error:
            raise RunFolderError(
                f"The training's folder can't be written to: choose another output. Details: {self.path} ({error})."
            ) from error
        with folder_lock.held(self.path):
            for folder in (self.path, self.path / "previews"):
                remove_remains(folder)
            try:
                yield
            finally:
                self.close()

    def run_states(self) -> list[Path]:
        """The saved ones, the newest first."""
        found = [path for path in self.path.glob("state-*.pt") if _RUN_STATE.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def next_run(self) -> str:
        """What another run of the same training does: "goes on from step 5"."""
        saved = self.run_states()
        return f"goes on from step {_step_of(saved[0])}" if saved else "starts again"

    def save_run_state(self, step: int, saved: dict, keep: int) -> None:
        """Raises `RunFolderError` where it can't be written; older states stay."""
        try:
            write_torch(self.path / f"state-{step:06d}.pt", saved)
        except NotWritten as error:
            raise RunFolderError(
                f"The state of step {step} could not be saved; the same training {self.next_run()}. Details: {error}"
            ) from error
        for old in self.run_states()[keep:]:
            _remove(old)

    def load_run_state(self, check: Callable[[Any], None] = lambda saved: None) -> Any:
        """The newest state that can be read, or None if there is none. Raises `RunFolderError` if all are damaged.

        `check`: raises for what was read and is no state.
        """
        saved = self.run_states()
        for path in saved:
            try:
                found = read_torch(path)
                check(found)
                return found
            except Exception as error:  # whatever a damaged file makes torch raise
                log.warning("AGD: %s is damaged (%s); an older state is used.", path, _first_line(error))
        if saved:
            raise RunFolderError(f"No state in {self.path} can be read; delete the folder to start anew.")
        return None

    def remove_run_states(self, after: int) -> None:
        """Those of later steps than `after`."""
        for path in self.run_states():
            if _step_of(path) > after:
                path.unlink()

    def clear(self) -> None:
        """Remove what only an unfinished run needs."""
        for path in self.of_unfinished_run():
            _remove(path)

    def of_unfinished_run(self) -> list[Path]:
        """The files that only it needs, and that are gone when it ends."""
        return [*self.run_states(), self.path / "best.safetensors"]

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        """Writes a file that only shows the run. The log tells once of each that can't be written."""
        try:
            yield
        except (NotWritten, AdapterFileError) as error:
            if name not in self._not_written:
                log.warning("AGD: the training goes on, but for one of its files. Details: %s", error)
            self._not_written.add(name)

    def start_metrics(self, step: int, measured: bool) -> None:
        """Keep only the lines up to `step`, with its measurement if it was `measured`: others will be written again."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if step and path.exists() else ""
        kept = [line for line in text.splitlines() if _is_up_to(line, step, measured)]
        with self._shown(path.name):
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._board = _tensorboard(self.path / "tensorboard", step)

    def add_metrics(self, step: int, **values) -> None:
        """A line of `metrics.jsonl`, and TensorBoard's scalars where it is installed."""
        with self._shown("metrics.jsonl"):
            append_text(self.path / "metrics.jsonl", json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            try:
                for name, value in _flat(values):
                    self._board.add_scalar(name, value, step)
            except Exception as error:  # its disk is full, say
                _log_without_tensorboard(error)
                self._board = None

    def save_text(self, name: str, text: str) -> None:
        with self._shown(name):
            write_text(self.path / name, text)

    def save_image(self, name: str, image: Image.Image) -> None:
        data = io.BytesIO()
        image.save(data, format="PNG")
        with self._shown(name):
            write_bytes(self.path / name, data.getvalue())

    def save_best(self, adapter: Adapter, info: AdapterInfo) -> None:
        """The best adapter so far, to look at; the run's state holds it, too."""
        with self._shown("best.safetensors"):
            adapter_file.save(self.path / "best.safetensors", adapter, info)

    def close(self) -> None:
        if self._board is not None:
            try:
                self._board.close()
            except Exception as error:
                _log_without_tensorboard(error)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # on Windows another program may have it open
        log.warning("AGD: %s is of no use any more, but can't be removed (%s).", path, error.strerror)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_up_to(line: str, step: int, measured: bool) -> bool:
    """Whether a line of metrics belongs to a run that goes on from `step`, with its measurement if `measured`."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # a killed process left it half written, or it isn't ours
        return False
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return False
    return values["step"] < step or (values["step"] == step and (measured or "score" not in values))


def _flat(values: dict, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{key}", value))
    return found


def _tensorboard(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed, or doesn't work."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        if importlib.util.find_spec("tensorboard") is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=step + 1)
    except Exception as error:  # such as protobuf's TypeError where another pack has installed another version
        _log_without_tensorboard(error)
        return None


def _log_without_tensorboard(error: Exception) -> None:
    log.warning(
        "AGD: TensorBoard is installed but fails, so nothing is written for it; metrics.jsonl has the same (%s).",
        _first_line(error),
    )
