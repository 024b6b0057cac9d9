"""What the user is told of a sampling: every warning's sentence, and how it is sent.

The first sentence is what the user gets ("No speed-up", "No guidance"), in about 60 characters, because a node may show
no more than that.
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


KNOWN_BY_STRUCTURE = "Unknown model family: only its linear layers are changed. They were found by what they look like."

# Why adapters can't guide a sampling


def needs_both(name: str) -> str:
    return f"{name} needs both predictions"


def combines_otherwise(guider: str) -> str:
    return f"{guider} combines predictions in its own way"


NO_PLACE_FOR_ADAPTERS = "another node leaves no place for adapters"

# Adapters


def unguided_because(reason: str) -> str:
    return (
        f"No speed-up: {reason}. The adapter is bypassed: every step takes two model evaluations with the model's own "
        "cfg, as without this node. Remove what is named to use the adapter."
    )


def adapters_not_used(guider: str) -> str:
    return (
        f"The adapter is bypassed: {guider} guides by itself. It evaluates or combines the prompts in its own way; the "
        "picture is the model's own, as without this node."
    )


NO_NEGATIVE_FOR_UNTRAINED = (
    "No guidance: the workflow has no negative prompt. Guidance without training needs one; an empty text is enough."
)


def omega_outside_range(omega: float, low: float, high: float) -> str:
    return f"Guidance scale {omega:g} is outside the adapter's range, {low:g} to {high:g}."


def latent_size_far_from_trained(height: int, width: int, trained: Sequence[tuple[int, int]]) -> str:
    """Sizes are (h, w)."""
    sizes = ", ".join(f"{w}x{h}" for h, w in trained)
    return f"Far from the trained size: latent {width}x{height}, trained at {sizes}."


def negative_has_no_effect(unconditional: str) -> str:
    return f"The adapter ignores the negative prompt: it has learned guidance away from the {unconditional}."


NEGATIVES_UNPLACED = (
    "Masks of negatives are ignored: each counts everywhere. The model's image tokens are not those "
    "of the picture alone, because of pictures to edit, guiding frames or another node."
)


def strengths_add_up(adapters: int) -> str:
    return (
        f"Too much guidance: that of {adapters} adapters adds up. Give them strengths that sum up to 1, or parts of "
        "the sampling that don't overlap."
    )


def layers_skipped(skipped: int, layers: int) -> str:
    return (
        f"Guided in part: {skipped} of {layers} attention layers were skipped. Another node skips or replaces them, "
        "and leaves no place for adapters."
    )


UNCOMPILED_FOR_HOOKS = (
    "Runs uncompiled: torch.compile can't take this adapter. It doesn't see what adapters of this kind do inside the "
    "model's layers."
)
UNCOMPILED_FOR_GRAPH_BREAKS = (
    "Runs uncompiled: torch.compile can't take this model. It breaks it into several graphs, in which patches don't "
    "work rightly."
)
UNCOMPILED_FOR_REPLACED_PARTS = (
    "Runs uncompiled: use the core node TorchCompileModel. Another node has put compiled parts in the model's place, "
    "which adapters can't reach."
)
ONE_GPU = "Runs on one GPU: MultiGPU CFG Split has nothing to share out. A step with an adapter is a single evaluation."
UNCOMPILED_FOR_TOO_MANY_GRAPHS = (
    "Runs uncompiled: restart ComfyUI to compile again. torch.compile has made as many graphs for other sizes and "
    "adapters as it may."
)

# Forecasts

STEP_CACHE = (
    "Nothing is forecast: another node, a step cache, is in use. It leaves out evaluations by itself, and forecasts "
    "from what it keeps would be wrong. Use one or the other."
)

# training-free


def evaluation_replaced(name: str) -> str:
    return f"No speed-up: {name} evaluates predictions in its own way."


def prompts_evaluated_otherwise(guider: str) -> str:
    return f"No speed-up: {guider} evaluates the prompts in its own way."


NO_NEGATIVE_FOR_TRAINING_FREE = (
    "No guidance: the workflow has no negative prompt. 'training-free' needs one; an empty text is enough."
)


def scale_not_taken(guider: str) -> str:
    return f"guidance_scale and strength do nothing here: {guider} guides by itself."


def needs_both_in_every_step(name: str) -> str:
    return f"No speed-up: {name} needs both predictions each step."


def compares_with_prompt(name: str) -> str:
    return f"About 1.5 model evaluations per step: {name} has its own to compare with the prompt's."


def compares_with_own_evaluations(name: str) -> str:
    return f"No speed-up: {name} compares predictions with evaluations of its own."


def few_forecasts(per_step: float) -> str:
    return (
        f"Little speed-up: {per_step:.1f} model evaluations per step. With so few steps, or with this sampler, steps "
        "tell too little of the next ones."
    )
