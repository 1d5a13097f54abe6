"""What the recipes take on the slices people have, by the TPU compiler's own figures.

Each row is planned as `launch/plan.py` plans it, with the settings that do best there of what was
tried. No chip is asked. A row is minutes of compiling; answers are kept in --cache, so that a table
that was interrupted goes on where it was. rows: of a chip. by axis: the static MFU if what runs
along one axis of the torus has that axis's links alone, and half of them where it is no ring.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_jax import cli, files
from llava_jax import config as configs
from llava_jax.planner import plan as plans
from llava_jax.planner.compiling import DoesNotFit
from llava_jax.planner.plan import Plan

CHECKOUT = Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """settings: fields of its config and their values."""

    config: str
    topology: str
    settings: tuple[str, ...] = ()


def _runs(config: str, **settings: str) -> tuple[Run, ...]:
    """settings: of each slice, in words; v5e_16 = 'compute.remat=full batch.tokens=2048'."""
    return tuple(
        Run(config, slice_name.replace("_", "-"), tuple(said.split()))
        for slice_name, said in settings.items()
    )


KEEP = "compute.remat="
# Rows of 2,048 tokens where the recipe's batch has not one of 4,096 for every chip, and of 2,560
# where the paper's has so few conversations that eight chips would have less than one.
SHORT = "batch.tokens=2048 batch.images=4 "
PAPER = "batch.tokens=2560 batch.images=9 "
RUNS = (
    *_runs(
        "stage2.py:v1.5-7b",
        v5e_16=KEEP + "residual",
        v5e_32=KEEP + "attention_gate",
        v5e_64=SHORT + KEEP + "all",
        v5p_8=KEEP + "attention_gate",
        v5p_16=KEEP + "all",
        v5p_32=KEEP + "all",
        v6e_8=KEEP + "value",
        v6e_16=KEEP + "attention_gate",
        v6e_32=KEEP + "all",
        v4_8=KEEP + "full compute.parts=6",
        v4_32=KEEP + "attention_gate",
    ),
    *_runs("stage2.py:v1.5-7b", v4_8="batch.conversations=20 " + KEEP + "residual"),
    *_runs(
        "stage2.py:v1.5-13b",
        v5e_32=KEEP + "value",
        v5e_64=SHORT + KEEP + "attention_gate",
        v5p_16=KEEP + "all",
        v5p_32=KEEP + "all",
        v6e_16=KEEP + "residual",
        v6e_32=KEEP + "attention_gate",
        v4_32=KEEP + "value",
    ),
    *_runs(
        "stage2.py:v1-13b",
        v6e_8=PAPER + "compute.loss_pieces=1 " + KEEP + "value",
        v5p_16=PAPER + KEEP + "all",
    ),
    *_runs(
        "stage2.py:v1.5-7b-large",
        **{
            "v5e_256": KEEP + "all",
            "2xv5e_256": SHORT + KEEP + "all",
            "v5p_128": KEEP + "all",
            "v6e_64": KEEP + "gate",
        },
    ),
    *_runs(
        "stage2.py:v1.5-13b-large",
        **{
            "v5e_256": KEEP + "gate",
            "2xv5e_256": SHORT + KEEP + "all",
            "v5p_128": KEEP + "all",
            "v6e_64": KEEP + "value",
        },
    ),
    *_runs(
        "stage1.py:v1.5-7b",
        v5e_1="compute.parts=56 " + KEEP + "full",
        v5e_4="compute.parts=14 " + KEEP + "all",
        v5e_8="compute.parts=7 " + KEEP + "all",
        v6e_1="compute.parts=56 " + KEEP + "all",
    ),
    *_runs(
        "lora.py:v1.5-7b",
        v5e_4="compute.parts=8 " + KEEP + "gate",
        v5e_8="compute.parts=4 " + KEEP + "attention_gate",
        v6e_1="compute.parts=26 " + KEEP + "attention_gate",
    ),
)


def main() -> None:
    args = _parse()
    print("| config | slice | settings | rows | a step, s | static MFU | by axis | GiB | hours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        name = " ".join(named(run))
        if args.only and not any(part in name for part in args.only):
            continue
        print(f"| {line(run, args.cache)} |", flush=True)


def planned(run: Run, cache: str) -> Plan:
    settings = configs.parse_overrides([f"--config.{setting}" for setting in run.settings])
    config = configs.load(str(CHECKOUT / "configs" / run.config), settings)
    return plans.plan(config, run.topology, folder=files.path(cache).expanduser())[0]


def named(run: Run) -> list[str]:
    """The cells that say which run it is."""
    settings = " ".join(f"`{setting}`" for setting in run.settings)
    return [run.config.replace(".py:", " "), run.topology, settings]


def line(run: Run, cache: str) -> str:
    try:
        plan = planned(run, cache)
    except DoesNotFit as too_much:
        return " | ".join([*named(run), "", "does not fit", "", "", str(too_much), ""])
    return " | ".join(
        [
            *named(run),
            f"{plan.rows_per_chip} × {plan.row_tokens:,}",
            f"{plan.step_seconds:.3f}",
            f"{100 * plan.static_mfu:.1f} %",
            f"{100 * plan.static_mfu * plan.step_seconds / plan.one_axis_seconds:.1f} %",
            f"{plan.peak_hbm_bytes / 2**30:.2f} of {plan.hbm_bytes / 2**30:.2f}",
            f"{plan.hours:.1f}",
        ]
    )


def _parse() -> argparse.Namespace:
    parser = cli.parser(__doc__, "python benchmarks/tpu_runs.py --only 'stage2 v1.5-7b v5e'")
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose name has it")
    parser.add_argument("--cache", default="~/.cache/llava_jax/planned", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
