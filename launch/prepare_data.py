"""Looks at all the data of a run before it is paid for, and keeps the lengths it counts.

Every conversation is rendered, every picture looked for. The report says what each source
contributes, what was refused or repaired and why (with the first examples by name), which pictures
are missing or unreadable, and how conversations fill rows. A run of the same config starts from
what is kept here; without it, it prepares first.

--build writes each JSON source, or ScienceQA's folder, as a TFDS data set in ArrayRecord shards,
pictures inside: a few large files instead of many small ones, the same entries, the same batches.
"""

from llava_jax import cli, config, files
from llava_jax.data import report
from llava_jax.data.dataset import open_dataset
from llava_jax.data.pipeline import schedule
from llava_jax.data.source import build

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
        build_sources(run, options.build)


def build_sources(run: config.Config, folder: str) -> None:
    for name, source in run.data.sources.items():
        built = build(
            source.path,
            images=source.images,
            split=source.split,
            builder=source.builder,
            name=name,
            data_dir=files.path(folder),
            progress=cli.Progress,
        )
        print(f"\n{built}")
        print(f"to read it: --config.data.sources.{name}.path={built.folder}")


if __name__ == "__main__":
    cli.run(main)
