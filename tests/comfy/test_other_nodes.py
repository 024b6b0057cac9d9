"""Adapters beside nodes, guiders and packs that nobody here knows, each a kind: the picture is guided as asked or the
base's own, and a message says which. The nodes that ComfyUI brings are in compatibility/.
"""

import copy
from functools import partial

import comfy.samplers
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_context_windows, nodes_easycache, nodes_model_advanced
from comfy_extras import nodes_custom_sampler as custom

from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui.sampling.restarts import RandomState
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    Prompts,
    ksampler,
    ksampler_advanced,
    latent,
    patched,
    random_prompts,
    rows_of,
    since,
    training_free,
)

HOW = {"delta": {"kind": "delta"}, "rank": {"kind": "delta", "rank": 2}, "cross_attention": {"kind": "cross_attention"}}
close = partial(torch.testing.assert_close, atol=5e-4, rtol=5e-4)


@pytest.fixture(params=HOW)
def file(files, request):
    return files[request.param]


class Messages(list):
    """The messages about the sampling. These adapters are of random weights, so none about their training."""

    def receive(self, message: str) -> None:
        if not message.startswith("The adapter ignores the negative prompt"):
            self.append(message)


@pytest.fixture
def messages() -> Messages:
    return Messages()


@pytest.fixture
def agd(base, file, messages):
    return lambda model=base, **options: patched(model, file, notify=messages.receive, **options)


@pytest.fixture
def delta(base, files):
    """A MODEL with an adapter that knows the negative prompt."""
    return patched(base, files["delta"])


# Conditions, by ComfyUI's own rules


def of_rows(*prompts: Prompts, kind: str = "negative") -> list:
    """One condition with a row for each of the prompts."""
    return [[torch.cat([getattr(p, kind)[0][0] for p in prompts]), getattr(prompts[0], kind)[0][1]]]


@pytest.fixture(scope="module")
def several() -> list[Prompts]:
    return [random_prompts(seed=seed) for seed in range(20, 26)]


@pytest.mark.parametrize(("rows", "pictures"), [(4, 1), (4, 3), (2, 3), (3, 2)])
def test_rows_of_a_negative_are_repeated_and_cut_to_those_of_the_latents(delta, prompts, several, rows, pictures):
    own = [several[i % rows] for i in range(pictures)]
    fitted = Prompts(prompts.positive, of_rows(*own))
    given = Prompts(prompts.positive, of_rows(*several[:rows]))
    at = latent(pictures)
    assert torch.equal(ksampler(delta, given, at=at), ksampler(delta, fitted, at=at))


def test_each_window_has_the_negatives_of_its_pictures(delta, several):
    since("0.26.0")
    each = Prompts(of_rows(*several, kind="positive"), of_rows(*several))
    node = nodes_context_windows.ContextWindowsManualNode
    windowed = node.execute(delta, 4, 2, "standard_static", 1, False, "pyramid", 0, False).args[0]
    close(ksampler(windowed, each, at=latent(6)), ksampler(delta, each, at=latent(6)))


def test_an_empty_list_of_negatives_is_none(agd, prompts, messages):
    assert ksampler(agd(), Prompts(prompts.positive, [])).isfinite().all()
    assert messages == []


def stronger(conditioning: list, strength: float) -> list:
    return nodes.ConditioningSetAreaStrength().append(conditioning, strength)[0]


def test_a_negative_of_no_strength_is_none(delta, prompts, several):
    none = stronger(several[0].negative, 0.0)
    both = Prompts(prompts.positive, prompts.negative + none)
    assert torch.equal(ksampler(delta, both), ksampler(delta, prompts))
    assert ksampler(delta, Prompts(prompts.positive, none)).isfinite().all()


def in_mask(conditioning: list, mask: torch.Tensor, strength: float = 1.0) -> list:
    return nodes.ConditioningSetMask().append(conditioning, mask[None], "default", strength)[0]


