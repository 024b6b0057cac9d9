"""Core's TorchCompileModel, in processes of their own: the attention is chosen before ComfyUI is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_agd.agd_core.comfyui.sampling.messages import UNCOMPILED_FOR_HOOKS
from comfyui_agd.tests.support.workflows import ROWS, TRAINING_FREE_STEPS

SCRIPT = Path(__file__).resolve().parents[2] / "support" / "compiled.py"
(ROW,) = [row for row in ROWS if row.what.startswith("torch.compile")]
UNGUIDED = ("the base", "cfg 1", "bypassed")  # cases whose picture is the base's own
COSTS = {"the base": ROW.without, "cfg 1": 1, "bypassed": ROW.without}
COSTS |= dict.fromkeys(("an adapter", "another omega", "another adapter"), ROW.with_agd)
COSTS |= dict.fromkeys(("a low_rank adapter", "an adapter in the weights", "an adapter again"), ROW.with_agd)
COSTS |= {"the loader after the compile node": ROW.with_agd, "training-free": ROW.with_training_free}
PAPERS = {"the paper's attention", "the paper's attention at cfg 1", "the paper's additive"}
COSTS |= dict.fromkeys(PAPERS, 1)
UNSEEN = UNCOMPILED_FOR_HOOKS


def sample_compiled(attention: str, backend: str, folder: Path, *cases: str) -> dict:
    command = [sys.executable, str(SCRIPT), attention, backend, str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, case in report["cases"].items():
        assert case["error"] < 1e-4, name
        assert (case["from_base"] < 1e-4) == (name in UNGUIDED), name
    return report


def costs(report: dict) -> dict[str, float]:
    return {name: case["evaluations"] for name, case in report["cases"].items()}


# What matters happens before a model reaches the compiler's backend, so the one that does nothing is enough here.


@pytest.mark.slow
def test_a_model_that_is_one_graph_stays_right_whatever_changes(tmp_path):
    report = sample_compiled("pytorch", "eager", tmp_path)
    assert costs(report) == COSTS
    assert report["said"] == [UNSEEN]


# Every compilation of such a model takes seconds, so the suite has one of them and `make test-matrix` all.
@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [("an adapter", "another omega", "cfg 1"), pytest.param(tuple(COSTS), marks=pytest.mark.matrix)],
    ids=["one", "all"],
)
def test_a_model_that_breaks_into_several_graphs_runs_uncompiled_and_says_so(tmp_path, cases):
    report = sample_compiled("sub-quadratic", "eager", tmp_path, *cases)
    # Each patched MODEL finds out once, at the first step of its first sampling.
    finds_out = {"an adapter", "another adapter", "an adapter in the weights", "the loader after the compile node"}
    finds_out |= PAPERS
    assert costs(report) == {
        name: COSTS[name] + (1 / TRAINING_FREE_STEPS if name in finds_out else 0) for name in cases
    }
    broken = [message for message in report["said"] if message != UNSEEN]
    assert len(broken) == len(finds_out.intersection(cases))
    assert len(report["said"]) == len(broken) + ("a low_rank adapter" in cases)
    assert all(message.startswith("Runs uncompiled: torch.compile can't take this model") for message in broken)


@pytest.mark.matrix
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_the_nodes_own_backend(tmp_path):
    report = sample_compiled("pytorch", "inductor", tmp_path, "an adapter", "another omega")
    assert costs(report) == {name: COSTS[name] for name in ("an adapter", "another omega")}
