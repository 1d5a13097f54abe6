"""A plan, from a program that the compiler made before; and what the verb makes of it."""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import jax
import pytest
from etils import epath

from launch import plan as verb
from llava_jax import config as configs
from llava_jax.models.llava import released
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.planner import compiling, plan, search
from llava_jax.planner.chips import CHIPS
from llava_jax.planner.compiling import Compiled, DoesNotFit
from llava_jax.planner.memory import Held
from llava_jax.planner.topology import Topology

PROGRAM = (Path(__file__).parents[1] / "planner" / "programs" / "v5e-4.txt").read_text()
STAGE_2 = "configs/stage2.py:v1.5-7b"


@pytest.fixture
def compiler(monkeypatch):
    """Stands for the TPU's: it takes the step of a small slice of this machine, and has one answer
    or one refusal. Gives what it was asked."""
    asked = {}

    def compile_for(lowered, topology, options, folder, on_wait):
        asked.update(lowered=lowered, topology=topology)
        if refusal := asked.get("refusal"):
            raise refusal
        return Compiled(PROGRAM, peak=11 << 30, seconds=61.0, kept=False)

    monkeypatch.setattr(compiling, "compile_for", compile_for)
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[: self.chips])
    return asked


def tiny(**changes: str) -> configs.Config:
    return configs.load(STAGE_2, {"model.start": "", "compute.attention": "xla", **changes})


def test_a_plan_of_the_recipe(compiler):
    made, text = plan.plan(tiny(), "v5e-4", folder=epath.Path("unused"))
    assert text == PROGRAM
    # 128 conversations of 0.94 × 576 + 280 tokens in rows of 4,096, of which a hundredth is empty.
    assert made.conversation_tokens == 821
    assert made.recipe_rows == pytest.approx(128 * 821 / (0.99 * 4096))  # 25.9
    assert made.rows_per_chip == 6  # the nearest to 25.9 on 4 chips is 24
    assert compiler["lowered"].in_tree.num_leaves > 20
    assert made.parameters == 7_050_304_512
    assert made.trained_parameters == 6_738_415_616 + 20_979_712
    # Sharded over 4: f32 and two moments of what trains, bf16 of the tower, but for its vectors.
    assert made.optimizer_bytes == pytest.approx(8 * made.trained_parameters / 4, rel=1e-3)
    assert made.weight_bytes == pytest.approx(
        (4 * made.trained_parameters + 2 * 290_909_184) / 4, rel=2e-3
    )
    assert made.peak_hbm_bytes == 11 << 30
    # 6N of what trains, 2N of the tower's tokens, causal attention halved, in 6 rows of 4,096.
    tokens = 6 * 4096
    attention = 6 * 32 * 4096 * 6 * 4096**2
    language = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) * tokens
    assert made.model_flops == pytest.approx(language + attention, rel=0.04)
    assert made.model_flops > language + attention
    # A row of 4,096 holds 4.9 conversations and 4.6 pictures, not the 7 it has slots for.
    assert made.images_per_second == pytest.approx(0.94 * made.conversations_per_second)
    chip = CHIPS["v5e"]
    assert made.static_mfu == made.model_flops / made.step_seconds / chip.flops
    assert sum(made.seconds_by_part.values()) == pytest.approx(made.step_seconds)
    assert made.steps == math.ceil(665_298 / (24 * 4096 * 0.99 / 821))
    assert made.chip_hours == 4 * made.steps * made.step_seconds / 3600
    # Two chips on a line have half the links of a ring, or less.
    assert made.one_axis_seconds >= made.step_seconds + made.synchronous_seconds


