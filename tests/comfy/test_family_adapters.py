"""Adapters of every transformer family: sampled, chained, exported and trained, on tiny models in their true layout."""

import dataclasses

import comfy.lora
import comfy.sd
import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.backbones import UnsupportedModel, block_attention
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.sampler import ComfySampler
from comfyui_agd.agd_core.comfyui.sampling import merging, prompt_cache
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.kinds.scale import START
from comfyui_agd.agd_core.lora import lora
from comfyui_agd.tests.support.family_adapters import TinyClip, adapted, adapter_of, base_of, config_of
from comfyui_agd.tests.support.runtime import CFG, STEPS, Prompts, ksampler, ksampler_advanced, rows_of
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model
from comfyui_agd.training import held_out
from comfyui_agd.training.assess import AssessConfig, Candidate, PromptTexts, assess
from comfyui_agd.training.euler_sample import SampleSettings
from comfyui_agd.training.euler_sample import sample as training_sample
from comfyui_agd.training.presets import settings_for
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

each_family = pytest.mark.parametrize("name", TINY_FAMILIES)
PROMPTS = ["a fox", "a green door"]


def prompts(name: str, negative: str = "blurry, dark", positive: str = "a fox") -> Prompts:
    return Prompts(conditioning(name, positive), conditioning(name, negative))


def sample(name: str, model, given: Prompts | None = None, batch: int = 1, **options) -> torch.Tensor:
    return flat(ksampler(model, given or prompts(name), at=empty_latent(name, batch), **options))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@each_family
def test_it_guides_in_one_evaluation_per_step_and_the_negative_prompt_matters(name):
    base = tiny_model(name)
    model = adapted(name, base)
    guided, other = sample(name, model), sample(name, model, prompts(name, negative=""))
    assert rows_of(model, sample_rows, name)[-STEPS:] == [1] * STEPS
    assert guided.isfinite().all()
    assert apart(guided, sample(name, base, cfg=1.0)) > 0.05
    assert apart(guided, other) > 0.02


def sample_rows(model, name: str) -> torch.Tensor:
    return sample(name, model)


@each_family
def test_where_it_has_nothing_to_do_the_picture_is_the_bases_to_the_bit(name):
    base = tiny_model(name)
    plain, guided = sample(name, base, cfg=1.0), sample(name, base)
    assert torch.equal(sample(name, adapted(name, base), cfg=1.0), plain)
    assert torch.equal(sample(name, adapted(name, base, strength=0.0)), guided)
    assert torch.equal(sample(name, adapted(name, base, guidance_scale=1.0)), plain)
    assert torch.equal(sample(name, base), guided)  # bypassed: nothing stays behind


@each_family
def test_merged_into_the_weights_it_is_what_it_is_beside_them(name, monkeypatch):
    base = tiny_model(name)
    merged = sample(name, adapted(name, base))
    monkeypatch.setattr(merging, "can_merge", lambda guider, lora: False)
    assert apart(sample(name, adapted(name, base)), merged) < 1e-4


@each_family
def test_split_attention_gives_what_whole_attention_does(name, monkeypatch):
    base = tiny_model(name)
    split = sample(name, adapted(name, base))
    monkeypatch.setattr(block_attention, "can_split", lambda q, channels: False)
    assert apart(sample(name, adapted(name, base)), split) < 1e-4


@each_family
def test_equal_prompts_have_no_difference(name):
    base, same = tiny_model(name), prompts(name, negative="a fox")
    assert apart(sample(name, adapted(name, base, "scale"), same), sample(name, base, same, cfg=1.0)) < 1e-5


@pytest.mark.parametrize(
    ("name", "module", "out"),
    [("wan2.1-t2v", "cross_attn", "o"), ("pixart", "cross_attn", "proj"), ("hunyuan-dit", "attn2", "out_proj")],
)
def test_a_cross_attention_hands_on_what_leads_from_the_negatives_to_the_prompts(name, module, out):
    base, given, called, handed_on = tiny_model(name), prompts(name), [], []
    attention = base.model.diffusion_model.blocks[0].get_submodule(module)
    attention.register_forward_pre_hook(lambda m, args, kwargs: called.append((args, kwargs)), with_kwargs=True)
    attention.get_submodule(out).register_forward_pre_hook(lambda m, args: handed_on.append(args[0].clone()))
    for positive in (given.negative, given.positive):
        sample(name, base, Prompts(positive, given.negative), cfg=1.0, steps=1)
    ((_, unwanted, *_), _), ((x, _, *others), kwargs) = called
    with torch.inference_mode():
        attention(x, unwanted, *others, **kwargs)
    _, towards, away = handed_on
    model = apply_adapter(base, *attention_guidance(base_of(name)), source="the file", notify=lambda message: None)
    sample(name, model, given, steps=1)
    torch.testing.assert_close(handed_on[-1], towards + (CFG - 1) * START * (towards - away))


