"""What programs cost: of two that the compiler made, and of parts of others."""

import dataclasses
from pathlib import Path

import pytest

from llava_jax.planner import costs, scheduled
from llava_jax.planner.chips import CHIPS
from llava_jax.planner.costs import Collective
from tests.planner.programs.write import LAYERS, TOKENS, WIDTH, WORDS

PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.parametrize(("name", "cycles"), [("v5e-4", 336_135), ("v5p-8", 245_291)])
def test_a_whole_program(name, cycles):
    program = scheduled.read((PROGRAMS / f"{name}.txt").read_text())
    cost = costs.of_program(program, chips_per_slice=4)
    weight = 2 * WIDTH * WIDTH
    assert cost.bytes_by_kind() == {
        "all-gather": LAYERS * weight,
        "reduce-scatter": LAYERS * weight,
        "all-reduce": 2 * WORDS * WIDTH + 4,
    }
    assert cost.matmul_flops == 3 * LAYERS * 2 * TOKENS * WIDTH * WIDTH
    assert cost.one_hot_flops == 2 * (2 * TOKENS * WORDS * WIDTH)  # looked up, and added into
    assert cost.kernel_calls == {}
    # As this compiler estimated it: by hand, each line's figure times its turns.
    assert cost.all_cycles == cycles


def test_seconds_are_compute_or_what_hides_behind_it_and_what_does_not():
    chip = CHIPS["v5e"]
    hidden = Collective("all-gather", 180_000_000, asynchronous=True, network=False)
    exposed = Collective("all-reduce", 90_000_000, asynchronous=False, network=False)
    between = Collective("reduce-scatter", 3_125_000, asynchronous=False, network=True)
    cost = costs.Costs(
        cycles={"optimizer": 1.503e9 * 0.25},
        matmul_flops=0,
        kernel_calls={"k": 1},
        kernel_flops={"k": 197e12 * 0.5},
        collectives={hidden: 100, exposed: 3, between: 1},
        one_hot_flops=197e12 * 0.125,
    )
    assert cost.compute_seconds(chip) == pytest.approx(0.875)
    assert cost.collective_seconds(chip, asynchronous=True) == pytest.approx(0.1)
    assert cost.collective_seconds(chip, asynchronous=False) == pytest.approx(3 * 0.001 + 0.001)
    assert cost.seconds(chip) == pytest.approx(0.875 + 0.004)
    slow = chip._replace(links=chip.links / 20)  # now what was hidden lasts for 2 s
    assert cost.seconds(slow) == pytest.approx(2 + 3 * 0.02 + 0.001)
    along = exposed._replace(one_axis=True)  # of three axes: a third of the links
    cost = dataclasses.replace(cost, collectives={hidden: 100, along: 3, between: 1})
    assert cost.seconds(chip, axes=3) == pytest.approx(0.875 + 3 * 0.003 + 0.001)
    assert cost.seconds(chip) == pytest.approx(0.875 + 0.004)
    for of in (chip, slow):
        assert sum(cost.seconds_by_part(of).values()) == pytest.approx(cost.seconds(of))


PARTS = """HloModule m, is_scheduled=true

%start (a: bf16[16,8]) -> (bf16[16,8], bf16[64,8]) {
  %a = bf16[16,8]{1,0} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %s = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%ride (a.1: bf16[16,8]) -> bf16[64,8] {
  %a.1 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%a.1), channel_id=1, \
replica_groups={{0,1,2,3}}, backend_config={"async_collective_fusion_config":{"flag_start":"0"}}
}

%done (a.2: bf16[16,8]) -> bf16[64,8] {
  %a.2 = bf16[16,8]{1,0} parameter(0)
  %all-gather.3 = bf16[64,8]{1,0} all-gather(%a.2), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %d = bf16[64,8]{1,0} custom-call(%a.2, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (g: bf16[64,8]) -> bf16[16,8] {
  %g = bf16[64,8]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%g), channel_id=2, replica_groups=[1,4]<=[4]
  %zero = s32[] constant(0)
  ROOT %cut = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%gather.1 (a.3: bf16[16,8]) -> bf16[64,8] {
  %a.3 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.4 = bf16[64,8]{1,0} all-gather(%a.3), channel_id=4, replica_groups={{0,1,2,3}}
}

%beside (a.4: bf16[16,8]) -> bf16[64,8] {
  %a.4 = bf16[16,8]{1,0} parameter(0)
  ROOT %f.5 = bf16[64,8]{1,0} fusion(%a.4), kind=kCustom, calls=%gather.1
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %c.1 = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%beside
  %c.2 = ((bf16[16,8]{1,0}), bf16[64,8]{1,0}) call-update(%c.1, %x)
  %c.3 = bf16[64,8]{1,0} call-done(%c.2)
  %x = bf16[16,8]{1,0} parameter(0)
  %f.1 = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[64,8]{1,0} fusion(%x), kind=kOutput, calls=%ride, \
backend_config={"estimated_cycles":"900"}
  %f.3 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %f.4 = bf16[16,8]{1,0} fusion(%f.3), kind=kCustom, calls=%all-reduce-scatter.1
  %p.1 = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]) collective-permute-start(%f.4), \
source_target_pairs={{0,1},{1,0}}
  %p.2 = bf16[16,8]{1,0} collective-permute-done(%p.1)
  ROOT %r = bf16[16,8]{1,0} all-reduce(%p.2), channel_id=3, replica_groups=GROUPS
}
"""


