"""`models/agd`, where adapters live, as one of ComfyUI's model folders."""

import os
from pathlib import Path

import folder_paths

KEY = "agd"


def _own_folder() -> str:
    return os.path.join(folder_paths.models_dir, KEY)


def register() -> None:
    """Add `models/agd` to ComfyUI's folders, beside those that extra_model_paths.yaml gave the key already."""
    folder_paths.add_model_folder_path(KEY, _own_folder())
    folder_paths.folder_names_and_paths[KEY][1].add(".safetensors")  # a new key starts without extensions


def adapters() -> list[str]:
    """The adapter files' names, relative to their folders."""
    return folder_paths.get_filename_list(KEY)


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


def new_adapter_path(name: str) -> Path:
    """Where an adapter called `name` is saved, in `models/agd`. Raises `ValueError` outside of it."""
    folder = Path(_own_folder()).resolve()
    path = (folder / f"{name.removesuffix('.safetensors')}.safetensors").resolve()
    if not path.is_relative_to(folder) or not path.stem:
        raise ValueError(f"An adapter can't be saved as {name!r}: give a name inside {folder}, such as 'my_adapter'.")
    return path
