"""pyproject.toml and requirements.txt, as the registry, ComfyUI Manager and pip read them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comfyui_agd.agd_core.comfyui.runtime import OLDEST_COMFYUI
from comfyui_agd.tests.support.imports import COMFYUI, ROOT, outside
from comfyui_agd.tools import draw_icon
from comfyui_agd.tools.package import published, tracked

PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
ACCELERATORS = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal", "Huawei Ascend"}


def value(key: str) -> str:
    return re.search(rf'^{key} = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def read():
    """By ComfyUI's own reader."""
    return pytest.importorskip("comfy_config.config_parser").extract_node_configuration(str(ROOT))


def test_comfyui_reads_what_is_supported(read):
    assert read.project.supported_os == ["OS Independent"]
    assert {each.split(" :: ")[-1] for each in read.project.supported_accelerators} == ACCELERATORS
    assert read.project.supported_comfyui_version == f">={OLDEST_COMFYUI}"


def test_the_registry_s_fields_have_its_forms(read):
    assert re.fullmatch(r"[a-z]([a-z0-9]|[-_.](?![-_.])){1,98}", read.project.name)
    assert "comfyui" not in read.project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", read.project.version)
    assert (ROOT / read.project.license.file).is_file()
    assert read.project.description
    assert read.tool_comfy.publisher_id
    assert read.tool_comfy.display_name
    # tools/package.py packs nothing that git doesn't track.
    assert read.tool_comfy.includes == []


def test_every_address_of_the_repository_is_the_one_that_is_set():
    host, repository = "https://github.com/", value("Repository").removeprefix("https://github.com/")
    for key in ("Documentation", '"Bug Tracker"'):
        assert value(key).startswith(f"{host}{repository}/")
    texts = [name for name in tracked() if name.endswith((".toml", ".md", ".yml", ".py", ".json"))]
    # By the repository's name, and by the pack's, which the repository need not have.
    names = "|".join({re.escape(repository.split("/")[1]), re.escape(value("name"))})
    address = re.compile(rf"github(?:usercontent)?\.com/([\w.-]+/(?:{names}))\b")
    found = {each for name in texts for each in address.findall((ROOT / name).read_text("utf-8"))}
    assert found == {repository}


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_pictures_are_at_addresses_that_serve_a_file_of_the_repository(key):
    base = f"{value('Repository')}/main/".replace("github.com", "raw.githubusercontent.com")
    name = value(key).removeprefix(base)
    assert name in tracked()
    assert name not in published()


@pytest.mark.parametrize(("name", "draw"), [("icon", draw_icon.icon), ("banner", draw_icon.banner)])
def test_pictures_are_what_the_script_draws(name, draw):
    with Image.open(ROOT / "docs" / f"{name}.png") as image:
        found = np.asarray(image, dtype=float)
    # Another Pillow may round otherwise.
    assert np.abs(found - np.asarray(draw())).mean() < 1


def test_pictures_have_the_registry_s_shapes():
    width, height = draw_icon.ICON
    assert width == height <= 400
    width, height = draw_icon.BANNER
    assert width * 9 == height * 21


def test_requirements_ask_for_nothing():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_pip_s_dependencies_are_what_is_imported():
    listed = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    files = [ROOT / name for name in published() if name.endswith(".py")]
    # yaml is imported in a `try`, for files of the paper authors' code.
    imported = set().union(*(outside(Path(file)) for file in files)) - COMFYUI - {"yaml"}
    packages = {"PIL": "Pillow"}
    assert set(re.findall(r'"(\w+)', listed)) == {packages.get(module, module) for module in imported}
