"""Every transformer family that people run with CFG, as a tiny model in its true layout: what its row says is so."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import nodes
import pytest
import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.backbones.block_attention import overridden_unhooked
from comfyui_agd.agd_core.families import Family, find_family
from comfyui_agd.tests.support.runtime import STEPS, Prompts, ksampler, rows_of
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

each_family = pytest.mark.parametrize("name", TINY_FAMILIES)


def row_of(name: str) -> Family:
    row = find_family(TINY_FAMILIES[name].family)
    assert row is not None
    return row


def those_with(attention: str):
    """For each family whose prompt is read so."""
    return pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if row_of(name).attention == attention])


def prompts(name: str, positive: str = "a fox", negative: str = "blurry, dark", length: int | None = None) -> Prompts:
    return Prompts(conditioning(name, positive, length), conditioning(name, negative, length))


def sample(name: str, model, given: Prompts, **options) -> torch.Tensor:
    return flat(ksampler(model, given, at=empty_latent(name), **options))


def evaluate(name: str, model, *, seed: int = 7, wider: int = 1, length: int | None = None, batch: int = 1) -> Any:
    """One evaluation for one prompt."""
    given, at = prompts(name, length=length), empty_latent(name, batch, wider)
    with torch.inference_mode():
        return nodes.KSampler().sample(
            model, seed, 1, 1.0, "euler", "normal", given.positive, given.negative, at, denoise=1.0
        )[0]["samples"]


def blocks_of(network: nn.Module, lists: tuple[str, ...]) -> dict[str, nn.Module]:
    """By their paths."""
    return {f"{path}.{i}": block for path in lists for i, block in enumerate(network.get_submodule(path).children())}


@dataclass
class Call:
    """An attention call that `optimized_attention_override` saw, in the blocks or parts of blocks of `inside`."""

    inside: tuple[str, ...]
    keys: torch.Tensor  # [b, tokens, ...]
    output_width: int


@dataclass
class Trace:
    """Of one evaluation."""

    ran: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    context: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    prompt: torch.Tensor | None = None

    def calls_in(self, path: str) -> list[Call]:
        return [call for call in self.calls if path in call.inside]

    @property
    def tokens(self) -> int:
        assert self.prompt is not None
        return self.prompt.shape[-2]


@contextmanager
def _watch(modules: dict[str, nn.Module], enter, leave) -> Iterator[None]:
    """`enter(path, args, kwargs)` before and `leave(path, output)` after each of them runs."""
    handles = []
    for path, module in modules.items():
        before = lambda module, args, kwargs, path=path: enter(path, args, kwargs)  # noqa: E731
        after = lambda module, args, output, path=path: leave(path, output)  # noqa: E731
        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(name: str, hooked: bool = True, **how) -> Trace:
    """`hooked`: modules that don't ask for an override by themselves do."""
    row, model = row_of(name), tiny_model(name).clone()
    network, found, inside = model.model.diffusion_model, Trace(), []
    prompt_path, _, argument = row.prompt_at.partition(":")

    def enter(path: str, args: tuple, kwargs: dict) -> None:
        if path == "":
            found.context, found.timesteps = kwargs["context"], args[1]
        if path == prompt_path and argument and found.prompt is None:
            found.prompt = args[int(argument)] if argument.isdigit() else kwargs[argument]
        found.ran.append(path)
        inside.append(path)

    def leave(path: str, output: Any) -> None:
        if path == prompt_path and not argument:
            found.prompt = output
        inside.pop()

    def override(attention, q, k, *rest, **kwargs):
        output = attention(q, k, *rest, **kwargs)
        keys = k.transpose(1, 2) if kwargs.get("skip_reshape") else k
        found.calls.append(Call(tuple(inside), keys.clone(), output.shape[-1]))
        return output

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    watched = {"": network, **blocks_of(network, row.blocks)}
    if row.prompt_at:
        watched[prompt_path] = network.get_submodule(prompt_path)
    asking: AbstractContextManager = nullcontext()
    if hooked and row.attention_module:
        blocks = blocks_of(network, row.sites or row.blocks)
        asking = overridden_unhooked(blocks, row.attention_module, lambda *given: override)
    with _watch(watched, enter, leave), asking:
        evaluate(name, model, **how)
    return found


@each_family
def test_comfyui_detects_it_and_loads_all_its_weights(name, caplog):
    model = tiny_model(name).model
    assert type(model.model_config).__name__ == TINY_FAMILIES[name].family
    assert not [record for record in caplog.records if "unet missing" in record.msg or "unet unexpected" in record.msg]


@each_family
def test_it_samples_with_guidance_and_both_prompts_matter(name):
    model = tiny_model(name)
    guided = sample(name, model, prompts(name))
    assert guided.isfinite().all()
    for other in (prompts(name, positive="a cat"), prompts(name, negative="")):
        assert (sample(name, model, other) - guided).norm() > 0.1 * guided.norm()
    assert torch.equal(sample(name, tiny_model(name), prompts(name)), guided)


@each_family
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_costs_it_two_rows_a_step_and_picture(name, batch):
    rows = rows_of(tiny_model(name), ksampler, prompts(name), at=empty_latent(name, batch))
    assert sum(rows) == 2 * batch * STEPS


