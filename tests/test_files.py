"""Writing happens whole or not at all, and says in one sentence why not."""

import contextlib
import errno
import os
import resource
import signal

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llava_jax import files


class FakeBucket(MemoryFileSystem):
    """Stands in for s3:// behind epath, by fsspec's own way of adding a file system."""

    protocol = ("s3",)
    store = {}  # noqa: RUF012  (shared by all instances, as in the parent class)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("s3://", "memory://"))

    def rename(self, path1, path2, **kwargs):
        return self.mv(path1, path2, **kwargs)


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    """An existing folder, local or in a bucket."""
    if request.param == "local":
        return files.path(tmp_path)
    fsspec.register_implementation("s3", FakeBucket, clobber=True)
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = ["", "/bucket"]
    return files.path("s3://bucket")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_path_expands_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(files.path("~/x")) == f"{tmp_path}/x"
    assert str(files.path("gs://bucket/x")) == "gs://bucket/x"


def test_write_and_write_again(folder):
    files.write_text(folder / "new" / "a.txt", "ä\n")
    files.write_text(folder / "new" / "a.txt", "second ä\n")
    files.write_json(folder / "new" / "a.json", {"b": 1, "a": "é"})
    assert (folder / "new" / "a.txt").read_bytes() == "second ä\n".encode()
    assert (folder / "new" / "a.json").read_bytes() == '{\n  "b": 1,\n  "a": "é"\n}\n'.encode()
    assert names(folder / "new") == ["a.json", "a.txt"]


def test_failure_while_writing_keeps_the_old_file(folder):
    files.write_text(folder / "a", "old")
    with pytest.raises(RuntimeError, match="source broke"), files.new_file(folder / "a") as file:
        file.write(b"new, but half")
        raise RuntimeError("source broke")
    assert (folder / "a").read_text() == "old"
    assert names(folder) == ["a"]


def test_nothing_at_the_destination_before_the_end(folder):
    with files.new_file(folder / "a") as file:
        file.write(b"x" * 100_000)
        assert not (folder / "a").exists()
    assert (folder / "a").exists()


def test_bytes_are_on_the_disk_before_they_have_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))
        )
    files.write_text(tmp_path / "a", "x")
    assert calls == ["fsync", "replace"]


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_failing_rename_is_one_sentence(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"^cannot write .*/a: permission denied; nothing was chan"):
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond `size`: the nearest thing to a full disk that needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_sentence(tmp_path):
    with disk_of(1000), pytest.raises(OSError, match=r"^cannot write .*/a: file too large; noth"):
        files.write_bytes(tmp_path / "a", b"x" * 5000)
    assert os.listdir(tmp_path) == []


def test_destination_inside_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*/file/deep/a: .*directory; nothing was"):
        files.write_text(tmp_path / "file" / "deep" / "a", "new")


def test_errors_of_other_files_are_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.new_file(tmp_path / "a"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")
    assert os.listdir(tmp_path) == []


def test_fresh_folder_appears_whole(folder):
    with files.fresh_folder(folder / "model") as inside:
        files.write_text(inside / "params" / "a", "1")
        assert not (folder / "model").exists()
    assert (folder / "model" / "params" / "a").read_text() == "1"
    assert names(folder) == ["model"]


def test_fresh_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "model").mkdir()
    with files.fresh_folder(tmp_path / "model") as inside:
        files.write_text(inside / "a", "1")
    assert os.listdir(tmp_path / "model") == ["a"]


def test_fresh_folder_leaves_nothing_of_a_failure(folder):
    files.write_text(folder / "other", "")
    with pytest.raises(RuntimeError, match="broke"), files.fresh_folder(folder / "m") as inside:
        files.write_text(inside / "a", "1")
        raise RuntimeError("broke")
    assert names(folder) == ["other"]


def test_fresh_folder_refuses_leftovers_at_once(folder):
    files.write_text(folder / "model" / "old", "mine")
    with pytest.raises(ValueError, match=r"holds 'old' .1 in all.*new or empty folder: remove it"):
        with files.fresh_folder(folder / "model"):
            pytest.fail("the work was started")
    with pytest.raises(ValueError, match=r"got .*old, a file; expected"):
        with files.fresh_folder(folder / "model" / "old"):
            pytest.fail("the work was started")
    assert (folder / "model" / "old").read_text() == "mine"


def test_fresh_folder_does_not_overwrite_what_came_meanwhile(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*/model: directory not empty"):
        with files.fresh_folder(tmp_path / "model") as inside:
            files.write_text(inside / "a", "ours")
            files.write_text(tmp_path / "model" / "b", "theirs")
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["b"]


def test_a_link_is_written_through_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for name, where in (("link", "real"), ("dangling", "later")):
        with files.fresh_folder(tmp_path / name) as folder:
            (folder / "held").write_text("x")
        assert (tmp_path / where / "held").read_text() == "x"
        assert (tmp_path / name).is_symlink()
    with pytest.raises(ValueError, match="real, a folder; expected the name of a file"):
        files.write_text(tmp_path / "real", "x")
