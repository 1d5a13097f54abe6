"""A model one can talk to: `llava_jax.load("folder")`.

Text and pictures go in, text or logits come out. Every kind of folder that weights/ knows is
read as it is; nothing needs to be converted first, and nothing is inferred from its name.

Dims: R rows, T tokens (each picture's features counted), K picture slots, H height, W width.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from llava_jax import checkpoint, claiming, conversation, files, tokenizer
from llava_jax.batch import TEXT, Batch
from llava_jax.engine import Engine, bucket
from llava_jax.image import ImageProcessing
from llava_jax.model_folder import About, StoredModel
from llava_jax.models.llava import Llava
from llava_jax.models.stack import Compute, Params
from llava_jax.sharding import Layout
from llava_jax.tokenizer import Tokenizer
from llava_jax.weights.assembly import Choices, open_model
from llava_jax.weights.memory import params_in_memory

Picture = Any  # a PIL image, a path, or a file's bytes


def load(
    folder: str | os.PathLike[str],
    *,
    base: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    allow_pickle: bool = False,
    template: str | None = None,
    compute: str | None = None,
    layout: Layout | None = None,
) -> "Model":
    """The model in a folder: ours, llava-hf's, the original LLaVA's, or a training workdir.

    base: folders of the parts it lacks (a tower, what a thin folder or a LoRA stands on).
    allow_pickle: read .bin files too. compute: "float32" or "bfloat16"; None is f32 on a CPU and
    bf16 elsewhere. layout: of a mesh; None is one device.
    """
    bases = [base] if isinstance(base, (str, os.PathLike)) else list(base)
    choices = Choices(allow_pickle=allow_pickle, template=template)
    stored = open_stored(files.path(folder), [files.path(b) for b in bases], choices)
    return from_stored(stored, compute=compute, layout=layout)


def open_stored(
    folder: epath.Path, bases: Sequence[epath.Path] = (), choices: Choices = Choices()
) -> StoredModel:
    """Whatever can be a model, its tensors unread: a folder of weights, a training workdir, or one
    of its checkpoints, WORKDIR/checkpoints/STEP."""
    workdir = folder.parent.parent
    base = bases[0] if bases else None
    if claiming.is_workdir(folder):
        return checkpoint.read_model(folder, base)
    if folder.parent == workdir / claiming.CHECKPOINTS and folder.name.isdecimal():
        return checkpoint.read_model(workdir, base, step=int(folder.name))
    return open_model(folder, bases, choices)


def from_stored(
    stored: StoredModel, *, compute: str | None = None, layout: Layout | None = None
) -> "Model":
    compute = compute or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = Llava(stored.about.config, compute=Compute(dtype=compute))
    if layout is not None:
        model = dataclasses.replace(model, placement=layout.placement(compute))
    return Model(
        about=stored.about,
        engine=Engine(model),
        params=params_in_memory(stored.about.config, stored.leaves, layout),
        tokenizer=_tokenizer(stored),
        layout=layout,
        notes=stored.notes,
    )


def _tokenizer(stored: StoredModel) -> Tokenizer | None:
    if stored.tokenizer is None:
        return None
    loaded = tokenizer.load(stored.tokenizer)
    specials = {**loaded.specials, **stored.added_tokens}
    return dataclasses.replace(loaded, specials=specials)


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights in memory, and how they want to be spoken to (`about`)."""

    about: About
    engine: Engine
    params: Params
    tokenizer: Tokenizer | None
    layout: Layout | None = None
    notes: tuple[str, ...] = ()

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        images: Sequence[Any] = (),
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = 64,
    ) -> Any:
        """The answer to a prompt about pictures; a list of them for a list of prompts with a list
        of pictures each. With ids= in place of a prompt: the ids of the answer."""
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"got max_new_tokens {max_new_tokens!r}, expected a number, 0 or more")
        _check_either(prompt, ids)
        if ids is not None:
            return self._new_ids([_as_ids(ids)], [_as_pictures(images)], max_new_tokens)[0]
        if isinstance(prompt, str):
            prompts, pictures = [prompt], [_as_pictures(images)]
        else:
            prompts, pictures = _by_prompt(prompt, images)
        if not prompts:
            return []
        rows = [self.prompt_ids(p, len(own)) for p, own in zip(prompts, pictures, strict=True)]
        texts = self.answers(rows, pictures, max_new_tokens)
        return texts[0] if isinstance(prompt, str) else texts

    def answers(
        self,
        rows: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture]],
        max_new_tokens: int,
    ) -> list[str]:
        """Texts that go on behind rows of ids, with −200 for each picture of a row."""
        new = self._new_ids([list(ids) for ids in rows], pictures, max_new_tokens)
        return [self._text(ids) for ids in new]

    def logits(
        self,
        prompt: str | None = None,
        images: Sequence[Picture] = (),
        *,
        ids: Sequence[int] | None = None,
    ) -> np.ndarray:
        """f32 [tokens, vocabulary] of one row, the tokens of its pictures included."""
        _check_either(prompt, ids)
        pictures = _as_pictures(images)
        row = _as_ids(ids) if ids is not None else self.prompt_ids(prompt, len(pictures))
        batch, length_R = self._batch([row], [pictures])
        return np.asarray(_logits(self.engine.model, self.params, batch)[0, : length_R[0]])

    def prompt_ids(self, prompt: Any, num_images: int = 0) -> list[int]:
        """The ids of a question in the model's own template, one −200 for each picture.

        Pictures stand in front. `<image>` in the text is their place, if it is there as often.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"got prompt {prompt!r}, expected a text (or ids=…)")
        question = conversation.human(prompt, num_images)
        if num_images and (marked := prompt.count(conversation.IMAGE_TAG)):
            if marked != num_images:
                raise ValueError(
                    f"got {marked} {conversation.IMAGE_TAG} in the prompt for {num_images} images, "
                    "expected as many, or none"
                )
            question = conversation.Turn("human", tuple(prompt.split(conversation.IMAGE_TAG)))
        turns = [question, conversation.UNFINISHED]
        ids, _ = tokenizer.render(self._tokenizer(), conversation.pieces(turns, self.template))
        return ids

    @property
    def template(self) -> conversation.Template:
        return conversation.template(
            self.about.template,
            start_end_tokens=self.about.start_end_tokens,
            text_restarts=self.about.text_restarts,
        )

    def __repr__(self) -> str:
        name = f"LLaVA {self.about.variant}" if self.about.variant else "a LLaVA"
        return (
            f"<{name}: template {self.about.template}, "
            f"{self.about.config.tokens_per_image} tokens a picture>"
        )

    # Details.

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the folder holds no tokenizer: expected ids=… in place of a text")
        return self.tokenizer

    def _new_ids(
        self, rows: Sequence[list[int]], pictures: Sequence[Sequence[Picture]], max_new_tokens: int
    ) -> list[list[int]]:
        batch, length_R = self._batch(rows, pictures)
        longest = int(length_R.max()) + max_new_tokens
        if longest > self.about.context:
            raise ValueError(
                f"got a prompt of {int(length_R.max())} tokens and max_new_tokens "
                f"{max_new_tokens}; expected at most {self.about.context} in all"
            )
        eos = self.about.tokens.eos
        new = self.engine.generate(self.params, batch, length_R, max_new_tokens, eos)
        return new[: len(rows)]

    def _text(self, ids: list[int]) -> str:
        tokenizer = self._tokenizer()
        # llava-hf's embeddings have rows that no token names; a random model may say one.
        text = tokenizer.decode([id for id in ids if id < tokenizer.num_ids])
        for stop in self.template.stop:
            text = text.split(stop)[0]
        return text.strip()

    def _batch(
        self, rows: Sequence[list[int]], pictures: Sequence[Sequence[Picture]]
    ) -> tuple[Batch, np.ndarray]:
        """Rows padded on the right to one length, and how long each really is."""
        expanded = [self._expanded(ids, len(own)) for ids, own in zip(rows, pictures, strict=True)]
        shards = 1
        if self.layout is not None:
            shards = int(np.prod([self.layout.mesh.shape[a] for a in self.layout.batch_axes]))
        R = -(-len(rows) // shards) * shards
        length_R = np.ones(R, np.int32)
        length_R[: len(rows)] = [len(token_T) for token_T, _ in expanded]
        T, K = bucket(int(length_R.max())), max(len(own) for own in pictures)
        side = self.about.config.vision.image_size
        token_RT = np.zeros((R, T), np.int32)
        image_index_RT = np.full((R, T), TEXT, np.int32)
        pixel_RKHW3 = np.zeros((R, K, side, side, 3), np.uint8)
        for row, (token_T, index_T) in enumerate(expanded):
            token_RT[row, : len(token_T)] = token_T
            image_index_RT[row, : len(token_T)] = index_T
            for slot, picture in enumerate(pictures[row]):
                pixel_RKHW3[row, slot] = self._pixels(picture)
        segment_RT = (np.arange(T)[None] < length_R[:, None]).astype(np.int32)
        position_RT = np.broadcast_to(np.arange(T, dtype=np.int32), (R, T))
        zeros_RT = np.zeros((R, T), np.int32)
        batch = Batch(
            token_RT=token_RT,
            target_RT=zeros_RT,
            segment_RT=segment_RT,
            position_RT=position_RT * segment_RT,
            source_RT=zeros_RT,
            loss_weight_RT=np.zeros((R, T), np.float32),
            pixel_RKHW3=pixel_RKHW3,
            image_index_RT=image_index_RT,
        )
        return batch, length_R

    def _expanded(self, ids: list[int], num_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids with each placeholder as its picture's tokens, and which feature stands where."""
        placeholders = {tokenizer.IMAGE, self.about.tokens.image}
        ids = [tokenizer.IMAGE if id in placeholders else int(id) for id in ids]
        if not ids:
            raise ValueError("got no ids, expected at least one")
        if ids.count(tokenizer.IMAGE) != num_images:
            raise ValueError(
                f"got {ids.count(tokenizer.IMAGE)} image placeholders for {num_images} images, "
                "expected as many"
            )
        num_ids = self.about.config.language.num_ids
        wrong = [id for id in ids if not (0 <= id < num_ids or id == tokenizer.IMAGE)]
        if wrong:
            raise ValueError(
                f"got id {wrong[0]}, expected 0 to {num_ids - 1}, or {tokenizer.IMAGE} for an image"
            )
        mask = [False] * len(ids)
        token_T, _, index_T = tokenizer.expand(ids, mask, self.about.config.tokens_per_image)
        return token_T, index_T

    def _pixels(self, picture: Picture) -> np.ndarray:
        if self.about.image_mode == "anyres":
            raise ValueError("pictures in tiles (anyres) are not supported in generation yet")
        vision = self.about.config.vision
        red, green, blue = (int(255 * mean) for mean in vision.image_mean)
        processing = ImageProcessing(self.about.image_mode, vision.image_size, (red, green, blue))
        return processing.process(picture)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Llava, params: Params, batch: Batch) -> jax.Array:
    return model.logits(params, batch)


def _check_either(prompt: Any, ids: Any) -> None:
    if (prompt is None) is (ids is None):
        raise ValueError(
            f"got {'no prompt' if prompt is None else 'both prompt and ids'}, expected one of them"
        )


def _as_pictures(images: Any) -> list[Picture]:
    if isinstance(images, str | bytes | os.PathLike):
        raise ValueError(f"got images of type {type(images).__name__}, expected a list of them")
    return list(images or ())


def _as_ids(ids: Any) -> list[int]:
    if not all(isinstance(id, int | np.integer) for id in ids):
        raise ValueError(f"got ids {list(ids)[:3]}, expected a list of numbers")
    return [int(id) for id in ids]


def _by_prompt(prompts: Any, images: Sequence[Any]) -> tuple[list[str], list[list[Picture]]]:
    if not isinstance(prompts, Sequence):
        raise ValueError(f"got prompt {prompts!r}, expected a text or a list of texts")
    if not images:
        return list(prompts), [[] for _ in prompts]
    if len(images) != len(prompts) or not all(isinstance(own, (list, tuple)) for own in images):
        raise ValueError(
            f"got {len(prompts)} prompts and images for {len(images)}, expected a list of images "
            "for each prompt"
        )
    return list(prompts), [list(own) for own in images]
