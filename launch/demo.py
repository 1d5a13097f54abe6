"""LLaVA in small, from nothing to a page to look at, in minutes on two cores.

Draws the picture world; puts a model together from the small towers that come with the package,
with a projector that has learned nothing; trains stage 1 and stage 2; asks about pictures that
neither has seen, and asks again with pictures that do not help; writes DIR/demo.html.

Interrupted and run again, it goes on where it was; what is done is not done again. Each step can be
run by hand: its command is printed, and stands on the page.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the other verbs

from launch import convert, train
from llava_jax import allocator, claiming, cli, demonstration, files
from llava_jax import config as configs
from llava_jax.demonstration import STAGES, Demonstration
from llava_jax.pages import demo as pages
from llava_jax.picture_world import __main__ as picture_world_verb
from llava_jax.picture_world import towers

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE = "python launch/demo.py --workdir demo"

_WORLD = "data/picture_world"  # where the configs look for it


@dataclasses.dataclass(frozen=True)
class Plan:
    """scenes: to train on. examined: scenes of each split that are asked about, 0 = all. clip,
    llama: the towers. changes: of both stages' configs."""

    scenes: int = 2000
    examined: int = 200
    clip: Path = dataclasses.field(default_factory=lambda: towers.path("clip"))
    llama: Path = dataclasses.field(default_factory=lambda: towers.path("llama"))
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """result: exists when it is done, and not before. run: gives an exit code."""

    name: str
    what: str
    command: str
    result: epath.Path
    run: Callable[[], int]


def main() -> int:
    parser = cli.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--workdir", default="demo", metavar="DIR", help="a new folder, or one to go on with (demo)"
    )
    workdir = parser.parse_args().workdir
    allocator.keep_memory()
    return demonstrate(workdir, Plan())


def demonstrate(workdir: str, plan: Plan) -> int:
    demo = Demo(workdir, plan)
    demo.claim()
    try:
        for task in demo.tasks():
            code = demo.do(task)
            if code:
                print(demo.going_on)
                return code
    except KeyboardInterrupt:
        print(demo.going_on)
        raise
    file = demo.folder / "demo.html"
    files.write_text(file, demonstration.page(demo.made, demo.steps()))
    print(f"\n{demonstration.summary(demo.made)}\n\nto look at: {file}")
    return 0


