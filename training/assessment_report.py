"""What was measured of an adapter, and what it means to the user."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image

from ..agd_core.text import one_line
from .estimate import Estimate, ratio

METHODS = ("unguided", "guided", "agd")
FITS, FITS_PARTLY = 0.8, 0.5  # shares of the gap closed in training that are kept elsewhere
_SURE = 2  # standard errors more or less that must not change a verdict
_VERDICTS = {"yes": "fits", "partly": "fits partly", "no": "does not fit"}
_UNSURE_VERDICTS = {"yes": "seems to fit", "partly": "seems to fit partly", "no": "seems not to fit"}


@dataclass(frozen=True)
class SigmaResult:
    """What was measured at one noise level."""

    sigma: float
    gap_closed: Estimate
    direction_cosine: Estimate

    def __str__(self) -> str:
        return f"{self.sigma:.2f}: {self.gap_closed.value:.2f}, {self.direction_cosine.value:.2f}"


@dataclass(frozen=True)
class OmegaResult:
    """How near the adapter comes to its teacher at one omega.

    `distance`: RMS difference of AGD's final latents to the teacher's, from equal noise, over that of the unguided
    ones: 0 is the teacher itself, 1 no nearer than without guidance.
    """

    gap_closed: Estimate
    direction_cosine: Estimate
    by_sigma: list[SigmaResult]
    distance: Estimate


@dataclass(frozen=True)
class Cost:
    seconds_per_image: Estimate
    evaluations_per_step: float


@dataclass(frozen=True)
class Transfer:
    """How much of the gap closed that the adapter's own training `reported` is `kept` here.

    `reported` and `gap_closed`, what was measured here, are means over the omegas; of a training without held-out
    prompts nothing is reported, and of one of an earlier version no standard error.
    """

    same_weights: bool | None
    gap_closed: Estimate
    reported: Estimate | None

    @property
    def kept(self) -> Estimate | None:
        """Its standard error counts both measurements: None where either is without."""
        return ratio(self.gap_closed, self._whole) if self._whole else None

    @property
    def kept_se_here(self) -> float | None:
        """The standard error of `kept` if what the training reported were exact."""
        return ratio(self.gap_closed, Estimate(self._whole.value, 0.0)).se if self._whole else None

    @property
    def _whole(self) -> Estimate | None:
        """What is `reported`, if a share of it can be kept."""
        return self.reported if self.reported is not None and self.reported.value > 0 else None

    @property
    def fits(self) -> str:
        """One of "yes", "partly", "no" and "unknown"."""
        return self._fits_with(self.gap_closed.value)

    def _fits_with(self, gap_closed: float) -> str:
        if gap_closed <= 0:
            return "no"
        if self._whole is None or not math.isfinite(gap_closed):
            return "unknown"
        kept = gap_closed / self._whole.value
        return "yes" if kept >= FITS else "partly" if kept >= FITS_PARTLY else "no"

    @property
    def is_sure(self) -> bool:
        """Whether `fits` would be the same with two standard errors more or less, as far as they are known."""
        error, here = self._known_error(), self.gap_closed.value
        if error is None or self.fits == "unknown":
            return False
        return {self._fits_with(here - _SURE * error), self._fits_with(here + _SURE * error)} == {self.fits}

    def _known_error(self) -> float | None:
        """Of the gap closed here, with that of what it is compared with."""
        if self.kept is None or self.kept.se is None or self._whole is None:
            return self.gap_closed.se
        return self.kept.se * self._whole.value

    def verdict(self) -> str:
        """For people: how well it fits, and what to do where it doesn't or where that isn't sure."""
        if not math.isfinite(self.gap_closed.value):
            return (
                "How well it fits can't be told: predictions with the adapter aren't finite numbers here. If the model "
                "runs in fp16, try bf16 or fp32."
            )
        if self.fits == "unknown":
            return "How well it fits can't be told: no gap closed in a training of its own is reported."
        found = "no gap is closed here" if self.kept is None else self._share(self.kept)
        if not self.is_sure:
            return f"It {_UNSURE_VERDICTS[self.fits]}: {found}; that is not sure, evaluate more images."
        if self.fits == "yes":
            return f"It fits: {found}."
        remedy = "train one for this checkpoint, which can start from this one (`agd train --start`)"
        if self.same_weights:
            remedy = "it is of this checkpoint, so prompts, size or LoRAs are unlike its training's"
        return f"It {_VERDICTS[self.fits]}: {found}; {remedy}."

    def _share(self, kept: Estimate) -> str:
        error, here = "", self.kept_se_here
        if kept.se is not None:
            error = f" (± {kept.se:.0%})"
        elif here is not None:
            error = f" (± {here:.0%} of this measurement; how sure its training's is, the file doesn't say)"
        return f"{max(0.0, kept.value):.0%}{error} of the gap closed in its own training is kept here"


@dataclass(frozen=True)
class Assessment:
    """All that was measured. `teacher`: the guidance that the adapter learnt; `latent`: (height, width), `frames`: of
    a video's; `speedup`: how many times as fast as the teacher the adapter is."""

    adapter: str
    base: str
    teacher: str
    images: int
    prompts: int
    steps: int
    latent: tuple[int, ...]
    frames: int
    by_omega: dict[float, OmegaResult]
    costs: dict[str, Cost]
    speedup: Estimate
    transfer: Transfer
    notes: list[str]
    picture: Image.Image

    @property
    def gap_closed(self) -> float:
        """The mean over the omegas."""
        return self.transfer.gap_closed.value

    def report(self) -> str:
        """A page for people. The result comes first: ComfyUI's classic canvas shows about 60 characters of it."""
        height, width = self.latent
        known = {True: ", the checkpoint that it was trained on", False: ", other weights than those of its training"}
        weights = "" if self.transfer.same_weights is None else known[self.transfer.same_weights]
        lines = [
            f"Gap closed {self.transfer.gap_closed}; {self.speedup.text(2)} times as fast as {self.teacher}.",
            f"Adapter {self.adapter} on {self.base}{weights}.",
            f"{self.images} images of {self.prompts} prompts, latents of {width}x{height}"
            f"{f' and {self.frames} frames' if self.frames > 1 else ''}, {self.steps} Euler steps; "
            "± is the standard error over images.",
            "",
        ]
        for omega, found in self.by_omega.items():
            lines.append(
                f"cfg {omega:g}: gap closed {found.gap_closed}, direction cosine {found.direction_cosine}, distance to "
                f"{self.teacher} {found.distance}"
            )
            lines.append(f"  gap closed, cosine by noise level  {'   '.join(map(str, found.by_sigma))}")
        lines += [f"(gap closed: 0 is no guidance, 1 is {self.teacher} itself; distance: the other way round)", ""]
        for method, name in zip(METHODS, ("unguided", self.teacher, "AGD"), strict=True):
            cost = self.costs[method]
            per_step = f"{cost.evaluations_per_step:.2f} model evaluations per step"
            lines.append(f"{name}: {cost.seconds_per_image} seconds per image, {per_step}")
        lines += ["", self.transfer.verdict()]
        lines += [f"Note: {note}" for note in self.notes]
        return "".join(f"{one_line(line)}\n" for line in lines)

    def as_json(self) -> dict:
        """Everything but the picture; what is no finite number is None, for JSON has no such numbers."""
        transfer = self.transfer
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "picture"}
        data["by_omega"] = {f"{omega:g}": asdict(found) for omega, found in self.by_omega.items()}
        data["costs"] = {method: asdict(cost) for method, cost in self.costs.items()}
        data["speedup"] = asdict(self.speedup)
        data["transfer"] = asdict(transfer) | {
            "kept": asdict(transfer.kept) if transfer.kept else None,
            "kept_se_here": transfer.kept_se_here,
            "fits": transfer.fits,
            "sure": transfer.is_sure,
            "verdict": transfer.verdict(),
        }
        return _finite(data)


def _finite(data: Any) -> Any:
    """JSON data with None in place of NaN and infinity."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