@pytest.mark.parametrize("kind", ["delta", "low_rank"])
@pytest.mark.parametrize("name", ["hunyuan-dit", "ltxv"])
def test_what_stands_in_hidden_tokens_makes_no_difference(name, kind):
    model, given, other = adapted(name, tiny_model(name), kind), prompts(name), prompts(name)
    for (cond, entries), *_ in (other.positive, other.negative):
        cond[entries["attention_mask"] == 0] += 1.0
    assert apart(sample(name, model, other), sample(name, model, given)) < 1e-5


def test_of_small_latents_prompts_are_kept_too():
    """PixArt's positions are not finite where the sides are too short."""
    model, at = adapted("pixart", tiny_model("pixart")), {"samples": torch.zeros(1, 4, 30, 36)}
    assert ksampler(model, prompts("pixart"), at=at).isfinite().all()


def test_where_another_node_has_replaced_the_attention_it_is_refused():
    base, given = tiny_model("pixart"), prompts("pixart")
    model, plain = adapted("pixart", base), sample("pixart", base, given)
    attention = base.model.diffusion_model.blocks[1].cross_attn
    attention.forward = lambda x, *args, **kwargs: type(attention).forward(attention, x, *args, **kwargs)
    with pytest.raises(UnsupportedModel, match="Another node has replaced this model's attention to the prompt"):
        sample("pixart", model, given)
    with pytest.raises(UnsupportedModel, match="train one of kind low_rank"):
        adapted("pixart", base)
    assert torch.equal(sample("pixart", base, given), plain)  # and the node's own is still there
    assert "forward" in vars(attention)


@each_family
def test_pictures_of_a_batch_and_of_several_prompts_are_right(name):
    base = tiny_model(name)
    model = adapted(name, base)
    alone, both = sample(name, model), sample(name, model, batch=2)
    if name != "ltx-2":  # whose noise is drawn for both latents at once
        assert apart(both[:1], alone) < 1e-4
    one, other = prompts(name), prompts(name, negative="ugly", positive="a dog")
    combined = Prompts(one.positive + one.positive, one.negative + one.negative)
    assert apart(sample(name, model, combined), alone) < 1e-4  # the same twice is once
    mixed = sample(name, model, Prompts(one.positive + other.positive, one.negative + other.negative))
    assert mixed.isfinite().all()
    assert apart(mixed, alone) > 1e-3


def test_of_more_prompts_than_are_kept_otherwise_each_is_prepared_once_per_sampling(monkeypatch):
    prepared, compute = [], prompt_cache.compute_keys_values

    def watch(prompt, *args):
        prepared.append(prompt)
        return compute(prompt, *args)

    monkeypatch.setattr(prompt_cache, "compute_keys_values", watch)
    monkeypatch.setattr(prompt_cache, "_MAX_PROMPTS", 2)
    positive = [cond for text in ("a fox", "a dog", "a door") for cond in conditioning("sd3", text)]
    model = adapted("sd3", tiny_model("sd3"), start_percent=0.01)  # whose weights are the base's own
    sample("sd3", model, Prompts(positive, conditioning("sd3", "blurry, dark")))
    assert len(prepared) == len(positive) + 1


# ComfyUI itself can't go on with latents that are several.
@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if name != "ltx-2"])
def test_a_sampling_in_two_parts_is_the_whole_and_it_may_begin_anywhere(name):
    base, given = tiny_model(name), prompts(name)
    model = adapted(name, base)
    first = ksampler_advanced(model, given, empty_latent(name), end=2)
    parts, whole = (
        ksampler_advanced(model, given, at, start=start) for at, start in ((first, 2), (empty_latent(name), 0))
    )
    assert apart(flat(parts["samples"]), flat(whole["samples"])) < 1e-4
    assert sample(name, model, denoise=0.5).isfinite().all()


