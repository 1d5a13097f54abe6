"""Who is missing is named to everybody, and strangers at the door are no processes."""

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_jax.processes import roll_call
from llava_jax.processes.environment import Group
from tests.processes_running import free_port


def outcomes(*groups: Group, timeout_s: float = 20) -> list[str]:
    """What each of them hears: nothing if all is well."""

    def outcome(group: Group) -> str:
        try:
            roll_call.hold(group, timeout_s)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(groups)) as threads:
        return list(threads.map(outcome, groups))


def groups(count: int) -> list[Group]:
    address = f"127.0.0.1:{free_port()}"
    return [Group(address, count, i) for i in range(count)]


def test_all_are_there():
    assert outcomes(*groups(5)) == [""] * 5


def test_the_port_is_free_again_for_what_comes_next():
    three = groups(3)
    outcomes(*three)
    assert outcomes(*three) == [""] * 3


def test_everybody_hears_who_is_missing():
    first, _, third, _ = groups(4)
    heard = outcomes(first, third, timeout_s=0.5)
    assert heard[0] == heard[1]
    assert heard[0].startswith("processes 1, 3 of 4 did not come within 0.5 s")


def test_no_process_0():
    (heard,) = outcomes(groups(2)[1], timeout_s=0.2)
    assert heard.startswith("process 1 of 2 found no process 0 at 127.0.0.1:")
    assert "connection refused" in heard


def test_the_same_id_twice():
    first, second, _ = groups(3)
    heard = outcomes(first, second, second)
    assert len(set(heard)) == 1
    assert heard[0].startswith("two processes say they are process 1 of 3")


def test_two_numbers_of_processes():
    first, *_ = groups(3)
    heard = outcomes(first, Group(first.address, 4, 3))
    assert heard == ["process 3 expects 4 processes, process 0 3; set the same number for all"] * 2


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port}.*in use"):
            roll_call.hold(Group(f"127.0.0.1:{port}", 2, 0), 1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"[]\n", b""])
def test_another_program_at_the_port(answer):
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as thread:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        heard = thread.submit(outcomes, Group(address, 2, 1))
        connection, _ = other.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)
        assert "got no answer from a process 0 there" in heard.result()[0]


def test_strangers_and_those_that_left_do_not_count():
    first, second, third = groups(3)
    host, _, port = first.address.rpartition(":")
    says_it_is_1 = json.dumps({"process": 1, "of": 3}).encode() + b"\n"
    with ThreadPoolExecutor(1) as thread:
        heard = thread.submit(outcomes, first)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 9999, says_it_is_1):
            with connected_to(host, int(port)) as stranger:
                stranger.sendall(said)
                if said == says_it_is_1:
                    stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(100) == b""  # shown the door
        assert outcomes(second, third) == ["", ""]
        assert heard.result() == [""]


def connected_to(host: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except ConnectionRefusedError:
            pass  # not listening yet