@pytest.fixture
def left() -> torch.Tensor:
    """A mask of the left half of 8x8."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def test_masks_give_each_place_its_negative(delta, prompts, several, left):
    one, other = prompts.negative, several[0].negative
    same = Prompts(prompts.positive, in_mask(one, left) + in_mask(one, 1 - left))
    close(ksampler(delta, same), ksampler(delta, prompts))
    parted = ksampler(delta, Prompts(prompts.positive, in_mask(one, left) + in_mask(other, 1 - left)), steps=1)
    first, second = (ksampler(delta, Prompts(prompts.positive, own), steps=1) for own in (one, other))
    assert (parted - first)[..., :3].norm() < (parted - second)[..., :3].norm()
    assert (parted - second)[..., 5:].norm() < (parted - first)[..., 5:].norm()


def test_where_no_negative_is_there_is_no_guidance_away_from_one(delta, base, prompts, left):
    nowhere = Prompts(prompts.positive, in_mask(prompts.negative, left, 0.0) + in_mask(prompts.negative, 1 - left, 0.0))
    assert ksampler(delta, nowhere).isfinite().all()


def test_areas_of_negatives_are_areas(delta, prompts, several):
    halves = [nodes.ConditioningSetArea().append(own, 32, 64, x, 0, 1.0)[0]
              for own, x in ((prompts.negative, 0), (several[0].negative, 32))]  # fmt: skip
    parted = ksampler(delta, Prompts(prompts.positive, halves[0] + halves[1]))
    mixed = ksampler(delta, Prompts(prompts.positive, prompts.negative + several[0].negative))
    assert parted.isfinite().all()
    assert not torch.allclose(parted, mixed, atol=1e-3)


def test_an_areas_evaluation_has_the_negative_of_its_area(delta, prompts, several):
    """It is of a crop of the latents, to which the places of the negatives are cropped."""
    area = nodes.ConditioningSetArea().append

    def halves(one: list, other: list) -> list:
        return area(one, 32, 64, 0, 0, 1.0)[0] + area(other, 32, 64, 32, 0, 1.0)[0]

    regions = halves(prompts.positive, several[1].positive)
    negatives = prompts.negative, several[0].negative
    parted = ksampler(delta, Prompts(regions, halves(*negatives)), steps=1)
    for half, negative in enumerate(negatives):
        alone = ksampler(delta, Prompts(regions, halves(negative, negative)), steps=1)
        part = slice(4 * half, 4 * half + 4)
        close(parted[..., part], alone[..., part])
        other = slice(4, None) if half == 0 else slice(4)
        assert not torch.allclose(parted[..., other], alone[..., other], atol=1e-2)


def test_a_default_negative_is_for_what_the_others_leave(delta, prompts, several, left):
    rest = nodes.node_helpers.conditioning_set_values(several[0].negative, {"default": True})
    with_default = ksampler(delta, Prompts(prompts.positive, in_mask(prompts.negative, left) + rest))
    named = in_mask(prompts.negative, left) + in_mask(several[0].negative, 1 - left)
    close(with_default, ksampler(delta, Prompts(prompts.positive, named)))


# Guiders and combinations of other packs


def sample(guider, steps: int = STEPS, levels: int | None = None, sampler=None) -> torch.Tensor:
    """`levels`: the first ones only."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:levels]
    sampler, noise = sampler or comfy.samplers.sampler_object("euler"), custom.RandomNoise.execute(7).args[0]
    with torch.inference_mode():
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent()).args[0]["samples"]


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("guided", ["adapter", "training-free"])
@pytest.mark.parametrize(
    "other", [lambda model: model, lambda model: nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0]]
)
def test_a_sampling_without_steps_says_nothing(base, files, prompts, messages, levels, guided, other):
    """SplitSigmas leaves one level where it splits at the first or the last step."""
    tell = {"notify": messages.receive}
    model = training_free(base, **tell) if guided == "training-free" else patched(base, files["rank"], **tell)
    sampled = guided_by(comfy.samplers.CFGGuider, other(model), prompts, levels=levels)
    assert torch.equal(sampled, guided_by(comfy.samplers.CFGGuider, base, prompts, levels=levels))
    assert messages == []


