"""One function over very many entries, by as many processes as there are cores."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_CHUNK = 1000
_WORTH_PROCESSES = 5000  # starting them takes seconds


def spread(
    function: Callable[..., T],
    numbers: np.ndarray,
    *given: Any,
    advance: Callable[[int], None],
    processes: int | None = None,
) -> Iterator[T]:
    """function(chunk, *given) of each chunk of numbers, in order. What is given must pickle."""
    chunks = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    processes = processes or (_cores() if len(numbers) >= _WORTH_PROCESSES else 1)
    results = (function(chunk, *given) for chunk in chunks)
    if processes > 1 and chunks:
        results = _by_processes(function, chunks, given, min(processes, len(chunks)))
    for chunk, result in zip(chunks, results, strict=True):
        yield result
        advance(len(chunk))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_processes(
    function: Callable[..., T], chunks: list, given: tuple, count: int
) -> Iterator[T]:
    # Not forked: JAX and its threads may already be in this process.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        count, spawn, initializer=_begin, initargs=(function, given)
    ) as pool:
        try:
            yield from pool.map(_call, chunks)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that looked at the data was killed from outside (often by the kernel, "
                "for want of memory); nothing was written: run the same command again"
            ) from error


_called: list = []  # in a worker: the function, and what it was given


def _begin(function: Callable, given: tuple) -> None:
    _called[:] = function, given
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else a worker of a process that was killed would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _call(chunk: np.ndarray) -> Any:
    function, given = _called
    return function(chunk, *given)
