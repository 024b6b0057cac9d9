"""The adapter under ComfyUI's ways to use a graphics card's memory. Skipped where torch finds no CUDA card.

    .venv/bin/pytest tests/gpu/test_memory_gpu.py

Each way is a ComfyUI of its own, started with its flags: about twenty seconds each, and less than 1 GB of the card.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

from comfyui_agd.tests.support.requeue import WAYS, Setting, from_scratch, load_base, write_adapter


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[Setting]:
    folder, toy = tmp_path_factory.mktemp("adapters"), load_base("toy")
    # The second one's low-rank changes are in the base's weights while it is sampled.
    files = [write_adapter(folder, toy, seed, hidden=64, rank=4 * seed) for seed in range(2)]
    return [
        Setting("toy"),
        Setting("toy", adapter=files[0]),
        Setting("toy", adapter=files[1], strength=0.5),
        Setting("toy", adapter=files[0], omega=8.0, prompt=1),
        Setting("toy"),
    ]


@pytest.fixture(scope="module")
def results(settings, tmp_path_factory) -> dict[str, list[dict]]:
    return {
        way: from_scratch(settings, tmp_path_factory.mktemp("gpu"), *flags)
        for way, flags in {"cpu": ("--cpu",), **WAYS}.items()
    }


@pytest.mark.parametrize("way", WAYS)
def test_pictures_are_those_of_the_cpu(results, way):
    for ours, cpu in zip(results[way], results["cpu"], strict=True):
        torch.testing.assert_close(ours["picture"], cpu["picture"], atol=0.05, rtol=0.05)
        torch.testing.assert_close(ours["again"], ours["picture"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_bypassed_loader_is_the_base_before_and_after(results, way):
    assert torch.equal(results[way][0]["picture"], results[way][-1]["picture"])


@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_is_counted_and_loaded_as_its_way_has_it(results, way):
    for result, adapter in zip(results[way], (False, True, True, True, False), strict=True):
        assert ("Adapter" in result["loaded"]) == adapter
    loaded, counted = results[way][1]["loaded"]["Adapter"]
    assert counted == results["cpu"][1]["loaded"]["Adapter"][1]
    if way == "dynamic":
        assert loaded > 0
    else:
        assert loaded == (0 if way in ("novram", "crowded") else counted)
