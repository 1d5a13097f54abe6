"""One run on many processes: they find each other, meet, count together, and stop together.

environment  is this one of several? What TPU pods, GKE, Slurm, Open MPI and people set
roll_call    who is there, asked before JAX connects, which would abort without naming who is not
meeting      connected(), barrier(), sum_over_processes(): what nobody waits for in vain
stopping     Stopping: a signal to one process stops all of them before the same step

Alone, all of it works and does nothing: on a laptop, in Colab, on a TPU VM of one host.
"""

from llava_jax.processes.meeting import (
    barrier,
    connected,
    count,
    index,
    is_first,
    sum_over_processes,
)
from llava_jax.processes.stopping import Stopping

__all__ = [
    "Stopping",
    "barrier",
    "connected",
    "count",
    "index",
    "is_first",
    "sum_over_processes",
]
