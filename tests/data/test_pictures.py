"""Pictures are found in folders and zip files by name, and nothing outside them can be named."""

import os
import pickle
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_jax.conversation import Refused
from llava_jax.data import storage
from llava_jax.data.pictures import Roots, _ZipRoot, place_of
from tests.data.sources import PICTURES, write_pictures, write_zip

CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize(
    "name",
    "/a.jpg //a.jpg ../a.jpg a/../../b.jpg a/.. .. a\\b.jpg \\a.jpg C:/a.jpg c:a.jpg "
    "file:///a.jpg gs://b/a.jpg x/gs://b".split(),
)
def test_outside(tmp_path, name):
    with pytest.raises(Refused, match="expected a name relative to a root") as caught:
        Roots([tmp_path]).picture(name)
    assert caught.value.kind == "image path outside its root"


@pytest.mark.parametrize("name", ["", ".", "./", "a\0.jpg", "\ud800.jpg"])
def test_no_name(tmp_path, name):
    with pytest.raises(Refused, match="expected the name of a file") as caught:
        Roots([tmp_path]).picture(name)
    assert caught.value.kind == "image is not a name"


def test_inside():
    for name in ("a.jpg", "./a.jpg", ".//a.jpg"):
        assert place_of(name) == "a.jpg"
    for name in ("a b/ü.jpg", "..a/b...jpg", ".hidden/~a", "a/b:c.jpg"):
        assert place_of(name) == name


@pytest.fixture(params=["folder", "zip"])
def root(request, tmp_path):
    if request.param == "folder":
        return write_pictures(tmp_path / "images")
    return write_zip(tmp_path / "images.zip")


def test_bytes_are_the_files(root):
    roots = Roots([root])
    for name, data in PICTURES.items():
        found = roots.picture(f"./{name}")
        assert (found.name, found.read(), found.exists()) == (f"./{name}", data, True)


def test_missing(root):
    gone = Roots([root]).picture("sub/gone.png")
    with pytest.raises(FileNotFoundError, match=r"no picture sub/gone\.png in .*images"):
        gone.read()
    assert not gone.exists()
    # A file where a folder should be.
    with pytest.raises(FileNotFoundError, match=r"a\.jpg/b\.jpg"):
        Roots([root]).picture("a.jpg/b.jpg").read()


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300 + ".jpg",
        "x" * 300 + "/a.jpg",
        "sub/" * 2000 + "a.jpg",
        "loop.jpg",
        "loop.jpg/a.jpg",
    ],
)
def test_what_can_never_be_there_is_missing(tmp_path, name):
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        (folder / "loop.jpg").symlink_to("loop.jpg")
    found = Roots([first, second]).picture(name)
    assert not found.exists()
    assert found.nearest() is None
    with pytest.raises(FileNotFoundError, match=f"no picture {name} in "):
        found.read()


def test_beside_links(tmp_path):
    """What leads nowhere is no file, and what leads to one is; neither stops the others."""
    write_pictures(tmp_path)
    for name, target in [
        ("loop.jpg", "loop.jpg"),
        ("to and.jpg", "fro.jpg"),
        ("fro.jpg", "to and.jpg"),
        ("gone.jpg", "nowhere"),
        ("through.jpg", "a.jpg/b"),
        ("long.jpg", "x" * 300),
        ("good.jpg", "a.jpg"),
        ("folder", "sub"),
    ]:
        (tmp_path / name).symlink_to(target)
    roots = Roots([tmp_path])
    there = ["a.jpg", "good.jpg", "folder/b.png"]
    not_there = "loop.jpg|to and.jpg|fro.jpg|gone.jpg|through.jpg|long.jpg|folder".split("|")
    assert [roots.exists(name) for name in there + not_there] == [True] * 3 + [False] * 7
    assert roots.picture("good.jpg").read() == PICTURES["a.jpg"]
    for name in not_there[:-1]:
        with pytest.raises(FileNotFoundError, match=f"no picture {name} in "):
            roots.picture(name).read()


