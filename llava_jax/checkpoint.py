"""A training run's checkpoints: what trained, apart from the base it trained on.

    WORKDIR/checkpoints/STEP/
        trainable/   the leaves that train, as they lie in memory
        opt/         the optimizer's state
        meta/        JSON: step, about (model_folder.About), base (model_folder.Base), …

Frozen weights are not in it: they are the base's, named by fingerprint.
"""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from llava_jax import files, model_folder
from llava_jax.model_folder import About, Base, StoredModel
from llava_jax.weights import orbax_io, settings
from llava_jax.weights.memory import stored_from_memory

CHECKPOINTS, TRAINABLE, META = "checkpoints", "trainable", "meta"


def is_workdir(folder: epath.Path) -> bool:
    return (folder / CHECKPOINTS).is_dir()


def read_model(
    workdir: epath.Path, base: epath.Path | None = None, step: int | None = None
) -> StoredModel:
    """The whole model at a step, by default the last: what trained, over its base."""
    steps = sorted(ocp.utils.checkpoint_steps(workdir / CHECKPOINTS))
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir}: got step {step}, expected one of {steps}"
            if steps
            else f"{workdir}: holds no finished checkpoint"
        )
    folder = workdir / CHECKPOINTS / str(steps[-1] if step is None else step)
    meta = _read_meta(folder / META)
    about = settings.from_json(About, meta.get("about"), f"{folder / META}, 'about'")
    named = settings.from_json(Base, meta.get("base"), f"{folder / META}, 'base'")
    under = model_folder.read_base(workdir, named, base)
    trained = stored_from_memory(about.config, orbax_io.read(folder / TRAINABLE))
    leaves = {**under.leaves, **trained}
    model_folder.check_leaves(leaves, model_folder.stored_shapes(about.config))
    digests = {path: digest for path, digest in under.digests.items() if path not in trained}
    return StoredModel(
        about,
        leaves,
        under.tokenizer,
        digests=digests,
        own=frozenset(trained),
        notes=(f"step {folder.name} of {workdir}: {len(trained)} tensors trained",),
    )


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    file = folder / "metadata"  # where Orbax puts an item of JSON
    if not file.exists():
        raise ValueError(f"{folder}: holds no {file.name}; expected a training checkpoint's")
    return settings.Settings.read(files.path(file)).values  # pyright: ignore[reportReturnType]
