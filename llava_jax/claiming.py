"""Whose a workdir is: what its run was started with, who is at work in it, and whether it has room.

WORKDIR/run.json        what the run was started with: see Record
WORKDIR/.running        locked by the process that trains in it
WORKDIR/plan/           which conversations share a row: see data/schedule.py
WORKDIR/checkpoints/    see checkpoint.py
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from llava_jax import files, processes
from llava_jax.weights import settings

RUN, PLAN, CHECKPOINTS, RUNNING = "run.json", "plan", "checkpoints", ".running"
_PROBE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """config: the settings that decide what is learned. rows: of a step, which the number of
    devices decided when the run began; 0: it has saved nothing, and may have any."""

    config: Mapping[str, Any]
    rows: int


def is_workdir(folder: epath.Path) -> bool:
    return (folder / CHECKPOINTS).is_dir()


def read_run(workdir: epath.Path) -> Record | None:
    """What a workdir's run was started with; None: it is a new one."""
    file = workdir / RUN
    if file.exists():
        values = settings.Settings.read(file)
        begun = is_workdir(workdir) and ocp.utils.checkpoint_steps(workdir / CHECKPOINTS)
        return Record(values.get("config", dict), values.get("rows", int) if begun else 0)
    # Hidden ones are what a run leaves that was killed before it could write run.json.
    if workdir.exists() and any(not entry.name.startswith(".") for entry in workdir.iterdir()):
        raise ValueError(
            f"got --workdir {workdir}, which holds other files; expected a new folder, or a run's"
        )
    return None


@contextlib.contextmanager
def claimed(
    workdir: epath.Path, run: Record, before: Record | None, *, need: int, allow_changes: bool
) -> Iterator[None]:
    """A new folder is this run's from here on; an old one that is another's is refused, and one in
    which another process trains. before: what `read_run` found in it. need: bytes of its
    checkpoints: on a local disk they must be free."""
    if before and (changed := differences(run.config, before.config)) and not allow_changes:
        raise ValueError(
            f"{workdir} holds a run with other settings; choose another --workdir, or say "
            "--allow_changes:\n  " + "\n  ".join(changed)
        )
    with contextlib.ExitStack() as until_the_end:
        if processes.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(_alone_in(workdir))
            _sweep(workdir)
            _try_to_write(workdir, need)
        if before is None:
            write_run(workdir, run)
        processes.barrier("workdir")
        yield


def write_run(workdir: epath.Path, run: Record) -> None:
    if processes.is_first():
        files.write_json(workdir / RUN, dataclasses.asdict(run))


@contextlib.contextmanager
def _alone_in(workdir: epath.Path) -> Iterator[None]:
    """Locked until the end: the system takes the lock back however the process ends. A bucket
    knows no locks."""
    if "://" in str(workdir):
        yield
        return
    place = workdir / RUNNING
    with open(place, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (place.exists() and os.path.samestat(os.stat(place), os.fstat(file.fileno()))):
                raise BlockingIOError  # its holder ended, and took it away, in between
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{workdir}: {file.read() or 'another process'} trains in it; expected one run at "
                "a time: wait for its end, or choose another --workdir"
            ) from None
        file.truncate(0)
        since = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
        print(f"process {os.getpid()} on {socket.gethostname()}, since {since},", end="", file=file)
        file.flush()
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _sweep(workdir: epath.Path) -> None:
    """Removes what a run that was killed had not finished writing."""
    for folder in (workdir, workdir / PLAN):
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name.startswith(".") and ".unfinished-" in entry.name:
                entry.rmtree() if entry.is_dir() else entry.unlink()


def _try_to_write(workdir: epath.Path, need: int) -> None:
    """A full disk is found before hours of training, not by the first checkpoint after them."""
    probe = workdir / ".probe"
    try:
        files.write_bytes(probe, bytes(_PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)
    if "://" in str(workdir):
        return
    # What an older checkpoint has, the next one gets.
    need -= sum(file.lstat().st_size for file in Path(workdir / CHECKPOINTS).rglob("*"))
    if (free := shutil.disk_usage(workdir).free) < need:
        raise OSError(
            f"{workdir}: got {free / 1e6:,.1f} MB of free disk, expected {need / 1e6:,.1f} for "
            "this run's checkpoints: free some, choose another --workdir, or keep fewer "
            "(config.checkpoints.keep)"
        )


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What two mappings say differently, in words; of lists, what differs in them."""
    absent, found = object(), []
    for name in sorted({*here, *there}):
        mine, theirs = here.get(name, absent), there.get(name, absent)
        if _plain(mine) == _plain(theirs):
            continue
        pairs = [(mine, theirs)]
        if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
            items = zip(mine, theirs, strict=False)
            apart = [pair for pair in items if _plain(pair[0]) != _plain(pair[1])]
            pairs = apart if len(mine) == len(theirs) else pairs
        one, other = (", ".join(map(_short, side)) for side in zip(*pairs, strict=True))
        found.append(f"{name}: {one} here, {other} there")
    return found


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # tuples and lists are one in JSON


def _short(value: Any) -> str:
    text = _plain(value)
    return "nothing" if "object object" in text else text if len(text) <= 60 else f"{text[:57]}…"
