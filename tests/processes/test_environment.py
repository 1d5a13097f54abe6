"""Who am I among how many: every launcher's variables, and those that cannot be right."""

import pytest

from llava_jax.processes.environment import Group, find

BY_HAND = {"COORDINATOR_ADDRESS": "10.0.0.1:99", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009,011],other2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "1"}
SLICES = {
    **POD,
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first-0:8081",
}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NUM_PROCESSES": "1"},
        {**BY_HAND, "NUM_PROCESSES": "1", "PROCESS_ID": "0"},
        {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},  # Colab
        {"TPU_PROCESS_ADDRESSES": "local"},  # Kaggle
        {**POD, "JAX_PLATFORMS": "cpu"},
    ],
)
def test_alone(environ):
    assert find(environ) is None


@pytest.mark.parametrize(
    ("environ", "group"),
    [
        (BY_HAND, Group("10.0.0.1:99", 4, 3)),
        ({f"JAX_{name}": value for name, value in BY_HAND.items()}, Group("10.0.0.1:99", 4, 3)),
        ({**SLURM, **BY_HAND}, Group("10.0.0.1:99", 4, 3)),
        (
            {**BY_HAND, "COORDINATOR_ADDRESS": "host", "JAX_COORDINATOR_PORT": "7"},
            Group("host:7", 4, 3),
        ),
        (SLURM, Group("node007:61441", 8, 5, (1,))),
        ({**SLURM, "SLURM_STEP_NODELIST": "a1-ib,a2"}, Group("a1-ib:61441", 8, 5, (1,))),
        ({**SLURM, "SLURM_STEP_NODELIST": "a[1-2]-ib"}, Group("a1-ib:61441", 8, 5, (1,))),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Group("node007:61441", 8, 5)),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, Group("node007:61441", 8, 5)),
        ({**SLURM, "COORDINATOR_ADDRESS": "h:1"}, Group("h:1", 8, 5, (1,))),
        (MPI, Group("10.96.0.1:62624", 4, 2, (0,))),
        (
            {**MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fe80::b9b,2620:10d::2]:43370"},
            Group("[fe80::b9b]:62624", 4, 2, (0,)),
        ),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Group("10.96.0.1:62624", 4, 2)),
        (POD, Group("host-0:8482", 2, 1)),
        ({**POD, "JAX_PLATFORMS": "tpu,cpu"}, Group("host-0:8482", 2, 1)),
        ({**POD, "TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, Group("a:8482", 3, 1)),
        (SLICES, Group("first-0:8482", 4, 3)),
    ],
)
def test_several(environ, group):
    assert find(environ) == group


def test_addresses_in_a_file(tmp_path):
    (tmp_path / "hosts").write_text("a:8471,b:8471\n")
    environ = {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "hosts"), "TPU_WORKER_ID": "0"}
    assert find(environ) == Group("a:8482", 2, 0)


def test_a_pod_that_only_its_metadata_tells_of(monkeypatch):
    from jax._src import clusters

    metadata = clusters.GceTpuCluster
    monkeypatch.setattr(metadata, "is_env_present", lambda: True)
    monkeypatch.setattr(metadata, "get_process_count", lambda: 4)
    monkeypatch.setattr(metadata, "get_process_id", lambda: 2)
    monkeypatch.setattr(metadata, "get_coordinator_address", lambda limit, port: f"h:{port or 1}")
    assert find({}) == Group("h:1", 4, 2)
    assert find({"JAX_COORDINATOR_PORT": "7"}) == Group("h:7", 4, 2)
    monkeypatch.setattr(metadata, "get_process_count", lambda: 1)
    assert find({}) is None


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"PROCESS_ID": "1"}, r"got PROCESS_ID=1; expected all of COORDINATOR_ADDRESS=host:port"),
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "1"}, "expected all of"),
        ({"COORDINATOR_ADDRESS": "h:1"}, "expected all of"),
        ({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2"}, "expected all of"),
        ({**BY_HAND, "JAX_NUM_PROCESSES": "5"}, "NUM_PROCESSES=4 and JAX_NUM_PROCESSES=5"),
        ({**BY_HAND, "PROCESS_ID": "4"}, "got process id 4 of 4 processes; expected ids 0 to 3"),
        ({**BY_HAND, "PROCESS_ID": "-1"}, "PROCESS_ID=-1; expected a whole number, 0 or more"),
        ({**BY_HAND, "NUM_PROCESSES": "two"}, "NUM_PROCESSES=two; expected a whole number"),
        ({**BY_HAND, "COORDINATOR_ADDRESS": "host"}, "expected host:port"),
        ({**BY_HAND, "COORDINATOR_ADDRESS": "host:http"}, "expected host:port"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "not started by srun"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID="),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "set COORDINATOR_ADDRESS"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "got no TPU_WORKER_ID"),
        ({**POD, "TPU_WORKER_ID": "2"}, "got TPU_WORKER_ID=2 and 2 hosts"),
        ({**SLICES, "MEGASCALE_COORDINATOR_ADDRESS": ""}, "no MEGASCALE_COORDINATOR_ADDRESS"),
        ({**SLICES, "MEGASCALE_SLICE_ID": "2"}, "got process id 5 of 4"),
    ],
)
def test_what_cannot_be_right(environ, says):
    with pytest.raises(ValueError, match=says):
        find(environ)