@each_family
def test_a_file_holds_it_and_another_familys_is_refused_with_both_named(name, tmp_path):
    info, weights = adapter_of(name)
    adapter = Adapter(info.config)
    adapter.load_state_dict(weights)
    found, loaded = adapter_file.load_weights(adapter_file.save(tmp_path / "a.safetensors", adapter, info))
    assert found == info
    assert all(torch.equal(value, loaded[key]) for key, value in weights.items())
    other = "flux" if name.startswith("sd3") else "sd3"
    with pytest.raises(AdapterFileError, match=rf"is for {base_of(name).family_name}.*your checkpoint is") as refused:
        adapted(name, tiny_model(other))
    assert base_of(other).family_name in str(refused.value)


@each_family
def test_as_a_lora_it_is_taken_by_the_core_loader_whole_and_gives_the_same(name):
    base, (info, weights) = tiny_model(name), adapter_of(name, "low_rank", vector=0)
    exported = lora(info, weights, CFG)
    keys = comfy.lora.model_lora_keys_unet(base.model, {})
    assert {key.rpartition(".lora_")[0] or key.rpartition(".alpha")[0] for key in exported} <= keys.keys()
    patched, _ = comfy.sd.load_lora_for_models(base, None, exported, 1.0, 0.0)
    assert len(patched.patches) == sum(len(layer.linears) for layer in info.config.layers)
    ours = apply_adapter(base, info, weights, source="the file", notify=lambda message: None)
    assert apart(sample(name, ours), sample(name, patched, cfg=1.0)) < 1e-4


def test_what_no_lora_can_express_is_not_exported():
    with pytest.raises(ValueError, match=r"timestep's vector, which no LoRA can: .*--vector 0"):
        lora(*adapter_of("sd3", "low_rank"), CFG)


@each_family
def test_a_lora_before_or_behind_it_is_the_same(name):
    base = tiny_model(name)
    info, weights = adapter_of(name, "low_rank", vector=0)
    others = {key: 0.3 * value for key, value in lora(info, weights, 2.0).items()}

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, others, 1.0, 0.0)[0]

    before, behind = adapted(name, with_lora(base)), with_lora(adapted(name, base))
    assert torch.equal(sample(name, before), sample(name, behind))


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "omnigen2"])
def test_pictures_to_edit_stand_beside_the_image(name):
    reference = torch.randn(1, *TINY_FAMILIES[name].latent, generator=torch.Generator().manual_seed(0))
    given = prompts(name)
    for entries in (*given.positive, *given.negative):
        entries[1]["reference_latents"] = [reference]
    base = tiny_model(name)
    model = adapted(name, base)
    edited = sample(name, model, given)
    assert rows_of(model, ksampler, given, at=empty_latent(name))[-STEPS:] == [1] * STEPS
    assert edited.isfinite().all()
    assert apart(edited, sample(name, model)) > 1e-3


# Training.


@pytest.fixture(autouse=True)
def few_measured_steps(monkeypatch):
    """Half of these trainings' time would be their measurement's."""
    monkeypatch.setattr(held_out, "_STEPS", ((6, 3),))


def training(name: str, **settings):
    """A short one, measured on the prompts that it learns from: networks of random weights have nothing in common from
    prompt to prompt."""
    model = ComfyModel(tiny_model(name), TinyClip(name), frames=settings.get("frames", 1))
    side = 512 if name == "pixart" else 64 if name in ("flux2", "lens") else 128  # where its positions begin
    chosen = {"iterations": 16, "batch": 2, "pool": 2, "steps_min": 3, "steps_max": 4, "evaluate_every": 0}
    chosen |= {"learning_rate": 2e-3, "omega_max": 6.0, "width": side, "height": side, "reuse": 1, "preview_every": 0}
    config = settings_for(model.base, chosen | {"encoder_width": 8, "vector": 8, **settings})
    rank = {"rank": 2} if config.kind == "low_rank" else {"hidden": 8, "rank": 2}
    options = RunOptions(negative=["", "dark"], held_out=PROMPTS)
    return train(model, PROMPTS, dataclasses.replace(config, **rank), options=options)


