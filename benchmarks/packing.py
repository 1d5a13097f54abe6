"""How well, how fast and in how much memory the packing plan fills rows.

Compares ours with longest-first best fit in windows (as streaming packers do), one conversation a
row padded to the row, and steps of like length padded to the longest of the step or of a device,
whose shapes change from step to step: the reference deals a step out so that every device has as
many tokens, which leaves each some of the longest. Beside it stands a bound that no packing
can beat: prices of lengths under which no mixture that fits costs over a row, found by a linear
program of SciPy and checked by dynamic programming over every length.

Without --lengths it draws lengths like those of LLaVA-1.5's mixture. Exit code 1 if rows of 4,096
are less than 96 % full, or a plan takes over 60 s or 2 GiB.
"""

import argparse
import bisect
import dataclasses
import heapq
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from scipy import optimize, sparse

# This checkout's package, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_jax import cli
from llava_jax.data import packing

CHECKOUT = Path(__file__).resolve().parent.parent
LEAST_FILL = 0.96  # at rows of 4,096
MOST_SECONDS = 60
MOST_GIB = 2
TOKENS_OF_AN_IMAGE = 576
LONGEST = 2048
STEP = 128  # conversations of the reference's step
MICRO_BATCH = 16  # of them on one device
WINDOWS = (1_000, 10_000)  # conversations that a streaming packer sees at once
ROUNDS = 30  # of the bound's linear program, on each grid

# Runs in a process of its own, so that its peak of memory is the plan's.
_PLAN = """
import json, resource, sys, time
import numpy as np
from llava_jax.data import packing
stored = np.load(sys.argv[1])
start, cpu = time.monotonic(), time.process_time()
plan = packing.pack(
    stored["tokens"], stored["images"], row_tokens=int(sys.argv[2]), row_images=int(sys.argv[3]),
    seed=0, epoch=0,
)
seconds, cpu = time.monotonic() - start, time.process_time() - cpu
packing.save(plan, sys.argv[4])
kib = 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 2**20
print(json.dumps([seconds, cpu, peak]))
"""


@dataclasses.dataclass(frozen=True)
class Line:
    way: str
    rows: int
    fill: float
    held: str = ""
    cost: str = ""


def main() -> int:
    parser = cli.parser(__doc__, "python benchmarks/packing.py --number 20000")
    parser.add_argument("--lengths", help=".npz with text_tokens and images of each conversation")
    parser.add_argument("--number", type=int, default=665_298, help="how many to draw without")
    args = parser.parse_args()
    tokens, images = _lengths(args)
    print(
        f"{len(tokens):,} conversations, {int(tokens.sum()):,} tokens, {int(images.sum()):,} images"
        + ("" if args.lengths else " (drawn here, like those of LLaVA-1.5's mixture)")
    )
    problems = []
    for row_tokens, row_images in ((4096, 8), (4096, 4), (2048, 4)):
        print(f"\nrows of {row_tokens} tokens and {row_images} images")
        print(f"{'':<53} {'rows':>8} {'fill %':>7} {'held':>12}  cost")
        for line in _compare(tokens, images, row_tokens, row_images, problems):
            print(
                f"{line.way:<53} {line.rows:>8} {100 * line.fill:>7.2f} {line.held:>12}  "
                f"{line.cost}",
                flush=True,
            )
    print("\nheld: conversations of a row, fewest, mean and most")
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "all that was asked holds")
    return 1 if problems else 0


