"""`assess` on the analytic base, where the answers are known."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.guidance import cfg, per_row
from comfyui_agd.tests.support.analytic import CHANNELS, PROMPTS, AnalyticModel, Stopped
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.training.assess import AssessConfig, Candidate, PromptTexts, assess, learnt_by
from comfyui_agd.training.assessment_report import Transfer
from comfyui_agd.training.estimate import Estimate, of_sums, ratio, ratio_of_sums
from comfyui_agd.training.gap import Trajectories, evaluate, follow_teacher
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.solvers import solver_step

SMALL = AssessConfig(omegas=(3.0, 6.0), steps=4, count=3, width=64, height=64)


class Partly(AnalyticModel):
    """An analytic base whose student is a known share of the way from the unguided prediction to CFG's."""

    def __init__(self, share: float, **options):
        super().__init__(**options)
        self.share = share

    def student(self, adapter, x, sigma, prompts, negative, omega):
        self.student_rows.append(len(x))
        cond, uncond = self.denoise(x, sigma, prompts), self.denoise(x, sigma, negative)
        return cond + self.share * (cfg(cond, uncond, omega) - cond)


class EulerSampler:
    """`training.assess.Sampler` on an analytic model: what it is asked for is remembered."""

    def __init__(self, model, adapter, rows: int = 1):
        self.model, self.adapter, self.rows = model, adapter, rows
        self.notes, self.asked = ["something to know."], []

    def __call__(self, method, noise, prompts, *, omega, steps, progress):
        prompt, negative = prompts
        self.asked.append((method, noise, omega, steps))
        sigmas = self.model.sigmas("normal", steps)
        x, scale = self.model.start(noise, sigmas[:1]), torch.tensor([omega])
        for sigma, sigma_next in zip(sigmas[:-1, None], sigmas[1:, None], strict=True):
            cond, uncond = (self.model.denoise(x, sigma, [each]) for each in (prompt, negative))
            if method == "agd":
                aim = self.model.student(self.adapter, x, sigma, [prompt], [negative], scale)
            else:
                aim = cond if method == "unguided" else cfg(cond, uncond, scale)
            x = solver_step(x, aim, sigma, sigma_next)
            progress()
        return x, steps * {"unguided": 1, "guided": 2, "agd": self.rows}[method]


def info_and_state(model, training: dict | None = None, random: bool = False):
    info = info_for(model.base, kind="cross_attention", hidden=8, encoder_width=8, prompt_tokens=3)
    torch.manual_seed(0)
    adapter = Adapter(info.config)
    return replace(info, training=training or {}), (randomised(adapter) if random else adapter).state_dict()


def assessed(model, config: AssessConfig = SMALL, training: dict | None = None, random: bool = False, **options):
    info, state = info_and_state(model, training, random)
    adapter = Adapter(info.config)
    adapter.load_state_dict(state)
    texts = PromptTexts(options.pop("prompts", PROMPTS), options.pop("negative", [""]))
    return assess(
        model, EulerSampler(model, adapter), Candidate(info, state, "a.safetensors"), texts, config, **options
    )


def test_an_adapter_that_does_nothing_closes_no_gap_and_is_as_far_from_cfg_as_no_guidance():
    found = assessed(AnalyticModel())
    for closeness in found.by_omega.values():
        assert closeness.gap_closed == Estimate(0.0, 0.0)
        assert closeness.direction_cosine.value == 0
        assert closeness.distance == Estimate(1.0, 0.0)
    assert found.gap_closed == 0
    assert found.transfer.fits == "no"


def test_one_that_is_cfg_closes_all_of_it():
    found = assessed(Partly(1.0), training={"gap_closed": {"3": 0.9, "6": 0.7}})
    for closeness in found.by_omega.values():
        assert closeness.gap_closed.value == pytest.approx(1)
        assert closeness.direction_cosine.value == pytest.approx(1)
        assert closeness.distance.value == pytest.approx(0, abs=1e-5)
        assert [level.gap_closed.value for level in closeness.by_sigma] == pytest.approx([1] * SMALL.steps)
    assert found.transfer.kept.value == pytest.approx(1 / 0.8)
    assert found.transfer.fits == "yes"