# Those of one structure train alike; gradients are tested of all. The others are part of `make test-matrix`.
TRAINED = ("sd3", "hunyuan-dit", "flux", "z-image", "qwen-image", "hunyuan-video", "wan2.1-t2v", "ltxv", "ltx-2")
TRAINED += ("hidream", "anima", "omnigen2", "cogvideox", "kandinsky5", "lens")


def trained_families(names):
    return [name if name in TRAINED else pytest.param(name, marks=pytest.mark.matrix) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", trained_families(TINY_FAMILIES))
def test_a_training_closes_a_part_of_the_gap_and_moves_every_parameter(name):
    trained = training(name, checkpointing="on")
    assert trained.evaluation.gap_closed[min(trained.evaluation.gap_closed)] > 0
    assert [key for key, parameter in trained.adapter.trained() if not parameter.any()] == []


@pytest.mark.parametrize("name", ["wan2.1-t2v", "hunyuan-video"])
def test_a_video_is_trained_on_as_many_frames_as_asked(name):
    model = ComfyModel(tiny_model(name), TinyClip(name), frames=3)
    assert model.denoiser.latent_shape(64, 64) == (16, 3, 8, 8)
    trained = training(name, frames=3, width=64, height=64)
    assert trained.info.training["config"]["frames"] == 3
    assert trained.evaluation.gap_closed[min(trained.evaluation.gap_closed)] > 0


def test_a_picture_has_no_frames():
    model = ComfyModel(tiny_model("sd3"), TinyClip("sd3"), frames=3)
    with pytest.raises(UnsupportedModel, match="makes pictures, not videos, so there can't be 3 frames"):
        model.denoiser.latent_shape(64, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    trained_families(["sd3", "flux", "ltxv", "anima", "z-image", "wan2.1-i2v", "pixart", "hunyuan-dit", "ernie-image"]),
)
def test_checkpointed_it_is_the_same_training(name):
    kept, again = (training(name, iterations=4, checkpointing=how) for how in ("off", "on"))
    for (key, one), (_, other) in zip(kept.adapter.trained(), again.adapter.trained(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing", "kind"),
    # CogVideoX's first step says too little of the prompt.
    [(name, True, "low_rank") for name in TINY_FAMILIES if name != "cogvideox"]
    + [(name, False, "low_rank") for name in ("sd3", "flux", "ltxv", "anima", "qwen-image")]
    + [(name, True, "delta") for name in ("wan2.1-t2v", "pixart", "hunyuan-dit", "ltx-2")],
)
def test_gradients_are_those_of_finite_differences(name, checkpointing, kind):
    """What a network overwrites, or computes without gradients, would show: through low-rank changes alone, or none
    of them, for what attention keeps of the prompts changes with them, and has no gradients on purpose."""
    model, rank = ComfyModel(tiny_model(name), TinyClip(name)), {"low_rank": 2, "delta": 0}[kind]
    denoiser, adapter = model.denoiser, randomised(Adapter(config_of(name, kind, rank=rank)), seed=1)
    side = 512 if name == "pixart" else 64
    shape = denoiser.latent_shape(side, side)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 2, *shape, generator=generator)
    positive, negative = (model.text_encoder.encode([text] * 2) for text in ("a fox", "dark"))
    sigma = denoiser.sigmas("simple", 4)[1].expand(2)
    parameters = [parameter for _, parameter in adapter.trained()]
    steps = [torch.randn(p.shape, generator=generator) * p.std() for p in parameters]

    def loss() -> torch.Tensor:
        out = denoiser.student(adapter, x, sigma, positive, negative, torch.tensor([2.0, 3.0]))
        return (out * weight).sum()

    with denoiser.session(checkpointing=checkpointing):
        found = torch.autograd.grad(loss(), parameters)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.add_(sign * 2e-3 * step)
                values.append(loss().double())
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.sub_(sign * 2e-3 * step)
    expected = float((values[0] - values[1]) / 4e-3)
    along = float(sum((grad * step).sum() for grad, step in zip(found, steps, strict=True)))
    assert along == pytest.approx(expected, rel=0.02, abs=0.01 * float(values[0].abs()) ** 0.5)


@each_family
def test_its_latents_have_a_preview(name):
    model = ComfyModel(tiny_model(name), TinyClip(name))
    latent = torch.randn(1, *model.denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    shown = model.picture(latent)
    assert shown.size[0] % latent.shape[-1] == shown.size[1] % latent.shape[-2] == 0
    assert len(shown.getcolors(1_000_000)) > 10


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", ["ltxv", "ltx-2"])
def test_trainings_own_sample_is_comfyuis(name, frames):
    base, (info, weights) = tiny_model(name), adapter_of(name)
    model, sampler = ComfyModel(base, TinyClip(name), frames=frames), ComfySampler(base, info, weights, source="it")
    positive, negative = (model.text_encoder.encode([text])[0] for text in ("a fox", "dark"))
    settings = SampleSettings(model.denoiser.latent_shape(96, 64), omega=CFG, steps=STEPS)
    noise = torch.randn(1, *settings.shape, generator=torch.Generator().manual_seed(settings.seed))
    theirs, _ = sampler("guided", noise, (positive, negative), omega=CFG, steps=STEPS, progress=lambda: None)
    with model.denoiser.session():
        ours = training_sample(model.denoiser, positive, negative, settings)
    assert theirs.shape == ours.shape
    assert apart(ours, theirs) < 1e-4


def test_of_a_video_with_sound_another_size_than_the_trained_ones_is_told():
    info, weights = adapter_of("ltx-2")
    for trained, told in (((4, 4), []), ((8, 8), ["Far from the trained size: latent 4x4, trained at 8x8."])):
        messages = []
        described = dataclasses.replace(info, resolutions=(trained,))
        sample("ltx-2", apply_adapter(tiny_model("ltx-2"), described, weights, source="it", notify=messages.append))
        assert [message for message in messages if message.startswith("Far from")] == told


def test_ltx_2s_tokens_are_mapped_once_for_all_steps():
    class Unmapped(TinyClip):
        def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
            ((cond, entries),) = super().encode_from_tokens_scheduled(tokens)
            return [[cond[..., :48], {**entries, "unprocessed_ltxav_embeds": True}]]

    base, clip = tiny_model("ltx-2"), Unmapped("ltx-2")
    (kept,) = ComfyModel(base, clip).text_encoder.encode(["a fox"])
    ((tokens, entries),) = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))
    mapped = base.model.extra_conds(cross_attn=tokens, device=tokens.device, **entries)["c_crossattn"].cond
    assert torch.equal(kept.cond["cross_attn"], mapped)
    again = base.model.extra_conds(**kept.cond, device=tokens.device)["c_crossattn"].cond
    assert torch.equal(again, mapped)


