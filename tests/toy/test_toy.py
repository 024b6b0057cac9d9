"""The toys: their scenes, their committed weights, and that ComfyUI's core nodes work on them."""

import json
import random

import nodes
import pytest
import torch
from comfy_extras.nodes_train import LoraModelLoader

from comfyui_agd.examples.toy import model as toy_model
from comfyui_agd.examples.toy.bases import BASES
from comfyui_agd.examples.toy.dit import load as load_dit
from comfyui_agd.examples.toy.measure import CARD, omega_star
from comfyui_agd.examples.toy.nodes import AGDToyLoader
from comfyui_agd.examples.toy.sampling import STEPS, SamplerSettings, Toy, encode, held_out_captions, sample
from comfyui_agd.examples.toy.scenes import (
    COLOURS,
    SHAPES,
    WORDS,
    caption,
    draw_scenes,
    held_out,
    render,
    training_caption,
)
from comfyui_agd.examples.toy.scoring import Scorer
from comfyui_agd.examples.toy.train import encode_captions, encode_text, token_ids

LIMIT = 12_000_000  # bytes of each toy
PROMPT = "a small red circle left of a large green star on a white background"


@pytest.fixture(scope="module")
def parts() -> Toy:
    return Toy.load()


@pytest.fixture(scope="module")
def dit() -> Toy:
    return Toy.load("toy-dit")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


def test_there_are_shapes_and_colours_enough():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8


def test_held_out_scenes_are_never_trained():
    training, held = set(draw_scenes(2000, 0, held=False)), set(draw_scenes(500, 0, held=True))
    assert not training & held
    assert all(held_out(scene) for scene in held)


def test_every_caption_uses_known_words_and_is_short_enough():
    rng = random.Random(0)
    scenes = draw_scenes(1000, 1, held=False)
    captions = [training_caption(scene, rng) for scene in scenes] + [caption(scene, swapped=True) for scene in scenes]
    assert {word for text in captions for word in text.split()} <= set(WORDS)
    assert token_ids(captions).shape == (2000, toy_model.MAX_TOKENS)


def test_drawings_are_the_same_for_the_same_seed():
    scenes = draw_scenes(4, 2, held=False)
    assert torch.equal(render(scenes, 3), render(scenes, 3))
    assert not torch.equal(render(scenes, 3), render(scenes, 4))


def test_unknown_words_are_an_error_that_lists_the_known(parts):
    with pytest.raises(ValueError, match=r"does not know 'dog' in the prompt 'a red dog'; it knows only .*circle"):
        nodes.CLIPTextEncode().encode(parts.clip, "a red dog")


def test_the_weights_are_small():
    sizes = {path.stem: path.stat().st_size for path in toy_model.WEIGHTS.glob("*.safetensors")}
    assert sizes.pop("dit") <= LIMIT
    assert sum(sizes.values()) <= LIMIT


def test_training_and_comfyui_encode_text_alike(parts):
    ids = token_ids([PROMPT, ""])
    text = parts.clip.cond_stage_model.clip_toy.transformer.float()
    with torch.no_grad():
        expected = [nodes.CLIPTextEncode().encode(parts.clip, prompt)[0][0][0] for prompt in (PROMPT, "")]
        torch.testing.assert_close(encode_text(text, ids), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_the_transformer_is_trained_on_what_comfyui_encodes(dit):
    tokens, pooled = encode_captions(dit.clip.cond_stage_model.clip_toy.transformer.float(), [PROMPT, ""])
    ((expected, rest),) = encode(dit.clip, [PROMPT, ""])[0]
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, rest["pooled_output"], atol=1e-4, rtol=1e-4)


def test_prompt_weights_work(parts):
    encode = nodes.CLIPTextEncode()
    plain, weighted = (encode.encode(parts.clip, text)[0][0][0] for text in ("a red star", "a (red:1.3) star"))
    assert not torch.equal(plain, weighted)


def test_the_autoencoder_keeps_pictures(parts):
    pixels = render(draw_scenes(16, 3, held=True), 3).movedim(1, -1)
    latents = nodes.VAEEncode().encode(parts.vae, pixels)[0]["samples"]
    assert latents.shape == (16, toy_model.LATENT_CHANNELS, 8, 8)
    error = (nodes.VAEDecode().decode(parts.vae, {"samples": latents})[0] - pixels).square().mean()
    assert -10 * error.log10() > 28


def test_the_judge_is_right_on_held_out_pictures(scorer):
    scenes = draw_scenes(1000, 41, held=True)
    assert scorer.accuracy(render(scenes, 41), scenes) >= 0.97


def test_the_judge_notices_wrong_pictures(scorer):
    scenes = draw_scenes(200, 43, held=True)
    assert scorer.accuracy(render(scenes[1:] + scenes[:1], 43), scenes) < 0.05


