"""Pictures looked for before a run: which conversations lack theirs, and why."""

import numpy as np

from llava_jax.data import picture_check, spreading
from llava_jax.data.dataset import open_dataset
from tests.data import small
from tests.data.small import conversation


def shows(*names: str) -> dict:
    tags = "<image>" * len(names)
    return {"id": names[0], "image": list(names), "conversations": conversation(f"{tags}q", "a")}


MADE = [
    shows("page.jpg"),
    shows("empty.jpg"),
    shows("0.png", "book.jpg"),
    shows("gone.png", "page.jpg"),
    shows("0.png", "1.png"),
]


def opened(folder):
    (folder / "images").mkdir()
    (folder / "images/page.jpg").write_text("<html>404 not found</html>")
    (folder / "images/empty.jpg").write_bytes(b"")
    (folder / "images/book.gif").write_bytes(b"GIF89a")
    config = small.write(folder, [*small.entries(3), *MADE])
    return open_dataset(small.changed(config, data={"max_bad_fraction": 1.0}), check="open")


def test_pictures_that_are_not_there_or_are_none(tmp_path):
    checked = opened(tmp_path).checked["small"]
    assert checked.findings.count == {"picture missing": 2, "picture unreadable": 2}
    assert checked.broken_N.tolist() == [False] * 3 + [True] * 4 + [False]
    missing, unreadable = (
        checked.findings.first[f"picture {kind}"] for kind in ("missing", "unreadable")
    )
    assert missing == [
        "0.png (entry 5): book.jpg; there is book.gif",
        "gone.png (entry 6): gone.png",
    ]
    assert "page.jpg (entry 3): page.jpg: got" in unreadable[0]
    assert "<html>404" in unreadable[0]
    assert "0 bytes" in unreadable[1]


def test_whether_they_exist_is_asked_more_quickly(tmp_path):
    dataset = opened(tmp_path)
    lengths = dataset.lengths["small"]
    arguments = dataset.sources["small"], lengths.entry_N, lengths.pictures_N
    assert picture_check.check(*arguments, "exist").findings.count == {"picture missing": 2}
    # Pictures of turns that were cut are not shown, and not looked for.
    shown_N = np.minimum(lengths.pictures_N, 1)
    found = picture_check.check(arguments[0], lengths.entry_N, shown_N, "exist").findings
    assert found.first["picture missing"] == ["gone.png (entry 6): gone.png"]


def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "_CHUNK", 3)
    dataset = opened(tmp_path)
    lengths = dataset.lengths["small"]
    arguments = dataset.sources["small"], lengths.entry_N, lengths.pictures_N, "open"
    one, two = (picture_check.check(*arguments, processes=n) for n in (1, 2))
    assert one.findings == two.findings
    np.testing.assert_array_equal(one.broken_N, two.broken_N)
