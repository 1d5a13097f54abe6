"""Trains one stage of LLaVA: on a pod, a TPU VM, a Colab TPU, a GPU or a laptop.

Run again with the same --workdir, it goes on from the last checkpoint, to the bit; on a pod the
same command runs on every host. The workdir gets metrics.jsonl, events.jsonl, TensorBoard's files,
report.html to look at, checkpoints/ and, in the end, model/, a model folder.

Exit codes: 0 done, 2 something to mend, 75 saved and stopped by SIGTERM: run it again to go on; 130
the same by Ctrl-C (a second one stops at once).
"""

import contextlib
import dataclasses
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath

from llava_jax import (
    allocator,
    batch,
    checkpoint,
    claiming,
    cli,
    files,
    held_out,
    model_folder,
    optim,
    processes,
    starting,
    telling,
)
from llava_jax import config as configs
from llava_jax import program as programs
from llava_jax.checkpoint import Checkpoints, Meta
from llava_jax.claiming import Record
from llava_jax.config import Config
from llava_jax.data import report, schedule
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.schedule import Schedule
from llava_jax.held_out import HeldOut
from llava_jax.optim import Params, Part
from llava_jax.processes import Stopping
from llava_jax.program import Program
from llava_jax.starting import Start
from llava_jax.step import State
from llava_jax.telling import Telling, say
from llava_jax.weights import exporting, memory

EXAMPLE = "python launch/train.py --config configs/stage2.py:v1.5-7b --workdir runs/stage2"

STOPPED = 75  # what sysexits calls a failure for now: try again
_PREPARATION_SECONDS = 6 * 3600
T = TypeVar("T")


def main() -> int:
    parser = cli.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--workdir", metavar="DIR", help="a new folder, or a run's to go on with; gs:// works"
    )
    parser.add_argument(
        "--allow_changes", action="store_true", help="go on in a workdir with other settings"
    )
    options, config = configs.parse_arguments(parser)
    allocator.keep_memory()
    starting.check_present(config)
    if config.compute.cache:
        folder = files.path(config.compute.cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    with processes.connected():
        workdir = files.absolute(options.workdir or default_workdir(config))
        return train(config, workdir, allow_changes=options.allow_changes)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    workdir: epath.Path
    dataset: Dataset
    steps: Schedule
    start: Start
    program: Program
    examined: HeldOut | None


def train(config: Config, workdir: epath.Path, *, allow_changes: bool) -> int:
    # The machine, the model's shapes, and the data: every step's rows are known from here on.
    layout = programs.layout_of(config.compute, jax.devices())
    start = starting.open_start(config, workdir)
    before = claiming.read_run(workdir)
    dataset = one_after_another(lambda: open_dataset(config))
    starting.check_vocabulary(start, config, dataset.renderer.tokenizer.num_ids)
    steps = schedule.schedule(
        dataset,
        multiple=layout.batch_parts * config.compute.parts,
        rows=before.rows if before else 0,
        plans=schedule.kept_plans(dataset, workdir / claiming.PLAN),
    )
    examined = one_after_another(lambda: held_out.open_held_out(config, layout.batch_parts))
    program = programs.program(
        config, start.about.config, layout, steps=len(steps), rows=steps.rows_per_step
    )
    run = Run(config, workdir, dataset, steps, start, program, examined)

    # The workdir is this run's from here on, and has room for it.
    record = Record(configs.deciding(config), steps.rows_per_step)
    keep, stopping = config.checkpoints, Stopping()
    need = checkpoint.bytes_of(program.like) * (keep.keep + 1)
    with (
        claiming.claimed(workdir, record, before, need=need, allow_changes=allow_changes),
        Checkpoints(workdir, keep=keep.keep, keep_every=keep.keep_every) as saved,
    ):
        say(f"workdir: {workdir}; to go on with it: {resuming(workdir)}")
        say(*start.notes, *(f"{name}: {said}" for name, said in report.steps(dataset, steps)))
        meta = Meta(start.about, start.base, dict(dataset.fingerprint))
        restored = saved.restore(program.like, meta)
        first = restored.step if restored else 0
        if restored:
            meta = dataclasses.replace(meta, skipped=restored.meta.skipped)
            say(*restored.notes, f"goes on from step {first} of {len(steps)}")
        # Nothing of an old workdir is changed before its checkpoint proved to be this run's.
        claiming.write_run(workdir, record)
        if processes.is_first():
            schedule.keep_plans(dataset, steps.plans, workdir / claiming.PLAN)
        if first == len(steps):
            say("this run is finished: nothing is left to train")
        else:
            # Weights go straight into their shards. What trains comes from the last checkpoint.
            frozen = load(start, program.frozen_like, "frozen weights")
            state = (
                restored.state
                if restored
                else program.init(load(start, program.like.trainable, "trained weights"))
            )
            parts = optim.parts(state.trainable, frozen)
            say(parts_table(parts))
            put_aside(run, first)
            told = Telling(
                config,
                workdir,
                dataset,
                steps,
                program,
                parts,
                first,
                meta.skipped,
                command=resuming(workdir),
                asked=examined.asked if examined else (),
            )
            with told, stopping:
                loop(run, state, frozen, first, saved, meta, told, stopping)

    if stopping.signal is not None:
        say(f"stopped by {stopping.signal.name} and saved; to go on: {resuming(workdir)}")
        return STOPPED if stopping.signal == signal.SIGTERM else 128 + stopping.signal
    if processes.is_first():
        write_model(run)
    return 0


def loop(
    run: Run,
    state: State,
    frozen: Params,
    first: int,
    saved: Checkpoints,
    meta: Meta,
    told: Telling,
    stopping: Stopping,
) -> None:
    """From step `first` to the last, or to a signal."""
    config, layout, last = run.config, run.program.layout, len(run.steps)
    rows = run.steps.rows_per_step
    local = layout.local_rows(rows)
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=layout.replicated)()
    step, number = None, first
    reading = read_ahead(run.dataset, run.steps, places=local, start=first)
    with contextlib.closing(reading):
        while number < last and not stopping.at(number):
            with told.clock.waiting():
                read = next(reading)
            placed = layout.placed(read.batch, local, rows)
            if step is None:
                check_batch(run, read.batch)
                told.first_batch(read)
                step = compiled(run.program, state, frozen, placed, key)
                told.begin()
            told.profile(number)
            state, result = step(state, frozen, placed, key)
            told.step(number, result, read)
            number += 1
            # Measured before it is saved: a run that is killed between the two does both again.
            if run.examined and (number == last or number % config.held_out.every == 0):
                told.catch_up()
                told.held_out(
                    number,
                    run.examined.loss(run.program, state, frozen),
                    run.examined.answers(run.program, run.start.about, state, frozen),
                )
            if number == last or number % config.checkpoints.every == 0:
                # First told, then saved: no checkpoint counts whose steps are told nowhere.
                told.catch_up()
                told.saved(number)
                saved.save(number, state, dataclasses.replace(meta, skipped=told.skipped))
                told.clock.restart()
            saved.check()
    told.catch_up()
    if number < last:
        told.stopped(number)
        saved.save(number, state, dataclasses.replace(meta, skipped=told.skipped))
    saved.wait()


