"""Generation: a prompt is read into the cache once, then each token is decoded after the last.

Greedy for now. Rows of different lengths go together: each is padded on the right, and padding
never enters the cache.

Dims: R rows, T tokens of the padded prompts, V ids.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.batch import Batch
from llava_jax.models.llama import Cache
from llava_jax.models.llava import Llava
from llava_jax.models.stack import Params

# Prompts and caches are padded to multiples of this, so that few shapes are compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model's generation loop. Programs are compiled once for each padded shape."""

    model: Llava

    def generate(
        self, params: Params, batch: Batch, length_R: np.ndarray, max_new_tokens: int, eos: int
    ) -> list[list[int]]:
        """The new ids of each row, without the end token. length_R: of the prompts in the batch."""
        if max_new_tokens < 1:
            return [[] for _ in length_R]
        slots = bucket(batch.token_RT.shape[1] + max_new_tokens)
        next_R, cache = self._read(params, batch, np.asarray(length_R, np.int32), slots)
        rows: list[list[int]] = [[] for _ in length_R]
        open_rows = set(range(len(rows)))
        for step in range(max_new_tokens):
            for row, token in enumerate(np.asarray(next_R)):
                if row in open_rows and token == eos:
                    open_rows.discard(row)
                elif row in open_rows:
                    rows[row].append(int(token))
            if not open_rows or step + 1 == max_new_tokens:
                break
            next_R, cache = self._go_on(params, next_R, cache)
        return rows

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def _read(self, params: Params, batch: Batch, length_R, slots: int):
        """The first new token of each row, and the cache of the prompts."""
        model = self.model
        feature_RKPD = model.encode_images(params, batch.pixel_RKHW3)
        x_RTD = model.embed(params, batch.token_RT, feature_RKPD, batch.image_index_RT)
        cache = model.empty_cache(batch.token_RT.shape[0], slots)
        x_RTD, cache = model.decode(params, x_RTD, batch.position_RT, batch.segment_RT, cache)
        last_R1D = jnp.take_along_axis(x_RTD, (length_R - 1)[:, None, None], axis=1)
        return self._likeliest(params, last_R1D), cache

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def _go_on(self, params: Params, token_R, cache: Cache):
        token_R1 = token_R[:, None]
        no_image_R1 = jnp.full_like(token_R1, -1)
        no_feature = model_features(self.model, token_R1.shape[0])
        x_R1D = self.model.embed(params, token_R1, no_feature, no_image_R1)
        position_R1 = cache.length_B[:, None]
        x_R1D, cache = self.model.decode(params, x_R1D, position_R1, jnp.ones_like(token_R1), cache)
        return self._likeliest(params, x_R1D), cache

    def _likeliest(self, params: Params, x_R1D):
        next_R = jnp.argmax(self.model.head(params, x_R1D)[:, 0], axis=-1).astype(jnp.int32)
        return self.model.placement.constrain(next_R, (None,))  # every host reads all of them


def model_features(model: Llava, rows: int):
    """The features of no image at all."""
    width = model.config.language.hidden_size
    return jnp.zeros((rows, 0, model.config.tokens_per_image, width), model.compute.dtype)


def bucket(size: int) -> int:
    return -(-size // _BUCKET) * _BUCKET