def restarting(name: str, base, files, notify) -> tuple:
    """A MODEL whose sampling starts again, once its sampler has drawn random numbers; and one that is sampled likewise
    from the beginning."""
    tell = {"notify": notify}
    if name == "merged":  # the second time, it begins so
        model = patched(base, files["rank"], **tell)
        guided_by(comfy.samplers.CFGGuider, model, random_prompts())
        return patched(base, files["rank"], **tell), model
    if name == "unguided":
        return after(patched(base, files["rank"], **tell), rescales), after(base, rescales)
    if name == "training-free":
        return cached(training_free(base, **tell)), cached(base)
    return cached(patched(base, files["delta"], forecast=True, **tell)), cached(patched(base, files["delta"], **tell))


def cached(model):
    return nodes_easycache.EasyCacheNode.execute(model, 2.0, 0.15, 0.95, False).args[0]


@pytest.mark.parametrize("name", ["merged", "unguided", "training-free", "forecast"])
def test_a_sampling_that_starts_again_draws_the_same_random_numbers(base, files, prompts, messages, name):
    churn = comfy.samplers.ksampler("euler", {"s_churn": 2.0})

    def sampled(model) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        return guided_by(comfy.samplers.CFGGuider, model, prompts, sampler=churn, steps=20), torch.rand(3)

    (again, after_again), (at_once, after_at_once) = map(sampled, restarting(name, base, files, messages.receive))
    assert torch.equal(again, at_once)
    assert torch.equal(after_again, after_at_once)


def test_random_numbers_of_a_device_are_restored_too(monkeypatch):
    restored, card = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ("state of", device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((state, device)))
    RandomState.of(card).restore()
    assert restored == [(("state of", card), card)]


class AroundTheWrappers(comfy.samplers.CFGGuider):
    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)


class ScaleOfItsOwn(comfy.samplers.CFGGuider):
    """Its cfg says nothing; it combines by a scale of its own."""

    scale = CFG

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        negative, positive = self.conds["negative"], self.conds["positive"]
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, self.scale, model_options, seed
        )


class ScalePerStep(ScaleOfItsOwn):
    def predict_noise(self, x, timestep, model_options={}, seed=None):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        self.scale = CFG - float((sigmas - timestep[0]).abs().argmin())
        return super().predict_noise(x, timestep, model_options, seed)


class ScaleInAList(ScaleOfItsOwn):
    def set_cfg(self, cfg):
        self.cfg = [cfg] * STEPS


class ScaleInATensor(comfy.samplers.CFGGuider):
    def set_cfg(self, cfg):
        self.cfg = torch.tensor(cfg)


