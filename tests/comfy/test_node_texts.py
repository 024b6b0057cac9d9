"""What nodes show: the result in the first 60 characters, for ComfyUI's classic canvas cuts the rest."""

import asyncio
import json
import re
from types import SimpleNamespace

import folder_paths
import pytest

from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.agd_core.comfyui.sampling import messages
from comfyui_agd.agd_core.seeds import LARGEST_SEED
from comfyui_agd.nodes import AGDExtension, common, evaluate, train_settings
from comfyui_agd.nodes.loader import AGDAdapterLoader
from comfyui_agd.training.progress import PHASES, Progress

SHOWN = 60


NODES = asyncio.run(AGDExtension().get_node_list())


@pytest.fixture
def own_folders(monkeypatch) -> None:
    """ComfyUI knows the folder of adapters."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths})
    folders.register()


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """What is shown on nodes."""
    texts = []
    monkeypatch.setattr(common, "show_on_node", lambda node_id, text: texts.append(text))
    return texts


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_done_how_far_it_is_and_how_long_it_takes_can_be_read(phase):
    text = Progress(phase, 9_998, 9_999, seconds_left=7200.0).describe()
    assert text.endswith(": 9998/9999, 2.0 h left")
    assert len(text) <= SHOWN


def test_of_an_iteration_the_time_left_and_the_gap_closed_can_be_read():
    progress = Progress("train", 12_345, 20_000, 0.1234, 0.62, 12_300_000_000, 7200.0)
    assert progress.describe()[:SHOWN].startswith("Training: 12345/20000, 2.0 h left, gap closed 62%, loss")
    assert progress.describe().endswith("memory 12.3 GB")


def test_what_was_said_last_can_be_read_whatever_was_said_before(shown):
    notify = common.notices("node")
    notify("trained on other weights: " + 100 * "x")
    notify("no speed-up: the sampler needs two passes.")
    assert shown[-1][:SHOWN].startswith("No speed-up: the sampler needs two passes.\n\nTrained on other")


MESSAGES = {name: text for name, text in vars(messages).items() if name.isupper()} | {
    "unguided_because": messages.unguided_because(messages.needs_both("RescaleCFG")),
    "no_place": messages.unguided_because(messages.NO_PLACE_FOR_ADAPTERS),
    "adapters_not_used": messages.adapters_not_used("PerpNeg"),
    "omega_outside_range": messages.omega_outside_range(12.5, 1, 12),
    "latent_size_far_from_trained": messages.latent_size_far_from_trained(64, 64, [(128, 128)]),
    "strengths_add_up": messages.strengths_add_up(2),
    "layers_skipped": messages.layers_skipped(16, 140),
    "evaluation_replaced": messages.evaluation_replaced("PerpNeg"),
    "prompts_evaluated_otherwise": messages.prompts_evaluated_otherwise("PerpNeg"),
    "needs_both_in_every_step": messages.needs_both_in_every_step("RescaleCFG"),
    "few_forecasts": messages.few_forecasts(1.75),
}


@pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
def test_a_message_says_what_the_user_gets_in_what_is_shown(text):
    assert len(text.split(". ")[0]) <= SHOWN
    assert "omega" not in text


SEARCHED = ("one pass", "skip cfg", "speed up", "faster", "2x", "turbo", "no cfg", "distilled cfg")


def test_who_looks_for_speed_finds_the_loader_alone_of_our_nodes(own_folders):
    found = {node: set(node.define_schema().search_aliases) for node in NODES}
    assert set(SEARCHED) <= found.pop(AGDAdapterLoader)
    assert not any(set(SEARCHED) & aliases for aliases in found.values())


@pytest.mark.parametrize("node", NODES)
def test_no_text_of_a_node_names_a_symbol_of_the_paper(node, own_folders):
    assert not re.search("omega|psi|teacher|student|distil", json.dumps(node.GET_SCHEMA().get_v1_info(node).input))


@pytest.mark.parametrize("node", [evaluate.AGDEvaluate, train_settings.AGDTrainSettings])
def test_every_seed_that_comfyui_draws_can_be_chosen(node, own_folders):
    (seed,) = [each for each in node.define_schema().inputs if each.id == "seed"]
    assert (seed.min, seed.max) == (0, LARGEST_SEED)


def test_lines_are_lines_in_the_renderer_that_takes_texts_for_markdown(monkeypatch):
    sent = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id: sent.append(text))
    monkeypatch.setattr(common.PromptServer, "instance", server, raising=False)
    common.show_on_node("node", "first\nsecond")
    assert sent == ["first  \nsecond"]
