"""What the user is told of a sampling: every warning's sentence, and how it is sent.

Warnings begin with what the user gets ("No speed-up", "Unguided"), because a node shows little more than that.
"""

from collections.abc import Callable, Sequence

from ...text import logger

log = logger(__name__)

Notify = Callable[[str], None]


def log_warning(message: str) -> None:
    log.warning("AGD: %s", message)


def without_repeats(notify: Notify) -> Notify:
    """`notify`, which is given each message once only."""
    sent = set()

    def send(message: str) -> None:
        if message not in sent:
            sent.add(message)
            notify(message)

    return send


KNOWN_BY_STRUCTURE = (
    "This kind of model isn't known to AGD: the linear layers of its blocks were found by what they look like, and "
    "nothing else of it is changed."
)

# Why adapters can't guide a sampling


def needs_both(name: str) -> str:
    return f"{name} needs both predictions"


def combines_otherwise(guider: str) -> str:
    return f"{guider} combines predictions in its own way"


NO_PLACE_FOR_ADAPTERS = "another node evaluates the model without a place for adapters"

# Adapters


def unguided_because(reason: str) -> str:
    return (
        f"No speed-up: {reason}. Every step takes two evaluations, with the model's own cfg instead "
        "of the adapter, as without this node. For one, do without what is named."
    )


def adapters_not_used(guider: str) -> str:
    return (
        f"Not used in this sampling: {guider} evaluates the prompts, or combines them, in "
        "its own way. The picture is the model's own, as without this node."
    )


NO_NEGATIVE_FOR_UNTRAINED = (
    "Unguided: guidance without training needs a negative prompt, and this workflow gives none. An empty "
    "text as the negative prompt is enough."
)


def omega_outside_range(omega: float, low: float, high: float) -> str:
    return f"Guidance {omega:g} lies outside the adapter's trained range, {low:g} to {high:g}."


def latent_size_far_from_trained(height: int, width: int, trained: Sequence[tuple[int, int]]) -> str:
    """Sizes are (h, w)."""
    sizes = ", ".join(f"{w}x{h}" for h, w in trained)
    return f"Latent {width}x{height} is far from what the adapter was trained at, {sizes}."


def negative_has_no_effect(unconditional: str) -> str:
    return f"The negative prompt has no effect with this adapter: it learned guidance away from the {unconditional}."


def strengths_add_up(adapters: int) -> str:
    return (
        f"The guidance of {adapters} adapters adds up in the same step; give them strengths that sum up to "
        "1, or parts of the sampling that don't overlap."
    )


def layers_skipped(skipped: int, layers: int) -> str:
    return (
        f"Guided in part: {skipped} of {layers} attention layers were skipped, or replaced by "
        "another node in a way that leaves no place for adapters."
    )


UNCOMPILED_FOR_HOOKS = "Runs uncompiled: torch.compile doesn't see what this adapter does inside the model's layers."
UNCOMPILED_FOR_GRAPH_BREAKS = (
    "Runs uncompiled: torch.compile breaks this model into several graphs, in which patches don't work rightly."
)
UNCOMPILED_FOR_REPLACED_PARTS = (
    "Runs uncompiled: a node has put compiled parts in the model's place, which adapters can't reach. The core node "
    "TorchCompileModel works with them."
)
UNCOMPILED_FOR_TOO_MANY_GRAPHS = (
    "Runs uncompiled: torch.compile has made as many graphs for other sizes and adapters as it may; a restart of "
    "ComfyUI clears them."
)

# training-free


def evaluation_replaced(name: str) -> str:
    return f"No speed-up: {name} evaluates both predictions in its own way."


def prompts_evaluated_otherwise(guider: str) -> str:
    return f"No speed-up: {guider} evaluates the prompts in its own way."


NO_NEGATIVE_FOR_TRAINING_FREE = (
    "Unguided: training-free guidance needs a negative prompt, and this workflow gives none. An empty text "
    "as the negative prompt is enough."
)


def scale_not_taken(guider: str) -> str:
    return f"Guidance is {guider}'s own: it doesn't take another scale or strength."


def needs_both_evaluated(name: str) -> str:
    return f"No speed-up: {name} needs both predictions evaluated in every step."


def needs_both_in_every_step(name: str) -> str:
    return f"No speed-up: {name} needs both predictions in every step."


STEP_CACHE = (
    "No speed-up: another node, a step cache, leaves out evaluations. With one of them, both predictions "
    "are evaluated in every step; use one or the other."
)


def compares_with_prompt(name: str) -> str:
    return f"About 1.5 evaluations per step: {name} compares the prompt's with one of its own."


def compares_with_own_evaluations(name: str) -> str:
    return f"No speed-up: {name} compares predictions with evaluations of its own."


def few_forecasts(per_step: float) -> str:
    return (
        f"{per_step:.1f} evaluations per step: with so few steps, or with this sampler, steps tell too little of the "
        "next ones."
    )
