"""A training run's checkpoints, from which it goes on to the bit.

    WORKDIR/checkpoints/STEP/
        trainable/   the leaves that train, as they lie in memory
        opt/         the optimizer's state
        meta/        JSON: see Meta; and a sum over the bits of every leaf
    WORKDIR/damaged/STEP/       what could not be restored, put aside

Frozen weights are not in it: they are the base's, named by fingerprint. Checkpoints are written in
the background and appear when they are complete.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llava_jax import files, model_folder, processes
from llava_jax.claiming import CHECKPOINTS, differences
from llava_jax.model_folder import About, Base, StoredModel
from llava_jax.step import State
from llava_jax.weights import orbax_io, settings
from llava_jax.weights.memory import stored_from_memory

TRAINABLE, OPT, META, DAMAGED = "trainable", "opt", "meta", "damaged"
FORMAT = 1
_SAVE_SECONDS = 1200  # the longest that hosts wait for each other's part of a checkpoint


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint belongs to. data: the dataset's fingerprint. skipped: steps so far that
    changed nothing."""

    about: About
    base: Base
    data: Mapping[str, Any]
    skipped: int = 0


class Restored(NamedTuple):
    """notes: checkpoints that were passed over, and why."""

    step: int
    state: State
    meta: Meta
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, on all hosts alike. Close it: the last may still be written."""

    def __init__(self, workdir: epath.Path, *, keep: int, keep_every: int):
        self._workdir, self._folder = workdir, workdir / CHECKPOINTS
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=(TRAINABLE, OPT, META),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
            ),
        )
        self._last: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._or_said(self._manager.close)
        except OSError as unsaved:
            if error is None:
                raise
            error.add_note(str(unsaved))  # what ended the run is told first, and this with it

    def check(self) -> None:
        """Raises if the checkpoint in the background could not be written."""
        self._or_said(self._manager.check_for_errors)

    def wait(self) -> None:
        """Until all is written; raises what `check` does."""
        self._or_said(self._manager.wait_until_finished)

    def _or_said(self, ask: Callable[[], None]) -> None:
        try:
            ask()  # Orbax tells of an error once
        except Exception as error:
            raise OSError(
                f"{self._folder}: the checkpoint of step {self._last} was not written: {error}"
            ) from error

    def save(self, step: int, state: State, meta: Meta) -> None:
        """Begins to write; the state may be changed at once."""
        self.check()
        if self._last != step:
            described = {
                "llava_jax": FORMAT,
                "step": step,
                **settings.to_json(meta),
                "bits": bits_of(state),
            }
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(state.trainable),
                    opt=ocp.args.StandardSave(state.opt),
                    meta=ocp.args.JsonSave(described),
                ),
            )
            self._last = step

    def restore(self, like: State, meta: Meta) -> Restored | None:
        """The last checkpoint that is whole, in the shardings of `like`; None: there is none.

        One that is damaged, or whose bits are not those that were written, is put aside for the one
        before. One of other weights or other data is refused. What may be whole and could not be
        read now stays as it is, as all do if none is whole.
        """
        notes: list[str] = []
        damaged: list[int] = []
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found, problem, unread = None, "", False
            try:
                found = self._restore(step, like, meta)
            except _Refused as refused:
                raise ValueError(str(refused)) from None
            except Exception as error:  # whatever a damaged file makes of its reader
                problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                unread = _may_pass(error)
            if processes.sum_over_processes(unread):
                raise OSError(
                    f"{self._folder}/{step}: could not be read ({problem or 'on another host'}); "
                    "nothing was changed: run the same command again"
                )
            if processes.sum_over_processes(found is None) == 0:
                assert found is not None
                self._last = step
                self._put_aside(damaged)
                return Restored(step, *found, tuple(notes))
            damaged.append(step)
            notes.append(
                f"step {step} is damaged ({problem or 'on another host'}): it is in {DAMAGED}/ now"
            )
        if steps:
            raise ValueError(
                f"{self._folder}: none of the checkpoints can be restored; expected at least one. "
                "To start from the beginning, choose another --workdir, or remove this folder:\n  "
                + "\n  ".join(note.partition(": it is in")[0] for note in notes)
            )
        return None

    def _restore(self, step: int, like: State, meta: Meta) -> tuple[State, Meta]:
        values = _read_meta(self._folder / str(step) / META)
        if values.get("llava_jax") in range(1 << 16) and values["llava_jax"] != FORMAT:
            # Whole, and of another version of this program.
            raise _Refused(
                f"{self._folder}/{step}: got format {values['llava_jax']}, expected {FORMAT}; go "
                "on with the version of llava_jax that wrote it, or choose another --workdir"
            )
        there = _meta_of(values, f"{self._folder}/{step}")
        if refusal := _other(there, meta):
            raise _Refused(f"{self._folder}/{step} {refusal}")
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(like.trainable),
                opt=ocp.args.StandardRestore(like.opt),
            ),
        )
        count = jax.device_put(np.int32(step), like.step.sharding)
        state = State(count, read[TRAINABLE], read[OPT])
        if differing := differences(bits_of(state), values.get("bits", {})):
            raise ValueError(f"{len(differing)} of its arrays are not as they were written")
        return state, there

    def _put_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if processes.is_first():
            (self._workdir / DAMAGED).mkdir(exist_ok=True)
            for step in steps:
                target = self._workdir / DAMAGED / str(step)
                if target.exists():
                    target.rmtree()
                (self._folder / str(step)).rename(target)
        processes.barrier("damaged checkpoint")
        self._manager.reload()


# What TensorStore's errors begin with when a bucket, a network or a right is to blame.
_PASSING = "UNAVAILABLE DEADLINE_EXCEEDED PERMISSION_DENIED UNAUTHENTICATED RESOURCE_EXHAUSTED"
_OF_FILES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError)


def _may_pass(error: Exception) -> bool:
    """Whether the next try may find what this one did not: no file told that it is damaged."""
    if isinstance(error, OSError | MemoryError):
        return not isinstance(error, _OF_FILES)
    return any(status in str(error) for status in _PASSING.split())


class _Refused(Exception):
    """A checkpoint that is whole, and not this run's."""


