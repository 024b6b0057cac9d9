"""benchmarks/step_cost.py: what an adapter adds to a step, counted on the meta device."""

import json

import pytest

from comfyui_agd.benchmarks import step_cost
from comfyui_agd.benchmarks.meta_model import MetaModel
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


def test_a_step_of_sdxl_has_few_launches_and_little_memory_traffic_more():
    low_rank = {"kind": "low_rank", "rank": 16}
    asked = {"default": step_cost.ADAPTERS["agd"], "in all": step_cost.ADAPTERS["agd-in-all"], "low_rank": low_rank}
    rows = {row["method"]: row for row in step_cost.count(step_cost.TrueSize("SDXL", 1024, 1024), asked)}
    launches = {name: row["added_launches"] / row["unguided_launches"] for name, row in rows.items()}
    assert launches["low_rank"] < 0.01
    assert 0.01 < launches["default"] < 0.15 < 0.3 < launches["in all"]
    assert rows["low_rank"]["added_bytes"] < 1e-4
    assert 0.001 < rows["default"]["added_bytes"] < 0.05 < rows["in all"]["added_bytes"]


def test_what_training_makes_by_default_is_what_is_counted():
    default = step_cost.default_of(MetaModel("SDXL").base)
    assert default | step_cost.ADAPTERS["agd"] == default


def test_in_a_transformer_the_default_adds_less_than_a_twentieth_to_a_step():
    rows = {row["method"]: row for row in step_cost.count(step_cost.TrueSize("SD3.5 medium", 1024, 1024))}
    assert rows["low_rank"]["added_per_step"] < 1e-4
    assert rows["low_rank, vector"]["added_per_step"] < 1e-4
    assert 0.005 < rows["default"]["added_per_step"] < 0.05
    assert rows["default"]["added_per_sampling"] < 0.1


def weights_in(network, *names: str, without: tuple[str, ...] = ()) -> int:
    """Of the linear layers that have one of the names in theirs: what each token is multiplied with."""
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "in_features")}
    own = (layer for name, layer in layers.items() if any(each in name for each in names))
    left_out = (layer for name, layer in layers.items() if any(each in name for each in without))
    return sum(layer.weight.numel() for layer in {*own} - {*left_out})


def joint_flops(network, image: int, prompt: int) -> int:
    """SD 3.5 medium's blocks: both have layers of their own, look at all tokens, and some images at themselves too."""
    modulation = ("adaLN_modulation",)
    of_image = weights_in(network, "x_block", without=modulation)
    of_prompt = weights_in(network, "context_block", without=modulation)
    blocks, alone = len(network.joint_blocks), len(network.x_block_self_attn_layers)
    pairs = blocks * (image + prompt) ** 2 + alone * image**2
    return 2 * (of_image * image + of_prompt * prompt) + 4 * network.hidden_size * pairs


def cross_flops(network, image: int, prompt: int) -> int:
    """Wan's blocks: the image looks at itself and at the prompt, whose keys and values alone are computed."""
    of_prompt = weights_in(network, "cross_attn.k", "cross_attn.v")
    of_image = weights_in(network, "blocks.") - of_prompt
    pairs = len(network.blocks) * image * (image + prompt)
    return 2 * (of_image * image + of_prompt * prompt) + 4 * network.dim * pairs


@pytest.mark.parametrize(
    ("formula", "name", "size", "frames", "tokens"),
    [
        (joint_flops, "SD3.5 medium", (1024, 1024), 1, (64 * 64, 154)),
        (cross_flops, "Wan 2.2 14B", (832, 480), 1, (52 * 30, 512)),
        (cross_flops, "Wan 2.2 14B", (832, 480), 21, (21 * 52 * 30, 512)),
    ],
)
def test_what_is_counted_is_what_the_architecture_says(formula, name, size, frames, tokens):
    model = MetaModel(name, frames=frames)
    expected = formula(model.model.diffusion_model, *tokens)
    # What comes before and after the blocks, and modulates them, is not in the formula.
    assert expected < model.cost(model.latent_shape(*size), None, 1).flops < 1.002 * expected


@pytest.mark.slow
def test_a_step_is_counted_with_activations_kept_and_computed_twice():
    found = step_cost.peaks(step_cost.TrueSize("SD 1.5", 512, 512))
    assert found["step_bytes_checkpointed"] < 0.5 * found["step_bytes"]
    assert found["step_flops"] < found["step_flops_checkpointed"] < 1.6 * found["step_flops"]


def test_the_pages_other_rows_stay(tmp_path):
    old = [{"model": name, "size": "512x512", "method": "old"} for name in ("SD 1.5", "gone")]
    old += [{"model": "SDXL", "size": "1024x1024", "method": "old"}]
    new = [{"model": "SDXL", "size": "1024x1024", "method": "new"}]
    assert step_cost.with_kept(tmp_path, new) == new
    (tmp_path / "step_cost.json").write_text(json.dumps(old))
    found = step_cost.with_kept(tmp_path, new)
    assert [(row["model"], row["method"]) for row in found] == [("SD 1.5", "old"), ("SDXL", "new")]
