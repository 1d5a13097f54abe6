"""Two real processes meet, count, stop before the same step, and end when one of them fails."""

import json
import os
import signal
import sys

import jax
import pytest

from llava_jax import processes
from tests.processes_running import Ended, free_port, run

TWO_THAT_WORK = """
import json, os, signal
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llava_jax import cli, processes

def main():
    own_handler = []
    signal.signal(signal.SIGTERM, lambda *_: own_handler.append("called"))
    with processes.connected():
        me, seen = processes.index(), {}
        os.kill(os.getpid(), signal.SIGTERM)
        seen["own handler"] = own_handler
        seen["who"] = [me, processes.count(), processes.is_first(), jax.device_count()]

        mesh = Mesh(np.array(jax.devices()), ("data",))
        x_8 = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("data")), np.arange(4, dtype=np.float32) + 4 * me)
        add = jax.jit(lambda x_8: x_8.sum(), out_shardings=NamedSharding(mesh, P()))
        seen["collective"] = float(add(x_8))

        seen["sums"] = [processes.sum_over_processes(10 * me + i) for i in range(3)]
        for _ in range(3):
            processes.barrier("the same name")
        if me == 0:
            try:
                processes.barrier("alone here", timeout_s=0.3)
            except ValueError as error:
                seen["missing"] = str(error)

        # Process 1 is told, late; process 0 has its answers one step behind.
        with processes.Stopping() as stopping:
            before = add(x_8)
            for step in range(5, 1000):
                if me == 1 and step == 50:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stopping.at(step):
                    break
                now = add(x_8)
                (before if me == 0 else now).block_until_ready()
                before = now
        seen["one is told"] = [step, stopping.signal.name]

        # Both are told, and one is far ahead: these steps do not wait for each other.
        processes.barrier("go")
        with processes.Stopping() as stopping:
            for step in range(10**9):
                if step == (1000 if me == 0 else 10):
                    os.kill(os.getpid(), signal.SIGINT)
                if stopping.at(step):
                    break
        seen["both are told"] = [step, stopping.signal.name]

        with processes.Stopping() as stopping:
            seen["nobody is told"] = [stopping.at(step) for step in range(20)]
        seen["after"] = stopping.signal
    print(json.dumps(seen))
    return 7

cli.run(main)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run(python(TWO_THAT_WORK), count=2, devices=4)


@pytest.fixture(scope="module")
def seen(ended: list[Ended]) -> list[dict]:
    for process in ended:
        assert process.code == 7, process.output
    return [json.loads(process.output.splitlines()[-1]) for process in ended]


def test_they_are_two_with_all_devices(seen):
    assert [one["who"] for one in seen] == [[0, 2, True, 8], [1, 2, False, 8]]
    assert [one["collective"] for one in seen] == [float(sum(range(8)))] * 2


def test_process_0_alone_says_how_many_they_are(ended, seen):
    line = "2 processes, 8 devices"
    assert [process.output.count(line) for process in ended] == [1, 0]


def test_jax_does_not_take_the_signals(seen):
    assert [one["own handler"] for one in seen] == [["called"]] * 2


def test_all_have_the_same_sum(seen):
    assert [one["sums"] for one in seen] == [[10, 12, 14]] * 2


def test_a_barrier_names_who_is_missing(seen):
    assert seen[0]["missing"].startswith("alone here: process 1 of 2 did not come within 0.3 s")


def test_a_signal_to_one_stops_both_before_the_same_step(seen):
    assert seen[0]["one is told"] == seen[1]["one is told"]
    step, name = seen[0]["one is told"]
    assert 50 <= step < 60
    assert name == "SIGTERM"


def test_signals_to_both_stop_them_once(seen):
    assert seen[0]["both are told"] == seen[1]["both are told"]
    assert seen[0]["both are told"][1] == "SIGINT"


def test_without_a_signal_nothing_stops(seen):
    assert [one["nobody is told"] for one in seen] == [[False] * 20] * 2
    assert [one["after"] for one in seen] == [None, None]


ONE_THAT_FAILS = """
import sys
from llava_jax import cli, files, processes

def main():
    with processes.connected():
        if processes.index() == int(sys.argv[1]):
            files.path("/no/such/file").read_text()
        processes.barrier("the others wait here")

cli.run(main)
"""


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_one_ends_both_and_names_it(which: int):
    ended = run(python(ONE_THAT_FAILS, str(which)), count=2)
    assert [process.code for process in ended] == [2, 2], ended
    own, others = ended[which].output, ended[1 - which].output
    assert "error: no such file or directory: /no/such/file\n" in own
    assert f"error: process {which} ended: FileNotFoundError: " in others
    assert "Traceback" not in own + others


def test_a_process_that_never_comes():
    code = (
        "from llava_jax import cli, processes\n"
        "def main():\n"
        "    with processes.connected(timeout_s=0.3): pass\n"
        "cli.run(main)"
    )
    group = {
        "COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "NUM_PROCESSES": "2",
        "PROCESS_ID": "0",
    }
    (ended,) = run(python(code), count=1, environ=group)
    assert ended.code == 2
    assert ended.output.startswith("error: process 1 of 2 did not come within 0.3 s")


def test_alone_nothing_is_needed():
    with processes.connected({}):
        processes.barrier("nobody else")
        assert processes.sum_over_processes(7) == 7
        assert processes.is_first()
    assert not jax.distributed.is_initialized()


def test_alone_a_signal_stops_before_the_next_step():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with processes.Stopping() as stopping:
        assert not stopping.at(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.at(1)
        assert stopping.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_does_not_wait():
    with processes.Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.at(0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
