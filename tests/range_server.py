"""A real HTTP server of files from memory that knows Range and If-Range, and can be told to misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RangeServer(ThreadingHTTPServer):
    """Serves ``files`` (name to bytes) below ``url``, and keeps the headers and status of each request in ``log``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.log: list[tuple[str | None, int]] = []
        self.cut_after: list[int] = []
        """Bodies to cut off after so many bytes, one a request."""
        self.answers: list[int] = []
        """Status codes to answer with before anything is served."""
        self.knows_ranges = True
        self.on_request = lambda: None


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/")
        server.on_request()
        if server.answers:
            return self._end(server.answers.pop(0))
        if name not in server.files:
            return self._end(404)
        data, etag = server.files[name], server.etags.get(name, f'"{hash(server.files[name])}"')
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        start = 0
        if asked and server.knows_ranges and condition in (None, etag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self._end(416, {"Content-Range": f"bytes */{len(data)}"})
        headers = {"Content-Length": str(len(data) - start)}
        if etag:
            headers["ETag"] = etag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._end(206 if start else 200, headers, data[start:])
        return None

    def _end(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.server.log.append((self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in (headers or {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.cut_after:
            self.wfile.write(body[: self.server.cut_after.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
        else:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[RangeServer]:
    server = RangeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
