"""A benchmark's work folder: what was computed once is kept there, and found again by what it was made from."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_agd.agd_core.atomic import replacing


def make_once(done: Path, make: Callable[[], object]) -> None:
    """Call `make`, unless it was called to its end before: then there is the file `done`."""
    if not done.exists():
        make()
        done.touch()


class WorkFolder:
    """A folder of results. Each is kept with its identity, what it was made from, and made again when that changes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, kind: str, name: str) -> Path:
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return self.folder / kind / name

    @contextlib.contextmanager
    def locked(self, kind: str, name: str) -> Iterator[None]:
        """Only one process at a time; another that wants the same waits, and then finds it."""
        with self.path("locks", f"{kind}-{name}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def tensors(
        self, kind: str, name: str, identity: dict, make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What `make` returns, or returned when it was called with this identity."""
        path, identity = self.path(kind, f"{name}.safetensors"), json.loads(json.dumps(identity))
        with self.locked(kind, name):
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    if json.loads(file.metadata()["identity"]) == identity:
                        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            tensors = make()
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"identity": json.dumps(identity)})
        return tensors

    def data(self, kind: str, name: str, identity: dict, make: Callable[[], list[dict]]) -> list[dict]:
        """The same for JSON data."""
        path = self.path(kind, f"{name}.json")
        with self.locked(kind, name):
            if path.exists() and (kept := json.loads(path.read_text()))["identity"] == identity:
                return kept[name]
            data = make()
            with replacing(path) as temporary:
                Path(temporary).write_text(json.dumps({"identity": identity, name: data}))
        return data

    def save_rows(self, name: str, rows: list[dict]) -> None:
        with replacing(self.path("rows", f"{name}.json")) as temporary:
            Path(temporary).write_text(json.dumps(rows, indent=1) + "\n")

    def rows(self, names: Iterable[str] | None = None) -> list[dict]:
        """All that are saved, or those saved by these names, in their order."""
        known = {file.stem: file for file in sorted((self.folder / "rows").glob("*.json"))}
        files = known.values() if names is None else [known[name] for name in names if name in known]
        return [row for file in files for row in json.loads(file.read_text())]
