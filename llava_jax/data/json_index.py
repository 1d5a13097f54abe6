"""Where the entries of a JSON list, or of lines of JSON, begin and end. One pass, little memory.

LLaVA's lists are a gigabyte long. So a file is read once from end to end, every entry is checked to
be JSON and forgotten, and its bytes are found again by their place.
"""

import codecs
import hashlib
import io
import json
import re
import sys
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

# Quotes that JSON does not know.
_QUOTES = set("'`‘’‚‛“”„«»")


class _Broken(Exception):
    """Not JSON, at a byte. mend: what to do, where that is known."""

    def __init__(self, byte: int, reason: str, mend: str = ""):
        super().__init__(reason)
        self.byte = byte
        self.mend = mend


def _offence(text: str, start: int, byte: int, error: Exception) -> _Broken:
    """What in a text is not JSON. start: where its value begins, which is at that byte."""
    at, reason, mend = start, str(error), ""
    if isinstance(error, json.JSONDecodeError):
        at, reason = error.pos, error.msg
        if text[at : at + 1] in _QUOTES:
            mend = "JSON's quotes are double, as json.dumps writes them"
    elif isinstance(error, ValueError):
        # The decoder does not say where; it is the first that is outside of a text.
        digits = sys.get_int_max_str_digits() or 10**9  # 0: there is no limit
        for found in _unreadable(digits).finditer(text, start):
            if found["word"] or found["digits"]:
                at = found.start()
                reason, mend = f"a number of more than {digits} digits", "write it as a text"
                if found["word"]:
                    reason = f"{found['word']} is not JSON"
                    mend = "write null instead, or leave the key out"
                break
    return _Broken(byte + len(text[start:at].encode()), reason, mend)


def _unreadable(digits: int) -> re.Pattern[str]:
    """Texts, to step over them, and what is well formed but no value to the decoder."""
    return re.compile(
        r'"(?:[^"\\]++|\\.)*+"|(?P<word>-?Infinity|NaN)'
        rf"|(?<![\w.+-])(?P<digits>-?[0-9]{{{digits + 1},}}+)(?![.eE])",
        re.DOTALL,
    )


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
            line, rest = _line_and_rest(self._path, error.byte)
            mend = error.mend or _if_cut(error, rest)
            raise ValueError(
                f"got {self._path}, not JSON at byte {error.byte} (line {line}, entry {number} "
                f"counted from 0): {error}; expected a JSON list, or JSON Lines"
                + (f": {mend}" if mend else "")
            ) from error
        self.sha256 = hashed.sha256.hexdigest()


def _line_and_rest(path: str, byte: int) -> tuple[int, bytes]:
    """Of a byte: the line it is in, and the front of what follows."""
    line = 1
    with files.path(path).open("rb") as file:
        while byte > 0 and (chunk := file.read(min(byte, _CHUNK_BYTES))):
            line += chunk.count(b"\n")
            byte -= len(chunk)
        return line, file.read(2**16)


def _if_cut(error: _Broken, rest: bytes) -> str:
    """A hint where the file seems to break off. rest: what begins with the error."""
    rest = rest.strip(_BLANKS)
    ends_open = len(rest) <= _CUT and rest[-1:] not in (b"]", b"}")
    if ends_open or str(error).startswith("Unterminated string"):
        return "was the file copied whole?"
    return ""


def parse(text: str) -> object:
    """One value of strict JSON."""
    return _DECODER.decode(text)


def load(path: str) -> tuple[object, str]:
    """All of a small file, and its SHA-256 in hex."""
    data = files.path(path).read_bytes()
    front = len(data) - len(data.removeprefix(_BOM))
    try:
        value = _parse_at(front, data[front:])
    except _Broken as error:
        line = 1 + data.count(b"\n", 0, error.byte)
        mend = error.mend or _if_cut(error, data[error.byte :])
        raise ValueError(
            f"got {path}, not JSON: {error} (line {line})" + (f"; {mend}" if mend else "")
        ) from error
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
                value = _parse_at(start, line)
            except _Broken as error:
                if line.endswith(b"\n") and not line[error.byte - start :].strip():
                    error.mend = "the object goes on in the next line"
                raise
            yield start, stop, value
        start = stop


def _parse_at(byte: int, data: bytes) -> object:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _Broken(byte + error.start, "not UTF-8") from error
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise _offence(text, 0, byte, error) from error


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
        raise _Broken(
            text.byte, "something behind the end of the list", "a list in a file is alone"
        )


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
                    raise _offence(self._text, self._at, self.byte, error) from error
            except (ValueError, RecursionError) as error:
                raise _offence(self._text, self._at, self.byte, error) from error
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
