"""What the pack gives the editor beside its nodes: the workflow templates and the translations, by the real server."""

import json

import numpy as np
import pytest

from comfyui_agd.tests.support.graphs import pixels, train_settings
from comfyui_agd.tests.support.live_server import ROOT, Server, to_api
from comfyui_agd.tools.editor_workflow import FIELDS, choices_of, field_type, fields_of, inputs_of
from comfyui_agd.tools.templates import FOLDER, TEMPLATES, place_model_files, workflows

FILES = sorted(FOLDER.glob("*.json"))
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
SEEDS = ("fixed", "increment", "decrement", "randomize")
NOTE = "MarkdownNote"
FOLDERS = ("checkpoints", "controlnet", "diffusion_models", "loras", "text_encoders", "vae")
TOY_PROMPTS = "a large red star on a white background\na small blue ring on a white background"
# By type, the toy's output in place of each output of a node that reads a file.
LOADERS = {
    "CheckpointLoaderSimple": (0, 1, 2),
    "UNETLoader": (0,),
    "CLIPLoader": (1,),
    "VAELoader": (2,),
    "LoraLoader": (0, 1),
}
SIZE = {"width": 64, "height": 64}
# By type, what the toy knows and does soon.
SMALL = {
    "CLIPTextEncode": {"text": "a red star"},
    "EmptyLatentImage": SIZE,
    "EmptySD3LatentImage": SIZE,
    "AGDTrain": {"prompts": TOY_PROMPTS, "settings": ["settings", 0]},
    "AGDTrainSettings": train_settings(5)["inputs"],
    "AGDEvaluate": {"prompts": TOY_PROMPTS, "negative": "", "count": 2, "steps": 3, **SIZE},
}

every_template = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def saved(file) -> dict:
    return json.loads(file.read_text("utf-8"))


def known_nodes(workflow: dict) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] != NOTE]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    place_model_files(folder)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.get("/object_info")


def test_the_files_are_what_their_tool_writes(object_info):
    assert {file.stem: saved(file) for file in FILES} == workflows(object_info)


def test_the_editor_lists_the_templates_with_their_pictures(server):
    (listed,) = [found for pack, found in server.get("/workflow_templates").items() if pack == "a-renamed-agd"]
    assert sorted(listed) == list(TEMPLATES)
    assert sorted(file.stem for file in FOLDER.glob("*.jpg")) == list(TEMPLATES)


def test_the_first_template_needs_no_adapter_file():
    (loader,) = [node for node in saved(FILES[0])["nodes"] if node["type"] == "AGDAdapterLoader"]
    assert loader["widgets_values"][0] == "training-free"


@every_template
def test_a_note_says_what_to_do(file):
    (note,) = [node for node in saved(file)["nodes"] if node["type"] == NOTE]
    assert 100 < len(note["widgets_values"][0]) < 800


def check_fields(specs: dict, values, where: str) -> None:
    """The next of `values` are those of the fields among `specs`."""
    for name, spec in specs.items():
        if (kind := field_type(spec)) not in FIELDS:
            continue
        value = next(values)
        right = isinstance(value, TYPES[kind]) if kind in TYPES else value in choices_of(spec)
        assert right, f"{where}.{name}: {value}"
        check_fields(fields_of(spec, value), values, f"{where}.{name}")
        if len(spec) > 1 and spec[1].get("control_after_generate"):
            assert next(values) in SEEDS, f"{where}.{name}"


@every_template
def test_every_field_has_a_value_of_its_kind(file, object_info):
    for node in known_nodes(saved(file)):
        values = iter(node["widgets_values"])
        check_fields(inputs_of(object_info[node["type"]]), values, node["type"])
        assert list(values) == [], node["type"]


@every_template
def test_every_link_joins_an_output_to_an_input_of_its_type(file, object_info):
    workflow = saved(file)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, begin, output, end, place, kind in workflow["links"]:
        socket = nodes[end]["inputs"][place]
        assert socket["link"] == number
        assert number in nodes[begin]["outputs"][output]["links"]
        assert object_info[nodes[begin]["type"]]["output"][output] == kind
        wanted = inputs_of(object_info[nodes[end]["type"]])[socket["name"]][0]
        assert {"*", *kind.split(",")} & set(wanted.split(",") if isinstance(wanted, str) else ["COMBO"])


@every_template
def test_every_required_input_is_there(file, object_info):
    for id, node in to_api(saved(file), object_info).items():
        required = object_info[node["class_type"]]["input"].get("required", {})
        assert set(required) <= set(node["inputs"]), f"{id}: {node['class_type']}"


@every_template
def test_every_model_file_can_be_downloaded_by_the_editor(file):
    for node in saved(file)["nodes"]:
        files = {value for value in node["widgets_values"] if str(value).endswith((".safetensors", ".ckpt", ".pt"))}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"] in FOLDERS


@every_template
def test_the_server_accepts_a_template_as_it_is(file, server, object_info):
    """Its model files are there by name, with nothing in them, so that it fails as soon as it runs."""
    prompt_id = server.queue(to_api(saved(file), object_info))
    errors = [event["data"] for event in server.events(prompt_id) if event["type"] == "execution_error"]
    assert errors[0]["node_type"] in LOADERS


def without_controls(prompt: dict) -> dict:
    """There is no ControlNet for the toy: its conditions go on as they were."""
    controls = {id: node for id, node in prompt.items() if node["class_type"] == "ControlNetApplyAdvanced"}
    left = {id: node for id, node in prompt.items() if id not in controls and node["class_type"] != "ControlNetLoader"}
    for node in left.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in controls:
                node["inputs"][name] = controls[value[0]]["inputs"][("positive", "negative")[value[1]]]
    return left


def on_the_toy(prompt: dict) -> dict:
    """A template's prompt with the toy in place of its model files, and what the toy can sample."""
    loads = {id: node["class_type"] for id, node in prompt.items() if node["class_type"] in LOADERS}
    toy = {"model": "toy-dit" if "UNETLoader" in loads.values() else "toy"}
    prompt = {id: node for id, node in prompt.items() if id not in loads}
    for node in prompt.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in loads:
                inputs[name] = ["toy", LOADERS[loads[value[0]]][value[1]]]
        for name, value in SMALL.get(node["class_type"], {}).items():
            inputs[name] = inputs[name] if isinstance(inputs.get(name), list) else value
    return {"toy": {"class_type": "AGDToyLoader", "inputs": toy}, "settings": train_settings(5), **prompt}


@every_template
def test_a_template_runs_on_the_toy(file, server, object_info):
    prompt = on_the_toy(without_controls(to_api(saved(file), object_info)))
    outputs = server.run(prompt)
    shown = [id for id, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert shown != []
    assert all(len(np.unique(pixels(server.image(outputs, id)))) > 2 for id in shown)


def test_the_server_gives_the_translations(server):
    found = server.get("/i18n")
    for folder in (ROOT / "locales").iterdir():
        own = json.loads((folder / "nodeDefs.json").read_text("utf-8"))
        assert {node: found[folder.name]["nodeDefs"][node] for node in own} == own