def default_workdir(config: Config) -> str:
    if processes.count() > 1:
        raise ValueError("got no --workdir, expected the same one on every host")
    return f"runs/{config.name}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"


def resuming(workdir: epath.Path) -> str:
    """The command that goes on with this run."""
    words = [word for word in sys.argv if not word.startswith("--workdir=")]
    if "--workdir" in words:
        at = words.index("--workdir")
        del words[at : at + 2]
    return shlex.join(["python", *words, "--workdir", str(workdir)])


def one_after_another(work: Callable[[], T]) -> T:
    """The first host alone, then the others, who find what it wrote."""
    done = work() if processes.is_first() else None
    processes.barrier("preparation", timeout_s=_PREPARATION_SECONDS)
    return work() if done is None else done


def load(start: Start, like: Params, what: str) -> Params:
    total = sum(leaf.size for leaf in jax.tree.leaves(like))
    with telling.progress(total, f"reading {what}", "values") as bar:
        return memory.loaded(start.leaves, like, bar.advance)


def parts_table(parts: list[Part]) -> str:
    lines = [
        (
            part.name,
            f"{part.parameters:,}",
            "trains" if part.trains else "frozen",
            part.dtype,
            f"{part.weight_bytes / 1e6:,.1f}",
            f"{part.moment_bytes / 1e6:,.1f}",
        )
        for part in parts
    ]
    head = ("part", "parameters", "", "dtype", "weights, MB a device", "optimizer, MB a device")
    return report.table(head, lines)


def check_batch(run: Run, local: batch.Batch) -> None:
    """The first batch must keep the contract that the model was written to."""
    batch.validate(
        local,
        tokens_per_image=run.start.about.config.tokens_per_image,
        image_size=run.start.about.config.vision.image_size,
        vocab_size=run.start.about.config.language.num_ids,
    )


def compiled(program: Program, *arguments: Any) -> Any:
    """The step as one program: with anything else than these shapes it cannot be called."""
    say("compiling…")
    begin = time.perf_counter()
    step = program.step.lower(*arguments).compile(compiler_options=dict(program.options))
    say(f"compiled in {time.perf_counter() - begin:.1f} s{telling.memory_of(step)}")
    return step


def put_aside(run: Run, step: int) -> None:
    """A run that was finished and now goes on, with more epochs or from the beginning, makes its
    model anew."""
    for name in filter(None, ("model", run.config.export)):
        if processes.is_first() and (run.workdir / name).exists():
            (run.workdir / name).rename(run.workdir / f"{name}-before-step-{step}")


def write_model(run: Run) -> None:
    """The trained model as a folder: whole if the language model learned, else over its base."""
    target = run.workdir / "model"
    stored = checkpoint.read_model(run.workdir)
    if not target.exists():
        if "language/decoder/norm/scale" in stored.own:
            base = None
        else:
            folder = files.path(run.config.model.start)
            stored, base = model_folder.thin(stored, folder, target)
        with telling.progress(stored.nbytes, "writing the model", "bytes") as bar:
            model_folder.save(stored, target, base=base, on_bytes=bar.advance)
    say(f"model: {target}")
    if run.config.export:
        exported = run.workdir / run.config.export
        if not exported.exists():
            exporting.export(checkpoint.read_model(run.workdir), exported, run.config.export)
        say(f"for PyTorch: {exported}")


if __name__ == "__main__":
    cli.run(main)