def test_order_of_roots(tmp_path):
    first = write_zip(tmp_path / "1.zip", {"a.jpg": b"1", "sub/x.jpg": b"1"})
    (tmp_path / "2" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/y.jpg"):
        (tmp_path / "2" / name).write_bytes(b"2")
    names = ["a.jpg", "sub/x.jpg", "sub/y.jpg"]
    for order, expected in (([first, tmp_path / "2"], b"112"), ([tmp_path / "2", first], b"212")):
        roots = Roots(order)
        assert b"".join(roots.picture(name).read() for name in names) == expected
        assert all(roots.picture(name).exists() for name in names)


def test_places(tmp_path):
    root = write_pictures(tmp_path)
    assert Roots([root]).picture("x/b.png", "val/b.png", "sub/b.png").read() == b"\r\n\0b"
    found = Roots([root]).picture("x", "val/b.gif", "sub/b.gif")
    assert (found.exists(), found.nearest()) == (False, "sub/b.png")
    with pytest.raises(FileNotFoundError, match="no picture x in"):
        found.read()


def test_nearest(root):
    roots = Roots([root])
    for name, nearest in [
        ("a.gif", "a.jpg"),
        ("a.JPG", "a.jpg"),
        ("a", "a.jpg"),
        ("A.jpeg", "a.jpg"),
        ("sub/é.jpg", "sub/é.JPG"),
        ("sub/a.jpg", None),
        ("gone/a.jpg", None),
        ("a.jpg", None),
    ]:
        assert roots.nearest(name) == nearest, name


def test_nearest_is_a_picture(tmp_path):
    for name in ("a.json", "a.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.png").mkdir()
    assert Roots([tmp_path]).nearest("a.jpg") is None


def test_folders_are_listed_once(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    listed = []
    real = storage.list_folder
    monkeypatch.setattr(storage, "list_folder", lambda path: listed.append(path) or real(path))
    roots = Roots([tmp_path])
    for _ in range(3):
        assert [roots.exists(name) for name in ("a.jpg", "b.jpg", "sub/b.png", "no/b")] == [
            True,
            False,
            True,
            False,
        ]
    assert roots.nearest("sub/b.jpg") == "sub/b.png"
    assert listed == [f"{tmp_path}", f"{tmp_path}/sub", f"{tmp_path}/no"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_named_like_a_picture(tmp_path, kind):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "x.jpg", other):
        folder.mkdir(parents=True)
    (other / "x.jpg").write_bytes(b"x")
    if kind == "zip":
        root = write_zip(tmp_path / "root.zip", {"x.jpg/": b""})
    found = Roots([root]).picture("x.jpg")
    assert not found.exists()
    with pytest.raises(IsADirectoryError, match=r"x\.jpg.* a folder; expected a picture"):
        found.read()
    assert Roots([root, other]).picture("x.jpg").read() == b"x"


def test_not_a_picture_at_all(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg, a pipe or a device"):
        Roots([tmp_path]).picture("pipe.jpg").read()
    (tmp_path / "large.jpg").write_bytes(b"12345")
    monkeypatch.setattr(storage, "MAX_PICTURE_BYTES", 4)
    with pytest.raises(ValueError, match=r"large\.jpg of 5 bytes, expected a picture of at most 4"):
        Roots([tmp_path]).picture("large.jpg").read()


def test_no_root(tmp_path):
    with pytest.raises(
        ValueError, match=r"images .*/gone, which does not exist; expected a folder"
    ):
        Roots([tmp_path / "gone"])
    with pytest.raises(FileNotFoundError, match=r"no picture a\.jpg in no root of images"):
        Roots().picture("a.jpg").read()


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "directory"])
def test_a_broken_zip(tmp_path, damage):
    file = write_zip(tmp_path / "images.zip")
    data = file.read_bytes()
    if damage == "text":
        data = b"<html>"
    elif damage == "empty":
        data = b""
    elif damage == "cut":
        data = data[: len(data) // 2]
    else:
        data = data.replace(CENTRAL, b"PK\x01\x09")
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.zip: .*expected a folder or a whole zip file"):
        Roots([file])


def patch(file, mark, offset, value):
    """Overwrites a field of the only member's header."""
    data = bytearray(file.read_bytes())
    at = data.index(mark) + offset
    data[at : at + len(value)] = value
    file.write_bytes(data)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    file = write_zip(tmp_path / "images.zip", {"a.jpg": bytes(10**6)})
    monkeypatch.setattr(storage, "MAX_PICTURE_BYTES", 10**6 - 1)
    found = Roots([file]).picture("a.jpg")
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(ValueError, match=r"a\.jpg in .*images\.zip of 1000000 bytes, expected"):
        found.read()


def test_a_zip_bomb_that_lies(tmp_path):
    file = write_zip(tmp_path / "images.zip", {"a.jpg": bytes(2**25)})
    patch(file, CENTRAL, 24, (100).to_bytes(4, "little"))
    found = Roots([file]).picture("a.jpg")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jpg in .*images\.zip: Bad CRC"):
        found.read()
    assert tracemalloc.get_traced_memory()[1] < 2**20  # measured 0.05 MiB
    tracemalloc.stop()


def test_an_encrypted_member(tmp_path):
    file = write_zip(tmp_path / "images.zip", {"a.jpg": b"x" * 50})
    patch(file, LOCAL, 6, b"\x01")
    patch(file, CENTRAL, 8, b"\x01")
    with pytest.raises(ValueError, match=r"a\.jpg in .*images\.zip, encrypted; expected"):
        Roots([file]).picture("a.jpg").read()


@pytest.mark.parametrize("field", ["data", "method", "offset"])
def test_a_damaged_member(tmp_path, field):
    file = write_zip(tmp_path / "images.zip", {"a.jpg": os.urandom(500)})
    if field == "data":
        patch(file, b"a.jpg", 100, b"garbage")
    elif field == "method":
        patch(file, CENTRAL, 10, (77).to_bytes(2, "little"))
    else:
        patch(file, CENTRAL, 42, (30).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"a\.jpg in .*images\.zip: .*expected a whole zip"):
        Roots([file]).picture("a.jpg").read()


def test_threads_and_pickles(root):
    roots = pickle.loads(pickle.dumps(Roots([root])))
    names = list(PICTURES) * 50
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda name: roots.picture(name).read(), names))
    assert read == [PICTURES[name] for name in names]


def test_a_process_opens_a_zip_itself(tmp_path, monkeypatch):
    """One that forked would move the position in the file that its parent reads."""
    (root,) = Roots([write_zip(tmp_path / "images.zip")])._roots
    assert isinstance(root, _ZipRoot)
    archive = root._opened()
    assert root._opened() is archive
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert root._opened() is not archive
