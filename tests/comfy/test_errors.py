"""What users see of an error of ours in the browser: one short name, and the sentence."""

import ast
import subprocess
from pathlib import Path

import pytest

from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.adapter_name import AdapterNameError
from comfyui_agd.agd_core.atomic import NotWritten
from comfyui_agd.agd_core.comfyui.backbones import UnsupportedModel
from comfyui_agd.agd_core.comfyui.runtime import ComfyUINotFound, ComfyUITooOld
from comfyui_agd.agd_core.errors import AGDError
from comfyui_agd.agd_core.kinds.paper_attention import PromptTooLong
from comfyui_agd.training.arguments import UsageError
from comfyui_agd.training.base_source import BaseSourceError
from comfyui_agd.training.finite import BaseNotFinite, Diverged, TargetNotFinite
from comfyui_agd.training.folder_lock import FolderInUse
from comfyui_agd.training.job import JobError
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.plan import DoesNotFit
from comfyui_agd.training.prompts import PromptError
from comfyui_agd.training.recording import RecordingError
from comfyui_agd.training.run_folder import RunFolderError
from comfyui_agd.training.run_identity import DifferentRun
from comfyui_agd.training.run_state import DamagedState

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {
    AdapterFileError: ValueError,
    AdapterNameError: ValueError,
    BaseNotFinite: ArithmeticError,
    BaseSourceError: ValueError,
    ComfyUINotFound: RuntimeError,
    ComfyUITooOld: RuntimeError,
    DamagedState: ValueError,
    DifferentRun: ValueError,
    Diverged: FloatingPointError,
    DoesNotFit: ValueError,
    FolderInUse: RuntimeError,
    JobError: ValueError,
    NotWritten: OSError,
    PromptError: ValueError,
    PromptTooLong: ValueError,
    RecordingError: ValueError,
    RunFolderError: ValueError,
    TargetNotFinite: ArithmeticError,
    SettingsError: ValueError,
    UnsupportedModel: ValueError,
    UsageError: Exception,
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_has_one_short_name_whatever_the_packs_folder_is_called(error):
    # As ComfyUI's `full_type_name` puts it together.
    assert f"{error.__module__}.{error.__qualname__}" == f"agd.{error.__name__}"
    assert issubclass(error, AGDError)
    assert issubclass(error, ERRORS[error])


def test_every_error_of_a_built_in_kind_is_one_of_ours():
    built_in = {"ValueError", "RuntimeError", "OSError", "FileNotFoundError", "KeyError", "TypeError", "AGDError"}
    listed = subprocess.run(
        ["git", "ls-files", "agd_core", "nodes", "training"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {}
    for name in filter(lambda name: name.endswith(".py") and (ROOT / name).is_file(), listed.stdout.splitlines()):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found |= {node.name: bases} if built_in & set(bases) else {}
    assert found.keys() == {error.__name__ for error in ERRORS}
    assert all("AGDError" in bases for bases in found.values())
