"""A good citizen of memory: ComfyUI counts, loads, offloads and drops an adapter as it does any model.

The flags `--lowvram` and `--novram` mean nothing under `--cpu`, so here ComfyUI takes the CPU for a card of little
memory and decides by itself. Dynamic VRAM needs a real one: tests/gpu/test_memory_gpu.py.
"""

import gc
import logging
import weakref
from collections import Counter
from dataclasses import replace

import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch._subclasses.fake_tensor import FakeTensor

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter, Prepared
from comfyui_agd.agd_core.comfyui.guided_step import ActiveAdapter, GuidedStep
from comfyui_agd.agd_core.comfyui.sampling.applied_adapter import AppliedAdapter
from comfyui_agd.agd_core.comfyui.sampling.guided_sampling import GuidedSampling
from comfyui_agd.agd_core.comfyui.sampling.outer_sample import AdapterGuidance
from comfyui_agd.tests.support.requeue import Session, Setting, from_scratch, write_adapter
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    TinyUNet,
    custom_sampler,
    in_dtype,
    is_from,
    ksampler,
    patched,
    random_prompts,
    tiny,
)

CPU = torch.device("cpu")


def unload() -> None:
    gc.collect()
    mm.unload_all_models()
    mm.current_loaded_models.clear()  # ComfyUI keeps those whose patcher is gone, such as other tests' may be


@pytest.fixture(autouse=True)
def nothing_loaded():
    unload()
    yield
    unload()


@pytest.fixture
def base():
    """Each test's own: what one loads must not be there for the next."""
    return tiny(TinyUNet())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """The second one's low-rank changes are in the base's weights while it is sampled."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny(TinyUNet())
    return [write_adapter(folder, model, seed, hidden=64, rank=4 * seed) for seed in range(2)]


@pytest.fixture
def file(files):
    return files[0]


@pytest.fixture(params=[0, 1], ids=["alone", "merged"])
def either(files, request):
    return files[request.param]


def weights_of(file: str) -> int:
    """The bytes of an adapter file's weights."""
    return sum(tensor.nbytes for tensor in adapter_file.load_weights(file)[1].values())


def patcher_of(model):
    (patcher,) = model.get_nested_additional_models()
    return patcher


def loaded_adapters() -> list[tuple[int, int]]:
    """(bytes loaded, bytes counted) of every adapter that ComfyUI has loaded."""
    loaded = [each for each in mm.current_loaded_models if isinstance(each.model.model, Adapter)]
    return [(each.model_loaded_memory(), each.model_memory()) for each in loaded]


def at_each_evaluation(model, function):
    """`function` with the number of the evaluation, counted from 1, before each of the diffusion model's."""
    count = iter(range(1, 1000))

    def before(executor, *args, **kwargs):
        function(next(count))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", before)
    return model


# Counted and unloaded


def test_while_sampling_the_adapter_is_loaded_beside_its_model_and_counted(base, file, prompts):
    seen = []
    model = at_each_evaluation(patched(base, file), lambda _: seen.append(loaded_adapters()))
    ksampler(model, prompts)
    assert seen == [[(weights_of(file), weights_of(file))]] * STEPS
    assert {type(each.model.model) for each in mm.current_loaded_models} == {Adapter, type(base.model)}


def test_two_adapters_are_two_models(base, files, prompts):
    model = patched(patched(base, files[0]), files[1], strength=0.5)
    ksampler(model, prompts)
    assert loaded_adapters() == [(weights_of(file),) * 2 for file in files]


@pytest.mark.parametrize("unload", [mm.unload_all_models, lambda: mm.free_memory(1e30, CPU)], ids=["all", "free"])
def test_the_adapter_is_unloaded_with_the_rest_and_comes_back(base, either, prompts, unload):
    model = patched(base, either)
    first = ksampler(model, prompts)
    unload()
    assert mm.current_loaded_models == []
    assert patcher_of(model).loaded_size() == 0
    assert torch.equal(ksampler(model, prompts), first)
    assert loaded_adapters() == [(weights_of(either),) * 2]


