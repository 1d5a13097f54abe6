"""Looks at all the data of a run before it is paid for, and keeps the lengths it counts.

Every conversation is rendered, every picture looked for. The report says what each source
contributes, what was refused or repaired and why (with the first examples by name), which pictures
are missing or unreadable, and how conversations fill rows. A run of the same config starts from
what is kept here; without it, it prepares first.

--build writes each JSON source, or ScienceQA's folder, as a TFDS data set in ArrayRecord shards,
pictures inside: a few large files instead of many small ones, the same entries, the same batches.
A set that was built of the same text is kept, its pictures as they were then: remove its folder to
build it again.
"""

from typing import TYPE_CHECKING

from llava_jax import cli, config
from llava_jax.data import report
from llava_jax.data.dataset import Dataset, open_dataset
from llava_jax.data.schedule import schedule

if TYPE_CHECKING:
    from llava_jax.data import tfds_builders

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
    if options.build is not None:
        from llava_jax.data import tfds_builders  # needs the extra [data]

        # The preparation may take hours.
        tfds_builders.check_target(run.data.sources, options.build)
    dataset = open_dataset(run, check=options.check)
    print(report.text(dataset, schedule(dataset)))
    if options.build is not None:
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
        how = ", built before of the same text: pictures are in it as they were then"
        print(f"kept {built.folder}{how}" if built.reused else f"built {built.folder}")
        print(_pictures(built))
        print(f"to read it: --config.data.sources.{name}.path={built.folder}")
        for left in built.unfinished:
            print(f"{left} is of a build that was killed: remove it if none runs")


def _pictures(built: "tfds_builders.Built") -> str:
    """Whether all are in it; if not, how many, the first of each kind, and how to mend it."""
    held = sum(report["pictures"] for report in built.report.values())
    lost = [item for report in built.report.values() for item in report["broken"].items()]
    if not lost:
        return f"all its {held} pictures are in it"
    count = sum(noted["count"] for _, noted in lost)
    lines = [f"{count} of its {held} pictures are not in it"]
    for kind, noted in lost:
        lines += [
            f"  {noted['count']} × picture {kind}",
            *(f"      {what}" for what in noted["first"]),
        ]
    if built.reused:
        lines.append(
            f"they are not looked for again until {built.folder} is removed and built again"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