def test_ltx_2_3_is_refused_for_what_it_is(monkeypatch):
    """Its tokens come mapped to the blocks: no layer is as wide as they are."""
    config = {**TINY_FAMILIES["ltx-2"].config, "caption_proj_before_connector": True, "cross_attention_adaln": True}
    config |= {"caption_projection_first_linear": False, "connector_attention_head_dim": 64}
    config |= {"audio_connector_attention_head_dim": 32}
    row = dataclasses.replace(TINY_FAMILIES["ltx-2"], config=config, width=128 + 64, assumed=tuple(config))
    monkeypatch.setitem(TINY_FAMILIES, "ltx-2.3", row)
    assert sample("ltx-2.3", tiny_model("ltx-2.3")).isfinite().all()
    with pytest.raises(ValueError, match=r"prompts have 192 channels.* its family needs a row in agd_core/families.py"):
        training("ltx-2.3", vector=0)


@pytest.mark.parametrize("name", ["wan2.1-t2v", "qwen-image", "flux2", "z-image", "anima", "ltx-2"])
def test_it_is_evaluated_beside_the_models_own_guidance(name):
    base, (info, weights) = tiny_model(name), adapter_of(name)
    model, sampler = ComfyModel(base, TinyClip(name)), ComfySampler(base, info, weights, source="the file")
    config = AssessConfig(omegas=(3.0,), steps=2, count=2, width=64, height=64)
    found = assess(
        model, sampler, Candidate(info, weights, "the file"), PromptTexts(["a fox", "a dog"], ["dark"]), config
    )
    assert found.costs["guided"].evaluations_per_step == 2 * found.costs["agd"].evaluations_per_step == 2