def test_half_the_way_is_three_quarters_of_the_squared_gap():
    for closeness in assessed(Partly(0.5)).by_omega.values():
        assert closeness.gap_closed.value == pytest.approx(0.75)
        assert closeness.gap_closed.se == pytest.approx(0, abs=1e-6)  # on every image alike
        assert closeness.direction_cosine.value == pytest.approx(1)
        assert 0.3 < closeness.distance.value < 0.7


def test_what_is_measured_is_what_training_measures():
    model = AnalyticModel()
    info, state = info_and_state(model, random=True)
    adapter = Adapter(info.config)
    adapter.load_state_dict(state)
    positive, negative = model.encode(PROMPTS[:3]), model.encode([""] * 3)
    trajectories = Trajectories((CHANNELS, 8, 8), SMALL.omegas, steps=4, seed=SMALL.seed)
    states = follow_teacher(model, positive, negative, trajectories)
    expected, found = evaluate(model, adapter, states), assessed(model, random=True)
    for omega, closeness in found.by_omega.items():
        assert closeness.gap_closed.value == pytest.approx(expected.gap_closed[omega])
        assert closeness.gap_closed.se == pytest.approx(expected.gap_closed_se[omega])
        assert closeness.direction_cosine.value == pytest.approx(expected.direction_cosine[omega])
        levels = [(level.sigma, level.gap_closed.value) for level in closeness.by_sigma]
        assert levels == [pytest.approx(pair) for pair in expected.by_sigma[omega]]


@pytest.mark.parametrize("function", [lambda share: 1 - share, torch.sqrt])
def test_the_standard_error_is_the_spread_of_many_repetitions(function):
    generator = torch.Generator().manual_seed(0)
    repeated = []
    for _ in range(400):
        before = torch.rand(20, generator=generator).double() + 0.5
        now = before * torch.rand(20, generator=generator)
        repeated.append(of_sums(function, now, before))
    spread = torch.tensor([estimate.value for estimate in repeated]).std().item()
    assert sum(estimate.se for estimate in repeated) / len(repeated) == pytest.approx(spread, rel=0.1)


def test_the_standard_error_is_over_images():
    found = assessed(AnalyticModel(), replace(SMALL, count=6), random=True)
    gap, cosine, distance = (
        getattr(found.by_omega[3.0], key) for key in ("gap_closed", "direction_cosine", "distance")
    )
    assert min(gap.se, cosine.se, distance.se) > 0.005  # prompts differ far more than rounding
    assert found.transfer.gap_closed.se == pytest.approx((gap.se + found.by_omega[6.0].gap_closed.se) / 2)


def test_a_single_image_has_no_standard_error():
    found = assessed(AnalyticModel(), replace(SMALL, count=1, omegas=(3.0,)), random=True)
    assert {found.by_omega[3.0].gap_closed.se, found.costs["agd"].seconds_per_image.se} == {None}
    assert "±" not in found.report().replace("± is", "")


def test_every_method_starts_from_equal_noise_and_the_warm_up_is_not_counted():
    model = AnalyticModel()
    info, state = info_and_state(model)
    sampler = EulerSampler(model, Adapter(info.config))
    found = assess(model, sampler, Candidate(info, state, "a"), PromptTexts(PROMPTS[:2]), SMALL)
    warm_up, asked = sampler.asked[:3], sampler.asked[3:]
    assert [(method, steps) for method, _, _, steps in warm_up] == [("unguided", 2), ("guided", 2), ("agd", 2)]
    assert len(asked) == SMALL.count * (1 + 2 * len(SMALL.omegas))
    of_image = [asked[i : i + 5] for i in range(0, len(asked), 5)]
    for samples in of_image:
        assert all(torch.equal(noise, samples[0][1]) for _, noise, _, _ in samples)
    assert not torch.equal(of_image[0][0][1], of_image[2][0][1])  # the same prompt again, but another seed
    costs = {method: cost.evaluations_per_step for method, cost in found.costs.items()}
    assert costs == {"unguided": 1, "guided": 2, "agd": 1}
    assert (found.images, found.prompts) == (3, 2)


def test_negative_prompts_take_turns_too():
    model = AnalyticModel()
    one, other, both = (
        assessed(model, random=True, negative=negative).gap_closed
        for negative in (["a red star"], ["a blue ring"], ["a red star", "a blue ring"])
    )
    assert len({one, other, both}) == 3
    with pytest.raises(ValueError, match="Guidance changes nothing here"):
        assessed(model, prompts=["a red star"], negative=["a red star"])


