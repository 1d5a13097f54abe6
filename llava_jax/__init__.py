"""LLaVA (visual instruction tuning) in JAX: generate data, train, plan, talk, score, hand back."""

__version__ = "0.1.0"
