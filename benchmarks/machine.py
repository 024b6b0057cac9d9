"""The machine that a benchmark runs on: its name, and its memory between two measurements."""

import ctypes
import datetime
import gc
import platform
import sys

import torch


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
    """What Python no longer holds goes back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
