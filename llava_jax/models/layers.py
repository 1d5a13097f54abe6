"""The small modules every tower is made of: Dense, LayerNorm, RmsNorm, activations.

One layout rule for all kernels: the model's width comes first, whichever way data flows through
them. So `q`, `gate`, `fc1` are stored [input, output] and `o`, `down`, `fc2` [output, input];
the first dim is the one FSDP shards, and every shard is made of whole rows (see sharding.py).

Dims: B rows, I input features, O output features, D width of a norm, R LoRA rank.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models import lora as lora_lib

_kernel_init = nn.initializers.normal(0.02)
# Uniform within 1/√inputs, as PEFT and torch's Linear draw it.
_lora_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {sorted(ACTIVATIONS)}")


def matmul_precision(dtype) -> jax.lax.Precision:
    """f32 compute must mean f32 on a TPU too, where the default multiplies in bf16."""
    f32 = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if f32 else jax.lax.Precision.DEFAULT


class Dense(nn.Module):
    """x[..., I] → [..., O], with an optional LoRA delta.

    output_first: the kernel is stored [O, I], for projections back onto the model's width.
    """

    features: int
    dtype: str
    use_bias: bool = False
    output_first: bool = False
    lora: lora_lib.LoraConfig = lora_lib.LoraConfig()

    @nn.compact
    def __call__(self, x, dropout_key_B=None):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init, shape[::-1] if self.output_first else shape)
        precision = matmul_precision(self.dtype)
        x = x.astype(self.dtype)
        equation = "...I,OI->...O" if self.output_first else "...I,IO->...O"
        y = jnp.einsum(equation, x, kernel.astype(self.dtype), precision=precision)
        rank = self.lora.rank_of(self.name or "")
        if rank:
            # a is drawn and b is zero, so a fresh delta changes nothing.
            a_IR = self.param("lora_a", _lora_init, (shape[0], rank))
            b_OR = self.param("lora_b", nn.initializers.zeros, (shape[1], rank))
            y = y + lora_lib.delta(self.lora, x, a_IR, b_OR, dropout_key_B, precision)
        if self.use_bias:
            bias_O = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.expand_dims(bias_O.astype(self.dtype), range(x.ndim - 1))
        return y


class LayerNorm(nn.Module):
    """Statistics and affine in f32, whatever the compute dtype; the input's dtype comes back."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        leading = range(x.ndim - 1)
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * jnp.expand_dims(scale_D, leading) + jnp.expand_dims(bias_D, leading)
        return y.astype(x.dtype)


class RmsNorm(nn.Module):
    """LLaMA's norm: no mean, no bias; statistics in f32."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * jnp.expand_dims(scale_D, range(x.ndim - 1))).astype(x.dtype)