@pytest.mark.parametrize(
    ("stored", "compute"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
    ],
)
def test_the_adapter_is_held_in_the_dtype_that_the_model_computes_in(base, file, prompts, stored, compute):
    model = patched(in_dtype(base, TinyUNet, stored, compute), file)
    assert torch.isfinite(ksampler(model, prompts)).all()
    assert {p.dtype for p in patcher_of(model).model.parameters()} == {compute or stored}
    assert loaded_adapters() == [(weights_of(file) // 2,) * 2]


# Partial loading

# Sizes that leave no layer far larger than the others: ComfyUI keeps room for the largest that is not loaded.
EVEN = {"hidden": 16, "encoder_width": 128}


def test_without_vram_nothing_is_loaded_and_the_pictures_are_the_same(base, file, prompts, card):
    model = patched(base, file)
    expected = ksampler(model, prompts)
    mm.unload_all_models()
    card(0, model, mm.VRAMState.NO_VRAM)
    assert torch.equal(ksampler(model, prompts), expected)
    assert loaded_adapters() == [(0, weights_of(file))]


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["cross_attention", "offset", "paper_attention"])
def test_a_part_is_loaded_where_there_is_room_for_a_part(base, tmp_path, prompts, card, kind, share):
    file = write_adapter(tmp_path, base, kind=kind, **EVEN)
    model, size = patched(base, file), weights_of(file)
    expected = ksampler(model, prompts)
    mm.unload_all_models()
    card(int(share * size), model)
    assert torch.equal(ksampler(model, prompts), expected)
    ((loaded, counted),) = loaded_adapters()
    assert counted == size
    assert loaded <= share * size
    if is_from("0.26.0"):  # older ones load a set of models, in any order: the base may take all the room
        assert loaded > 0
    # From now on the two models compete for the card.
    assert torch.equal(ksampler(model, prompts), expected)
    assert torch.equal(ksampler(model, prompts), expected)


def test_it_is_loaded_and_unloaded_by_parts_between_samplings(base, tmp_path, prompts):
    file = write_adapter(tmp_path, base, **EVEN)
    model, size = patched(base, file), weights_of(file)
    expected, patcher = ksampler(model, prompts), patcher_of(model)
    freed = patcher.partially_unload(CPU, size // 2)
    assert 0 < freed < size
    assert patcher.loaded_size() == size - freed
    assert torch.equal(ksampler(model, prompts), expected)
    patcher.detach()
    patcher.load(CPU, lowvram_model_memory=size // 2)
    assert 0 < patcher.loaded_size() < size // 2
    assert torch.equal(ksampler(model, prompts), expected)


# Nothing is kept alive


OF_A_MODEL = (Adapter, AdapterGuidance, AppliedAdapter)
OF_A_SAMPLING = (Prepared, GuidedSampling, GuidedStep, ActiveAdapter)


@pytest.fixture
def alive():
    """Counts the objects of such classes made since. There is no garbage collection: what waits for it is alive."""

    def objects(kinds: tuple[type, ...]) -> list:
        return [each for each in gc.get_objects() if type(each) in kinds]

    gc.collect()
    before = objects(OF_A_MODEL + OF_A_SAMPLING)
    gc.disable()
    yield lambda kinds: Counter(type(each).__name__ for each in objects(kinds) if not any(each is b for b in before))
    gc.enable()


def sample_everywhere(model, prompts):
    ksampler(model, prompts)
    ksampler(model, prompts, sampler="dpmpp_2m")
    ksampler(model, prompts, sampler="euler_cfg_pp")  # two passes
    ksampler(model, prompts, cfg=1.0)
    custom_sampler(model, prompts, "CFGGuider")
    custom_sampler(model, prompts, "BasicGuider")


@pytest.mark.parametrize("order", [("clone", "model", "base"), ("base", "model", "clone"), ("model", "base", "clone")])
def test_all_dies_with_the_last_model_without_the_garbage_collector(either, prompts, alive, order):
    held = {"base": tiny(TinyUNet())}
    held["model"] = patched(held["base"], either)
    held["clone"] = held["model"].clone()
    refs = [weakref.ref(each) for model in held.values() for each in (model, model.model)]
    refs += [weakref.ref(patcher_of(held["model"])), weakref.ref(patcher_of(held["model"]).model)]
    for model in held.values():
        ksampler(model, prompts)
    assert alive(OF_A_SAMPLING) == {}
    assert alive(OF_A_MODEL) == {"Adapter": 1, "AdapterGuidance": 1, "AppliedAdapter": 1}
    del model
    for name in order:
        del held[name]
    assert [ref() for ref in refs] == [None] * len(refs)
    assert alive(OF_A_MODEL + OF_A_SAMPLING) == {}
    assert mm.current_loaded_models == []


def test_a_bypassed_loader_takes_its_adapter_along(base, either, prompts, alive):
    model = patched(base, either)
    ksampler(model, prompts)
    del model
    assert alive(OF_A_MODEL + OF_A_SAMPLING) == {}
    ksampler(base, prompts)
    assert [each.model for each in mm.current_loaded_models] == [base]


def leaks(caplog) -> list[str]:
    mm.cleanup_models_gc()
    return [record.message for record in caplog.records if "leak" in record.message]


@pytest.mark.parametrize("unload", [True, False])
def test_comfyui_sees_no_memory_leak(base, either, prompts, caplog, alive, unload):
    caplog.set_level(logging.INFO)
    model = patched(base, either)
    sample_everywhere(model, prompts)
    if unload:
        mm.unload_all_models()
    del model
    assert leaks(caplog) == []
    ksampler(base, prompts)
    assert leaks(caplog) == []


def test_comfyui_would_see_a_leak_of_the_adapter(base, file, prompts, caplog):
    caplog.set_level(logging.INFO)
    model = patched(base, file)
    ksampler(model, prompts)
    held = patcher_of(model).model
    del model
    assert any("memory leak with model Adapter" in message for message in leaks(caplog))
    del held


# Interrupts and errors


class OutOfLuck(Exception):
    pass


def interrupt():
    mm.interrupt_current_processing()


def fail():
    raise OutOfLuck


DISTURBANCES = [(interrupt, mm.InterruptProcessingException), (fail, OutOfLuck)]


def state_of(model) -> dict:
    """Everything of a patched model that a sampling may not change."""
    patchers = [model, *model.get_nested_additional_models()]
    return {
        "options": repr(model.model_options),
        "wrappers": repr(model.wrappers),
        "patches": [(p.patches, p.object_patches, p.injections, p.hook_patches) for p in patchers],
        "modules": [[(name, id(module)) for name, module in p.model.named_modules()] for p in patchers],
        "hooks": [[m._forward_hooks or m._forward_pre_hooks for m in p.model.modules()] for p in patchers],
        "weights": [[(key, value.sum().item()) for key, value in p.model.state_dict().items()] for p in patchers],
        "patcher": base_patcher(model),
    }


def base_patcher(model):
    return getattr(model.model, "current_patcher", None)


@pytest.mark.parametrize(("disturb", "kind"), DISTURBANCES, ids=["interrupt", "error"])
@pytest.mark.parametrize("at", [1, 3])
def test_after_an_interrupt_or_error_everything_is_as_it_was(base, file, prompts, disturb, kind, at):
    model = patched(base, file)
    expected, unguided = ksampler(model, prompts), ksampler(base, prompts)
    before = state_of(model)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(CFG)
    disturbed = at_each_evaluation(model.clone(), lambda count: disturb() if count == at else None)
    guider.model_patcher, guider.model_options = disturbed, disturbed.model_options
    options = repr(guider.model_options)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    sampler, noise = comfy.samplers.sampler_object("euler"), torch.randn(1, 12, 8, 8)
    with torch.inference_mode(), pytest.raises(kind):
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)
    assert guider.cfg == CFG
    assert repr(guider.model_options) == options
    assert state_of(model) == before
    assert torch.equal(ksampler(model, prompts), expected)
    assert torch.equal(ksampler(base, prompts), unguided)


@pytest.mark.parametrize(("disturb", "kind"), DISTURBANCES, ids=["interrupt", "error"])
def test_an_interrupted_sampling_keeps_nothing_alive(either, prompts, alive, disturb, kind):
    base = tiny(TinyUNet())
    model = at_each_evaluation(patched(base, either), lambda count: disturb() if count == 2 else None)
    try:
        ksampler(model, prompts)
    except kind:
        pass
    else:
        pytest.fail("nothing disturbed the sampling")
    # ComfyUI's own frames and the exception refer to each other.
    gc.collect()
    assert alive(OF_A_SAMPLING) == {}
    refs = [weakref.ref(each) for each in (base, base.model, model)]
    del base, model
    assert [ref() for ref in refs] == [None] * 3
    assert alive(OF_A_MODEL + OF_A_SAMPLING) == {}


# Fifty in a row


def fifty(files: list[str]) -> list[Setting]:
    """Changes of adapter, omega, strength, base and prompt, all in the same order again after forty."""
    adapters = (None, files[0], files[1], files[0], files[0])
    return [
        Setting(
            base=i // 4 % 2,
            adapter=adapters[i % 5],
            omega=(3.0, 5.0, 5.0, 8.0)[i % 4],
            strength=(1.0, 0.5)[i // 2 % 2],
            prompt=i // 8 % 5,
        )
        for i in range(50)
    ]


def _is_real(kind: type) -> bool:
    """Whether objects of it are tensors with memory: those that compilers have traced with have none."""
    return issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor)


def tensors_alive() -> tuple[int, int]:
    """The number of live tensors, and the bytes of memory behind them."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if _is_real(type(each)) and each.device.type == "cpu"]
    return len(tensors), sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def test_fifty_changes_keep_memory_flat_and_results_equal_to_a_fresh_start(files, tmp_path, caplog):
    settings, session, memory = fifty(files), Session(), {}
    assert len(set(settings)) == 40
    pictures = {}  # not as tensors, which are counted
    with caplog.at_level(logging.INFO):
        for i, setting in enumerate(settings, start=1):
            picture = session.queue(setting).numpy().copy()
            assert np.array_equal(pictures.setdefault(setting, picture), picture)
            memory[i] = tensors_alive() if i in (10, 50) else None
            assert len(mm.current_loaded_models) == 1 + (setting.adapter is not None)
    assert memory[50] == memory[10]
    assert leaks(caplog) == []
    some = settings[5:40:7]
    assert {setting.adapter for setting in some} == {None, *files}
    for setting, fresh in zip(some, from_scratch(some, tmp_path, "--cpu"), strict=True):
        assert np.array_equal(pictures[setting], fresh["picture"].numpy())
        assert torch.equal(fresh["again"], fresh["picture"])


def test_bypassing_in_between_is_the_base_bit_for_bit(files, prompts):
    session, setting = Session(), Setting(adapter=None)
    expected = ksampler(tiny(TinyUNet()), random_prompts(seed=0))
    for file in (*files, files[0]):
        assert torch.equal(session.queue(setting), expected)
        assert not torch.equal(session.queue(replace(setting, adapter=file)), expected)
    assert torch.equal(session.queue(setting), expected)
