"""A run on a TPU slice that is not there: does it fit, how fast is it, how long does it take.

What is compiled is the step that train.py runs, from shapes alone. Its figures are the compiler's
own and arithmetic on them (costs.py); no chip was asked.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from llava_jax import batch as batches
from llava_jax import files, flops, model_folder, optim
from llava_jax import program as programs
from llava_jax.config import Config
from llava_jax.data import mixture
from llava_jax.data.dataset import check_settings
from llava_jax.data.schedule import rows_of_a_step
from llava_jax.models.llava import LlavaConfig, released
from llava_jax.planner import compiling, costs, memory, scheduled
from llava_jax.planner.chips import CHIPS
from llava_jax.planner.compiling import DoesNotFit
from llava_jax.planner.topology import topology
from llava_jax.program import Program

# Assumed, as the data need not be there: tokens of a conversation beside its picture's, how many
# have one, and how much of packed rows is filled, short and long ones (docs/results.md, Data).
_TEXT = {"llava_pretrain": 30, "llava_instruct": 280, "science_qa": 300}
_PICTURES = {"llava_pretrain": 1.0, "llava_instruct": 0.94, "science_qa": 0.49}
_FILLED_SHORT, _FILLED_LONG = 0.9, 0.99


@dataclasses.dataclass(frozen=True)
class Plan:
    """bytes, FLOPs, cycles and seconds: a chip's, of a step. step_seconds: see costs.py.
    one_axis_seconds: the same, if what runs along one axis of the torus has that axis's links
    alone, and half of them where it is no ring. seconds_by_part add up to step_seconds.
    conversation_tokens: assumed, a picture's with them; filled: so much of the rows holds
    conversations, likewise. conversations: of a step; recipe_conversations: as the recipe has it,
    and recipe_rows the rows that they fill, before those are made a multiple of the chips. compute:
    the config's; versions: of what compiled."""

    config: str
    topology: str
    chips: int
    rows_per_chip: int
    row_tokens: int
    parameters: int
    trained_parameters: int
    weight_bytes: int
    optimizer_bytes: int
    peak_hbm_bytes: int
    hbm_bytes: int
    model_flops: float
    compiled_flops: float
    kernel_flops: Mapping[str, float]
    kernel_calls: Mapping[str, float]
    cycles: float
    seconds_by_part: Mapping[str, float]
    collective_bytes: Mapping[str, float]
    compute_seconds: float
    asynchronous_seconds: float
    synchronous_seconds: float
    step_seconds: float
    one_axis_seconds: float
    static_mfu: float
    conversation_tokens: int
    filled: float
    conversations: float
    recipe_conversations: int
    recipe_rows: float
    conversations_per_second: float
    tokens_per_second: float
    images_per_second: float
    steps: int
    hours: float
    compile_seconds: float
    compiled_before: bool
    compute: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def activation_bytes(self) -> int:
        return self.peak_hbm_bytes - self.weight_bytes - self.optimizer_bytes

    @property
    def chip_hours(self) -> float:
        return self.hours * self.chips


class TooLarge(DoesNotFit):
    """held: what the planner knows of its memory. rows: of a chip. conversations: of a step with
    one row a chip."""

    def __init__(self, found: DoesNotFit, held: memory.Held, rows: int, conversations: float):
        super().__init__(found.needed, found.limit, found.largest)
        self.held, self.rows, self.conversations = held, rows, conversations


