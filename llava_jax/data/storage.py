"""Reading at random, from a local disk or a bucket: parts of a file, pictures, listings.

In a bucket each of these is one request; epath, which reads as if from a disk, makes several.
"""

import errno
import os
import stat
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from llava_jax import files

# Larger files are no pictures, or not ones to hold in a worker's memory.
MAX_PICTURE_BYTES = 2**28

# Said of names behind which there is nothing, and never can be: too long, or links in a circle.
_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def is_remote(path: str) -> bool:
    return "://" in path


def client(path: str) -> Any:
    """The file system of fsspec behind a path in a bucket."""
    from fsspec.core import url_to_fs  # comes with what reads buckets; local files do without

    return url_to_fs(path)[0]


def read_picture(path: str) -> bytes:
    """The whole of a file that should be a picture; a folder, a pipe or a giant is refused.

    FileNotFoundError: there is none, whatever the file system calls it.
    """
    if is_remote(path):
        return _read_remote_picture(path)
    # A pipe would wait for a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NOWHERE:
            raise FileNotFoundError(path) from None
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"got {path}, a folder; expected a picture")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"got {path}, a pipe or a device; expected a picture")
        check_size(path, status.st_size)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _read_remote_picture(path: str) -> bytes:
    try:
        data = client(path).cat_file(path, start=0, end=MAX_PICTURE_BYTES + 1)
    except FileNotFoundError:
        raise
    except Exception:  # each bucket's client has a kind of its own for "no such part"
        if client(path).size(path) == 0:  # of nothing, no part can be asked for
            return b""
        raise
    check_size(path, len(data))
    return data


def check_size(name: str, size: int) -> None:
    if size > MAX_PICTURE_BYTES:
        raise ValueError(
            f"got {name} of {size} bytes, expected a picture of at most {MAX_PICTURE_BYTES}"
        )


def list_folder(path: str) -> Mapping[str, bool]:
    """What lies in a folder: by name, whether it is a file. Nothing, if there is no such folder."""
    try:
        if is_remote(path):
            listed = client(path).ls(path, detail=True)
            return {
                entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] == "file"
                for entry in listed
            }
        with os.scandir(path) as entries:
            return {entry.name: _is_file(entry) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):  # a bucket's have no number
        return {}
    except OSError as error:
        if error.errno in _NOWHERE:
            return {}
        raise


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno in _NOWHERE:
            return False
        raise


def seekable(path: str) -> Any:
    """What a zip file is opened by: a local one itself, one in a bucket in pieces of 256 KiB."""
    if not is_remote(path):
        return path
    return client(path).open(path, "rb", block_size=2**18, cache_type="readahead")


class RandomAccessFile:
    """Reads parts of a file that stays as it is. Threads may share it, and so may processes:
    pickled, or forked, it goes on."""

    def __init__(self, path: str):
        self.path = path
        self._version = self._current_version()
        self._open()

    def _current_version(self) -> tuple[int, int]:
        if is_remote(self.path):
            return files.path(self.path).stat().length, 0
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_version": self._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, start: int, stop: int) -> bytes:
        if is_remote(self.path):
            data = client(self.path).cat_file(self.path, start=start, end=stop)
        else:
            # Not seek and read: a position would be shared by all who read.
            data = os.pread(self._opened(), stop - start, start)
        if len(data) != stop - start:
            raise self.changed()
        return data

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor is None:
                if self._current_version() != self._version:
                    raise self.changed()
                self._descriptor = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor

    def changed(self) -> ValueError:
        return ValueError(f"got {self.path}, changed since it was opened; expected it to stay")
