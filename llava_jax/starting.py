"""What a run starts from: the folder of its config, with stage 1's projector, with fresh LoRA
factors, read at the layer the config says. And what to fetch where something is missing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from llava_jax import api, files, model_folder, optim
from llava_jax.config import Config, Data, HeldOut, Model
from llava_jax.model_folder import About, Base, StoredModel
from llava_jax.models import stack
from llava_jax.models.lora import TARGETS, LoraConfig
from llava_jax.weights.adapter import with_lora
from llava_jax.weights.tensor import Tensor


class Start(NamedTuple):
    """about: what is trained, and how it will want to be spoken to. leaves: of it, unread.
    base: the folder, as checkpoints name it. notes: what a user should know of it."""

    about: About
    leaves: Mapping[str, Tensor]
    base: Base
    notes: tuple[str, ...] = ()


def check_present(config: Config) -> None:
    """Raises ValueError with all that must be fetched before this run can start, and how."""
    _check_values(config)
    if not config.model.start:
        raise ValueError("got no config.model.start, expected a model folder to start from")
    missing = [*_missing_model(config.model), *_missing_data(config.data, config.held_out)]
    if any("hf download" in line for line in missing):
        missing.append("\nhf is a command of: pip install huggingface_hub")
    if missing:
        raise ValueError("\n".join([f"{config.name} needs what is not here:", *missing]))


def _check_values(config: Config) -> None:
    """Those that would stop a run late, or not at all."""
    optim, batch, compute = config.optim, config.batch, config.compute
    least = {
        "seed": (config.seed, 0),
        "batch.loss_groups": (batch.loss_groups, 1),
        "compute.parts": (compute.parts, 1),
        "compute.loss_pieces": (compute.loss_pieces, 1),
        "checkpoints.every": (config.checkpoints.every, 1),
        "checkpoints.keep": (config.checkpoints.keep, 1),
        "checkpoints.keep_every": (config.checkpoints.keep_every, 0),
        "held_out.every": (config.held_out.every, 0),
        "held_out.answers": (config.held_out.answers, 0),
        "held_out.answer_tokens": (config.held_out.answer_tokens, 1),
        "optim.projector_lr": (optim.projector_lr, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "optim.clip": (optim.clip, 0),
        "log.profile_steps": (config.log.profile_steps, 1),
        "model.lora.rank": (config.model.lora.rank, 0),
    }
    for path, (value, smallest) in least.items():
        if not value >= smallest:
            raise ValueError(f"got config.{path} = {value}, expected {smallest} or more")
    lora = config.model.lora
    named = [
        ("compute.attention", compute.attention, ("auto", *stack.ATTENTION_BACKENDS)),
        ("compute.remat", compute.remat, stack.REMAT_POLICIES),
        *(("model.lora.targets", name, TARGETS) for name in lora.targets),
    ]
    for path, value, known in named:
        if value not in known:
            raise ValueError(f"got config.{path} = {value!r}, expected one of {', '.join(known)}")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"got config.model.lora.dropout = {lora.dropout}, expected 0 to below 1")
    if not 0 < optim.lr < math.inf:
        raise ValueError(f"got config.optim.lr = {optim.lr}, expected a number above 0")
    if not 0 <= optim.warmup_ratio <= 1:
        raise ValueError(f"got config.optim.warmup_ratio = {optim.warmup_ratio}, expected 0 to 1")
    if batch.tokens % compute.loss_pieces:
        raise ValueError(
            f"got config.compute.loss_pieces = {compute.loss_pieces} for rows of "
            f"config.batch.tokens = {batch.tokens}, expected a number that divides them"
        )


def _missing_model(model: Model) -> list[str]:
    lines = []
    if not files.path(model.start).exists():
        lines += [f"\n{model.start}  (config.model.start)", _indented(model.how)]
    if model.projector and not files.path(model.projector).exists():
        how = f"{model.projector_how}\nor start without one: --config.model.projector="
        lines += [f"\n{model.projector}  (config.model.projector)", _indented(how)]
    return lines


def _missing_data(data: Data, held_out: HeldOut) -> list[str]:
    found: dict[str, list[str]] = {}  # what some commands make, by the commands
    # A source may have the same name in both.
    for name, source in [*data.sources.items(), *held_out.sources.items()]:
        gone = [place for place in (source.path, *source.images) if not files.path(place).exists()]
        if gone:
            line = f"{', '.join(gone)}  (source {name})"
            found.setdefault(source.how, []).append(line)
    return ["\n".join(["", *dict.fromkeys(lines), _indented(how)]) for how, lines in found.items()]


def _indented(how: str) -> str:
    lines = how.strip().splitlines() or ["no command is known for it; see the config's docstring"]
    return "\n".join(f"    {line.strip()}" for line in lines)


def open_start(config: Config, workdir: epath.Path) -> Start:
    """The model that training begins with, its tensors unread."""
    settings = config.model
    folder = files.path(settings.start)
    if not model_folder.is_model_folder(folder):
        raise ValueError(
            f"got config.model.start = {folder}, which holds no {model_folder.DESCRIPTION}; "
            "expected a model folder: launch/convert.py import makes one of PyTorch's weights"
        )
    stored = model_folder.read(folder)
    notes = [*stored.notes]
    if settings.projector:
        trains = config.optim.trains
        stored = _with_projector(stored, files.path(settings.projector), folder, trains)
        notes.append(f"projector of {settings.projector}")
    if settings.lora.rank:
        lora = LoraConfig(**dataclasses.asdict(settings.lora))
        stored = with_lora(stored, lora, config.seed)
        notes.append(f"LoRA factors of rank {lora.rank}, those that are new drawn")
    about = _about(stored.about, config)
    return Start(about, stored.leaves, model_folder.base_for(workdir, folder), tuple(notes))


def _with_projector(
    stored: StoredModel, place: epath.Path, start: epath.Path, trains: Sequence[str]
) -> StoredModel:
    """With the projector that another run made over the same start, and what learned with it."""
    other = api.open_stored(place, () if model_folder.is_whole(place) else [start])
    mine, theirs = stored.about.config, other.about.config
    taken = [path for path in other.leaves if path.startswith("projector/")]
    # v1's rows for a picture's ends learn in stage 1, with the projector.
    rows = "language/embed/added"
    if mine.language.added_vocab and mine.language.added_vocab == theirs.language.added_vocab:
        if optim.trains(rows, trains):
            taken.append(rows)
        elif rows in other.own:
            # Neither the base's nor this run's, they would be in no checkpoint.
            raise ValueError(
                f"{place} brings rows for <im_start> and <im_end> with its projector; expected "
                f"{rows!r} among config.optim.trains, got {list(trains)}"
            )
    kept = {path: leaf for path, leaf in stored.leaves.items() if not path.startswith("projector/")}
    architecture = dataclasses.replace(mine, projector=theirs.projector)
    return dataclasses.replace(
        stored,
        about=dataclasses.replace(stored.about, config=architecture),
        leaves={**kept, **{path: other.leaves[path] for path in taken}},
    )


def check_vocabulary(start: Start, config: Config, num_ids: int) -> None:
    """num_ids: of the data's tokenizer."""
    if num_ids > start.about.config.language.num_ids:
        raise ValueError(
            f"got {num_ids} ids of the tokenizer {config.data.tokenizer} for a language model of "
            f"{start.about.config.language.num_ids} ({config.model.start}): expected no more"
        )


def _about(about: About, config: Config) -> About:
    """As it will be when it is trained: it reads the layer, and speaks as the data does."""
    data, architecture = config.data, about.config
    vision = architecture.vision
    if (data.image_size, data.patch_size) != (vision.image_size, vision.patch_size):
        raise ValueError(
            f"got pictures of {data.image_size} pixels in patches of {data.patch_size} "
            f"(config.data), for a vision tower that reads {vision.image_size} in patches of "
            f"{vision.patch_size} ({config.model.start}): expected the same"
        )
    if config.model.select_layer:
        architecture = architecture.reading(config.model.select_layer)
    # Captions alone ("plain") teach no way to talk: the model keeps its own.
    template = about.template if data.template == "plain" else data.template
    return dataclasses.replace(
        about,
        config=architecture,
        template=template,
        start_end_tokens=data.start_end_tokens,
        text_restarts=data.text_restarts,
        image_mode=data.image_mode,
    )
