"""Packaging. Tool settings live in pyproject.toml; nothing else describes the package.

Ranges are what was tested: the lower bound is what Python 3.11 gets, the upper bound the first
release that was not tried.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

version_line = re.search(r'^__version__ = "(.+)"$', Path("llava_jax/__init__.py").read_text(), re.M)
assert version_line, "llava_jax/__init__.py must set __version__"

setup(
    name="llava-jax",
    version=version_line[1],
    description="LLaVA (visual instruction tuning) in JAX for TPU pods, from data to weights",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llava_jax", "llava_jax.*"]),
    package_data={"llava_jax.picture_world.towers": ["clip/*", "llama/*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "numpy>=2.1,<3",
        "etils[epath]>=1.15,<2",
        "orbax-checkpoint>=0.12.8,<0.13",
        "sentencepiece>=0.2.3,<0.3",
        "pillow>=13,<14",
        "ml_collections>=1.1,<2",
    ],
    extras_require={
        # A pod's workdir is a bucket: gs:// paths need the GCS backend of epath.
        "tpu": ["jax[tpu]", "etils[epath-gcs]"],
        "gpu": ["jax[cuda13]"],
        "data": [
            "grain>=0.2.18,<0.3",
            "tensorflow-datasets>=4.9.10,<5",
            "array_record>=0.8.3,<0.9",
        ],
        # Event files for TensorBoard, without TensorFlow.
        "metrics": ["tensorboardX>=2.6.5,<2.7"],
        "serve": ["starlette>=1.3.1,<2", "uvicorn>=0.54,<1"],
        "hf": ["transformers>=5.23,<6", "tokenizers>=0.23,<0.24", "safetensors>=0.8,<1"],
        "dev": [
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "ruff==0.17.5",
            "basedpyright==1.40.2",
            "transformers>=5.23,<6",
            "llava-jax[data,metrics]",
            # Buckets, tested against a server on loopback.
            "etils[epath-gcs]",
            # The oracle of the parity tests; on newer interpreters those tests skip.
            'torch==2.13.0; python_version < "3.12"',
            'peft>=0.21.2,<0.22; python_version < "3.12"',
        ],
    },
)
