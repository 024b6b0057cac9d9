"""The states at which an adapter of the toy is compared with its teacher: those on the teacher's own trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass

from comfyui_agd.agd_core.comfyui.model.host import ComfyHost
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.training.evaluate import State, follow_teacher

from .sampling import SCHEDULER, STEPS
from .scenes import IMAGE_SIZE

CFG = GuidanceRule()


@dataclass(frozen=True)
class CaptionTrajectories:
    """A trajectory for each of `captions` and `omegas`, away from a negative prompt each, by default the empty one.

    `keep`: how many of its `steps` are measured at, all by default; `size`: width and height in pixels.
    """

    captions: Sequence[str]
    omegas: Sequence[float]
    seed: int = 1
    negatives: Sequence[str] = ()
    rule: GuidanceRule = CFG
    scheduler: str = SCHEDULER
    steps: int = STEPS
    keep: int | None = None
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)


def teacher_states(host: ComfyHost, wanted: CaptionTrajectories) -> list[State]:
    """All captions are evaluated at once. Call it outside the host's session."""
    positive = host.encode(list(wanted.captions))
    negative = host.encode(list(wanted.negatives) or [""] * len(positive), "negative")
    with host.session():
        return follow_teacher(
            host,
            positive,
            negative,
            host.latent_shape(*wanted.size),
            wanted.omegas,
            rule=wanted.rule,
            steps=wanted.steps,
            keep=wanted.keep,
            scheduler=wanted.scheduler,
            seed=wanted.seed,
            batch=len(positive),
        )
