"""A function in a process of its own, with limits of memory and time: what kills it kills nothing else. And a deadline for
what runs in this process.

The child is started by command, never forked: its parent has threads, and perhaps a GPU.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any

from capray.deadlines import within
from capray.errors import CaprayError

_START_SECONDS = 600.0
_KILL_SECONDS = 10.0
_FAULT_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""What a process dies of by its own doing. The others are sent to it: SIGKILL by a kernel without memory."""
_NO_START = "a child process for careful work cannot be started"


class Crashed(Exception):
    """The child died, or was ended for what it used, while it worked on a value."""


class KilledFromOutside(Crashed):
    """The child was killed by the machine or somebody, whatever it worked on: no proof against the value."""


class CannotStart(RuntimeError):
    """The child cannot be started, whatever it is given: no fault of a value's."""


@contextmanager
def deadline(seconds: float, end: Callable[[str], None]) -> Generator[None]:
    """Calls ``end`` in another thread when the block takes longer: it is for ending the process, for nothing else ends what
    hangs in a device or a library."""
    timer = threading.Timer(seconds, end, [f"took over {seconds:g} seconds"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Isolated:
    """``build(*arguments)``, called in a child process, gives the function that ``call`` calls there.

    Args:
        build: a module's function or a class, by reference.
        seconds: time a call may take.
        memory_bytes: address space of the child; unlimited when None.

    Raises:
        CannotStart: from ``call``.
        CaprayError: from ``call``, as ``build`` raised it.
    """

    def __init__(self, build: Callable[..., Callable], arguments: tuple, seconds: float, memory_bytes: int | None = None):
        self._spec = pickle.dumps((build, arguments, memory_bytes))
        self.seconds = seconds
        self._child: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def call(self, value: Any) -> Any:
        """The function's result for ``value``; what it raises is raised here.

        Raises:
            Crashed: the child died of it, or took too long.
            KilledFromOutside: it was killed while it worked on it.
        """
        if self._child is None:
            self._start()
        assert self._pipe is not None
        try:
            # A value that the child does not take hangs as an answer does that it does not give.
            ok, result = within(self.seconds, partial(_exchange, self._pipe, value))
        except RuntimeError as error:  # No thread can be started.
            self.close()
            raise CannotStart(f"{_NO_START}: {error}") from error
        except TimeoutError:
            self.close()
            raise Crashed(f"took over {self.seconds:g} seconds") from None
        except BaseException as error:
            death = self._death() if isinstance(error, (EOFError, OSError)) else None
            self.close()
            if death is not None:
                raise death from None
            raise
        if ok:
            return result
        if isinstance(result, MemoryError):
            raise Crashed("needs more memory than it may have")
        raise result

    def close(self) -> None:
        if self._child is not None:
            assert self._pipe is not None
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):  # It may hang in the system.
                self._child.wait(_KILL_SECONDS)
            self._pipe.close()
        self._child = self._pipe = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        try:
            ours, theirs = Pipe()
        except OSError as error:
            raise CannotStart(f"{_NO_START}: {error}") from error
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        code = "from capray.captioning.isolation import serve; serve()"
        command = [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())]
        try:
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        except OSError as error:
            ours.close()
            raise CannotStart(f"{_NO_START}: {error}") from error
        finally:
            theirs.close()
        self._pipe = ours
        try:
            ours.send_bytes(self._spec)
            ready = ours.recv() if ours.poll(_START_SECONDS) else f"took over {_START_SECONDS:g} seconds"
        except (EOFError, OSError):
            ready = self._death()
        if ready is not True:
            self.close()
            raise ready if isinstance(ready, CaprayError) else CannotStart(f"{_NO_START}: {ready}")

    def _death(self) -> Crashed:
        assert self._child is not None
        try:
            code = self._child.wait(5)
        except subprocess.TimeoutExpired:
            return Crashed("closed its connection")
        if code >= 0:
            return Crashed(f"ended its process with {code}")
        death = Crashed if -code in _FAULT_SIGNALS else KilledFromOutside
        return death(f"killed its process by {signal.Signals(-code).name}")


def _exchange(pipe: Connection, value: Any) -> Any:
    pipe.send(value)
    return pipe.recv()


def serve() -> None:
    """The child's life: build the function, then answer until the parent is gone."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    pipe = Connection(int(sys.argv[1]))
    build, arguments, memory_bytes = pickle.loads(pipe.recv_bytes())  # noqa: S301 (the parent's own)
    try:
        function = build(*arguments)
    except BaseException as error:
        pipe.send(error if isinstance(error, CaprayError) else f"{type(error).__name__}: {error}")
        return
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    pipe.send(True)
    while True:
        try:
            value = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(value)
        except Exception as error:
            answer = False, error
        try:
            pipe.send(answer)
        except (TypeError, AttributeError, pickle.PicklingError):
            pipe.send((False, RuntimeError(repr(answer[1]))))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, busy as it may be."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
