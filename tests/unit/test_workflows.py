""".github and the pages for contributors: what GitHub reads is well-formed, and each command in them exists."""

import os
import re
import shlex
import subprocess

import pytest
import yaml

from comfyui_agd.tests.support.imports import ROOT
from comfyui_agd.tools.package import tracked

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def read(path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(path) -> list[dict]:
    return [step for job in read(path)["jobs"].values() for step in job.get("steps", ())]


def exists(words: list[str]) -> bool:
    """Whether what these words of a command line name is in the repository, as far as they run a part of it."""
    match words:
        case ["make", *targets]:
            return bool(targets) and set(targets) <= TARGETS
        case [python, "-m", "venv", _]:
            return True
        case [python, "-m", "pytest", *tests] if python.endswith("python"):
            if "-k" in tests:
                tests = tests[: tests.index("-k")]
            files = [test.partition("::") for test in tests]
            return all(
                (ROOT / file).exists() and (not test or f"def {test}(" in (ROOT / file).read_text("utf-8"))
                for file, _, test in files
            )
        case [python, script, *_] if python.endswith("python"):
            return script in tracked()
        case [script]:
            return script in tracked()
    return words[0] == "echo"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_command_exists(path):
    # What has branches is tested by itself, below.
    commands = [step["run"] for step in steps(path) if "run" in step and "\n" not in step["run"]]
    assert [command for command in commands if not exists(shlex.split(command))] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_others_actions_are_taken_at_a_version(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert [name for name in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", name)] == []
    own = [job["uses"] for job in read(path)["jobs"].values() if "uses" in job]
    assert [name for name in own if name.removeprefix("./") not in tracked()] == []


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language, or without one."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "RELEASING.md"])
def test_each_command_of_a_page_exists(page):
    commands = [shlex.split(line) for block in blocks(page, "") for line in block.splitlines()]
    ours = [words for words in commands if words[0] != "git" and not words[0].startswith("/tmp/")]
    assert len(ours) > 2
    assert [words for words in ours if not exists(words)] == []


def test_the_code_of_contributing_is_in_the_code():
    def bare(text: str) -> str:
        return "".join(text.split())

    code = bare("".join((ROOT / name).read_text("utf-8") for name in tracked() if name.startswith("agd_core/")))
    examples = blocks("CONTRIBUTING.md", "python")
    assert len(examples) > 2
    assert [example for example in examples if bare(example) not in code] == []


def git(folder, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def commit(folder, version: str, description: str) -> str:
    text = f'[project]\nversion = "{version}"\ndescription = "{description}"\n'
    (folder / "pyproject.toml").write_text(text, "utf-8")
    git(folder, "add", "pyproject.toml")
    git(folder, "commit", "-m", description)
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.mark.skipif(os.name == "nt", reason="GitHub runs it on Linux")
@pytest.mark.parametrize(
    ("event", "version", "is_new"),
    [("push", "0.1.0", False), ("push", "0.2.0", True), ("workflow_dispatch", "0.1.0", True)],
)
def test_a_new_version_is_published_and_nothing_else_by_itself(tmp_path, event, version, is_new):
    git(tmp_path, "init", "-q")
    before = commit(tmp_path, "0.1.0", "first")
    commit(tmp_path, version, "second")
    commit(tmp_path, version, "third")
    (script,) = [step["run"] for step in steps(ROOT / ".github/workflows/publish.yml") if step.get("id") == "version"]
    found = tmp_path / "output"
    found.touch()
    variables = {"BEFORE": before, "EVENT": event, "GITHUB_OUTPUT": str(found)}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env={**os.environ, **variables}, check=True)
    assert (found.read_text("utf-8") == "is-new=true\n") is is_new


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_for_issues_are_what_github_shows(path):
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"textarea", "input", "checkboxes", "dropdown"}
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
