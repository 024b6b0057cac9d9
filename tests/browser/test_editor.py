"""The pack as ComfyUI's editor shows it, in both of its renderers: found, connected, run, read."""

import pytest

from comfyui_agd.tests.support.editor import Editor, read_without_scrolling
from comfyui_agd.tests.support.graphs import base_graph, with_adapter

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
