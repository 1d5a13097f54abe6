"""One world written to disk, and what can be read in its pictures, for all tests of this folder."""

import json
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from llava_jax.picture_world.writing import write
from tests.picture_world import oracle


class World:
    """A written world, as another program would see it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reading = cache(self._reading)
        self.json = cache(self._json)

    def _json(self, name: str):
        return json.loads((self.folder / name).read_text())

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def _reading(self, image: str) -> oracle.Reading:
        with Image.open(self.folder / image) as picture:
            return oracle.read(picture)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pictures") / "world"
    write(folder, scenes=120)
    return World(folder)
