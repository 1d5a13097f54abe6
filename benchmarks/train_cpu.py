"""Stage 2 on a CPU: real tokens a second of our training step, beside transformers with torch.

The same model, conversations and cores, in turns (ours, theirs, ours, …) in one process. Both tune
the same parameters by AdamW, with clipping, over a frozen tower, in f32. Each side is tried in
several settings, and the best of either is compared: ours packs rows of several lengths; theirs
pads a batch to its longest conversation, in the data's order or grouped by length, with torch's
fused attention or the plain one. Tokens that are padding count for nobody; batches are in memory
before anything is timed. First of all the losses of one batch are compared.

Exit code 1 if the losses differ. The ratio is printed, and judged by whoever reads it.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from etils import epath

from llava_jax import allocator, cli, config, model_folder, program, starting
from llava_jax.batch import Batch
from llava_jax.config import Config
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.rows import read_row
from llava_jax.data.schedule import schedule
from llava_jax.picture_world import writing
from llava_jax.weights import exporting, memory
from llava_jax.weights.assembly import open_model

TOWERS = Path(__file__).resolve().parent.parent / "llava_jax/picture_world/towers"
ROW_TOKENS = (192, 256, 512)
_MOST_APART = 1e-4
_STEPS = 8  # of a round


class Way(NamedTuple):
    """run: so many steps; says how many real tokens they learned from."""

    name: str
    ours: bool
    run: Callable[[], int]


def main() -> int:
    args = _parse()
    _check_peer()
    allocator.keep_memory()  # as launch/train.py; what is kept serves either side
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="train-")))
        base = _prepare(folder, args.scenes)
        apart = _compare_losses(base, folder)
        print(f"loss of one batch: {apart:.1e} apart, relatively", flush=True)
        ways = [*_ours(base), *_theirs(base, folder)]
        rates = _measure(ways, args.rounds)
    _report(ways, rates)
    return 1 if apart > _MOST_APART else 0


def _parse() -> argparse.Namespace:
    parser = cli.parser(__doc__, "python benchmarks/train_cpu.py --rounds 5")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (5)")
    parser.add_argument("--scenes", type=int, default=400, help="pictures to learn from (400)")
    return parser.parse_args()


def _check_peer() -> None:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"needs {' and '.join(missing)}: run pip install 'llava-jax[dev]'")


def _prepare(folder: Path, scenes: int) -> Config:
    """The picture world, and its start as a model folder and as transformers'."""
    writing.write(folder / "world", scenes=scenes)
    stored = open_model(epath.Path(TOWERS / "llama"), [epath.Path(TOWERS / "clip")])
    model_folder.save(stored, epath.Path(folder / "start"))
    exporting.export(stored, epath.Path(folder / "hf"), "hf")
    loaded = config.load(
        "configs/stage2.py:tiny",
        {
            "model.start": str(folder / "start"),
            "model.projector": "",
            "data.tokenizer": str(folder / "start"),
            "data.prepared": str(folder / "prepared"),
            "data.sources.picture_world.path": str(folder / "world/llava_instruct.json"),
            "data.sources.picture_world.images": str(folder / "world"),
        },
    )
    return dataclasses.replace(loaded, held_out=config.HeldOut())


# Ours.


class Ours:
    """Steps over the first batches of an epoch, again and again."""

    def __init__(self, run: Config, steps: int = _STEPS):
        dataset = open_dataset(run, check=None)
        plan = schedule(dataset)
        start = starting.open_start(run, epath.Path("."))
        layout = program.layout_of(run.compute, jax.devices()[:1])
        rows = plan.rows_per_step
        self._program = program.program(run, start.about.config, layout, steps=10_000, rows=rows)
        local = list(range(rows))
        self._key = jax.random.key(0)
        self._frozen = memory.loaded(start.leaves, self._program.frozen_like)
        self._state = self._program.init(memory.loaded(start.leaves, self._program.like.trainable))
        self._batches, self._tokens = [], []
        reading = read_ahead(dataset, plan)
        for read, _ in zip(reading, range(steps), strict=False):
            self._tokens.append(int((read.batch.segment_RT > 0).sum()))
            self._batches.append(layout.placed(read.batch, local, rows))
        reading.close()

    def __call__(self) -> int:
        for batch in self._batches:
            self._state, _ = self._program.step(self._state, self._frozen, batch, self._key)
        jax.block_until_ready(self._state)
        return sum(self._tokens)


