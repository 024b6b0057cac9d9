"""The pack as ComfyUI's editor shows it, in both of its renderers: found, connected, run, read."""

import itertools
import json
import re
from collections.abc import Iterator

import pytest

from comfyui_agd.tests.support.editor import RENDERERS, Editor, read_without_scrolling
from comfyui_agd.tests.support.graphs import base_graph, with_adapter
from comfyui_agd.tests.support.live_server import ROOT
from comfyui_agd.tools.templates import place_model_files

# The editor lists nodes that have the words in their own name before those that are found by an alias.
PLACES = {
    "one pass": 1,
    "skip cfg": 1,
    "speed up": 1,
    "faster": 1,
    "distilled cfg": 1,
    "2x": 2,
    "no cfg": 3,
    "turbo": 10,
}
NODES = ("AGDAdapterLoader", "AGDApplyAdapter", "AGDEvaluate", "AGDTrain", "AGDTrainSettings")
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
# As long as it takes to be good enough for a picture of it.
BETTER = {"batch": 4, "kind.adapter_size": 32, "kind.learning_rate": 2e-3, "guidance_scale_up_to": 6.0}
# Of the toy's size; fields of a chosen option are named after it.
TINY = {
    "length": "this many iterations",
    "kind.adapter_size": 8,
    "kind.rank": 0,
    "picture_size": "width and height",
    "picture_size.width": 64,
    "picture_size.height": 64,
    "batch": 2,
    "prompt_count": 4,
}


def train_on_the_toy(editor: Editor, name: str, iterations: int, **settings) -> None:
    """AGD Train with its settings, and its plot, by the graph's own functions."""
    things = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "circle")]
    prompts = "\n".join(f"a large {thing} on a white background" for thing in things)
    editor.add("AGDToyLoader", 0, 0)
    editor.add("AGDTrainSettings", 0, 170, **TINY | {"length.iterations": iterations} | settings)
    editor.add("AGDTrain", 450, 0, prompts=prompts, adapter_name=name)
    editor.add("PreviewImage", 900, 0)
    editor.resize("PreviewImage", 230, 340)
    for output in ("MODEL", "CLIP", "VAE"):
        editor.connect("AGDToyLoader", output, "AGDTrain", output.lower())
    editor.connect("AGDTrainSettings", "settings", "AGDTrain", "settings")
    editor.connect("AGDTrain", "plot", "PreviewImage", "images")


def read_on(editor: Editor, node: str, pattern: str) -> None:
    """Waits until what is seen of a node's text, without scrolling, begins with `pattern`."""
    box = editor.text_on(node).first
    editor.wait_until(lambda: box.is_visible() and re.match(pattern, read_without_scrolling(box)))


def test_the_loader_is_found_by_what_it_is_wanted_for(editor):
    found = {words: editor.search(words).index("AGD Adapter Loader") + 1 for words in PLACES}
    assert {words: place for words, place in found.items() if place > PLACES[words]} == {}


def test_the_loader_goes_between_checkpoint_and_sampler_by_mouse_and_samples(editor):
    editor.load(base_graph())
    editor.look_at(0, 0, 0.6)
    assert editor.search("faster")[0] == "AGD Adapter Loader"
    editor.place(700, 700)
    editor.drag(("AGDToyLoader", "MODEL"), ("AGDAdapterLoader", "model"))
    editor.drag(("AGDAdapterLoader", "MODEL"), ("KSampler", "model"))
    assert {("AGDToyLoader", "AGDAdapterLoader"), ("AGDAdapterLoader", "KSampler")} <= editor.links()
    editor.run_to_the_end()
    editor.wait_until(lambda: editor.pictures_on("SaveImage") == 1)


def test_a_training_shows_its_progress_a_preview_its_result_and_its_plot(editor, pictures):
    iterations, settings = (200, BETTER) if pictures.wanted else (8, {})
    train_on_the_toy(editor, f"shown_{editor.renderer}", iterations, preview_every=iterations, **settings)
    editor.look_at_node("AGDTrain")
    editor.run()
    read_on(editor, "AGDTrain", r"Needs [\d.]+ MB, about .* on this machine")
    read_on(editor, "AGDTrain", rf"Training: \d+/{iterations}")
    editor.wait_until(lambda: editor.pictures_on("AGDTrain") == 1)
    read_on(editor, "AGDTrain", r"Gap closed -?\d+ ?%")
    editor.wait_until(lambda: editor.pictures_on("PreviewImage") == 1)
    pictures.take("train", 420, -60, 740, 830)


