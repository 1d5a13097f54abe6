"""The typed schema of a run: a ConfigDict in, frozen dataclasses out.

A file in configs/ holds `get_config(variant)`, which fills `defaults()` in; the command line
changes fields with --config.SECTION.FIELD=VALUE. What is misspelt or of another type is refused at
once.

>>> config = load("configs/stage2.py:v1.5-7b", {"batch.conversations": "64"})
"""

import argparse
import dataclasses
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from llava_jax import config_tree, files


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of conversations.

    path: LLaVA's JSON or JSONL, a folder with ScienceQA's problems.json, or one that prepare_data
    built; told apart by content. images: folders or zip files that image names are relative to.
    take: 'all', 'first:N', 'random:N' or 'fraction:0.25', of each epoch the same.
    epochs: how often one of the run shows what was taken. split, prompt: of ScienceQA.
    how: the commands that fetch it. size: of it, in conversations; for planning before it is there.
    """

    path: str
    images: tuple[str, ...] = ()
    take: str = "all"
    epochs: int = 1
    split: str = "train"
    prompt: str = "QCM-LEPA"
    builder: Literal["llava_pretrain", "llava_instruct", "science_qa"] = "llava_instruct"
    how: str = ""
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from, and how it becomes tokens and pixels. See conversation.Template.

    conversation_tokens: the longest one, its images counted; too_long: what becomes of others.
    max_bad_fraction: of refused conversations and broken pictures; more of them stop the run.
    prepared: where lengths are kept, so that a run starts at once.
    """

    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    template: str = "v1"
    start_end_tokens: bool = False
    text_restarts: bool = True
    image_at: Literal["first", "as_written", "random"] = "first"
    image_mode: Literal["crop", "pad"] = "pad"
    image_size: int = 336
    patch_size: int = 14
    conversation_tokens: int = 2048
    too_long: Literal["cut_turns", "cut_tokens", "drop"] = "cut_turns"
    max_bad_fraction: float = 0.01
    prepared: str = "data/prepared"
    threads: int = 8
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """conversations: of a step, on average where rows are packed. tokens, images: of a row.

    pack: several conversations a row, blind to each other. by_length: where they are not packed,
    steps of conversations of like length, with or without pictures, as the reference groups them.
    loss_groups: the loss is the mean of so many groups' means, each of as many rows; 1 = the mean
    over all that the step learns.
    """

    conversations: int = 128
    pack: bool = True
    tokens: int = 4096
    images: int = 12
    by_length: bool = False
    loss_groups: int = 1


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank factors beside the language model's matrices; rank 0 = none."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Model:
    """start: the model folder that training starts from. projector: where its projector comes from
    instead: stage 1's workdir, a model folder, or a file mm_projector.bin; '' = the folder's own.

    architecture: of `start`, as models.llava.released names it; for planning before it is there.
    select_layer: the vision tower's hidden state that is read, -1 its last; 0 = as the folder says.
    frozen_dtype: in memory, of what does not train. how, projector_how: the commands that
    make `start` and `projector`.
    """

    start: str = ""
    projector: str = ""
    architecture: str = ""
    select_layer: int = 0
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lora: Lora = Lora()
    how: str = ""
    projector_how: str = ""


# What trains, as patterns of whole parameter paths.
STAGE_1 = ("projector/.*",)
# v1's own words for a picture's ends learn with the projector; only as inputs.
STAGE_1_START_END = (*STAGE_1, "language/embed/added")
STAGE_2 = ("projector/.*", "language/.*")
LORA = ("projector/.*", "language/.*/lora_[ab]")


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW, its rate rising over warmup_ratio of the steps and then falling along a cosine.

    trains: STAGE_1 and its kind. projector_lr: 0 = lr. clip: the gradient's largest norm, 0 = any.
    """

    trains: tuple[str, ...] = ()
    lr: float = 2e-5
    projector_lr: float = 0.0
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the machine is used; the same training, whatever it says.

    data, fsdp, tensor: devices along each axis of the mesh; one of them may be 0: those that are
    left. fsdp (0,) follows a TPU's torus, one axis along each of its dimensions, and `data` is then
    at least the number of slices. gather: of sharded weights, see sharding.Layout; 'auto' is as the
    chip does it best (program.GATHER). dtype, remat, scan: see models.stack.Compute; attention:
    'auto' is splash on a TPU, else xla. parts: a step's rows are taken in so many, one after
    another. loss_pieces: of a row, for its logits. compiler: what it is told,
    'NAME=VALUE,NAME=VALUE'; 'auto' is program.COMPILER for the chip, '' nothing. cache: where
    compiled programs are kept; '' = nowhere.
    """

    data: int = 1
    fsdp: tuple[int, ...] = (0,)
    tensor: int = 1
    gather: Literal["auto", "explicit", "explicit by axis", "gspmd"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: str = "auto"
    remat: str = "full"
    scan: bool = True
    parts: int = 1
    loss_pieces: int = 1
    compiler: str = "auto"
    cache: str = "~/.cache/llava_jax/compiled"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """every: so many steps. keep: the last ones, and each of a step that keep_every divides."""

    every: int = 500
    keep: int = 2
    keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is not learned from: its loss, and greedy answers to its first questions, every so many
    steps and at the end. 0 = never."""

    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    every: int = 500
    answers: int = 4
    answer_tokens: int = 64


@dataclasses.dataclass(frozen=True)
class Log:
    """wandb: a project's name; '' = without. profile_at: the step whose trace is taken, with those
    after it; 0 = none."""

    tensorboard: bool = True
    wandb: str = ""
    profile_at: int = 0
    profile_steps: int = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Sections are documented at their classes.

    fidelity: 'paper' does as the reference does where we differ by choice: one conversation a row,
    and the loss the mean of its eight devices' means. export: the layout for PyTorch that the
    trained model is written in as well; '' = only ours.
    """

    name: str = "run"
    seed: int = 42
    epochs: int = 1
    fidelity: Literal["ours", "paper"] = "ours"
    data: Data = Data()
    batch: Batch = Batch()
    model: Model = Model()
    optim: Optim = Optim()
    compute: Compute = Compute()
    checkpoints: Checkpoints = Checkpoints()
    held_out: HeldOut = HeldOut()
    log: Log = Log()
    export: Literal["", "hf", "original", "peft"] = ""


# The reference's recipes are all for eight devices.
_REFERENCE_DEVICES = 8


def defaults() -> Any:
    """Every field with its default, a ConfigDict for a config file to fill in."""
    return _to_dict(Config())


def sources(**named: Source) -> ConfigDict:
    """For config.data.sources: the name of each is what tables and losses call it."""
    for name in named:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"got source name {name!r}, expected letters, digits and _")
    return ConfigDict({name: _to_dict(source) for name, source in named.items()})


