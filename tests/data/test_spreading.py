"""One function over many entries: in order, counted, and what becomes of processes that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data import spreading
from tests.conftest import CHECKOUT


def total(chunk: np.ndarray, offset: int) -> tuple[int, int]:
    return int(chunk.sum()) + offset, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_come_in_order_and_are_counted(processes, monkeypatch):
    monkeypatch.setattr(spreading, "_CHUNK", 7)
    done = []
    results = list(
        spreading.spread(total, np.arange(30), 100, advance=done.append, processes=processes)
    )
    expected = [int(np.arange(30)[at : at + 7].sum()) + 100 for at in range(0, 30, 7)]
    assert [result for result, _ in results] == expected
    assert done == [7, 7, 7, 7, 2]
    assert (os.getpid() in {process for _, process in results}) == (processes == 1)


def test_nothing_to_do():
    empty = np.arange(0)
    assert list(spreading.spread(total, empty, 1, advance=lambda count: None, processes=2)) == []


def die(chunk: np.ndarray) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed():
    with pytest.raises(ChildProcessError, match=r"was killed from outside.*nothing was written"):
        list(spreading.spread(die, np.arange(2), advance=lambda count: None, processes=2))


def linger(chunk: np.ndarray, file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import numpy as np\n"
        "from llava_jax.data.spreading import spread\n"
        "from tests.data.test_spreading import linger\n"
        "if __name__ == '__main__':\n"
        f"  list(spread(linger, np.arange(1), '{tmp_path}/worker', advance=print, processes=2))\n"
    )
    (tmp_path / "run.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env) as parent:
        worker = wait_for(lambda: int((tmp_path / "worker").read_text()))
        parent.kill()
    wait_for(lambda: not running(worker) or 1 / 0)


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(found):
    end = time.monotonic() + 30
    while True:
        try:
            return found()
        except (OSError, ValueError, ZeroDivisionError):
            assert time.monotonic() < end, "waited for 30 seconds"
            time.sleep(0.02)