def test_the_adapters_own_teacher_is_what_it_is_measured_against():
    training = {"config": {"teacher": "interval", "interval_sigma_min": 1.0, "interval_sigma_max": 5.0, "batch": 4}}
    model = AnalyticModel()
    info, _ = info_and_state(model, training)
    assert (learnt_by(info).rule.name, learnt_by(info).rule.sigma_max) == ("interval", 5.0)
    found = assessed(model, training=training)
    assert found.teacher == "INTERVAL"
    sigmas = [level.sigma for level in found.by_omega[3.0].by_sigma]
    assert sigmas
    assert all(1.0 < sigma <= 5.0 for sigma in sigmas)
    everywhere = assessed(Partly(1.0), training=training).by_omega[3.0]
    assert everywhere.gap_closed.value < 1  # what it adds outside of the interval counts against it
    assert everywhere.direction_cosine.value == pytest.approx(1)


class AtHighNoise(Partly):
    """Whose student follows the teacher at the noise levels that it learnt, and nowhere else."""

    def student(self, adapter, x, sigma, prompts, negative, omega):
        learnt = super().student(adapter, x, sigma, prompts, negative, omega)
        return torch.where(per_row(sigma, x) >= 6, learnt, self.denoise(x, sigma, prompts))


@pytest.mark.parametrize(
    ("learnt", "said"), [({"sigma_from": 6.0}, "from 6 up"), ({"sigma_from": 6.5, "sigma_to": 9.0}, "below 9 and from")]
)
def test_an_adapter_of_one_of_two_experts_is_measured_at_the_noise_levels_that_it_learnt(learnt, said):
    found = assessed(AtHighNoise(0.9), replace(SMALL, steps=20), training={"config": learnt})
    for closeness in found.by_omega.values():
        assert closeness.gap_closed.value == pytest.approx(0.99)
        levels = [level.sigma for level in closeness.by_sigma]
        assert levels == sorted(levels, reverse=True)
        assert all(learnt["sigma_from"] <= sigma < learnt.get("sigma_to", 11) for sigma in levels)
    assert said in found.notes[0]
    assert said in found.report()


def test_too_few_steps_to_come_to_what_was_learnt_are_refused_before_anything_is_evaluated():
    model = AnalyticModel()
    with pytest.raises(ValueError, match=r"^None of 4 sampling steps is .*, below 3 and from 2 up: evaluate with more"):
        assessed(model, training={"config": {"sigma_from": 2.0, "sigma_to": 3.0}})
    assert model.base_rows == []


def test_a_video_is_measured_with_the_frames_of_its_training():
    training = {"config": {"frames": 3}}
    assert learnt_by(info_and_state(AnalyticModel(), training)[0]).frames == 3
    assert "latents of 8x8 and 3 frames, " in assessed(AnalyticModel(), training=training).report()
    assert "frames" not in assessed(AnalyticModel()).report()


class OnACard(AnalyticModel):
    """A base of 10 GB; an evaluation takes 1 GB for each latent."""

    def __init__(self, gigabytes: float):
        super().__init__()
        self.card, self.sessions = gigabytes, []

    def available(self) -> int:
        return int(self.card * 1e9)

    def base_bytes(self) -> int:
        return 10 * 10**9

    def largest_block_bytes(self) -> int:
        return 10**9

    def trace_base(self, shape, rows, prompt):
        return SimpleNamespace(peak_bytes=rows * 10**9)

    def session(self, **settings):
        self.sessions.append(settings)
        return super().session()


@pytest.mark.parametrize(("card", "rows", "reserve"), [(24, 3, 3), (12, 1, 1), (6, 1, 2)])
def test_on_a_card_room_is_left_for_the_evaluations(card, rows, reserve):
    model = OnACard(card)
    assessed(model)
    (session,) = model.sessions
    assert reserve * 1e9 < session["memory"] < reserve * 1.1e9
    assert max(model.student_rows) == rows


