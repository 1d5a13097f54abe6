"""A training run in small, on disk: a config file, its data, and a model folder to start from."""

import dataclasses
from pathlib import Path

import numpy as np
from etils import epath

from llava_jax import model_folder
from llava_jax.model_folder import About, StoredModel
from llava_jax.weights.memory import stored_shapes
from llava_jax.weights.tensor import in_memory
from tests import tiny, tiny_tokenizer
from tests.data import small

CONFIG = """
from llava_jax import config as c

VARIANTS = {{"": ""}}

def get_config(variant=""):
    config = c.defaults()
    config.name = "small"
    config.epochs = {epochs}
    config.data.sources = c.sources(
        chats=c.Source("{folder}/chat.json", images=("{folder}/images",)),
        captions=c.Source("{folder}/chat.json", images=("{folder}/images",), take="random:8"),
    )
    config.held_out.sources = c.sources(
        chats=c.Source("{folder}/chat.json", images=("{folder}/images",), take="first:6"),
    )
    config.data.tokenizer = config.model.start = "{folder}/start"
    config.data.image_size, config.data.patch_size = 28, 14
    config.data.conversation_tokens = config.batch.tokens = 320
    config.batch.conversations, config.batch.images = 8, 6
    config.data.prepared = "{folder}/prepared"
    config.data.threads = 2
    config.model.frozen_dtype = config.compute.dtype = "float32"
    config.compute.cache = "{folder}/compiled"
    config.optim.trains = c.STAGE_2
    config.optim.lr = 1e-3
    config.checkpoints.every = 4
    config.held_out.every = 8
    config.held_out.answers = 2
    config.held_out.answer_tokens = 4
    config.log.tensorboard = False
    return config
"""
ARCHITECTURE = dataclasses.replace(
    tiny.CONFIG,
    vision=dataclasses.replace(tiny.CONFIG.vision, num_layers=3),
    language=dataclasses.replace(tiny.CONFIG.language, vocab_size=512),
)


def start_model(seed: int = 0) -> StoredModel:
    rng = np.random.default_rng(seed)
    leaves = {
        path: in_memory(
            (0.05 * rng.standard_normal(shape) + path.endswith("scale")).astype(np.float32), path
        )
        for path, shape in stored_shapes(ARCHITECTURE).items()
    }
    return StoredModel(About(ARCHITECTURE), leaves)


def write(folder: Path, epochs: int = 2) -> str:
    """Everything a run needs, in `folder`; its config file."""
    small.write(folder)
    tiny_tokenizer.write_tokenizer(folder / "words", ["<im_start>", "<im_end>"])
    start = dataclasses.replace(start_model(), tokenizer=epath.Path(folder / "words"))
    model_folder.save(start, epath.Path(folder / "start"))
    file = folder / "small.py"
    file.write_text(CONFIG.format(folder=folder, epochs=epochs))
    return str(file)
