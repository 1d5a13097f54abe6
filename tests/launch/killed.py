"""Runs launch/train.py until it is done, and kills it on the way: a program of its own.

python -m tests.launch.killed '["after 2.5 s", "rename 2 of */checkpoints/*"]' --config …

Each attempt is a fork of this process, which has imported everything and computed nothing, so that
to start again costs no import. An attempt kills itself (SIGKILL) where its place says; when all
places are used up, the last attempt runs to the end. Places:

after 2.5 s                     wherever it is by then
saving 2                        when the second save went on in the background
rename 2 of */checkpoints/*     before a file or folder gets a name like this for the second time
renamed 2 of */checkpoints/*    after it did
row 7                           in a thread that reads ahead, at its seventh row
line 5                          half of the fifth line of metrics.jsonl or events.jsonl is written

SIGTERM 5 to 1                  no kill, but a signal to process 1 when its fifth step is on its way
"""

import fnmatch
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from launch import train
from llava_jax import cli, telling
from llava_jax.data import pipeline


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, do: Callable[..., Any]) -> None:
    """The `number`-th call of owner.name becomes do(the function, its arguments)."""
    function, lock, calls = getattr(owner, name), threading.Lock(), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        with lock:
            calls[0] += 1
            mine = calls[0] == number
        return do(function, *arguments, **named) if mine else function(*arguments, **named)

    setattr(owner, name, counted)


def then_die(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    function(*arguments, **named)
    die()


def write_half(function: Callable[..., Any], file: int, data: Any) -> None:
    function(file, data[: len(data) // 2])
    die()


def at_step(name: str, number: int) -> None:
    def signalled(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[name])
        return function(*arguments, **named)

    at_call(telling.Telling, "step", number, signalled)


def at_rename(kind: str, number: int, pattern: str) -> None:
    seen = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def rename(source: Any, target: Any, **named: Any) -> None:
            fits = fnmatch.fnmatch(str(target), pattern)
            seen[0] += fits
            if fits and seen[0] == number and kind == "rename":
                die()
            function(source, target, **named)
            if fits and seen[0] == number:
                die()

        return rename

    for name in ("rename", "replace"):
        setattr(os, name, watched(getattr(os, name)))


def install(place: str) -> None:
    kind, number, *rest = place.split()
    if kind == "after":
        timer = threading.Timer(float(number), die)
        timer.daemon = True
        timer.start()
    elif kind == "saving":
        at_call(ocp.CheckpointManager, "save", int(number), then_die)
    elif kind == "row":
        at_call(pipeline, "read_row", int(number), lambda *_: die())
    elif kind == "line":
        at_call(os, "write", int(number), write_half)
    elif kind in ("SIGTERM", "SIGINT"):
        if os.environ.get("PROCESS_ID", "0") == rest[-1]:
            at_step(kind, int(number))
    else:
        assert kind in ("rename", "renamed"), place
        at_rename(kind, int(number), rest[-1])


def attempt(place: str | None) -> int:
    """How a fork ended: its exit code, or minus the signal's number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        if place:
            install(place)
        cli.run(train.main)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    places = json.loads(sys.argv.pop(1))
    for place in [*places, None]:
        ended = attempt(place)
        print(f"ended {ended}: {place}", flush=True)
        if ended != -signal.SIGKILL:
            sys.exit(ended)
