"""Ways through us: into a model folder, out of one, and what is in it."""

from pathlib import Path

from etils import epath

from llava_jax import model_folder
from llava_jax.model_folder import StoredModel
from llava_jax.weights import exporting
from llava_jax.weights.assembly import Choices, open_model
from tests.weights import checkpoints
from tests.weights.checkpoints import State


def imported(folder: Path, src: Path, *bases: Path, **choices) -> StoredModel:
    """What is read back from the model folder that importing `src` wrote."""
    opened = open_model(epath.Path(src), [epath.Path(b) for b in bases], Choices(**choices))
    model_folder.save(opened, epath.Path(folder))
    return model_folder.read(epath.Path(folder))


def exported(folder: Path, stored: StoredModel, format: str, **options) -> State:
    exporting.export(stored, epath.Path(folder), format, **options)
    return checkpoints.read(folder)


def leaves_of(stored: StoredModel) -> State:
    return {path: tensor.read() for path, tensor in stored.leaves.items()}
