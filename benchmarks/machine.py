"""The machine that a benchmark runs on: its name, and its memory between two measurements."""

import ctypes
import datetime
import gc
import platform
import sys

import torch


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


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