@pytest.mark.parametrize(("take", "part"), [("first:1000", 1000 / 665_298), ("fraction:0.1", 0.1)])
def test_a_part_of_the_data_takes_a_part_of_the_time(compiler, take, part):
    folder = epath.Path("unused")
    whole, _ = plan.plan(tiny(), "v5e-4", folder=folder)
    taken, _ = plan.plan(tiny(**{"data.sources.mix_665k.take": take}), "v5e-4", folder=folder)
    assert taken.steps == pytest.approx(part * whole.steps, abs=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"batch.tokens": "0"},
            r"conversation_tokens = 2048 for rows of config\.batch\.tokens = 0",
        ),
        ({"batch.conversations": "0"}, r"config\.batch\.conversations = 0, expected 1 or more"),
        ({"compute.parts": "0"}, r"config\.compute\.parts = 0, expected 1 or more"),
        ({"compute.loss_pieces": "0"}, r"config\.compute\.loss_pieces = 0, expected 1 or more"),
        (
            {"batch.pack": "false", "batch.conversations": "6"},
            "conversations = 6, one a row, for 4 parts",
        ),
    ],
)
def test_what_training_refuses_is_not_planned(compiler, changes, said):
    with pytest.raises(ValueError, match=said):
        plan.plan(tiny(**changes), "v5e-4", folder=epath.Path("unused"))


def test_slots_for_pictures_hold_conversations_too(compiler):
    """94 of 100 conversations have one."""
    few, _ = plan.plan(tiny(**{"batch.images": "3"}), "v5e-4", folder=epath.Path("unused"))
    assert few.filled == pytest.approx(3 / 0.94 * 821 / 4096)
    assert few.images_per_second * few.step_seconds == pytest.approx(
        3 * few.rows_per_chip * few.chips
    )


def test_another_batch_than_the_recipes_is_said(planned):
    ended = planned("--topology", "v5e-8", "--rows_per_chip", 8)
    assert "316 a step on average; the recipe's 128 fill 25.9 rows, here are 64" in ended.out
    assert "ANOTHER BATCH, 2.47 times the recipe's" in ended.out
    assert "ANOTHER" not in planned().out


def test_the_layer_that_is_read_is_the_configs(compiler):
    """The tower's last costs a block more."""
    last, _ = plan.plan(tiny(**{"model.select_layer": "-1"}), "v5e-4", folder=epath.Path("unused"))
    usual, _ = plan.plan(tiny(), "v5e-4", folder=epath.Path("unused"))
    assert last.model_flops > usual.model_flops


def test_links_of_an_axis_that_a_slice_lacks_carry_nothing(compiler):
    flat, _ = plan.plan(tiny(), "v5p-8", folder=epath.Path("unused"))  # 2×2×1
    cube, _ = plan.plan(tiny(), "v5p-16", rows_per_chip=6, folder=epath.Path("unused"))  # 2×2×2
    assert flat.synchronous_seconds == pytest.approx(1.5 * cube.synchronous_seconds)


def test_text_alone_is_the_language_model_with_no_picture(compiler):
    made, _ = plan.plan(
        tiny(**{"batch.tokens": "2048"}),
        "v5e-4",
        rows_per_chip=4,
        text_only=True,
        folder=epath.Path("unused"),
    )
    assert made.trained_parameters == 6_738_415_616
    # The figure that other programs' are compared by: 338 TF for LLaMA-7B.
    assert made.model_flops == pytest.approx(3.379e14, rel=2e-3)
    assert made.images_per_second == 0


def test_lora_and_stage_1(compiler):
    folder = epath.Path("unused")
    changes = {"model.start": "", "compute.attention": "xla"}
    lora, _ = plan.plan(
        configs.load("configs/lora.py:v1.5-7b", changes), "v5e-4", rows_per_chip=1, folder=folder
    )
    stage_1, _ = plan.plan(
        configs.load("configs/stage1.py:v1.5-7b", changes), "v5e-4", rows_per_chip=1, folder=folder
    )
    assert stage_1.trained_parameters == 20_979_712
    assert lora.trained_parameters > 300e6
    assert lora.weight_bytes - stage_1.weight_bytes == pytest.approx(
        4 * (lora.trained_parameters - 20_979_712) / 4, rel=1e-2
    )