def guided_by(kind: type, model, prompts: Prompts, cfg: float = CFG, **options):
    """`options`: of `sample`."""
    guider = kind(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(cfg)
    return sample(guider, **options)


@pytest.mark.parametrize("kind", [AroundTheWrappers, ScaleInAList, ScaleInATensor])
def test_a_guider_that_only_combines_is_guided_as_asked(agd, prompts, messages, kind):
    close(guided_by(kind, agd(), prompts), ksampler(agd(), prompts))
    assert not any(message.startswith("No ") for message in messages)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_scale_is_the_combinations_not_the_guiders(agd, prompts, cfg):
    close(guided_by(ScaleOfItsOwn, agd(), prompts, cfg), ksampler(agd(), prompts))


def test_a_scale_that_changes_from_step_to_step_is_followed(agd, prompts):
    """Equal to KSampler (Advanced)'s with these cfgs, a step each."""
    at = latent()
    for step in range(STEPS):
        at = ksampler_advanced(agd(), prompts, at, step, step + 1, cfg=CFG - step)
    close(guided_by(ScalePerStep, agd(), prompts), at["samples"])


class InItsOwnWay(comfy.samplers.CFGGuider):
    """Evaluates each condition by itself, and combines them."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        positive, negative = (
            comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[kind]], x, timestep, model_options)[0]
            for kind in ("positive", "negative")
        )
        return negative + self.cfg * (positive - negative)


class BothInItsOwnWay(comfy.samplers.CFGGuider):
    """Evaluates both at once, and combines them by a scale that it keeps to itself."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        positive, negative = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return negative + 4.0 * (positive - negative)


class InAnInterval(ScaleOfItsOwn):
    """Guided in the first half, and else the prompt's prediction alone."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        if float(timestep[0]) > 3:
            return super().predict_noise(x, timestep, model_options, seed)
        positive = [self.conds["positive"]]
        return comfy.samplers.calc_cond_batch(self.inner_model, positive, x, timestep, model_options)[0]


class OnTheModelItself(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options={}, seed=None):
        context = self.conds["positive"][0]["model_conds"]["c_crossattn"].cond
        options = {**model_options["transformer_options"], "cond_or_uncond": [0], "uuids": [], "sigmas": timestep}
        return self.inner_model.apply_model(x, timestep, c_crossattn=context, transformer_options=options)


class AfterAPair(ScaleOfItsOwn):
    """Adds what it evaluates of the negative alone."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        combined = super().predict_noise(x, timestep, model_options, seed)
        negative = [self.conds["negative"]]
        alone = comfy.samplers.calc_cond_batch(self.inner_model, negative, x, timestep, model_options)[0]
        return combined + 0.5 * (combined - alone)


OWN_WAYS = [
    (kind, scale) for kind in (InItsOwnWay, InAnInterval, OnTheModelItself, AfterAPair) for scale in (None, 3.0)
]
# By the loader's scale it is guided, whatever its own.
OWN_WAYS.append((BothInItsOwnWay, None))


@pytest.mark.parametrize(("kind", "scale"), OWN_WAYS)
def test_a_guider_that_evaluates_in_its_own_way_gets_the_base_and_a_message_says_so(
    base, agd, prompts, messages, kind, scale
):
    assert torch.equal(guided_by(kind, agd(guidance_scale=scale), prompts), guided_by(kind, base, prompts))
    assert len(messages) == 1
    assert messages[0].startswith(("The adapter is bypassed: the guider", "No speed-up: the guider"))
    assert kind.__name__ in messages[0][:60]


def test_weights_are_not_touched_for_a_guider_that_has_no_use_for_them(base, files, prompts, monkeypatch):
    patchings, model = [], patched(base, files["rank"])
    real = type(base).patch_weight_to_device

    def watch(self, key, *args, **kwargs):
        if key in self.patches:
            patchings.append(key)
        return real(self, key, *args, **kwargs)

    monkeypatch.setattr(type(base), "patch_weight_to_device", watch)
    guided_by(InItsOwnWay, model, prompts)
    assert patchings == []


@pytest.mark.parametrize("scale", [1.0, CFG, 9.0])
def test_a_packs_combination_in_place_of_cfgs_gives_the_guided_prediction(base, agd, prompts, monkeypatch, scale):
    def own(model, cond_pred, uncond_pred, cond_scale, x, timestep, model_options={}, cond=None, uncond=None):
        return uncond_pred + scale * (cond_pred - uncond_pred)

    guided = ksampler(agd(), prompts)
    monkeypatch.setattr(comfy.samplers, "cfg_function", own)
    close(ksampler(agd(), prompts), guided)


def test_a_packs_sampling_function_that_takes_its_scale_from_elsewhere(base, agd, prompts, monkeypatch):
    usual, guided = comfy.samplers.sampling_function, ksampler(agd(), prompts, cfg=4.0)

    def own(model, x, timestep, uncond, cond, cond_scale, model_options={}, seed=None):
        return usual(model, x, timestep, uncond, cond, 4.0, model_options, seed)

    monkeypatch.setattr(comfy.samplers, "sampling_function", own)
    close(ksampler(agd(), prompts), guided)


# Other nodes' functions around the combination


def after(model, function):
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(function)
    return clone


def reads_shapes(args):
    unconditional = args["uncond_denoised"]
    assert unconditional.shape == args["denoised"].shape
    assert unconditional.device.type == "cpu"
    return args["denoised"] * 1.0


def perturbs(args):
    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["cond"]], args["input"] * 0.9, args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.1 * (args["cond_denoised"] - other)


