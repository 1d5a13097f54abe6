"""Draws the picture world and writes it as a data set: pictures, captions, boxes, questions."""

import argparse

from llava_jax import cli, picture_world
from llava_jax.picture_world import writing


def main() -> None:
    args = _parse()
    written = writing.write(args.out, scenes=args.scenes, size=args.size, seed=args.seed)
    print(f"written to {args.out}:")
    for name, number, what in written:
        print(f"  {name:40} {number:7,}  {what}")


def _parse() -> argparse.Namespace:
    parser = cli.parser(
        picture_world.__doc__, "python -m llava_jax.picture_world --out /tmp/world --scenes 200"
    )
    parser.prog = "python -m llava_jax.picture_world"
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--scenes",
        type=int,
        default=2000,
        metavar="N",
        help="pictures to train on, 10 to 100,000 (2000)",
    )
    parser.add_argument(
        "--size", type=int, default=48, help="a picture's side in pixels, 32 to 1024 (48)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (0)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
