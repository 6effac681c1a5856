"""A proxy that stands between a client and an S3 server and breaks a share of what passes, as networks and stores do.

It knows HTTP, and S3's error bodies; nothing of capray. Requests go on as they came (path and Host header unchanged, so
that signatures hold). At most one fault per request, drawn from a seeded generator:

    read.*  (GET, HEAD)   503 500 reset silent stall denied archived skewed expired expired_403   reset_body truncate
    write.* (the others)  503 500 reset silent stall denied archived skewed expired expired_403   lose_answer drop

``503`` SlowDown; ``500`` InternalError; ``reset`` RST before an answer; ``silent`` no answer for ``stall_seconds``;
``stall`` a pause of ``stall_seconds`` in mid-body (writes: before the answer); ``denied`` AccessDenied; ``archived``
InvalidObjectState; ``skewed`` RequestTimeTooSkewed; ``expired`` ExpiredToken with S3's status 400, ``expired_403`` with
403; ``reset_body`` RST in mid-body; ``truncate`` half of the announced body, then the end; ``lose_answer`` done upstream,
then closed without an answer; ``drop`` closed without being forwarded. All but ``stall``, ``reset_body``, ``truncate`` and
``lose_answer`` never reach the server.

    python -m tests.proxy --upstream http://127.0.0.1:8333 --port 9000 --rate read.503=0.05 --rate write.reset=0.02
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_ERRORS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "archived": (403, "InvalidObjectState", "The operation is not valid for the object's storage class."),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "expired_403": (403, "ExpiredToken", "The provided token has expired."),
}
_ANY = (*_ERRORS, "reset", "silent", "stall")
FAULTS = (
    *(f"read.{name}" for name in (*_ANY, "reset_body", "truncate")),
    *(f"write.{name}" for name in (*_ANY, "lose_answer", "drop")),
)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "te", "upgrade"}


class FaultyProxy:
    """The proxy, running in threads of this process as long as the context is open.

    ``rates`` may be changed at any time; ``only`` limits faults to unquoted paths (``/bucket/key``) it is found in.
    ``requests`` counts what came by method, ``injected`` what was broken, ``targets`` the raw request targets.
    """

    def __init__(
        self,
        upstream: str,
        rates: Mapping[str, float] | None = None,
        *,
        only: str = "",
        seed: int = 0,
        port: int = 0,
        stall_seconds: float = 30,
    ):
        parts = urlsplit(upstream)
        assert parts.hostname and parts.port, upstream
        self.upstream = (parts.hostname, parts.port)
        self.rates: dict[str, float] = {}
        self.set_rates(rates or {})
        self.only = only
        self.stall_seconds = stall_seconds
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.targets: list[str] = []
        self.closing = threading.Event()
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Replace all rates; what is not named has none."""
        unknown = set(rates) - set(FAULTS)
        if unknown:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
        self.rates = dict(rates)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def draw(self, method: str, target: str) -> str | None:
        """Count a request and choose what becomes of it: one of the faults without its prefix, or None."""
        side = "read." if method in ("GET", "HEAD") else "write."
        with self._lock:
            self.requests[method] += 1
            self.targets.append(target)
            if not re.search(self.only, unquote(target.partition("?")[0])):
                return None
            chance = self._rng.random()
            for name, rate in self.rates.items():
                if not name.startswith(side):
                    continue
                chance -= rate
                if chance < 0:
                    self.injected[name] += 1
                    return name.removeprefix(side)
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    proxy: FaultyProxy

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _upstream: http.client.HTTPConnection | None = None

    def log_message(self, format, *args):
        pass

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        super().finish()

    def _pass(self) -> None:
        proxy = self.server.proxy
        body = self._body()
        fault = proxy.draw(self.command, self.path)
        if fault in _ERRORS:
            return self._error(*_ERRORS[fault])
        if fault == "reset":
            return self._reset()
        if fault in ("silent", "drop"):
            if fault == "silent":
                proxy.closing.wait(proxy.stall_seconds)
            self.close_connection = True
            return None
        head, answer = self._forward(body)
        if fault == "lose_answer":
            self.close_connection = True
            return None
        if fault is None:
            self.wfile.write(head + answer)
            return None
        half = len(answer) // 2
        if self.command not in ("GET", "HEAD"):
            proxy.closing.wait(proxy.stall_seconds)
            half = 0
        self.wfile.write(head + answer[:half])
        if fault == "stall":
            proxy.closing.wait(proxy.stall_seconds)
            self.wfile.write(answer[half:])
        elif fault == "reset_body":
            self._reset()
        else:
            self.close_connection = True
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[bytes, bytes]:
        """The server's answer: its head and its body. A connection that it closed while idle is opened again."""
        fresh = self._upstream is None
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=120)
        upstream = self._upstream
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            answer = response.read()
        except (http.client.HTTPException, OSError):
            upstream.close()
            self._upstream = None
            if fresh:
                raise
            return self._forward(body)
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(answer))
        if length is not None and response.status != 204:
            lines.append(f"Content-Length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), answer

    def _error(self, status: int, code: str, message: str) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write((head + ("" if self.command == "HEAD" else body)).encode())

    def _reset(self) -> None:
        """Close with RST: nothing may be left to be sent, and no half of the connection be shut down before."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A proxy before an S3 server that injects faults.")
    parser.add_argument("--upstream", required=True, help="the server's endpoint, http://host:port")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression: break only paths (/bucket/key) it is found in")
    parser.add_argument("--stall-seconds", type=float, default=30)
    parser.add_argument("--rate", action="append", default=[], metavar="FAULT=SHARE", help=", ".join(FAULTS))
    args = parser.parse_args()
    rates = {name: float(share) for name, _, share in (rate.partition("=") for rate in args.rate)}
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    options = {"only": args.only, "seed": args.seed, "port": args.port, "stall_seconds": args.stall_seconds}
    with FaultyProxy(args.upstream, rates, **options) as proxy:
        print(proxy.endpoint, flush=True)
        stop.wait()
    print(json.dumps({"requests": proxy.requests, "injected": proxy.injected}), flush=True)


if __name__ == "__main__":
    main()