@pytest.mark.parametrize("function", [reads_shapes, perturbs])
def test_a_function_without_use_for_the_unconditional_costs_no_second_evaluation(agd, prompts, messages, function):
    assert sum(rows_of(after(agd(), function), ksampler, prompts)) == STEPS * (2 if function is perturbs else 1)
    assert not any(message.startswith("No speed-up") for message in messages)


def rescales(args):
    return args["denoised"] * (args["cond_denoised"].std() / (args["uncond_denoised"].std() + 1))


def catches_exceptions(args):
    try:
        return args["denoised"] + 0.1 * args["uncond_denoised"]
    except Exception:
        return args["denoised"]


class Momentum:
    def __init__(self):
        self.before = None

    def __call__(self, args):
        before, self.before = self.before, args["uncond_denoised"]
        return args["denoised"] if before is None else args["denoised"] + 0.2 * (before - args["uncond_denoised"])


class Average(Momentum):
    """Keeps the mean of all unconditional predictions, from one sampling to the next."""

    def __call__(self, args):
        now = args["uncond_denoised"]
        self.before = now if self.before is None else torch.lerp(self.before, now, 0.5)
        return args["denoised"] + 0.2 * (now - self.before)


def catches_all(args):
    try:
        return args["denoised"] + 0.1 * args["uncond_denoised"]
    except:  # noqa: E722
        return args["denoised"]


def normalises(args):
    added = args["denoised"] - args["cond_denoised"]
    return args["cond_denoised"] + 3 * added / added.norm()


def evaluates_the_negative(args):
    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["uncond"]], args["input"] * 0.9, args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.1 * (args["denoised"] - other)


def compares_norms(args):
    """With the conditional prediction, as CFGNorm does."""
    return args["denoised"] * (args["cond_denoised"].norm() / args["denoised"].norm()).clamp(max=1)


USES = {
    "compares norms": lambda: compares_norms,
    "rescales": lambda: rescales,
    "catches exceptions": lambda: catches_exceptions,
    "catches all": lambda: catches_all,
    "normalises": lambda: normalises,
    "momentum": Momentum,
    "average": Average,
    "evaluates the negative": lambda: evaluates_the_negative,
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_function_that_uses_the_unconditional_prediction_gets_it(base, agd, prompts, messages, name, scale):
    # What it keeps of the first step it was given twice, for the sampling has started again.
    model = agd(guidance_scale=scale)
    close(ksampler(after(model, USES[name]()), prompts), ksampler(after(base, USES[name]()), prompts))
    assert [message[:12] for message in messages] == ["No speed-up:"]


class Rescaling:
    """A node whose function is a method, or an object of its own."""

    def apply(self, args):
        return rescales(args)

    class Function:
        def __call__(self, args):
            return rescales(args)


def rescales_by(how: str, args):
    return rescales(args)


FUNCTIONS = {
    "rescales_by": [partial(rescales_by, "half"), partial(partial(rescales_by), "half")],
    "Rescaling": [Rescaling().apply, Rescaling.Function(), partial(Rescaling().apply), partial(Rescaling.Function())],
}


@pytest.mark.parametrize(("name", "function"), [(name, each) for name, own in FUNCTIONS.items() for each in own])
def test_a_message_names_what_made_the_function(base, files, prompts, messages, name, function):
    ksampler(after(patched(base, files["delta"], notify=messages.receive), function), prompts, steps=1)
    assert [message.partition(".")[0] for message in messages] == [f"No speed-up: {name} needs both predictions"]


def test_a_function_that_precedes_or_replaces_the_combination_has_both(base, agd, prompts, messages):
    def before(model):
        clone = model.clone()
        clone.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0], 0.5 * args["conds_out"][1]])
        return clone

    assert torch.equal(ksampler(before(agd(guidance_scale=3.0)), prompts), ksampler(before(base), prompts))
    assert len(messages) == 1


