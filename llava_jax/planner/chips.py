"""What each generation's chip can do: the facts that a scheduled program is priced with.

From "System architecture" of https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, but for:
- clock: the one at which the matrix units' number gives the published FLOP/s.
- hbm: what the compiler names when a program needs more.
- links: nine tenths (v6e: eight) of what a chip's links carry in one direction, all axes of the
  torus together. Assumed, as v4's network is: no chip was measured.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from llava_jax.flops import PEAK


class Chip(NamedTuple):
    """flops: bf16, a second. clock: the compiler's cycles, a second. hbm: bytes a program may take.
    memory, links, network: bytes a second from and to HBM, the slice's chips, other slices."""

    flops: float
    clock: float
    hbm: int
    memory: float
    links: float
    network: float


_GIB = 2**30

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(PEAK["v4"], 1.050e9, int(30.75 * _GIB), 1200e9, 270e9, 3.125e9),
        "v5e": Chip(PEAK["v5e"], 1.503e9, int(15.75 * _GIB), 819e9, 180e9, 3.125e9),
        "v5p": Chip(PEAK["v5p"], 1.751e9, int(95.74 * _GIB), 2765e9, 540e9, 6.25e9),
        "v6e": Chip(PEAK["v6e"], 1.751e9, int(31.25 * _GIB), 1640e9, 360e9, 12.5e9),
    }
)
