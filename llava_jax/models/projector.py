"""From the vision tower's features to the language model's width.

    linear        one matrix (LLaVA v1)
    mlpNx_gelu    N matrices with GELU (the exact one) between them (v1.5: mlp2x_gelu)
    identity      nothing; the two widths must agree
    resampler     a fixed number of learned queries that look at the features through
                  cross-attention (BLIP-2's Q-Former with a cross-attention in every layer),
                  then one matrix

Dims: I images, P features of an image, E their width, Q queries, W resampler width, D language
width, N heads, H head dim, F width of the resampler's MLP, L its layers.
"""

import dataclasses
import re

import flax.linen as nn
import jax.numpy as jnp

from llava_jax.models import stack
from llava_jax.models.attention import attention
from llava_jax.models.layers import ACTIVATIONS, Dense, LayerNorm
from llava_jax.models.stack import Compute, Placement


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    num_queries: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"got resampler width {self.hidden_size} for {self.num_heads} heads: expected a "
                "multiple"
            )


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """kind: 'linear', 'mlpNx_gelu' (N ≥ 1), 'identity' or 'resampler'."""

    kind: str
    input_size: int
    output_size: int
    resampler: ResamplerConfig | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "identity", "resampler") and self.depth == 0:
            raise ValueError(
                f"unknown projector {self.kind!r}: expected 'linear', 'mlpNx_gelu' with N from 1 "
                "up, 'identity' or 'resampler'"
            )
        if self.kind == "identity" and self.input_size != self.output_size:
            raise ValueError(
                f"an 'identity' projector got features of width {self.input_size} for a language "
                f"model of width {self.output_size}: expected the same; use 'linear'"
            )
        if (self.kind == "resampler") != (self.resampler is not None):
            raise ValueError(
                f"got projector {self.kind!r} with resampler={self.resampler}: a 'resampler' needs "
                "a ResamplerConfig, and nothing else takes one"
            )

    @property
    def depth(self) -> int:
        """Number of matrices of a linear or MLP projector; 0 for the others."""
        mlp = re.fullmatch(r"mlp(\d+)x_gelu", self.kind)
        return 1 if self.kind == "linear" else int(mlp[1]) if mlp else 0

    def num_outputs(self, num_features: int) -> int:
        """How many tokens an image of num_features features becomes."""
        return self.resampler.num_queries if self.resampler else num_features


class Projector(nn.Module):
    """[I, P, E] → [I, P or Q, D]."""

    config: ProjectorConfig
    compute: Compute = Compute()
    placement: Placement = Placement()

    @nn.compact
    def __call__(self, x_IPE):
        c, dtype = self.config, self.compute.dtype
        if x_IPE.shape[-1] != c.input_size:
            raise ValueError(
                f"got image features of width {x_IPE.shape[-1]}: this projector expects "
                f"{c.input_size}"
            )
        x, depth = x_IPE.astype(dtype), c.depth
        if c.resampler is not None:
            x, depth = self._resample(c.resampler, x), 1
        for i in range(depth):
            if i:
                x = ACTIVATIONS["gelu"](x)
            x = Dense(c.output_size, self.compute, use_bias=True, name=f"linear_{i}")(x)
        return x

    @nn.nowrap
    def _resample(self, c: ResamplerConfig, x_IPE):
        dtype = self.compute.dtype
        query_QW = self.param("query", nn.initializers.normal(0.02), (c.num_queries, c.hidden_size))
        query_IQW = jnp.broadcast_to(
            query_QW.astype(dtype)[None], (x_IPE.shape[0], *query_QW.shape)
        )
        query_IQW = LayerNorm(c.layer_norm_eps, name="query_norm")(query_IQW)
        block = ResamplerBlock(c, self.compute, parent=None)
        layers_L = stack.params_of(self, block, c.num_layers, query_IQW[:1], None, x_IPE[:1])
        return stack.run(
            block,
            layers_L,
            query_IQW,
            None,
            x_IPE,
            path="projector/layers",
            compute=self.compute,
            placement=self.placement,
        )


class ResamplerBlock(nn.Module):
    """Queries look at each other, then at the image, then pass an MLP; norms after each (BERT's
    order, as in the Q-Former)."""

    config: ResamplerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_IQW, layer_input, feature_IPE):
        c, compute = self.config, self.compute
        x_IQW = self._attend("self", x_IQW, x_IQW)
        x_IQW = self._attend("cross", x_IQW, feature_IPE)
        y_IQF = Dense(c.intermediate_size, compute, use_bias=True, name="fc1")(x_IQW)
        y_IQF = ACTIVATIONS["gelu"](y_IQF)
        down = Dense(c.hidden_size, compute, use_bias=True, output_first=True, name="fc2")
        return LayerNorm(c.layer_norm_eps, name="mlp_norm")(x_IQW + down(y_IQF))

    @nn.nowrap
    def _attend(self, name, x_IQW, source_ISE):
        c, compute = self.config, self.compute

        def heads(part, x):
            y = Dense(c.hidden_size, compute, use_bias=True, name=f"{name}_{part}")(x)
            return y.reshape(*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)

        # Plain XLA whatever the backend: a few dozen queries are no work for a fused kernel.
        y_IQNH = attention(
            heads("q", x_IQW), heads("k", source_ISE), heads("v", source_ISE), causal=False
        )
        out = Dense(c.hidden_size, compute, use_bias=True, output_first=True, name=f"{name}_o")
        return LayerNorm(c.layer_norm_eps, name=f"{name}_norm")(
            x_IQW + out(y_IQNH.reshape(x_IQW.shape))
        )