@pytest.mark.parametrize("page", ["vue"], indirect=True)
def test_an_evaluation_shows_its_picture_and_its_result(editor, pictures):
    choice = {"adapter_name": "shown_vue.safetensors"} if pictures.wanted else {}  # of the test above
    editor.refresh()
    count, steps = (4, 20) if pictures.wanted else (1, 2)
    prompts = "a large red star on a white background\na small blue ring on a white background"
    editor.add("AGDToyLoader", 0, 0)
    sizes = {"count": count, "steps": steps, "width": 64, "height": 64}
    editor.add("AGDEvaluate", 350, 0, prompts=prompts, cfg=3.0, **sizes, **choice)
    editor.add("PreviewImage", 800, 0)
    editor.resize("PreviewImage", 500, 620)
    for output in ("MODEL", "CLIP", "VAE"):
        editor.connect("AGDToyLoader", output, "AGDEvaluate", output.lower())
    editor.connect("AGDEvaluate", "picture", "PreviewImage", "images")
    editor.look_at_node("AGDEvaluate")
    editor.run()
    read_on(editor, "AGDEvaluate", "Gap closed")
    editor.wait_until(lambda: editor.pictures_on("PreviewImage") == 1)
    pictures.take("evaluate", 320, -60, 1010, 760)


def test_a_stopped_training_says_how_far_it_came_and_keeps_its_state(editor, server):
    name = f"stopped_{editor.renderer}"
    train_on_the_toy(editor, name, 500, evaluate_every=0, preview_every=0, save_every=0)
    editor.look_at_node("AGDTrain")
    editor.run()
    read_on(editor, "AGDTrain", r"Training: [1-9]")
    editor.stop()
    editor.wait_until(lambda: list((server.adapters / f"{name}.run").glob("state-*")))
    read_on(editor, "AGDTrain", r"Stopped at iteration \d+ of 500\. Queue again to go on\.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("damaged.safetensors", "This adapter file is damaged or incomplete"),
        ("no_such.safetensors", "There is no adapter 'no_such.safetensors'"),
    ],
)
def test_an_error_is_read_where_the_editor_shows_errors(editor, server, name, sentence):
    server.adapters.mkdir(parents=True, exist_ok=True)
    (server.adapters / "damaged.safetensors").write_bytes(b"half of a file")
    editor.load(with_adapter(base_graph(), name))
    editor.run()
    details = editor.error_details()
    editor.wait_until(lambda: sentence in read_without_scrolling(details))
    assert "AGD Adapter Loader" in read_without_scrolling(details)


@pytest.mark.parametrize("node", NODES)
def test_the_help_of_a_node_is_its_page(editor, node):
    editor.add(node)
    editor.look_at_node(node)
    editor.select(node)
    help = editor.help()
    heading = (ROOT / "web" / "docs" / f"{node}.md").read_text().splitlines()[0].lstrip("# ")
    help.get_by_role("heading", level=1, name=heading, exact=True).wait_for()


def test_a_notice_is_read_on_the_node_to_its_first_full_stop(editor):
    graph = with_adapter(base_graph(), "training-free")
    graph["sampler"]["inputs"]["sampler_name"] = "euler_cfg_pp"
    graph["agd"]["inputs"]["end_percent"] = 0.9 + 0.01 * len(editor.renderer)  # so that nothing is taken from a cache
    editor.load(graph)
    editor.look_at_node("AGDAdapterLoader")
    editor.run()
    read_on(editor, "AGDAdapterLoader", r"No speed-up: [^.]*\.")


@pytest.mark.parametrize(
    ("page", "template"), list(zip(itertools.cycle(RENDERERS), TEMPLATES, strict=False)), indirect=["page"]
)
def test_a_template_opens_and_offers_each_model_that_is_missing(editor, template):
    editor.refresh()
    editor.open_template(template)
    editor.error_details()
    assert editor.count("error-group-missing-model") == editor.count(re.compile("error-group-(?!display)")) == 1
    assert editor.count("missing-model-download") == editor.count("missing-model-locate") > 0


@pytest.fixture
def model_files(server) -> Iterator[None]:
    """Those of the templates, while a test runs."""
    place_model_files(server.folder)
    yield
    for file in (server.folder / "models").rglob("*.safetensors"):
        if file.stat().st_size == 0:
            file.unlink()


@pytest.mark.parametrize("page", ["vue"], indirect=True)
def test_a_template_is_whole_where_its_model_is(editor, model_files, pictures):
    editor.refresh()
    editor.open_template(TEMPLATES[0])
    assert editor.count("error-overlay") == 0
    pictures.take("workflow", -30, -50, 1355, 690)


def test_the_nodes_are_in_the_editors_language(server, browser):
    translated = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    editor = Editor(browser.new_page(), server, "vue", "zh")
    editor.clear()
    for node in NODES:
        editor.add(node)
        editor.page.get_by_text(translated[node]["display_name"], exact=True).first.wait_for()
    editor.page.close()
    assert editor.problems == []