def _lengths(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    if args.lengths:
        with open(args.lengths, "rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError(f"got {args.lengths}, which is no .npz; expected one of lengths")
        stored = np.load(args.lengths)
        if missing := {"text_tokens", "images"} - set(stored):
            raise ValueError(
                f"got {args.lengths} without {', '.join(sorted(missing))}; expected both "
                "text_tokens and images, a number for each conversation"
            )
        text, images = stored["text_tokens"].astype(np.int64), stored["images"].astype(np.int64)
    else:
        rng = np.random.default_rng(0)
        images = (rng.random(args.number) >= 0.06).astype(np.int64)
        text = rng.lognormal(np.where(images, 5.25, 7.1), np.where(images, 0.55, 0.8))
        text = text.astype(np.int64) + 30
    return np.minimum(text + TOKENS_OF_AN_IMAGE * images, LONGEST), images


def _compare(
    tokens: np.ndarray, images: np.ndarray, row_tokens: int, row_images: int, problems: list[str]
) -> list[Line]:
    area = int(tokens.sum()) / row_tokens
    plan, seconds, cpu, peak = _planned(tokens, images, row_tokens, row_images)
    summary = packing.summary(plan, tokens, row_tokens)
    held = f"{summary.fewest} {summary.mean:.2f} {summary.most}"
    cost = f"{seconds:.1f} s ({cpu:.1f} s of CPU), {peak:.2f} GiB"
    lines = [Line("ours", len(plan), summary.fill, held, cost)]
    if (row_tokens, row_images) == (4096, 8) and summary.fill < LEAST_FILL:
        problems.append(f"{100 * summary.fill:.2f} % full, expected {100 * LEAST_FILL:.0f} %")
    if seconds > MOST_SECONDS or peak > MOST_GIB:
        problems.append(f"a plan took {cost}, expected {MOST_SECONDS} s and {MOST_GIB} GiB")

    fewest = max(_bound(tokens, row_tokens), -(-int(images.sum()) // row_images))
    lines.append(Line("no packing has fewer", fewest, area / fewest))
    for window in WINDOWS:
        rows = _best_fit_in_windows(tokens, images, row_tokens, row_images, window)
        lines.append(Line(f"best fit in windows of {window:,}", rows, area / rows))
    if row_tokens == LONGEST:
        order = packing.one_a_row(
            tokens, images, group_of=STEP, grouped=True, seed=0, epoch=0
        ).example_N
        dealt = np.concatenate(
            [_dealt(tokens[order[begin : begin + STEP]]) for begin in range(0, len(order), STEP)]
        )
        for way, together, of in (
            ("the row", 1, np.full(len(order), row_tokens)),
            ("the longest of the step", STEP, tokens[order]),
            ("that of a device, dealt evenly", MICRO_BATCH, dealt),
            ("that of a device, sorted", MICRO_BATCH, tokens[order]),
        ):
            padded = _padded_to_longest(of, together)
            lines.append(Line(f"one a row, padded to {way}", len(tokens), tokens.sum() / padded))
    return lines


def _planned(
    tokens: np.ndarray, images: np.ndarray, row_tokens: int, row_images: int
) -> tuple[packing.Plan, float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        lengths, file = Path(folder) / "lengths.npz", Path(folder) / "plan.npz"
        np.savez(lengths, tokens=tokens, images=images)
        done = subprocess.run(
            [sys.executable, "-c", _PLAN, lengths, str(row_tokens), str(row_images), file],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        plan = packing.load(file)
    for value, limit in ((tokens, row_tokens), (images, row_images)):
        most = np.add.reduceat(value[plan.example_N].astype(np.int64), plan.start_R1[:-1]).max()
        assert most <= limit, f"a row holds {most}, expected at most {limit}"
    return plan, *json.loads(done.stdout)


def _best_fit_in_windows(
    tokens: np.ndarray, images: np.ndarray, row_tokens: int, row_images: int, window: int
) -> int:
    """Rows of a packer that shuffles, then packs so many at a time, longest first."""
    order = np.random.default_rng(0).permutation(len(tokens))
    rows = 0
    for begin in range(0, len(order), window):
        some = order[begin : begin + window]
        some = some[np.argsort(-tokens[some], kind="stable")]
        begun: list[tuple[int, int]] = []  # what rows have left, by rising tokens
        for size, pictures in zip(tokens[some].tolist(), images[some].tolist(), strict=True):
            at = bisect.bisect_left(begun, (size, pictures))
            while at < len(begun) and begun[at][1] < pictures:
                at += 1
            if at < len(begun):
                room, free = begun.pop(at)
            else:
                room, free = row_tokens, row_images
                rows += 1
            bisect.insort(begun, (room - size, free - pictures))
    return rows


def _dealt(tokens: np.ndarray) -> np.ndarray:
    """A step as the reference spreads it: the next longest goes to the device with the least."""
    if len(tokens) < STEP:
        return tokens
    devices: list[list[int]] = [[] for _ in range(STEP // MICRO_BATCH)]
    waiting = [(0, number) for number in range(len(devices))]
    for size in tokens.tolist():
        held, number = heapq.heappop(waiting)
        devices[number].append(size)
        if len(devices[number]) < MICRO_BATCH:
            heapq.heappush(waiting, (held + size, number))
    return np.concatenate(devices)


def _padded_to_longest(tokens: np.ndarray, together: int) -> int:
    begin = np.arange(0, len(tokens), together)
    held = np.diff(np.append(begin, len(tokens)))
    return int((np.maximum.reduceat(tokens, begin) * held).sum())


# The bound.


def _bound(tokens: np.ndarray, row_tokens: int) -> int:
    """Rows that every packing has, images left out of account."""
    size_I, count_I = np.unique(tokens, return_counts=True)
    share_I = size_I / row_tokens
    guess = (size_I, share_I)
    for pieces in (64, 128, 256, 512, 1024):
        grain = row_tokens // pieces
        if grain == 0:
            break
        # Rounded down: what is too optimistic becomes less so from grid to grid.
        coarse_I, group_I = np.unique(np.maximum(size_I // grain, 1), return_inverse=True)
        price_I = np.interp(coarse_I * grain, *guess)
        count = np.bincount(group_I, weights=count_I)
        guess = (coarse_I * grain, _prices(coarse_I, count, pieces, price_I))
    return max(
        _proved(size_I, count_I, row_tokens, price_I)
        for price_I in (share_I, np.interp(size_I, *guess))
    )


def _proved(size_I: np.ndarray, count_I: np.ndarray, room: int, price_I: np.ndarray) -> int:
    """Whatever the prices: what all cost, over what the dearest row costs. In whole numbers."""
    whole_I = np.floor(price_I * 2**30).astype(np.int64)
    most = int(_dearest(size_I, whole_I, room)[0][-1])
    return -(-int((count_I * whole_I).sum()) // most)


def _prices(size_I: np.ndarray, count_I: np.ndarray, room: int, price_I: np.ndarray) -> np.ndarray:
    """Prices of the best bound that column generation finds in some rounds."""
    best_I, bound = price_I, 0.0
    patterns = {(kind,) * int(room // size) for kind, size in enumerate(size_I)}
    asked_I = price_I
    for _ in range(ROUNDS):
        worth, last = _dearest(size_I, asked_I, room)
        if (rows := float(count_I @ asked_I) / worth[-1]) > bound:
            best_I, bound = asked_I / worth[-1], rows
        for kind in range(len(size_I)):
            pattern, left = [kind], room - int(size_I[kind])
            while left > 0:
                if last[left] < 0:
                    left -= 1
                else:
                    pattern.append(int(last[left]))
                    left -= int(size_I[last[left]])
            patterns.add(tuple(sorted(pattern)))
        held = list(patterns)
        rows_of = np.concatenate([np.array(pattern) for pattern in held])
        columns = np.repeat(np.arange(len(held)), [len(pattern) for pattern in held])
        matrix = sparse.csc_array(
            (np.ones(len(rows_of)), (rows_of, columns)), shape=(len(size_I), len(held))
        )
        solved = optimize.linprog(np.ones(len(held)), A_ub=-matrix, b_ub=-count_I, method="highs")
        if solved.fun - bound < 0.5:
            break
        asked_I = 0.7 * best_I - 0.3 * solved.ineqlin.marginals
    return best_I


def _dearest(size_I: np.ndarray, price_I: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """What the dearest filling of any room costs, and a kind in it; −1: as with one token less."""
    worth, last = np.zeros(room + 1, price_I.dtype), np.full(room + 1, -1)
    fitting = np.searchsorted(size_I, np.arange(room + 1), side="right")
    for left in range(1, room + 1):
        worth[left] = worth[left - 1]
        if fits := fitting[left]:
            with_I = worth[left - size_I[:fits]] + price_I[:fits]
            kind = int(with_I.argmax())
            if with_I[kind] > worth[left]:
                worth[left], last[left] = with_I[kind], kind
    return worth, last


if __name__ == "__main__":
    cli.run(main)