def plan(
    config: Config,
    slice_name: str,
    *,
    rows_per_chip: int = 0,
    text_only: bool = False,
    folder: epath.Path,
    on_wait: Callable[[int], None] = lambda seconds: None,
) -> tuple[Plan, str]:
    """The plan, and the text of the scheduled program. rows_per_chip 0: as many as train.py takes
    for the recipe's batch. folder: where answers of the compiler are kept. on_wait: see
    compiling.compile_for."""
    target = topology(slice_name)
    check_settings(config)
    if config.compute.tensor != 1:
        raise ValueError(
            f"got config.compute.tensor = {config.compute.tensor}, expected 1: what the compiler "
            "thinks of tensor parallelism is far too slow to plan with (docs/results.md)"
        )
    architecture = _architecture(config)
    if text_only:
        config = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, trains=("language/.*",))
        )
    mean = _conversation_tokens(config, architecture)
    row_conversations = _row_conversations(config, mean)
    layout = programs.layout_of(config.compute, target.devices())
    if rows_per_chip:
        rows = target.chips * rows_per_chip
    else:
        multiple = layout.batch_parts * config.compute.parts
        rows = rows_of_a_step(config.batch, 1 / row_conversations, multiple)
    program = programs.program(config, architecture, layout, steps=1000, rows=rows)
    images = 0 if text_only else config.batch.images
    table = optim.parts(program.like.trainable, program.frozen_like)
    weights = sum(part.weight_bytes for part in table)
    moments = sum(part.moment_bytes for part in table)
    rows_per_chip = rows // target.chips
    try:
        compiled = compiling.compile_for(
            _lowered(program, config, rows, images), target, program.options, folder, on_wait
        )
    except DoesNotFit as too_much:
        held = memory.Held(weights, moments, architecture.language, config.batch.tokens)
        raise TooLarge(too_much, held, rows_per_chip, target.chips * row_conversations) from None

    chip = CHIPS[target.generation]
    chip = chip._replace(links=chip.links * max(1, target.axes) / len(target.grid))
    read = scheduled.read(compiled.text)
    cost = costs.of_program(read, chips_per_slice=target.chips // target.slices)
    seconds = cost.seconds(chip)
    # Other slots of a row are empty, and no work for the model's sake.
    row_images = min(images, row_conversations * _mean(config, _PICTURES))
    model_flops = _model_flops(config, architecture, rows_per_chip, row_images)
    conversations = _conversations(config)
    steps = math.ceil(conversations * config.epochs / (rows * row_conversations))
    return (
        Plan(
            config=config.name,
            topology=slice_name,
            chips=target.chips,
            rows_per_chip=rows_per_chip,
            row_tokens=config.batch.tokens,
            parameters=sum(part.parameters for part in table),
            trained_parameters=sum(part.parameters for part in table if part.trains),
            weight_bytes=weights,
            optimizer_bytes=moments,
            peak_hbm_bytes=compiled.peak,
            hbm_bytes=chip.hbm,
            model_flops=model_flops,
            compiled_flops=cost.matmul_flops,
            kernel_flops=cost.kernel_flops,
            kernel_calls=cost.kernel_calls,
            cycles=cost.all_cycles,
            seconds_by_part=cost.seconds_by_part(chip),
            collective_bytes=cost.bytes_by_kind(),
            compute_seconds=cost.compute_seconds(chip),
            asynchronous_seconds=cost.collective_seconds(chip, asynchronous=True),
            synchronous_seconds=cost.collective_seconds(chip, asynchronous=False),
            step_seconds=seconds,
            one_axis_seconds=cost.seconds(
                chip if target.closed else chip._replace(links=chip.links / 2),
                axes=max(1, target.axes),
            ),
            static_mfu=model_flops / seconds / chip.flops,
            conversation_tokens=mean,
            filled=row_conversations * mean / config.batch.tokens,
            conversations=rows * row_conversations,
            recipe_conversations=config.batch.conversations,
            recipe_rows=config.batch.conversations / row_conversations,
            conversations_per_second=rows * row_conversations / seconds,
            tokens_per_second=rows * row_conversations * mean / seconds,
            images_per_second=rows * row_images / seconds,
            steps=steps,
            hours=steps * seconds / 3600,
            compile_seconds=compiled.seconds,
            compiled_before=compiled.kept,
            compute=dataclasses.asdict(config.compute),
            versions=compiling.versions(),
        ),
        compiled.text,
    )


def _architecture(config: Config) -> LlavaConfig:
    folder = files.path(config.model.start)
    if config.model.start and model_folder.is_model_folder(folder):
        found = model_folder.read(folder).about.config
    elif config.model.architecture:
        found = released(config.model.architecture)
    else:
        raise ValueError(
            f"got {config.name}, whose model folder {config.model.start!r} is not here and whose "
            "config names no released architecture (config.model.architecture), expected either"
            + (f"; to make the folder:\n{config.model.how}" if config.model.how else "")
        )
    if config.model.select_layer:
        found = found.reading(config.model.select_layer)
    if config.model.lora.rank:
        lora = dataclasses.replace(found.language.lora, **dataclasses.asdict(config.model.lora))
        language = dataclasses.replace(found.language, lora=lora)
        found = dataclasses.replace(found, language=language)
    return found


def rows_of_a_chip(config: Config, slice_name: str) -> int:
    """Of the recipe's batch, all of them at once."""
    mean = _conversation_tokens(config, _architecture(config))
    chips = topology(slice_name).chips
    return rows_of_a_step(config.batch, 1 / _row_conversations(config, mean), chips) // chips


def _row_conversations(config: Config, mean: int) -> float:
    """As many as its tokens hold, or its slots for pictures."""
    if not config.batch.pack:
        return 1.0
    filled = _FILLED_LONG if config.batch.tokens >= 4 * mean else _FILLED_SHORT
    pictures = _mean(config, _PICTURES)
    slots = config.batch.images / pictures if pictures else math.inf
    return min(config.batch.tokens * filled / mean, slots)


def _conversation_tokens(config: Config, architecture: LlavaConfig) -> int:
    pictures = architecture.tokens_per_image * _mean(config, _PICTURES)
    return min(config.data.conversation_tokens, round(pictures + _mean(config, _TEXT)))


def _mean(config: Config, by_builder: Mapping[str, float]) -> float:
    sources = config.data.sources.values()
    total = sum(max(1, source.size) for source in sources)
    return sum(max(1, source.size) * by_builder[source.builder] for source in sources) / total


def _conversations(config: Config) -> int:
    """Of an epoch; 0 where a source's size is not known."""
    sources = config.data.sources
    if not all(source.size for source in sources.values()):
        return 0
    return sum(
        mixture.number_taken(source.take, source.size, name) * source.epochs
        for name, source in sources.items()
    )


def _lowered(program: Program, config: Config, rows: int, images: int) -> Any:
    layout = program.layout
    batch = batches.shape_batch(
        rows=rows, tokens=config.batch.tokens, images=images, image_size=config.data.image_size
    )
    placed = jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        batch,
        layout.batch_shardings(batch),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)
    return program.step.lower(program.like, program.frozen_like, placed, key)


def _model_flops(config: Config, architecture: LlavaConfig, rows: int, images: float) -> float:
    """Of a chip's rows, each full, and one causal triangle. images: of a row."""
    of = flops.costs(architecture, config.optim.trains)
    tokens = config.batch.tokens
    return of.step(tokens=rows * tokens, pairs=rows * tokens**2 / 2, images=rows * images)
