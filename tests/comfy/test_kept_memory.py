"""What is kept of prompts is asked for as memory before a sampling."""

import comfy.model_management
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.tests.support.family_adapters import adapted
from comfyui_agd.tests.support.runtime import Prompts, TinyUNet, ksampler, random_prompts, tiny
from comfyui_agd.tests.support.small import config_for, randomised
from comfyui_agd.tests.support.tiny_families import conditioning, empty_latent, tiny_model


@pytest.fixture
def asked(monkeypatch) -> list[float]:
    """The memory that ComfyUI leaves free for each sampling."""
    found, load = [], comfy.model_management.load_models_gpu

    def watched(models, memory_required=0, **options):
        found.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    return found


@pytest.mark.parametrize(("kind", "prompts_kept"), [("delta", 2), ("low_rank", 0)])
def test_a_transformers_prompts_are_both_counted_where_attentions_are_guided(asked, kind, prompts_kept):
    base, given = (
        tiny_model("qwen-image"),
        Prompts(conditioning("qwen-image", "a", 6), conditioning("qwen-image", "b", 9)),
    )
    at = empty_latent("qwen-image")
    ksampler(base, given, at=at)
    plain = asked.pop()
    ksampler(adapted("qwen-image", base, kind), given, at=at)
    layers, width, tokens = 2, 128, 6 + 9
    assert {each - plain for each in asked} == {(prompts_kept > 0) * 2 * layers * width * tokens * 4}
    assert "memory_required" not in vars(base.model)


def test_a_unets_negatives_are_counted(asked):
    base, given = tiny(TinyUNet()), random_prompts(lengths=(16, 32))
    info = describe_base(base.model)
    config = config_for(info.layers, "delta", hidden=4, encoder_width=8, rank=0)
    model = apply_adapter(
        base,
        AdapterInfo(config=config, base=info, omega_range=(1.0, 9.0)),
        randomised(Adapter(config)).state_dict(),
        source="the file",
    )
    ksampler(base, given)
    plain = asked.pop()
    ksampler(model, given)
    channels = sum(layer.width for layer in info.layers)
    assert asked == [plain + 2 * channels * 32 * torch.float32.itemsize]
