"""Finding ComfyUI and making it importable, for the command line and the tests. Inside ComfyUI this does nothing."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from ..errors import AGDError

# The oldest release on which the tests pass (`make test-matrix`); pyproject's requires-comfyui says the same.
OLDEST_COMFYUI = "0.16.3"
_PACK = Path(__file__).resolve().parents[2]


class ComfyUINotFound(AGDError, RuntimeError):
    """There is no ComfyUI where one was looked for."""


class ComfyUITooOld(AGDError, RuntimeError):
    """This pack needs a newer ComfyUI than the one that loads it."""


def require_comfyui() -> None:
    """Raise `ComfyUITooOld` if the ComfyUI that is imported is too old to use this pack."""
    try:
        from comfyui_version import __version__ as found
    except ImportError:
        found = "a release before versions"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < tuple(map(int, OLDEST_COMFYUI.split("."))):
        raise ComfyUITooOld(f"AGD needs ComfyUI {OLDEST_COMFYUI} or newer, but this is {found}: update ComfyUI.")


def _is_comfyui(folder: Path) -> bool:
    return (folder / "comfyui_version.py").is_file() and (folder / "comfy" / "samplers.py").is_file()


def find_comfyui(path: str | Path | None = None) -> Path:
    """ComfyUI's folder: `path`, else COMFYUI_PATH, else the one this pack lives in, else the one `make` set up.

    A place that was asked for by name but holds no ComfyUI is an error, not a reason to look elsewhere.
    """
    for name, asked in (("--comfyui", path), ("COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if asked:
            folder = Path(asked).expanduser().resolve()
            if _is_comfyui(folder):
                return folder
            raise ComfyUINotFound(f"{name} is {folder}, but no ComfyUI is there (no comfyui_version.py and comfy/).")
    # The folder as the user sees it: a pack linked into custom_nodes belongs to that ComfyUI too.
    working = Path(os.environ.get("PWD", os.getcwd()))
    around = [*_PACK.parents[:2], working, *working.parents[:2]]
    for folder in [*around, *sorted((_PACK / ".comfyui").glob("ComfyUI-*"), reverse=True)]:
        if _is_comfyui(folder):
            return folder
    raise ComfyUINotFound(
        "No ComfyUI was found: pass --comfyui PATH, set COMFYUI_PATH, work inside a ComfyUI folder, "
        "or run `make setup` in this pack's own folder."
    )


def use_comfyui(path: str | Path | None = None, *, cpu: bool = False) -> Path | None:
    """Make `import comfy` work in this process; without a GPU, or with `cpu`, ComfyUI computes on the CPU.

    Returns ComfyUI's folder, or None where comfy is importable already (inside ComfyUI).
    """
    if "comfy" in sys.modules or importlib.util.find_spec("comfy") is not None:
        return None
    folder = find_comfyui(path)
    # First, so that ComfyUI's own `nodes` and `utils` win over anything else of that name.
    sys.path.insert(0, str(folder))
    require_comfyui()
    import torch
    from comfy.cli_args import args

    mps = torch.backends.mps.is_available()
    if cpu or not (torch.cuda.is_available() or mps or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        args.cpu = True
    return folder
