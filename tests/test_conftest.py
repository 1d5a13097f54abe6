"""Strict mode is on: each silent convenience is loud."""

import socket
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import NetworkUsed


def test_eight_fake_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def test_processes_started_by_a_test_are_strict_too():
    count = "import jax; print(jax.device_count(), jax.config.jax_numpy_rank_promotion)"
    answer = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    assert answer.stdout.split() == ["8", "raise"], answer.stderr


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)])
def test_no_network(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(NetworkUsed, match=address[0]):
        sock.connect(address)
    with pytest.raises(NetworkUsed, match=r"example\.invalid"):
        socket.create_connection(("example.invalid", 80))


def test_loopback_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(("localhost", server.getsockname()[1])) as client:
            assert client.getpeername()[0] == "127.0.0.1"


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning])
@pytest.mark.parametrize("module", ["llava_jax.models.llama", "launch.train", "tests.test_x"])
def test_our_own_warnings_are_errors(kind, module):
    with pytest.raises(kind, match="mind this"):
        warnings.warn_explicit("mind this", kind, filename="file.py", lineno=1, module=module)
