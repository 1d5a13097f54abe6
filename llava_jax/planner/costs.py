"""What a scheduled program costs on a chip: the compiler's own estimates, and a little arithmetic.

    seconds = max(compute, asynchronous bytes ÷ bandwidth) + synchronous bytes ÷ bandwidth

compute: the compiler's cycles; Pallas kernels, which have no estimate, at the chip's peak; gathers
and scatters of rows, which have none either, as products with one-hot rows at peak. Bytes of a
collective are those of its full array: what a gather gives, what a scatter takes, and an
all-reduce's twice. They have all of a chip's links; or, less kindly, those of one axis where a
collective runs along one axis of the torus, and half of them where the axes are no rings.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from llava_jax.planner import scheduled
from llava_jax.planner.chips import Chip
from llava_jax.planner.scheduled import Instruction, Scheduled

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """full_bytes: of the array that all hold together. network: between slices. one_axis: along one
    axis of the torus, by its group or by the compiler's name for how it is done."""

    kind: str
    full_bytes: int
    asynchronous: bool
    network: bool
    one_axis: bool = False

    @property
    def wire_bytes(self) -> int:
        return self.full_bytes * (2 if self.kind == "all-reduce" else 1)


class Kernel(NamedTuple):
    """A Pallas call."""

    name: str
    flops: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step on one chip. cycles, by part of the model. kernels: calls and FLOPs by name.
    collectives: how often each. one_hot_flops: what gathers and scatters of rows, which have no
    estimate, would take as products with one-hot rows."""

    cycles: Mapping[str, float]
    matmul_flops: float
    kernel_calls: Mapping[str, float]
    kernel_flops: Mapping[str, float]
    collectives: Mapping[Collective, float]
    one_hot_flops: float

    @property
    def all_cycles(self) -> float:
        return sum(self.cycles.values())

    def compute_seconds(self, chip: Chip) -> float:
        without_estimate = sum(self.kernel_flops.values()) + self.one_hot_flops
        return self.all_cycles / chip.clock + without_estimate / chip.flops

    def collective_seconds(self, chip: Chip, *, asynchronous: bool, axes: int = 1) -> float:
        """axes: of the torus, that share the links; 1: every collective has them all."""
        return sum(
            times
            * each.wire_bytes
            / (chip.network if each.network else chip.links / (axes if each.one_axis else 1))
            for each, times in self.collectives.items()
            if each.asynchronous is asynchronous
        )

    def seconds(self, chip: Chip, axes: int = 1) -> float:
        hidden = self.collective_seconds(chip, asynchronous=True, axes=axes)
        exposed = self.collective_seconds(chip, asynchronous=False, axes=axes)
        return max(self.compute_seconds(chip), hidden) + exposed

    def seconds_by_part(self, chip: Chip) -> dict[str, float]:
        """They add up to `seconds`."""
        hidden = self.collective_seconds(chip, asynchronous=True)
        exposed = self.collective_seconds(chip, asynchronous=False)
        exposed += max(0.0, hidden - self.compute_seconds(chip))
        return {
            **{part: self.cycles[part] / chip.clock for part, _ in PARTS if part in self.cycles},
            "attention kernels": sum(self.kernel_flops.values()) / chip.flops,
            "rows of embeddings": self.one_hot_flops / chip.flops,
            "waiting for other chips": exposed,
        }

    def bytes_by_kind(self) -> dict[str, float]:
        """'all-gather', 'all-gather, asynchronous', 'all-gather, network', …"""
        found = collections.defaultdict[str, float](float)
        for each, times in self.collectives.items():
            words = [each.kind, *["asynchronous"] * each.asynchronous, *["network"] * each.network]
            found[", ".join(words)] += times * each.full_bytes
        return dict(sorted(found.items()))


def of_program(program: Scheduled, *, chips_per_slice: int) -> Costs:
    cycles, calls, flops = (collections.defaultdict[str, float](float) for _ in range(3))
    found = collections.defaultdict[Collective, float](float)
    matmul_flops = one_hot = 0.0
    homes = {
        name: computation for computation in program.computations.values() for name in computation
    }
    for instruction, times in program.executed():
        together = [instruction, *program.inside(instruction)]
        products = sum(scheduled.matmul_flops(each, homes[each.name]) for each in together)
        matmul_flops += times * products
        if instruction.cycles is not None:
            cycles[part_of(instruction.source)] += times * instruction.cycles
        for collective in _collectives(instruction, together, chips_per_slice, homes):
            found[collective] += times
        if instruction.target == "tpu_custom_call":
            kernel = _kernel(instruction, homes[instruction.name])
            calls[kernel.name] += times
            flops[kernel.name] += times * kernel.flops
        elif instruction.cycles is None:
            one_hot += times * _one_hot_flops(together, homes)
    return Costs(dict(cycles), matmul_flops, dict(calls), dict(flops), dict(found), one_hot)


PARTS = (
    ("vision tower", r"ClipVit"),
    ("projector", r"Projector"),
    ("embedding", r"Embedding"),
    ("head and loss", r"shard_map/(transpose\()?jvp\(\)\)?/|\bHead\b"),
    ("recomputed", r"rematted_computation"),
    ("language model, backward", r"transpose\(jvp\(Decoder"),
    ("language model, forward", r"jvp\(Decoder"),
    ("optimizer", r"jit\(step\)/(?!shard_map)"),
    ("other", r""),
)


def part_of(source: str) -> str:
    """Of the model, by where in the traced program an instruction comes from."""
    return next(part for part, pattern in PARTS if re.search(pattern, source))


def _collectives(
    instruction: Instruction,
    together: list[Instruction],
    chips_per_slice: int,
    homes: Mapping[str, Mapping[str, Instruction]],
) -> Iterator[Collective]:
    """Those that begin here. One that rides through several fusions begins in the first."""
    fused = len(together) > 1
    riding = {name for each in together for name in _ridden(each)}
    begins = any(each.target == "AsyncCollectiveStart" for each in together)
    for each in together:
        kind = each.kind.removesuffix("-start")
        if kind not in KINDS or (each.name in riding and not begins):
            continue
        started = each.kind.endswith("-start") or instruction.kind in ("async-start", "call-start")
        largest = max(
            *(shape.nbytes for shape in each.shapes),
            sum(shape.nbytes for name in each.operands for shape in homes[each.name][name].shapes),
        )
        if kind == "all-reduce" and fused and "all-reduce-scatter" in instruction.said:
            kind = "reduce-scatter"
        group = _group(each.said)
        yield Collective(
            kind,
            largest,
            asynchronous=started or (begins and each.name in riding),
            network=len({device // chips_per_slice for device in group}) > 1,
            one_axis=kind != "collective-permute"
            and (1 < len(group) < chips_per_slice or '"emitter":"1D' in each.said),
        )


def _ridden(instruction: Instruction) -> tuple[str, ...]:
    """Collectives that an asynchronous fusion starts, carries on or ends."""
    if instruction.target in ("AsyncCollectiveStart", "AsyncCollectiveDone"):
        return instruction.operands
    return (instruction.name,) if '"flag_start"' in instruction.said else ()


def _group(said: str) -> list[int]:
    """The devices of the first group, in each of the ways that HLO writes groups."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", said):
        return [int(device) for device in found[1].split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[^ ]*)", said):
        return _numbered(found[3]).reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(
        r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{(.*?)\}", said
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        shape = [int(size) for size in sizes.values()]
        count = math.prod(shape)
        devices = _numbered(found[2]) if found[2] else np.arange(count)
        together = re.findall(r"'(\w+)'", found[3])
        places = tuple(slice(None) if axis in together else 0 for axis in sizes)
        return devices.reshape(shape)[places].reshape(-1).tolist()
    return []


def _numbered(said: str) -> np.ndarray:
    """'[2,4]T(1,0)': the numbers from 0, in that shape and then transposed."""
    sizes, _, order = said.partition("T")
    shape = [int(size) for size in re.findall(r"\d+", sizes)]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose([int(axis) for axis in re.findall(r"\d+", order)] or None)


def _kernel(instruction: Instruction, computation: Mapping[str, Instruction]) -> Kernel:
    """Splash attention: its products of the blocks that it visits, by its own description."""
    name = re.sub(r"[._]\d+$", "", instruction.name)
    described = re.search(r'"xprof_metadata":"(\{(?:[^"\\]|\\.)*\})"', instruction.said)
    products = next((n for part, n in _PRODUCTS.items() if part in name), None)
    if not described or products is None:
        raise ValueError(f"got kernel {name}, expected one of splash attention")
    blocks = json.loads(described[1].replace('\\"', '"'))
    shapes = [shape for of in instruction.operands for shape in computation[of].shapes]
    q = next(shape for shape in shapes if len(shape.dims) >= 3 and shape.dtype != "s8")
    heads, tokens, size = math.prod(q.dims[:-2]), q.dims[-2], q.dims[-1]
    suffix = next((part for part in ("dkv", "dq") if part in name), "")
    block_q = blocks[f"block_q_{suffix}" if suffix else "block_q"]
    block_kv = blocks[f"block_kv_{suffix}" if suffix else "block_kv"]
    causal = "LlamaBlock" in instruction.source or "Decoder" in instruction.source
    visited = sum(
        not causal or low_kv <= low_q + block_q - 1
        for low_q in range(0, tokens, block_q)
        for low_kv in range(0, tokens, block_kv)
    )
    return Kernel(name, 2.0 * products * heads * size * visited * block_q * block_kv)


# Of splash attention's kernels: scores and output; scores, dP and dq; scores, dP, dv and dk.
_PRODUCTS = {"_fwd": 2, "_dkv": 4, "_dq": 3}


def _one_hot_flops(
    together: list[Instruction], homes: Mapping[str, Mapping[str, Instruction]]
) -> float:
    """Of gathers and scatters of rows, as if they were products with one-hot rows."""
    total = 0.0
    for each in together:
        if each.kind in ("gather", "scatter"):
            operands = [homes[each.name][name].shapes[0] for name in each.operands]
            table, moved = operands[0], each.shapes[0] if each.kind == "gather" else operands[2]
            if len(table.dims) == 2 and moved.dims[-1] == table.dims[-1] > 1:
                total += 2.0 * moved.elements * table.dims[0]
    return total
