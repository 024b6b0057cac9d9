"""An adapter's name on the real server: what AGD Train writes is what AGD Adapter Loader reads, by list and by link."""

import shutil

import numpy as np
import pytest

from comfyui_agd.tests.support.graphs import base_graph, pixels, train_graph, train_settings, with_adapter
from comfyui_agd.tests.support.live_server import PromptError, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.close()


def named_graph(name: str, **settings) -> dict:
    """AGD Train, whose name output is shown."""
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["train", 1]}}
    return train_graph(name, **settings) | {"name": shown}


def linked_graph(name: str, **settings) -> dict:
    """The name output of AGD Train into AGD Adapter Loader, and a picture."""
    return named_graph(name, **settings) | with_adapter(base_graph(), ["train", 1])


LISTS = (("AGDAdapterLoader", "adapter_name"), ("AGDEvaluate", "adapter_name"), ("AGDTrainSettings", "start"))


def listed(server: Server, node: str = "AGDAdapterLoader", name: str = "adapter_name") -> list[str]:
    """What the browser has in a list after a refresh (R)."""
    inputs = server.get(f"/object_info/{node}")[node]["input"]
    kind, options = (inputs["required"] | inputs.get("optional", {}))[name]
    return kind if isinstance(kind, list) else options["options"]


@pytest.mark.parametrize(("node", "name"), LISTS)
@pytest.mark.parametrize("folder", ["", "sd15/"])
def test_a_refresh_lists_a_file_that_has_come_and_not_one_that_has_gone(server, node, name, folder):
    file = server.adapters / f"{folder}just_trained.safetensors"
    before = listed(server, node, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"any")
    after = listed(server, node, name)
    file.unlink()
    assert set(after) - set(before) == {f"{folder}just_trained.safetensors"}
    assert listed(server, node, name) == before


@pytest.mark.parametrize("name", ["mine", "sdxl/mine", "雪 (v1.5).safetensors"])
def test_the_loader_takes_the_name_that_training_gives_out(server, name):
    linked = server.run(linked_graph(name))
    (told,) = linked["name"]["text"]
    assert told in listed(server)
    assert (server.adapters / told).is_file()
    chosen = server.run(with_adapter(base_graph(), told))
    assert np.array_equal(pixels(server.image(chosen, "save")), pixels(server.image(linked, "save")))


def test_the_name_is_a_text_for_other_nodes_and_a_name_for_ours(server):
    graph = linked_graph("linked")
    graph["begin"] = train_settings(start=["train", 1])
    graph["begun"] = train_graph("begun")["train"]
    graph["begun"]["inputs"]["settings"] = ["begin", 0]
    texts = {"string": ["train", 1], "regex_pattern": "linked", "mode": "First Match", "group_index": 1}
    flags = {"case_insensitive": False, "multiline": False, "dotall": False}
    graph["text"] = {"class_type": "RegexExtract", "inputs": {**texts, **flags}}
    graph["found"] = {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}}
    outputs = server.run(graph)
    assert outputs["found"]["text"] == ["linked"]
    assert "begun.safetensors" in listed(server)


def test_a_linked_name_is_read_again_when_its_file_has_changed(server):
    graph = linked_graph("changing")
    other = server.run(linked_graph("another", learning_rate=0.1, seed=3))
    first = pixels(server.image(server.run(graph), "save"))
    shutil.copy(server.adapters / "another.safetensors", server.adapters / "changing.safetensors")
    second = pixels(server.image(server.run(graph), "save"))
    assert not np.array_equal(second, first)
    assert np.array_equal(second, pixels(server.image(other, "save")))


@pytest.mark.parametrize("folder", ["", "sdxl"])
def test_of_two_files_with_one_name_the_one_that_was_written_is_read(server, folder):
    name = f"{folder}/both" if folder else "both"
    server.run(train_graph(f"older{folder}", seed=1, learning_rate=0.1))
    shared = server.extra / f"{name}.safetensors"
    shared.parent.mkdir(exist_ok=True)
    shutil.copy(server.adapters / f"older{folder}.safetensors", shared)
    before = shared.read_bytes()
    older = pixels(server.image(server.run(with_adapter(base_graph(), f"{name}.safetensors")), "save"))
    linked = pixels(server.image(server.run(linked_graph(name)), "save"))
    chosen = pixels(server.image(server.run(with_adapter(base_graph(), f"{name}.safetensors")), "save"))
    assert shared.read_bytes() == before
    assert not np.array_equal(linked, older)
    assert np.array_equal(chosen, linked)


@pytest.mark.parametrize("name", ["", "   ", ".", "..", "mine.", "mine ", "/tmp/mine", "a/../b", "a\\b", "a\nb", "NUL"])
def test_a_name_that_no_loader_could_list_is_refused_before_anything_runs(server, name):
    before = sorted(server.adapters.rglob("*"))
    with pytest.raises(PromptError, match=r"No adapter can be called .*Choose a name such as") as refused:
        server.run(train_graph(name))
    assert "Custom validation failed for node" in str(refused.value)  # by the server's check of the prompt
    assert sorted(server.adapters.rglob("*")) == before


def test_a_linked_name_is_checked_before_training(server):
    graph = train_graph("unused")
    graph["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "../escape"}}
    graph["train"]["inputs"]["adapter_name"] = ["text", 0]
    prompt_id, failed = server.queue(graph), None
    for event in server.events(prompt_id):
        assert event["type"] != "progress"
        failed = event["data"] if event["type"] == "execution_error" else failed
    assert failed["exception_type"] == "agd.AdapterNameError"
    assert failed["exception_message"].startswith("No adapter can be called '../escape'")


def test_an_error_of_ours_is_named_by_no_folder(server):
    (server.adapters / "broken.safetensors").write_bytes(b"half of a file")
    prompt_id, failed = server.queue(with_adapter(base_graph(), "broken.safetensors")), None
    for event in server.events(prompt_id):
        failed = event["data"] if event["type"] == "execution_error" else failed
    assert failed["exception_type"] == "agd.AdapterFileError"
    assert failed["exception_message"].startswith("This adapter file is damaged or incomplete: copy or train it again.")