def test_an_architecture_that_nobody_knows(compiler):
    with pytest.raises(ValueError, match=r"names no released architecture \(config\.model\.arch"):
        plan.plan(tiny(**{"model.architecture": ""}), "v5e-4", folder=epath.Path("unused"))


# --- the verb ---


@pytest.fixture
def planned(compiler, run_verb, tmp_path):
    def run(*options: object):
        small = ["--config.model.start=", "--config.compute.attention=xla"]
        return run_verb(verb, "--config", STAGE_2, "--topology", "v5e-4", *small, *options)

    return run


def test_the_verb_tells_and_writes_its_figures(planned, tmp_path):
    file, program = tmp_path / "plan.json", tmp_path / "program.txt"
    ended = planned("--json", file, "--dump_hlo", program)
    assert ended.code == 0, ended.err
    assert program.read_text() == PROGRAM
    figures = json.loads(file.read_text())
    wanted = "static_mfu cycles step_seconds peak_hbm_bytes model_flops compiled_flops".split()
    assert all(figures[name] > 0 for name in wanted)
    assert figures["collective_bytes"]["all-gather"] > 0
    for said in (
        "stage2-v1.5-7b on v5e-4: 4 chips, each with 6 rows of 4,096 tokens a step, 99 % of them",
        "7,050,304,512, of which 6,759,395,328 train",
        "119 a step on average; the recipe's 128 fill 25.9 rows, here are 24\n",
        "11.00 of 15.75 GiB, by the compiler",
        "HBM of a chip, 15.75 GiB",
        "waiting for other chips",
        "no chip was asked",
    ):
        assert said in ended.out


def test_what_does_not_fit_is_told_with_what_to_try(planned, compiler, tmp_path):
    compiler["refusal"] = DoesNotFit(20 * 2**30, 15.75 * 2**30, ("3.4G f32[32,1024] some/op",))
    ended = planned("--rows_per_chip", 4, "--json", tmp_path / "plan.json")
    assert ended.code == verb.DOES_NOT_FIT, ended.err
    # The largest first, the compiler's words last. Only weights and moments are more than a v5e
    # has: no setting of the step spares them.
    assert [line.strip() for line in ended.out.splitlines()] == [
        "does not fit: a chip needs 20.00 GiB or more, and has 15.75",
        "12.59 GiB  the optimizer's moments",
        "6.43 GiB  weights",
        "4.00 GiB  what remat 'full' keeps for the backward pass",
        "3.15 GiB  gradients",
        "3.4G f32[32,1024] some/op",
        "to try:",
        "a larger slice",
    ]
    assert not (tmp_path / "plan.json").exists()


ONE_ROW = (
    "--config.batch.conversations=40 --config.compute.remat=full --config.compute.parts=1: "
    "a row a chip, a smaller batch"
)


@pytest.mark.parametrize(
    ("needed", "remat", "tries"),
    [
        # Of three rows 'gate' keeps 17.1 GiB, 'full' 3.0; a sum over parts takes 3.1.
        (
            22,
            "gate",
            [
                "--config.compute.remat=gate --config.compute.parts=3",
                "--config.compute.remat=full --config.compute.parts=1",
                "--search",
                ONE_ROW,
            ],
        ),
        (31, "gate", [ONE_ROW]),
        (17, "full", [ONE_ROW]),  # in parts it would need more
        (40, "gate", []),
    ],
)
def test_only_what_may_help_is_told(planned, compiler, needed, remat, tries):
    compiler["refusal"] = DoesNotFit(needed * 2**30, 15.75 * 2**30, ())
    ended = planned("--topology", "v5e-8", f"--config.compute.remat={remat}")
    said = ended.out.partition("to try:\n")[2].splitlines()
    assert [line.strip() for line in said] == [*tries, "a larger slice"]


