"""How a node guides a MODEL: the values of its widgets."""

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

from .schedule import SigmaSpan


@dataclass(frozen=True)
class GuidanceSettings:
    """`guidance_scale` None takes omega from the sampler's cfg; `strength` multiplies the guidance; the steps between
    `start_percent` and `end_percent` of the schedule are guided, the others are the model's own; `forecast`: steps that
    follow from those before them aren't evaluated."""

    guidance_scale: float | None = None
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    forecast: bool = False

    @property
    def has_effect(self) -> bool:
        return self.strength != 0 and self.start_percent < self.end_percent

    def span_for(self, model: ModelPatcher) -> SigmaSpan:
        """The noise levels that are guided, by the model's schedule as it is now."""
        return SigmaSpan.between(model.get_model_object("model_sampling"), self.start_percent, self.end_percent)
