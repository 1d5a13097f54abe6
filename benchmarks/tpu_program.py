"""Our training step beside MaxText's, by the TPU compiler's own figures; no chip is asked.

The work is the same: LLaMA at 2,048 tokens, 4 rows a chip, all weights trained with AdamW and f32
masters, sharded over every chip. MaxText's figures are of commit e591f30 with jax 0.12.0.1 and
libtpu 0.0.50.1, and with the flags that are known to help it; run this with the same versions. Both
are priced alike (planner/costs.py): the compiler's cycles, attention kernels at peak, synchronous
collectives; ours with what it looks up in the embedding, which MaxText's cycles hold.
"""

import argparse
import dataclasses
import json
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

CHECKOUT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """theirs: seconds of MaxText's step; 0 where only ours is of interest, on more or fewer chips.
    settings: what ours does best with, of what was tried."""

    model: str
    topology: str
    theirs: float
    settings: dict[str, str]


ALL = {"compute.remat": "all"}
ROWS = {
    "7b-v5e": Row("v1.5-7b", "v5e-256", 2.655, {"compute.remat": "gate"}),
    "7b-v5p": Row("v1.5-7b", "v5p-128", 0.988, ALL),
    "7b-v6e": Row("v1.5-7b", "v6e-64", 0.919, ALL),
    "13b-v5e": Row("v1.5-13b", "v5e-256", 5.605, {"compute.remat": "residual"}),
    "13b-v5p": Row("v1.5-13b", "v5p-128", 1.818, ALL),
    "7b-v5e-64": Row("v1.5-7b", "v5e-64", 0.0, {"compute.remat": "gate"}),
    "7b-v5p-1024": Row("v1.5-7b", "v5p-1024", 0.0, ALL),
}


def main() -> None:
    args = _parse()
    changes = configs.parse_overrides([f"--config.{change}" for change in args.change])
    print("| row | a step, s | MaxText | ratio | static MFU | cycles, M | peak, GiB | kernels |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.rows:
        row = ROWS[name]
        settings = {"batch.tokens": "2048", "compute.loss_pieces": "1", **row.settings, **changes}
        config = configs.load(f"{CHECKOUT / 'configs/stage2.py'}:{row.model}", settings)
        try:
            plan, text = plans.plan(
                config,
                row.topology,
                rows_per_chip=4,
                text_only=True,
                folder=files.path(args.cache).expanduser(),
            )
        except DoesNotFit as too_much:
            print(f"| {name} | does not fit: {too_much} | | | | | | |", flush=True)
            continue
        if args.out:
            folder = Path(args.out)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(plan), indent=1))
            (folder / f"{name}.txt").write_text(text)
        beside = f"{row.theirs} | {plan.step_seconds / row.theirs:.3f}" if row.theirs else " | "
        print(
            f"| {name} | {plan.step_seconds:.3f} | {beside} | {100 * plan.static_mfu:.1f} % | "
            f"{plan.cycles / 1e6:,.0f} | {plan.peak_hbm_bytes / 2**30:.2f} | "
            f"{sum(plan.kernel_calls.values()):.0f} |",
            flush=True,
        )


def _parse() -> argparse.Namespace:
    parser = cli.parser(__doc__, "python benchmarks/tpu_program.py --rows 7b-v5p --out programs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--change", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", metavar="DIR", help="figures and scheduled programs")
    parser.add_argument("--cache", default="~/.cache/llava_jax/planned", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
