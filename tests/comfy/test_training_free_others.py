"""Guidance without training beside other nodes: what they are given is right, or both predictions are evaluated."""

import gc
import weakref

import comfy.model_management
import comfy.samplers
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom

from comfyui_agd.tests.support.runtime import (
    CFG,
    Prompts,
    TinyUNet,
    ksampler,
    latent,
    rows_of,
    since,
    tiny,
    training_free,
)

STEPS, EVALUATED = 12, 6  # steps, and how many of them are evaluated where all can be forecast


pytestmark = pytest.mark.usefixtures("smooth")


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def agd(base, messages):
    return lambda model=base, **options: training_free(model, notify=messages.append, **options)


def after(model, function):
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(function)
    return clone


def evaluated(args, kind: str) -> torch.Tensor:
    given = args["model"], [args[kind]], args["input"], args["sigma"], args["model_options"]
    return comfy.samplers.calc_cond_batch(*given)[0]


# Nodes that use the predictions


def test_a_node_that_compares_the_prompts_prediction_with_an_evaluation_has_this_steps(agd, prompts, messages):
    differences = []

    def compares(args):
        differences.append(float((args["cond_denoised"] - evaluated(args, "cond")).abs().max()))
        return args["denoised"]

    model = after(agd(), compares)
    # Its own in each step, and the prompt's where both are forecast.
    assert sum(rows_of(model, ksampler, prompts, steps=STEPS)) == STEPS + 2 * EVALUATED + (STEPS - EVALUATED)
    assert max(differences) < 1e-4
    assert [message[:38] for message in messages] == ["About 1.5 model evaluations per step: "]


def test_its_guidance_is_the_same_as_without_that_node(agd, prompts):
    model = after(agd(), lambda args: args["denoised"] + 0 * evaluated(args, "cond"))
    assert torch.equal(ksampler(model, prompts, steps=STEPS), ksampler(agd(), prompts, steps=STEPS))


def test_a_node_that_compares_with_the_negatives_has_cfgs_own(base, agd, prompts, messages):
    def compares(args):
        return args["denoised"] + 0.1 * (args["uncond_denoised"] - evaluated(args, "uncond"))

    close = torch.allclose(
        ksampler(after(agd(), compares), prompts, steps=STEPS),
        ksampler(after(base, compares), prompts, steps=STEPS),
        atol=1e-4,
    )
    assert close
    assert [message[:12] for message in messages] == ["No speed-up:"]


def test_a_node_that_declares_that_it_needs_both_has_cfgs_own(base, agd, prompts, messages):
    def with_the_flag(model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
        return clone

    same = torch.equal(ksampler(with_the_flag(agd()), prompts), ksampler(with_the_flag(base), prompts))
    assert same
    assert len(messages) == 1


def test_each_prediction_is_evaluated_in_its_place(agd, prompts):
    """Where other nodes expect it: first the prompt's, second the negative's."""
    seen = []

    def both(executor, model, conds, *args, **kwargs):
        _, _ = out = executor(model, conds, *args, **kwargs)
        return out

    def whose(executor, x, *args, **kwargs):
        seen.extend(kwargs.get("transformer_options", args[-1])["cond_or_uncond"])
        return executor(x, *args, **kwargs)

    model = agd()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", both)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", whose)
    ksampler(model, prompts, steps=STEPS)
    assert seen == [1, 0] * EVALUATED  # as ComfyUI evaluates them together


def test_a_node_that_perturbs_the_model_itself_has_the_prompts_prediction_of_this_step(agd, prompts):
    differences = []

    def compares(args):
        cond, options = args["cond"][0]["model_conds"]["c_crossattn"].cond, args["model_options"]["transformer_options"]
        options = {**options, "cond_or_uncond": [0], "uuids": [], "sigmas": args["sigma"]}
        again = args["model"].apply_model(args["input"], args["sigma"], c_crossattn=cond, transformer_options=options)
        differences.append(float((args["cond_denoised"] - again).abs().max()))
        return args["denoised"]

    ksampler(after(agd(), compares), prompts, steps=STEPS)
    assert max(differences) < 1e-4


