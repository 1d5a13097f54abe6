"""Google Cloud Storage in memory, on loopback: as much of its JSON API as our clients speak.

gcsfs (behind epath) and TensorStore (behind Orbax) send it what they would send to the real one.
It keeps the promises code may rely on: an upload appears whole, a generation is never given twice,
preconditions hold, and a list is in pages. It keeps a log, and refuses what a test tells it to.
"""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

# A resumable upload answers a part with "go on".
_RESUME = 308


@dataclasses.dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int


@dataclasses.dataclass(frozen=True)
class Call:
    """verb: get, read, list, write, delete, move, copy, compose, bucket or upload. start, stop: the
    bytes a read got. target: of a move or copy."""

    verb: str
    name: str
    start: int = 0
    stop: int = 0
    target: str = ""


class Refused(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class FakeBucket:
    """One bucket. refuse(call): a test's way to make a call fail, by the status it returns."""

    def __init__(self, name: str = "bucket", page: int = 1000):
        self.name, self.page = name, page
        self.objects: dict[str, Stored] = {}
        self.log: list[Call] = []
        self.refuse: Callable[[Call], int | None] = lambda call: None
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._count = itertools.count(1)
        self._lock = threading.RLock()
        self.url = ""

    def reset(self) -> None:
        with self._lock:
            self.objects.clear()
            self.log.clear()
            self.refuse, self.page = lambda call: None, 1000

    def put(self, name: str, data: bytes) -> None:
        """As somebody else would: it is not in the log."""
        with self._lock:
            self._put(name, data, {})

    def calls(self, *verbs: str) -> list[Call]:
        return [call for call in self.log if call.verb in verbs]

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeBucket"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"of": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(
        self, method: str, url: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for one request."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        # Names are quoted, so what is between the slashes is split before it is unquoted.
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        upload = words[0] == "upload"
        words = words[words.index("b") + 1 :]
        with self._lock:
            if words[0] != self.name:
                raise Refused(404, f"no such bucket: {words[0]}")
            match (method, words[1:]):
                case ("GET", []):
                    self._note(Call("bucket", ""))
                    return _json({"kind": "storage#bucket", "name": self.name, "id": self.name})
                case ("GET", ["o"]):
                    return self._list(query)
                case ("GET", ["o", name]):
                    return self._get(name, query, headers)
                case ("DELETE", ["o", name]):
                    self._note(Call("delete", name))
                    self._check(name, query)
                    self._existing(name)
                    del self.objects[name]
                    return 204, {}, b""
                case (_, ["o"]) if upload:
                    return self._upload(method, query, headers, body)
                case ("POST", ["o", name, "compose"]):
                    self._note(Call("compose", name))
                    sources = json.loads(body)["sourceObjects"]
                    whole = b"".join(self._existing(source["name"]).data for source in sources)
                    return self._put(name, whole, query)
                case ("POST", ["o", name, "moveTo", "o", target]):
                    return self._copy("move", name, target, query)
                case ("POST", ["o", name, ("rewriteTo" | "copyTo") as how, "b", _, "o", target]):
                    status, replied, made = self._copy("copy", name, target, query)
                    if how == "copyTo":
                        return status, replied, made
                    return _json({"done": True, "resource": json.loads(made)})
        raise Refused(501, f"not in {__name__}: {method} {url}")

    def _note(self, call: Call) -> None:
        self.log.append(call)
        if status := self.refuse(call):
            raise Refused(status, f"the test refuses to {call.verb} {call.name}")

    def _existing(self, name: str) -> Stored:
        if name not in self.objects:
            raise Refused(404, f"No such object: {self.name}/{name}")
        return self.objects[name]

    def _check(self, name: str, query: dict[str, str]) -> None:
        """Preconditions; generation 0 is that of what does not exist."""
        now = self.objects[name].generation if name in self.objects else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            raise Refused(412, f"{name} is of generation {now}")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise Refused(304, f"{name} is of generation {now} still")

    def _put(
        self, name: str, data: bytes, query: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        self._check(name, query)
        self.objects[name] = Stored(data, next(self._count))
        return _json(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        stored = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(stored.data, usedforsecurity=False).digest()).decode()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.name,
            "generation": str(stored.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "size": str(len(stored.data)),
            "md5Hash": md5,
            "timeCreated": "2020-01-01T00:00:00.000Z",
            "updated": "2020-01-01T00:00:00.000Z",
        }

    def _get(
        self, name: str, query: dict[str, str], headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        if query.get("alt") != "media":
            self._note(Call("get", name))
            self._existing(name)
            return _json(self._described(name))
        # Found first, so that the log says which bytes went out.
        stored = self.objects.get(name)
        size = len(stored.data) if stored else 0
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
        start, stop = 0, size
        if asked and asked[1]:
            start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
        elif asked:
            start = max(size - int(asked[2]), 0)
        self._note(Call("read", name, start, stop))
        self._existing(name)
        self._check(name, query)
        assert stored is not None
        replied = {"x-goog-generation": str(stored.generation)}
        if not asked:
            return 200, replied, stored.data
        if start >= size:
            raise Refused(416, f"InvalidRange: {name} has {size} bytes")
        replied["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, replied, stored.data[start:stop]

    def _list(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        self._note(Call("list", prefix))
        begin, end = query.get("startOffset", ""), query.get("endOffset")
        entries: dict[str, bool] = {}  # by name, in order: is it a prefix?
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < begin or (end and name >= end):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entries[prefix + head + cut if cut else name] = bool(cut)
        # The token is the last name that was given out.
        left = [name for name in entries if name > query.get("pageToken", "")]
        now = left[: min(self.page, int(query.get("maxResults", 1000)))]
        found: dict[str, Any] = {
            "kind": "storage#objects",
            "prefixes": [name for name in now if entries[name]],
            "items": [self._described(name) for name in now if not entries[name]],
        }
        if len(now) < len(left):
            found["nextPageToken"] = now[-1]
        return _json(found)

    def _copy(
        self, verb: str, name: str, target: str, query: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        self._note(Call(verb, name, target=target))
        reply = self._put(target, self._existing(name).data, query)
        if verb == "move":
            del self.objects[name]
        return reply

    def _upload(
        self, method: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if (token := query.get("upload_id", "")) in self._uploads:
            return self._go_on(method, token, headers, body)
        name = query.get("name", "")
        match query.get("uploadType"):
            case "media":
                self._note(Call("write", name))
                return self._put(name, body, query)
            case "multipart":
                about, data = _two_parts(headers["content-type"], body)
                name = name or about["name"]
                self._note(Call("write", name))
                return self._put(name, data, query)
            case "resumable":
                name = name or json.loads(body)["name"]
                self._note(Call("upload", name))
                token = f"upload-{next(self._count)}"
                self._uploads[token] = name, query, bytearray()
                place = f"{self.url}/upload/storage/v1/b/{self.name}/o?upload_id={token}"
                return 200, {"Location": place}, b""
        raise Refused(400, f"uploadType is {query.get('uploadType')}")

    def _go_on(
        self, method: str, token: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """The next part of a resumable upload; the object is there when its size is known."""
        name, query, held = self._uploads[token]
        if method == "DELETE":
            del self._uploads[token]
            return 499, {}, b""
        held += body
        if not headers.get("content-range", "").endswith("/*"):
            self._note(Call("write", name))
            del self._uploads[token]
            return self._put(name, bytes(held), query)
        return _RESUME, {"Range": f"bytes=0-{len(held) - 1}"} if held else {}, b""


class _Handler(BaseHTTPRequestHandler):
    of: FakeBucket
    protocol_version = "HTTP/1.1"
    # Headers and body leave as one packet: two would wait for each other, 40 ms each time.
    wbufsize = -1
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            status, replied, data = self.of.answer(self.command, self.path, headers, body)
        except Refused as refused:
            error = {"error": {"code": refused.status, "message": str(refused)}}
            status, replied, data = refused.status, {}, json.dumps(error).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **replied}.items():
            self.send_header(name, value)
        if status in (204, 304):  # must have no body
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def handle(self) -> None:
        # A client that ends closes its connections without a word.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _json(value: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(value).encode()


def _two_parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The description and the data of a multipart upload. By hand: email's parser would change
    line ends inside the data."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    assert boundary, content_type
    mark = b"--" + boundary[1].encode()
    _, about, rest = body.split(mark, 2)
    blank = re.compile(rb"\r?\n\r?\n")
    data = blank.split(rest[: rest.rindex(b"\n" + mark)], maxsplit=1)[1]
    return json.loads(blank.split(about, maxsplit=1)[1]), data
