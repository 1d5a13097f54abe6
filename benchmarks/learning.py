"""Whether it learns, at the tiny size: what both stages give, and what each of their parts does.

Trains stage 1 and stage 2 on the picture world, as `configs/stage1.py:tiny` and stage2.py:tiny say,
for each row and seed asked for, one run after another, and asks about scenes of the test split and
about unseen colour-shape pairs. A seed is that of the projector's drawing, of the order of the data
and of dropout; the world and the towers are the same for all. Rows:

    whole             both stages
    no stage 1        stage 2 from a projector that has learned nothing
    last layer        the tower's last hidden state in place of the one before
    linear            a linear projector in place of the MLP
    random tower      the vision tower's weights drawn anew; all else as it is
    no pictures       trained and asked with the mean of the training pictures in place of each: the
                      same tokens, conversations and steps, and nothing to see

The whole row is asked again with other pictures and with the mean one, and what training most often
answers stands beside it. Caption losses are of the test split's captions, before the first step of
stage 1 and after its last. Runs that are finished are kept in --out and not made again; one that
was interrupted goes on. The table is of all that --out holds.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llava_jax
from llava_jax import claiming, cli, config, files, held_out, metrics, model_folder, starting
from llava_jax import program as programs
from llava_jax.config import Config
from llava_jax.evals import picture_world as exam
from llava_jax.models.llava import Llava
from llava_jax.picture_world import towers
from llava_jax.picture_world.writing import write
from llava_jax.sharding import leaf_paths
from llava_jax.weights import memory
from llava_jax.weights.tensor import in_memory

CHECKOUT = Path(__file__).resolve().parent.parent
WHOLE, BLIND = "whole", "no pictures"
# Of each row: changes of both stages' configs.
ROWS: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "no stage 1": (),
    "last layer": ("--config.model.select_layer=-1",),
    "linear": (),
    "random tower": (),
    BLIND: (),
}
SPLITS = ("test", "unseen_pairs")
WORLD = Path("data/picture_world")  # where the configs look for it


@dataclasses.dataclass(frozen=True)
class Run:
    """place: the folder that the configs' names are relative to."""

    row: str
    seed: int
    work: Path
    changes: tuple[str, ...]

    @property
    def place(self) -> Path:
        return self.work / ("blind" if self.row == BLIND else ".")

    @property
    def folder(self) -> Path:
        return self.work / f"{self.row.replace(' ', '-')}-{self.seed}"


def main() -> None:
    args = _parse()
    out, work = Path(args.out).resolve(), Path(args.work).resolve()
    changes = tuple(f"--config.{change}" for change in args.change)
    began = _settings(args.scenes, changes)
    told = json.loads(out.read_text()) if out.exists() else {"settings": began, "runs": []}
    if changed := claiming.differences(began, told["settings"]):
        raise ValueError(
            f"{out} holds runs with other settings; expected another --out and another --work:\n  "
            + "\n  ".join(changed)
        )
    _make_worlds(work, args.scenes)
    done = {(run["row"], run["seed"]) for run in told["runs"]}
    for seed in args.seeds:
        for row in args.rows:
            if (row, seed) in done:
                continue
            print(f"{row}, seed {seed}", file=sys.stderr)
            told["runs"].append(_measure(Run(row, seed, work, changes), args.examined))
            files.write_json(out, told)
    print(table(told["runs"]))


