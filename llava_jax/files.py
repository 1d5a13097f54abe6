"""Paths, local or in a bucket (gs://…), and writing that either happens whole or not at all.

Everything is written beside its destination under a temporary name and renamed when complete, so
a reader never sees half a file and a failure leaves what was there before. Renaming is atomic on a
local disk and for one object in a bucket. A folder in a bucket is moved object by object, without
its bytes being read: subfolders first, then its own files, then the one a reader looks for; what
was moved before a failure is removed again.

A process that is killed outright leaves its `.NAME.unfinished-…` behind: safe to delete.
"""

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath
from etils.epath import backend

# Errors of a full or failing disk carry no file name: the system call knew only a descriptor.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def path(name: str | os.PathLike[str]) -> epath.Path:
    """The path a user typed: `~` is expanded; gs:// and the other schemes of epath work."""
    return epath.Path(name).expanduser()


def absolute(name: str | os.PathLike[str]) -> epath.Path:
    """The same as seen from anywhere, for libraries that insist on it."""
    place = path(name)
    return place if _is_remote(place) else epath.Path(os.path.abspath(place))


@contextlib.contextmanager
def new_file(dst: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write; it appears at `dst` when the block ends without an error."""
    dst = _real(dst)
    if dst.is_dir():
        raise ValueError(f"got {dst}, a folder; expected the name of a file")
    temporary = _beside(dst)
    with _naming(dst, temporary):
        dst.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                if not _is_remote(dst):
                    # Before the rename: after a power cut a renamed file could hold nothing.
                    file.flush()
                    os.fsync(file.fileno())
            if (client := _client(dst)) is not None:
                # Not replace(): it looks for folders of either name, a dozen requests for a file.
                client.mv([str(temporary)], [str(dst)])
            elif _is_remote(dst):
                temporary.replace(dst)
            else:
                os.replace(temporary, dst)
        except BaseException:
            with _cleaning_up():
                temporary.unlink(missing_ok=True)
            raise


def write_bytes(dst: str | os.PathLike[str], data: bytes) -> None:
    with new_file(dst) as file:
        file.write(data)


def write_text(dst: str | os.PathLike[str], text: str) -> None:
    write_bytes(dst, text.encode())


def write_json(dst: str | os.PathLike[str], value: Any) -> None:
    """Indented, UTF-8, keys in the order given. NaN is refused: it is not JSON."""
    write_text(dst, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def fresh_folder(dst: str | os.PathLike[str], *, last: str | None = None) -> Iterator[epath.Path]:
    """A folder to fill; it becomes `dst` when the block ends without an error.

    One process fills it. A destination that already holds something is refused at once, before
    the work of an hour is done for nothing. last: the file by which readers know a whole folder;
    in a bucket it comes when all others are there.
    """
    dst = _real(dst)
    client = _client(dst)
    if client is not None:
        # It remembers what it once listed, and others write there too.
        client.invalidate_cache()
    if dst.exists():
        if not dst.is_dir():
            raise ValueError(f"got {dst}, a file; expected the name of a new folder")
        if held := sorted(entry.name for entry in dst.iterdir()):
            raise ValueError(
                f"got {dst}, a folder that holds {held[0]!r} ({len(held)} in all); expected a new "
                "or empty folder: remove it, or choose another destination"
            )
    temporary = _beside(dst)
    with _naming(dst, temporary):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if client is not None:
                _move_objects(client, str(temporary), str(dst), last)
                with _cleaning_up():  # some buckets have real folders, empty now
                    temporary.rmtree(missing_ok=True)
            elif _is_remote(dst):
                temporary.rename(dst)
            else:
                # Takes the place of an empty folder, and fails if someone filled it meanwhile.
                os.rename(temporary, dst)
        except BaseException:
            _remove(temporary)
            raise


def _remove(folder: epath.Path) -> None:
    """A library's thread may still write into it: what appears while it goes is removed as well."""
    for wait in (0.05, 0.2, 0.5, None):
        with _cleaning_up():
            folder.rmtree(missing_ok=True)
        if wait is None or _is_remote(folder):
            return
        time.sleep(wait)
        if not folder.exists():
            return


def _move_objects(client: Any, source: str, dst: str, last: str | None) -> None:
    """Moves a folder within a bucket so that what says it is whole comes when it is.

    Not client.mv(recursive=True): it moves in no order, and leaves half a folder when it fails.
    """
    # Only find() asks the bucket: what Orbax wrote went past this client, and what it remembers.
    if client.find(dst):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), dst)
    # The client's own names have no scheme before them.
    root = client._strip_protocol(source)
    inside = [name.removeprefix(root).lstrip("/") for name in client.find(source)]
    deep = [name for name in inside if "/" in name]
    own = [name for name in inside if "/" not in name and name != last]
    waves = [deep, own, [name for name in inside if name == last]]
    try:
        for wave in filter(None, waves):
            client.mv([f"{source}/{name}" for name in wave], [f"{dst}/{name}" for name in wave])
    except BaseException:
        for name in inside:
            with _cleaning_up():
                client.rm_file(f"{dst}/{name}")
        raise


def _client(name: epath.Path) -> Any:
    """The file system of fsspec behind a path in a bucket; None if there is none: the path is
    local, or TensorFlow is installed, which epath then prefers."""
    if getattr(name, "_backend", None) is not backend.fsspec_backend:
        return None
    return backend.fsspec_backend.fs(name)


def _cleaning_up() -> contextlib.AbstractContextManager[None]:
    """After an error: a second one must not hide it. Buckets' clients have kinds of their own."""
    return contextlib.suppress(Exception)


def _real(name: str | os.PathLike[str]) -> epath.Path:
    """Where a local name leads: what links point to is written, and the link stays."""
    name = path(name)
    return name if _is_remote(name) else path(os.path.realpath(name))


def _is_remote(name: epath.Path) -> bool:
    return "://" in str(name)


def _beside(dst: epath.Path) -> epath.Path:
    return dst.parent / f".{dst.name}.unfinished-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def _naming(dst: epath.Path, temporary: epath.Path) -> Iterator[None]:
    """Turns an error of writing into one sentence about `dst`; leaves errors of other files be."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            ours = error.errno in _DISK_ERRORS
        else:
            name = str(error.filename)
            ours = name.startswith(str(temporary)) or name in map(str, (dst, *dst.parents))
        if not ours:
            raise
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot write {dst}: {reason}; nothing was changed") from error
