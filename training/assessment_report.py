"""What was measured of an adapter, and what it means to the user."""

from dataclasses import asdict, dataclass, fields

from PIL import Image

from ..agd_core.text import one_line

METHODS = ("unguided", "guided", "agd")
FITS, FITS_PARTLY = 0.8, 0.5  # shares of the gap closed in training that are kept elsewhere


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error over the images; None where they are too few to tell."""

    value: float
    se: float | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.se is None else f" ± {self.se:.3f}")


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
    prompts nothing is reported.
    """

    same_weights: bool | None
    gap_closed: Estimate
    reported: float | None

    @property
    def kept(self) -> Estimate | None:
        if self.reported is None or self.reported <= 0:
            return None
        here = self.gap_closed
        return Estimate(here.value / self.reported, None if here.se is None else here.se / self.reported)

    @property
    def fits(self) -> str:
        """One of "yes", "partly", "no" and "unknown"."""
        if self.gap_closed.value <= 0:
            return "no"
        if self.kept is None:
            return "unknown"
        return "yes" if self.kept.value >= FITS else "partly" if self.kept.value >= FITS_PARTLY else "no"

    def verdict(self) -> str:
        """For people: how well it fits, and what to do where it doesn't."""
        if self.fits == "unknown":
            return "How well it fits can't be told: no gap closed in a training of its own is reported."
        if self.kept is None:
            found = "no gap is closed here"
        else:
            error = "" if self.kept.se is None else f" (± {self.kept.se:.0%})"
            found = f"{max(0.0, self.kept.value):.0%}{error} of the gap closed in its own training is kept here"
        if self.fits == "yes":
            return f"It fits: {found}."
        remedy = "train one for this checkpoint, which can start from this one (`agd train --start`)"
        if self.same_weights:
            remedy = "it is of this checkpoint, so prompts, size or LoRAs are unlike its training's, or too few to tell"
        return f"{'It fits partly' if self.fits == 'partly' else 'It does not fit'}: {found}; {remedy}."


@dataclass(frozen=True)
class Assessment:
    """All that was measured. `teacher`: the guidance that the adapter learnt; `latent`: (height, width)."""

    adapter: str
    base: str
    teacher: str
    images: int
    prompts: int
    steps: int
    latent: tuple[int, ...]
    by_omega: dict[float, OmegaResult]
    costs: dict[str, Cost]
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
        ratio = self.costs["guided"].seconds_per_image.value / self.costs["agd"].seconds_per_image.value
        known = {True: ", the checkpoint that it was trained on", False: ", other weights than those of its training"}
        weights = "" if self.transfer.same_weights is None else known[self.transfer.same_weights]
        lines = [
            f"Gap closed {self.transfer.gap_closed}; {ratio:.2f} times as fast as {self.teacher}.",
            f"Adapter {self.adapter} on {self.base}{weights}.",
            f"{self.images} images of {self.prompts} prompts, latents of {width}x{height}, {self.steps} Euler steps; "
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
        """Everything but the picture."""
        transfer = self.transfer
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "picture"}
        data["by_omega"] = {f"{omega:g}": asdict(found) for omega, found in self.by_omega.items()}
        data["costs"] = {method: asdict(cost) for method, cost in self.costs.items()}
        data["transfer"] = asdict(transfer) | {
            "kept": asdict(transfer.kept) if transfer.kept else None,
            "fits": transfer.fits,
            "verdict": transfer.verdict(),
        }
        return data