def test_a_collective_of_a_part_of_a_slice_runs_along_one_axis():
    text = PARTS.replace("GROUPS", "{{0,1},{2,3}}")
    found = costs.of_program(scheduled.read(text), chips_per_slice=4).collectives
    assert {each.kind for each in found if each.one_axis} == {"all-reduce"}
    text = text.replace("channel_id=4,", 'channel_id=4, backend_config={"emitter":"1DAllGather"},')
    found = costs.of_program(scheduled.read(text), chips_per_slice=4).collectives
    assert {each.kind for each in found if each.one_axis} == {"all-reduce", "all-gather"}


@pytest.mark.parametrize(
    ("groups", "network"),
    [
        ("{{0,1},{2,3}}", False),
        ("{{0,2},{1,3}}", True),
        ("[2,2]<=[4]", False),
        ("[2,2]<=[2,2]T(1,0)", True),
        ("mesh['a'=2,'b'=2] {'b'}", False),
        ("mesh['a'=2,'b'=2] {'a'}", True),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", False),
    ],
)
def test_each_collective_is_counted_once_and_is_what_it_does(groups, network):
    """One gather starts in a fusion, rides in another's, and ends in a third. Another is a
    SparseCore's. Two slices of 2."""
    program = scheduled.read(PARTS.replace("GROUPS", groups))
    found = costs.of_program(program, chips_per_slice=2).collectives
    full, shard = 64 * 8 * 2, 16 * 8 * 2
    assert found == {
        Collective("all-gather", full, asynchronous=True, network=True): 2,
        Collective("reduce-scatter", full, asynchronous=False, network=True): 1,
        Collective("collective-permute", shard, asynchronous=True, network=False): 1,
        Collective("all-reduce", shard, asynchronous=False, network=network): 1,
    }


KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[32,2048,128]) -> bf16[32,2048,128] {
  %m = s8[1,4,4]{2,1,0} constant({...})
  %q = bf16[32,2048,128]{2,1,0} parameter(0)
  ROOT %splash_mha_NAME.3 = bf16[32,2048,128]{2,1,0} custom-call(%m, %m, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_q_dq\\": 1024, \
\\"block_kv_dq\\": 1024, \\"block_q_dkv\\": 2048, \\"block_kv_dkv\\": 512}"
}}, metadata={op_name="jit(step)/SOURCE/pallas_call"}
}
"""


@pytest.mark.parametrize(
    ("name", "source", "blocks", "products"),
    [
        ("fwd_segmented_residuals", "LlamaBlock", 10 * 512 * 512, 2),
        ("fwd_segmented_residuals", "ClipBlock", 16 * 512 * 512, 2),
        ("dq_segmented_no_residuals", "LlamaBlock", 3 * 1024 * 1024, 3),
        ("dkv_segmented_no_residuals", "LlamaBlock", 4 * 2048 * 512, 4),
    ],
)
def test_attention_is_the_blocks_that_it_visits(name, source, blocks, products):
    program = scheduled.read(KERNEL.replace("NAME", name).replace("SOURCE", source))
    cost = costs.of_program(program, chips_per_slice=4)
    assert cost.kernel_calls == {f"splash_mha_{name}": 1}
    assert cost.kernel_flops == {f"splash_mha_{name}": 2 * products * 32 * 128 * blocks}


def test_a_kernel_that_is_not_known_is_refused():
    program = scheduled.read(KERNEL.replace("NAME", "mystery").replace("SOURCE", "LlamaBlock"))
    with pytest.raises(ValueError, match="got kernel splash_mha_mystery, expected one of splash"):
        costs.of_program(program, chips_per_slice=4)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("jit(step)/shard_map/jvp(ClipVit)/while/body/closed_call/checkpoint/fc1", "vision tower"),
        ("jit(step)/shard_map/transpose(jvp(Projector))/linear_1/dot_general", "projector"),
        ("jit(step)/shard_map/transpose(jvp(Embedding))/scatter-add", "embedding"),
        ("jit(step)/shard_map/jvp()/while/body/closed_call/Head/dot_general", "head and loss"),
        ("jit(step)/shard_map/jvp(Decoder)/while/body/LlamaBlock/q", "language model, forward"),
        (
            "jit(step)/shard_map/transpose(jvp(Decoder))/while/body/closed_call/checkpoint/"
            "rematted_computation/LlamaBlock/gate/dot_general",
            "recomputed",
        ),
        (
            "jit(step)/shard_map/transpose(jvp(Decoder))/while/body/closed_call/LlamaBlock/gate",
            "language model, backward",
        ),
        ("jit(step)/reduce_sum", "optimizer"),
        ("", "other"),
    ],
)
def test_which_part_of_the_model_it_is(source, part):
    assert costs.part_of(source) == part