def _other(there: Meta, here: Meta) -> str | None:
    """Why a checkpoint does not belong to what is trained here."""
    if there.base.fingerprint != here.base.fingerprint:
        return (
            f"was trained over weights of fingerprint {there.base.fingerprint[:12]}… "
            f"({there.base.path}); got {here.base.fingerprint[:12]}… ({here.base.path}): expected "
            "the same; give config.model.start those, or choose another --workdir"
        )
    if there.about.config != here.about.config:
        changed = differences(settings.to_json(here.about), settings.to_json(there.about))
        return "is of another architecture:\n  " + "\n  ".join(changed)
    if changed := differences(here.data, there.data):
        return (
            "was trained on other data; expected the same, or another --workdir:\n  "
            + "\n  ".join(changed)
        )
    return None


@jax.jit
def _bits(leaves: list[jax.Array]) -> list[jax.Array]:
    """The sum of each array's bits, as whole numbers: the same however it is cut over devices, and
    another if any one bit is."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    return [
        jnp.sum(
            jax.lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize]).astype(jnp.uint32),
            dtype=jnp.uint32,
        )
        for leaf in leaves
    ]


def bytes_of(like: State) -> int:
    """Of a checkpoint, uncompressed. like: arrays or shapes."""
    leaves = jax.tree.leaves((like.trainable, like.opt))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def bits_of(state: State) -> dict[str, int]:
    leaves = jax.tree.leaves_with_path({TRAINABLE: state.trainable, OPT: state.opt})
    sums = jax.device_get(_bits([leaf for _, leaf in leaves]))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(total) for name, total in zip(names, sums, strict=True)}


# Reading a workdir as a model.


def read_model(
    workdir: epath.Path, base: epath.Path | None = None, step: int | None = None
) -> StoredModel:
    """The whole model at a step, by default the last: what trained, over its base."""
    steps = sorted(ocp.utils.checkpoint_steps(workdir / CHECKPOINTS))
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir}: got step {step}, expected one of {steps}"
            if steps
            else f"{workdir}: holds no finished checkpoint"
        )
    folder = workdir / CHECKPOINTS / str(steps[-1] if step is None else step)
    meta = _meta_of(_read_meta(folder / META), str(folder / META))
    about = meta.about
    under = model_folder.read_base(workdir, meta.base, base)
    trained = stored_from_memory(about.config, orbax_io.read(folder / TRAINABLE))
    leaves = {**under.leaves, **trained}
    model_folder.check_leaves(leaves, model_folder.stored_shapes(about.config))
    digests = {path: digest for path, digest in under.digests.items() if path not in trained}
    return StoredModel(
        about,
        leaves,
        under.tokenizer,
        digests=digests,
        own=frozenset(trained),
        base=meta.base,
        notes=(f"step {folder.name} of {workdir}: {len(trained)} tensors trained",),
    )


def _meta_of(values: Mapping[str, Any], where: str) -> Meta:
    if values.get("llava_jax") != FORMAT:
        raise ValueError(
            f'{where}: got format {values.get("llava_jax")!r}, expected "llava_jax": {FORMAT}'
        )
    return Meta(
        about=settings.from_json(About, values.get("about"), f"{where}, 'about'"),
        base=settings.from_json(Base, values.get("base"), f"{where}, 'base'"),
        data=values["data"],
        skipped=values["skipped"],
    )


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    file = folder / "metadata"  # where Orbax puts an item of JSON
    if not file.exists():
        raise ValueError(f"{folder}: holds no {file.name}; expected a training checkpoint's")
    return settings.Settings.read(files.path(file)).values  # pyright: ignore[reportReturnType]
