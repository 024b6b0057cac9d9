"""The benchmarks on the toy: other ways to sample, negative prompts that are new, and a small run of each."""

import dataclasses
import json
import random
from types import SimpleNamespace

import comfy.sd
import pytest
import torch
from PIL import Image

from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.model.sampler import guided_by
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import ablation, baselines, experiment, extrapolation, quality, report, training_free
from comfyui_agd.benchmarks.command_line import TOYS
from comfyui_agd.benchmarks.experiment import QUICK_SIZES, SampledAt, ToyExperiment
from comfyui_agd.benchmarks.work_folder import WorkFolder
from comfyui_agd.examples.toy import train
from comfyui_agd.examples.toy.bases import BASES
from comfyui_agd.examples.toy.judge import recognised
from comfyui_agd.examples.toy.sampling import SamplerSettings, Toy, encode, held_out_captions, sample
from comfyui_agd.examples.toy.scenes import (
    HELD_OUT_UNWANTED,
    Description,
    Thing,
    all_unwanted,
    draw_scenes,
    open_caption,
    render,
)
from comfyui_agd.examples.toy.scoring import Scorer

STEPS, ROWS = 6, 3
ROW_KEYS = (
    "model method omega parameters_percent evaluations_per_step frechet_to_real precision recall prompt_accuracy "
    "gap_closed direction_cosine negative_reduction frechet_to_cfg steps seconds_per_image distance_to_cfg"
)


@pytest.fixture(autouse=True)
def less_to_compare_with(monkeypatch):
    """Than the figures have; of CFG's steps still more than of any method."""
    monkeypatch.setattr(experiment, "QUICK_SIZES", dataclasses.replace(QUICK_SIZES, pictures=8))
    monkeypatch.setattr("comfyui_agd.examples.toy.scoring.REFERENCE_IMAGES", 256)
    monkeypatch.setattr(experiment, "TRUE_STEPS", 21)
    monkeypatch.setattr(ablation, "CAPTIONS", 64)  # encoded for every training


@pytest.fixture(scope="module")
def parts() -> Toy:
    return Toy.load()


@pytest.fixture
def draw(parts):
    """Samples with a model and returns the pictures and the rows that the UNet was given."""

    def run(model, cfg: float = 3.0, **batches) -> tuple[torch.Tensor, list[int]]:
        model, counter = counted(model)
        prompts = encode(parts.clip, held_out_captions(ROWS, 5)[1])
        pictures = sample(parts, model, prompts, SamplerSettings(cfg, 1, steps=STEPS), **batches)
        return pictures.images, counter.rows

    return run


def test_unwanted_words_and_combinations_of_training_and_measurement_are_disjoint():
    trained, measured = all_unwanted(held=False), all_unwanted(held=True)
    assert not {u.text() for u in trained} & {u.text() for u in measured}
    assert not any(word in u.text().split() for u in trained for word in HELD_OUT_UNWANTED)
    alone = {word for u in measured if len(u.attributes()) == 1 for word in u.attributes().values()}
    assert alone == set(HELD_OUT_UNWANTED)
    assert any(set(u.text().split()).isdisjoint(HELD_OUT_UNWANTED) for u in measured)  # new as a combination only


def test_a_description_describes_what_has_all_its_attributes():
    thing = Thing("small", "orange", "ring")
    assert Description(colour="orange").describes(thing)
    assert not Description(size="large", colour="orange").describes(thing)
    assert Description(colour="orange").text() == "an orange shape"


def test_open_captions_leave_something_open_and_never_name_the_background_twice():
    rng = random.Random(0)
    for _ in range(200):
        text, described = open_caption(rng)
        assert len(described.attributes()) < 3
        assert described.colour is None or text.count(described.colour) == 1


def test_the_judge_recognises_scenes():
    scenes = draw_scenes(64, 51, held=True)
    seen = recognised(Scorer().judge, render(scenes, 51))
    assert sum(a == b for a, b in zip(seen, scenes, strict=True)) >= 60


def test_noise_can_be_chosen_row_by_row(parts, draw):
    three, _ = draw(parts.model, cfg=1.0, noise=[[4, 5, 6]])
    turned, _ = draw(parts.model, cfg=1.0, noise=[[6, 5, 4]])
    torch.testing.assert_close(turned[1], three[1])
    assert not torch.allclose(turned[0], three[0], atol=1e-2)


