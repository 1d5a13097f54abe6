"""Where pictures lie: folders and zip files, looked up in order by the names that data gives.

A name is data from elsewhere: it may not lead out of a root. That is told from the name alone,
before any file is looked for.
"""

import dataclasses
import os
import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from llava_jax import files
from llava_jax.conversation import Refused
from llava_jax.data import storage

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_DRIVE = re.compile(r"[A-Za-z]:")


# Roots of images as they are asked for; one is as good as a list of one.
Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def place_of(name: str) -> str:
    """A picture's name, told to be inside its root. Refused: what leads elsewhere, or nowhere."""
    parts = name.split("/")
    if not name or "\0" in name or not is_text(name):
        raise Refused("image is not a name", f"got image {name!r}, expected the name of a file")
    if name[0] == "/" or ".." in parts or "\\" in name or "://" in name or _DRIVE.match(name):
        raise Refused(
            "image path outside its root",
            f"got image {name!r}, expected a name relative to a root of images, with / between "
            "folders and no ..",
        )
    if inside := [part for part in parts if part not in ("", ".")]:
        return "/".join(inside)
    raise Refused("image is not a name", f"got image {name!r}, expected the name of a file")


def is_text(text: str) -> bool:
    """Whether it can be written at all."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, by \ud800 in JSON
        return False
    return True


class _Root(Protocol):
    @property
    def path(self) -> str: ...

    def read(self, place: str) -> bytes:
        """FileNotFoundError: another root may have it."""
        ...

    def listing(self, folder: str) -> Mapping[str, bool]: ...


class Roots:
    """Folders and zip files of pictures, in the order in which a name is looked up."""

    def __init__(self, images: Images = ()):
        self._roots = tuple(map(_open_root, root_paths(images)))
        self._forget()

    def _forget(self) -> None:
        self._listings: dict[tuple[int, str], Mapping[str, bool]] = {}
        self._by_stem: dict[tuple[int, str], Mapping[str, list[str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_roots": self._roots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self._roots)

    def __str__(self) -> str:
        return ", ".join(root.path for root in self._roots) or "no root of images"

    def picture(self, name: str, *places: str) -> "RootedPicture":
        """places: where to look instead of at its name; the first that is there counts."""
        return RootedPicture(name, tuple(map(place_of, places or (name,))), self)

    def exists(self, name: str) -> bool:
        """By listings of folders, each made once: what came later is not seen."""
        return any(
            self._listing(number, folder).get(file, False)
            for number, folder, file in self._look(place_of(name))
        )

    def nearest(self, name: str) -> str | None:
        """A picture in the same folder whose name differs in its extension or in its case."""
        for number, folder, file in self._look(place_of(name)):
            stem = os.path.splitext(file)[0].lower()
            for found in self._stems(number, folder).get(stem, ()):
                if found != file:
                    return f"{folder}/{found}" if folder else found
        return None

    def _look(self, place: str) -> list[tuple[int, str, str]]:
        folder, _, file = place.rpartition("/")
        return [(number, folder, file) for number in range(len(self._roots))]

    def _listing(self, number: int, folder: str) -> Mapping[str, bool]:
        key = number, folder
        if key not in self._listings:
            self._listings[key] = self._roots[number].listing(folder)
        return self._listings[key]

    def _stems(self, number: int, folder: str) -> Mapping[str, list[str]]:
        key = number, folder
        if key not in self._by_stem:
            stems: dict[str, list[str]] = {}
            for file, is_file in sorted(self._listing(number, folder).items()):
                stem, suffix = os.path.splitext(file)
                if is_file and suffix.lower() in _SUFFIXES:
                    stems.setdefault(stem.lower(), []).append(file)
            self._by_stem[key] = stems
        return self._by_stem[key]

    def read(self, name: str, places: Sequence[str]) -> bytes:
        folder: IsADirectoryError | None = None
        for place in places:
            for root in self._roots:
                try:
                    return root.read(place)
                except FileNotFoundError:
                    pass
                except IsADirectoryError as error:  # another root may have a file of that name
                    folder = error
        if folder is not None:
            raise folder
        raise FileNotFoundError(f"no picture {name} in {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class RootedPicture:
    """A picture in a root. places: where it may lie."""

    name: str
    places: tuple[str, ...]
    roots: Roots = dataclasses.field(repr=False)

    def read(self) -> bytes:
        return self.roots.read(self.name, self.places)

    def exists(self) -> bool:
        return any(map(self.roots.exists, self.places))

    def nearest(self) -> str | None:
        return next(filter(None, map(self.roots.nearest, self.places)), None)


def root_paths(images: Images) -> list[str]:
    if isinstance(images, str | os.PathLike):
        images = (images,)
    return [str(files.path(name)) for name in images]


def _open_root(path: str) -> _Root:
    place = files.path(path)
    if place.is_dir():
        return _FolderRoot(path)
    if not place.exists():
        raise ValueError(
            f"got images {path}, which does not exist; expected a folder or a zip file"
        )
    return _ZipRoot(path)


@dataclasses.dataclass(frozen=True)
class _FolderRoot:
    path: str

    def read(self, place: str) -> bytes:
        return storage.read_picture(f"{self.path}/{place}")

    def listing(self, folder: str) -> Mapping[str, bool]:
        return storage.list_folder(f"{self.path}/{folder}" if folder else self.path)


class _ZipRoot:
    """Opened once in each process: processes that share an open file share its position too."""

    def __init__(self, path: str):
        self.path = path
        self._forget()
        self._opened()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        self._process: int | None = None
        self._folders: Mapping[str, Mapping[str, bool]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _opened(self) -> zipfile.ZipFile:
        with self._lock:
            if self._archive is None or self._process != os.getpid():
                try:
                    self._archive = zipfile.ZipFile(storage.seekable(self.path))
                except OSError:
                    raise
                except Exception as error:  # of bad data it dies in many ways
                    raise ValueError(
                        f"got images {self.path}: {error}; expected a folder or a whole zip file"
                    ) from error
                self._process = os.getpid()
            return self._archive

    def read(self, place: str) -> bytes:
        archive = self._opened()
        try:
            member = archive.getinfo(place)
        except KeyError:
            if place + "/" in archive.NameToInfo:
                self._refuse_folder(place)
            raise FileNotFoundError(place) from None
        name = f"{place} in {self.path}"
        if member.flag_bits & 1:
            raise ValueError(f"got {name}, encrypted; expected it without a password")
        storage.check_size(name, member.file_size)
        try:
            # Asked for a size it unpacks no more, and a checksum tells if that was not all.
            with archive.open(member) as file:
                return file.read(member.file_size + 1)
        except Exception as error:
            raise ValueError(f"got {name}: {error}; expected a whole zip file") from error

    def _refuse_folder(self, place: str) -> NoReturn:
        raise IsADirectoryError(f"got {place} in {self.path}, a folder; expected a picture")

    def listing(self, folder: str) -> Mapping[str, bool]:
        archive = self._opened()
        with self._lock:
            if self._folders is None:
                folders: dict[str, dict[str, bool]] = {}
                for name in archive.namelist():
                    above, _, file = name.rstrip("/").rpartition("/")
                    folders.setdefault(above, {})[file] = not name.endswith("/")
                self._folders = folders
        return self._folders.get(folder, {})
