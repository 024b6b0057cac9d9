"""A queue that goes on for long, and a LoRA that changes within it: memory stays flat, pictures are as before.

Under ComfyUI's ways to use a card's memory, and on the CPU.
"""

import pytest
import torch

from comfyui_agd.tests.support.requeue import WAYS, Setting, from_scratch, load_base, write_adapter, write_lora

# What a kernel needs for itself, and what is kept of the first times, comes before.
SETTLED, SWITCHES = 4, 20
SLACK = 1 << 16  # bytes: less than any of the toy's weights has
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
on_card = [pytest.param(flags, id=way, marks=needs_card) for way, flags in WAYS.items()]
each_way = pytest.mark.parametrize("flags", [pytest.param(("--cpu",), id="cpu", marks=pytest.mark.slow), *on_card])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, list[str]]:
    """(an adapter whose changes go into the base's weights, two LoRAs)."""
    folder, toy = tmp_path_factory.mktemp("files"), load_base("toy")
    return write_adapter(folder, toy, 1, hidden=64, rank=4), [write_lora(folder, toy, seed) for seed in range(2)]


def sampled(settings: list[Setting], folder, flags) -> list[dict]:
    return from_scratch(settings, folder, *flags, session="in turn")


def assert_flat(results: list[dict]) -> None:
    held = [result["held"] for result in results[SETTLED:]]
    assert max(held) - min(held) < SLACK


@each_way
def test_a_queue_of_equal_prompts_takes_no_more_memory(files, flags, tmp_path):
    results = sampled([Setting("toy", adapter=files[0])] * SWITCHES, tmp_path, flags)
    assert_flat(results)
    for result in results[1:]:
        torch.testing.assert_close(result["picture"], results[0]["picture"], atol=1e-3, rtol=1e-3)


@each_way
def test_a_lora_that_is_switched_leaves_nothing_behind(files, flags, tmp_path):
    adapter, loras = files
    results = sampled([Setting("toy", loras[i % 2], adapter) for i in range(SWITCHES)], tmp_path, flags)
    # Every other one, for the two LoRAs may differ in what is loaded beside them.
    assert_flat(results[::2])
    assert_flat(results[1::2])
    for before, after in zip(results, results[2:], strict=False):
        torch.testing.assert_close(after["picture"], before["picture"], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(results[0]["picture"], results[1]["picture"], atol=1e-2)
