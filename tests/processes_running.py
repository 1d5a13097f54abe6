"""Runs a program as several processes that JAX connects over loopback, and leaves none behind.

ended = run([sys.executable, "launch/train.py", …], count=2)
assert ended[0].code == 0, ended[0].output

with started([sys.executable, "-c", CODE], count=2) as processes:
    processes[1].wait_for("step 7")
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.end() for process in processes]
"""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.conftest import CHECKOUT

_FORGOTTEN = "OMPI_ PMI SLURM_ TPU_ MEGASCALE_ JAX_COORDINATOR COORDINATOR_".split()


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    output: str  # stdout and stderr as they came


class Process:
    """One of them, while it runs. Time limits run from its start."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], limit_s: float):
        self._popen = subprocess.Popen(
            argv,
            env=environ,
            cwd=CHECKOUT,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # killed with whatever it started
        )
        self._deadline = time.monotonic() + limit_s
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout
        with self._popen.stdout:
            for line in self._popen.stdout:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str) -> None:
        """Returns when the process has printed a line with this text."""
        with self._changed:
            while not any(text in line for line in self._lines):
                left = self._deadline - time.monotonic()
                ended = self._popen.poll() is not None and not self._reader.is_alive()
                assert not ended, f"ended before it printed {text!r}:\n{self.output}"
                assert left > 0, f"printed no {text!r} in time:\n{self.output}"
                self._changed.wait(min(left, 0.1))

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def end(self) -> int:
        """Its exit code, minus the signal's number if it was killed."""
        try:
            code = self._popen.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in time:\n{self.output}") from None
        self._reader.join(10)
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._reader.join(10)


@contextlib.contextmanager
def started(
    argv: Sequence[str],
    count: int,
    *,
    devices: int = 1,
    environ: Mapping[str, str] | None = None,
    own: Sequence[Mapping[str, str]] = (),
    limit_s: float = 120,
) -> Iterator[list[Process]]:
    """`count` processes of argv, with `devices` fake CPU devices each.

    environ: what to set in all of them; own: what to set in each. count=1 connects nothing.
    """
    common = {
        name: value for name, value in os.environ.items() if not name.startswith(tuple(_FORGOTTEN))
    }
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", common.get("XLA_FLAGS", ""))
    common["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    common["JAX_PLATFORMS"] = "cpu"
    common["PYTHONUNBUFFERED"] = "1"
    if count > 1:
        common["COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
        common["NUM_PROCESSES"] = str(count)
    processes: list[Process] = []
    try:
        for i in range(count):
            process_id = {"PROCESS_ID": str(i)} if count > 1 else {}
            mine = {**common, **process_id, **(environ or {}), **(own[i] if own else {})}
            processes.append(Process(argv, mine, limit_s))
        yield processes
    finally:
        for process in processes:
            process.kill()


def run(argv: Sequence[str], count: int, **settings) -> list[Ended]:
    """Runs them to their end; the settings of `started`."""
    with started(argv, count, **settings) as processes:
        try:
            return [Ended(process.end(), process.output) for process in processes]
        except AssertionError as error:
            outputs = [f"--- process {i}:\n{p.output}" for i, p in enumerate(processes)]
            raise AssertionError("\n".join([str(error), *outputs])) from None


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
