"""Is this one of several processes? What the environment says: who started them knows.

In this order:
by hand   COORDINATOR_ADDRESS=host:port NUM_PROCESSES=4 PROCESS_ID=0 (or with JAX_ before each)
Open MPI  OMPI_COMM_WORLD_SIZE, _RANK; the address is in OMPI_MCA_orte_hnp_uri, until version 4
Slurm     SLURM_NTASKS, SLURM_PROCID and the step's list of nodes, as srun sets them
TPU pod   TPU_WORKER_HOSTNAMES (or TPU_PROCESS_ADDRESSES), TPU_WORKER_ID, and MEGASCALE_… of
          several slices, as GKE sets them; on a plain TPU VM JAX asks the machine's own metadata

COORDINATOR_ADDRESS may also be given beside the last three. JAX_COORDINATOR_PORT changes the port
that they choose, JAX_LOCAL_DEVICE_IDS the devices of a process.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

_BY_HAND = "COORDINATOR_ADDRESS=host:port, NUM_PROCESSES and PROCESS_ID"
_TPU_PORT = 8482  # any would do; it is what JAX takes


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as each of them knows it: where process 0 listens, and who it is."""

    address: str
    count: int
    index: int
    # Ids of the devices it may use, where several processes share a machine; None: all.
    devices: tuple[int, ...] | None = None


def find(environ: Mapping[str, str]) -> Group | None:
    """The group this process belongs to; None if it is alone."""
    address = _by_hand(environ, "COORDINATOR_ADDRESS")
    count, index = (_by_hand(environ, name) for name in ("NUM_PROCESSES", "PROCESS_ID"))
    if count is not None or index is not None:
        if count == "1" and index in ("0", None):
            return None
        if address is None or count is None or index is None:
            raise ValueError(f"got {_given(address, count, index)}; expected all of {_BY_HAND}")
        group = Group(address, _number("NUM_PROCESSES", count, 1), _number("PROCESS_ID", index, 0))
    else:
        group = _open_mpi(environ) or _slurm(environ) or _gke(environ) or _tpu_vm(environ)
        if group is None:
            if address is not None:
                raise ValueError(f"got {_given(address, None, None)}; expected all of {_BY_HAND}")
            return None
        group = dataclasses.replace(group, address=address or group.address)

    if group.index >= group.count:
        raise ValueError(
            f"got process id {group.index} of {group.count} processes; expected ids 0 to "
            f"{group.count - 1}, each once"
        )
    if group.count == 1:
        return None
    return dataclasses.replace(group, address=_with_port(group.address, environ))


def _by_hand(environ: Mapping[str, str], name: str) -> str | None:
    values = {environ[key] for key in (name, f"JAX_{name}") if environ.get(key)}
    if len(values) > 1:
        raise ValueError(
            f"got {name}={environ[name]} and JAX_{name}={environ['JAX_' + name]}; expected one of "
            "them, or the same in both"
        )
    return next(iter(values), None)


def _given(address: str | None, count: str | None, index: str | None) -> str:
    values = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": count, "PROCESS_ID": index}
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _number(name: str, value: str | None, least: int) -> int:
    if value is None or not value.isascii() or not value.isdigit() or int(value) < least:
        got = f"no {name}" if value is None else f"{name}={value}"
        raise ValueError(f"got {got}; expected a whole number, {least} or more")
    return int(value)


def _with_port(address: str, environ: Mapping[str, str]) -> str:
    host, _, port = address.rpartition(":")
    if not host and environ.get("JAX_COORDINATOR_PORT"):
        host, port = address, environ["JAX_COORDINATOR_PORT"]
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"got the coordinator's address {address!r}; expected host:port of process 0, such as "
            "10.0.0.1:8482 (set COORDINATOR_ADDRESS)"
        )
    return f"{host}:{port}"


def _open_mpi(environ: Mapping[str, str]) -> Group | None:
    if (size := environ.get("OMPI_COMM_WORLD_SIZE")) is None:
        return None
    if (count := _number("OMPI_COMM_WORLD_SIZE", size, 1)) == 1:
        return Group("", 1, 0)
    # Such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::b9b]:43370.
    job = environ.get("OMPI_MCA_orte_hnp_uri", "")
    place = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://(\[[^],]+))", job)
    if place is None and _by_hand(environ, "COORDINATOR_ADDRESS") is None:
        raise ValueError(
            f"got {count} processes started by mpirun, which does not say where process 0 is; set "
            "COORDINATOR_ADDRESS=host:port (mpirun -x COORDINATOR_ADDRESS …)"
        )
    rank = _number("OMPI_COMM_WORLD_RANK", environ.get("OMPI_COMM_WORLD_RANK"), 0)
    address = ""
    if place is not None:
        host = place[2] or f"{place[3]}]"
        address = f"{host}:{_port(environ, int(place[1]) >> 12)}"
    alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Group(
        address, count, rank, _device(environ, None if alone else "OMPI_COMM_WORLD_LOCAL_RANK")
    )


