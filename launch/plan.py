"""Plans a run on a TPU slice before it is rented: does it fit, how fast is it, how long is it.

The TPU compiler, which needs no TPU, compiles the very step that train.py would run; what is told
are its own figures and arithmetic on them. No chip was asked. Answers of the compiler are kept in
--cache, so that the same question is answered at once. The compiler comes with
pip install 'llava-jax[tpu]'.

Exit codes: 0 it fits, 3 it does not, 2 something to mend.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping

# Also on a TPU machine, whose chips a training may hold.
os.environ["JAX_PLATFORMS"] = "cpu"

from llava_jax import cli, files
from llava_jax import config as configs
from llava_jax.config import Compute, Config
from llava_jax.data import report
from llava_jax.planner import plan as plans
from llava_jax.planner import search as searching
from llava_jax.planner.plan import Plan, TooLarge
from llava_jax.planner.search import Try

EXAMPLE = "python launch/plan.py --config configs/stage2.py:v1.5-7b --topology v5e-16"
DOES_NOT_FIT = 3
_WIDTH = 40


def main() -> int:
    parser = cli.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--topology", required=True, metavar="SLICE", help="v5e-16, v5p-128, 2xv5e-256, …"
    )
    parser.add_argument(
        "--rows_per_chip", type=int, default=0, metavar="N", help="default: the recipe's batch"
    )
    parser.add_argument(
        "--text_only", action="store_true", help="the language model alone, all of it training"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try what is kept, rows at a time, gathers, meshes, whatever the config has",
    )
    parser.add_argument("--json", metavar="FILE", help="the figures")
    parser.add_argument("--dump_hlo", metavar="FILE", help="the scheduled program")
    parser.add_argument(
        "--cache", default="~/.cache/llava_jax/planned", metavar="DIR", help="of the compiler"
    )
    options, config = configs.parse_arguments(parser)
    if options.rows_per_chip < 0:
        raise ValueError(f"got --rows_per_chip {options.rows_per_chip}, expected 1 or more")
    if options.search and (options.json or options.dump_hlo):
        raise ValueError("got --search with --json or --dump_hlo, of one program; expected either")
    if not options.cache:
        raise ValueError("got --cache '', expected a folder for the compiler's answers")
    folder = files.path(options.cache).expanduser()
    if options.search:
        tries = searching.search(
            config,
            options.topology,
            rows_per_chip=options.rows_per_chip,
            text_only=options.text_only,
            folder=folder,
            on_try=lambda each: print("  ".join(line(each)), file=sys.stderr, flush=True),
        )
        print(report.table(HEAD, [line(each) for each in tries]))
        return 0 if any(each.plan for each in tries) else DOES_NOT_FIT
    for file in (options.json, options.dump_hlo):
        if file is not None and (not file or files.path(file).is_dir()):
            raise ValueError(f"got {file!r} for --json or --dump_hlo, expected a file's name")
    try:
        plan, text = plans.plan(
            config,
            options.topology,
            rows_per_chip=options.rows_per_chip,
            text_only=options.text_only,
            folder=folder,
            on_wait=lambda seconds: _wait(config, options.topology, seconds),
        )
    except TooLarge as too_much:
        print(refusal(too_much, config))
        return DOES_NOT_FIT
    print(told(plan), flush=True)
    if options.json:
        files.write_json(files.path(options.json), dataclasses.asdict(plan))
    if options.dump_hlo:
        files.write_text(files.path(options.dump_hlo), text)
    return 0


HEAD = ("--config.compute.", "rows at a time", "a step, s", "static MFU", "GiB", "tokens/s")


def line(found: Try) -> tuple[str, ...]:
    names = (" ".join(_setting(*each) for each in found.settings.items()), str(found.rows))
    if found.plan is None:
        return (*names, "does not fit", "", f"needs {found.needed / 2**30:.1f}", "")
    return (
        *names,
        f"{found.plan.step_seconds:.3f}",
        f"{100 * found.plan.static_mfu:.1f} %",
        f"{found.plan.peak_hbm_bytes / 2**30:.2f}",
        f"{found.plan.tokens_per_second:,.0f}",
    )


def _setting(name: str, value: object) -> str:
    said = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{name}={said!r}" if " " in said else f"{name}={said}"


def _wait(config: Config, slice_name: str, seconds: int) -> None:
    said = f"{seconds // 60} min so far" if seconds else "this takes minutes"
    print(f"compiling {config.name} for {slice_name}: {said}", file=sys.stderr, flush=True)


def told(plan: Plan) -> str:
    gib, tera = 2**30, 1e12
    kernels = sum(plan.kernel_flops.values())
    figures = {
        "run": f"{plan.config} on {plan.topology}: {plan.chips} chips, each with "
        f"{plan.rows_per_chip} rows of {plan.row_tokens:,} tokens a step, "
        f"{100 * plan.filled:.0f} % of them filled (assumed)",
        "parameters": f"{plan.parameters:,}, of which {plan.trained_parameters:,} train",
        "a chip's FLOPs": f"{plan.model_flops / tera:.1f} T of the model's, "
        f"{plan.compiled_flops / tera:.1f} T compiled and {kernels / tera:.1f} T in "
        f"{sum(plan.kernel_calls.values()):.0f} attention kernels",
        "a chip's traffic": "; ".join(
            f"{kind} {nbytes / 1e9:.2f} GB" for kind, nbytes in plan.collective_bytes.items()
        ),
        "a step": f"{plan.step_seconds:.3f} s: {plan.compute_seconds:.3f} s of compute beside "
        f"{plan.asynchronous_seconds:.3f} s of asynchronous collectives, then "
        f"{plan.synchronous_seconds:.3f} s of synchronous ones",
        "static MFU": f"{100 * plan.static_mfu:.1f} %"
        f"{_less_kindly(plan) if plan.one_axis_seconds > 1.001 * plan.step_seconds else ''}",
        "a second": f"{plan.conversations_per_second:,.1f} conversations, "
        f"{plan.tokens_per_second:,.0f} tokens, {plan.images_per_second:,.1f} pictures "
        f"(assumed: {plan.conversation_tokens} tokens a conversation)",
        "the run": f"{plan.steps:,} steps, {plan.hours:.1f} h, {plan.chip_hours:,.0f} chip-hours"
        if plan.steps
        else "its length is not known: a source says no size",
        "conversations": f"{plan.conversations:.0f} a step on average; the recipe's "
        f"{plan.recipe_conversations} fill {plan.recipe_rows:.1f} rows, here are "
        f"{plan.rows_per_chip * plan.chips}{_another_batch(plan)}",
        "compiled": "before" if plan.compiled_before else f"in {plan.compile_seconds:.0f} s",
    }
    figures["a chip's peak"] = (
        f"{plan.peak_hbm_bytes / gib:.2f} of {plan.hbm_bytes / gib:.2f} GiB, by the compiler"
    )
    memory = {
        "weights": plan.weight_bytes / gib,
        "optimizer": plan.optimizer_bytes / gib,
        "activations and gradients": plan.activation_bytes / gib,
        "free": (plan.hbm_bytes - plan.peak_hbm_bytes) / gib,
    }
    return "\n".join(
        [
            *(f"{name:20}{said}" for name, said in figures.items()),
            "",
            *bars(f"HBM of a chip, {plan.hbm_bytes / gib:.2f} GiB", memory, "GiB"),
            "",
            *bars("time of a step", plan.seconds_by_part, "s"),
            "",
            "All of it is the compiler's opinion and arithmetic; no chip was asked. What it has no "
            "opinion on, attention kernels and rows of embeddings, is priced at the chip's peak.",
        ]
    )


def _another_batch(plan: Plan) -> str:
    times = plan.conversations / plan.recipe_conversations
    return "" if 2 / 3 < times < 1.5 else f": ANOTHER BATCH, {times:.2f} times the recipe's"


def _less_kindly(plan: Plan) -> str:
    mfu = plan.static_mfu * plan.step_seconds / plan.one_axis_seconds
    return (
        f"; {100 * mfu:.1f} % ({plan.one_axis_seconds:.3f} s) if a collective along one axis has "
        "that axis's links alone, and half of them where it is no ring"
    )


def bars(title: str, sizes: Mapping[str, float], unit: str) -> list[str]:
    total = sum(sizes.values())
    return [title] + [
        f"  {name:26}{size:9.3f} {unit:4}{100 * size / total:5.1f} %  "
        + "█" * round(_WIDTH * size / total)
        for name, size in sizes.items()
    ]


def refusal(too_much: TooLarge, config: Config) -> str:
    compute, held, gib = config.compute, too_much.held, 2**30
    terms = held.terms(compute, too_much.rows)
    largest_first = sorted(terms.items(), key=lambda term: -term[1])
    return "\n".join(
        [
            f"does not fit: a chip needs {too_much.needed / gib:.2f} GiB or more, and has "
            f"{too_much.limit / gib:.2f}",
            *(f"  {nbytes / gib:6.2f} GiB  {name}" for name, nbytes in largest_first),
            *(f"  {line}" for line in too_much.largest),
            "to try:",
            *(f"  {line}" for line in _may_fit(too_much, compute)),
            "  a larger slice",
        ]
    )


def _may_fit(too_much: TooLarge, compute: Compute) -> list[str]:
    """By the planner's terms: as much kept in more parts, less kept, fewer rows."""
    held, rows = too_much.held, too_much.rows
    if held.lasting >= too_much.limit:
        return []  # no setting of a step spares weights and moments

    def may_fit(saved: float) -> bool:
        return too_much.needed - saved < too_much.limit

    fewest_parts = {}
    for (remat, parts), saved in held.leaner(compute, rows).items():
        if may_fit(saved):
            fewest_parts.setdefault(remat, parts)
    lines = [
        f"--config.compute.remat={remat} --config.compute.parts={parts}"
        for remat, parts in fewest_parts.items()
    ]
    lines += ["--search"] if lines else []
    alone = dataclasses.replace(compute, parts=1, remat="full")
    if rows > 1 and may_fit(held.total(compute, rows) - held.total(alone, 1)):
        lines.append(
            f"--config.batch.conversations={round(too_much.conversations)} "
            "--config.compute.remat=full --config.compute.parts=1: a row a chip, a smaller batch"
        )
    return lines


if __name__ == "__main__":
    cli.run(main)
