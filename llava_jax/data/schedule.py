"""Which rows each step of a run holds, epoch after epoch: arithmetic on the plans, nothing is read.

Dims: R rows of a step.
"""

import dataclasses

import numpy as np

from llava_jax.data.dataset import Dataset
from llava_jax.data.packing import Plan


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows each step holds, epoch after epoch. An epoch's last step ends in empty rows."""

    plans: tuple[Plan, ...]
    rows_per_step: int

    def __len__(self) -> int:
        return sum(map(self._steps, self.plans))

    def _steps(self, plan: Plan) -> int:
        return -(-len(plan) // self.rows_per_step)

    def epoch(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's number in it."""
        if not 0 <= step < len(self):
            raise ValueError(f"got step {step}, expected 0 to {len(self) - 1}")
        for epoch, plan in enumerate(self.plans):
            if step < self._steps(plan):
                return epoch, step
            step -= self._steps(plan)
        raise AssertionError("len() counts the same steps")

    def examples(self, step: int, place: int) -> np.ndarray:
        """What the step's row at `place` holds, as examples of the dataset."""
        epoch, number = self.epoch(step)
        row = number * self.rows_per_step + place
        return self.plans[epoch][row] if row < len(self.plans[epoch]) else np.zeros(0, np.int32)


def schedule(dataset: Dataset, *, multiple: int = 1) -> Schedule:
    """Steps that hold batch.conversations on average, in a multiple of `multiple` rows."""
    if multiple < 1:
        raise ValueError(f"got rows in multiples of {multiple}, expected 1 or more")
    plans = tuple(dataset.plan(epoch) for epoch in range(dataset.config.epochs))
    wanted = dataset.config.batch.conversations
    if dataset.config.batch.pack:
        wanted *= len(plans[0]) / len(dataset)
    elif wanted % multiple:
        raise ValueError(
            f"got config.batch.conversations = {wanted}, one a row, for {multiple} devices that "
            "rows are split over, expected a multiple of them"
        )
    # Of a data set smaller than a step, empty rows alone would be added.
    most = -(-len(plans[0]) // multiple)
    return Schedule(plans, multiple * min(most, max(1, round(wanted / multiple))))
