"""A model of S3 in memory, behind fsspec as ``model://``, for tests that break it at any request.

It knows S3's promises: a PUT is atomic, readers and listings see it at once, there is no rename, conditions are honoured
(or, for tests of the refusal, are not). Requests are numbered, and what happens at a number can be chosen: see ``Fault``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum

import fsspec
from botocore.exceptions import ClientError
from fsspec.spec import AbstractFileSystem
from s3fs.errors import translate_boto_error


class Crash(BaseException):
    """The process ended here. Nothing may catch it but a test."""


class Fault(Enum):
    """What happens to one request."""

    CRASH_BEFORE = "the process ends before the server has the request"
    CRASH_AFTER = "the server did it or refused, the process ends before the answer"
    FAILS = "an error, and nothing was done"
    ANSWER_LOST = "it was done, and the client raises"
    ANSWER_LOST_AND_ASKED_AGAIN = "it was done, and the client asks again, as botocore does"


class Store:
    """The server: objects by path, and a log of what was committed.

    Args:
        honours: "both" conditions, "neither", "create" alone, or "racy": it looks first and writes later.
    """

    def __init__(self, honours: str = "both", has_conditional_delete: bool = True):
        self.honours, self.has_conditional_delete = honours, has_conditional_delete
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        """The path of every PUT that was committed."""
        self.requests: list[tuple[str, str]] = []
        """Verb and path of every request that was sent."""
        self.faults: dict[int, Fault] = {}
        """By the number of a request, what happens to it."""
        self.write_fault: tuple[str, Fault] | None = None
        """What happens to the first PUT or DELETE whose path has that pattern in it."""
        self.after_write: Callable[[], None] = lambda: None
        """Called when one was committed."""
        self.is_process_dead = False
        self.answers = threading.Event()
        """Cleared, the server takes requests and says nothing."""
        self.answers.set()
        self._lock = threading.RLock()

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def request(self, verb: str, path: str, action):
        """What ``action`` returns, unless a fault is due."""
        self.answers.wait()
        with self._lock:
            fault = self.faults.get(self.num_requests)
            self.requests.append((verb, path))
            if verb in ("PUT", "DELETE") and self.write_fault and re.search(self.write_fault[0], path):
                (_, fault), self.write_fault = self.write_fault, None
        if self.is_process_dead:
            raise Crash
        if fault is Fault.FAILS:
            raise OSError(errno.EBUSY, "Please reduce your request rate")
        if fault is Fault.CRASH_BEFORE:
            self.is_process_dead = True
            raise Crash
        try:
            answer = action()
        finally:
            if fault is Fault.CRASH_AFTER:
                self.is_process_dead = True
                raise Crash
        if fault is Fault.ANSWER_LOST:
            raise TimeoutError("Read timeout on endpoint")
        return action() if fault is Fault.ANSWER_LOST_AND_ASKED_AGAIN else answer

    def put(self, path: str, data: bytes, if_none_match: str | None = None, if_match: str | None = None) -> str:
        with self._lock:
            self._check(path, if_none_match, if_match)
        if self.honours == "racy":
            time.sleep(0.02)
        with self._lock:
            self.objects[path] = data
            self.log.append(path)
            self.after_write()
            return self.etag(path)

    def delete(self, path: str, if_match: str | None = None) -> None:
        with self._lock:
            if if_match is not None:
                if not self.has_conditional_delete:
                    raise refusal("NotImplemented")
                self._check(path, None, if_match)
            self.objects.pop(path, None)
            self.after_write()

    def _check(self, path: str, if_none_match: str | None, if_match: str | None) -> None:
        if self.honours == "neither":
            return
        if if_none_match == "*" and path in self.objects:
            raise refusal("PreconditionFailed")
        if if_match is not None and self.honours != "create":
            if path not in self.objects:
                raise refusal("NoSuchKey")
            if self.etag(path) != if_match:
                raise refusal("PreconditionFailed")

    def get(self, path: str) -> bytes:
        with self._lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path]

    def etag(self, path: str) -> str:
        return f'"{hashlib.md5(self.get(path)).hexdigest()}"'


def refusal(code: str) -> OSError:
    """What s3fs raises for an error the server answers with."""
    error = {"Code": code, "Message": f"the server says {code}"}
    return translate_boto_error(ClientError({"Error": error}, "PutObject"))


class ModelFileSystem(AbstractFileSystem):
    """The client. All of its instances talk to ``ModelFileSystem.store``."""

    protocol = "model"
    store = Store()

    def call_s3(self, method: str, Bucket: str, Key: str, Body: bytes = b"", **conditions: str) -> dict:
        path, store = f"{Bucket}/{Key}", self.store
        if_match = conditions.pop("IfMatch", None)
        if method == "put_object":
            if_none_match = conditions.pop("IfNoneMatch", None)
            assert not conditions
            return {"ETag": store.request("PUT", path, lambda: store.put(path, Body, if_none_match, if_match))}
        assert not conditions
        if method == "head_object":
            return {"ETag": store.request("HEAD", path, lambda: store.etag(path))}
        assert method == "delete_object"
        store.request("DELETE", path, lambda: store.delete(path, if_match))
        return {}

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs) -> None:
        path = self._strip_protocol(path)
        self.store.request("PUT", path, lambda: self.store.put(path, value))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs) -> bytes:
        path = self._strip_protocol(path)
        return self.store.request("GET", path, lambda: self.store.get(path))[start:end]

    def _open(self, path: str, mode: str = "rb", **kwargs) -> io.BytesIO:
        assert mode == "rb", "streaming into an object publishes half of it when something fails"
        return io.BytesIO(self.cat_file(path))

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self.store.request("DELETE", path, lambda: self.store.delete(path))

    _rm = rm_file

    def mv(self, *args, **kwargs):
        raise AssertionError("S3 has no rename")

    def ls(self, path: str, detail: bool = True, **kwargs) -> list:
        path = self._strip_protocol(path).rstrip("/")
        found = self.store.request("LIST", path, lambda: self._list(path))
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [info["name"] for info in found]

    def _list(self, path: str) -> list[dict]:
        infos = {}
        for name, data in sorted(self.store.objects.items()):
            if name == path:
                return [{"name": name, "size": len(data), "type": "file"}]
            if name.startswith(f"{path}/"):
                head, _, tail = name[len(path) + 1 :].partition("/")
                child = f"{path}/{head}"
                infos[child] = {
                    "name": child,
                    "size": 0 if tail else len(data),
                    "type": "directory" if tail else "file",
                    "ETag": None if tail else self.store.etag(child),
                }
        return list(infos.values())

    def modified(self, path: str) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def created(self, path: str) -> datetime:
        return self.modified(path)


fsspec.register_implementation("model", ModelFileSystem, clobber=True)
