"""Strict mode: 8 fake CPU devices, silent broadcasts of rank raise, no network.

The settings are environment variables, so that processes started by a test have them too.
"""

import os
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

# Before anything imports jax, which reads them once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Most programs here run once: compile them quickly rather than well (a third of the time).
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jax").startswith("0.10."):  # later ones no longer know it, and die of an unknown flag
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ["HF_HUB_OFFLINE"] = "1"

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data: golden files, photographs, tokenizers."""
    folder = Path(os.environ.get("LLAVA_JAX_SHARED") or CHECKOUT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set LLAVA_JAX_SHARED to its folder")
    return folder


def import_torch() -> ModuleType:
    """PyTorch, the oracle; without it the test skips, or fails under LLAVA_JAX_REQUIRE_TORCH=1."""
    if os.environ.get("LLAVA_JAX_REQUIRE_TORCH") != "1":
        pytest.importorskip("torch")
    import torch

    # Its threads would fight those of the 8 fake devices for the same few cores.
    torch.set_num_threads(1)
    return torch


def import_peft() -> ModuleType:
    """PEFT, the oracle of LoRA; it comes with PyTorch or not at all."""
    import_torch()
    if os.environ.get("LLAVA_JAX_REQUIRE_TORCH") != "1":
        pytest.importorskip("peft")
    import peft

    return peft


class NetworkUsed(Exception):
    """No OSError, so that code under test cannot take it for a network that is down."""


def refuse_remote(host: object) -> None:
    text = host.decode() if isinstance(host, bytes) else str(host)
    if text not in ("localhost", "::1", "0.0.0.0", "", "None") and not text.startswith("127."):
        raise NetworkUsed(f"tests may not use the network, and one wanted {text}")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    def guarded_connect(connect):
        def connect_if_local(self: socket.socket, address):
            if self.family != socket.AF_UNIX:
                refuse_remote(address[0])
            return connect(self, address)

        return connect_if_local

    def guarded_lookup(lookup):
        def look_up_if_local(host, *args, **kwargs):
            refuse_remote(host)
            return lookup(host, *args, **kwargs)

        return look_up_if_local

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded_connect(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", guarded_lookup(socket.getaddrinfo))
        yield
