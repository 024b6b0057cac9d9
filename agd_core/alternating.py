"""Guidance in one evaluation per step for any model, with nothing trained: prompt and negative take turns.

From step to step both predictions of CFG change a good deal, but mostly together. So their difference is taken where
both sides of it are known, at the step before: what was evaluated there, against the mean of the other prediction
before and after it, in which a steady change cancels. Nothing is fitted, other than in LinearAG (Castillo et al. 2023,
arXiv 2312.12487), which regresses the negative's prediction on earlier ones.

A change that is not steady shows: noise that a sampler adds enters the differences of two steps with opposite signs.
Once they point different ways, every second step evaluates both predictions, and those between the prompt's alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

# Of a schedule from 0, pure noise, to 1. Nothing is estimated from evaluations further apart.
NEAR = 1 / 8
# The least cosine between the differences of two steps that agree. Differences of less than this share of the largest
# one are not compared.
AGREES, MATTERS = 0.6, 1 / 16


@dataclass
class AlternatingGuidance:
    """Both predictions at the steps of one sampling. `turn`: whether the prompt (True) or the negative (False) is to be
    evaluated next; `latest`: the prediction evaluated last for each of them; `delta`: their difference at the step
    before, `measured` there or estimated, and None until guidance has begun; `largest`: the largest norm of it;
    `estimates_disagree`: whether those of the last two steps did.
    """

    position: float = 0.0
    turn: bool = True
    latest: dict[bool, torch.Tensor] = field(default_factory=dict)
    delta: torch.Tensor | None = None
    measured: bool = False
    largest: float = 0.0
    estimates_disagree: bool = False

    def copy(self) -> "AlternatingGuidance":
        """One that goes on from here without this one."""
        return replace(self, latest=dict(self.latest))

    def __call__(
        self, position: float, evaluate: Callable[..., list[torch.Tensor]], *, evaluate_both: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(with the prompt, with the negative) at a position of the schedule: (b, ...) each, one of them estimated.

        `evaluate(True, False)` gives both predictions, `evaluate(turn)` the one. Both are evaluated with
        `evaluate_both`, where nothing can be estimated from the steps before; where the step before is too far away, or
        there was none: at the start of a sampling from half the noise, in short schedules, and where noise is added
        again; and at every second step where estimates disagree. From pure noise guidance begins at the third step, or
        with steps far apart at the second.
        """
        near, self.position = abs(position - self.position) <= NEAR, position
        if evaluate_both or not near or (self.estimates_disagree and not self.measured):
            return self._measure(*evaluate(True, False))
        turn = self.turn
        (now,) = evaluate(turn)
        if turn in self.latest and not self.measured:
            delta = torch.lerp(self.latest[turn], now, 0.5) - self.latest[not turn]
            delta = delta if turn else -delta
            self.estimates_disagree = not self._agrees(delta)
            if self.estimates_disagree:
                (other,) = evaluate(not turn)
                return self._measure(now, other) if turn else self._measure(other, now)
            self.delta = delta
        self.latest[turn], self.turn, self.measured = now, not turn, False
        if self.delta is None:
            return self.latest[True], self.latest[True]
        return (now, now - self.delta) if turn else (now + self.delta, now)

    def _measure(self, with_prompt: torch.Tensor, with_negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.latest = {True: with_prompt, False: with_negative}
        self.delta, self.measured, self.turn = with_prompt - with_negative, True, True
        return with_prompt, with_negative

    def _agrees(self, delta: torch.Tensor) -> bool:
        """Whether a new estimate points where the one before does."""
        new = delta.float().flatten(1)
        norm = new.norm().item()
        self.largest = max(self.largest, norm)
        if self.delta is None or norm < MATTERS * self.largest:
            return True
        return torch.cosine_similarity(new, self.delta.float().flatten(1), dim=1).mean().item() >= AGREES
