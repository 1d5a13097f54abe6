"""LLaVA: three pure functions of the parameters, and a head.

    encode_images(params, pixels)                     → image features in the language width
    embed(params, tokens, features, image_index)      → the row of embeddings the decoder reads
    decode(params, embeddings, positions, segments)   → hidden states (and the cache)
    head(params, hidden)                              → logits

All index arithmetic of the splice was done on the host (batch.py): here are one lookup, one
gather and two `where`s, so several images, tiles and packed rows change nothing.

The parameter tree: vision, projector, [row_end,] language/{embed, decoder, head}. Every leaf
passes through `Placement.gather` on its way in: the stacked layers inside their scan, all others
here.

Dims: R rows, T tokens, K image slots, H height, W width, P features of an image, D language
width, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.batch import ROW_END, Batch
from llava_jax.models.clip_vit import ClipConfig, ClipVit
from llava_jax.models.llama import Cache, Decoder, Embedding, Head, LlamaConfig, empty_cache
from llava_jax.models.loss import cross_entropy
from llava_jax.models.projector import Projector, ProjectorConfig
from llava_jax.models.stack import Compute, Params, Placement


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The architecture: what the weights mean. row_end: anyres' learned end-of-row embedding."""

    vision: ClipConfig
    projector: ProjectorConfig
    language: LlamaConfig
    row_end: bool = False

    def __post_init__(self):
        if self.projector.input_size != self.vision.feature_size:
            raise ValueError(
                f"the projector takes features of width {self.projector.input_size} and the "
                f"vision tower gives {self.vision.feature_size}: expected the same"
            )
        if self.projector.output_size != self.language.hidden_size:
            raise ValueError(
                f"the projector gives width {self.projector.output_size} and the language model "
                f"has {self.language.hidden_size}: expected the same"
            )

    @property
    def tokens_per_image(self) -> int:
        return self.projector.num_outputs(self.vision.num_features)

    def reading(self, layer: int) -> "LlavaConfig":
        """With features of this layer of the tower instead."""
        depth = self.vision.num_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"got config.model.select_layer = {layer}, expected {-depth - 1} to {depth}: the "
                f"tower has {depth} blocks"
            )
        vision = dataclasses.replace(self.vision, select_layers=(layer,))
        return dataclasses.replace(self, vision=vision)


