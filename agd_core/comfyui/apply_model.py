"""Evaluations of a model that are guided by adapters, for sampling and for training alike.

Without a step an evaluation passes through untouched. What it needs travels with it, so that nothing stays behind.
"""

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from .backbones import backbone_of
from .guided_step import KEY, CurrentStep
from .prompt_keys_values import compute_keys_values
from .sampling.compile_guard import in_one_graph


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """APPLY_MODEL wrapper, through which the evaluations of every family come."""
    given = (x, t, c_concat, c_crossattn, control, transformer_options)
    current: CurrentStep | None = transformer_options.get(KEY)
    if current is None or current.step is None:
        if current is not None:
            current.on_unguided_evaluation()
        return executor(*given, **kwargs)
    step = current.step.for_rows(x, transformer_options)
    step.visited.clear()
    backbone = backbone_of(executor.class_obj)
    for prompt in (*step.negatives(), *(step.prompts.values() if backbone.prompts_pass_blocks else ())):
        if prompt.lacks(step.guided_layers()):
            compute_keys_values(prompt, executor.class_obj, x, step)
    step.bring_mean_tokens(x.device)
    with (
        in_one_graph(transformer_options, step.visited_all_layers),
        backbone.intercept(step) as more,
    ):
        return executor(*given, **{**kwargs, **more})


def register(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put the wrappers into `model`, which the caller has cloned, unless they are there."""
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        wrappers = {WrappersMP.APPLY_MODEL: apply_model, **backbone_of(model.model).wrappers}
        for kind, wrapper in wrappers.items():
            model.add_wrapper_with_key(kind, KEY, wrapper)