def test_each_batch_is_drawn_with_the_next_seed(parts):
    first, second = (encode(parts.clip, [text])[0] for text in ("a red star", "a blue ring"))
    both = sample(parts, parts.model, [first, second], SamplerSettings(3.0, seed=5, steps=2))
    alone = sample(parts, parts.model, [second], SamplerSettings(3.0, seed=6, steps=2))
    assert torch.equal(both.images[1:], alone.images)
    assert len(both.seconds) == 2


def test_negative_prompts_can_be_one_per_row(parts, draw):
    negative = encode(parts.clip, ["", "a red shape", ""])
    empty, mixed = draw(parts.model)[0], draw(parts.model, negative=negative)[0]
    changed = (empty - mixed).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("rule", ["rescale", "apg", "cfg_zero"])
def test_a_teacher_samples_in_two_passes(parts, draw, rule):
    images, rows = draw(guided_by(parts.model, GuidanceRule(rule)))
    assert rows == [2 * ROWS] * STEPS
    assert not torch.allclose(images, draw(parts.model)[0], atol=1e-3)


def test_normalised_attention_guidance_is_one_pass_that_uses_the_negative(parts, draw):
    model = baselines.normalised(parts.model, describe_base(parts.model.model))
    images, rows = draw(model)
    assert rows == [ROWS] * STEPS
    assert not torch.allclose(images, draw(parts.model, cfg=1.0)[0], atol=1e-3)
    away = draw(model, negative=encode(parts.clip, ["a red shape"] * ROWS))[0]
    assert not torch.allclose(away, images, atol=1e-3)


def test_normalised_attention_never_grows_beyond_its_limit():
    out, delta, gain = torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.full((1, 1, 1), 9.0)
    guide = baselines.NormalisedGuide(tau=2.5, alpha=0.5)
    found = guide("layer", out, delta, None, SimpleNamespace(gain=gain))
    torch.testing.assert_close(found, torch.full_like(out, 1.75))  # half of 1, half of 2.5


def test_the_whole_model_starts_as_the_base_and_takes_omega_from_cfg(parts, draw):
    student = baselines.GuidedModel.of_base(torch.device("cpu"))
    base = draw(parts.model, cfg=1.0)[0]
    images, rows = draw(student.patcher(), cfg=5.0)
    assert rows == [ROWS] * STEPS
    torch.testing.assert_close(images, base)
    torch.nn.init.normal_(student.unet.time_embed.last.weight, std=0.05)
    two, five = (draw(student.patcher(), cfg=cfg)[0] for cfg in (2.0, 5.0))
    assert not torch.allclose(two, five, atol=1e-3)


def test_a_recording_goes_with_its_prompts(tmp_path):
    small = ToyExperiment(WorkFolder(tmp_path), dataclasses.replace(QUICK_SIZES, iterations=2))
    config, given = small.train_config(), small.prompts(negatives=True)
    recording, prompts = small.recording(config, given)
    batch, model = recording.source(config, range(config.batch)).next(0), small.model()
    encode, denoiser = model.text_encoder.encode, model.denoiser
    positive, negative = encode(prompts), encode(given.negatives, "negative")
    with denoiser.session():
        cond = denoiser.denoise(batch.x, batch.sigma, [positive[i] for i in batch.positive.tolist()])
        uncond = denoiser.denoise(batch.x, batch.sigma, [negative[i] for i in batch.negative.tolist()])
    torch.testing.assert_close(cond, batch.cond, atol=2e-2, rtol=0)
    torch.testing.assert_close(uncond, batch.uncond, atol=2e-2, rtol=0)


def test_the_benchmarks_know_all_toys():
    assert tuple(BASES) == TOYS
    assert set(train.FITS) == set(BASES)


@pytest.fixture
def few_pictures(tmp_path, monkeypatch) -> ToyExperiment:
    monkeypatch.setattr(experiment, "TRUE_STEPS", 6)
    return ToyExperiment(WorkFolder(tmp_path), dataclasses.replace(QUICK_SIZES, pictures=3, compared=3))


def plain(few: ToyExperiment) -> experiment.PreparedMethod:
    """The base as `distance_to_cfg` samples it."""
    return experiment.PreparedMethod(few.parts.model, {"sampling": {}})