def _slurm(environ: Mapping[str, str]) -> Group | None:
    if (tasks := environ.get("SLURM_NTASKS")) is None:
        return None
    if (count := _number("SLURM_NTASKS", tasks, 1)) == 1:
        return None
    if not (nodes := environ.get("SLURM_STEP_NODELIST")):
        raise ValueError(
            f"got SLURM_NTASKS={count}, but this process was not started by srun; expected "
            "`srun python …`, or for one process alone `SLURM_NTASKS=1 python …`"
        )
    # Such as node001, node[001-004,007],other12 or node[1-2]-ib: the first of them.
    first = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", nodes)
    if first is None:
        raise ValueError(f"got SLURM_STEP_NODELIST={nodes}; expected names of nodes")
    job = _number("SLURM_JOB_ID", environ.get("SLURM_JOB_ID"), 0)
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    return Group(
        f"{first[1]}{first[2] or ''}{first[3] or ''}:{_port(environ, job)}",
        count,
        _number("SLURM_PROCID", environ.get("SLURM_PROCID"), 0),
        _device(environ, None if alone else "SLURM_LOCALID"),
    )


def _port(environ: Mapping[str, str], job: int) -> str:
    """A port that all processes of a job agree on, and two jobs on a machine seldom."""
    return environ.get("JAX_COORDINATOR_PORT") or str(61440 + job % 4096)


def _device(environ: Mapping[str, str], rank: str | None) -> tuple[int, ...] | None:
    """One GPU for each process of a machine, as is usual; JAX itself reads the user's own list."""
    if rank is None or rank not in environ or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    return (_number(rank, environ[rank], 0),)


def _gke(environ: Mapping[str, str]) -> Group | None:
    if not _tpu_is_meant(environ):
        return None
    if listed := environ.get("TPU_PROCESS_ADDRESSES_PATH"):
        listed = Path(listed).read_text().strip()
    names = listed or environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not names:
        return None
    hosts = names.split(",")
    slices = _number("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES") or "1", 1)
    if len(hosts) * slices == 1:
        return Group("", 1, 0)  # Colab and Kaggle name one host, which need not resolve
    worker = _number("TPU_WORKER_ID", environ.get("TPU_WORKER_ID"), 0)
    if worker >= len(hosts):
        raise ValueError(
            f"got TPU_WORKER_ID={worker} and {len(hosts)} hosts ({names}); expected 0 to "
            f"{len(hosts) - 1}"
        )
    slice_id, first = "0", hosts[0]
    if slices > 1:
        slice_id = environ.get("MEGASCALE_SLICE_ID")
        first = environ.get("MEGASCALE_COORDINATOR_ADDRESS")
        if not first:
            raise ValueError(
                f"got MEGASCALE_NUM_SLICES={slices} and no MEGASCALE_COORDINATOR_ADDRESS; expected "
                "the address of the first slice's first host"
            )
    return Group(
        f"{first.split(':')[0]}:{environ.get('JAX_COORDINATOR_PORT') or _TPU_PORT}",
        len(hosts) * slices,
        _number("MEGASCALE_SLICE_ID", slice_id, 0) * len(hosts) + worker,
    )


def _tpu_vm(environ: Mapping[str, str]) -> Group | None:
    """A TPU VM's environment says nothing, its metadata server does, and JAX can read it."""
    # JAX's own: its public way in is to connect at once, which fails on a machine of its own.
    from jax._src.clusters import GceTpuCluster

    try:
        if not _tpu_is_meant(environ) or not GceTpuCluster.is_env_present():
            return None
        if (count := GceTpuCluster.get_process_count()) == 1:
            return Group("", 1, 0)
        port = environ.get("JAX_COORDINATOR_PORT")
        address = GceTpuCluster.get_coordinator_address(300, port)
        return Group(address, count, GceTpuCluster.get_process_id())
    except OSError:
        return None  # TPUs without a metadata server: Colab's


def _tpu_is_meant(environ: Mapping[str, str]) -> bool:
    return "tpu" in environ.get("JAX_PLATFORMS", "tpu").lower() or not environ["JAX_PLATFORMS"]
