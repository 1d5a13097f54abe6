"""CLIP's vision transformer: pixels → the hidden states of chosen blocks.

Any Hugging Face `CLIPVisionConfig`. Blocks above the highest chosen one are neither computed nor
held: `ClipConfig.num_blocks` says how many there are in memory.

Dims: I images, P patches, Q patches + the class token, C pixels of a patch · 3, D width,
F width of the MLP, N heads, H head dim, L blocks.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from llava_jax.models import stack
from llava_jax.models.attention import attention
from llava_jax.models.layers import (
    ACTIVATIONS,
    Dense,
    LayerNorm,
    check_activation,
    matmul_precision,
)
from llava_jax.models.stack import Compute, Placement, keep


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of the tower and which of its hidden states are the image's features.

    select_layers: indices into the hidden states, where 0 is the embeddings and i the output of
        block i; negative ones count from the last block. Several are joined along the width.
    select: "patch" drops the class token, "cls_patch" keeps it.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    select_layers: tuple[int, ...] = (-2,)
    select: str = "patch"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check_activation(self.hidden_act)
        if self.select not in ("patch", "cls_patch"):
            raise ValueError(f"got select {self.select!r}: expected 'patch' or 'cls_patch'")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"got CLIP width {self.hidden_size} for {self.num_heads} heads: expected a multiple"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"got {self.image_size}-pixel images for {self.patch_size}-pixel patches: "
                "expected at least one patch"
            )
        states = self.num_layers + 1
        wrong = [i for i in self.select_layers if not -states <= i < states]
        if wrong or not self.select_layers:
            raise ValueError(
                f"got select_layers {self.select_layers}: expected at least one, each from "
                f"{-states} to {states - 1} for {self.num_layers} blocks"
            )

    @property
    def selected(self) -> tuple[int, ...]:
        """select_layers, counted from the embeddings."""
        return tuple(i % (self.num_layers + 1) for i in self.select_layers)

    @property
    def num_blocks(self) -> int:
        """How many blocks run: none above the highest selected one."""
        return max(self.selected)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_features(self) -> int:
        return self.grid**2 + (self.select == "cls_patch")

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.select_layers)


class ClipBlock(nn.Module):
    """Pre-norm transformer block. Parameter names are ours; weights/ maps them to CLIP's."""

    config: ClipConfig
    compute: Compute
    placement: Placement

    @nn.compact
    def __call__(self, x_IQD, layer_input):
        c, compute = self.config, self.compute
        heads = (*x_IQD.shape[:2], c.num_heads, c.hidden_size // c.num_heads)

        y_IQD = LayerNorm(c.layer_norm_eps, name="attention_norm")(x_IQD)
        q_IQNH, k_IQNH, v_IQNH = (
            keep(Dense(c.hidden_size, compute, use_bias=True, name=n)(y_IQD).reshape(heads), n)
            for n in ("q", "k", "v")
        )
        y_IQNH = attention(
            q_IQNH,
            k_IQNH,
            v_IQNH,
            causal=False,
            backend=compute.attention,
            block=compute.attention_block,
            placement=self.placement,
        )
        out = Dense(c.hidden_size, compute, use_bias=True, output_first=True, name="o")
        x_IQD = keep(x_IQD + out(y_IQNH.reshape(x_IQD.shape)), "residual")

        y_IQD = LayerNorm(c.layer_norm_eps, name="mlp_norm")(x_IQD)
        y_IQF = keep(Dense(c.intermediate_size, compute, use_bias=True, name="fc1")(y_IQD), "up")
        y_IQF = ACTIVATIONS[c.hidden_act](y_IQF)
        down = Dense(c.hidden_size, compute, use_bias=True, output_first=True, name="fc2")
        return self.placement.constrain(x_IQD + down(y_IQF), ("batch", None, None))


class ClipVit(nn.Module):
    """uint8 pixels [I, height, width, 3] → features [I, P, feature_size]."""

    config: ClipConfig
    compute: Compute = Compute()
    placement: Placement = Placement()

    @nn.compact
    def __call__(self, pixel_IHW3):
        c = self.config
        x_IQD = self._embed(pixel_IHW3)
        block = ClipBlock(c, self.compute, self.placement, parent=None)
        layers_L = stack.params_of(self, block, c.num_blocks, x_IQD[:1], None)
        state, done = {}, 0
        for stop in sorted(set(c.selected)):
            if stop > done:
                x_IQD = stack.run(
                    block,
                    stack.layers(layers_L, done, stop),
                    x_IQD,
                    path="vision/layers",
                    compute=self.compute,
                    placement=self.placement,
                )
            state[stop], done = x_IQD, stop
        first = 0 if c.select == "cls_patch" else 1
        return jnp.concatenate([state[i][:, first:] for i in c.selected], axis=-1)

    @nn.nowrap
    def _embed(self, pixel_IHW3):
        c, dtype = self.config, self.compute.dtype
        images, height, width = pixel_IHW3.shape[:3]
        if (height, width) != (c.image_size, c.image_size):
            raise ValueError(
                f"got images of {height}x{width} pixels: this vision tower expects "
                f"{c.image_size}x{c.image_size}"
            )
        init = nn.initializers.normal(0.02)
        kernel_DC = self.param("patch_kernel", init, (c.hidden_size, c.patch_size**2 * 3))
        class_D = self.param("class_token", init, (c.hidden_size,))
        position_QD = self.param("position", init, (c.grid**2 + 1, c.hidden_size))

        # Normalised here, in f32: a batch travels as uint8.
        mean_3 = jnp.asarray(c.image_mean, jnp.float32)[None, None, None]
        std_3 = jnp.asarray(c.image_std, jnp.float32)[None, None, None]
        x = (pixel_IHW3.astype(jnp.float32) * (1.0 / 255.0) - mean_3) / std_3
        # A stride-p convolution is a matmul over p×p patches; pixels beyond the last whole
        # patch are outside its reach.
        whole = c.grid * c.patch_size
        x = x[:, :whole, :whole].reshape(images, c.grid, c.patch_size, c.grid, c.patch_size, 3)
        x_IPC = x.transpose(0, 1, 3, 2, 4, 5).reshape(images, c.grid**2, -1)
        x_IPD = jnp.einsum(
            "IPC,DC->IPD",
            x_IPC.astype(dtype),
            kernel_DC.astype(dtype),
            precision=matmul_precision(dtype),
        )
        class_I1D = jnp.broadcast_to(class_D.astype(dtype)[None, None], (images, 1, c.hidden_size))
        x_IQD = jnp.concatenate([class_I1D, x_IPD], axis=1) + position_QD.astype(dtype)[None]
        return LayerNorm(c.layer_norm_eps, name="pre_norm")(x_IQD)