@each_family
def test_all_blocks_run_in_the_rows_order(name):
    row, network = row_of(name), tiny_model(name).model.diffusion_model
    blocks = list(blocks_of(network, row.blocks))
    assert all(any(block.startswith(path) for block in blocks) for path in row.blocks)
    assert [path for path in trace(name).ran if path in blocks] == blocks
    assert set(row.sites) <= set(row.blocks)


@each_family
@pytest.mark.parametrize("form", ["lora_unet_{underscored}", "diffusion_model.{path}"])
def test_comfyui_knows_a_lora_for_each_linear_layer_of_the_blocks(name, form):
    model = tiny_model(name).model
    keys = comfy.lora.model_lora_keys_unet(model, {})
    for block_path, block in blocks_of(model.diffusion_model, row_of(name).blocks).items():
        linears = [path for path, module in block.named_modules() if hasattr(module, "in_features")]
        assert linears
        for path in (f"{block_path}.{linear}" for linear in linears):
            key = form.format(path=path, underscored=path.replace(".", "_"))
            assert keys[key] == f"diffusion_model.{path}.weight"


@each_family
def test_the_prompts_width_is_that_of_the_layer_it_comes_to_first(name):
    row, network = row_of(name), tiny_model(name).model.diffusion_model
    context = trace(name).context
    assert context.shape[-1] == network.get_submodule(row.prompt_layer).in_features * row.prompt_parts


@each_family
def test_its_timesteps_go_up_to_1000(name):
    timesteps = trace(name).timesteps
    for t in timesteps if isinstance(timesteps, tuple) else [timesteps]:
        assert 980 < row_of(name).timestep_scale * t.max() < 1000.1


@each_family
def test_what_is_added_to_the_time_embedding_changes_that_pictures_modulation(name):
    row, model = row_of(name), tiny_model(name)
    added = torch.tensor([0.0, 1.0])

    def add(module, args, output):
        return output + added.reshape(2, *[1] * (output.ndim - 1))

    plain = flat(evaluate(name, model, batch=2))
    handle = model.model.diffusion_model.get_submodule(row.time_embedding).register_forward_hook(add)
    changed = flat(evaluate(name, model, batch=2))
    handle.remove()
    torch.testing.assert_close(changed[0], plain[0])
    assert (changed[1] - plain[1]).norm() > 0.05 * plain[1].norm()
    assert torch.equal(flat(evaluate(name, model, batch=2)), plain)


@each_family
def test_the_time_embeddings_width_is_its_last_linear_layers_or_its_norms(name):
    model, widths = tiny_model(name), []
    module = model.model.diffusion_model.get_submodule(row_of(name).time_embedding)
    linears = [layer for layer in module.modules() if hasattr(layer, "out_features")]
    with _watch({"": module}, lambda *given: None, lambda path, output: widths.append(output.shape[-1])):
        evaluate(name, model)
    assert set(widths) == {linears[-1].out_features if linears else module.weight.shape[-1]}


def site_blocks(name: str) -> list[str]:
    row = row_of(name)
    return list(blocks_of(tiny_model(name).model.diffusion_model, row.sites or row.blocks))


@those_with("joint")
def test_the_prompts_keys_stand_beside_the_images(name):
    paths, image_tokens = site_blocks(name), {1: set(), 4: set()}
    for wider, seen in image_tokens.items():
        for length in (6, 9):
            found = trace(name, wider=wider, length=length)
            lengths = [[call.keys.shape[1] for call in found.calls_in(path)] for path in paths]
            both = lengths[0][0]
            seen.add(both - found.tokens)
            assert [of_block.count(both) for of_block in lengths] == [1] * len(paths)
            assert sum(call.keys.shape[1] == both for call in found.calls) == len(paths)
    assert [len(seen) for seen in image_tokens.values()] == [1, 1]
    assert max(image_tokens[4]) > max(image_tokens[1]) > 0


@those_with("joint")
def test_the_prompts_keys_come_first_or_last_as_the_row_says(name):
    """At the first site they don't depend on the image yet."""
    one, other = (trace(name, seed=seed) for seed in (1, 2))
    keys, others = (found.calls_in(site_blocks(name)[0])[0].keys for found in (one, other))
    unchanged = (keys == others).flatten(2).all(2)[0]
    image = [False] * (len(unchanged) - one.tokens)
    prompt = [True] * one.tokens
    assert unchanged.tolist() == (image + prompt if row_of(name).prompt_last else prompt + image)


@those_with("cross")
def test_the_first_attention_with_the_prompts_keys_is_the_images(name):
    fixed = TINY_FAMILIES[name].config.get("text_len")
    for length in (fixed,) if fixed else (6, 9):
        found = trace(name, length=length)
        for path in site_blocks(name):
            keys = [call.keys.shape[1] for call in found.calls_in(path)]
            # Behind its attention to itself, but where the row names the module.
            assert (keys.index(found.tokens) == 0) == bool(row_of(name).attention_module)


@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if row_of(name).attention_module])
def test_where_the_row_names_the_attentions_module_it_asks_for_no_override_by_itself(name):
    assert trace(name, hooked=False).calls == []
    model = tiny_model(name)
    plain = flat(evaluate(name, model))
    assert trace(name).calls != []
    assert torch.equal(flat(evaluate(name, model)), plain)


@each_family
def test_the_row_says_how_the_prompt_is_read(name):
    assert row_of(name).attention in ("joint", "cross")