@pytest.mark.parametrize("negative", ["none", "of a range"])
def test_where_a_negative_is_nothing_it_is_as_without_the_node(base, agd, prompts, messages, negative):
    ranged = nodes.ConditioningSetTimestepRange().set_range(prompts.negative, 0.5, 1.0)[0]
    given = Prompts(prompts.positive, [] if negative == "none" else ranged)
    assert ksampler(agd(), given, steps=STEPS).isfinite().all()
    assert not any("cache" in message for message in messages)


def test_nothing_is_alive_when_it_is_over(prompts):
    gc.collect()
    gc.disable()
    try:
        own = tiny(TinyUNet())
        reference = weakref.ref(own.model)
        ksampler(training_free(own), prompts, steps=STEPS)
        ksampler(after(training_free(own), lambda args: args["denoised"] + 0 * evaluated(args, "uncond")), prompts)
        comfy.model_management.unload_all_models()
        del own
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["sampler_cfg_function", "post_cfg_function"])
def test_the_difference_is_never_zero(agd, prompts, where):
    norms = []

    def divides(args):
        difference = args["cond_denoised"] - args["uncond_denoised"]
        norms.append(float(difference.norm()))
        out = args["uncond_denoised"] + CFG * difference / difference.norm()
        return args["input"] - out if where == "sampler_cfg_function" else out

    model = agd()
    getattr(model, f"set_model_{where}" if where.startswith("sampler") else f"set_model_sampler_{where}")(divides)
    assert ksampler(model, prompts, steps=STEPS).isfinite().all()
    assert min(norms) > 0


def test_nor_is_what_guidance_adds(agd, prompts):
    norms = []

    def divides(args):
        added = args["denoised"] - args["cond_denoised"]
        norms.append(float(added.norm()))
        return args["cond_denoised"] + added / added.norm()

    assert ksampler(after(agd(), divides), prompts, steps=STEPS).isfinite().all()
    assert min(norms) > 0


def test_what_a_node_keeps_in_its_options_stays(agd, prompts):
    seen = []

    def count(args):
        args["model_options"]["times"] = args["model_options"].get("times", 0) + 1
        seen.append(args["model_options"]["times"])
        return args["denoised"]

    ksampler(after(agd(), count), prompts, steps=STEPS)
    assert seen == list(range(1, STEPS + 1))


# Evaluations that are left out, or asked for in another order


def skipping(model, every: int):
    """A step cache as packs have it: in place of evaluations what the last one of any condition has changed."""
    clone, kept = model.clone(), {"calls": 0}

    def cached(apply_model, args):
        kept["calls"] += 1
        if kept["calls"] % every == 0:
            return args["input"] + kept["change"]
        out = apply_model(args["input"], args["timestep"], **args["c"])
        kept["change"] = out[: len(args["input"])] - args["input"]
        return out

    clone.set_model_unet_function_wrapper(cached)
    return clone


@pytest.mark.parametrize("where", ["before", "after"])
def test_beside_a_cache_both_are_evaluated(base, agd, prompts, messages, where):
    model = agd(skipping(base, 4)) if where == "before" else skipping(agd(), 4)
    assert ksampler(model, prompts, steps=STEPS).isfinite().all()
    assert len(messages) == 1
    assert messages[0].startswith("Nothing is forecast: another node, a step cache,")


def twice(model, change):
    """Whatever asks twice at a noise level: the mean of a prediction and one of latents that were changed."""
    clone = model.clone()

    def predict_noise(executor, x, *args, **kwargs):
        return (executor(x, *args, **kwargs) + change(executor(change(x), *args, **kwargs))) / 2

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", predict_noise)
    return clone


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm())


@pytest.mark.parametrize(
    "change", [lambda x: 0.9 * x, lambda x: x.flip(-1), lambda x: -x], ids=["less", "flipped", "negated"]
)
def test_what_asks_twice_at_a_noise_level_is_near_to_its_own_picture(base, agd, prompts, change):
    own, ours = ksampler(twice(base, change), prompts, steps=20), ksampler(twice(agd(), change), prompts, steps=20)
    # With one history for both times it would be 0.14 off in the first case.
    assert apart(ours, own) < 0.1 * own.norm()