def test_the_frechet_distance_of_real_pictures_is_far_smaller_than_that_of_noise(scorer):
    real = scorer.frechet(render(draw_scenes(1000, 45, held=True), 45))
    noise = scorer.frechet(torch.rand(1000, 3, 64, 64))
    assert real < noise / 20


def accuracies(base: str) -> dict[tuple[float, int], float]:
    """By omega and steps, as measured."""
    curve = json.loads(BASES[base].measured.read_text())["curve"]
    return {(point["omega"], point["steps"]): point["prompt_accuracy"] for point in curve}


@pytest.mark.parametrize("base", BASES)
def test_guidance_matters_as_the_model_card_says(base):
    best, found, card = omega_star(base), accuracies(base), CARD.read_text()
    assert 2 <= best <= 5
    assert found[best, STEPS] >= max(0.96, found[1.0, STEPS] + 0.10)
    for (omega, steps), accuracy in found.items():
        assert f"| {omega:g} | {steps} | {100 * accuracy:.1f} %" in card
    assert f"### {base}\n" in card
    assert f"**omega* = {best:g}**" in card
    assert (best, STEPS // 2) in found


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_guidance_matters_when_sampled(base, scorer):
    scenes, captions = held_out_captions(96, 47)
    parts = Toy.load(base)
    prompts = encode(parts.clip, captions)
    unguided, guided = (
        sample(parts, parts.model, prompts, parts.settings(cfg, 1)).images for cfg in (1.0, omega_star(base))
    )
    assert scorer.accuracy(guided, scenes) >= scorer.accuracy(unguided, scenes) + 0.05


def test_the_transformer_is_a_flow_model_in_comfyuis_own_classes(dit):
    base = dit.model.model
    assert type(base).__name__ == "SD3"
    assert base.model_type.name == "FLOW"
    assert type(base.diffusion_model.joint_blocks[0].x_block.attn.ln_q).__name__ == "RMSNorm"
    assert sum(p.numel() for p in base.diffusion_model.parameters()) == 3_493_680


def test_both_toys_have_one_text_encoder_and_one_autoencoder(parts, dit):
    model, clip, vae = load_dit()
    assert type(model.model) is type(dit.model.model)
    assert torch.equal(encode(clip, [PROMPT])[0][0][0], encode(parts.clip, [PROMPT])[0][0][0])
    latents = torch.ones(1, toy_model.LATENT_CHANNELS, 8, 8)
    assert torch.equal(vae.decode(latents), parts.vae.decode(latents))


def test_the_loader_has_both_toys_and_workflows_without_a_choice_get_the_first():
    (choice,) = AGDToyLoader.define_schema().inputs
    assert (choice.id, choice.options, choice.default, choice.optional) == ("model", list(BASES), "toy", True)
    models = [AGDToyLoader.execute(*chosen).args[0].model for chosen in ((), ("toy",), ("toy-dit",))]
    assert [type(model).__name__ for model in models] == ["BaseModel", "BaseModel", "SD3"]


@torch.inference_mode()
def test_what_the_prompt_and_the_pooled_output_say_reaches_the_transformer(dit):
    (prompt,) = encode(dit.clip, [PROMPT])
    (other,) = encode(dit.clip, ["a large blue ring on a black background"])
    conditions = [prompt, [[other[0][0], prompt[0][1]]], [[prompt[0][0], other[0][1]]]]
    images = [sample(dit, dit.model, [each], dit.settings(1.0, 1, steps=2)).images for each in conditions]
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    assert not torch.allclose(images[0], images[2], atol=1e-3)


@torch.inference_mode()
def test_core_lora_works(parts):
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    lora = {f"{key}.lora_up.weight": torch.randn(128, 4), f"{key}.lora_down.weight": torch.randn(4, 128)}
    patched = LoraModelLoader.execute(parts.model, lora, 1.0).args[0]
    prompt = encode(parts.clip, [PROMPT])
    models = (parts.model, patched, parts.model)
    before, changed, after = (sample(parts, model, prompt, SamplerSettings(2.0, 1, steps=2)).images for model in models)
    assert not torch.equal(before, changed)
    assert torch.equal(before, after)


@torch.inference_mode()
@pytest.mark.parametrize("base", BASES)
def test_other_sizes_work(base):
    parts = Toy.load(base)
    latent = nodes.EmptyLatentImage().generate(96, 64, 1)[0]
    positive = nodes.CLIPTextEncode().encode(parts.clip, PROMPT)[0]
    how = (1, 2, 2.0, "euler", parts.base.scheduler)
    out = nodes.KSampler().sample(parts.model, *how, positive, positive, latent)[0]
    assert nodes.VAEDecode().decode(parts.vae, out)[0].shape == (1, 64, 96, 3)