def _to_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return ConfigDict(
            {field.name: _to_dict(getattr(value, field.name)) for field in fields},
            convert_dict=False,
        ).lock()
    return ConfigDict(value) if isinstance(value, Mapping) else value


def load(name: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of 'configs/stage2.py' or 'configs/stage2.py:variant', with fields changed."""
    tree = start_from(name)
    for key, text in (overrides or {}).items():
        config_tree.override(tree, key, text)
    return typed(tree)


def start_from(name: str) -> Any:
    """What a config file gives, for another one to change: start_from("configs/stage2.py:tiny")."""
    file, _, variant = name.partition(":")
    if not files.path(file).is_file():
        raise ValueError(f"got config {file}, expected a file such as configs/stage2.py")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise ValueError(f"got {file} without get_config(variant), expected a config file")
        return get_config(variant) if variant else get_config()
    except (AttributeError, KeyError, TypeError, ImportError, SyntaxError, NameError) as error:
        # What ml_collections says of a misspelt key goes on for pages; the end of it is this.
        if misspelt := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
            meant, got = misspelt.groups()
            raise ValueError(f"{file}: got unknown field {got}; did you mean {meant}?") from error
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error


def typed(tree: ConfigDict) -> Config:
    """The dataclasses of a filled-in ConfigDict."""
    config = config_tree.typed(Config, tree, "config")
    if config.export == "peft" and not config.model.lora.rank:
        raise ValueError(
            "got config.export = 'peft' without factors; expected a config.model.lora.rank above "
            "0, or 'hf', which has all weights"
        )
    if config.fidelity == "paper":
        batch = dataclasses.replace(config.batch, pack=False, loss_groups=_REFERENCE_DEVICES)
        config = dataclasses.replace(config, batch=batch)
    return config


def flat(config: Config) -> dict[str, Any]:
    """Every field's value by its path, 'optim.lr': what JSON keeps and people compare."""

    def fields(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for name, inside in value.items():
                yield from fields(f"{prefix}.{name}" if prefix else name, inside)
        else:
            yield prefix, value

    return dict(fields("", dataclasses.asdict(config)))


# What may change while a run goes on: where things are, how fast, what is told. Of the data its
# fingerprint tells more, and of the weights theirs.
_FREE = (
    "name",
    "data",
    *(f"model.{field}" for field in ("start", "projector", "architecture", "how", "projector_how")),
    *("compute", "checkpoints", "held_out", "log", "export"),
)


def deciding(config: Config) -> dict[str, Any]:
    """The fields that decide what is learned, by path."""
    kept = {
        path: value
        for path, value in flat(config).items()
        if not any(path == name or path.startswith(f"{name}.") for name in _FREE)
    }
    return {**kept, "compute.dtype": config.compute.dtype}


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """The options of a verb that runs a config: --config FILE[:VARIANT] --config.FIELD=VALUE …"""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="a file of configs/, and one of its variants; --config.SECTION.FIELD=VALUE, as often "
        f"as needed, changes a field. Sections: {', '.join(_sections())}. Their fields are told in "
        "llava_jax/config.py",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    changes = [argument for argument in given if argument.startswith("--config.")]
    options = parser.parse_args([argument for argument in given if argument not in changes])
    return options, load(options.config, parse_overrides(changes))


def _sections() -> list[str]:
    fields = dataclasses.fields(Config)
    return [field.name for field in fields if dataclasses.is_dataclass(field.default)]


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """{'optim.lr': '1e-5'} of ['--config.optim.lr=1e-5']."""
    found = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ValueError(f"got {argument}, expected --config.FIELD=VALUE")
        found[key] = value
    return found


def variants(choices: Mapping[str, Any], variant: str) -> Any:
    """choices[variant], or a sentence naming what there is."""
    if variant not in choices:
        raise ValueError(f"got variant {variant!r}, expected one of {', '.join(choices)}")
    return choices[variant]