def _ours(base: Config) -> Iterator[Way]:
    for tokens in ROW_TOKENS:
        images = max(1, tokens // 48)
        batch = dataclasses.replace(base.batch, tokens=tokens, images=images)
        data = dataclasses.replace(base.data, conversation_tokens=tokens)
        run = dataclasses.replace(base, batch=batch, data=data)
        yield Way(f"packed rows of {tokens} tokens", True, Ours(run))


# Theirs.


class Conversation(NamedTuple):
    """One of a batch, alone: token_T, learns_T (of which a token is predicted), its pixels."""

    token_T: np.ndarray
    is_image_T: np.ndarray
    learned_T: np.ndarray
    pixel_HW3: np.ndarray | None


def _conversation(dataset: Dataset, index: int) -> Conversation:
    arrays = read_row(dataset, [index]).arrays
    length = int((arrays.segment_RT > 0).sum())
    has_image = bool((arrays.image_index_RT >= 0).any())
    learned_T = np.zeros(length, bool)
    learned_T[1:] = arrays.loss_weight_RT[: length - 1] > 0
    return Conversation(
        arrays.token_RT[:length],
        arrays.image_index_RT[:length] >= 0,
        learned_T,
        arrays.pixel_RKHW3[0] if has_image else None,
    )


class Theirs:
    """transformers' own model and loss, torch's own AdamW and clipping."""

    def __init__(
        self, hub: Path, attention: str, batches: Sequence[Sequence[Conversation]], lr: float
    ):
        import torch
        from transformers import LlavaForConditionalGeneration

        self._torch = torch
        self._model = LlavaForConditionalGeneration.from_pretrained(
            hub, dtype=torch.float32, attn_implementation=attention
        )
        self._model.train()
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_("vision_tower" not in name)
        self._learning = [p for p in self._model.parameters() if p.requires_grad]
        self._adam = torch.optim.AdamW(self._learning, lr=lr, weight_decay=0.0)
        self._image = self._model.config.image_token_id
        self._tokens = sum(len(one.token_T) for batch in batches for one in batch)
        self._batches = [self._padded(batch) for batch in batches]

    def _padded(self, batch: Sequence[Conversation]) -> dict[str, Any]:
        torch, longest = self._torch, max(len(one.token_T) for one in batch)
        ids = np.zeros((len(batch), longest), np.int64)
        labels = np.full_like(ids, -100)
        mask = np.zeros_like(ids)
        for row, one in enumerate(batch):
            length = len(one.token_T)
            ids[row, :length] = np.where(one.is_image_T, self._image, one.token_T)
            labels[row, :length] = np.where(one.learned_T, one.token_T, -100)
            mask[row, :length] = 1
        pixels = [one.pixel_HW3 for one in batch if one.pixel_HW3 is not None]
        mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
        std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
        values = (np.stack(pixels).astype(np.float32) / 255 - mean) / std
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
            "pixel_values": torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2))),
        }

    def loss(self) -> float:
        with self._torch.no_grad():
            return float(self._model(**self._batches[0]).loss)

    def __call__(self) -> int:
        for batch in self._batches:
            self._adam.zero_grad()
            self._model(**batch).loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self._learning, 1.0)
            self._adam.step()
        return self._tokens


def _theirs(base: Config, folder: Path) -> Iterator[Way]:
    dataset = open_dataset(base, check=None)
    size, rng = base.batch.conversations, np.random.default_rng(0)
    order_N = rng.permutation(len(dataset))[: _STEPS * size]
    by_length = order_N[np.argsort(dataset.tokens_N[order_N], kind="stable")]
    for how, chosen in (("", order_N), (", grouped by length", by_length)):
        conversations = [_conversation(dataset, int(index)) for index in chosen]
        batches = [conversations[i : i + size] for i in range(0, len(conversations), size)]
        for attention in ("sdpa", "eager"):
            yield Way(
                f"padded to the longest{how}, {attention}",
                False,
                Theirs(folder / "hf", attention, batches, base.optim.lr),
            )


def _compare_losses(base: Config, folder: Path) -> float:
    """Of the same conversations, before anything is learned."""
    dataset = open_dataset(base, check=None)
    chosen = [_conversation(dataset, index) for index in range(base.batch.conversations)]
    theirs = Theirs(folder / "hf", "eager", [chosen], base.optim.lr).loss()
    start = starting.open_start(base, epath.Path("."))
    layout = program.layout_of(base.compute, jax.devices()[:1])
    rows = [read_row(dataset, [index]).arrays for index in range(len(chosen))]
    batch = Batch._make(np.stack(arrays) for arrays in zip(*rows, strict=True))
    mine = program.program(base, start.about.config, layout, steps=10, rows=len(rows))
    trainable = memory.loaded(start.leaves, mine.like.trainable)
    frozen = memory.loaded(start.leaves, mine.frozen_like)
    sums = mine.measure(trainable, frozen, batch)
    ours = float(sums.loss / sums.weight)
    return abs(ours - theirs) / abs(theirs)


def _measure(ways: Sequence[Way], rounds: int) -> dict[str, list[float]]:
    """Real tokens a second of each way in each round; a first round warms up."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    with cli.Progress(len(ways) * (rounds + 1), "measuring", "turns") as progress:
        for turn in range(rounds + 1):
            for way in ways:
                begin = time.perf_counter()
                tokens = way.run()
                if turn:
                    rates[way.name].append(tokens / (time.perf_counter() - begin))
                progress.advance()
    return rates


def _report(ways: Sequence[Way], rates: dict[str, list[float]]) -> None:
    for way in ways:
        side, mine = "ours" if way.ours else "theirs", rates[way.name]
        print(
            f"{side:7} {way.name:48} {statistics.median(mine):8,.0f} real tokens/s "
            f"({min(mine):,.0f} to {max(mine):,.0f})"
        )
    best = {
        ours: [
            max(row) for row in zip(*(rates[w.name] for w in ways if w.ours is ours), strict=True)
        ]
        for ours in (True, False)
    }
    ratios = [mine / theirs for mine, theirs in zip(best[True], best[False], strict=True)]
    print(
        f"ours / theirs, the best of each round: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); 1.00 or more is wanted"
    )


if __name__ == "__main__":
    cli.run(main)