def test_a_row_a_chip_is_what_a_smaller_batch_gives(compiler):
    made, _ = plan.plan(tiny(**{"batch.conversations": "40"}), "v5e-8", folder=epath.Path("unused"))
    assert made.rows_per_chip == 1


def test_a_search_tries_what_may_be_faster_and_lists_the_fastest_first(
    planned, compiler, monkeypatch
):
    tried = []
    room = {1: "attention_gate", 2: "attention", 3: "residual", 6: "full"}  # by rows at a time
    policies = list(REMAT_POLICIES)
    held = Held(weights=0, moments=0, language=released("v1.5-7b").language, row=4096)

    def a_plan(config, slice_name, **asked):
        remat, parts = config.compute.remat, config.compute.parts
        tried.append((parts, remat))
        assert asked["rows_per_chip"] == 6  # as training would take them
        number = policies.index(remat)
        if number > policies.index(room[6 // parts]):
            raise plan.TooLarge(DoesNotFit(20 * 2**30, 15.75 * 2**30, ()), held, 6, 1.0)
        return dataclasses.replace(of_recipe, step_seconds=9.0 - number), ""

    of_recipe, _ = plan.plan(tiny(), "v5e-4", folder=epath.Path("unused"))
    monkeypatch.setattr(search.plans, "plan", a_plan)
    monkeypatch.setattr(search, "GATHERS", ("explicit",))
    ended = planned("--search")
    assert ended.code == 0, ended.err
    head, *lines = ended.out.splitlines()
    assert "rows at a time" in head
    # Down to what fits; then only what keeps more than that, and less than what did not fit.
    one_mesh = [
        *((1, remat) for remat in reversed(policies)),
        *((2, remat) for remat in ("gate", "attention", "value", "residual")),
        *((3, remat) for remat in ("gate", "attention")),
        (6, "attention_gate"),
    ]
    assert tried == one_mesh * 2  # the torus, and copies along its longest axis
    assert "data=1 fsdp=0 gather=explicit remat=attention_gate parts=6" in lines[0]
    assert "data=2 fsdp=2 gather=explicit remat=attention_gate parts=6" in lines[1]
    steps = [float(line.split()[6]) for line in lines if "does not fit" not in line]
    assert steps == sorted(steps)
    assert len(steps) == 8
    assert all("needs 20.0" in line for line in lines[8:])
    assert len(lines) == len(tried)


def test_settings_that_a_search_tells_can_be_pasted():
    found = search.Try({"fsdp": (4, 4), "gather": "explicit by axis"}, 1, None, 2**30)
    settings, *_ = verb.line(found)
    assert settings == "fsdp=4,4 gather='explicit by axis'"
    pasted = [f"--config.compute.{each}" for each in shlex.split(settings)]
    compute = configs.load(STAGE_2, configs.parse_overrides(pasted)).compute
    assert (compute.fsdp, compute.gather) == ((4, 4), "explicit by axis")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows_per_chip", "-1"], "got --rows_per_chip -1, expected 1 or more"),
        (["--search", "--json", "plan.json"], "got --search with --json or --dump_hlo"),
        (["--topology", "v5e-3"], "unknown TPU slice 'v5e-3'"),
        (["--cache", ""], "got --cache '', expected a folder"),
        (["--config.compute.loss_pieces=7"], "got 4096 tokens a row for 7 pieces, expected a mult"),
        (["--config.compute.fsdp=3"], r"mesh of 1×3×1"),
        (["--config.compute.tensor=2"], "got config.compute.tensor = 2, expected 1"),
        (["--json", "."], "got '.' for --json or --dump_hlo, expected a file's name"),
        (["--dump_hlo", ""], "got '' for --json or --dump_hlo, expected a file's name"),
    ],
)
def test_bad_input(planned, options, said):
    ended = planned(*options)
    assert ended.code == 2
    assert said in ended.err
    assert "internal frames" not in ended.err  # JAX's note on an error that went through a trace
