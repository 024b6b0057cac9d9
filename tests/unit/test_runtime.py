"""Which ComfyUI the pack accepts, and its error for others."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from comfyui_agd.agd_core.comfyui.runtime import OLDEST_COMFYUI, ComfyUITooOld, require_comfyui


def pretend(monkeypatch, version: str) -> None:
    module = ModuleType("comfyui_version")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "comfyui_version", module)


@pytest.mark.parametrize("version", [OLDEST_COMFYUI, "0.30.0", "1.0.0", "0.30.0-nightly"])
def test_releases_from_the_oldest_on_are_accepted(monkeypatch, version):
    pretend(monkeypatch, version)
    require_comfyui()


@pytest.mark.parametrize("version", ["0.16.2", "0.3.75", "unknown"])
def test_older_ones_get_an_error_that_says_what_to_do(monkeypatch, version):
    pretend(monkeypatch, version)
    with pytest.raises(ComfyUITooOld, match=rf"needs ComfyUI {OLDEST_COMFYUI} or newer, but this is {version}: update"):
        require_comfyui()


def test_one_without_a_version_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    with pytest.raises(ComfyUITooOld, match="a release before versions"):
        require_comfyui()


def test_the_manager_reads_the_same_version():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert re.search(r'requires-comfyui = ">=(.+)"', text).group(1) == OLDEST_COMFYUI
