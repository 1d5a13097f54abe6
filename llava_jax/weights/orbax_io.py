"""Orbax checkpoints that stream: written one tensor at a time, read when asked for.

Orbax wants the tree it saves in memory. Here its leaves are unread `Tensor`s, which a handler of
ours reads, shows to the caller and writes one after another, the next being read meanwhile;
restoring gives `Tensor`s back, each a handle on the stored array. The checkpoint is an ordinary
one: `ocp.StandardCheckpointer().restore(folder)` reads it.
"""

import asyncio
import contextlib
import logging
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import future, type_handlers

from llava_jax.weights.tensor import Index, Tensor

# A stored array is cut into chunks of at most this much, so that a host can read its shard alone.
_CHUNK_BYTES = 8 << 20
# As much is in memory three times over: being read, being written, being buffered.
_GROUP_BYTES = 64 << 20
# Data files are buffered whole before they are written.
_DATA_FILE_BYTES = 256 << 20


def save(
    folder: epath.Path, leaves: Mapping[str, Tensor], on_tensor: Callable[[str, np.ndarray], None]
) -> None:
    """Writes a checkpoint with one leaf for each path; `a/b/c` is three levels deep."""
    tree: dict = {}
    for path, tensor in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _Leaf(path, tensor)
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    args = ocp.args.PyTreeSave(
        tree, save_args=save_args, ocdbt_target_data_file_size=_DATA_FILE_BYTES
    )
    handler = _Handler(on_tensor)
    try:
        with _quietly(), _checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=args)
    except KeyboardInterrupt:
        # Orbax writes in a thread of its own; what it still wrote would be left behind.
        logging.getLogger("absl").disabled = True  # what ends there now is no news
        handler.stop()
        raise
    except ValueError as error:
        # TensorStore's errors of a full disk are no OSErrors, and carry the number in their text.
        if number := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def read(folder: epath.Path) -> dict[str, Tensor]:
    """The leaves of a checkpoint by path, unread."""
    if "://" not in str(folder):
        folder = epath.Path(os.path.abspath(folder))  # TensorStore knows no current folder
    if not (folder / "_METADATA").exists():
        raise ValueError(f"got {folder}, which holds no Orbax checkpoint (no '_METADATA')")
    try:
        with _quietly(), _checkpointer(_Handler()) as checkpointer:
            found = checkpointer.metadata(folder).item_metadata
            if found is None:
                raise ValueError("its metadata is damaged")
            restore_args = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(restore_type=_Leaf), found.tree
            )
            args = ocp.args.PyTreeRestore(restore_args=restore_args)
            tree = checkpointer.restore(folder, args=args)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: the Orbax checkpoint cannot be read: {error}") from error
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        leaves[path] = _stored(leaf.tensor, f"{folder}: {path}")
    return leaves


def _stored(array: ts.TensorStore, origin: str) -> Tensor:
    def part(index: Index) -> np.ndarray:
        try:
            return np.asarray(array[index].read().result())
        except (ValueError, OSError) as error:
            raise ValueError(f"{origin}: cannot be read: {error}") from error

    shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
    return Tensor(shape, dtype, lambda: part((slice(None),) * len(shape)), origin, part)


class _Leaf:
    """What stands in the tree Orbax sees: an unread tensor, or a handle on a stored one."""

    def __init__(self, path: str, tensor):
        self.path, self.tensor = path, tensor

    @property
    def nbytes(self) -> int:  # for Orbax's own report
        return self.tensor.nbytes


class _Handler(type_handlers.NumpyHandler):
    def __init__(self, on_tensor: Callable[[str, np.ndarray], None] = lambda path, array: None):
        super().__init__(deepcopy_host_arrays=False)
        self._on_tensor = on_tensor
        self._stopping, self._idle = threading.Event(), threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Ends the writing, and waits for what is under way."""
        self._stopping.set()
        self._idle.wait()

    async def serialize(self, values: Sequence[Any], infos, args=None):  # our _Leaf for np.ndarray
        args = args or [type_handlers.SaveArgs()] * len(values)
        return [
            future.CommitFutureAwaitingContractedSignals(
                self._write_one_by_one(values, infos, args), name="llava_jax_tensors"
            )
        ]

    async def _write_one_by_one(self, values, infos, args) -> None:
        loop = asyncio.get_running_loop()

        def read(leaves: Sequence[_Leaf]) -> list[np.ndarray]:
            arrays = []
            for leaf in leaves:
                if self._stopping.is_set():
                    raise InterruptedError(f"interrupted before {leaf.path}")
                array = leaf.tensor.read()
                promised = (leaf.tensor.shape, leaf.tensor.dtype)
                assert (array.shape, array.dtype) == promised, leaf.path
                self._on_tensor(leaf.path, array)
                arrays.append(array)
            return arrays

        self._idle.clear()
        groups = _groups([leaf.nbytes for leaf in values])
        coming = loop.run_in_executor(None, read, values[groups[0]])
        try:
            for this, following in zip(groups, [*groups[1:], None], strict=True):
                arrays = await coming
                if following is not None:
                    coming = loop.run_in_executor(None, read, values[following])
                each = zip(arrays, infos[this], args[this], strict=True)
                await _all([self._background_serialize([x], [i], [a]) for x, i, a in each])
        finally:
            await asyncio.gather(coming, return_exceptions=True)
            self._idle.set()

    async def deserialize(self, infos, args=None) -> Any:
        handles = []
        for info in infos:
            spec = type_handlers.get_json_tspec_read(info, use_ocdbt=bool(info.is_ocdbt_checkpoint))
            handles.append(ts.open(ts.Spec(spec), open=True, context=info.ts_context))
        opened = await asyncio.gather(*handles)
        return [_Leaf(info.name, array) for info, array in zip(infos, opened, strict=True)]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Orbax logs tracebacks of the very errors it raises; said once is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


async def _all(writes: Sequence[Awaitable]) -> None:
    """Waits for every one, even if one fails: what is left behind would complain on its own."""
    for result in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _groups(sizes: Sequence[int]) -> list[slice]:
    """Neighbours to be written together: each write is a commit, which small tensors share."""
    groups, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held and held + size > _GROUP_BYTES:
            groups.append(slice(start, i))
            start, held = i, 0
        held += size
    return [*groups, slice(start, len(sizes))]


def _checkpointer(handler: _Handler) -> ocp.Checkpointer:
    registry = type_handlers.create_type_handler_registry(
        (_Leaf, handler),
        (jax.Array, type_handlers.ArrayHandler()),  # none is stored; without it Orbax warns
    )
    # A folder is one process' work, whatever the others do; Orbax would wait for them.
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"alone-{mine}"
    )
    # Weights are noise to a compressor: it would take longer than the disk and save nothing.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_compression=False, type_handler_registry=registry, multiprocessing_options=alone
        ),
        multiprocessing_options=alone,
    )
