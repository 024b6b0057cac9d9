"""Measures on a GPU machine that has torch with CUDA and few other packages, and no network.

    python tools/gpu.py pack [FOLDER]    here: a folder with ComfyUI and the wheels that such a machine lacks
    python tools/gpu.py list             the parts that can be measured, and their minutes
    python tools/gpu.py run PART ...     there, in the checkout with that folder in it: a JSON file for each part

The machine is Linux on x86-64 with Python 3.12, the checkout's own files are read from where they are. `run --quick`
takes tiny models, on a CPU too: it shows that nothing is missing. Standard library only.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_parts
import setup
from gpu_parts import PARTS, Measurement, Part

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FOLDER = ROOT / ".gpu"
LIMIT_MB = 64  # of 10^6 bytes: the folder and the checkout's own files together
COMFYUI_ARCHIVE = "ComfyUI.tar.gz"
# At the top of ComfyUI's tree: its own tests, what is for its server's users, and nodes that ask other servers.
NOT_NEEDED = {".ci", ".github", "blueprints", "comfy_api_nodes", "custom_nodes", "models", "openapi.yaml"}
NOT_NEEDED |= {"input", "output", "script_examples", "temp", "tests", "tests-unit", "user", "web"}
NOT_NEEDED |= {".git", ".venv", "venv"}
# What ComfyUI and the tests import beyond torch, safetensors, einops, tqdm, numpy, Pillow, transformers, scipy, psutil
# and what these need. Versions are those of ComfyUI's requirements and of `tools/setup.py`, where they name one.
PURE = (
    # The pure one has PyTorch's operators in place of its own kernels, which are 45 MB.
    *("comfy-kitchen", "torchsde", "trampoline", "sqlalchemy", "alembic", "mako", "pydantic", "annotated-types"),
    *("typing-inspection", "pydantic-settings", "python-dotenv", "aiosignal", "aiohappyeyeballs", "attrs", "idna"),
    *("requests", "urllib3", "charset-normalizer", "certifi", "pytest", "pluggy", "iniconfig", "typing-extensions"),
)
BUILT = (
    *("comfy-aimdo", "torchvision", "torchaudio", "blake3", "pydantic-core"),
    *("aiohttp", "multidict", "yarl", "frozenlist", "propcache"),
)
# Any newer one does for what is installed there, and what is brought along may need it.
REPLACES_OLDER = {"typing-extensions"}
_GLIBC = ("2_28", "2_27", "2_17", "2_12", "2_5")
_PLATFORMS = (*(f"manylinux_{version}_x86_64" for version in _GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")
_TAIL = 40  # lines of a failed command's output that are kept


# Here: the folder to bring along.


def pack(folder: Path) -> None:
    """Makes it anew. Raises `SetupError` where it gets too large, and leaves none then."""
    comfyui = setup.existing_comfyui() or setup.vendored_comfyui()
    if folder.exists() and not is_packed(folder):
        raise setup.SetupError(f"{folder} holds something else; choose another folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        archive_comfyui(comfyui, folder / COMFYUI_ARCHIVE)
        download_wheels(pins(comfyui), folder)
        check_size(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def is_packed(folder: Path) -> bool:
    return (folder / COMFYUI_ARCHIVE).is_file() or not any(folder.iterdir())


def archive_comfyui(comfyui: Path, file: Path) -> None:
    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        return None if NOT_NEEDED & set(parts[1:2]) or "__pycache__" in parts else member

    with tarfile.open(file, "w:gz") as tar:
        tar.add(comfyui, "ComfyUI", filter=wanted)


def pins(comfyui: Path) -> dict[str, str]:
    """Requirements with a version, by their names."""
    lines = [*(comfyui / "requirements.txt").read_text().split(), *setup.TORCH]
    return {line.partition("==")[0].lower(): line for line in lines if "==" in line}


def download_wheels(pinned: dict[str, str], folder: Path) -> None:
    for names, platforms in ((PURE, ("any",)), (BUILT, _PLATFORMS)):
        wanted = [pinned.get(name, name) for name in names]
        target = ("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp")
        target += tuple(f"--platform={platform}" for platform in platforms)
        setup.pip("download", "-q", "--no-deps", *target, "-d", str(folder), *wanted, task="Downloading wheels")


def check_size(folder: Path) -> None:
    """Prints it. Raises `SetupError` where it is too large."""
    brought, own = size_of(folder.iterdir()), size_of(tracked_files())
    print(f"{folder}: {brought / 1e6:.1f} MB, with the checkout's {own / 1e6:.1f} MB {(brought + own) / 1e6:.1f} MB")
    if brought + own > LIMIT_MB * 1e6:
        largest = sorted(folder.iterdir(), key=lambda file: -file.stat().st_size)[:3]
        raise setup.SetupError(
            f"That is more than {LIMIT_MB} MB. The largest files: {', '.join(file.name for file in largest)}."
        )


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]


def size_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


# There: what was brought along is unpacked for the time of a run.


def unpack(folder: Path, into: Path) -> dict[str, str]:
    """What a process has to find it by, as environment variables. What is installed here is not replaced."""
    if not (folder / COMFYUI_ARCHIVE).is_file():
        raise setup.SetupError(
            f"{folder} was not packed: `python tools/gpu.py pack` makes it where there is a network."
        )
    with tarfile.open(folder / COMFYUI_ARCHIVE) as tar:
        tar.extractall(into, filter="data")
    packages = into / "packages"
    packages.mkdir()
    for wheel in folder.glob("*.whl"):
        if not is_installed(*distribution_of(wheel)):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
    if importlib.util.find_spec("av") is None:
        shutil.copy(ROOT / "tools" / "stand_ins" / "av.py", packages)
    (packages / "comfyui_agd").symlink_to(ROOT)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(packages), *([before] if before else [])])
    # Plugins of what else is installed there are for other tests than ours.
    always = {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {"PYTHONPATH": path, "COMFYUI_PATH": str(into / "ComfyUI"), **always}


def distribution_of(wheel: Path) -> tuple[str, str]:
    """Its name and version."""
    name, version = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def is_installed(name: str, version: str) -> bool:
    """Whether there is one that serves as well as this version would."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return name not in REPLACES_OLDER or _numbers(found) >= _numbers(version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