def test_the_distance_to_cfgs_picture_is_0_at_it_and_1_at_the_unguided_one(few_pictures):
    at = SampledAt(3.0, steps=6)
    guided = few_pictures.samples("cfg", plain(few_pictures), at)
    unguided = few_pictures.samples("unguided", plain(few_pictures), SampledAt(1.0, steps=6))
    between = dataclasses.replace(guided, latents=torch.lerp(guided.latents, unguided.latents, 0.25))
    found = [few_pictures.distance_to_cfg(each, at)[0] for each in (guided, unguided, between)]
    assert found == pytest.approx([0.0, 1.0, 0.25], abs=1e-4)


def test_the_distance_to_cfgs_picture_is_to_that_of_many_steps(few_pictures):
    few, fewer = (few_pictures.samples("cfg", plain(few_pictures), SampledAt(3.0, steps)) for steps in (4, 2))
    near, far = (few_pictures.distance_to_cfg(each, SampledAt(3.0, 2))[0] for each in (few, fewer))
    assert 0.02 < near < far


def test_where_a_sampler_adds_noise_there_is_no_picture_to_be_near_to(few_pictures):
    at = SampledAt(3.0, 2, "euler_ancestral", "normal")
    own = few_pictures.samples("cfg", plain(few_pictures), at)
    assert few_pictures.distance_to_cfg(own, at) == (None, None)


def test_only_the_first_pictures_are_compared_and_are_the_same_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "BATCH", 2)
    monkeypatch.setattr("comfyui_agd.examples.toy.sampling.BATCH", 2)
    few = ToyExperiment(WorkFolder(tmp_path), dataclasses.replace(QUICK_SIZES, pictures=5))
    everything, first = (few.samples("cfg", plain(few), SampledAt(3.0, 2), count=count) for count in (None, 3))
    torch.testing.assert_close(first.latents, everything.latents[:4], atol=1e-4, rtol=0)  # whole batches
    assert first.correct.tolist() == everything.correct[:4].tolist()


def test_pictures_that_were_kept_without_latents_are_drawn_again(few_pictures):
    kept = {"features": torch.zeros(3, 128), "correct": torch.zeros(3, dtype=torch.bool)}
    identity = {"sampling": {}, "omega": 3.0, "steps": 2, "pictures": 3}
    few_pictures.work.tensors("samples", "cfg-omega3-steps2", identity, lambda: kept)
    assert len(few_pictures.samples("cfg", plain(few_pictures), SampledAt(3.0, 2)).latents) == 3


def test_another_training_starts_from_other_weights_and_learns_from_other_states(tmp_path):
    small = ToyExperiment(WorkFolder(tmp_path), dataclasses.replace(QUICK_SIZES, iterations=1))
    seeds = {each.train_config().seed for each in (small, small.of_training(1), small.of_training(2))}
    assert seeds == {0, 1, 2}


@pytest.mark.slow
def test_one_command_makes_the_table_and_goes_on_where_it_was(tmp_path, monkeypatch):
    few = ["--quick", "--pictures", "6", "--pairs", "2", "--iterations", "2", "--work", str(tmp_path / "work")]
    few += ["--results", str(tmp_path / "results"), "--json", str(tmp_path / "rows.json")]
    on_unet = [*few, "--base", "toy"]
    quality.main([*on_unet, "--only", "cfg", "adaptive", "meng", "paper_additive"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) >= set(ROW_KEYS.split()) for row in rows)
    settings = [(row["method"], row["steps"]) for row in rows]
    assert [steps for name, steps in settings if name == "cfg"] == [20, 10, 5, 3]
    assert [steps for name, steps in settings if name == "meng"] == [20, 10, 6]
    assert list(dict(settings)) == ["cfg", "adaptive", "meng", "paper_additive"]
    of = {row["method"]: row for row in rows if row["steps"] == 20}
    assert of["cfg"]["evaluations_per_step"] == 2
    assert of["meng"]["evaluations_per_step"] == of["paper_additive"]["evaluations_per_step"] == 1
    assert 1 < of["adaptive"]["evaluations_per_step"] < 2
    assert of["cfg"]["negative_reduction"] == 1
    half = next(row for row in rows if (row["method"], row["steps"]) == ("cfg", 10))
    assert half["distance_to_cfg"] > of["cfg"]["distance_to_cfg"]
    assert half["unwanted_with"] is not None
    assert of["meng"]["parameters_percent"] > 100 > 5 >= of["paper_additive"]["parameters_percent"] > 4
    assert of["meng"]["gap_closed"] is not None
    page = (tmp_path / "results" / "quality.md").read_text()
    assert all(f"| `{name}` |" in page and f"- `{name}`: " in page for name in [*of, "real"])
    assert Image.open(tmp_path / "results" / "quality.png").width > 1000

    # Again, with one more method: nothing else is trained or sampled anew.
    drawn = []
    monkeypatch.setattr(baselines, "distil_model", None)

    def sampled(parts, model, prompts, settings, **batches):
        drawn.append(settings.cfg)
        return sample(parts, model, prompts, settings, **batches)

    monkeypatch.setattr(experiment, "sample", sampled)
    quality.main([*on_unet, "--only", "cfg", "meng", "unguided"])
    assert set(drawn) == {1.0}
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows) + 3

    # On both bases, each with a page and a folder of its own; what has no place on one of them is left out there.
    quality.main([*few, "--only", "unguided", "meng"])
    own = json.loads((tmp_path / "rows.json").read_text())
    assert {row["method"] for row in own if row["model"] == "toy-dit"} == {"unguided"}
    assert (tmp_path / "results" / "quality-toy-dit.md").exists()
    with pytest.raises(SystemExit, match="On toy-dit there is no meng: it is for a UNet"):
        quality.main([*few, "--base", "toy-dit", "--only", "meng"])


