"""What a run does not learn from: the loss of it, and greedy answers to its first questions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from llava_jax.api import Model
from llava_jax.config import Config
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.examples import Question
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.schedule import Schedule, schedule
from llava_jax.engine import Engine
from llava_jax.model_folder import About
from llava_jax.optim import join
from llava_jax.program import Program
from llava_jax.step import State


class Asked(NamedTuple):
    """id: of the conversation. pictures: their names. pixels: of each, as the model sees it."""

    id: str
    question: Question
    pictures: tuple[str, ...]
    pixels: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Every process measures all of it together; they answer together, too."""

    config: Config
    dataset: Dataset
    schedule: Schedule
    asked: tuple[Asked, ...]

    def loss(self, program: Program, state: State, frozen: Any) -> dict[str, float]:
        """The mean over all that is learned of, and of each source."""
        rows = self.schedule.rows_per_step
        local = program.layout.local_rows(rows)
        total = None
        for read in read_ahead(self.dataset, self.schedule, places=local):
            placed = program.layout.placed(read.batch, local, rows)
            sums = jax.device_get(program.measure(state.trainable, frozen, placed))
            sums = jax.tree.map(np.float64, sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None
        by_source = total.loss_S / np.maximum(total.weight_S, 1)
        found = {"loss": float(total.loss / max(total.weight, 1.0))}
        if len(self.dataset.names) > 1:
            found |= {
                f"loss/{name}": float(by_source[i]) for i, name in enumerate(self.dataset.names)
            }
        return found

    def answers(self, program: Program, about: About, state: State, frozen: Any) -> list[str]:
        """What the model says to each of `asked`."""
        if not self.asked:
            return []
        # Outside a step's program weights are gathered by the partitioner.
        layout = dataclasses.replace(program.layout, explicit=False)
        placement = layout.placement(program.model.compute.dtype)
        compute = dataclasses.replace(program.model.compute, attention="xla", remat="none")
        tokenizer = self.dataset.renderer.tokenizer
        model = Model(
            about=dataclasses.replace(about, template=self.config.data.template),
            engine=Engine(dataclasses.replace(program.model, placement=placement, compute=compute)),
            params=join(state.trainable, frozen),
            tokenizer=tokenizer,
            layout=layout,
        )
        return model.answers(
            [asked.question.ids for asked in self.asked],
            [asked.pixels for asked in self.asked],
            self.config.held_out.answer_tokens,
        )


def open_held_out(config: Config, multiple: int) -> HeldOut | None:
    """None if the config holds nothing out. multiple: of rows, those of the mesh."""
    if not config.held_out.sources or not config.held_out.every:
        return None
    data = dataclasses.replace(config.data, sources=config.held_out.sources)
    config = dataclasses.replace(config, data=data, epochs=1)
    dataset = open_dataset(config)
    steps = schedule(dataset, multiple=multiple)
    chosen = range(min(config.held_out.answers, len(dataset)))
    return HeldOut(config, dataset, steps, tuple(_asked(dataset, index) for index in chosen))


def _asked(dataset: Dataset, index: int) -> Asked:
    name = dataset.names[dataset.source_N[index]]
    entry = dataset.sources[name][int(dataset.entry_N[index])]
    pixels = tuple(dataset.image.process(picture.read())[0] for picture in entry.pictures)
    return Asked(
        entry.id,
        dataset.renderer.question(entry),
        tuple(picture.name for picture in entry.pictures),
        pixels,
    )
