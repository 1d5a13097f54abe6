"""Which settings use a slice best: what is kept for the backward pass, rows of a chip, the gather.

Every try is a compilation, of minutes; those whose answer follows from another's are left out, and
answers are kept, so that a search that was interrupted goes on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from llava_jax.config import Config
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.planner import plan as plans
from llava_jax.planner.compiling import DoesNotFit
from llava_jax.planner.plan import Plan

GATHERS = ("explicit", "explicit by axis")
ROWS = (1, 2, 4)


class Try(NamedTuple):
    """plan: None where it does not fit, for which it needed so many bytes (0: of which a leaner one
    needed too many)."""

    gather: str
    remat: str
    rows_per_chip: int
    plan: Plan | None
    needed: float = 0.0


def search(
    config: Config,
    slice_name: str,
    *,
    text_only: bool = False,
    rows: Sequence[int] = ROWS,
    folder: epath.Path,
    on_try: Callable[[Try], None] = lambda found: None,
) -> list[Try]:
    """All tries, the fastest for a conversation first, and then those that do not fit."""
    found = []
    for each in _tries(config, slice_name, text_only, rows, folder):
        found.append(each)
        on_try(each)
    return sorted(found, key=lambda each: -each.plan.tokens_per_second if each.plan else 0.0)


def _tries(
    config: Config, slice_name: str, text_only: bool, rows: Sequence[int], folder: epath.Path
) -> Iterator[Try]:
    policies = list(REMAT_POLICIES)  # from the leanest to the largest
    for gather in GATHERS:
        largest = len(policies)  # those before this one fitted so far
        for count in sorted(rows):
            for number, remat in enumerate(policies):
                if number >= largest:
                    yield Try(gather, remat, count, None)
                    continue
                compute = dataclasses.replace(config.compute, gather=gather, remat=remat)
                try:
                    plan, _ = plans.plan(
                        dataclasses.replace(config, compute=compute),
                        slice_name,
                        rows_per_chip=count * config.compute.parts,
                        text_only=text_only,
                        folder=folder,
                    )
                    yield Try(gather, remat, plan.rows_per_chip, plan)
                except DoesNotFit as too_much:
                    largest = number
                    yield Try(gather, remat, count, None, too_much.needed)
