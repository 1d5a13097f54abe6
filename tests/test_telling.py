"""What a run says of its machine."""

import types

import jax

from llava_jax import telling


def test_memory_is_the_fullest_devices(monkeypatch):
    assert telling.device_memory() == {}  # a CPU does not tell
    told = [
        {"bytes_in_use": 5, "peak_bytes_in_use": 8, "bytes_limit": 10, "largest_alloc_size": 1},
        {"bytes_in_use": 6, "peak_bytes_in_use": 7, "bytes_limit": 10},
        None,
    ]
    devices = [types.SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in told]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    expected = {"memory_bytes": 6, "memory_peak_bytes": 7, "memory_limit_bytes": 10}
    assert telling.device_memory() == expected
