"""Core's MultiGPU CFG Split, before and behind the loader: the adapter's sampling runs on one GPU.

Here the second one is the CPU by another name.
"""

from functools import partial

import comfy.model_management
import pytest
import torch

from comfyui_agd.agd_core.comfyui.sampling import messages
from comfyui_agd.tests.support.runtime import TinyUNet, ksampler, patched, rows_of, tiny, training_free

# Older releases have none.
nodes_multigpu = pytest.importorskip("comfy_extras.nodes_multigpu")

HOW = {"rank": {"kind": "delta", "rank": 2}}
# Rows are computed one by one where others are computed together.
close = partial(torch.testing.assert_close, atol=5e-4, rtol=5e-4)


@pytest.fixture
def split(monkeypatch):
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=True: devices)
    return lambda model: nodes_multigpu.MultiGPUCFGSplitNode.execute(model, 2).args[0]


@pytest.fixture(scope="module")
def base():
    model = tiny(TinyUNet())
    model.cached_patcher_init = (lambda: tiny(TinyUNet()), ())  # as ComfyUI's loaders leave it
    return model


@pytest.mark.parametrize("first", ["the loader", "the split"])
def test_an_adapter_samples_on_one_and_says_so(base, files, prompts, split, first):
    said, file = [], files["rank"]
    if first == "the loader":
        model = split(patched(base, file, notify=said.append))
    else:
        model = patched(split(base), file, notify=said.append)
    alone = patched(base, file)
    assert torch.equal(ksampler(model, prompts), ksampler(alone, prompts))
    assert rows_of(model, ksampler, prompts) == rows_of(alone, ksampler, prompts)
    assert messages.ONE_GPU in said


def test_beside_it_the_base_and_training_free_use_both(base, prompts, split):
    several = split(base)
    close(ksampler(several, prompts), ksampler(base, prompts))
    close(ksampler(training_free(several), prompts), ksampler(training_free(base), prompts))
    assert len(several.get_additional_models_with_key("multigpu")) == 1
