"""Which way imports point: nodes -> training -> agd_core, ComfyUI through one package, and none of them to examples."""

from pathlib import Path

import pytest

from comfyui_agd.tests.support import imports as support
from comfyui_agd.tests.support.imports import COMFYUI, ROOT, imports, outside, top_folders

TORCH_ONLY = {"torch", "einops", "safetensors"}


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


CORE = [file for file in files("agd_core") if "comfyui" not in file.relative_to(ROOT).parts]
BRIDGE = files("agd_core/comfyui")


@pytest.mark.parametrize("file", CORE, ids=lambda f: f.name)
def test_the_core_is_torch_only(file):
    assert outside(file) <= TORCH_ONLY
    assert top_folders(file) <= {"agd_core"}
    assert not any(name.startswith("./agd_core/comfyui") for name in imports(file))


@pytest.mark.parametrize("file", BRIDGE, ids=lambda f: f.name)
def test_the_bridge_imports_comfyui_and_the_core(file):
    assert outside(file) <= TORCH_ONLY | {"PIL", "psutil"} | COMFYUI - {"nodes", "server"}
    assert top_folders(file) <= {"agd_core"}


@pytest.mark.parametrize("file", files("training"), ids=lambda f: f.name)
def test_training_holds_no_ui_and_reaches_comfyui_through_the_bridge(file):
    assert outside(file) <= TORCH_ONLY | {"tqdm", "PIL", "tomli", "filelock", "yaml"}
    assert top_folders(file) <= {"agd_core", "training"}


@pytest.mark.parametrize("file", files("nodes"), ids=lambda f: f.name)
def test_nodes_import_downwards(file):
    assert outside(file) <= TORCH_ONLY | COMFYUI | {"numpy", "PIL"}
    assert top_folders(file) <= {"agd_core", "training", "nodes"}


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_the_entry_points_import_the_pack_alone(name):
    assert top_folders(ROOT / name) <= {"agd_core", "training", "nodes"}


@pytest.mark.parametrize("file", files("examples"), ids=lambda f: f.name)
def test_the_toy_imports_the_pack_and_no_benchmark_or_test(file):
    assert top_folders(file) <= {"agd_core", "training", "examples"}


@pytest.mark.parametrize("file", files("benchmarks"), ids=lambda f: f.name)
def test_benchmarks_import_the_pack_the_toy_and_what_tests_share(file):
    assert top_folders(file) <= {"agd_core", "training", "examples", "tests", "benchmarks"}
    assert all(name.startswith("./tests/support") for name in imports(file) if name.startswith("./tests"))


@pytest.mark.parametrize("file", files("tests/support"), ids=lambda f: f.name)
def test_what_tests_share_imports_no_benchmark(file):
    assert top_folders(file) <= {"agd_core", "training", "nodes", "examples", "tests", "tools"}


def test_imports_are_found_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(support, "ROOT", tmp_path)
    file = tmp_path / "examples" / "toy" / "one.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import comfyui_agd.benchmarks.metrics\nfrom comfyui_agd.tests import support\nfrom comfyui_agd import nodes\n"
        "from ...training import plot\nimport torch.nn\nfrom comfy.utils import load\nimport os"
    )
    assert top_folders(file) == {"benchmarks", "tests", "nodes", "training"}
    assert outside(file) == {"torch", "comfy"}
