"""The machine that a benchmark runs on: its name, and its memory between two measurements.

python benchmarks/machine.py --json FILE
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def device_called(name: str) -> torch.device:
    """With its number, by which ComfyUI compares devices."""
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def error_text(error: BaseException) -> str:
    """Its sort and its first line, as a row has them."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:400]


def today() -> str:
    return f"{datetime.date.today():%d %B %Y}"


def made_on(device: str) -> str:
    """When and on what, in general words."""
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} thread(s)"
    return f"{today()}, on {device_name(device)}{threads}"


def release_memory() -> None:
    """What Python no longer holds goes back to the system, and to other programs on the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def described() -> dict:
    """The card, its driver, and the versions of what computes on it."""
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": card.name if card else None,
        "card_bytes": card.total_memory if card else None,
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "comfyui": _comfyui(),
        "comfy_kernels": _comfy_kernels(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _comfyui() -> str:
    from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

    use_comfyui()
    from comfyui_version import __version__

    return __version__


def _comfy_kernels() -> str:
    """Whose ComfyUI's optional operators are: "eager" are PyTorch's own, all that comfy-kitchen's pure package has."""
    import comfy.quant_ops

    backends = comfy.quant_ops.ck.list_backends()
    return ", ".join(name for name, each in backends.items() if each["available"] and not each["disabled"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write it here")
    parser.parse_args().json.write_text(json.dumps(described(), indent=1) + "\n")
