"""A training run in small, on disk: a config file, its data, and a model folder to start from."""

import collections
import contextlib
import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
from etils import epath

from llava_jax import metrics, model_folder
from llava_jax.model_folder import About, StoredModel
from llava_jax.weights import orbax_io
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
    config.data.conversation_tokens = config.batch.tokens = {tokens}
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


def write(folder: Path, epochs: int = 2, tokens: int = 320) -> str:
    """Everything a run needs, in `folder`; its config file."""
    small.write(folder)
    tiny_tokenizer.write_tokenizer(folder / "words", ["<im_start>", "<im_end>"])
    start = dataclasses.replace(start_model(), tokenizer=epath.Path(folder / "words"))
    model_folder.save(start, epath.Path(folder / "start"))
    file = folder / "small.py"
    file.write_text(CONFIG.format(folder=folder, epochs=epochs, tokens=tokens))
    return str(file)


def learned(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All leaves of a checkpoint, by default the last: what trains, and the optimizer's state."""
    folders = (workdir / "checkpoints").iterdir()
    folder = max(folders, key=lambda folder: int(folder.name))
    folder = folder if step is None else workdir / "checkpoints" / str(step)
    return {
        f"{item}/{path}": leaf.read()
        for item in ("trainable", "opt")
        for path, leaf in orbax_io.read(epath.Path(folder / item)).items()
    }


TIMES = ("seconds_step", "seconds_input", "tokens_per_s", "real_tokens_per_s", "images_per_s")


def told(workdir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step, but for how long it took."""
    steps = metrics.read(workdir).steps
    return [{name: v for name, v in step.items() if name not in TIMES} for step in steps]


def left(workdir: Path) -> set[str]:
    """The files of a workdir; of Orbax's, whose names are drawn, the folders."""
    found = {str(file.relative_to(workdir)) for file in workdir.rglob("*")}
    drawn = re.compile(r".*/(d|ocdbt\.process_\d+)/.+")
    return {name for name in found if not drawn.fullmatch(name)}


def check_same(workdir: Path, other: Path) -> None:
    """Two runs that learned the same to the bit, told the same of it, and left no more."""
    assert [step["step"] for step in told(workdir)] == list(range(len(told(other))))
    assert told(workdir) == told(other)
    mine, theirs = learned(workdir), learned(other)
    assert mine.keys() == theirs.keys()
    for name, leaf in mine.items():
        assert leaf.dtype == theirs[name].dtype
        assert leaf.tobytes() == theirs[name].tobytes(), name
    assert left(workdir) == left(other)


@contextlib.contextmanager
def compilations():
    """Counts by name which programs are compiled, or taken from the cache of compiled ones."""
    found, logger = collections.Counter(), logging.getLogger("jax._src.interpreters.pxla")

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("Compiling %s"):
                found[record.args[0]] += 1  # pyright: ignore

    handler = Counting()
    logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.removeHandler(handler)
