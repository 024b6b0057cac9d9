"""What nodes show of their work: on the node, in ComfyUI's own bar, in its log."""

import logging

import comfy.model_management as mm
import comfy.utils
import pytest
from PIL import Image

from comfyui_agd.nodes import progress as module
from comfyui_agd.nodes.progress import NodeProgress
from comfyui_agd.training.progress import Progress


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is shown on the node."""
    shown: list[str] = []
    monkeypatch.setattr(module, "show_on_node", lambda node_id, text: shown.append(text))
    return shown


@pytest.fixture
def bars(monkeypatch) -> list[tuple]:
    """What ComfyUI's bar of the node is told: how many, of how many, and the picture."""
    told: list[tuple] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, node_id: told.append(args))
    return told


def test_each_phase_is_shown_from_its_beginning(texts, bars, caplog):
    caplog.set_level(logging.INFO)
    display = NodeProgress("7")
    display(Progress("encode", 0, 30))
    display(Progress("train", 0, 40))
    assert texts == ["Encoding prompts: 0/30", "Training: 0/40"]
    assert bars == [(0, 30, None), (0, 40, None)]
    assert caplog.messages == ["AGD: Encoding prompts: 0/30", "AGD: Training: 0/40"]


def test_what_training_takes_comes_first_until_it_begins(texts, bars, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    display = NodeProgress("7")
    display.plan = ["Needs 1 GB.", "quick 1 min"]
    display(Progress("encode", 0, 30))
    display(Progress("train", 0, 40))
    display(Progress("rollout", 0, 8))
    plan = "Needs 1 GB.\n\nquick 1 min"
    assert texts == [
        f"{plan}\n\nEncoding prompts: 0/30",
        f"Training: 0/40\n\n{plan}",
        f"{Progress('rollout', 0, 8).describe()}\n\n{plan}",
    ]


def test_fast_steps_flood_neither_the_browser_nor_the_log(texts, bars, caplog):
    caplog.set_level(logging.INFO)
    display = NodeProgress("7")
    for step in range(1000):
        display(Progress("train", step, 1000))
        display(Progress("rollout", 8, 8))
    assert len(texts) == len(bars) < 100
    assert len(caplog.messages) == 2


def test_a_preview_is_shown_at_once_and_stays(texts, bars, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_PICTURES", 0.0)
    display, image = NodeProgress("7"), Image.new("RGB", (8, 8))
    display(Progress("preview", 60, 60))
    display.show_preview(20, image)
    display(Progress("train", 21, 40))
    assert bars == [(60, 60, None), (60, 60, ("JPEG", image, None)), (21, 40, ("JPEG", image, None))]


def test_messages_with_a_preview_are_few_and_small(texts, bars, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display, image = NodeProgress("7"), Image.effect_noise((2048, 1024), 64)
    display(Progress("train", 0, 100))
    display.show_preview(1, image)
    for step in range(1, 101):
        now[0] += 0.1
        display(Progress("train", step, 100))
    assert len(bars) <= 2 + 10
    assert image.size == (2048, 1024)  # the caller's own
    for kind, shown, _ in (picture for _, _, picture in bars[1:]):
        assert (kind, shown.size, shown.mode) == ("JPEG", (1024, 512), "RGB")


def test_an_interrupt_gets_through_at_any_report(texts, bars):
    display = NodeProgress("7")
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        display(Progress("plan", 0, 1))
    assert texts == bars == []
    display(Progress("plan", 0, 1))
    assert len(texts) == 1


def interrupted(display: NodeProgress) -> None:
    with display.says_where_it_stopped():
        raise mm.InterruptProcessingException


def test_an_interrupted_training_says_how_far_it_came(texts, bars):
    display = NodeProgress("7")
    display(Progress("train", 33, 300))
    display(Progress("rollout", 0, 8))
    with pytest.raises(mm.InterruptProcessingException):
        interrupted(display)
    assert texts[-1] == "Stopped at iteration 33 of 300. Queue again to go on."


def test_before_its_first_iteration_there_is_nothing_to_go_on_from(texts, bars):
    display = NodeProgress("7")
    display(Progress("train", 0, 300))
    with pytest.raises(mm.InterruptProcessingException):
        interrupted(display)
    assert texts == ["Training: 0/300"]
