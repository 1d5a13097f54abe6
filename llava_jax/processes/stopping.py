"""A signal to one process stops all of them, before the same step.

A pod's notice that it will be preempted (SIGTERM) reaches one host, or all at different moments;
hosts hand steps to their devices ahead of time, and never wait for each other but in a step. If one
left out a step that another one runs, the other would wait for ever.

So a thread of each process waits for the word. When it comes, each holds its process back before
its next step, tells which step it was last let into, hears this of the others, and lets its process
go on up to the furthest of them. Until then nothing is asked over the network: a question costs
less than a microsecond.
"""

import contextlib
import itertools
import signal
import threading
from types import FrameType, TracebackType

from llava_jax.processes import meeting

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TIMEOUT_S = 60
_numbers = itertools.count()


class Stopping:
    """Asked before each step whether to stop. A second Ctrl-C does not wait to be asked.

    with Stopping() as stopping:
        for step in range(first, last):
            if stopping.at(step):
                break
            …
    if stopping.signal: …                       # the same in all processes
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # what stopped the run; None: nothing did
        self._got: signal.Signals | None = None
        self._told = False
        self._lock = threading.Lock()
        self._last = -1  # the step it was last let into
        self._stop_at: int | None = None
        self._error: Exception | None = None
        self._name = ""
        self._thread: threading.Thread | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stopping":
        # All processes make theirs in the same order.
        self._name = f"stopping {next(_numbers)}"
        if meeting.count() > 1:
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._mark) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if self._thread is not None:
            # What one process is through with, the others are as good as through with.
            with contextlib.suppress(RuntimeError):  # the service is gone, and JAX says so
                self._tell("")
            self._thread.join(_TIMEOUT_S)

    def at(self, step: int) -> bool:
        """Stop before this step? True in all processes or in none."""
        if self._thread is None:
            self.signal = self._got
            return self.signal is not None
        if self._got is not None and not self._told:
            self._tell(self._got.name)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._stop_at is not None and step >= self._stop_at:
                return True
            self._last = step
            return False

    def _mark(self, number: int, frame: FrameType | None) -> None:
        if self._got is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._got = signal.Signals(number)

    def _tell(self, why: str) -> None:
        self._told = True
        meeting.set_first(f"llava_jax/{self._name}", why)

    def _listen(self) -> None:
        try:
            why = meeting.wait_for(f"llava_jax/{self._name}")
        except RuntimeError:
            return  # the service is gone, and JAX says so
        with self._lock:
            try:
                last = meeting.meet(f"{self._name} at", str(self._last), _TIMEOUT_S)
            except (ValueError, RuntimeError) as error:
                self._error = error
            else:
                self._stop_at = max(map(int, last.values())) + 1
                self.signal = signal.Signals[why] if why else None
