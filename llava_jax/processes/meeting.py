"""Processes that are connected, wait for each other with a time limit, and end together.

What happens when one of them goes:
- It raises an error, or is interrupted: it says so and ends with its own exit code, at once. The
  others print one line that names it and the error, and end with 2 (process 0, which the rest of
  them hang on, 3 s later).
- It is killed, or its machine is gone: after 60 s without a heartbeat JAX aborts the others
  (exit code 134, a stack of C++): "The following tasks are unhealthy … 1". If it was process 0,
  they abort at once: "the leader task was preempted/died". On CPU, the collective that they were in
  fails first, with "Connection closed by peer".
- It hangs: the others wait in their next collective, for which JAX knows no time limit. At a
  barrier they give up, and name it.
"""

import collections
import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from llava_jax.processes import environment, roll_call

# Sent by a thread of C++, so that neither compiling nor Python's lock delays it.
_HEARTBEAT_S = 60
# At the end process 0 may still be exporting; who fails meanwhile ends the others all the same.
_LAST_S = 4 * 3600
_ENDED = "llava_jax/ended"

_meetings: collections.Counter[str] = collections.Counter()


def index() -> int:
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def is_first() -> bool:
    """Is this the process that writes?"""
    return index() == 0


@contextlib.contextmanager
def connected(environ: Mapping[str, str] = os.environ, *, timeout_s: float = 300) -> Iterator[None]:
    """Around all that a run does: joins the processes that the environment tells of, if any.

    Before anything asks JAX for devices. Ends when all of them have come to the end.
    """
    group = environment.find(environ)
    if group is None:
        yield
        return
    roll_call.hold(group, timeout_s)
    # It takes SIGTERM for itself, past Python's handlers. Stopping does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        group.devices,
        cluster_detection_method="deactivate",  # environment.py did that
        heartbeat_timeout_seconds=_HEARTBEAT_S,
    )
    watch = threading.Thread(target=_end_with_the_others, args=(group,), daemon=True)
    watch.start()
    try:
        if is_first():
            print(f"{count()} processes, {jax.device_count()} devices", flush=True)
        yield
        barrier("the end", timeout_s=_LAST_S)
        if is_first():
            client().key_value_set(_ENDED, "")
        watch.join()
        jax.distributed.shutdown()  # waits for all; who goes on alone would see the service die
    except BaseException as error:
        _leave(group, error, watch)
        raise


def barrier(name: str, *, timeout_s: float = 600) -> None:
    """Waits until all processes are here; a ValueError names those that did not come."""
    meet(name, "", timeout_s)


def sum_over_processes(number: int, *, timeout_s: float = 600) -> int:
    """The same sum for all of them. It goes past the devices, which may be busy."""
    return sum(map(int, meet("sum", str(int(number)), timeout_s).values()))


def meet(name: str, said: str, timeout_s: float) -> dict[int, str]:
    """What each process said at this meeting. All hold the same meetings of a name in turn."""
    if count() == 1:
        return {0: said}
    _meetings[name] += 1
    here, before = (
        f"llava_jax/{name}/{number}/" for number in (_meetings[name], _meetings[name] - 1)
    )
    client().key_value_set(f"{here}{index()}", said)
    try:
        client().wait_at_barrier(f"llava_jax/{name}", round(1000 * timeout_s))
    except RuntimeError as error:
        missing = sorted(set(range(count())) - set(_said(here)))
        if not missing:  # came while this one gave up
            raise ValueError(f"{name}: a process came later than {timeout_s:g} s") from error
        sentence = roll_call.missing_processes(missing, count(), timeout_s)
        raise ValueError(f"{name}: {sentence}") from error
    if is_first() and _meetings[name] > 1:
        client().key_value_delete(before)  # all were here, so all have read it
    return _said(here)


def _said(folder: str) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): said for key, said in client().key_value_dir_get(folder)}


def wait_for(key: str) -> str:
    """Waits for a value, however long. It blocks no other thread."""
    while True:
        try:
            return client().blocking_key_value_get(key, 3_600_000)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def set_first(key: str, value: str) -> bool:
    """Sets a value unless another process did before."""
    try:
        client().key_value_set(key, value)
    except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


def client() -> Any:
    """JAX's client of the coordination service, which it keeps to itself in 0.10 to 0.12."""
    return _state().client


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def _end_with_the_others(group: environment.Group) -> None:
    """Ends this process when another one failed, for which a collective would wait for ever."""
    try:
        who, _, why = wait_for(_ENDED).partition(" ")
    except RuntimeError:
        return  # the service is gone, and JAX says so
    if who in ("", str(group.index)):
        return
    print(f"error: process {who} ended: {why}; see its log", file=sys.stderr, flush=True)
    if group.index == 0:
        time.sleep(3)  # whoever is still leaving aborts when process 0 is gone
    sys.stdout.flush()
    os._exit(2)


def _leave(group: environment.Group, error: BaseException, watch: threading.Thread) -> None:
    """Goes without waiting for the others, as JAX would (5 minutes, then it aborts)."""
    why = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:500]
    try:
        first = set_first(_ENDED, f"{group.index} {why}")
    except RuntimeError:
        first = True  # the service is gone
    watch.join(10)  # if another one failed before, this ends the process
    if first and group.index == 0:
        time.sleep(1)  # the others hear of it from this process
    state = _state()
    for kept in (state.client, state.service):
        # Never destroyed: that waits for the others too.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    state.client = state.service = None
