"""Shows what a model would be trained on: a page, or one row in the terminal.

The page has, for each row: the pictures as the model sees them; every token, coloured by whether it
is learned, context, an image's or padding, conversation by conversation; ids on hover. On top: what
the mixture is made of, what was refused or repaired, and how lengths, turns, images and rows are
distributed. What is shown is read from the very batches that training reads.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from llava_jax import batch, cli, config, files
from llava_jax.data import report
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.pipeline import read_ahead
from llava_jax.data.schedule import Schedule, schedule
from llava_jax.data.showing import readable
from llava_jax.pages import inspection, rows, terminal

EXAMPLE = "python launch/inspect_data.py --config configs/stage2.py:v1.5-7b --n 8 --html rows.html"


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLE)
    parser.add_argument("--n", type=int, default=1, help="rows to show, from --step on (1)")
    parser.add_argument("--step", type=int, default=0, help="the first step to show rows of (0)")
    parser.add_argument("--html", metavar="FILE", help="write the page; else the terminal shows it")
    options, run = config.parse_arguments(parser)
    if options.n < 1:
        raise ValueError(f"got --n {options.n}, expected 1 or more")
    dataset = open_dataset(run, check=None)  # rows tell of their own pictures
    steps = schedule(dataset)
    steps.epoch(options.step)  # refuses one that does not exist
    shown = list(some_rows(dataset, steps, options.step, options.n))
    if options.html is not None:
        html = page(dataset, steps, shown, options.config)
        files.write_text(options.html, html)
        print(f"{len(shown)} rows in {options.html}")
        return
    width = shutil.get_terminal_size().columns
    for row in shown:
        print(terminal.show(row, colour=sys.stdout.isatty(), width=width), end="")


def some_rows(dataset: Dataset, steps: Schedule, start: int, count: int) -> Iterator[rows.Row]:
    """The first rows from a step on, without the empty ones at an epoch's end."""
    reads = read_ahead(dataset, steps, start=start)
    try:
        for read in reads:
            batch.validate(
                read.batch,
                tokens_per_image=dataset.renderer.tokens_per_image,
                image_size=dataset.image.size,
                vocab_size=dataset.renderer.tokenizer.num_ids,
            )
            for place, segments in enumerate(read.segments):
                if segments and count > 0:
                    yield readable(dataset, read, place, read.step * steps.rows_per_step + place)
                    count -= 1
            if count == 0:
                return
    finally:
        reads.close()


def page(dataset: Dataset, steps: Schedule, shown: Sequence[rows.Row], name: str) -> str:
    data, template = dataset.config.data, dataset.renderer.template
    options = [
        "start and end tokens around images" * template.start_end_tokens,
        "text restarts behind images" * template.text_restarts,
        f"images {template.image_at.replace('_', ' ')}",
    ]
    facts = {
        "config": name,
        "tokenizer": data.tokenizer,
        "template": ", ".join([data.template, *filter(None, options)]),
        "pictures": f"{data.image_mode} to {data.image_size} pixels, "
        f"{dataset.renderer.tokens_per_image} tokens each",
        "longest conversation": f"{data.conversation_tokens} tokens, then {data.too_long}",
        **dict(report.steps(dataset, steps)),
        "seed": dataset.config.seed,
    }
    refusals = [
        inspection.Refusal(f"{where}: {kind}", count, found.first[kind])
        for where, found in report.findings(dataset).items()
        for kind, count in found.count.most_common()
    ]
    return inspection.page(
        title=f"What {dataset.config.name} learns from",
        facts=facts,
        composition=inspection.Table(report.COMPOSITION, report.composition(dataset)),
        refusals=refusals,
        distributions=distributions(dataset, steps),
        rows=shown,
    )


def distributions(dataset: Dataset, steps: Schedule) -> inspection.Distributions:
    plan = steps.plans[0]
    tokens, learned, turns, pictures = (
        np.concatenate([getattr(mine, name)[mine.usable] for mine in dataset.lengths.values()])
        for name in ("tokens_N", "learned_N", "turns_N", "pictures_N")
    )
    filled = np.add.reduceat(dataset.tokens_N[plan.example_N].astype(np.int64), plan.start_R1[:-1])
    return inspection.Distributions(
        length_N=tokens,
        learned_share_N=learned / tokens,
        turns_N=turns,
        images_N=pictures,
        conversations_M=np.diff(plan.start_R1),
        fill_M=filled / dataset.config.batch.tokens,
    )


if __name__ == "__main__":
    cli.run(main)