def test_an_unknown_method_is_an_error_that_says_where_to_look(tmp_path):
    with pytest.raises(SystemExit, match="There is no method nonsense; --list says which there are"):
        quality.main(["--only", "nonsense", "--work", str(tmp_path)])


def test_a_row_is_dominated_by_what_is_significantly_better_for_no_more_evaluations():
    def row(accuracy: float, frechet: float, evaluations: float = 1.0, error: float = 0.01) -> dict:
        values = {"steps": 20, "evaluations_per_step": evaluations, "prompt_accuracy_above_cfg": accuracy}
        values |= {"frechet_above_cfg": frechet, "frechet_above_cfg_se": 1.0}
        return values | {"prompt_accuracy_above_cfg_se": error}

    better, usual = row(-0.01, 1.0), row(-0.06, 1.0)
    assert report.significantly_better(better, usual)
    assert not report.significantly_better(usual, better)
    assert not report.significantly_better(row(-0.01, 1.0, evaluations=2.0), usual)
    assert not report.significantly_better(row(-0.01, 1.0, error=0.1), usual)
    assert not report.significantly_better(row(-0.01, 9.0), usual)  # worse in the other
    assert not report.significantly_better(usual, usual)


@pytest.mark.slow
def test_the_ablation_trains_and_measures_what_is_asked_for(tmp_path, capsys, monkeypatch):
    how = ["--quick", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "rows.json")]
    ablation.main([*how, "--base", "toy", "--only", "deep sites", "half on policy", "offset"])
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["20 steps", "10 steps", "offset", "half on policy", "only the 4 deep sites"]
    assert "distance_to_cfg" not in rows["only the 4 deep sites"]
    assert rows["20 steps"]["distance_to_cfg"] < 0.1 < rows["offset"]["distance_to_cfg"]
    assert rows["offset"]["evaluations"] == rows["10 steps"]["evaluations"] == 20
    trained = list(rows.values())[2:]
    assert all(4 < row["parameters_percent"] <= 5 and row["gap_closed_from_negatives_3"] < 1 for row in trained)
    # From the constants that a new one starts with.
    assert rows["half on policy"]["gap_closed_3"] > rows["offset"]["gap_closed_3"]
    assert "| only the 4 deep sites |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="No variant has nonsense"):
        ablation.main([*how, "--only", "nonsense"])


