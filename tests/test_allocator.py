"""Used memory is kept where the CPUs are the devices: by the pages that a second use misses."""

import ctypes
import glob
import subprocess
import sys

import pytest

from llava_jax import allocator

USED_TWICE = """
import resource, sys
import numpy as np
from llava_jax import allocator

if sys.argv[1] == "keep":
    allocator.keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(50_000_000, np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_what_was_used_is_there_the_next_time():
    def missing(how: str) -> list[int]:
        command = [sys.executable, "-c", USED_TWICE, how]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(line) for line in told.stdout.split()]

    first, again = missing("keep")
    assert again < first / 20
    first, again = missing("leave")
    assert again > first / 2  # if not, there is nothing to mend


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        ("cpu", ["/dev/accel0"], True),
        ("", [], True),
        ("", ["/dev/accel0"], False),
        ("", ["/dev/vfio/1"], False),
        ("", ["/dev/nvidia0"], False),
        ("tpu,cpu", [], False),
    ],
)
def test_only_cpus_are_meant(monkeypatch, asked, found, expected):
    monkeypatch.setattr(
        glob, "glob", lambda place: [f for f in found if f.startswith(place.split("*")[0][:-5])]
    )
    assert allocator._on_cpus({"JAX_PLATFORMS": asked} if asked else {}) == expected
