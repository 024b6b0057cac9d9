"""benchmarks/step_cost.py: what an adapter adds to a step, counted on the meta device."""

import pytest

from comfyui_agd.benchmarks import step_cost
from comfyui_agd.tests.support.checkpoints import on_meta

# Billions of parameters, fixed positions included, and ComfyUI's class.
TRANSFORMERS = [
    ("SD3.5 medium", 2.47, "SD3"),
    ("SD3.5 large", 8.14, "SD3"),
    ("Z-Image", 6.15, "ZImage"),
    ("Qwen-Image", 20.4, "QwenImage"),
    ("Anima", 2.09, "Anima"),
    ("Wan 2.2 14B", 14.3, "WAN21_T2V"),
    ("HunyuanVideo 1.5", 8.33, "HunyuanVideo15"),
]


def test_an_adapter_adds_little_and_the_negative_prompt_something_once():
    rows = {row["method"]: row for row in step_cost.count(step_cost.TrueSize("SD 1.5", 256, 256))}
    assert all(0 < row["added_per_step"] < 0.1 for row in rows.values())
    assert rows["paper-320"]["added_per_step"] > 2 * rows["paper-128"]["added_per_step"]
    # Only what uses the negative prompt looks up its keys and values.
    assert rows["paper-128"]["added_per_sampling"] == 0 < rows["agd"]["added_per_sampling"] < 0.05
    assert rows["agd"]["added_per_sampling"] == rows["agd-modulated"]["added_per_sampling"]
    # Low-rank changes in the weights are in no step.
    assert rows["agd"]["added_per_step"] < rows["agd-modulated"]["added_per_step"] - 0.001


@pytest.mark.parametrize(("name", "billions", "family"), TRANSFORMERS)
def test_true_sizes_are_those_that_are_known(name, billions, family):
    model = on_meta(name)
    network = model.diffusion_model
    counted = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    assert counted == pytest.approx(1e9 * billions, rel=0.02)
    assert type(model.model_config).__name__ == family


def test_in_a_transformer_the_default_adds_less_than_a_twentieth_to_a_step():
    rows = {row["method"]: row for row in step_cost.count(step_cost.TrueSize("SD3.5 medium", 1024, 1024))}
    assert rows["low_rank"]["added_per_step"] < 1e-4
    assert rows["low_rank, vector"]["added_per_step"] < 1e-4
    assert 0.005 < rows["default"]["added_per_step"] < 0.05
    assert rows["default"]["added_per_sampling"] < 0.1