def run(model, prompts, sigmas: list[float]):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(CFG)
    noise, euler = custom.RandomNoise.execute(7).args[0], comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return custom.SamplerCustomAdvanced.execute(noise, guider, euler, torch.tensor(sigmas), latent()).args[0][
            "samples"
        ]


@pytest.mark.parametrize(
    ("sigmas", "evaluated"),
    [
        ([14.0, 14.0, 13.5, 13.5, 13.0, 13.0, 12.5, 12.5, 0.0], 7),
        ([10.0, 9.8, 9.6, 9.9, 9.8, 9.7, 0.0], 5),
        ([10.0, 9.8, 9.6, 9.4, 9.5, 9.3, 0.0], 4),
    ],
    ids=["repeated", "up to where one is known", "up after a forecast"],
)
def test_at_noise_levels_out_of_order_both_are_evaluated(agd, prompts, sigmas, evaluated):
    assert rows_of(agd(), run, prompts, sigmas) == [2] * evaluated


def test_after_conditions_change_on_the_way_nothing_is_forecast_from_those_before(base, agd, prompts):
    model = agd()

    def other_prompt(executor, x, timestep, *args, **kwargs):
        guider = executor.class_obj
        if float(timestep[0]) < 1.0:
            guider.conds["positive"] = [{**cond, "uuid": "another"} for cond in guider.conds["positive"]]
        return executor(x, timestep, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", other_prompt)
    # Of eight steps, and of four with the other prompt.
    assert rows_of(model, ksampler, prompts, steps=STEPS) == [2] * (4 + 3)


# Guiders of other packs


class ScaleOfItsOwn(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options={}, seed=None):
        given = self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], CFG, model_options, seed
        return comfy.samplers.sampling_function(*given)


class InItsOwnWay(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options={}, seed=None):
        conds = [self.conds["negative"], self.conds["positive"]]
        negative, positive = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return negative + CFG * (positive - negative)


class AroundTheWrappers(comfy.samplers.CFGGuider):
    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)


def guided_by(kind: type, model, prompts, cfg: float = CFG):
    guider = kind(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise, euler = custom.RandomNoise.execute(7).args[0], comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent()).args[0]["samples"]


def test_a_guider_that_asks_comfyui_to_combine_has_forecasts(agd, prompts, messages):
    assert sum(rows_of(agd(), lambda model: guided_by(ScaleOfItsOwn, model, prompts))) == 2 * EVALUATED
    assert messages == []


def test_a_guider_that_evaluates_in_its_own_way_has_cfgs_own_and_a_message_says_so(base, agd, prompts, messages):
    assert torch.equal(guided_by(InItsOwnWay, agd(), prompts), guided_by(InItsOwnWay, base, prompts))
    assert messages == ["No speed-up: the guider InItsOwnWay evaluates the prompts in its own way."]


def test_a_scale_that_can_not_be_given_is_warned_of(base, agd, prompts, messages):
    guided_by(AroundTheWrappers, agd(guidance_scale=3.0), prompts)
    assert messages == ["guidance_scale and strength do nothing here: the guider AroundTheWrappers guides by itself."]


def test_another_evaluation_of_both_is_left_in_its_place(base, agd, prompts, messages):
    def both(args):
        given = args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        return comfy.samplers.calc_cond_batch(*given)

    def with_it(model):
        clone = model.clone()
        clone.model_options["sampler_calc_cond_batch_function"] = both
        return clone

    assert torch.equal(ksampler(with_it(agd()), prompts), ksampler(with_it(base), prompts))
    assert [message[:12] for message in messages] == ["No speed-up:"]


def test_beside_easycache_the_picture_is_near_to_its_own(base, agd, prompts, messages):
    since("0.26.0")
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model):
        return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]

    alone = apart(ksampler(agd(), prompts, steps=20), ksampler(base, prompts, steps=20))
    assert apart(ksampler(cached(agd()), prompts, steps=20), ksampler(cached(base), prompts, steps=20)) < 2 * alone
    assert any(message.startswith("Nothing is forecast: another node") for message in messages)
