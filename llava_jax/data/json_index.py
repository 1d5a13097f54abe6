"""Where the entries of a JSON list, or of lines of JSON, begin and end. One pass, little memory.

LLaVA's lists are a gigabyte long. So a file is read once from end to end, every entry is checked to
be JSON and forgotten, and its bytes are found again by their place.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from llava_jax import files

_CHUNK_BYTES = 2**22
_MAX_ENTRY_BYTES = (
    2**26
)  # what is longer is no conversation, and what never ends is not read to the end
_BOM = codecs.BOM_UTF8
_BLANK = re.compile(r"[ \t\r\n]*")
_BLANKS = b" \t\r\n"

# How much of a word may be missing (-Infinity, \u12…) when an error is that the text was cut off.
_CUT = 16


class _Broken(Exception):
    """Not JSON, at a byte."""

    def __init__(self, byte: int, reason: str):
        super().__init__(reason)
        self.byte = byte


class _Hashed(io.RawIOBase):
    """A file that hashes what is read of it."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self.sha256.update(data)
        buffer[: len(data)] = data
        return len(data)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def first_character(path: str) -> str:
    """What a file begins with, blanks apart; nothing, if there is nothing else in its front."""
    with files.path(path).open("rb") as file:
        front = file.read(2**16)
    front = front.removeprefix(_BOM).lstrip(_BLANKS)
    return front[:1].decode("latin-1")


class Scan:
    """The entries of a file, once: each one's first byte, the byte behind it, and what it says.

    is_list: it begins with [. Any other file has an entry on each line that is not blank.
    sha256: of the whole file, in hex, when all entries were seen.
    """

    def __init__(self, path: str):
        self._path = path
        self.is_list = first_character(path) == "["
        self.sha256 = ""

    def __iter__(self) -> Iterator[tuple[int, int, object]]:
        entries = _list_entries if self.is_list else _line_entries
        number = 0
        try:
            with files.path(self._path).open("rb") as file:
                hashed = _Hashed(file)
                for entry in entries(hashed):
                    yield entry
                    number += 1
        except _Broken as error:
            raise ValueError(
                f"got {self._path}, not JSON at byte {error.byte} (line "
                f"{_line(self._path, error.byte)}, entry {number} counted from 0): {error}; "
                "expected a JSON list, or JSON Lines: was the file copied whole?"
            ) from error
        self.sha256 = hashed.sha256.hexdigest()


def _line(path: str, byte: int) -> int:
    line = 1
    with files.path(path).open("rb") as file:
        while byte > 0 and (chunk := file.read(min(byte, _CHUNK_BYTES))):
            line += chunk.count(b"\n")
            byte -= len(chunk)
    return line


def parse(text: str) -> object:
    """One value of strict JSON."""
    return _DECODER.decode(text)


def load(path: str) -> tuple[object, str]:
    """All of a small file, and its SHA-256 in hex."""
    data = files.path(path).read_bytes()
    try:
        value = parse(data.removeprefix(_BOM).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {path}, not JSON: {error}; was the file copied whole?") from error
    return value, hashlib.sha256(data).hexdigest()


def _line_entries(file: _Hashed) -> Iterator[tuple[int, int, object]]:
    lines = io.BufferedReader(file, _CHUNK_BYTES)
    start = 0
    while line := lines.readline(_MAX_ENTRY_BYTES):
        stop = start + len(line)
        if start == 0 and line.startswith(_BOM):
            line, start = line.removeprefix(_BOM), len(_BOM)
        if len(line) == _MAX_ENTRY_BYTES:
            raise _Broken(start, f"a line of more than {_MAX_ENTRY_BYTES} bytes")
        if line.strip(_BLANKS):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _Broken(start + error.start, "not UTF-8") from error
            try:
                yield start, stop, parse(text)
            except json.JSONDecodeError as error:
                at = start + len(text[: error.pos].encode())
                cut = " (the object goes on in the next line)" if _ends(text, error) else ""
                raise _Broken(at, error.msg + cut) from error
            except (ValueError, RecursionError) as error:
                raise _Broken(start, str(error)) from error
        start = stop


def _ends(text: str, error: json.JSONDecodeError) -> bool:
    return not text[error.pos :].strip()


def _list_entries(file: _Hashed) -> Iterator[tuple[int, int, object]]:
    text = _Text(file)
    text.step("[")
    if text.next_character() == "]":
        text.step("]")
    else:
        while True:
            text.next_character()
            start = text.byte
            value = text.value()
            yield start, text.byte, value
            if text.step(",", "]") == "]":
                break
    if text.next_character():
        raise _Broken(text.byte, "something behind the end of the list")


class _Text:
    """The part of a file's text that is being read. byte: where it stands."""

    def __init__(self, file: _Hashed):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes_read = 0
        self._not_text: int | None = None
        self._text, self._at, self._ended = "", 0, False
        self.byte = 0

    def next_character(self) -> str:
        """Steps over blanks; nothing at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None
            self._step_to(blank.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on(_CHUNK_BYTES):
                return ""

    def step(self, *expected: str) -> str:
        found = self.next_character()
        if found not in expected:
            what = repr(found) if found else "the end of the file"
            raise _Broken(self.byte, f"expected {' or '.join(expected)}, got {what}")
        self._step_to(self._at + 1)
        return found

    def value(self) -> object:
        while True:
            try:
                value, stop = _DECODER.raw_decode(self._text, self._at)
                # A number could have more digits.
                whole = self._text[stop - 1] in '"}]' or stop < len(self._text) - _CUT
                if whole or self._ended:
                    self._step_to(stop)
                    return value
            except json.JSONDecodeError as error:
                unterminated = error.msg.startswith("Unterminated string")
                if self._ended or not (unterminated or error.pos >= len(self._text) - _CUT):
                    at = self.byte + len(self._text[self._at : error.pos].encode())
                    raise _Broken(at, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise _Broken(self.byte, str(error)) from error
            # Doubled each time: what is long is not begun again for every few bytes of it.
            held = len(self._text) - self._at
            if held > _MAX_ENTRY_BYTES:
                raise _Broken(self.byte, f"an entry of more than {_MAX_ENTRY_BYTES} bytes")
            self._read_on(max(held, _CHUNK_BYTES))

    def _step_to(self, at: int) -> None:
        self.byte += len(self._text[self._at : at].encode())
        self._at = at

    def _read_on(self, size: int) -> bool:
        if self._not_text is not None:
            raise _Broken(self._not_text, "not UTF-8")
        data = self._file.read(size) or b""
        start = self._bytes_read - len(self._decoder.getstate()[0])
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # First comes what is before it: the entries there are counted.
            self._not_text = start + error.start
            more = error.object[: error.start].decode()
        if self.byte == 0 and not self._text and more.startswith("\ufeff"):
            more, self.byte = more[1:], len(_BOM)
        self._bytes_read += len(data)
        self._ended = not data
        self._text, self._at = self._text[self._at :] + more, 0
        return not self._ended
