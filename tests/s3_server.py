"""A folder as a bucket of an S3 server on this machine: enough of the protocol to read and write, and faults
on request."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server(ThreadingHTTPServer):
    """Serves ``folder`` as the bucket ``bucket``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults = 0
        """Requests that are answered with 503 from now on."""
        self.denied = False
        """Whether every request is answered with 403."""
        self.stalls = 0
        """Requests that are not answered for a minute, from now on."""
        self.closed = threading.Event()
        self.requests: Counter[str] = Counter()
        """GET requests of each object, with their ranges."""

    def address(self, name: str = "") -> str:
        """Where pyarrow finds a part of the bucket."""
        return f"s3://bucket/{name}?endpoint_override=http://127.0.0.1:{self.server_port}&region=us-east-1&scheme=http"


class _Handler(BaseHTTPRequestHandler):
    server: S3Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        content = self._content()
        if self._fails():
            return None
        name, query = self._asked()
        path = self.server.folder / name
        if "uploadId" in query:
            path = self._part(name, int(query["partNumber"][0]))
        if name.endswith("/") or not name:  # a mark for a folder, or the bucket itself
            return self._answer(200, b"", {})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self._answer(200, b"", {})

    def do_POST(self) -> None:
        content = self._content()
        if self._fails():
            return None
        name, query = self._asked()
        if "uploads" in query:
            return self._answer(
                200,
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
                {},
            )
        parts = [self._part(name, number + 1) for number in range(content.count(b"<PartNumber>"))]
        path = self.server.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        return self._answer(
            200, b"<CompleteMultipartUploadResult><ETag>0</ETag></CompleteMultipartUploadResult>", {}
        )

    def do_DELETE(self) -> None:
        self._answer(204, b"", {})

    def _part(self, name: str, number: int) -> Path:
        return self.server.folder / f"{name}.part-{number}"

    def _content(self) -> bytes:
        """What a request brings, out of the pieces that it may come in."""
        content = (
            self._chunks()
            if "Transfer-Encoding" in self.headers
            else self.rfile.read(int(self.headers["Content-Length"]))
        )
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return content
        whole, rest = b"", content
        while rest:
            size, rest = rest.split(b"\r\n", 1)
            length = int(size.split(b";")[0], 16)
            if length == 0:
                break
            whole, rest = whole + rest[:length], rest[length + 2 :]
        return whole

    def _chunks(self) -> bytes:
        whole = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            whole += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        """The object of a request, and its query."""
        parts = urlsplit(self.path)
        return unquote(parts.path).removeprefix("/bucket").lstrip("/"), parse_qs(
            parts.query, keep_blank_values=True
        )

    def _fails(self) -> bool:
        """Whether this request was answered with a fault."""
        if self.server.stalls > 0:
            self.server.stalls -= 1
            self.server.closed.wait(60)
        if self.server.denied:
            self._error(403, "AccessDenied")
            return True
        if self.server.faults > 0:
            self.server.faults -= 1
            self._error(503, "SlowDown")
            return True
        return False

    def do_GET(self) -> None:
        if self._fails():
            return None
        name, query = self._asked()
        if "list-type" in query:
            return self._list(query["prefix"][0] if "prefix" in query else "", "delimiter" in query)
        path = self.server.folder / name
        if not path.is_file():
            return self._error(404, "NoSuchKey")
        data = path.read_bytes()
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.server.requests[f"{name} {asked or 'all'}"] += 1
        if asked is None:
            return self._answer(200, data, {"Accept-Ranges": "bytes"})
        first, last = asked.removeprefix("bytes=").split("-")
        if int(first) >= len(data):
            return self._error(416, "InvalidRange")
        part = data[int(first) : int(last or len(data)) + 1]
        return self._answer(
            206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
        )

    def _list(self, prefix: str, one_level: bool) -> None:
        names = [
            (Path(parent) / file).relative_to(self.server.folder).as_posix()
            for parent, _, files in os.walk(self.server.folder)
            for file in files
        ]
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(self.server.folder / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in sorted(names)
            if name.startswith(prefix) and not (one_level and "/" in name[len(prefix) :])
        )
        self._answer(
            200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode(), {}
        )

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "ETag": '"0"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """The server, as long as it is needed."""
    server = S3Server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()
