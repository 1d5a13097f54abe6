"""TPU slices by their cloud names: their grid, and devices to compile for where there are none.

The XLA:TPU compiler comes with libtpu and runs on any Linux machine, so a program can be compiled
for a whole pod from a laptop. `v4` and `v5p` names count TensorCores, two to a chip; `v5e` and
`v6e` names count chips.
"""

import dataclasses
import math
import os
import re
from typing import Any

from llava_jax.sharding import MeshShape

# Chips → grid. A generation's slices are those of its torus that the cloud rents out.
_GRIDS_2D = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
_GRIDS_3D = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
}
_CORES_PER_CHIP_IN_NAME = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}

# The compiler warns and waits when it looks for a TPU machine's metadata, and warns where it knows
# of no machine: any will do. And it may be loaded where another process has loaded it: neither uses
# a TPU.
COMPILER_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices."""

    generation: str
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.grid) * self.slices

    @property
    def closed(self) -> bool:
        """Whether its axes are rings. A line's ends have one link along it, and gather half as
        fast; whole pods of v5e and v6e close, and v4's and v5p's slices of 4×4×4 cubes."""
        ring = 4 if len(self.grid) == 3 else 16
        return all(n % ring == 0 for n in self.grid)

    @property
    def axes(self) -> int:
        """Along which it has neighbours: of a chip's links, those of others go nowhere."""
        return sum(n > 1 for n in self.grid)

    def mesh_shape(self) -> MeshShape:
        """FSDP over every chip of a slice, one axis for each torus dimension; a copy a slice."""
        return MeshShape(data=self.slices, fsdp=tuple(n for n in self.grid if n > 1) or (1,))

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for, and nothing else."""
        from jax.experimental import topologies

        for name, value in COMPILER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        size = "x".join(map(str, self.grid))
        options: dict[str, Any] = {"num_slices": self.slices}
        if len(self.grid) == 3:
            # Both cores of a chip as one device; links that close the torus exist in whole
            # 4×4×4 cubes only. Described without them, a gather compiles to an all-reduce.
            name = f"{self.generation.removesuffix('p')}:{size}"
            options |= {
                "chip_config_name": "megacore",
                "chips_per_host_bounds": (2, 2, 1),
                "wrap": (self.closed,) * 3,
            }
        else:
            name = f"{self.generation}:{size}"
            if self.chips == self.slices:
                options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            return topologies.get_topology_desc(name, platform="tpu", **options).devices
        except RuntimeError as error:
            raise ValueError(
                f"cannot compile for {name}: {error}. The TPU compiler is in libtpu; install it "
                "with: pip install 'llava-jax[tpu]'"
            ) from error


def topology(name: str) -> Topology:
    """'v5e-256', 'v5p-128', …; '2xv5e-256' for two slices; 'v5litepod-16', as the cloud says it."""
    found = re.fullmatch(r"(?:([1-9][0-9]{0,2})x)?([a-z0-9]+)-([0-9]{1,4})", name.lower())
    if found:
        slices, generation = int(found[1] or 1), found[2].replace("v5litepod", "v5e")
        cores = _CORES_PER_CHIP_IN_NAME.get(generation, 1)
        grids = _grids(generation)
        chips, rest = divmod(int(found[3]), cores)
        if chips in grids and not rest and slices < 512:
            return Topology(generation, grids[chips], slices)
    raise ValueError(
        f"unknown TPU slice {name!r}: expected one of {', '.join(names())}, or 2x to 511x in "
        "front for several; names of v4 and v5p count cores, two a chip"
    )


def _grids(generation: str) -> dict[int, tuple[int, ...]]:
    cores = _CORES_PER_CHIP_IN_NAME.get(generation)
    return {None: {}, 1: _GRIDS_2D, 2: _GRIDS_3D}[cores]


def names() -> list[str]:
    """All single slices, smallest first within a generation."""
    return [
        f"{generation}-{chips * cores}"
        for generation, cores in _CORES_PER_CHIP_IN_NAME.items()
        for chips in _grids(generation)
    ]