def test_what_a_node_keeps_in_its_options_stays(agd, prompts):
    seen = []

    def count(args):
        args["model_options"]["times"] = args["model_options"].get("times", 0) + 1
        args["model_options"]["transformer_options"]["times"] = args["model_options"]["times"]
        seen.append(args["model_options"]["transformer_options"]["times"])
        return args["denoised"]

    ksampler(after(agd(), count), prompts)
    assert seen[-STEPS:] == list(range(1, STEPS + 1))


def test_a_prediction_that_is_changed_in_place_is_changed_alone(agd, prompts):
    def changes(args):
        result = perturbs(args)
        args["cond_denoised"].mul_(0)
        return result

    close(ksampler(after(agd(), changes), prompts), ksampler(after(agd(), perturbs), prompts))


def test_what_a_node_has_kept_of_a_guided_sampling_is_a_tensor_like_others(base, agd, prompts):
    kept = Average()
    ksampler(after(agd(), kept), prompts)
    assert kept.before.sum().isfinite()
    assert ksampler(after(base, kept), prompts).isfinite().all()


def test_functions_that_a_node_keeps_in_a_list_of_its_own_stay_as_they_are(base, agd, prompts):
    functions = [perturbs]

    def with_them(model):
        clone = model.clone()

        def sampling(executor, *args, **kwargs):
            executor.class_obj.model_options["sampler_post_cfg_function"] = functions
            return executor(*args, **kwargs)

        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", sampling)
        return clone

    ksampler(with_them(agd()), prompts)
    assert functions == [perturbs]


def test_options_may_be_copied_deeply(agd, prompts):
    def copies(args):
        copy.deepcopy(args["model_options"])
        return args["denoised"]

    close(ksampler(after(agd(), copies), prompts), ksampler(agd(), prompts))


def test_a_function_that_evaluates_the_prompt_in_a_pair_with_nothing_gets_a_guided_prediction(agd, prompts):
    def in_a_pair(args):
        given = args["input"] * 0.9, args["sigma"], args["model_options"]
        other = comfy.samplers.calc_cond_batch(args["model"], [args["cond"], None], *given)[0]
        return args["denoised"] + 0.1 * (args["cond_denoised"] - other)

    close(ksampler(after(agd(), in_a_pair), prompts), ksampler(after(agd(), perturbs), prompts))


def test_a_model_wrapper_that_drops_what_travels_with_a_step(base, agd, prompts, messages):
    def drops(model):
        clone = model.clone()

        def wrapper(apply_model, args):
            kept = {"c_crossattn": args["c"]["c_crossattn"]}
            return apply_model(args["input"], args["timestep"], **kept)

        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    close(ksampler(drops(agd()), prompts), ksampler(drops(base), prompts))
    assert [message[:12] for message in messages] == ["No speed-up:"]


def test_a_wrapper_around_the_evaluation_of_both_has_the_guided_prediction(agd, prompts):
    def twice(executor, *args, **kwargs):
        first, second = executor(*args, **kwargs), executor(*args, **kwargs)
        return [(a + b) / 2 for a, b in zip(first, second, strict=True)]

    model = agd()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", twice)
    close(ksampler(model, prompts), ksampler(agd(), prompts))


# Inside the attention


