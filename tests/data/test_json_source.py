"""JSON at random access says what the whole file says, in little memory, or where it is broken."""

import hashlib
import json
import os
import pickle
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_jax.conversation import Refused
from llava_jax.data import json_index
from llava_jax.data.json_source import JsonSource
from tests.data.sources import ENTRIES, TALK, TURNS, everything, write_json, write_pictures

BOM = b"\xef\xbb\xbf"


def values(path):
    data = path.read_bytes()
    spans = [(start, stop, value) for start, stop, value in json_index.Scan(str(path))]
    assert [json.loads(data[start:stop]) for start, stop, _ in spans] == [s[2] for s in spans]
    return [value for *_, value in spans]


LISTED = [
    json.dumps(ENTRIES),
    json.dumps(ENTRIES, indent=2, ensure_ascii=True),
    "\n\t [\n" + " ,\r\n".join(json.dumps(entry, indent=1) for entry in ENTRIES) + "\n] \n\n",
    json.dumps(['é中😀\u2028\\"]}', [], {}, "", 123456, -1.5e-7, True, None, [[1, [2]]]]),
    '["é中😀\u2028 \\" \\\\", {"中": "😀"}, 1]',
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**22])
@pytest.mark.parametrize("text", LISTED)
@pytest.mark.parametrize("front", [b"", BOM])
def test_a_list(tmp_path, monkeypatch, chunk, text, front):
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", chunk)
    file = tmp_path / "a"
    file.write_bytes(front + text.replace("\n", "\r\n").encode())
    assert values(file) == json.loads(text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \t\n"])
@pytest.mark.parametrize("front", [b"", BOM, b"\n \n"])
def test_lines(tmp_path, end, front):
    lines = [{"id": str(i), "value": "é中😀\u2028\x85" * i} for i in range(5)]
    for last in ("", end):
        file = tmp_path / "a"
        text = end.join(json.dumps(line, ensure_ascii=False) for line in lines) + last
        file.write_bytes(front + text.encode())
        assert values(file) == lines


def test_random_access(tmp_path):
    rng = random.Random(0)
    made = [
        {"id": str(i), "conversations": [{"from": "human", "value": "é\n" * rng.randrange(900)}]}
        for i in range(300)
    ]
    file = write_json(tmp_path / "a", made, ensure_ascii=False)
    source = pickle.loads(pickle.dumps(JsonSource(file)))
    with ThreadPoolExecutor(8) as threads:
        order = rng.sample(range(300), 300)
        found = list(threads.map(source.__getitem__, order))
    assert [(e.id, e.conversations) for e in found] == [
        (made[i]["id"], made[i]["conversations"]) for i in order
    ]
    assert source.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    for index in (-1, 300):
        with pytest.raises(IndexError):
            source[index]


def test_entries(tmp_path):
    images = write_pictures(tmp_path / "images")
    source = JsonSource(write_json(tmp_path / "a"), [images])
    said = everything(source)
    assert said[0] == ("first", TURNS, [("a.jpg", b"\xff\xd8a\0\0")])
    assert said[2] == ("2", TALK, [])
    assert said[3][0] == "7"
    assert [name for name, _ in said[3][2]] == ["a.jpg", "sub/b.png", "a.jpg"]
    assert said[4][2] == [("sub/é.JPG", b"c")]
    assert said[5][2][0][:2] == ("sub/gone.png", "missing")
    assert said[6][2][0][:2] == ("sub", "unreadable")
    assert said[8][0] == "id is not a text"
    assert [kind for kind, _ in said[15:]] == [
        "image path outside its root",
        "entry is not an object",
        "entry is not an object",
    ]


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (7, "entry is not an object"),
        (["a"], "entry is not an object"),
        ({"id": 1.5}, "id is not a text"),
        ({"id": True}, "id is not a text"),
        ({"id": {}}, "id is not a text"),
        ({"id": "a\ud83d"}, "id is not a text"),
        ({"image": 7}, "image is not a name"),
        ({"image": True}, "image is not a name"),
        ({"image": {"path": "x"}}, "image is not a name"),
        ({"image": ["a", None]}, "image is not a name"),
        ({"image": ["a", ""]}, "image is not a name"),
        ({"image": "a", "images": ["b"]}, "image and images"),
        ({"images": ["a", "/b"]}, "image path outside its root"),
    ],
)
def test_refused(tmp_path, entry, kind):
    source = JsonSource(write_json(tmp_path / "a", [entry, 0]), [tmp_path])
    with pytest.raises(Refused) as caught:
        source[0]
    assert caught.value.kind == kind
    assert "expected" in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("chunk", [3, 2**22])
