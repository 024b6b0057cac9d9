"""The scale by which both predictions are combined, which an adapter needs before the combination shows it."""

from dataclasses import dataclass
from typing import Any

from comfy.samplers import CFGGuider

from .guider import OverriddenCfg, as_scale


@dataclass
class ScaleCheck:
    """The scale is expected to be the guider's cfg, and compared with the combination's, which ComfyUI gives to a
    `sampler_pre_cfg_function`. If that is another, it is expected from then on.

    `overridden`: by the cfg of an adapter with a scale of its own; `expected`: the scale of the last
    prediction's combination, None where the cfg isn't one number; `assumed`: the same without that override, for
    adapters that follow the sampler's cfg; `unknown`: whether that was needed; `observed`: the scale of a combination
    that wasn't the expected one; `pending`: whether the combination of the last prediction is still to come.
    """

    guider: CFGGuider
    overridden: OverriddenCfg
    expected: float | None = None
    assumed: float | None = None
    unknown: bool = False
    observed: float | None = None
    pending: bool = False

    def assume(self, conds: list[list[dict] | None]) -> None:
        """For a prediction of these conditions."""
        cfg = as_scale(self.guider.cfg)
        if conds[1] is None and self.guider.conds.get("negative"):
            self.expected = 1.0  # at which ComfyUI leaves out the other
        else:
            self.expected = cfg if self.observed is None else self.observed
        replaced = self.overridden.replaced
        self.assumed = replaced if replaced is not None and self.expected == cfg else self.expected

    def differs(self, cond_scale: Any) -> bool:
        """Whether a combination is by another scale than the expected one, which the next predictions are for then."""
        scale, pending, self.pending = as_scale(cond_scale), self.pending, False
        if not pending or scale in (None, self.expected):
            return False
        self.observed = scale
        return True

    def was_missed(self) -> bool:
        """Called when the last prediction should have been combined: whether no combination by ComfyUI was seen."""
        missed = self.pending and not self.unknown
        self.pending = self.pending and not missed
        return missed