def couple(model, extra: torch.Tensor, parts: int):
    """Regions in the attention: each positive row `parts` times, and the mean of what comes out."""
    model = model.clone()

    def patch(q, k, v, options):
        rows = len(q) // len(options["cond_or_uncond"])
        out = []
        for chunk in range(len(options["cond_or_uncond"])):
            own = slice(chunk * rows, (chunk + 1) * rows)
            out.append((q[own], k[own], v[own]))
            out += [(q[own], extra.to(k).repeat(rows, 1, 1), extra.to(v).repeat(rows, 1, 1))] * (parts - 1)
        return tuple(torch.cat(each) for each in zip(*out, strict=True))

    def mean(out, options):
        chunks = len(options["cond_or_uncond"])
        return out.unflatten(0, (chunks, parts, -1)).mean(1).flatten(0, 1)

    model.set_model_attn2_patch(patch)
    model.set_model_attn2_output_patch(mean)
    return model


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(("batch", "parts"), [(1, 2), (2, 3), (3, 2)])
def test_rows_that_are_multiplied_in_the_attention(base, agd, prompts, several, where, batch, parts):
    """Each picture with a negative of its own, and the prompt coupled with itself, which is no couple."""
    same = prompts.positive[0][0]
    each = Prompts(prompts.positive, of_rows(*several[:batch]))
    model = agd(couple(base, same, parts)) if where == "before" else couple(agd(), same, parts)
    close(ksampler(model, each, at=latent(batch)), ksampler(agd(), each, at=latent(batch)))


def test_a_couple_of_several_prompts(base, agd, prompts, several):
    both = Prompts(prompts.positive + several[0].positive, prompts.negative)
    coupled = couple(agd(), several[1].positive[0][0], 2)
    alone = [ksampler(coupled, Prompts([own], prompts.negative), at=latent(2), steps=1) for own in both.positive]
    close(ksampler(coupled, both, at=latent(2), steps=1), sum(alone) / 2)


KEYS = (
    "attn_precision",
    "n_heads",
    "dim_head",
    "block",
    "block_index",
    "cond_or_uncond",
    "transformer_index",
    "sigmas",
)


@pytest.mark.parametrize("where", ["before", "after"])
def test_blocks_that_give_patches_fewer_options(base, agd, prompts, where):
    def fewer(q, k, v, options):
        for key in KEYS:
            options.pop(key, None)
        return q, k, v

    def with_fewer(model):
        clone = model.clone()
        clone.set_model_attn2_patch(fewer)
        return clone

    model = agd(with_fewer(base)) if where == "before" else with_fewer(agd())
    assert torch.equal(ksampler(model, prompts), ksampler(agd(), prompts))


def test_blocks_without_a_place_for_patches_are_warned_of(base, files, prompts, messages):
    """A pack's own block, that knows no patches."""
    model = patched(base, files["delta"], notify=messages.receive)
    block = base.model.diffusion_model.middle_block[1].transformer_blocks[0]
    whole = block.forward
    block.forward = lambda x, context=None, transformer_options={}: whole(x, context, {"block": ("none", 0)})
    try:
        ksampler(model, prompts)
    finally:
        del block.forward
    assert [message[:15] for message in messages] == ["Guided in part:"]


# Checked at the loader, changed behind it


def test_another_prediction_behind_the_loader_is_refused(agd, prompts):
    node = nodes_model_advanced.ModelSamplingDiscrete()
    with pytest.raises(AdapterFileError, match="prediction"):
        ksampler(node.patch(agd(), "v_prediction", False)[0], prompts)


@pytest.mark.parametrize("guided", ["adapter", "training-free"])
def test_start_and_end_follow_a_schedule_that_is_set_behind_the_loader(base, files, prompts, guided):
    def half(model):
        if guided == "adapter":
            return patched(model, files["delta"], end_percent=0.5)
        return training_free(model, end_percent=0.5)

    def shifted(model):
        clone = model.clone()
        kind = type("Shifted", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})
        sampling = kind(model.model.model_config)
        sampling.set_sigmas(4 * sampling.sigmas)
        clone.add_object_patch("model_sampling", sampling)
        return clone

    assert torch.equal(ksampler(shifted(half(base)), prompts), ksampler(half(shifted(base)), prompts))


def test_a_dtype_that_is_set_behind_the_loader_holds_the_adapter_or_is_refused(base, files, prompts):
    model = patched(base, files["delta"])
    (adapter,) = model.get_nested_additional_models()
    next(adapter.model.parameters()).data.fill_(1e6)
    with pytest.raises(AdapterFileError, match=r"too large for torch\.float16"):
        ksampler(half_precision(model), prompts)


def half_precision(model):
    clone = model.clone()
    clone.set_model_compute_dtype(torch.float16)
    return clone
