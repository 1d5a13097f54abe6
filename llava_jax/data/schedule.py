"""Which rows each step of a run holds, epoch after epoch: arithmetic on the plans, nothing is read.

Dims: R rows of a step.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from llava_jax import config as configs
from llava_jax.data import packing
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

    def step(self, step: int) -> np.ndarray:
        """All examples of a step, row by row: of the whole step, whoever reads which part."""
        rows = [self.examples(step, place) for place in range(self.rows_per_step)]
        return np.concatenate(rows)


def schedule(
    dataset: Dataset, *, multiple: int = 1, rows: int = 0, plans: Sequence[Plan] = ()
) -> Schedule:
    """Steps that hold batch.conversations on average, in a multiple of `multiple` rows.

    rows: of a step, as a run that goes on has them. plans: of each epoch, where they are known.
    """
    if multiple < 1:
        raise ValueError(f"got rows in multiples of {multiple}, expected 1 or more")
    plans = tuple(plans) or tuple(dataset.plan(epoch) for epoch in range(dataset.config.epochs))
    if rows:
        if rows % multiple:
            fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            raise ValueError(
                f"this run has {rows} rows a step, got {multiple} parts that they are cut into "
                f"(devices × config.compute.parts), expected one of {fits}"
            )
        return Schedule(plans, rows)
    rows = rows_of_a_step(dataset.config.batch, len(plans[0]) / len(dataset), multiple)
    # Of a data set smaller than a step, empty rows alone would be added.
    return Schedule(plans, min(rows, -(-len(plans[0]) // multiple) * multiple))


def rows_of_a_step(batch: configs.Batch, rows_per_conversation: float, multiple: int) -> int:
    """The multiple of `multiple` that is nearest to batch.conversations, on average."""
    if batch.pack:
        return multiple * max(1, round(batch.conversations * rows_per_conversation / multiple))
    if batch.conversations % multiple:
        raise ValueError(
            f"got config.batch.conversations = {batch.conversations}, one a row, for {multiple} "
            "parts that rows are cut into (devices × config.compute.parts), expected a multiple of "
            "them"
        )
    return batch.conversations


def kept_plans(dataset: Dataset, folder: epath.Path) -> list[Plan]:
    """The plan of each epoch, from the folder where a run keeps them; those that are not there are
    made. So a run goes on by the plan it began with, and at once."""
    plans = []
    for epoch in range(dataset.config.epochs):
        file = _plan_file(dataset, folder, epoch)
        plans.append(packing.load(file) if file.exists() else dataset.plan(epoch))
        if len(plans[-1].example_N) != len(dataset):
            raise ValueError(f"{file} plans other data; remove it, and the plan is made again")
    return plans


def keep_plans(dataset: Dataset, plans: Sequence[Plan], folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for epoch, plan in enumerate(plans):
        if not (file := _plan_file(dataset, folder, epoch)).exists():
            packing.save(plan, file)


def _plan_file(dataset: Dataset, folder: epath.Path, epoch: int) -> epath.Path:
    return folder / f"{dataset.digest[:16]}-{epoch}.npz"
