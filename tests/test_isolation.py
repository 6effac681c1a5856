"""What kills an isolated function kills nothing else, and is told."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from capray.captioning import isolation
from capray.captioning.isolation import CannotStart, Crashed, Isolated, KilledFromOutside
from capray.errors import CheckpointError

MEMORY = 2**30


class Doer:
    """Does what it is told, in the child."""

    def __init__(self, factor: int = 1):
        self.factor = factor

    def __call__(self, value):
        what, *rest = value if isinstance(value, tuple) else ("multiply", value)
        return getattr(self, what)(*rest)

    def multiply(self, value):
        return value * self.factor

    def pid(self):
        return os.getpid()

    def kill(self, number):
        os.kill(os.getpid(), number)
        time.sleep(10)

    def fault(self):
        import ctypes

        ctypes.string_at(0)

    def leave(self, code):
        os._exit(code)

    def exit(self):
        sys.exit(3)

    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"

    def fill(self, size):
        return len(bytearray(size))

    def fail(self):
        from capray.images import ImageError

        raise ImageError("truncated", "cut off")

    def unpicklable(self):
        return lambda: None

    def fail_unpicklable(self):
        error = ValueError("odd")
        error.extra = lambda: None
        raise error

    def fail_in_a_way_that_cannot_be_rebuilt(self):
        raise Odd("a", "b")


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def no_function():
    raise ValueError("cannot build")


def no_model():
    raise CheckpointError("no such model")


def dies_at_once():
    os._exit(7)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def child():
    with Isolated(Doer, (3,), seconds=20, memory_bytes=MEMORY) as isolated:
        yield isolated


class TestResults:
    def test_pass_through(self, child):
        assert child.call(2) == 6
        assert child.call(b"\0\1") == b"\0\1" * 3
        assert len(child.call(b"x" * 10_000_000)) == 30_000_000
        assert child.call(("pid",)) == child.call(("pid",)) != os.getpid()

    def test_so_do_exceptions(self, child):
        from capray.images import ImageError

        pid = child.call(("pid",))
        with pytest.raises(ImageError) as caught:
            child.call(("fail",))
        assert (caught.value.kind, caught.value.message) == ("truncated", "cut off")
        assert child.call(("pid",)) == pid, "an exception ends nobody"

    @pytest.mark.parametrize("what", ["unpicklable", "fail_unpicklable"])
    def test_what_cannot_travel_is_an_error_and_no_more(self, child, what):
        with pytest.raises(RuntimeError, match="lambda|odd"):
            child.call((what,))
        assert child.call(2) == 6

    def test_an_exception_that_cannot_be_rebuilt(self, child):
        with pytest.raises(Exception, match="Odd|argument"):
            child.call(("fail_in_a_way_that_cannot_be_rebuilt",))
        assert child.call(2) == 6


class TestDeaths:
    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (("kill", signal.SIGBUS), "SIGBUS"),
            (("kill", signal.SIGABRT), "SIGABRT"),
            (("fault",), "SIGSEGV"),
            (("leave", 7), "ended its process with 7"),
            (("exit",), "ended its process with 3"),
            (("fill", 2 * MEMORY), "more memory"),
        ],
    )
    def test_the_reason_is_told_and_the_next_call_works(self, child, value, reason):
        with pytest.raises(Crashed, match=reason) as death:
            child.call(value)
        assert type(death.value) is Crashed
        assert child.call(2) == 6

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_from_outside_are_told_from_those_of_a_value(self, child, number):
        with pytest.raises(KilledFromOutside, match=number.name):
            child.call(("kill", number))
        assert child.call(2) == 6

    def test_over_the_time_limit(self):
        with Isolated(Doer, (3,), seconds=0.5) as child:
            pid = child.call(("pid",))
            began = time.monotonic()
            with pytest.raises(Crashed, match=r"took over 0\.5 seconds"):
                child.call(("sleep", 30))
            assert time.monotonic() - began < 10
            assert not is_alive(pid)
            assert child.call(2) == 6

    def test_a_child_that_takes_no_value(self):
        with Isolated(Doer, (3,), seconds=0.5) as child:
            os.kill(child.call(("pid",)), signal.SIGSTOP)
            with pytest.raises(Crashed, match=r"took over 0\.5 seconds"):
                child.call(b"x" * 10_000_000)
            assert child.call(2) == 6

    def test_that_come_between_two_calls(self, child):
        pid = child.call(("pid",))
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(KilledFromOutside, match="SIGKILL"):
            child.call(2)
        assert child.call(2) == 6

    def test_a_value_larger_than_its_memory(self):
        with Isolated(Doer, (1,), seconds=20, memory_bytes=300 * 2**20) as child:
            with pytest.raises(Crashed):
                child.call(b"x" * (400 * 2**20))
            assert child.call(2) == 2


class TestStarting:
    @pytest.mark.parametrize(
        ("build", "reason"), [(no_function, "ValueError: cannot build"), (dies_at_once, "ended its process with 7")]
    )
    def test_a_child_that_cannot_start(self, build, reason):
        child = Isolated(build, (), seconds=5)
        with pytest.raises(CannotStart, match=f"cannot be started: .*{reason}"):
            child.call(1)
        assert child._child is None

    def test_an_error_of_ours_is_told_as_it_is(self):
        with pytest.raises(CheckpointError, match="^no such model$"):
            Isolated(no_model, (), seconds=5).call(1)

    def test_no_interpreter(self, monkeypatch):
        monkeypatch.setattr(isolation.sys, "executable", "/nowhere/python")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(CannotStart):
            Isolated(Doer, (), seconds=5).call(1)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= len(before)

    def test_no_file_handles_and_no_threads(self, monkeypatch):
        """No fault of a value's, and no verdict on an image."""

        def none_left(*arguments):
            raise OSError(errno.EMFILE, "Too many open files")

        def no_thread(*arguments):
            raise RuntimeError("can't start new thread")

        for name, failure in (("Pipe", none_left), ("within", no_thread)):
            with monkeypatch.context() as patched, Isolated(Doer, (3,), seconds=5) as child:
                patched.setattr(isolation, name, failure)
                with pytest.raises(CannotStart):
                    child.call(1)

    def test_one_that_never_answers(self, monkeypatch):
        monkeypatch.setattr(isolation, "_START_SECONDS", 0.3)
        with pytest.raises(CannotStart, match="took over"):
            Isolated(time.sleep, (30,), seconds=5).call(1)


class TestNoneIsLeft:
    def test_after_close(self):
        with Isolated(Doer, (), seconds=20) as child:
            pid = child.call(("pid",))
            assert is_alive(pid)
        assert not is_alive(pid)
        child.close()

    def test_an_unused_one_starts_none(self):
        with Isolated(no_function, (), seconds=20) as child:
            assert child._child is None

    @pytest.mark.parametrize("meanwhile", ["time.sleep(30)", "child.call(('sleep', 60))"])
    def test_when_the_parent_is_killed(self, meanwhile):
        """Not even one that is busy, and would be so for ever in a wedged device."""
        code = (
            "from capray.captioning.isolation import Isolated; from tests.test_isolation import Doer; import time\n"
            f"child = Isolated(Doer, (), 80); print(child.call(('pid',)), flush=True); {meanwhile}"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
            parent.kill()
        deadline = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(pid)
