"""Programs of the TPU compiler, read: two that it made (programs/write.py), and parts of others."""

from pathlib import Path

import pytest

from llava_jax.planner import scheduled
from tests.planner.programs.write import LAYERS, TOKENS, WIDTH

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(params=["v5e-4", "v5p-8"])
def program(request) -> scheduled.Scheduled:
    return scheduled.read((PROGRAMS / f"{request.param}.txt").read_text())


def test_a_loops_body_runs_as_often_as_the_loop_turns(program):
    gathers = [times for each, times in program.executed() if each.kind == "all-gather"]
    assert gathers == [LAYERS]


def test_the_products_are_those_that_were_asked_for(program):
    """Forward one of each layer, backward two."""
    homes = {name: of for of in program.computations.values() for name in of}
    total = sum(
        times * scheduled.matmul_flops(each, homes[each.name])
        for instruction, times in program.executed()
        for each in (instruction, *program.inside(instruction))
    )
    assert total == 3 * LAYERS * 2 * TOKENS * WIDTH * WIDTH


def test_what_instructions_say(program):
    entry = program.computations[program.entry]
    (reduced,) = (each for each in entry.values() if each.name.startswith("psum.15"))
    assert reduced.kind == "all-reduce"
    assert reduced.shapes == (scheduled.Shape("bf16", (4096, WIDTH)),)
    assert reduced.shapes[0].nbytes == 2 * 4096 * WIDTH
    assert entry[reduced.operands[0]].kind == "fusion"
    assert reduced.source == "jit(step)/shard_map/psum"
    assert any(each.cycles for each in entry.values())


def convolution(window: str, left: str, right: str, out: str, labels: str) -> float:
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    program = scheduled.read(text)
    main = program.computations[program.entry]
    return scheduled.matmul_flops(main["c"], main)


@pytest.mark.parametrize(
    ("window", "left", "right", "out", "labels", "products"),
    [
        ("", "bf16[64,32]", "bf16[32,128]", "bf16[64,128]", "bf_io->bf", 64 * 32 * 128),
        # A window as wide as its padding spells a reshape: each output meets one input.
        (
            "window={size=16 pad=15_15 rhs_reversal=1}, ",
            "bf16[64,1,32]",
            "bf16[16,32,8]",
            "bf16[64,16,8]",
            "b0f_0io->b0f",
            64 * 16 * 32 * 8,
        ),
        # A batch of products: the left is spread out, and each meets its own of the right.
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, ",
            "bf16[4,64,32]",
            "bf16[4,32,8]",
            "bf16[4,64,8]",
            "0bf_0io->0bf",
            4 * 64 * 32 * 8,
        ),
        # A picture in patches: 3 colours, 14×14 pixels each.
        (
            "window={size=14x14 stride=14x14}, ",
            "bf16[2,28,28,3]",
            "bf16[14,14,3,8]",
            "bf16[2,2,2,8]",
            "b01f_01io->b01f",
            2 * 2 * 2 * 14 * 14 * 3 * 8,
        ),
        # Padding that is real: 3 taps, of which the first and the last output lose one.
        (
            "window={size=3 pad=1_1}, ",
            "f32[1,10,2]",
            "f32[3,2,5]",
            "f32[1,10,5]",
            "b0f_0io->b0f",
            (3 * 10 - 2) * 2 * 5,
        ),
    ],
)
def test_products_of_a_convolution(window, left, right, out, labels, products):
    assert convolution(window, left, right, out, labels) == 2 * products


LOOP = """HloModule m, is_scheduled=true

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %t = (s32[], f32[8]{0}) tuple(%p)
}, execution_thread="sparsecore"

%more (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=DIRECTION
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %one = s32[] constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %both = (s32[], f32[8]{0}) tuple(%begin, /*index=1*/%x)
  ROOT %w = (s32[], f32[8]{0}) while(%both), condition=%more, body=%turn
}
"""


def test_a_loop_whose_first_turn_was_taken_out():
    program = scheduled.read(LOOP.replace("DIRECTION", "LT"))
    assert [times for each, times in program.executed() if each.name == "t"] == [6]


def test_a_loop_that_does_not_count_is_refused():
    program = scheduled.read(LOOP.replace("DIRECTION", "GT"))
    with pytest.raises(ValueError, match="loop w: got a condition that does not count up"):
        list(program.executed())


def test_a_kernels_description_may_hold_lone_braces():
    text = LOOP.replace("DIRECTION", "LT").replace(
        "  %one =",
        """  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata_of={{
"xprof_metadata":"{\\"block_q\\": 512}"
}
}, metadata={op_name="jit(step)/k"}
  %one =""",
    )
    entry = scheduled.read(text).computations["main"]
    assert (entry["k"].target, entry["k"].source) == ("tpu_custom_call", "jit(step)/k")
    assert list(entry) == ["x", "k", "one", "begin", "both", "w"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("HloModule m\n", "not scheduled"),
        ("HloModule m, is_scheduled=true\n", "without an entry computation"),
    ],
)
def test_other_texts_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        scheduled.read(text)
