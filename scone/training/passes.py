"""Rows start again with each pass over the text: whoever has seen a text predicts it by heart.

A row that has seen the tokens after its f-gram says them at the second reading; the trunk learns to believe it, and
text that nobody has read gets worse. On the modern trunk, four passes over 20.5 M tokens make four test texts 53 %
worse than plain's (over-encoding: 4.5 times as bad). Fewer f-grams, a tenth of the rate, or half of the matches dropped
leave 2 to 8 %. Rows that start again are 10 % better than plain's, as they are after one pass over as many tokens
(docs/experiments/passes.md). Models of click rates know the same of sparse features, and mend it so (Fan et al., arXiv
2407.01607).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scone.training.optimizer import AdamWWithRows

logger = logging.getLogger(__name__)


class RowPasses:
    """The passes of a run of ``max_steps`` steps, of which ``steps_per_pass`` read all of the text once.

    A rest of less than half a pass belongs to the pass before it: too little would be learned in it.
    """

    def __init__(self, max_steps: int, steps_per_pass: int) -> None:
        self.max_steps = max_steps
        self.steps_per_pass = steps_per_pass
        self.number = max(1, int(max_steps / steps_per_pass + 0.5))

    def begins_at(self, step: int) -> bool:
        """Whether ``step`` is the first of a pass that is not the run's first."""
        return step > 0 and step % self.steps_per_pass == 0 and step // self.steps_per_pass < self.number

    def in_the_run(self, step: int) -> float:
        """Where in the run a step would be that is as far on as ``step`` is in its pass."""
        index = min(step // self.steps_per_pass, self.number - 1)
        first = index * self.steps_per_pass
        end = self.max_steps if index == self.number - 1 else first + self.steps_per_pass
        return (step - first) * self.max_steps / (end - first)


class RowsStartAgain(TrainerCallback):
    """Puts rows and their optimizer's state back to the start where a pass begins, after a resume too."""

    def __init__(self, passes: Callable[[TrainerState], RowPasses]) -> None:
        self.passes = passes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        number = self.passes(state).number
        if number > 1 and state.is_world_process_zero:
            logger.warning("the text is read %d times; the learned rows start again each time", number)

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        if self.passes(state).begins_at(state.global_step):
            own: AdamWWithRows = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            own.start_rows_again()


def once_a_pass(scheduler: LambdaLR, passes: RowPasses) -> None:
    """Have the last group, the rows, go through the run's schedule once in every pass."""
    whole_run = scheduler.lr_lambdas[-1]
    if passes.number > 1:
        # a function: of any other object the state dictionary would want the attributes
        scheduler.lr_lambdas[-1] = lambda step: whole_run(passes.in_the_run(step))  # type: ignore[arg-type]
