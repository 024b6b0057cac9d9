"""Guidance in one evaluation per step for any model, with nothing trained: prompt and negative take turns.

From step to step both predictions of CFG change a good deal, but mostly together. So their difference is taken where
both sides of it are known, at the step before: what was evaluated there, against the mean of the other prediction
before and after it, in which a steady change cancels. Nothing is fitted, other than in LinearAG (Castillo et al. 2023,
arXiv 2312.12487), which regresses the negative's prediction on earlier ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Of a schedule from 0, pure noise, to 1. Evaluations further apart say too little of each other.
NEAR = 1 / 8


@dataclass
class AlternatingGuidance:
    """Both predictions at the steps of one sampling; `known`: the last one evaluated for the prompt (True) and for the
    negative (False); `delta`: their difference at the step before, `measured` there or estimated.
    """

    position: float = 0.0
    turn: bool = True
    known: dict[bool, torch.Tensor] = field(default_factory=dict)
    delta: torch.Tensor | None = None
    measured: bool = False

    def __call__(
        self, position: float, evaluate: Callable[..., list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(with the prompt, with the negative) at a position of the schedule, one of them estimated.

        `evaluate(True, False)` gives both predictions, `evaluate(turn)` the one; tensors of any one shape. Both are
        evaluated where the step before is too far away, or was never: at the start of a sampling from half the noise,
        in short schedules, and where noise is added again. From pure noise guidance begins at the third step.
        """
        near, self.position = abs(position - self.position) <= NEAR, position
        if not near:
            with_prompt, with_negative = evaluate(True, False)
            self.known = {True: with_prompt, False: with_negative}
            self.delta, self.measured, self.turn = with_prompt - with_negative, True, True
            return with_prompt, with_negative
        turn, self.turn = self.turn, not self.turn
        (now,) = evaluate(turn)
        if turn in self.known and not self.measured:
            delta = torch.lerp(self.known[turn], now, 0.5) - self.known[not turn]
            self.delta = delta if turn else -delta
        self.known[turn], self.measured = now, False
        if self.delta is None:
            return self.known[True], self.known[True]
        return (now, now - self.delta) if turn else (now + self.delta, now)