@pytest.mark.parametrize(
    ("text", "byte", "line", "entry", "reason"),
    [
        ('[{"a": 1},\n{"b" 2}]', 16, 2, 1, "Expecting ':'"),
        ('["é",\n"中",\n{"b": x}]', 20, 3, 2, "Expecting value"),
        ('["a",\n"b" "c"]', 10, 2, 2, "expected , or ], got '\"'"),
        ('["a"}', 4, 1, 1, "expected , or ], got '}'"),
        ('["a",]', 5, 1, 1, "Expecting value"),
        ('[{"a": NaN}]', 7, 1, 0, "write null instead"),
        ('[{"a": "NaN",\n "é\\"": [-Infinity,\n "中", NaN]}]', 24, 2, 0, "-Infinity is not JSON"),
        ('["a", Infinity]', 6, 1, 1, "Infinity is not JSON"),
        ('["a"]\n["b"]', 6, 2, 1, "behind the end"),
        ('[{"a": "b\nc"}]', 9, 1, 0, "control character"),
        ('["a", "\\x"]', 7, 1, 1, "escape"),
        ('["a", [' + "9" * 5000 + "]]", 7, 1, 1, "write it as a text"),
        (
            '["a", {"9": "' + "9" * 5000 + '",\n"b": -' + "9" * 5000 + "}]",
            5021,
            2,
            1,
            "4300 digits",
        ),
        ('["a",\n{"b": [0.' + "9" * 5000 + ", 1e5, NaN]}]", 5022, 2, 1, "NaN"),
        ("[{'a': 1}]", 2, 1, 0, "JSON's quotes are double"),
        ('["a", {"b": [1,\n \'c\']}]', 17, 2, 1, "JSON's quotes are double"),
        ('["a", “b”]', 6, 1, 1, "JSON's quotes are double"),
        ("['a']", 1, 1, 0, "JSON's quotes are double"),
        ("[0, " + "[" * 10**5, 4, 1, 1, "recursion"),
        ('{"a": 1}\n{"b": nul}\n', 15, 2, 1, "Expecting value"),
        ('{"a": 1}\n{"é中": nul}\n', 19, 2, 1, "Expecting value"),
        ('{"a": 1}\n\n{"b": 1} {"c": 2}', 19, 3, 1, "Extra data"),
        ('{"a": 1}\n{"b": -Infinity}', 15, 2, 1, "write null instead"),
        ("{\"a\": 1}\n{'b': 1}", 10, 2, 1, "JSON's quotes are double"),
    ],
)
def test_broken(tmp_path, monkeypatch, chunk, text, byte, line, entry, reason):
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", chunk)
    file = tmp_path / "chat.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"chat\.json, not JSON at byte") as caught:
        JsonSource(file)
    assert f"at byte {byte} (line {line}, entry {entry} counted from 0)" in str(caught.value)
    assert reason in str(caught.value)
    assert "copied whole" not in str(caught.value)