class Demo:
    """A demonstration in its folder. demo.json holds what it was begun with, and how long each
    task has taken so far."""

    def __init__(self, workdir: str, plan: Plan):
        self.plan, self.folder = plan, files.path(workdir)
        for tower in (plan.clip, plan.llama):
            if not (tower / "config.json").exists():
                raise ValueError(
                    f"got no tower in {tower}, expected one that comes with the package: install "
                    "it whole, or see `python -m llava_jax.picture_world.towers --help`"
                )
        self.changes = {name: self._changes(name) for name in STAGES}
        loaded = {
            name: configs.load(_config(name), configs.parse_overrides(changes))
            for name, changes in self.changes.items()
        }
        self.made = Demonstration(self.folder, loaded, plan.examined)
        again = ["python", _script("launch/demo.py"), "--workdir", workdir]
        self.going_on = f"to go on: {shlex.join(again)}"
        self._record = self.folder / "demo.json"
        self.seconds: dict[str, float] = {}

    def _changes(self, name: str) -> list[str]:
        """What makes a stage's config look into this folder."""
        config = configs.load(_config(name))
        found = []
        for section, sources in (
            ("data", config.data.sources),
            ("held_out", config.held_out.sources),
        ):
            for source, told in sources.items():
                at = f"--config.{section}.sources.{source}"
                found.append(f"{at}.path={self._moved(told.path)}")
                found.append(f"{at}.images={','.join(map(self._moved, told.images))}")
        start = self.folder / "start"
        found += [f"--config.model.start={start}", f"--config.data.tokenizer={start}"]
        if name == "stage2":
            found.append(f"--config.model.projector={self.folder / 'stage1' / 'model'}")
        found += [f"--config.data.prepared={self.folder / 'prepared'}"]
        return [*found, "--config.log.tensorboard=false", *self.plan.changes]

    def _moved(self, path: str) -> str:
        assert path.startswith(_WORLD), path
        return path.replace(_WORLD, str(self.folder / "world"), 1)

    def claim(self) -> None:
        """Makes a new folder this demonstration's, or refuses an old one that is another's."""
        began = self._settings()
        if self._record.exists():
            told = json.loads(self._record.read_text())
            if changed := claiming.differences(began, told["began"]):
                raise ValueError(
                    f"{self.folder} holds a demonstration with other settings; remove it, or "
                    "choose another --workdir:\n  " + "\n  ".join(changed)
                )
            self.seconds = told["seconds"]
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"got --workdir {self.folder}, which holds other files; expected a new folder, or "
                "a demonstration's"
            )
        self._keep(began)

    def _settings(self) -> dict[str, Any]:
        """All that decides what comes out."""
        found: dict[str, Any] = {"scenes": self.plan.scenes, "examined": self.plan.examined}
        found |= {"clip": _digest(self.plan.clip), "llama": _digest(self.plan.llama)}
        for name, config in self.made.configs.items():
            data = {path: value for path, value in configs.flat(config).items() if _decides(path)}
            for path, value in {**configs.deciding(config), **data}.items():
                found[f"{name}: {path}"] = value
        return found

    def _keep(self, began: Mapping[str, Any]) -> None:
        files.write_json(self._record, {"began": began, "seconds": self.seconds})

    def tasks(self) -> list[Task]:
        folder, plan = self.folder, self.plan
        world = ["--out", str(self.made.world), "--scenes", str(plan.scenes)]
        start = ["import", str(plan.llama), str(folder / "start"), "--base", str(plan.clip)]
        return [
            _verb(
                "picture world",
                "draws pictures of which everything is known, and writes conversations about them",
                self.made.world,
                picture_world_verb.main,
                ["-m", "llava_jax.picture_world", *world],
            ),
            _verb(
                "start",
                "a vision tower, a language model, and a projector that has learned nothing yet",
                folder / "start",
                convert.main,
                [_script("launch/convert.py"), *start],
            ),
            self._training("stage1", "the projector learns from captions"),
            self._training("stage2", "projector and language model learn from conversations"),
            Task(
                "answers",
                "asks about unseen pictures; asks again with another one, and with the mean of all",
                "",
                self.made.answers,
                self._examine,
            ),
        ]

    def _training(self, name: str, what: str) -> Task:
        workdir = self.folder / name
        words = ["--config", _config(name), "--workdir", str(workdir), *self.changes[name]]
        words = [_script("launch/train.py"), *words]
        return _verb(STAGES[name], what, workdir / "model", train.main, words)

    def _examine(self) -> int:
        demonstration.examine(self.made)
        return 0

    def steps(self) -> list[pages.Step]:
        """What was done, for the page."""
        return [
            pages.Step(task.name, task.what, task.command, self.seconds.get(task.name, 0.0))
            for task in self.tasks()
        ]

    def do(self, task: Task) -> int:
        if task.result.exists():
            print(f"{task.name}: done before, in {self._told(task)}")
            return 0
        print(f"\n{task.name}: {task.what}")
        if task.command:
            print(f"$ {task.command}")
        began = time.monotonic()
        try:
            code = task.run()
        finally:
            # Of a task that was interrupted, too: together they are its time.
            self.seconds[task.name] = self.seconds.get(task.name, 0) + time.monotonic() - began
            self._keep(self._settings())
        if not code:
            print(f"{task.name}: {self._told(task)}")
        return code

    def _told(self, task: Task) -> str:
        return pages.duration(self.seconds.get(task.name, 0))


def _verb(
    name: str, what: str, result: epath.Path, run: Callable[[], int | None], words: list[str]
) -> Task:
    """A task that a command line does."""

    def called() -> int:
        with _arguments(words):
            return run() or 0

    return Task(name, what, shlex.join(["python", *words]), result, called)


@contextlib.contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """The verb sees what it would have been given."""
    before, sys.argv = sys.argv, words[1:] if words[0] == "-m" else words
    try:
        yield
    finally:
        sys.argv = before


def _script(name: str) -> str:
    """A file of the checkout as one would type it."""
    file = CHECKOUT / name
    here = Path.cwd()
    return os.path.relpath(file, here) if file.is_relative_to(here) else str(file)


def _config(name: str) -> str:
    return f"{_script(f'configs/{name}.py')}:tiny"


def _decides(path: str) -> bool:
    """Of the data's fields: not where things are, nor how fast they are read."""
    section, _, field = path.rpartition(".")
    elsewhere = "path images how tokenizer prepared threads workers"
    return section.startswith("data") and field not in elsewhere.split()


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".model", ".json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
