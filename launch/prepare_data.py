"""Looks at all the data of a run before it is paid for, and keeps the lengths it counts.

Every conversation is rendered, every picture looked for. The report says what each source
contributes, what was refused or repaired and why (with the first examples by name), which pictures
are missing or unreadable, and how conversations fill rows. A run of the same config starts from
what is kept here; without it, it prepares first.

--build writes each JSON source, or ScienceQA's folder, as a TFDS data set in ArrayRecord shards,
pictures inside: a few large files instead of many small ones, the same entries, the same batches.
"""

from llava_jax import cli, config
from llava_jax.data import report
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.schedule import schedule

EXAMPLE = "python launch/prepare_data.py --config configs/stage2.py:v1.5-7b --check open"


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--check",
        choices=("exist", "open"),
        default="exist",
        help="of pictures: whether they exist (default), or also whether their headers are sound",
    )
    parser.add_argument(
        "--build", metavar="DIR", help="write the sources as data sets of TFDS into this folder"
    )
    options, run = config.parse_arguments(parser)
    dataset = open_dataset(run, check=options.check)
    print(report.text(dataset, schedule(dataset)))
    if options.build:
        build_sources(dataset, options.build)


def build_sources(dataset: Dataset, folder: str) -> None:
    from llava_jax.data import tfds_builders  # needs the extra [data]

    for name, source in dataset.config.data.sources.items():
        with cli.Progress(len(dataset.sources[name]), f"building {name}", "conversations") as bar:
            built = tfds_builders.build(
                source.path,
                images=source.images,
                split=source.split,
                builder=source.builder,
                name=name,
                data_dir=folder,
                progress=lambda done, total: bar.advance(),
            )
        print(f"{'kept' if built.reused else 'built'} {built.folder}")
        print(f"to read it: --config.data.sources.{name}.path={built.folder}")
        for left in built.unfinished:
            print(f"{left} is of a build that was killed: remove it if none runs")


if __name__ == "__main__":
    cli.run(main)
