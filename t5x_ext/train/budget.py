"""A budget other than updates: a run ends with the update that reaches it, and is evaluated there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax

from t5x_ext.contracts import UserError
from t5x_ext.train.loop import Hook, Loop


class Spent(NamedTuple):
    """What a run has used, over all its restarts; JSON in `results.json`."""

    target_tokens: float = 0.0  # labels that a loss was computed of
    model_flops: float = 0.0  # operations of the model, forward and backward
    seconds: float = 0.0  # computing updates and waiting for their data


def spent_by(loop: Loop) -> Spent:
    """What the finished updates of a loop have used; an update in flight is not counted."""
    seconds = loop.clock.seconds
    return Spent(
        loop.memory.target_tokens, loop.memory.model_flops, seconds.get("data", 0.0) + seconds.get("step", 0.0)
    )


@dataclass(frozen=True)
class Budget:
    """The most that a run may use beside `Run.steps`; the first limit that is reached ends it.

    Attributes:
      target_tokens: labels.
      model_flops: floating point operations of the model, forward and backward, as the log counts them.
      seconds: of computing updates and waiting for data, not of compiling, evaluating or saving, nor of updates that a
        crash has lost. How many updates that is depends on the machine and its load.

    Raises:
      UserError: if no limit is set, or one is not positive.
    """

    target_tokens: float | None = None
    model_flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in self.limits if limit is not None]
        if not limits:
            raise UserError("Budget: no limit is set; give target_tokens, model_flops or seconds")
        if min(limits) <= 0:
            raise UserError(f"Budget: a limit is {min(limits):g}; it must be more than 0")

    @property
    def limits(self) -> tuple[float | None, ...]:
        """In the order of `Spent`."""
        return self.target_tokens, self.model_flops, self.seconds

    def reached(self, spent: Spent) -> str | None:
        """The first limit that is reached, in words; None if none is."""
        for name, used, limit in zip(Spent._fields, spent, self.limits):
            if limit is not None and used >= limit:
                return f"{used:,.4g} of {limit:,.4g} {name} are used"
        return None


class StopAtBudget(Hook):
    """Ends the loop after the update that reaches the budget; it must come before `Evaluate`, which measures it then.

    What counts is in the loop's memory and clock, which checkpoints keep: a run that was killed and resumed ends with
    the same update (of a budget in seconds: after as many seconds). The hook waits for each update before the next is
    dispatched, so that none is made beyond the budget.
    """

    def __init__(self, budget: Budget):
        """Raises UserError for a budget of seconds where several processes would have to agree on the time."""
        if budget.seconds is not None and jax.process_count() > 1:
            raise UserError("Budget.seconds is for one process; give target_tokens or model_flops to several")
        self._budget = budget

    def after_step(self, loop: Loop) -> None:
        """Asks the loop to stop once the budget is reached."""
        loop.settle()
        reason = self._budget.reached(spent_by(loop))
        if reason is None:
            return
        if loop.interrupted:
            # A signal came with the last update: what is left to do when the run is resumed is its evaluation.
            loop.memory.evaluation_owed = loop.step
        else:
            loop.stop = reason
