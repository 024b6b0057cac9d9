"""The change of the timestep's vector, beside each kind that may have one."""

import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.config import AdapterConfig, BaseInfo
from comfyui_agd.agd_core.kinds import kind_config
from comfyui_agd.tests.support.small import randomised, small_layers

KINDS = {"low_rank": {"rank": 2}, "delta": {"hidden": 8, "rank": 2}}
VECTOR, CHANNELS = 6, 20


def config(kind: str, vector: int = VECTOR) -> AdapterConfig:
    own = kind_config(kind, encoder_width=8, vector=vector, **KINDS[kind])
    return AdapterConfig(small_layers(), own, prompt_tokens=5, vector=CHANNELS)


def vector_of(adapter: Adapter, omega: float, difference: torch.Tensor, t: float = 500.0) -> torch.Tensor:
    context, times = torch.zeros(2, 5, 16), torch.full((2,), t)
    how = {"dtype": torch.float32, "difference": difference}
    return adapter.prepare(torch.tensor([omega]), times, context, **how).vector


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_told_omega_t_and_how_the_prompts_differ_and_is_nothing_at_omega_1(kind):
    adapter, difference = randomised(Adapter(config(kind))), torch.randn(2, 16)
    found = vector_of(adapter, 4.0, difference)
    assert found.shape == (2, CHANNELS)
    assert not vector_of(adapter, 1.0, difference).any()
    others = (
        vector_of(adapter, 5.0, difference),
        vector_of(adapter, 4.0, -difference),
        vector_of(adapter, 4.0, difference, 9),
    )
    assert all(not torch.allclose(found, other, rtol=1e-2) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_one_changes_nothing_and_learns(kind):
    adapter = Adapter(config(kind))
    found = vector_of(adapter, 4.0, torch.randn(2, 16))
    assert not found.any()
    found.sum().backward()
    assert adapter.kind.vector.to_out in adapter.zero_initialised()
    assert adapter.kind.vector.to_out.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_with_it_the_negative_prompt_has_an_effect(kind):
    assert Adapter(config(kind)).uses_negative
    assert Adapter(config("low_rank", vector=0)).uses_negative is False


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_it(kind, tmp_path):
    made = config(kind)
    info = AdapterInfo(
        config=made, base=BaseInfo("Small", "FLOW", small_layers(), vector=CHANNELS), omega_range=(1.0, 12.0)
    )
    adapter = randomised(Adapter(made))
    found, loaded = adapter_file.load(adapter_file.save(tmp_path / "a.safetensors", adapter, info))
    assert found == info
    assert f"vector {VECTOR}" in found.config.kind.describe()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())


def test_a_base_without_one_is_refused():
    kind = kind_config("low_rank", rank=2, vector=VECTOR)
    with pytest.raises(ValueError, match="no vector of the timestep"):
        AdapterConfig(small_layers(), kind)


@pytest.mark.parametrize("vector", [-1, 4096])
def test_its_width_has_limits(vector):
    with pytest.raises(ValueError, match=rf"vector is {vector}, but must be from 0 to 512"):
        kind_config("low_rank", vector=vector)
