"""LLaVA (visual instruction tuning) in JAX: generate data, train, plan, talk, score, hand back.

import llava_jax
model = llava_jax.load("folder")
print(model.generate("What is unusual here?", images=["photo.jpg"]))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name: str):
    # On first use: `import llava_jax.models` must not need what loading a folder needs.
    if name in __all__:
        from llava_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
