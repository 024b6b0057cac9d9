"""Seeds: small ones give what they always gave, and the largest of ComfyUI's work like any other."""

from dataclasses import replace

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.seeds import LARGEST_SEED, seeded_generator
from comfyui_agd.tests.support.analytic import (
    CONFIG,
    PROMPTS,
    AnalyticModel,
    Stopped,
    assert_same,
    stop_after,
    weights,
)
from comfyui_agd.tests.support.small import info_for
from comfyui_agd.training.assess import AssessConfig, Candidate, PromptTexts, assess
from comfyui_agd.training.job import Job
from comfyui_agd.training.recording import Recording
from comfyui_agd.training.run_identity import DifferentRun
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train

LARGE = (19_000_000_000_017, 2**53 + 5, 2**63 + 7, LARGEST_SEED - 1, LARGEST_SEED)
DRAWN = replace(CONFIG, seed=LARGEST_SEED, preview_every=6)


def drawn(seed: int, stream: int | None = None) -> tuple[float, ...]:
    return tuple(torch.randn(4, generator=seeded_generator(seed, stream)).tolist())


@pytest.mark.parametrize("seed", [0, 1, 7, 12345, 2**32, 10**13])
def test_small_seeds_give_what_recordings_and_runs_were_made_with(seed):
    def as_before(number: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=torch.Generator().manual_seed(number)).tolist())

    assert drawn(seed) == as_before(seed)
    assert [drawn(seed, stream) for stream in (0, 1, 9)] == [as_before(seed * 1_000_003 + i) for i in (0, 1, 9)]


def test_every_large_seed_and_each_of_its_streams_gives_others():
    found = [drawn(seed, stream) for seed in LARGE for stream in (None, 0, 1, 2)]
    assert len(set(found)) == len(found)


def test_what_is_past_the_largest_begins_again():
    assert drawn(LARGEST_SEED + 3) == drawn(2)


def test_a_run_of_the_largest_seed_is_saved_and_goes_on_to_the_same_result(tmp_path):
    shown = []
    whole = train(AnalyticModel(), PROMPTS, DRAWN, Callbacks(on_preview=lambda step, image: shown.append(step)))
    assert shown == [6, 12]
    options = RunOptions(folder=tmp_path / "a.run")
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, DRAWN, stop_after(7), options)
    with pytest.raises(DifferentRun, match=f"seed: {LARGEST_SEED} then, 0 now"):
        train(AnalyticModel(), PROMPTS, replace(DRAWN, seed=0), options=options)
    assert_same(train(AnalyticModel(), PROMPTS, DRAWN, options=options), whole)
    assert not torch.equal(weights(whole), weights(train(AnalyticModel(), PROMPTS, replace(DRAWN, seed=0))))


def test_a_recording_of_the_largest_seed_is_trained_from_many_times(tmp_path):
    job = Job(AnalyticModel(), PROMPTS, DRAWN, tmp_path / "recording")
    job.record(4, Callbacks())
    recording = Recording.open(tmp_path / "recording")
    assert recording.config(CONFIG).seed == LARGEST_SEED
    trained = train(
        AnalyticModel(), PROMPTS, DRAWN, options=RunOptions(recording=recording, negative=job.negatives)
    )  # fmt: skip
    assert len(trained.losses) == DRAWN.iterations > recording.batches


class NoiseKeeper:
    """`training.assess.Sampler` that gives back the noise."""

    notes: tuple[str, ...] = ()

    def __init__(self):
        self.noises: list[torch.Tensor] = []

    def __call__(self, method, noise, prompts, *, omega, steps, progress):
        self.noises.append(noise)
        for _ in range(steps):
            progress()
        return noise + {"unguided": 0, "guided": 1, "agd": 2}[method], steps


def test_an_adapter_is_evaluated_with_the_largest_seed():
    model, sampler = AnalyticModel(), NoiseKeeper()
    info = info_for(model.base, kind="cross_attention", hidden=8, encoder_width=8, prompt_tokens=3)
    config = AssessConfig((3.0,), steps=2, count=3, width=64, height=64, seed=LARGEST_SEED)
    candidate = Candidate(info, Adapter(info.config).state_dict(), "a.safetensors")
    assess(model, sampler, candidate, PromptTexts(PROMPTS), config)
    assert len({tuple(noise.flatten().tolist()) for noise in sampler.noises}) == 3


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_other_seeds_are_refused_by_name(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}, but must be from 0 to {LARGEST_SEED}"):
        AssessConfig(seed=seed)
