"""benchmarks/flops.py: what an adapter adds to a step, counted on the meta device."""

from comfyui_agd.benchmarks import flops


def test_an_adapter_adds_little_and_the_negative_prompt_something_once():
    rows = {row["method"]: row for row in flops.count("SD 1.5", 256)}
    assert all(0 < row["added_per_step"] < 0.1 for row in rows.values())
    assert rows["paper-320"]["added_per_step"] > 2 * rows["paper-128"]["added_per_step"]
    # Only what uses the negative prompt looks up its keys and values.
    assert rows["paper-128"]["added_per_sampling"] == 0 < rows["agd"]["added_per_sampling"] < 0.05
    assert rows["agd"]["added_per_sampling"] == rows["agd-modulated"]["added_per_sampling"]
    # Low-rank changes in the weights are in no step.
    assert rows["agd"]["added_per_step"] < rows["agd-modulated"]["added_per_step"] - 0.001
