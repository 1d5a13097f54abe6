"""What becomes of memory that a step on CPUs has used: it is kept for the next one.

XLA asks for a step's work space anew in every step. glibc gives so large a piece back to the system
when the step ends, and the next one finds each of its pages missing: of a small model's step that
was a third of the time (docs/results.md).
"""

import ctypes
import glob
import os
from collections.abc import Mapping

# By number, as <malloc.h> has them, in the order they are set.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = 2**31 - 1  # bytes at most, where nothing uses them
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def keep_memory() -> None:
    """Keeps used memory for the next step, where the CPUs are the devices and the C library can.

    To be called before JAX starts its threads, which each get a heap of their own otherwise.
    """
    if not _on_cpus(os.environ):
        return
    # Not in every C library; where it is, it takes what it knows.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1)):
            mallopt(setting, value)


def _on_cpus(environ: Mapping[str, str]) -> bool:
    asked = environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" or not (asked or any(glob.glob(place) for place in _ACCELERATORS))