def test_omegas_and_sizes_are_those_of_the_training_unless_chosen():
    model = AnalyticModel()
    assert list(assessed(model, replace(SMALL, omegas=()), {"gap_closed": {"2.5": 0.5}}).by_omega) == [2.5]
    assert list(assessed(model, replace(SMALL, omegas=())).by_omega) == [2.3, 5.2, 12.0]
    info, state = info_and_state(model)
    info = replace(info, resolutions=((10, 12), (8, 8)))
    sampler = EulerSampler(model, Adapter(info.config))
    for size, expected in (({}, (10, 12)), ({"width": 64}, (10, 8)), ({"width": 80, "height": 72}, (9, 10))):
        config = AssessConfig(omegas=(3.0,), steps=2, count=1, **size)
        assert assess(model, sampler, Candidate(info, state, "a"), PromptTexts(PROMPTS), config).latent == expected


def test_what_training_reported_is_interpolated_in_log_omega():
    training = {"gap_closed": {"2": 0.8, "8": 0.4}}
    model = Partly(1.0)
    for omega, reported in ((1.5, 0.8), (2.0, 0.8), (4.0, 0.6), (12.0, 0.4)):
        found = assessed(model, replace(SMALL, omegas=(omega,)), training)
        assert found.transfer.reported.value == pytest.approx(reported)
        assert found.transfer.reported.se is None
    assert assessed(model).transfer.reported is None
    training["gap_closed_se"] = {"2": 0.02, "8": 0.04}
    for omegas, error in (((1.5,), 0.02), ((4.0,), 0.03), ((2.0, 12.0), 0.03)):
        found = assessed(model, replace(SMALL, omegas=omegas), training)
        assert found.transfer.reported.se == pytest.approx(error)


EXACT, KNOWN = Estimate(0.6, 0.0), Estimate(0.6, 0.03)


@pytest.mark.parametrize(
    ("gap", "reported", "fits", "said"),
    [
        (
            Estimate(0.6, 0.05),
            EXACT,
            "yes",
            r"It fits: 100% \(± 8%\) of the gap closed in its own training is kept here",
        ),
        (Estimate(0.6, 0.03), KNOWN, "yes", r"It fits: 100% \(± 7%\) of the gap"),
        (
            Estimate(0.6, 0.06),
            KNOWN,
            "yes",
            r"It seems to fit: 100% \(± 11%\).*; that is not sure, evaluate more images",
        ),
        (Estimate(0.48, 0.05), EXACT, "yes", "It seems to fit: 80% .* not sure, evaluate more images"),
        (Estimate(0.6, None), KNOWN, "yes", "It seems to fit: 100% of the gap .* not sure, evaluate more images"),
        (Estimate(0.4, 0.01), EXACT, "partly", "It fits partly: 67% .* train one for this checkpoint"),
        (Estimate(0.3, 0.05), EXACT, "partly", "It seems to fit partly: 50% .* not sure"),
        (Estimate(0.2, 0.04), EXACT, "no", "It does not fit: 33% .* train one for this checkpoint"),
        (Estimate(0.2, 0.06), EXACT, "no", "It seems not to fit: 33% .* not sure"),
        (Estimate(-0.2, 0.05), EXACT, "no", "It does not fit: 0%"),
        (Estimate(0.2, 0.05), None, "unknown", "How well it fits can't be told: no gap closed in a training"),
        (Estimate(-0.1, 0.01), None, "no", "It does not fit: no gap is closed here"),
        (Estimate(-0.1, 0.1), None, "no", "It seems not to fit: no gap is closed here"),
        (Estimate(0.3, 0.05), Estimate(0.0, 0.0), "unknown", "How well it fits can't be told: no gap closed"),
        (
            Estimate(math.nan, None),
            KNOWN,
            "unknown",
            "How well it fits can't be told: predictions with the adapter aren't",
        ),
    ],
)
def test_the_verdict_on_another_checkpoint_claims_what_two_standard_errors_carry(gap, reported, fits, said):
    transfer = Transfer(False, gap, reported)
    assert transfer.fits == fits
    assert re.match(said, transfer.verdict())
    assert transfer.is_sure == (fits != "unknown" and "seems" not in said)


def test_what_is_kept_has_the_error_of_both_measurements():
    kept = Transfer(False, Estimate(0.3, 0.02), Estimate(0.6, 0.06)).kept
    assert kept.value == pytest.approx(0.5)
    assert kept.se == pytest.approx(math.hypot(0.02 / 0.6, 0.3 * 0.06 / 0.6**2))
    assert ratio(Estimate(1.0, None), Estimate(2.0, 0.1)) == Estimate(0.5, None)


