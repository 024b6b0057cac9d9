"""`python path/to/this/folder train ...`: the `agd` command from a folder that was never pip-installed."""

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def _load_pack(name: str = "comfyui_agd") -> None:
    spec = importlib.util.spec_from_file_location(
        name, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    # Python puts the folder on the path, in one spelling or another, where `nodes` would hide ComfyUI's module.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _FOLDER]
    _load_pack()
    from comfyui_agd.training.cli import main

    sys.exit(main())
