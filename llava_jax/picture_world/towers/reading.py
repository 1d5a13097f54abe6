"""The small language model's loss, and its examination: questions about scenes told in notes.

Dims: R rows, T tokens, D width, S terms of the loss.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import step
from llava_jax.batch import Batch
from llava_jax.models.llava import Llava, LlavaConfig
from llava_jax.models.loss import cross_entropy
from llava_jax.optim import Params
from llava_jax.picture_world import questions
from llava_jax.picture_world.scenes import generator, scene
from llava_jax.picture_world.towers import lessons
from llava_jax.picture_world.towers.lessons import Lesson, Reader
from llava_jax.picture_world.towers.seeing import COMPUTE, scaled

TERMS = ("answers", "other words")
_ROWS, _TOKENS = 64, 128  # of a batch of questions


def init(config: LlavaConfig, key: jax.Array) -> Params:
    return scaled({"language": Llava(config).init(key)["language"]})


def loss(config: LlavaConfig, noise: float) -> step.Loss:
    """Cross entropy of all words, as the batch weighs them. noise: on notes' embeddings, at most
    so many times their own size, another share in each row: what stands in their place later is no
    exact word."""
    model = Llava(config, COMPUTE)

    def sums(trainable: Params, frozen: Params, batch: Batch, key_R: jax.Array) -> step.Sums:
        x_RTD = _embed(model, trainable, batch)
        drawn_RTD = jax.vmap(lambda key: _noise(key, x_RTD.shape[1:]))(key_R)
        table = trainable["language"]["embed"]["table"]
        size = noise * jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(table))))
        is_note_RT1 = (batch.image_index_RT >= 0)[..., None]
        x_RTD = x_RTD + jnp.where(is_note_RT1, size * drawn_RTD, 0.0)
        x_RTD, _ = model.decode(trainable, x_RTD, batch.position_RT, batch.segment_RT)
        loss_RT = cross_entropy(lambda x: model.head(trainable, x), x_RTD, batch.target_RT)
        weight_RT = batch.loss_weight_RT
        answer_RT = weight_RT == 1.0
        told_SRT = jnp.stack([answer_RT, ~answer_RT]) * weight_RT[None]
        loss_S = jnp.sum(loss_RT[None] * told_SRT, axis=(1, 2))
        return step.Sums(
            jnp.sum(loss_S), jnp.sum(weight_RT), loss_S, jnp.sum(told_SRT, axis=(1, 2))
        )

    return sums


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    share_key, key = jax.random.split(key)
    return jax.random.uniform(share_key, (1, 1)) * jax.random.normal(key, shape)


def _embed(model: Llava, params: Params, batch: Batch):
    """A note is the sum of its words, at the size of two."""
    num_ids = model.config.language.num_ids
    words = (*lessons.apart(batch.token_RT, num_ids), *lessons.apart(batch.source_RT, num_ids))
    rows, width = batch.token_RT.shape[0], model.config.language.hidden_size
    no_image = jnp.zeros((rows, 0, 1, width))
    no_index_RT = jnp.full_like(batch.token_RT, -1)
    embedded = [model.embed(params, word_RT, no_image, no_index_RT) for word_RT in words]
    is_word = [(word_RT > 0)[..., None] for word_RT in words]
    total_RTD = sum(jnp.where(is_one, x, 0.0) for is_one, x in zip(is_word, embedded, strict=True))
    return jnp.where((batch.image_index_RT >= 0)[..., None], 0.5 * total_RTD, embedded[0])


def exam(
    config: LlavaConfig, params: Params, reader: Reader, *, split: str, seed: int, scenes: int
) -> dict[str, float]:
    """Share of exact answers in each category, of new scenes in notes, each question alone."""
    asked: list[tuple[str, Lesson]] = []
    for index in range(scenes):
        one = scene(seed, split, index)
        for question in questions.closed(one, generator(seed, split, index, "exam")):
            asked.append((question.category, reader.question(one, question)))
    right = exact(_guesser(config), params, [lesson for _, lesson in asked])
    total = Counter(category for category, _ in asked)
    found = Counter(
        category for (category, _), is_right in zip(asked, right, strict=True) if is_right
    )
    return {category: found[category] / total[category] for category in questions.CATEGORIES}


def shares(scores: Mapping[str, float]) -> tuple[float, float]:
    """The mean over the categories that are not two-way, and over those that are."""
    two_way = [score for name, score in scores.items() if name in questions.TWO_WAY]
    others = [score for name, score in scores.items() if name not in questions.TWO_WAY]
    return float(np.mean(others)), float(np.mean(two_way))


def exact(
    guess: Callable[[Params, Batch], jax.Array], params: Params, asked: Sequence[Lesson]
) -> list[bool]:
    """Whether each answer would be said, end and all: the likeliest id is right at every token of
    it, and that is when greedy decoding gives it."""
    right: list[bool] = []
    for start in range(0, len(asked), _ROWS):
        part = asked[start : start + _ROWS]
        batch = lessons.empty(_ROWS, _TOKENS)
        for row, lesson in enumerate(part):
            lessons.put(batch, row, 0, 1, lesson)
        is_right_RT = np.asarray(guess(params, batch)) == batch.target_RT
        all_R = (is_right_RT | (batch.loss_weight_RT == 0)).all(axis=1)
        right += [bool(value) for value in all_R[: len(part)]]
    return right


def _guesser(config: LlavaConfig) -> Callable[[Params, Batch], jax.Array]:
    model = Llava(config, COMPUTE)

    @jax.jit
    def guess(params: Params, batch: Batch) -> jax.Array:
        x_RTD = _embed(model, params, batch)
        x_RTD, _ = model.decode(params, x_RTD, batch.position_RT, batch.segment_RT)
        return jnp.argmax(model.head(params, x_RTD), axis=-1)

    return guess