@pytest.mark.parametrize("chunk", [5, 8, 2**22])  # with 8, a letter is cut in front of the fault
@pytest.mark.parametrize("text", [b'["a", "\xc3\xa9b\xff"]', b'{"a": 1}\n{"b\xff": 1}'])
def test_not_utf8(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", chunk)
    file = tmp_path / "a"
    file.write_bytes(text)
    byte = text.index(b"\xff")
    with pytest.raises(ValueError, match=rf"at byte {byte} .*entry 1 .*not UTF-8"):
        JsonSource(file)


@pytest.mark.parametrize("chunk", [4, 2**22])
def test_cut_anywhere(tmp_path, monkeypatch, chunk):
    """A download that broke off is never taken for a shorter list."""
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", chunk)
    whole = json.dumps([{"id": "é😀\n", "n": [1.5, -2e3, True, None]}, 12], ensure_ascii=False)
    file = tmp_path / "a"
    for length in range(1, len(whole.encode())):
        file.write_bytes(whole.encode()[:length])
        with pytest.raises(ValueError, match=r"not JSON at byte .* copied whole"):
            JsonSource(file)


def test_lines_cut_anywhere(tmp_path):
    lines = '{"conversations": "é😀\\n", "n": [1.5, true]}\n{"id": "b"}\n'.encode()
    file = tmp_path / "a"
    for length in range(1, len(lines)):
        file.write_bytes(lines[:length])
        if lines[:length].rstrip(b"\n")[-1:] == b"}":  # nobody could tell
            JsonSource(file)
        else:
            with pytest.raises(ValueError, match=r"not JSON at byte .* copied whole"):
                JsonSource(file)


@pytest.mark.parametrize(
    ("text", "says", "whole"),
    [
        ('{"a": [1,', "Expecting value", False),
        ('{"a": "b', "Unterminated string", False),
        ('{"a": "a long text, cut in the {middle}', "Unterminated string", False),
        ('{"a": NaN}', "NaN is not JSON (line 1); write null instead", True),
        ('{"b": 1,\n"a": NaN}', "NaN is not JSON (line 2); write null instead", True),
        ("{'a': 1}", "JSON's quotes are double", True),
        ('{"a": [' + "9" * 5000 + "]}", "write it as a text", True),
        ('{"a" 1, "b": "a long text behind it"}', "Expecting ':' delimiter (line 1)", True),
    ],
)
def test_a_small_file(tmp_path, text, says, whole):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json, not JSON: ") as caught:
        json_index.load(str(tmp_path / "a.json"))
    assert says in str(caught.value)
    assert ("copied whole" not in str(caught.value)) is whole


def test_an_entry_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", 2**10)
    monkeypatch.setattr(json_index, "_MAX_ENTRY_BYTES", 2**14)
    for front in ('["a', '{"a": "'):
        file = tmp_path / "a"
        file.write_text(front + "x" * 2**22)
        tracemalloc.start()
        with pytest.raises(ValueError, match="of more than 16384 bytes"):
            JsonSource(file)
        assert tracemalloc.get_traced_memory()[1] < 2**19  # measured 0.09 MiB
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_index, "_CHUNK_BYTES", 2**14)
    file = write_json(tmp_path / "a", [{"id": "x" * 1000, "conversations": TALK}] * 4000)
    assert file.stat().st_size > 2**22
    tracemalloc.start()
    JsonSource(file)
    assert tracemalloc.get_traced_memory()[1] < 2**19  # measured 0.14 MiB
    tracemalloc.stop()


def test_a_file_that_changes(tmp_path):
    file = write_json(tmp_path / "a", [{"id": "a"}, {"id": "b"}])
    source = JsonSource(file)
    elsewhere = pickle.dumps(source)
    assert source[1].id == "b"
    file.write_text('[{"id":"aaaa"},{"id":"b"}]')
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="changed since it was opened"):
        source[1]
    with pytest.raises(ValueError, match="changed since it was opened"):
        pickle.loads(elsewhere)[0]
    # As long as before, and JSON at the same places.
    file.write_text('[{"id": "c"}, {"id": "d"}]')
    os.utime(file, ns=(2, 2))
    with pytest.raises(ValueError, match="changed since it was opened"):
        pickle.loads(elsewhere)[0]