def test_of_a_file_without_the_error_of_its_training_that_is_said():
    transfer = Transfer(False, Estimate(0.6, 0.03), Estimate(0.6, None))
    assert transfer.kept.se is None
    assert transfer.kept_se_here == pytest.approx(0.05)
    assert "100% (± 5% of this measurement; how sure its training's is, the file doesn't say)" in transfer.verdict()


def test_the_remedy_for_its_own_checkpoint_is_no_new_training():
    verdict = Transfer(True, Estimate(0.2, 0.01), EXACT).verdict()
    assert "train one" not in verdict
    assert "unlike its training's" in verdict


def test_the_errors_of_ratios_are_those_of_many_repetitions():
    """Of two sums over the same images, and of two that were measured apart."""
    generator, paired, apart = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        image, one, other = torch.rand(3, 24, generator=generator).double() + 0.5
        paired.append(ratio_of_sums(2 * image + 0.1 * one, image + 0.1 * other))
        apart.append(ratio(*(Estimate(each.mean().item(), each.std().item() / 24**0.5) for each in (one, other))))
    for found in (paired, apart):
        spread = torch.tensor([estimate.value for estimate in found]).std().item()
        assert sum(estimate.se for estimate in found) / len(found) == pytest.approx(spread, rel=0.1)
    assert paired[0].se < 0.5 * apart[0].se  # what images have in common is no error


def test_a_speed_up_is_that_of_the_same_images_and_has_its_error(monkeypatch):
    """One image takes ten times as long as another, by either method: that is no doubt about the ratio."""
    model, clock, image = AnalyticModel(), [0.0], [0]
    info, state = info_and_state(model)
    sampler = EulerSampler(model, Adapter(info.config))

    def sample(method, *args, **options):
        image[0] += method == "unguided"  # the first one is of the warm-up
        clock[0] += {"unguided": 1, "guided": 2 + image[0] % 2 / 10, "agd": 1}[method] * 10 ** (image[0] % 3)
        return sampler(method, *args, **options)

    sample.notes = []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    config = replace(SMALL, count=12)
    found = assess(model, sample, Candidate(info, state, "a"), PromptTexts(PROMPTS), config)
    seconds = [10 ** (i % 3) for i in range(2, 14)]
    guided = [own * (2 + i % 2 / 10) for i, own in enumerate(seconds)]
    assert found.speedup.value == pytest.approx(sum(guided) / sum(seconds))
    assert 0 < found.speedup.se < 0.1
    assert found.costs["agd"].seconds_per_image.se > 5


def test_a_sibling_is_told_from_the_checkpoint_of_the_training_and_so_are_loras():
    model = AnalyticModel()
    assert "the checkpoint that it was trained on" in assessed(model).report()
    info, state = info_and_state(model)
    untold = replace(info, base=replace(info.base, fingerprint=""))
    sampler = EulerSampler(model, Adapter(info.config))
    unknown = assess(model, sampler, Candidate(untold, state, "a"), PromptTexts(PROMPTS), SMALL)
    assert "context 16).\n" in unknown.report()
    sibling = AnalyticModel(base=replace(model.base, fingerprint="another"), base_patches={"patched_weights": 7})
    sampler = EulerSampler(sibling, Adapter(info.config))
    found = assess(sibling, sampler, Candidate(info, state, "a"), PromptTexts(PROMPTS), SMALL)
    assert not found.transfer.same_weights
    assert "other weights than those of its training" in found.report()
    assert found.notes == [
        "LoRAs and the like patch 7 weights of this model, but 0 of the one it was trained on.",
        "something to know.",
    ]


def test_the_patches_of_the_base_that_it_was_trained_on_are_known():
    patched = AnalyticModel(base_patches={"patched_weights": 7})
    assert assessed(patched, training={"base_patches": {"patched_weights": 7}}).notes == ["something to know."]
    other = assessed(patched, training={"base_patches": {"patched_weights": 3}})
    assert "7 weights of this model, but 3 of the one" in other.notes[0]


