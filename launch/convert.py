"""Weights from and to PyTorch.

import   a llava-hf, original LLaVA, CLIP, LLaMA or Vicuna folder, a projector or a LoRA
         → a model folder of ours. What SRC lacks comes from --base: a CLIP folder for the tower,
         a LLaMA folder for the language model, or what a delta or a LoRA stands on.
export   a model folder, a training workdir, or any folder that can be imported → llava-hf's
         layout, which transformers, vLLM and others load, or the original LLaVA's; LoRA factors
         are merged. peft, original-peft: the factors and the projector alone, for peft on a
         llava-hf, or as the original LLaVA saves them.

What a folder is, is told by its content. Tensors pass one by one: no more than a few are ever in
memory. The destination appears when it is complete.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llava_jax import api, cli, conversation, files, model_folder
from llava_jax.model_folder import Report, StoredModel, is_model_folder
from llava_jax.weights import exporting, verification
from llava_jax.weights.adapter import ADAPTER_FORMATS
from llava_jax.weights.assembly import Choices


def main() -> None:
    args = _parse()
    run = {"import": _import, "export": _export}[args.verb]
    stored, report, checks = run(args, files.path(args.src), files.path(args.dst))
    print(_summary(stored, report, args.dst))
    if args.verify:
        try:
            for line in checks:
                print(f"verified: {line}")
        except ValueError as error:
            raise ValueError(
                f"{error}\n{args.dst} is written, and stays to be looked at"
            ) from error


# Each returns what it opened, what it wrote, and the checks of --verify, not yet made.
Done = tuple[StoredModel, Report, Iterator[str]]


def _import(args: argparse.Namespace, src: epath.Path, dst: epath.Path) -> Done:
    if args.thin and not (len(args.base) == 1 and is_model_folder(files.path(args.base[0]))):
        raise ValueError(
            f"got --thin with --base {args.base or 'missing'}: expected one model folder of ours; "
            "import the base first"
        )
    stored = _open(
        args,
        projector=args.projector,
        seed=args.seed,
        start_end_tokens=args.start_end_tokens,
        keep_lora=args.keep_lora or args.thin,  # merged factors are no longer apart from the base
    )
    base = None
    if args.thin:
        stored, base = model_folder.thin(stored, files.path(args.base[0]), dst)
    report = _with_progress(
        stored.nbytes,
        lambda on_bytes: model_folder.save(stored, dst, base=base, on_bytes=on_bytes),
    )
    return stored, report, verification.of_import(src, stored, report, dst)


def _export(args: argparse.Namespace, src: epath.Path, dst: epath.Path) -> Done:
    if args.projector_bin and args.format != "original":
        raise ValueError(
            f"got --projector_bin with --format {args.format}: expected --format original"
        )
    stored = _open(args, keep_lora=args.format in ADAPTER_FORMATS)
    report = _with_progress(
        exporting.exported_bytes(stored, args.format),
        lambda on_bytes: exporting.export(
            stored, dst, args.format, projector_bin=args.projector_bin, on_bytes=on_bytes
        ),
    )
    return stored, report, verification.of_export(stored, report, dst, args.format)


def _open(args: argparse.Namespace, **choices: Any) -> StoredModel:
    told = Choices(allow_pickle=args.allow_pickle, template=args.template, **choices)
    stored = api.open_stored(files.path(args.src), [files.path(base) for base in args.base], told)
    for note in stored.notes:
        print(f"note: {note}", file=sys.stderr)
    return stored


def _parse() -> argparse.Namespace:
    parser = cli.parser(
        __doc__,
        "python launch/convert.py import llava-v1.5-7b models/llava --base clip-vit-l-14-336",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import|export")
    importing = verbs.add_parser(
        "import",
        help="PyTorch's weights → a model folder",
        description="A folder of PyTorch's weights, a projector or a LoRA → a model folder.",
        epilog="examples:\n"
        "  python launch/convert.py import llava-1.5-7b-hf models/llava --verify\n"
        "  python launch/convert.py import vicuna-7b-v1.5 models/start --base clip-vit-l-14-336\n"
        "  python launch/convert.py import run/mm_projector.bin models/thin --base models/start "
        "--allow-pickle --thin",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exporting_ = verbs.add_parser(
        "export",
        help="a model folder → PyTorch's weights",
        description="A model folder, or a training workdir → llava-hf's or the original's layout, "
        "LoRA factors merged; or those factors and the projector alone (peft, original-peft).",
        epilog="examples:\n"
        "  python launch/convert.py export models/llava handed-back --format hf --verify\n"
        "  python launch/convert.py export runs/lora adapter --format peft",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for verb in (importing, exporting_):
        verb.add_argument("src", metavar="SRC", help="a folder, or a projector's file")
        verb.add_argument("dst", metavar="DST", help="a new folder; gs:// works")
        verb.add_argument(
            "--base",
            action="append",
            default=[],
            metavar="DIR",
            help="a folder with parts SRC lacks; may be given several times",
        )
        verb.add_argument(
            "--allow-pickle",
            "--allow_pickle",
            action="store_true",
            help="read .bin files, by torch's restricted unpickler",
        )
        verb.add_argument(
            "--template",
            choices=sorted(conversation.TEMPLATES),
            help="of the conversation; by default what SRC's files say, else v1",
        )
        verb.add_argument(
            "--verify",
            action="store_true",
            help="read everything again: names, shapes, dtypes, hashes; and logits against "
            "PyTorch, where it is installed (4 bytes of memory for each parameter)",
        )
    importing.add_argument(
        "--projector",
        default="mlp2x_gelu",
        metavar="KIND",
        help="of a stage-1 start, where it is drawn: linear or mlp2x_gelu (default)",
    )
    importing.add_argument(
        "--start_end_tokens",
        action="store_true",
        help="give a start <im_start> and <im_end>, which v1's stage 1 trains around a picture",
    )
    importing.add_argument("--seed", type=int, default=0, help="of that drawing (default 0)")
    importing.add_argument(
        "--keep_lora", action="store_true", help="keep a LoRA's factors; by default they are merged"
    )
    importing.add_argument(
        "--thin",
        action="store_true",
        help="write only what SRC holds, naming --base, a model folder, for the rest",
    )
    exporting_.add_argument(
        "--format",
        required=True,
        choices=exporting.FORMATS,
        help="hf and peft: of transformers; original and original-peft (needs torch): of LLaVA",
    )
    exporting_.add_argument(
        "--projector_bin",
        action="store_true",
        help="original only: write mm_projector.bin too (needs torch)",
    )
    return parser.parse_args()


def _with_progress(total: int, write: Callable[[Callable[[int], None]], Report]) -> Report:
    unit, size = ("MB", 10**6) if total >= 10**7 else ("kB", 10**3)
    with cli.Progress(total // size, "converting", unit) as progress:
        seen = 0

        def on_bytes(count: int) -> None:
            nonlocal seen
            progress.advance((seen + count) // size - seen // size)
            seen += count

        return write(on_bytes)


def _summary(stored: StoredModel, report: Report, dst: str) -> str:
    """A table of the parts, and what deserves a second look."""
    about = stored.about
    lines = [
        f"{dst}: {'LLaVA ' + about.variant if about.variant else 'a LLaVA of its own shape'}, "
        f"template {about.template}, pictures by {about.image_mode}",
        f"{'part':<16} {'tensors':>8} {'parameters':>15} {'GB':>7}  dtype",
    ]
    for part in ("vision", "projector", "row_end", "language"):
        own = [t for path, t in stored.leaves.items() if path.split("/")[0] == part]
        if own:
            count = sum(t.nbytes // t.dtype.itemsize for t in own)
            dtypes = ", ".join(sorted({t.dtype.name for t in own}))
            size = sum(t.nbytes for t in own) / 1e9
            lines.append(f"{part:<16} {len(own):>8} {count:>15,} {size:>7.2f}  {dtypes}")
    for path, count in report.not_finite.items():
        lines.append(f"note: {path} has {count} values that are NaN or infinite; kept")
    lines.append(f"fingerprint {report.fingerprint}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
