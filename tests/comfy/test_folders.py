"""models/agd among ComfyUI's model folders: what is written under a name is what is read under it."""

from pathlib import Path

import folder_paths
import pytest

from comfyui_agd.agd_core.adapter_name import AdapterNameError
from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.training.run_folder import longest_files_of


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    """A folder that extra_model_paths.yaml gave the key before the pack was loaded."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.KEY, ([str(shared)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register()
    return shared


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["mine", "sdxl/mine", "a/b/mine", "雪 (v1.5)"])
def test_what_is_saved_is_listed_and_read_under_the_name_that_training_tells(shared, name):
    write(shared / f"{name}.safetensors", "older, of the same name")
    path = folders.new_adapter_path(name)
    write(path, "new")
    told = folders.name_of(path)
    assert told in folders.adapters()
    assert folders.why_missing(told) is None
    assert folders.adapter_path(told).read_text() == "new"


def test_what_trainings_keep_is_no_adapter_but_the_best_one_so_far(shared):
    path = folders.new_adapter_path("mine")
    run = path.with_suffix(".run")
    for file in (path, run / "best.safetensors", run / "state-000250.pt", path.parent / "theirs" / "0005000.pt"):
        write(file)
    assert set(folders.adapters()) == {"mine.safetensors", "mine.run/best.safetensors", "theirs/0005000.pt"}


def test_adapters_of_other_folders_are_still_read(shared):
    write(shared / "theirs.safetensors", "theirs")
    assert folders.adapter_path("theirs.safetensors").read_text() == "theirs"


def test_registering_twice_changes_nothing(shared):
    before = folder_paths.get_folder_paths(folders.KEY)
    folders.register()
    assert folder_paths.get_folder_paths(folders.KEY) == before


@pytest.mark.parametrize("name", ["", "..", "/tmp/mine", "../../escape", "nul"])
def test_a_name_against_the_rule_has_no_path(shared, name):
    with pytest.raises(AdapterNameError, match="No adapter can be called"):
        folders.new_adapter_path(name)


def test_a_name_that_another_file_would_be_read_for_is_refused(shared, tmp_path):
    first = tmp_path / "first"
    write(first / "mine.safetensors")
    folder_paths.add_model_folder_path(folders.KEY, str(first), is_default=True)
    with pytest.raises(AdapterNameError, match=r"the loader would read .*first.mine\.safetensors in its place"):
        folders.new_adapter_path("mine")
    assert folders.new_adapter_path("other").name == "other.safetensors"


def test_the_same_folder_by_another_path_hides_nothing(shared, tmp_path):
    write(tmp_path / "models" / "agd" / "mine.safetensors")
    (tmp_path / "linked").symlink_to(tmp_path / "models" / "agd", target_is_directory=True)
    folder_paths.add_model_folder_path(folders.KEY, str(tmp_path / "linked"), is_default=True)
    assert folders.new_adapter_path("mine").name == "mine.safetensors"


def test_folders_and_files_in_the_way_are_said_before_training(shared, tmp_path):
    own = tmp_path / "models" / "agd"
    (own / "taken.safetensors").mkdir(parents=True)
    with pytest.raises(AdapterNameError, match=r"taken\.safetensors is a folder"):
        folders.new_adapter_path("taken")
    write(own / "file")
    with pytest.raises(AdapterNameError, match="file is no folder"):
        folders.new_adapter_path("file/mine")


@pytest.fixture
def own(shared, tmp_path) -> Path:
    """models/agd, with a folder beside it that isn't in it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "models" / "agd" / "inside").mkdir(parents=True)
    return tmp_path / "models" / "agd"


@pytest.mark.parametrize(("link", "name"), [("link", "link/mine"), ("mine.safetensors", "mine"), ("mine.run", "mine")])
def test_a_link_that_leads_out_of_the_folder_is_refused(own, tmp_path, link, name):
    target = tmp_path / "outside"
    (own / link).symlink_to(target / "a.safetensors" if link.endswith(".safetensors") else target)
    with pytest.raises(AdapterNameError, match=rf"No adapter can be called '{name}': .*{link}.* leads out of .*agd\."):
        folders.new_adapter_path(name, longest_files_of)
    assert list(target.iterdir()) == []


def test_a_link_that_stays_in_the_folder_is_fine_and_so_is_one_to_the_folder(own, tmp_path):
    (own / "link").symlink_to(own / "inside")
    assert folders.new_adapter_path("link/mine", longest_files_of) == own / "link" / "mine.safetensors"
    elsewhere = tmp_path / "disk"
    own.rename(elsewhere)
    own.symlink_to(elsewhere)
    assert folders.new_adapter_path("link/mine", longest_files_of) == own / "link" / "mine.safetensors"


def test_a_folder_that_cannot_be_written_to_is_said_before_training(shared, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", "/proc")  # read-only, for the superuser too
    folders.register()
    with pytest.raises(AdapterNameError, match=r"'mine': /proc/agd/mine\.safetensors can't be written"):
        folders.new_adapter_path("mine")


@pytest.mark.parametrize("name", ["mine", "new/folder/mine"])
def test_the_attempt_to_write_leaves_nothing(own, name):
    before = sorted(own.rglob("*"))
    folders.new_adapter_path(name, longest_files_of)
    assert sorted(own.rglob("*")) == before


def test_a_run_that_cannot_keep_its_files_is_refused(own):
    write(own / "mine.run")
    with pytest.raises(AdapterNameError, match=r"mine\.run is no folder"):
        folders.new_adapter_path("mine", longest_files_of)
