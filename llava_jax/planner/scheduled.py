"""Reads the text of a program that the TPU compiler has scheduled: what runs, and how often.

A computation is a list of instructions; loops, fusions and asynchronous calls name others. The
compiler writes its own estimate of cycles beside most instructions; Pallas kernels, gathers and
scatters have none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.dims:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype, 0)


_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Instruction(NamedTuple):
    """shapes: of what it gives, a tuple's one after another. operands: names of instructions of the
    same computation. said: the rest of its line. cycles: the compiler's estimate, None = none."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    said: str
    cycles: int | None

    @property
    def source(self) -> str:
        """Where in the traced program it comes from: 'jit(step)/shard_map/jvp(Decoder)/…'."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.said)
        return found[1] if found else ""

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that are a part of it; of a call that goes on beside others, its own."""
        role = "to_apply" if self.kind == "call-start" else "calls"
        return tuple(re.findall(rf"\b{role}=%?([\w.\-]+)", self.said))

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.said)
        return found[1] if found else ""

    def called(self, role: str) -> str:
        """The computation of this role, as in condition=%name."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.said)
        if not found:
            raise ValueError(f"{self.kind} {self.name}: got no {role}, expected one")
        return found[1]


Computation = Mapping[str, Instruction]


class Scheduled(NamedTuple):
    """computations by name, each its instructions by name, in the order of the schedule."""

    computations: Mapping[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, float]]:
        """What runs, with how often: loops are entered, fusions are one instruction."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: float) -> Iterator[tuple[Instruction, float]]:
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.kind == "while":
                turns = times * self._turns(instruction, computation)
                yield from self._executed(instruction.called("body"), turns)
            elif instruction.kind == "conditional":
                # One of them runs; which one no text tells.
                branches = _branches(instruction)
                for branch in branches:
                    yield from self._executed(branch, times / len(branches))
            elif instruction.kind == "call":
                yield from self._executed(instruction.called("to_apply"), times)
            else:
                yield instruction, times

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What a fusion or an asynchronous call consists of."""
        for name in instruction.calls:
            for inner in self.computations[name].values():
                yield inner
                yield from self.inside(inner)

    def _turns(self, loop: Instruction, around: Computation) -> int:
        """How often a counted loop's body runs: from where its counter starts to the constant that
        the condition compares it with."""
        condition = self.computations[loop.called("condition")]
        compared = [i for i in condition.values() if i.kind == "compare"]
        if len(compared) != 1 or "direction=LT" not in compared[0].said:
            raise ValueError(f"loop {loop.name}: got a condition that does not count up to a limit")
        counter, limit = (condition[name] for name in compared[0].operands)
        place = re.search(r"\bindex=(\d+)", counter.said)
        assert place, counter
        initial = around[around[loop.operands[0]].operands[int(place[1])]]
        while initial.kind in ("copy", "copy-done", "copy-start", "bitcast"):
            initial = around[initial.operands[0]]
        return _constant(limit) - _constant(initial)


def _constant(instruction: Instruction) -> int:
    found = re.search(r"\bconstant\((-?\d+)\)", instruction.said)
    if not found:
        raise ValueError(f"{instruction.name}: got {instruction.kind}, expected a constant")
    return int(found[1])


def _branches(conditional: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", conditional.said):
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return [conditional.called("true_computation"), conditional.called("false_computation")]


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read(text: str) -> Scheduled:
    """The program of `compiled.as_text()`."""
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise ValueError("got a program that is not scheduled, expected one of the TPU compiler's")
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = "", None
    lines = iter(text.split("\n"))
    for line in lines:
        if line == "}" or line.startswith("}, execution_thread"):
            here = None
        elif here is None:
            if head := _HEAD.match(line):
                here = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        else:
            # A kernel's description goes on over lines, some of them a lone brace.
            while (open_ := _depth(line)) > 0:
                line += "\n" + next(lines)
            assert open_ == 0, line[:200]
            if found := _INSTRUCTION.fullmatch(line):
                here[found[1]] = _instruction(found[1], found[2])
    if not entry:
        raise ValueError("got a text without an entry computation, expected a whole program")
    return Scheduled(computations, entry)


def _depth(line: str) -> int:
    bare = _STRING.sub("", line)
    return bare.count("{") - bare.count("}")


def _instruction(name: str, said: str) -> Instruction:
    said = _COMMENT.sub("", said)
    end = _closing(said, 0) + 1 if said.startswith("(") else said.index(" ")
    kind, _, rest = said[end:].strip().partition("(")
    inside = rest[: _closing("(" + rest, 0) - 1]
    cycles = _CYCLES.search(said)
    return Instruction(
        name,
        kind,
        tuple(
            Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
            for dtype, dims in _SHAPE.findall(said[:end])
        ),
        tuple(_OPERAND.findall(inside)),
        said[end:].strip(),
        int(cycles[1]) if cycles else None,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"got {text[:80]!r}…, whose parenthesis does not close")


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Of a convolution, which matrix products are on a TPU: twice the products of numbers that are
    added up. Those with padding, which only spell a reshape, are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.said)
    if instruction.kind != "convolution" or not labels:
        return 0.0
    left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    total = 2.0 * right[labels[2].index("i")]
    total *= out[labels[3].index("b")] * out[labels[3].index("f")]
    window = re.search(r"window=\{([^}]*)\}", instruction.said)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[3] if label.isdigit())
    for number, label in enumerate(spatial):

        def of(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, left_step, right_step = (
            int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        total *= _taps(
            inputs=left[labels[1].index(label)],
            outputs=out[labels[3].index(label)],
            size=right[labels[2].index(label)],
            low=low,
            stride=stride,
            left_step=left_step,
            right_step=right_step,
        )
    return total


def _taps(
    *,
    inputs: int,
    outputs: int,
    size: int,
    low: int,
    stride: int,
    left_step: int,
    right_step: int,
) -> int:
    """Pairs of an output and a tap of its window that meet an input, and no padding."""
    found = 0
    for tap in range(size):
        # at = output · stride + tap · right_step − low must be 0, left_step, … of the inputs
        offset = tap * right_step - low
        if left_step == 1:
            first = max(0, -(offset // stride))
            last = min(outputs - 1, (inputs - 1 - offset) // stride)
            found += max(0, last - first + 1)
        else:
            places = (output * stride + offset for output in range(outputs))
            found += sum(
                place % left_step == 0 and 0 <= place // left_step < inputs for place in places
            )
    return found
