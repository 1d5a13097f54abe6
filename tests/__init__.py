"""The tests mirror the package: tests/models/test_llama.py tests llava_jax/models/llama.py."""
