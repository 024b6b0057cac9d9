"""`models/agd`, where adapters live, as one of ComfyUI's model folders; and files in its others."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import folder_paths

from ..adapter_name import AdapterNameError, file_name
from ..output_file import why_not_writable

KEY = "agd"


def _own_folder() -> str:
    return os.path.join(folder_paths.models_dir, KEY)


def register() -> None:
    """Add `models/agd` to ComfyUI's folders, before those that extra_model_paths.yaml gave the key already.

    Before, because AGD Train writes there: of two files with one name it is the newer one that has to be read.
    """
    folder_paths.add_model_folder_path(KEY, _own_folder(), is_default=True)
    # A new key starts without extensions. What ends in .pt are files of the paper authors' code.
    folder_paths.folder_names_and_paths[KEY][1].update((".safetensors", ".pt"))


def adapters() -> list[str]:
    """The adapter files' names, relative to their folders. The states that trainings keep beside them are none."""
    names = folder_paths.get_filename_list(KEY)
    return [name for name in names if not (name.endswith(".pt") and Path(name).parent.name.endswith(".run"))]


def why_missing(name: str) -> str | None:
    """Why there is no adapter of that name, in one sentence, or None if there is one."""
    if name and folder_paths.get_full_path(KEY, name) is not None:
        return None
    found = f"There is no adapter {name!r}" if name else "There are no adapters yet"
    looked = ", ".join(folder_paths.get_folder_paths(KEY))
    return f"{found} in {looked}. Put adapter files there, or make one with AGD Train."


def adapter_path(name: str) -> Path:
    """The file of that name. Raises `FileNotFoundError` saying where adapters are looked for."""
    if missing := why_missing(name):
        raise FileNotFoundError(missing)
    return Path(folder_paths.get_full_path(KEY, name))


def _hidden_by(path: Path) -> str | None:
    """What would be read in place of a new adapter file at `path` in `models/agd`."""
    own, folders = _own_folder(), folder_paths.get_folder_paths(KEY)
    # Another node pack may have put its folder before ours.
    before = [folder for folder in folders[: folders.index(own)] if Path(folder).resolve() != Path(own).resolve()]
    hiding = (Path(folder) / path.relative_to(own) for folder in before)
    if found := next(filter(Path.is_file, hiding), None):
        return f"the loader would read {found} in its place"
    return None


def _leads_outside(files: Sequence[Path]) -> str | None:
    """Which of `files`, in `models/agd` by their names, isn't there by its links."""
    own = Path(_own_folder()).resolve()
    outside = next((file for file in files if not file.resolve().is_relative_to(own)), None)
    return f"{outside} leads out of {_own_folder()}" if outside else None


def new_adapter_path(name: str, beside: Callable[[Path], Sequence[Path]] = lambda path: ()) -> Path:
    """Where an adapter called `name` is saved, in `models/agd`. `beside` gives the files that are written with it.

    Raises `AdapterNameError` where they can't be, which a real attempt tells.
    """
    path = Path(_own_folder(), file_name(name))
    files = [path, *beside(path)]
    if reason := _leads_outside(files) or why_not_writable(files) or _hidden_by(path):
        raise AdapterNameError(f"No adapter can be called {name!r}: {reason}. Choose another name.")
    return path


def name_of(path: Path) -> str:
    """The name under which the loader lists a file of `models/agd`."""
    return os.path.relpath(path, _own_folder())


@functools.cache
def _read_extra_model_paths() -> None:
    """What ComfyUI itself does when it starts, which a command doesn't start."""
    file = os.path.join(folder_paths.base_path, "extra_model_paths.yaml")
    if os.path.isfile(file):
        from utils.extra_config import load_extra_path_config  # not above: inside ComfyUI others may be called `utils`

        load_extra_path_config(file)


def model_folders(kinds: Sequence[str]) -> list[str]:
    """ComfyUI's folders of these kinds of models, "checkpoints" for example; for commands."""
    _read_extra_model_paths()
    return [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]


def find_model_file(path: Path, kinds: Sequence[str]) -> Path | None:
    """The file itself, or the one that has this name in ComfyUI's lists of these kinds of models; for commands."""
    _read_extra_model_paths()
    if path.is_file():
        return path
    found = (folder_paths.get_full_path(kind, str(path)) for kind in kinds)
    return next((Path(each) for each in found if each), None)
