"""The states at which an adapter of the toy is compared with its teacher: those on the teacher's own trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass

from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.training.gap import Trajectories, TrajectoryState, follow_teacher

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


def teacher_states(model: ComfyModel, wanted: CaptionTrajectories) -> list[TrajectoryState]:
    """All captions are evaluated at once. Call it outside the denoiser's session."""
    denoiser, encode = model.denoiser, model.text_encoder.encode
    positive = encode(list(wanted.captions))
    negative = encode(list(wanted.negatives) or [""] * len(positive), "negative")
    trajectories = Trajectories(
        denoiser.latent_shape(*wanted.size),
        wanted.omegas,
        wanted.rule,
        wanted.steps,
        wanted.keep,
        wanted.scheduler,
        wanted.seed,
    )
    with denoiser.session():
        return follow_teacher(denoiser, positive, negative, trajectories, batch=len(positive))