def _parse() -> argparse.Namespace:
    parser = cli.parser(
        __doc__, "python benchmarks/learning.py --rows whole linear --seeds 0 --out learning.json"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--out", default="learning.json", metavar="FILE")
    parser.add_argument("--work", default="workdir-learning", metavar="DIR", help="of all runs")
    parser.add_argument("--scenes", type=int, default=2000, help="to train on (2000)")
    parser.add_argument(
        "--examined", type=int, default=0, help="scenes of each split to ask about; 0 = all"
    )
    parser.add_argument(
        "--change", nargs="+", default=[], metavar="FIELD=VALUE", help="of both configs"
    )
    return parser.parse_args()


def _config(stage: str) -> str:
    return f"{CHECKOUT / 'configs' / stage}.py:tiny"


def _settings(scenes: int, changes: Sequence[str]) -> dict[str, Any]:
    """What all runs of a file share."""
    found: dict[str, Any] = {"scenes": scenes}
    for tower in ("clip", "llama"):
        found[tower] = json.loads((towers.path(tower) / "training.json").read_text())["sha256"]
    for stage in ("stage1", "stage2"):
        loaded = config.load(_config(stage), config.parse_overrides(changes))
        found |= {f"{stage}: {name}": value for name, value in config.deciding(loaded).items()}
    return found


def _make_worlds(work: Path, scenes: int) -> None:
    """The picture world; and the same conversations about pictures that are all the mean one."""
    world, blind = work / WORLD, work / "blind" / WORLD
    if not world.exists():
        write(world, scenes=scenes)
    if not blind.exists():
        mean = exam.mean_picture(sorted(epath.Path(world / "train").iterdir()))
        with files.fresh_folder(blind) as folder:
            for file in world.glob("*.json"):
                (folder / file.name).write_bytes(file.read_bytes())
            for split in ("train", "dev", "test"):
                (folder / split).mkdir()
                for picture in (world / split).iterdir():
                    (folder / split / picture.name).write_bytes(mean)


# One run.


def _measure(run: Run, examined: int) -> dict[str, Any]:
    found: dict[str, Any] = {"row": run.row, "seed": run.seed, "seconds": {}}
    _make_start(run)
    changes = _changes(run)
    if run.row != "no stage 1":
        found["caption loss before"] = _caption_loss(run, changes["stage1"])
        found["seconds"]["stage 1"] = _train(run, "stage1", changes["stage1"])
        events = metrics.read(run.folder / "stage1").events
        losses = [float(event["loss"]) for event in events if event["kind"] == "held_out"]
        found["caption loss after"] = losses[-1]
    found["seconds"]["stage 2"] = _train(run, "stage2", changes["stage2"])
    found["scores"] = _scores(run, examined)
    return found


def _changes(run: Run) -> dict[str, list[str]]:
    """What this run's stages differ in from their configs."""
    start = run.folder / "start"
    common = [
        f"--config.model.start={start}",
        f"--config.data.tokenizer={start}",
        f"--config.seed={run.seed}",
        "--config.log.tensorboard=false",
        *ROWS[run.row],
        *run.changes,
    ]
    captions = WORLD / "llava_pretrain_test.json"
    projector = "" if run.row == "no stage 1" else run.folder / "stage1" / "model"
    return {
        "stage1": [*common, f"--config.held_out.sources.captions.path={captions}"],
        "stage2": [*common, f"--config.model.projector={projector}"],
    }


def _make_start(run: Run) -> None:
    start = run.folder / "start"
    if start.exists():
        return
    projector = "linear" if run.row == "linear" else "mlp2x_gelu"
    made = run.folder / "imported" if run.row == "random tower" else start
    if not made.exists():
        words = ["import", towers.path("llama"), made, "--base", towers.path("clip")]
        _call(run, "convert", [*words, "--projector", projector, "--seed", run.seed])
    if made != start:
        _draw_tower(made, start, run.seed)


def _draw_tower(made: Path, start: Path, seed: int) -> None:
    """The folder with the vision tower that runs drawn anew, as a tower begins."""
    stored = model_folder.read(epath.Path(made))
    architecture = stored.about.config
    params = {"vision": jax.jit(Llava(architecture).init)(jax.random.key(seed))["vision"]}
    paths = jax.tree.leaves(leaf_paths(params))
    tree = {
        path: in_memory(np.asarray(leaf), path)
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
    }
    drawn = memory.stored_from_memory(architecture, tree)
    assert drawn.keys() <= stored.leaves.keys()
    model_folder.save(
        dataclasses.replace(stored, leaves={**stored.leaves, **drawn}), epath.Path(start)
    )


def _train(run: Run, stage: str, changes: Sequence[str]) -> float:
    """Seconds of the whole command, of earlier sittings too."""
    kept = run.folder / f"{stage}-seconds.json"
    before = json.loads(kept.read_text()) if kept.exists() else 0.0
    if (run.folder / stage / "model").exists():
        return before
    began = time.monotonic()
    try:
        workdir = run.folder / stage
        _call(run, "train", ["--config", _config(stage), "--workdir", workdir, *changes])
    finally:
        files.write_json(kept, before + time.monotonic() - began)
    return json.loads(kept.read_text())


def _call(run: Run, verb: str, words: Sequence[object]) -> None:
    command = [sys.executable, CHECKOUT / "launch" / f"{verb}.py", *words]
    log = run.folder / f"{verb}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run(
            list(map(str, command)), cwd=run.place, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code:
        raise ValueError(f"launch/{verb}.py ended with {code}, expected 0; its output is in {log}")


def _caption_loss(run: Run, changes: Sequence[str]) -> float:
    """Of the held-out captions, before anything is learned."""
    with contextlib.chdir(run.place):
        told: Config = config.load(_config("stage1"), config.parse_overrides(changes))
        layout = programs.layout_of(told.compute, jax.devices())
        examined = held_out.open_held_out(told, layout.batch_parts)
        assert examined, told.held_out
        start = starting.open_start(told, epath.Path(run.folder))
        rows = examined.schedule.rows_per_step
        program = programs.program(told, start.about.config, layout, steps=1, rows=rows)
        load = functools.partial(memory.loaded, start.leaves)
        state = program.init(load(program.like.trainable))
        return examined.loss(program, state, load(program.frozen_like))["loss"]


def _scores(run: Run, examined: int) -> dict[str, dict[str, exam.Score]]:
    model = llava_jax.load(run.folder / "stage2" / "model")
    world = run.work / WORLD

    def generate(prompts: list[str], images: list[list[Any]]) -> list[str]:
        return model.generate(prompts, images, max_new_tokens=exam.ANSWER_TOKENS)

    found = {}
    for split in SPLITS:
        questions = exam.read(world, split, examined)
        if run.row == WHOLE:
            said = exam.examine(world, questions, generate)
        elif run.row == BLIND:
            mean = exam.mean_picture(sorted(epath.Path(world / "train").iterdir()))
            said = {exam.MODEL: exam.ask(questions, [mean] * len(questions), generate)}
        else:
            pictures = [str(world / question.scene) for question in questions]
            said = {exam.MODEL: exam.ask(questions, pictures, generate)}
        found[split] = {row: exam.score(questions, answers) for row, answers in said.items()}
    return found


# The table.


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: shares in %, the mean over seeds and their range."""
    groups = [(split, group) for split in SPLITS for group in exam.GROUPS]
    head = [
        "row",
        "seeds",
        *(f"{split}, {group}" for split, group in groups),
        "caption loss before",
        "after",
        "stage 1, s",
        "stage 2, s",
    ]
    rows = [
        [
            name,
            str(len(own)),
            *(_over(_shares(own, asked, split, group), "{:.1f}") for split, group in groups),
            *(
                _over([run[key] for run in own if key in run], "{:.3f}")
                for key in ("caption loss before", "caption loss after")
            ),
            *(
                _over([run["seconds"][key] for run in own if key in run["seconds"]], "{:.0f}")
                for key in ("stage 1", "stage 2")
            ),
        ]
        for name, asked, own in _lines(runs)
    ]
    whole = [run for run in runs if run["row"] == WHOLE]
    blind = [run for run in runs if run["row"] == BLIND]
    return "\n\n".join([_markdown(head, rows), *(_by_category(whole, blind) if whole else [])])


def _lines(
    runs: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """Name, whose answers, runs: of each row, and below the whole its blind ones."""
    for row in ROWS:
        own = [run for run in runs if run["row"] == row]
        if own:
            yield row, exam.MODEL, own
        if own and row == WHOLE:
            for asked in exam.ROWS[1:]:
                # Of the same training: its times and losses are told once.
                yield (
                    f"whole, {asked}",
                    asked,
                    [{"scores": run["scores"], "seconds": {}} for run in own],
                )


def _shares(runs: Sequence[Mapping[str, Any]], asked: str, split: str, name: str) -> list[float]:
    scores = [run["scores"][split][asked] for run in runs]
    return [100 * score[name][0] / score[name][1] for score in scores if name in score]


def _over(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    told = form.format(statistics.mean(values))
    if len(values) > 1:
        told += f" ({form.format(min(values))}–{form.format(max(values))})"
    return told


def _by_category(
    whole: Sequence[Mapping[str, Any]], blind: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    for split in SPLITS:
        scored = whole[0]["scores"][split][exam.MODEL]
        names = [name for group in exam.GROUPS.items() for name in (group[0], *group[1])]
        rows = [
            [
                name,
                str(scored[name][1]),
                *(_over(_shares(whole, row, split, name), "{:.1f}") for row in exam.ROWS),
                _over(_shares(blind, exam.MODEL, split, name), "{:.1f}"),
                f"{100 * scored[name][2]:.1f}",
            ]
            for name in names
            if name in scored
        ]
        head = [split, "questions", *exam.ROWS, BLIND, "standard error, one seed"]
        yield _markdown(head, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
