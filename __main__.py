"""`python path/to/this/folder train ...`: the `agd` command from a folder that was never pip-installed."""

import importlib.util
import sys
from pathlib import Path


def _load_pack(name: str = "comfyui_agd") -> None:
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    # Running a folder puts it on the path, where `nodes` would hide ComfyUI's module of that name.
    sys.path.remove(str(Path(sys.argv[0]).parent if sys.argv[0].endswith("__main__.py") else sys.argv[0]))
    _load_pack()
    from comfyui_agd.training.cli import main

    sys.exit(main())