@pytest.mark.slow
def test_the_ablation_puts_both_bases_side_by_side(tmp_path, monkeypatch):
    how = ["--quick", "--iterations", "2", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    ablation.main([*how, "--only", "the default", "without gain", "offset"])
    page = (tmp_path / "results" / "ablation-bases.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    of = {name.rsplit(": ", 1)[1]: values for name, *values in cells[2:]}
    assert list(of) == ["20 steps", "10 steps", "offset", "the default", "without gain"]
    # Gap, what it is above the default, and the distance; of the UNet, then of the transformer.
    assert of["the default"][1] == of["the default"][4] == "0.000 ± 0.000"
    assert of["offset"][3:] == ["–"] * 3  # no cross-attention there
    assert "–" not in of["without gain"]
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {"ablation.json", "ablation-toy-dit.json"}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "adapter"), [("toy", "ours"), ("toy-dit", "ours")])
def test_the_extrapolation_takes_an_adapter_to_where_it_was_not_trained(tmp_path, monkeypatch, base, adapter):
    monkeypatch.setattr(extrapolation, "SIZES", ((64, 64), (64, 96)))
    monkeypatch.setattr(extrapolation, "SIZE_CAPTIONS", 2)
    how = ["--quick", "--base", base, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "rows.json")]
    extrapolation.main([*how, "--adapter", adapter, "--only", "sizes", "sibling"])
    rows = {row["setting"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert all(0 < row["gap_closed"] < 1 for row in rows.values() if "gap_closed" in row)
    # Two steps of fine-tuning hardly change the base, and a LoRA of half of that still less.
    changes = [abs(rows[name]["gap_closed"] - rows["base"]["gap_closed"]) for name in rows if "LoRA" in name]
    assert changes[0] <= changes[1] < 0.1
    pictures = [f"sibling-{way}" for way in ("cfg, 20 steps", "cfg, 10 steps", f"{adapter}, 20 steps")]
    assert [rows[name]["evaluations"] for name in pictures] == [40, 20, 20]
    # To the sibling's own CFG, which is nearest to itself with many steps; the adapter is hardly trained.
    distances = [rows[name]["distance_to_cfg"] for name in pictures]
    assert 0 < distances[0] < min(distances[1:])
    # Of a size that the toy wasn't trained with: a step more or less may lead to another picture there.
    wide = [f"64 x 96 pixels, {way}" for way in ("20 steps, cfg", "10 steps, cfg", f"20 steps, {adapter}")]
    assert all(rows[name]["distance_to_cfg"] > 0 for name in wide)


@pytest.mark.parametrize("name", BASES)
def test_a_lora_of_a_small_change_is_that_change(name):
    base, tuned, fresh = (Toy.load(name) for _ in range(3))
    for weight in tuned.model.model.diffusion_model.state_dict().values():
        if weight.ndim > 1:
            rows, columns = torch.randn(len(weight), 1), torch.randn(1, weight[0].numel())
            weight += 0.02 * weight.std() * (rows @ columns).reshape(weight.shape)
    lora = extrapolation.lora_between(base.model, tuned.model)
    changed = comfy.sd.load_lora_for_models(base.model, None, lora, 1.0, 0.0)[0]
    prompt = encode(base.clip, held_out_captions(ROWS, 5)[1])
    plain, wanted, found = (
        sample(base, model, prompt, SamplerSettings(1.0, 1, steps=1, scheduler=base.base.scheduler)).latents
        for model in (fresh.model, tuned.model, changed)
    )
    off, away = (found - wanted).norm(), (plain - wanted).norm()
    assert off < 0.01 * away


def test_the_forms_of_training_free_guidance_are_compared_with_cfg(tmp_path, capsys):
    how = ["--quick", "--pictures", "16", "--base", "toy", "--work", str(tmp_path / "work")]
    how += ["--json", str(tmp_path / "rows.json")]
    training_free.main([*how, "--only", "second pass", "outer sites"])
    training_free.main([*how, "--only", "s = 0.35 at the deep", "euler, normal, 20 steps: training-free"])
    # The rows before are still there.
    rows = {row["form"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    in_attention = ["s = 0.35 at the outer sites only", "s = 0.35 at the deep sites only"]
    assert list(rows) == ["unguided", "CFG", *in_attention, "euler, normal, 20 steps: training-free"]
    *fixed, per_step = (row["evaluations_per_step"] for row in rows.values())
    assert (fixed, 0.8 < per_step < 1.4) == ([1, 2, 1, 1], True)
    unguided, cfg, *in_attention, forecast = (row["share_of_lead"] for row in rows.values())
    assert (unguided, cfg) == (0, 1)
    assert forecast > max(in_attention)
    assert "| s = 0.35 at the deep sites only | 16 | 1.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="No form has nonsense"):
        training_free.main([*how, "--only", "nonsense"])


@pytest.mark.parametrize("form", ["s = 0.35", "tau 2.5, alpha 0.25, as published"])
def test_the_loaders_form_and_nags_are_among_them(draw, parts, form):
    own = SimpleNamespace(parts=parts, model=lambda: SimpleNamespace(base=describe_base(parts.model.model)))
    forms = {name: each for section in training_free.FORMS.values() for name, each in section.items()}
    usual = baselines.normalised(parts.model, own.model().base)
    if form == "s = 0.35":
        usual = apply_adapter(parts.model, *attention_guidance(own.model().base), source="the loader's")
    assert torch.equal(draw(training_free.patched(own, forms[form]))[0], draw(usual)[0])
