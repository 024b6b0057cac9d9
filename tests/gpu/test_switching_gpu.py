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


@pytest.fixture(scope="module", params=[pytest.param(("--cpu",), id="cpu", marks=pytest.mark.slow), *on_card])
def results(request, tmp_path_factory) -> list[dict]:
    """Of a session's prompts: `SWITCHES` that are equal, and as many with one LoRA and another in turns.

    Always with an adapter whose changes go into the base's weights, too.
    """
    folder, toy = tmp_path_factory.mktemp("session"), load_base("toy")
    adapter = write_adapter(folder, toy, 1, hidden=64, rank=4)
    loras = [write_lora(folder, toy, seed) for seed in range(2)]
    asked = [Setting("toy", loras[0], adapter)] * SWITCHES
    asked += [Setting("toy", loras[i % 2], adapter) for i in range(SWITCHES)]
    return from_scratch(asked, folder, *request.param, session="in turn")


def assert_flat(results: list[dict]) -> None:
    held = [result["held"] for result in results[SETTLED:]]
    assert max(held) - min(held) < SLACK


def assert_as_before(results: list[dict], after: int) -> None:
    """Pictures are those of so many prompts ago."""
    for before, now in zip(results, results[after:], strict=False):
        torch.testing.assert_close(now["picture"], before["picture"], atol=1e-3, rtol=1e-3)


def test_a_queue_of_equal_prompts_takes_no_more_memory(results):
    assert_flat(results[:SWITCHES])
    assert_as_before(results[:SWITCHES], after=1)


def test_a_lora_that_is_switched_leaves_nothing_behind(results):
    switched = results[SWITCHES:]
    # Every other one, for the two LoRAs may differ in what is loaded beside them.
    assert_flat(switched[::2])
    assert_flat(switched[1::2])
    assert_as_before(switched, after=2)
    assert not torch.allclose(switched[0]["picture"], switched[1]["picture"], atol=1e-2)
