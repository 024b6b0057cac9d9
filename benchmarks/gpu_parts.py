"""What is measured on a GPU machine, in parts of at most eight minutes. `tools/gpu.py` runs them.

Each measurement is another benchmark's command, with what it is given on a GPU and, `quick`, on a CPU: there the same
commands run on tiny bases, which shows that nothing is missing. Standard library only.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PYTEST = "pytest"
_WORK = "{work}"  # a folder that stays between two runs


@dataclass(frozen=True)
class Measurement:
    """`script`: a file under the checkout that writes rows with --json, or `PYTEST`."""

    name: str
    script: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]

    def command(self, file: Path, work: Path, quick: bool) -> list[str]:
        """The arguments for Python; rows come into `file`."""
        given = [each.replace(_WORK, str(work)) for each in (self.quick if quick else self.arguments)]
        if self.script == PYTEST:
            return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *given, f"--junitxml={file}"]
        device = [] if quick else ["--device", "cuda"]
        return [self.script, *device, *given, "--json", str(file)]

    def rows(self, file: Path) -> list[dict]:
        """What was written, however far it came."""
        if not file.exists():
            return []
        return _test_rows(file) if self.script == PYTEST else json.loads(file.read_text())


def _test_rows(file: Path) -> list[dict]:
    rows = []
    for case in ElementTree.parse(file).iter("testcase"):
        ended = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        said = next((child.get("message", "") for child in case if child.tag == ended), "")
        rows.append({"test": case.get("name"), "file": case.get("classname"), "ended": ended})
        rows[-1] |= {"seconds": float(case.get("time", 0)), **({"said": said[:1000]} if said else {})}
    return rows


@dataclass(frozen=True)
class Part:
    """`minutes`: after so many it is stopped. `together`: all of its measurements run at the same time, for they load
    the GPU little."""

    what: str
    minutes: float
    measurements: tuple[Measurement, ...]
    together: bool = False


def _inference(name: str, model: str, *arguments: str, minutes: float, quick: tuple[str, ...] = ()) -> Measurement:
    return Measurement(
        name,
        "benchmarks/inference.py",
        ("--model", model, "--minutes", f"{minutes:g}", *arguments),
        ("--model", model, "--minutes", f"{minutes:g}", "--tiny", *quick),
    )


# In the order in which they are compiled, which takes a minute and more for each.
_FEW = ("unguided, CFG and the default adapter", ("unguided", "agd", "cfg"))
_OTHERS = ("the other adapters", ("unguided", "paper-320", "low-rank", "paper-128", "agd-modulated", "agd-in-all"))


def _eager(model: str, dtype: str) -> Part:
    return Part(
        f"a step of {model} in {dtype}: all methods, peak memory, kernels",
        6,
        (_inference(dtype, model, "--dtype", dtype, "--profile", minutes=3, quick=("--profile",)),),
    )


def _merged(model: str) -> Part:
    """Into tens of GB of weights changes are brought for so long that few samplings have to do."""
    arguments = ("--only", "unguided", "cfg", "agd", "--rounds", "2")
    return Part(
        f"a step of {model} in bf16, the adapter's changes in its weights: unguided, CFG and the default adapter",
        8,
        (_inference("bf16", model, "--dtype", "bf16", *arguments, minutes=4, quick=arguments),),
    )


def _compiled(model: str, dtype: str, methods: str, only: tuple[str, ...]) -> Part:
    given = ("--profile", "--only", *only)
    return Part(
        f"the same of {model} in {dtype} under torch.compile: {methods}",
        8,
        (_inference(dtype, model, "--compile", "--dtype", dtype, *given, minutes=6, quick=given),),
    )


def _training(what: str, models: tuple[str, ...], limit: float | None = None) -> Part:
    memory = ("--memory-limit", f"{limit:g}") if limit else ()
    arguments = ("--model", *models, *memory, "--minutes", "6")
    measured = Measurement("steps", "benchmarks/training.py", arguments, (*arguments, "--tiny"))
    return Part(what, 8, (measured,))


def _tests(*files: str) -> Measurement:
    # On a CPU all but one way of using memory are skipped.
    return Measurement("tests", PYTEST, files, ("tests/gpu/test_switching_gpu.py",))


_LONGER = 12000  # iterations: ten times the toys' own
_TOY_METHODS = ("--only", "unguided", "cfg", "ours")
_LEAST = ("--quick", "--iterations", "2", "--pictures", "4", "--pairs", "2")


def _toy(base: str) -> Part:
    def of_seed(seed: int) -> Measurement:
        given = ("--base", base, "--seed", str(seed), *_TOY_METHODS, "--work", f"{_WORK}/toys-seed{seed}")
        pages = ("--results", f"{_WORK}/toy-pages-seed{seed}")
        sizes = ("--iterations", str(_LONGER), "--pictures", "512", "--pairs", "128")
        return Measurement(f"seed {seed}", "benchmarks/quality.py", (*given, *pages, *sizes), (*given, *_LEAST))

    what = f"{base} trained for {_LONGER} iterations, three seeds; run again, it goes on where it was stopped"
    return Part(what, 8, tuple(map(of_seed, range(3))), together=True)


def _check() -> Part:
    """Of each command the least, on the GPU: what does not run there shows before time goes into true sizes."""
    models = ("SD 1.5", "SDXL", "Qwen-Image", "Wan 2.2 14B")
    steps = ("--model", *models, "--tiny", "--profile")
    compiled = ("--model", "SD 1.5", "--tiny", "--only", "unguided", "agd")
    trained = ("--model", *models, "--tiny", "--memory-limit", "8")
    toy = ("--base", "toy", *_TOY_METHODS, "--work", f"{_WORK}/check", *_LEAST)
    return Part(
        "every command on tiny models, on the GPU: first of all, in a few minutes",
        7,
        (
            Measurement("steps", "benchmarks/inference.py", steps, steps),
            Measurement("training", "benchmarks/training.py", trained, trained),
            Measurement("toy", "benchmarks/quality.py", toy, toy),
            Measurement("compiled", "benchmarks/inference.py", (*compiled, "--compile"), compiled),
        ),
    )


# GB of 10^9 bytes that training may use on a card of so many GiB: `training.presets.CARDS`.
_CAPS = {"24": 22.0, "12": 11.5, "8": 7.5}

# In the order in which they are worth most, where time is short.
PARTS = {
    "check": _check(),
    "tests": Part("the tests that need a GPU", 8, (_tests("tests/gpu"),)),
    "sdxl": _eager("SDXL", "fp16"),
    "training-24": _training("training SDXL and SD 1.5 in a 24 GB card's memory", ("SDXL", "SD 1.5"), _CAPS["24"]),
    "sdxl-compiled": _compiled("SDXL", "fp16", *_FEW),
    "training-12": _training("training SDXL in a 12 GB card's memory", ("SDXL",), _CAPS["12"]),
    "training-8": _training("training SDXL in an 8 GB card's memory", ("SDXL",), _CAPS["8"]),
    "sdxl-bf16": _eager("SDXL", "bf16"),
    "sd15": _eager("SD 1.5", "fp16"),
    "qwen-image": _eager("Qwen-Image", "fp8"),
    "wan": _eager("Wan 2.2 14B", "fp8"),
    "training-qwen-image": _training("training Qwen-Image in the card's own memory", ("Qwen-Image",)),
    "training-wan": _training("training Wan 2.2 in the card's own memory", ("Wan 2.2 14B",)),
    "toy": _toy("toy"),
    "toy-dit": _toy("toy-dit"),
    "qwen-image-bf16": _merged("Qwen-Image"),
    "sd15-bf16": _eager("SD 1.5", "bf16"),
    "sdxl-compiled-others": _compiled("SDXL", "fp16", *_OTHERS),
    "sdxl-compiled-bf16": _compiled("SDXL", "bf16", *_FEW),
    "sd15-compiled": _compiled("SD 1.5", "fp16", *_FEW),
    "sd15-compiled-others": _compiled("SD 1.5", "fp16", *_OTHERS),
    "sd15-compiled-bf16": _compiled("SD 1.5", "bf16", *_FEW),
    "memory": Part(
        "of the tests those of ComfyUI's ways to use memory: dynamic VRAM, lowvram, novram, queues, LoRAs switched",
        8,
        (_tests("tests/gpu/test_memory_gpu.py", "tests/gpu/test_switching_gpu.py"),),
    ),
}


def kept_rows(rows: list[dict]) -> Mapping[str, int]:
    """How many of a measurement's rows there are, and of those how many say that they failed."""
    failed = [row for row in rows if row.get("failed") or row.get("ended") in ("failure", "error")]
    return {"rows": len(rows), "failed": len(failed)}