def released(name: str) -> LlavaConfig:
    """The architecture of a released LLaVA: 'v1-7b', 'v1-lightning-13b', 'v1.5-7b', …"""
    variants = [f"{v}-{size}" for v in ("v1", "v1-lightning", "v1.5") for size in ("7b", "13b")]
    if name not in variants:
        raise ValueError(f"unknown LLaVA {name!r}: expected one of {', '.join(variants)}")
    version, _, size = name.rpartition("-")
    width, mlp_width, depth, heads = (
        (4096, 11008, 32, 32) if size == "7b" else (5120, 13824, 40, 40)
    )
    # v1 adds <im_start> and <im_end>, whose rows train in stage 1; the others add nothing.
    v1 = version != "v1.5"
    return LlavaConfig(
        vision=ClipConfig(1024, 4096, 24, 16, image_size=224 if v1 else 336, patch_size=14),
        projector=ProjectorConfig("linear" if v1 else "mlp2x_gelu", 1024, width),
        language=LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_layers=depth,
            num_heads=heads,
            num_kv_heads=heads,
            added_vocab=2 if version == "v1" else 0,
            rms_norm_eps=1e-6 if v1 else 1e-5,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Llava:
    """The pure functions of one architecture, on one machine. Holds no parameters."""

    config: LlavaConfig
    compute: Compute = Compute()
    placement: Placement = Placement()

    def __post_init__(self):
        if self.placement.dtype not in (None, self.compute.dtype):
            raise ValueError(
                f"the placement casts weights to {self.placement.dtype} and the model computes in "
                f"{self.compute.dtype}: expected the same"
            )

    def init(self, key: jax.Array) -> Params:
        """A fresh tree in f32. Call it under `jit` with out_shardings, or `eval_shape`."""
        c = self.config
        keys = iter(jax.random.split(key, 6))
        pixel_IHW3 = jnp.zeros((1, c.vision.image_size, c.vision.image_size, 3), jnp.uint8)
        feature_IPE = jnp.zeros((1, c.vision.num_features, c.vision.feature_size))
        token_RT = jnp.zeros((1, 1), jnp.int32)
        x_RTD = jnp.zeros((1, 1, c.language.hidden_size))
        # Drawn as one device would, so that a tree is the same whatever it is laid over.
        plain = dataclasses.replace(self, placement=Placement(), compute=Compute())
        params = {
            "vision": plain._vision.init(next(keys), pixel_IHW3)["params"],
            "projector": plain._projector.init(next(keys), feature_IPE).get("params", {}),
            "language": {
                "embed": plain._embedding.init(next(keys), token_RT)["params"],
                "decoder": plain._decoder.init(next(keys), x_RTD, token_RT, token_RT)["params"],
            },
        }
        head_key, row_end_key = next(keys), next(keys)
        if not c.language.tie_embeddings:
            params["language"]["head"] = plain._head.init(head_key, x_RTD)["params"]
        if c.row_end:
            std = c.language.hidden_size**-0.5
            params["row_end"] = std * jax.random.normal(row_end_key, (c.language.hidden_size,))
        return params

    def check(self, params: Params) -> None:
        """Raises ValueError unless params is this architecture's tree: all differences, by path."""

        def shapes_of(tree: Params) -> dict[str, tuple[int, ...]]:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {
                jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
                for path, leaf in leaves
            }

        got, expected = shapes_of(params), shapes_of(jax.eval_shape(self.init, jax.random.key(0)))
        differences = [
            f"{path}: got {got.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            for path in sorted(got.keys() | expected.keys())
            if got.get(path) != expected.get(path)
        ]
        if differences:
            raise ValueError(
                f"{len(differences)} leaves differ from this architecture:\n  "
                + "\n  ".join(differences)
            )

    def encode_images(self, params: Params, pixel_RKHW3):
        """uint8 pixels → features [R, K, P, D]."""
        R, K = pixel_RKHW3.shape[:2]
        D = self.config.language.hidden_size
        if K == 0:
            return jnp.zeros((R, 0, self.config.tokens_per_image, D), self.compute.dtype)
        pixel_IHW3 = pixel_RKHW3.reshape(R * K, *pixel_RKHW3.shape[2:])
        vision = self._gather_outer(params["vision"], "vision")
        feature_IPE = _apply(self._vision, vision, pixel_IHW3)
        projector = self._gather_outer(params["projector"], "projector")
        feature_IPD = _apply(self._projector, projector, feature_IPE)
        return feature_IPD.reshape(R, K, *feature_IPD.shape[1:])

    def embed(self, params: Params, token_RT, feature_RKPD, image_index_RT):
        """Text embeddings, with image features where image_index_RT ≥ 0 points at one."""
        embedding = self._gather(params["language"]["embed"], "language/embed")
        x_RTD = _apply(self._embedding, embedding, token_RT)
        R, K, P, D = feature_RKPD.shape
        if K > 0:
            feature_RFD = feature_RKPD.reshape(R, K * P, D).astype(x_RTD.dtype)
            index_RT = jnp.clip(image_index_RT, 0, K * P - 1)
            picked_RTD = jnp.take_along_axis(feature_RFD, index_RT[..., None], axis=1)
            x_RTD = jnp.where((image_index_RT >= 0)[..., None], picked_RTD, x_RTD)
        if self.config.row_end:
            row_end_D = self._gather(params["row_end"], "row_end").astype(x_RTD.dtype)
            x_RTD = jnp.where((image_index_RT == ROW_END)[..., None], row_end_D[None, None], x_RTD)
        return self.placement.constrain(x_RTD, ("batch", None, None))

    def decode(
        self,
        params: Params,
        x_RTD,
        position_RT,
        segment_RT,
        cache: Cache | None = None,
        dropout_key_R: jax.Array | None = None,
    ):
        """→ (hidden states [R, T, D], cache). Positions restart in each segment.

        dropout_key_R: a key for each row, for LoRA's dropout; None: no dropout.
        """
        decoder = self._gather_outer(params["language"]["decoder"], "language/decoder")
        return _apply(self._decoder, decoder, x_RTD, position_RT, segment_RT, cache, dropout_key_R)

    def head(self, params: Params, x):
        """Hidden states [..., D] → f32 logits [..., V]; only the first num_ids columns count."""
        return _apply(self._head, *self._gather_head(params)(x))

    def logits(self, params: Params, batch: Batch):
        """The whole forward pass of a Batch → [R, T, num_ids], for parity checks and small models.

        Training never holds these: its loss takes the head in chunks.
        """
        feature_RKPD = self.encode_images(params, batch.pixel_RKHW3)
        x_RTD = self.embed(params, batch.token_RT, feature_RKPD, batch.image_index_RT)
        x_RTD, _ = self.decode(params, x_RTD, batch.position_RT, batch.segment_RT)
        return self.head(params, x_RTD)[..., : self.config.language.num_ids]

    def token_losses(
        self,
        params: Params,
        batch: Batch,
        *,
        chunks: int = 1,
        dropout_key_R: jax.Array | None = None,
    ):
        """Cross entropy of each token's target, f32 [R, T]; what counts is for the weights to say.

        chunks: the head is taken in so many pieces of each row, and again in the backward pass, so
        that logits of one piece exist at a time.
        """
        feature_RKPD = self.encode_images(params, batch.pixel_RKHW3)
        x_RTD = self.embed(params, batch.token_RT, feature_RKPD, batch.image_index_RT)
        x_RTD, _ = self.decode(
            params, x_RTD, batch.position_RT, batch.segment_RT, dropout_key_R=dropout_key_R
        )
        head = self._gather_head(params)  # once, not for every piece
        return cross_entropy(
            lambda x_RTD: _apply(self._head, *head(x_RTD)), x_RTD, batch.target_RT, chunks
        )

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """Zeros; on a mesh make it under `jit` with Layout.cache_shardings."""
        return empty_cache(self.config.language, rows, slots, self.compute.dtype)

    @property
    def _vision(self) -> nn.Module:
        return ClipVit(self.config.vision, self.compute, self.placement)

    @property
    def _projector(self) -> nn.Module:
        return Projector(self.config.projector, self.compute, self.placement)

    @property
    def _embedding(self) -> nn.Module:
        return Embedding(self.config.language, self.compute)

    @property
    def _decoder(self) -> nn.Module:
        return Decoder(self.config.language, self.compute, self.placement)

    @property
    def _head(self) -> nn.Module:
        return Head(self.config.language, self.compute)

    def _gather_head(self, params: Params) -> Callable[[Any], tuple[Any, ...]]:
        """What the head module is applied to, for hidden states to come."""
        language = params["language"]
        if self.config.language.tie_embeddings:
            embedding = self._gather(language["embed"], "language/embed")
            return lambda x: ({}, x, embedding)
        head = self._gather(language["head"], "language/head")
        return lambda x: (head, x)

    def _gather(self, params: Params, path: str) -> Params:
        return self.placement.gather(params, path)

    def _gather_outer(self, params: Params, path: str) -> Params:
        """All but the stacked layers, which their own scan gathers one by one."""
        outer = {name: leaf for name, leaf in params.items() if name != "layers"}
        gathered = self._gather(outer, path)
        return {**gathered, "layers": params["layers"]} if "layers" in params else gathered


def _apply(module: nn.Module, params: Params, *inputs: Any) -> Any:
    return module.apply({"params": params}, *inputs)
