"""All processes of a run say they are there, before JAX connects them.

JAX's own way of saying that one is missing is to abort, with a stack of C++ and no name. So process
0 first listens where JAX's coordinator will, the others report, and either all hear that the run is
complete, or all end with a sentence that names who did not come.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Sequence
from typing import NoReturn

from llava_jax.processes.environment import Group

_LONGEST = 4096  # bytes of a message; who sends more is no process of ours


def hold(group: Group, timeout_s: float) -> None:
    """Returns when all are there; a ValueError tells who is not."""
    host, _, port = group.address.rpartition(":")
    if group.index == 0:
        _RollCall(group, int(port)).hold(timeout_s)
    else:
        _report(group, host.strip("[]"), int(port), timeout_s)


class _RollCall:
    """Process 0's part. Strangers (port scanners, health checks) are heard and forgotten."""

    def __init__(self, group: Group, port: int):
        self._group = group
        self._heard: dict[socket.socket, bytes] = {}
        self._there: dict[int, socket.socket] = {}
        try:
            if socket.has_dualstack_ipv6():
                self._listener = socket.create_server(
                    ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
                )
            else:
                self._listener = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise ValueError(
                f"cannot listen on port {port} of {group.address}: {_reason(error)}; is another "
                "run using it? Choose another port for all processes (COORDINATOR_ADDRESS, or "
                "JAX_COORDINATOR_PORT)"
            ) from error

    def hold(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            with selectors.DefaultSelector() as selector:
                self._selector = selector
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
                while missing := sorted(set(range(1, self._group.count)) - set(self._there)):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self._refuse(missing_processes(missing, self._group.count, timeout_s))
                    for key, _ in selector.select(left):
                        if key.fileobj is self._listener:
                            self._accept()
                        else:
                            assert isinstance(key.fileobj, socket.socket)
                            self._hear(key.fileobj)
            # JAX's coordinator needs the port, and is looked for as soon as the others hear.
            self._listener.close()
            self._tell({})
        finally:
            for connection in self._heard:
                connection.close()
            self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # gone again
        connection.setblocking(False)
        self._heard[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        try:
            new = connection.recv(_LONGEST)
        except OSError:
            new = b""
        self._heard[connection] += new
        line, end, _ = self._heard[connection].partition(b"\n")
        if not new or (not end and len(line) >= _LONGEST):
            self._forget(connection)
        elif end:
            try:
                message = json.loads(line)
                index, count = int(message["process"]), int(message["of"])
            except (ValueError, TypeError, KeyError):
                self._forget(connection)
            else:
                self._note(index, count, connection)

    def _note(self, index: int, count: int, connection: socket.socket) -> None:
        if count != self._group.count:
            self._refuse(
                f"process {index} expects {count} processes, process 0 {self._group.count}; set "
                "the same number for all"
            )
        if index == 0 or self._there.get(index, connection) is not connection:
            self._refuse(
                f"two processes say they are process {index} of {count}; give each its own id, "
                f"0 to {count - 1} (PROCESS_ID)"
            )
        self._there[index] = connection

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._heard[connection]
        self._there = {i: there for i, there in self._there.items() if there is not connection}

    def _refuse(self, why: str) -> NoReturn:
        self._tell({"error": why})
        raise ValueError(why)

    def _tell(self, message: dict[str, str]) -> None:
        for connection in self._heard:
            with contextlib.suppress(OSError):  # its own log will say why it left
                connection.sendall(json.dumps(message).encode() + b"\n")


def _report(group: Group, host: str, port: int, timeout_s: float) -> None:
    """What all but process 0 do: say who they are, and wait for the verdict."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process {group.index} of {group.count} found no process 0 at "
                    f"{group.address} within {timeout_s:g} s ({_reason(error)}); start process 0 "
                    "there, and let the other machines reach that port"
                ) from error
            time.sleep(0.1)
    with connection:
        # Process 0 was there before this one reached it, so it gives up before this.
        connection.settimeout(timeout_s + 10)
        try:
            said = json.dumps({"process": group.index, "of": group.count})
            connection.sendall(said.encode() + b"\n")
            answer = connection.makefile("rb").readline(_LONGEST)
            verdict = json.loads(answer)
            refusal = verdict.get("error")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"process {group.index} of {group.count} reached {group.address}, but got no "
                "answer from a process 0 there; did it end (its log says why), or does another "
                "program listen on that port?"
            ) from error
    if refusal is not None:
        raise ValueError(refusal)


def missing_processes(missing: Sequence[int], count: int, timeout_s: float) -> str:
    """One sentence for whoever waited in vain."""
    ids = ", ".join(map(str, missing))
    who = f"process {ids}" if len(missing) == 1 else f"processes {ids}"
    return (
        f"{who} of {count} did not come within {timeout_s:g} s; see whether they were started, "
        "and what their logs say"
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
