"""tools/gpu.py: what is packed and how large it may be, what a run leaves, and that every part's command is one."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from comfyui_agd.benchmarks import inference, quality, training

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {f"benchmarks/{module.__name__.rpartition('.')[2]}.py": module for module in (inference, quality, training)}


def loaded(monkeypatch):
    """The script as a module; what it adds to sys.path goes again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("agd_gpu", ROOT / "tools" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "agd_gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    return loaded(monkeypatch)


def write_wheel(file: Path, module: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{module}.py", "here = True\n")


@pytest.fixture
def asked(gpu, tmp_path, monkeypatch) -> list[str]:
    """What pip was asked for, where a small ComfyUI is set up and every wheel is empty."""
    comfyui = tmp_path / "ComfyUI-0"
    for name in ("comfy/samplers.py", "comfy/ldm/models/vae.py", "models/configs/a.yaml", "web/index.js"):
        (comfyui / name).parent.mkdir(parents=True, exist_ok=True)
        (comfyui / name).touch()
    (comfyui / "requirements.txt").write_text("comfy-kitchen==0.2.26\ntorch\ncomfy-aimdo==0.4.11\n")
    requirements: list[str] = []

    def pip(*args, task):
        folder, *names = args[args.index("-d") + 1 :]
        requirements.extend(names)
        for name in names:
            write_wheel(Path(folder) / f"{name.partition('==')[0].replace('-', '_')}-1.0-py3-none-any.whl", "a")

    monkeypatch.setattr(gpu.setup, "pip", pip)
    monkeypatch.setattr(gpu.setup, "existing_comfyui", lambda: comfyui)
    return requirements


def test_the_folder_has_comfyui_and_wheels_of_its_versions(gpu, asked, tmp_path, capsys):
    gpu.pack(tmp_path / "packed")
    assert {"comfy-kitchen==0.2.26", "comfy-aimdo==0.4.11", "torchvision==0.26.0"} <= set(asked)
    assert not [name for name in asked if name.partition("==")[0] == "torch"]
    with tarfile.open(tmp_path / "packed" / gpu.COMFYUI_ARCHIVE) as tar:
        names = set(tar.getnames())
    assert {"ComfyUI/comfy/samplers.py", "ComfyUI/comfy/ldm/models/vae.py"} <= names
    assert not {"ComfyUI/web/index.js", "ComfyUI/models/configs/a.yaml"} & names
    assert len(list((tmp_path / "packed").glob("*.whl"))) == len(asked)
    assert "MB, with the checkout's" in capsys.readouterr().out


def test_a_folder_that_gets_too_large_is_refused_and_not_left(gpu, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_MB", 1)  # less than the checkout's own
    with pytest.raises(gpu.setup.SetupError, match=r"more than 1 MB. The largest files: "):
        gpu.pack(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_folder_of_other_things_is_left_alone(gpu, asked, tmp_path):
    (tmp_path / "letter.txt").write_text("dear all")
    with pytest.raises(gpu.setup.SetupError, match="holds something else"):
        gpu.pack(tmp_path)
    assert (tmp_path / "letter.txt").exists()


def test_what_is_installed_there_is_not_replaced(gpu, asked, tmp_path, monkeypatch):
    gpu.pack(tmp_path / "packed")
    for name in ("made_up-1.0", "pytest-0.1", "typing_extensions-0.1", "typing_extensions-9999"):
        write_wheel(
            tmp_path / "packed" / f"{name}-py3-none-any.whl", f"from_{name.partition('.')[0]}".replace("-", "_")
        )
    (tmp_path / "there").mkdir()
    environment = gpu.unpack(tmp_path / "packed", tmp_path / "there")
    packages = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    there = {file.stem for file in packages.glob("from_*")}
    assert there == {"from_made_up_1", "from_typing_extensions_9999"}
    assert (packages / "comfyui_agd" / "agd_core").is_dir()
    assert (Path(environment["COMFYUI_PATH"]) / "comfy" / "samplers.py").is_file()


def test_without_a_folder_a_run_says_how_to_make_it(gpu, tmp_path):
    with pytest.raises(gpu.setup.SetupError, match=r"was not packed: `python tools/gpu.py pack`"):
        gpu.unpack(tmp_path, tmp_path)


def test_without_a_card_nothing_is_begun(gpu, asked, tmp_path, monkeypatch):
    gpu.pack(tmp_path / "packed")
    monkeypatch.setattr(gpu, "described_machine", lambda environment, folder: {"card": None})
    with pytest.raises(gpu.setup.SetupError, match="sees no card"):
        gpu.main(["run", "tests", "--pack", str(tmp_path / "packed"), "--results", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_list_names_every_part_with_minutes_that_fit_into_a_call(gpu):
    lines = gpu.listing().splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert all(0 < part.minutes <= 8 for part in gpu.PARTS.values())


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_benchmark_takes(gpu, quick):
    for part in gpu.PARTS.values():
        for measurement in part.measurements:
            script, *arguments = measurement.command(Path("rows.json"), Path("work"), quick)
            if measurement.script == gpu.gpu_parts.PYTEST:
                assert arguments[0] == "pytest"
                files = [each for each in arguments if each.startswith("tests")]
                assert files
                assert all((ROOT / file).exists() for file in files)
            else:
                args = PARSERS[script].parse(arguments)
                assert args.json == Path("rows.json")
                assert args.device == ("cpu" if quick else "cuda")


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_measures_something(gpu, quick):
    chosen = {"benchmarks/inference.py": inference.chosen_models, "benchmarks/training.py": training.chosen_cases}
    for part in gpu.PARTS.values():
        for measurement in part.measurements:
            script, *arguments = measurement.command(Path("rows.json"), Path("work"), quick)
            if script in chosen:
                assert chosen[script](PARSERS[script].parse(arguments))


def script(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(f"import json, sys, time\nfile = sys.argv[-1]\n{text}\n")
    return str(tmp_path / name)


WRITES = "open(file, 'w').write(json.dumps([{'a': 1}, {'failed': 'no memory'}]))"


@pytest.fixture
def ran(gpu, tmp_path) -> dict:
    """What a part of three measurements leaves, of which the second fails and the third has no end."""
    scripts = {
        "good": WRITES,
        "bad": f"{WRITES}\nraise RuntimeError('the card is on fire')",
        "endless": f"{WRITES}\ntime.sleep(100)",
        "later": WRITES,
    }
    measurements = tuple(
        gpu.Measurement(name, script(tmp_path, f"{name}.py", text), (), ()) for name, text in scripts.items()
    )
    machine = {"card": "A Card 80GB"}
    part_run = gpu.PartRun("part", gpu.Part("what", 0.05, measurements), machine, tmp_path / "out", tmp_path, True)
    assert not part_run.run(dict(os.environ))
    assert "endless" in gpu.table([part_run])
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "part-a-card-80gb-quick.json"
    return json.loads(file.read_text())


def test_a_run_goes_on_after_a_failure_and_ends_in_time(ran):
    assert ran.keys() == {"part", "what", "quick", "machine", "measurements"}
    assert ran["machine"] == {"card": "A Card 80GB"}
    ended = {row["measurement"]: row["ended"] for row in ran["measurements"]}
    assert ended == {"good": "measured", "bad": "failed", "endless": "stopped", "later": "not begun"}


def test_rows_are_kept_of_what_failed_and_what_was_stopped(ran):
    good, bad, endless, later = ran["measurements"]
    for row in (good, bad, endless):
        assert row["results"] == [{"a": 1}, {"failed": "no memory"}]
        assert (row["rows"], row["failed"]) == (2, 1)
    assert "the card is on fire" in bad["said"]
    assert later["results"] == []
    assert good.keys() == {"measurement", "command", "ended", "seconds", "rows", "failed", "results"}


def test_tests_that_ran_are_rows(gpu, tmp_path):
    file = tmp_path / "junit.xml"
    cases = '<testcase classname="a.b" name="x" time="0.5"/><testcase classname="a.b" name="y" time="1">'
    file.write_text(f'<testsuites><testsuite>{cases}<failure message="oh"/></testcase></testsuite></testsuites>')
    passed, failed = gpu.Measurement("tests", gpu.gpu_parts.PYTEST, (), ()).rows(file)
    assert passed == {"test": "x", "file": "a.b", "ended": "passed", "seconds": 0.5}
    assert failed == {"test": "y", "file": "a.b", "ended": "failure", "seconds": 1.0, "said": "oh"}


def test_the_stand_in_for_av_has_all_that_comfyui_imports():
    wanted = "import av; from av.container import InputContainer; from av.video.reformatter import ColorRange"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "stand_ins")}
    asked = subprocess.run([sys.executable, "-c", f"{wanted}; print(av.VideoStream.__name__)"], env=environment)
    assert asked.returncode == 0