def test_the_report_and_the_json_say_it_all():
    errors = {"3": 0.0, "6": 0.0}
    found = assessed(Partly(0.5), training={"gap_closed": {"3": 0.8, "6": 0.7}, "gap_closed_se": errors})
    report = found.report()
    first = report.splitlines()[0]
    assert re.fullmatch(r"Gap closed 0\.750 ± 0\.000; \d+\.\d\d ± \d+\.\d\d times as fast as CFG\.", first)
    assert len(first) <= 60  # all that ComfyUI's classic canvas shows
    assert "cfg 3: gap closed 0.750 ± 0.000, direction cosine 1.000 ± 0.000, distance to CFG 0." in report
    assert "AGD: " in report
    assert "2.00 model evaluations per step" in report
    assert "It fits: 100% (± 0%) of the gap closed" in report
    assert "Note: something to know." in report
    data = json.loads(json.dumps(found.as_json()))
    assert data["by_omega"]["6"]["gap_closed"]["value"] == pytest.approx(0.75)
    assert len(data["by_omega"]["6"]["by_sigma"]) == 4
    assert data["costs"]["guided"]["evaluations_per_step"] == 2
    assert "picture" not in data
    assert data["transfer"]["fits"] == "yes"
    assert data["transfer"]["kept"]["value"] == pytest.approx(1.0)
    assert data["speedup"].keys() == data["transfer"]["reported"].keys() == {"value", "se"}


class Overflowing(Partly):
    """Whose student is no number, from the noise level of 5 down."""

    def student(self, adapter, x, sigma, prompts, negative, omega):
        return super().student(adapter, x, sigma, prompts, negative, omega) + per_row(0.0 / (sigma > 5), x)


def test_what_is_no_finite_number_is_null_in_the_json_and_no_verdict():
    found = assessed(Overflowing(0.5), training={"gap_closed": {"3": 0.8, "6": 0.7}})
    assert "Gap closed nan;" in found.report()
    data = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert data["by_omega"]["3"]["gap_closed"] == {"value": None, "se": None}
    assert data["by_omega"]["3"]["distance"]["value"] is None
    assert (data["transfer"]["fits"], data["transfer"]["sure"]) == ("unknown", False)


def test_the_picture_has_a_row_per_image_and_shows_differences():
    class Painted(Partly):
        def picture(self, latent):
            return Image.new("RGB", (64, 64), (int(128 + 20 * latent.mean().clamp(-5, 5)),) * 3)

    found = assessed(Painted(1.0), replace(SMALL, count=8))
    width, height = found.picture.size
    assert (width, height) == (4 * 264 - 8, 28 + 6 * 284)  # 64 pixels are shown as 256; six images at most
    assert found.picture.getpixel((3 * 264 + 100, 28 + 28 + 100)) == (128, 128, 128)


def test_raising_from_progress_stops_at_any_evaluation():
    last, model = {}, AnalyticModel()

    def remember(progress):
        last[progress.phase] = progress

    assessed(model, progress=remember)
    assert list(last) == ["encode", "teacher", "measure", "sample"]
    assert all(progress.step == progress.total for progress in last.values())
    for phase in last:

        def stop(progress, phase=phase):
            if progress.phase == phase:
                raise Stopped

        with pytest.raises(Stopped):
            assessed(model, progress=stop)


def test_rows_are_halved_when_memory_runs_out():
    model = AnalyticModel(most_rows=2)
    whole, halved = assessed(AnalyticModel(), random=True), assessed(model, random=True)
    assert max(model.student_rows) == 3  # tried, and then
    assert whole.by_omega[3.0].gap_closed.value == pytest.approx(halved.by_omega[3.0].gap_closed.value)


def test_what_cannot_be_evaluated_is_one_sentence():
    with pytest.raises(ValueError, match="There are no prompts to evaluate with"):
        assessed(AnalyticModel(), prompts=["", "  "])
    with pytest.raises(SettingsError, match=r"count is 0, but must be from 1 to 10000; seed is -1, but must be from 0"):
        AssessConfig(count=0, seed=-1)
    with pytest.raises(SettingsError, match=r"width is 32, but must be 64 or more"):
        AssessConfig(width=32)
    for wrong in (1.0, math.nan, math.inf):
        with pytest.raises(SettingsError, match=f"omega is {wrong}, but must be from 1.01 to 100"):
            AssessConfig(omegas=(3.0, wrong))
    model = AnalyticModel()
    other = AnalyticModel(base=replace(model.base, prediction="V_PREDICTION"))
    info, state = info_and_state(model)
    with pytest.raises(AdapterFileError, match="was made for Analytic"):
        assess(other, EulerSampler(other, None), Candidate(info, state, "a.safetensors"), PromptTexts(PROMPTS), SMALL)
