"""Which settings run a recipe's step fastest on a slice: what is kept for the backward pass, rows
taken at a time, how weights are gathered, and over which mesh.

A try that fits is a compilation, of minutes; one that does not is refused in seconds. So tries go
from what keeps the most to the leanest, and end with the first that fits: a leaner one computes
more again. With fewer rows at a time only what keeps more than that is worth another, and nothing
that by the planner's terms needs more than what did not fit. Answers are kept, so that a search
that was interrupted goes on.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from llava_jax.config import Config
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.planner import plan as plans
from llava_jax.planner.memory import Held
from llava_jax.planner.plan import Plan, TooLarge
from llava_jax.planner.topology import Topology, topology

GATHERS = ("explicit", "explicit by axis")


class Try(NamedTuple):
    """settings: of config.compute. rows: of a chip, taken at a time. plan: None where it does not
    fit, for which it needed so many bytes."""

    settings: dict[str, object]
    rows: int
    plan: Plan | None
    needed: float = 0.0


def search(
    config: Config,
    slice_name: str,
    *,
    rows_per_chip: int = 0,
    text_only: bool = False,
    folder: epath.Path,
    on_try: Callable[[Try], None] = lambda found: None,
) -> list[Try]:
    """All tries, the fastest first, and then those that do not fit. rows_per_chip 0: as many as
    the recipe's batch needs."""
    rows = rows_per_chip or plans.rows_of_a_chip(config, slice_name)
    found = []
    for layout in layouts(topology(slice_name)):
        for each in _tries(config, slice_name, layout, rows, text_only, folder):
            found.append(each)
            on_try(each)
    return sorted(found, key=lambda each: each.plan.step_seconds if each.plan else math.inf)


def layouts(target: Topology) -> list[dict[str, object]]:
    """Weights cut over the whole slice, along its axes; and over all but the longest, along which
    lie copies: shorter gathers, and gradients that are summed up. Each with either gather, which
    are one where there is one axis."""
    longest, *others = sorted((size for size in target.grid if size > 1), reverse=True) or [1]
    whole = {"data": target.slices, "fsdp": (0,)}
    copies = {"data": target.slices * longest, "fsdp": tuple(others)}
    return [
        {**mesh, "gather": gather}
        for mesh, axes in ((whole, 1 + len(others)), (copies, len(others)))
        for gather in GATHERS[:axes]
    ]


def _tries(
    config: Config,
    slice_name: str,
    layout: dict[str, object],
    rows: int,
    text_only: bool,
    folder: epath.Path,
) -> Iterator[Try]:
    policies = list(REMAT_POLICIES)  # from the leanest to the largest
    held: Held | None = None
    fitted, too_much = -1, math.inf  # bytes, by the planner's terms
    for parts in (n for n in range(1, rows + 1) if rows % n == 0):
        for number in reversed(range(fitted + 1, len(policies))):
            settings = {**layout, "remat": policies[number], "parts": parts}
            compute = dataclasses.replace(config.compute, **settings)
            if held and held.total(compute, rows) >= too_much:
                continue
            try:
                plan, _ = plans.plan(
                    dataclasses.replace(config, compute=compute),
                    slice_name,
                    rows_per_chip=rows,
                    text_only=text_only,
                    folder=folder,
                )
            except TooLarge as refused:
                held = refused.held
                if compute.remat != "none":  # of which the terms say too little
                    too_much = min(too_much, held.total(compute, rows))
                yield Try(settings, rows // parts, None, refused.needed)
            else:
                yield Try(settings, rows // parts, plan)
                fitted = number
                break
