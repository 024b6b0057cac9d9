"""Sites of the real architectures at their true sizes, on the meta device."""

import comfy.model_detection
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.sites import UnsupportedModel, describe_base, find_sites
from comfyui_agd.agd_core.config import AdapterConfig

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SMALL = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SD15 = {**COMMON, **SMALL, "context_dim": 768, "use_linear_in_transformer": False}
SD21 = {**COMMON, **SMALL, "context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}
SDXL = {
    **COMMON,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


def on_meta(unet_config):
    config = comfy.model_detection.model_config_from_unet_config(dict(unet_config))
    config.unet_config["dtype"] = torch.float16
    return config.get_model({}, device="meta")


@pytest.mark.parametrize(
    ("unet_config", "family", "count", "widths", "context_dim"),
    [
        (SD15, "SD15", 16, {320, 640, 1280}, 768),
        (SD21, "SD20", 16, {320, 640, 1280}, 1024),
        (SDXL, "SDXL", 70, {640, 1280}, 2048),
    ],
    ids=["SD1.5", "SD2.1", "SDXL"],
)
def test_every_cross_attention_is_found(unet_config, family, count, widths, context_dim):
    base = describe_base(on_meta(unet_config))
    assert (base.family, len(base.sites)) == (family, count)
    assert {site.width for site in base.sites} == widths
    assert {site.context_dim for site in base.sites} == {context_dim}


def test_the_papers_size_on_sdxl():
    """H = 128 is about 2 % of SDXL (arXiv 2503.07274)."""
    model = on_meta(SDXL)
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(find_sites(model.diffusion_model), hidden=128))
    total = sum(p.numel() for p in model.diffusion_model.parameters())
    assert 0.015 < adapter.parameter_count() / total < 0.03


def test_other_models_are_refused_by_structure():
    with pytest.raises(UnsupportedModel, match=r"this model is a Linear, which has no input_blocks"):
        find_sites(torch.nn.Linear(2, 2))