@dataclass
class Command:
    """A command that runs, its output on the screen and its last lines kept."""

    process: subprocess.Popen
    lines: collections.deque
    reader: threading.Thread
    began: float

    @classmethod
    def start(cls, arguments: list[str], environment: dict[str, str]) -> "Command":
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it in the background; it is inherited
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts ends with it
        )
        lines: collections.deque = collections.deque(maxlen=_TAIL)
        reader = threading.Thread(target=cls._read, args=(process, lines), daemon=True)
        reader.start()
        return cls(process, lines, reader, time.monotonic())

    @staticmethod
    def _read(process: subprocess.Popen, lines: collections.deque) -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """First as by Ctrl-C, after which tests write what they know."""
        for number, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def tail(self) -> str:
        self.reader.join(5)
        return "\n".join(self.lines)


@dataclass
class Measured:
    """A measurement of a part, as the JSON file has it. `ended`: "not begun", "runs", "measured", "failed" or, where
    its time was up, "stopped"."""

    measurement: Measurement
    file: Path
    command: list[str]
    running: Command | None = None
    ended: str = "not begun"
    seconds: float = 0.0
    said: str = ""

    def start(self, environment: dict[str, str]) -> None:
        print(f"\n== {self.measurement.name}: {' '.join(self.command)}", flush=True)
        self.running, self.ended = Command.start(self.command, environment), "runs"

    def look(self, until: float) -> None:
        """Notes how it stands; stops it where its time is up."""
        command = self.running
        if command is None or self.ended != "runs":
            return
        self.seconds = time.monotonic() - command.began
        if command.has_ended():
            self.ended = "failed" if command.process.returncode else "measured"
        elif time.monotonic() > until:
            command.stop()
            self.ended = "stopped"
        if self.ended in ("failed", "stopped"):
            self.said = command.tail()

    def row(self) -> dict:
        rows = self._rows()
        row = {"measurement": self.measurement.name, "command": self.command, "ended": self.ended}
        row |= {"seconds": round(self.seconds, 1), **gpu_parts.kept_rows(rows)}
        return row | ({"said": self.said} if self.said else {}) | {"results": rows}

    def _rows(self) -> list[dict]:
        try:
            return self.measurement.rows(self.file)
        except (OSError, ValueError, SyntaxError) as error:  # cut off while it was written
            self.said = self.said or f"{self.file.name} can't be read: {error}"
            return []


