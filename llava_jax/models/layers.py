"""The small modules every tower is made of: Dense, LayerNorm, RmsNorm, activations.

One layout rule for all kernels: the model's width comes first, whichever way data flows through
them. So `q`, `gate`, `fc1` are stored [input, output] and `o`, `down`, `fc2` [output, input];
the first dim is the one FSDP shards, and every shard is made of whole rows (see sharding.py).

Dims: B rows, T tokens, I input features, O output features, N heads, H head dim, D width of a norm,
R LoRA rank.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models import lora as lora_lib
from llava_jax.models.stack import Compute, keep, row_major

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
    heads: the kernel's other dim is N heads of size H: → [..., N, H]; with output_first from x
        [..., N, H].
    """

    features: int
    compute: Compute
    use_bias: bool = False
    output_first: bool = False
    heads: int = 0
    lora: lora_lib.LoraConfig = lora_lib.LoraConfig()

    @nn.compact
    def __call__(self, x, dropout_key_B=None):
        dtype = self.compute.dtype
        x = x.astype(dtype)
        leading = x.shape[: -2 if self.heads and self.output_first else -1]
        x_flat = x.reshape(*leading, -1)
        shape = (x_flat.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init, shape[::-1] if self.output_first else shape)
        kernel = kernel.astype(dtype)
        y: Any
        if self.heads and self.output_first:
            precision = matmul_precision(dtype)
            kernel_ONH = kernel.reshape(self.features, *x.shape[-2:])
            y = jnp.einsum("...NH,ONH->...O", x, kernel_ONH, precision=precision)
        elif self.heads:
            y = _into_heads(self.heads, self.compute, x, kernel)
        else:
            y = _project(x, kernel, self.output_first)
        rank = self.lora.rank_of(self.name or "")
        if rank:
            # a is drawn and b is zero, so a fresh delta changes nothing.
            a_IR = self.param("lora_a", _lora_init, (shape[0], rank))
            b_OR = self.param("lora_b", nn.initializers.zeros, (shape[1], rank))
            precision = matmul_precision(dtype)
            delta = lora_lib.delta(self.lora, x_flat, a_IR, b_OR, dropout_key_B, precision)
            y = y + delta.reshape(y.shape)
        if self.use_bias:
            bias_O = self.param("bias", nn.initializers.zeros, (self.features,))
            bias = bias_O.astype(dtype).reshape(y.shape[len(leading) :])
            y = y + jnp.expand_dims(bias, range(len(leading)))
        return y


def _project(x, kernel, output_first: bool = False):
    equation = "...I,OI->...O" if output_first else "...I,IO->...O"
    return jnp.einsum(equation, x, kernel, precision=matmul_precision(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _into_heads(heads: int, compute: Compute, x_BTI, kernel_IO):
    """x @ kernel as [B, T, N, H]. Asked of a TPU in this form, the product writes heads where the
    attention kernels read them. Its gradients are taken of [B, T, O]: by head, the compiler would
    turn both into another layout, and copy what they are made of (docs/log.md)."""
    kernel_INH = kernel_IO.reshape(kernel_IO.shape[0], heads, -1)
    return jnp.einsum("...I,INH->...NH", x_BTI, kernel_INH, precision=matmul_precision(x_BTI.dtype))


def _into_heads_forward(heads, compute, x_BTI, kernel_IO):
    return _into_heads(heads, compute, x_BTI, kernel_IO), (x_BTI, kernel_IO)


def _into_heads_backward(heads, compute, residual, dy_BTNH):
    x_BTI, kernel_IO = residual
    dy_BTO = row_major(dy_BTNH.reshape(*x_BTI.shape[:-1], -1), compute)
    return jax.vjp(_project, x_BTI, kernel_IO)[1](dy_BTO)


_into_heads.defvjp(_into_heads_forward, _into_heads_backward)


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
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1) + self.epsilon)
        y = y * keep(inverse, "norm")[..., None]
        return (y * jnp.expand_dims(scale_D, range(x.ndim - 1))).astype(x.dtype)
