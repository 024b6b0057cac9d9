"""Saved states that are damaged in any way: the run goes on to the same result, or one sentence says why not."""

import copy
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped, assert_same, stop_after
from comfyui_agd.training.run_folder import RunFolder, RunFolderError
from comfyui_agd.training.run_identity import DifferentRun
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

SHORT = replace(CONFIG, iterations=6, save_every=2, held_out=1, evaluate_every=3, steps_max=4, reuse=2)


@pytest.fixture(scope="module")
def whole():
    return train(AnalyticModel(), PROMPTS, SHORT)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of a run that was stopped after step 5, with the states of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped") / "a.run"
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, SHORT, stop_after(5), options=RunOptions(folder=folder))
    return folder


def goes_on(folder: Path, whole, *, alone: bool = False) -> bool:
    """To the same result, from the damaged newest state or from an older one; else one of our errors, of one sentence.

    `alone`: without older ones.
    """
    if alone:
        (folder / "state-000004.pt").unlink()
    try:
        trained = train(AnalyticModel(), PROMPTS, SHORT, options=RunOptions(folder=folder))
    except (RunFolderError, DifferentRun) as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert str(folder) in sentence
        assert "delete" in sentence
        return False
    assert_same(trained, whole)
    return True


def damages(content: bytes, chance: random.Random) -> Iterator[bytes]:
    """Cut short, bits flipped, a stretch overwritten, something in front."""
    for _ in range(12):
        yield content[: chance.randrange(len(content))]
    for _ in range(60):
        flipped = bytearray(content)
        for _ in range(chance.choice((1, 1, 3))):
            # As likely in the directory at the end, the pickled values at the beginning, the tensors.
            at = chance.choice((chance.randrange(len(content)), chance.randrange(4000), -chance.randrange(1, 9000)))
            flipped[at] ^= 1 << chance.randrange(8)
        yield bytes(flipped)
    for _ in range(8):
        at = chance.randrange(len(content))
        yield content[:at] + bytes(200) + content[at + 200 :]
    yield b"junk" + content


def test_a_damaged_file_is_never_gone_on_from_to_another_result(stopped, whole, tmp_path):
    """That damage is noticed is seen by what is loaded; training goes on from some of them."""
    content, chance = (stopped / "state-000005.pt").read_bytes(), random.Random(0)
    expected = torch.load(stopped / "state-000005.pt", weights_only=True)
    noticed = 0
    for i, damaged in enumerate(damages(content, chance)):
        folder = Path(shutil.copytree(stopped, tmp_path / f"{i}.run"))
        (folder / "state-000005.pt").write_bytes(damaged)
        found = RunFolder(folder).load_run_state()
        assert found["step"] in (4, 5)
        assert found["step"] == 4 or same(found, expected)
        noticed += found["step"] == 4
        if i % 10 == 0:
            assert goes_on(folder, whole)
    assert noticed > 60


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "foreign",
    [
        *([1, 2], {}, "text", None, 7, torch.zeros(3), {"adapter": torch.zeros(3)}, {"version": 3}, {"version": "3"}),
        {"version": 3, "identity": {}},
    ],
    ids=str,
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_no_state_at_all_is_refused_or_an_older_one_is_used(stopped, whole, tmp_path, foreign, alone):
    folder = Path(shutil.copytree(stopped, tmp_path / "a.run"))
    torch.save(foreign, folder / "state-000005.pt")
    assert goes_on(folder, whole, alone=alone) != alone


def places(value, path=()) -> Iterator[tuple]:
    """The paths of all values in dicts and lists, but for a run's identity, which is compared as a whole."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(value, path: tuple, new):
    """A copy of `value` with `new` in that place; `new` is `...` where it is to be gone."""
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if new is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return value


OTHERS = ["text", None, 7, [], {}, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int32), ["a"], {"a": 1}, ...]


def others(saved, path: tuple) -> list:
    """Of another type than the value in that place; on top it may be gone, too."""
    value = saved
    for key in path:
        value = value[key]
    number = isinstance(value, (int, float))
    found = [other for other in OTHERS if not isinstance(other, (int, float) if number else type(value))]
    found = found if not isinstance(value, torch.Tensor) else OTHERS
    return found if len(path) == 1 else [other for other in found if other is not ...]


def test_values_of_other_types_are_refused_or_change_nothing(stopped, whole, tmp_path):
    saved, chance = torch.load(stopped / "state-000005.pt", weights_only=True), random.Random(1)
    found = [path for path in places(saved) if path and path[0] != "identity"]
    top, deep = [path for path in found if len(path) == 1], [path for path in found if len(path) > 1]
    refused = 0
    for i, path in enumerate([*top * 3, *chance.sample(deep, 100)]):
        folder = Path(shutil.copytree(stopped, tmp_path / f"{i}.run"))
        torch.save(replaced(saved, path, chance.choice(others(saved, path))), folder / "state-000005.pt")
        refused += not goes_on(folder, whole, alone=True)
    assert refused > 100


def test_a_state_of_an_earlier_version_goes_on(tmp_path):
    """Those had all trajectories rolled out, and no standard errors."""
    config, folder = replace(SHORT, pool=1, save_every=5, keep_states=1), tmp_path / "a.run"
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, config, stop_after(5), options=RunOptions(folder=folder))
    saved = torch.load(folder / "state-000005.pt", weights_only=True)
    del saved["common"]["started"]
    for measured in saved["history"]:
        del measured["gap_closed_se"]
    torch.save(saved, folder / "state-000005.pt")
    trained = train(AnalyticModel(), PROMPTS, config, options=RunOptions(folder=folder))
    assert_same(trained, train(AnalyticModel(), PROMPTS, config))