class PartRun:
    """Runs a part, and writes its file after everything that happens."""

    def __init__(self, name: str, part: Part, machine: dict, results: Path, folder: Path, quick: bool):
        self.name, self.part, self.machine, self.quick = name, part, machine, quick
        self.file = results / file_name(name, machine, quick)
        work = ROOT / "build" / ("gpu-quick" if quick else "gpu")
        self.measured = []
        for index, each in enumerate(part.measurements):
            rows = folder / f"{name}-{index}.rows"
            self.measured.append(Measured(each, rows, each.command(rows, work, quick)))

    def run(self, environment: dict[str, str], minutes: float | None = None) -> bool:
        """Whether all that was begun ended well."""
        until = time.monotonic() + 60 * (minutes or self.part.minutes)
        environment = self._threads() | environment
        try:
            for group in self._groups():
                for each in group if time.monotonic() < until else ():
                    each.start(environment)
                self._wait(group, until)
        finally:
            for each in self.measured:
                if each.running is not None and not each.running.has_ended():
                    each.running.stop()
                    each.ended = "stopped"
            self.write()
        return all(each.ended == "measured" for each in self.measured)

    def _threads(self) -> dict[str, str]:
        """Measurements that run together share the processor's cores."""
        if not self.part.together or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(self.measured)))}

    def _groups(self) -> Iterator[list[Measured]]:
        if self.part.together:
            yield self.measured
        else:
            yield from ([each] for each in self.measured)

    def _wait(self, group: list[Measured], until: float) -> None:
        written = 0.0
        while any(each.ended == "runs" for each in group):
            time.sleep(0.2)
            for each in group:
                each.look(until)
            if time.monotonic() - written > 10:
                self.write()
                written = time.monotonic()
        self.write()

    def write(self) -> None:
        found = {"part": self.name, "what": self.part.what, "quick": self.quick, "machine": self.machine}
        found["measurements"] = [each.row() for each in self.measured]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(self.file)


def file_name(part: str, machine: dict, quick: bool) -> str:
    """With the card's name in it."""
    card = re.sub(r"[^a-z0-9]+", "-", (machine.get("card") or "cpu").lower()).strip("-")
    return f"{part}-{card}{'-quick' if quick else ''}.json"


def described_machine(environment: dict[str, str], folder: Path) -> dict:
    """As `benchmarks/machine.py` says it; where that fails why, for then nothing else will run either."""
    file = folder / "machine.json"
    command = Command.start(["benchmarks/machine.py", "--json", str(file)], environment)
    try:
        command.process.wait(120)
        return json.loads(file.read_text())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        command.stop()
        return {"card": None, "failed": command.tail()}


def results_folder(asked: Path | None, quick: bool) -> Path:
    if asked or os.environ.get("OUT"):
        return asked or Path(os.environ["OUT"])
    return ROOT / "build" / "gpu-quick" if quick else ROOT / "benchmarks" / "results" / "gpu"


def table(runs: list[PartRun]) -> str:
    lines = [f"{'part':<22}{'measurement':<14}{'ended':<10}{'seconds':>8}{'rows':>6}{'failed':>8}  file"]
    for run in runs:
        for row in (each.row() for each in run.measured):
            counts = f"{row['seconds']:>8.0f}{row['rows']:>6}{row['failed']:>8}"
            lines.append(f"{run.name:<22}{row['measurement']:<14}{row['ended']:<10}{counts}  {run.file.name}")
    return "\n".join(lines)


def run(names: list[str], args: argparse.Namespace) -> int:
    """The exit status: 0 where everything ended well."""
    runs, well = [], True
    with tempfile.TemporaryDirectory(prefix="agd-gpu-") as folder:
        environment = unpack(args.pack, Path(folder))
        machine = described_machine(environment, Path(folder))
        print(json.dumps(machine, indent=1), flush=True)
        if not args.quick and not machine["card"]:
            raise setup.SetupError("torch sees no card here, so nothing was measured; --quick tries all on a CPU.")
        for name in names:
            results = results_folder(args.results, args.quick)
            runs.append(PartRun(name, PARTS[name], machine, results, Path(folder), args.quick))
            well &= runs[-1].run(environment, args.minutes)
            print(f"\n{table(runs)}", flush=True)
    return 0 if well else 1


def listing() -> str:
    return "\n".join(f"{name:<22}{part.minutes:>3.0f} min  {part.what}" for name, part in PARTS.items())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the folder to bring along")
    packing.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    commands.add_parser("list", help="say which parts there are")
    running = commands.add_parser("run", help="measure parts")
    running.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help="see `list`")
    running.add_argument("--quick", action="store_true", help="tiny models, on a CPU: whether anything is missing")
    running.add_argument("--minutes", type=float, help="stop each part after so many, in place of its own")
    running.add_argument("--pack", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="what was packed")
    running.add_argument("--results", type=Path, metavar="FOLDER", help="default: $OUT, or benchmarks/results/gpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "run":
        return run(args.parts, args)
    if args.command == "pack":
        pack(args.folder)
    else:
        print(listing())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except setup.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("Stopped; what was measured is in the files.")
