"""The small vision tower's loss: which phrase is true of a patch, which caption of a picture.

As in CLIP, pictures and texts become unit vectors, near each other where they belong together. The
text side is a decoder that reads a text to its end; it serves here alone, and is not kept. Phrases
are told from the others of their kind, at the patches of the last block but one, which LLaVA reads,
and of the last. Captions are told from each other, at the last block's class token, both ways.

Dims: I images, P patches, K kinds, N phrases, C captions, T tokens, D width, B blocks that are
looked at.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import step
from llava_jax.models.clip_vit import ClipVit
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.models.projector import Projector
from llava_jax.models.stack import Compute
from llava_jax.optim import Params
from llava_jax.picture_world.towers.phrases import (
    KINDS,
    NO_PHRASE,
    PHRASE_TOKENS,
    PHRASES,
    Pictured,
)

TERMS = (*KINDS, "caption")
COMPUTE = Compute(remat="none", scan=False)
_SHARPNESS = 16.0  # of a cosine, as a logit
_POSITION_SCALE = 0.7
_LONGEST_WAVE = 30


def init(config: LlavaConfig, key: jax.Array) -> Params:
    """Fresh parameters, scaled to so small a width, positions from sines and cosines."""
    params = scaled(Llava(config).init(key))
    grid, width = config.vision.grid, config.vision.hidden_size
    position = jnp.asarray(_POSITION_SCALE * _waves(grid, width))
    return {**params, "vision": {**params["vision"], "position": position}}


def scaled(params: Params) -> Params:
    """The models draw with a deviation of 0.02, as wide ones want it. Here a matrix gives values
    of its inputs' size, those back onto the residual stream less; and words are told apart."""

    def scale(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] in ("kernel", "patch_kernel"):
            backwards = names[-2] in ("o", "down", "fc2") or names[-1] == "patch_kernel"
            inputs = leaf.shape[-1] if backwards else leaf.shape[-2]
            depth = leaf.shape[0] if "layers" in names else 1
            damped = (2 * depth) ** -0.5 if backwards and depth > 1 else 1.0
            return leaf * (damped * inputs**-0.5 / 0.02)
        return leaf * 10 if "embed" in names else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def _waves(grid: int, width: int) -> np.ndarray:
    """[patches + 1, width]: each patch's row and column in waves; the class token's are 0."""
    number = width // 4
    frequency = _LONGEST_WAVE ** -(np.arange(number) / number)
    row, column = np.divmod(np.arange(grid**2), grid)
    parts = [wave(np.outer(at, frequency)) for at in (row, column) for wave in (np.sin, np.cos)]
    waves = np.concatenate(parts, axis=1)
    return np.concatenate([np.zeros((1, width)), waves]).astype(np.float32)


def loss(config: LlavaConfig) -> Any:
    """A step.Loss of phrases.Pictured. loss_S: each of TERMS apart, as a mean."""
    looked_at = dataclasses.replace(config.vision, select_layers=(-2, -1), select="cls_patch")
    vision, projector = ClipVit(looked_at, COMPUTE), Projector(config.projector, COMPUTE)
    model = Llava(config, COMPUTE)

    def sums(trainable: Params, frozen: Params, batch: Pictured, key_R: jax.Array) -> step.Sums:
        feature_IQE: Any = vision.apply({"params": trainable["vision"]}, batch.pixel_IHW3)
        x_IQBE = feature_IQE.reshape(*feature_IQE.shape[:2], 2, -1)
        x_IQBD: Any = _unit(projector.apply({"params": trainable["projector"]}, x_IQBE))
        phrase_ND = _read(model, trainable, batch.token_RT[:PHRASES, :PHRASE_TOKENS], batch.last_R)
        caption_CD = _read(model, trainable, batch.token_RT[PHRASES:], batch.last_R[PHRASES:])
        region_K = region_losses(x_IQBD[:, 1:], phrase_ND, batch.kind_R[:PHRASES], batch.phrase_IKP)
        captions = caption_loss(x_IQBD[:, 0, -1], caption_CD, batch.caption_I - PHRASES)
        term_S = jnp.append(region_K, captions)
        return step.Sums(jnp.sum(term_S), jnp.ones(()), term_S, jnp.ones_like(term_S))

    return sums


def region_losses(x_IPBD, phrase_ND, kind_N, phrase_IKP):
    """Mean of each kind: the cross entropy of the patch's phrase among all of that kind."""
    logit_IPBN = _SHARPNESS * jnp.einsum("IPBD,ND->IPBN", x_IPBD, phrase_ND)
    # No logit is above the sharpness, so one shift serves all sums.
    is_kind_NK = (kind_N[:, None] == jnp.arange(phrase_IKP.shape[1])[None]).astype(jnp.float32)
    sum_IPBK = jnp.einsum("IPBN,NK->IPBK", jnp.exp(logit_IPBN - _SHARPNESS), is_kind_NK)
    phrase_IPBK = jnp.swapaxes(phrase_IKP, 1, 2)[:, :, None]
    picked_IPBK = jnp.take_along_axis(logit_IPBN, jnp.clip(phrase_IPBK, 0), axis=-1)
    told_IPBK = phrase_IPBK != NO_PHRASE
    lost_IPBK = jnp.log(sum_IPBK + 1e-30) + _SHARPNESS - picked_IPBK
    count_K = jnp.sum(told_IPBK, axis=(0, 1, 2)) * x_IPBD.shape[2]
    return jnp.sum(jnp.where(told_IPBK, lost_IPBK, 0.0), axis=(0, 1, 2)) / jnp.maximum(count_K, 1)


def caption_loss(x_ID, caption_CD, caption_I):
    """CLIP's, both ways, over the pictures that have a caption; caption_I is below 0 elsewhere.
    Two pictures with one caption are not told apart by it."""
    has_I = caption_I >= 0
    own_I = jnp.clip(caption_I, 0)
    is_used_C = jnp.any((own_I[:, None] == jnp.arange(len(caption_CD))[None]) & has_I[:, None], 0)
    logit_IC = _SHARPNESS * jnp.einsum("ID,CD->IC", x_ID, caption_CD)
    right_I = jnp.take_along_axis(logit_IC, own_I[:, None], axis=1)[:, 0]
    among_captions_I = jax.nn.logsumexp(jnp.where(is_used_C[None], logit_IC, -1e9), axis=1)
    # Row i: every picture against the caption of picture i; others with the same one are left out.
    logit_II = logit_IC[:, own_I].T
    same_II = own_I[:, None] == own_I[None]
    rival_II = has_I[None] & (~same_II | jnp.eye(len(own_I), dtype=bool))
    among_pictures_I = jax.nn.logsumexp(jnp.where(rival_II, logit_II, -1e9), axis=1)
    lost_I = 0.5 * (among_captions_I + among_pictures_I) - right_I
    return jnp.sum(jnp.where(has_I, lost_I, 0.0)) / jnp.maximum(jnp.sum(has_I), 1)


def _read(model: Llava, params: Params, token_NT, last_R):
    """Unit vectors of texts: the decoder's state at each one's end."""
    N, T = token_NT.shape
    position_NT = jnp.broadcast_to(jnp.arange(T)[None], (N, T))
    no_image = jnp.zeros((N, 0, 1, model.config.language.hidden_size))
    x_NTD = model.embed(params, token_NT, no_image, jnp.full_like(token_NT, -1))
    x_NTD, _ = model.decode(params, x_NTD, position_NT, jnp.ones_like(token_NT))
    return _unit(jnp.take_along_axis(x_NTD, last_R[:N, None, None], axis=1)[:, 0])


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
