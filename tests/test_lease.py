"""One writer per output: who gets the lease, who is turned away, and when a dead owner's is taken over."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from capray import deadlines
from capray.captioning import lease as lease_module
from capray.captioning import lease_file
from capray.captioning.lease import Claim, Lease
from capray.captioning.lease_file import NUM_PROBES, is_on_local_disk
from capray.errors import CaprayError, LeaseHeldError, StorageError, WriteUnanswered
from capray.storage import Location, exists, locate, read_bytes, write_atomic
from tests.model_store import Fault, ModelFileSystem, Store, refusal

RENEW, EXPIRY = 0.1, 1.5
OLDER = {"token": "another", "host": "elsewhere", "boot": "b n", "pid": 1, "sequence": 7, "started": 1, "ray_job": None}
"""What versions before the kernel's lock write."""


@pytest.fixture
def share(tmp_path, monkeypatch) -> Location:
    """A folder whose file system other machines may write, too."""
    monkeypatch.setattr(lease_module, "is_on_local_disk", lambda folder: False)
    return locate(str(tmp_path / "_capray"))


@pytest.fixture
def disk(tmp_path) -> Location:
    return locate(str(tmp_path / "_capray"))


@pytest.fixture
def bucket(s3, tmp_path) -> Location:
    return locate(f"{s3}/{tmp_path.name}/_capray")


@pytest.fixture(params=["disk", "share", "bucket"])
def folder(request) -> Location:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["share", "bucket"])
def shared(request) -> Location:
    """Where no kernel tells who lives."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def model(monkeypatch) -> Location:
    """A folder on a store that is not yet known to honour conditions."""
    monkeypatch.setattr(lease_file, "_proved", set())
    monkeypatch.setattr(ModelFileSystem, "store", Store())
    return locate("model://bucket/out/_capray")


@pytest.fixture
def proved(model) -> Location:
    """A folder on a store that is known to honour conditions: taking a lease there is its first request."""
    lease_file._proved.add((model.fs, "bucket"))
    return model


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The lease's clock, which stands still but while it sleeps."""
    clock = SimpleNamespace(now=1000.0, CLOCK_MONOTONIC=0)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep, clock.clock_gettime = sleep, lambda number: clock.now
    monkeypatch.setattr(lease_module, "time", clock)
    monkeypatch.setattr(deadlines, "time", clock)
    return clock


def lease_on(folder: Location, **settings) -> Lease:
    return Lease(folder, **{"renew_seconds": RENEW, "expiry_seconds": EXPIRY, **settings})


def write_claim(folder: Location, **values) -> None:
    """Leave a lease file as another run would."""
    write_atomic(folder.join("lease.json"), json.dumps({**OLDER, **values}).encode())


def read_claim(folder: Location) -> dict:
    return json.loads(read_bytes(folder.join("lease.json")))


def wait_until_lost(lease: Lease) -> LeaseHeldError:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            lease.check()
        except LeaseHeldError as error:
            return error
        time.sleep(0.02)
    raise AssertionError("the loss was never noticed")


def test_taken_renewed_and_released(folder):
    with lease_on(folder) as lease:
        first = read_claim(folder)
        assert (first["token"], first["pid"]) == (lease.claim.token, os.getpid())
        deadline = time.monotonic() + 5
        while read_claim(folder)["sequence"] <= first["sequence"]:
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.02)
        lease.check()
    assert not exists(folder.join("lease.json"))
    with pytest.raises(ZeroDivisionError), lease_on(folder):
        raise ZeroDivisionError
    assert not exists(folder.join("lease.json"))


def test_nothing_may_be_written_before_and_after(folder):
    lease = lease_on(folder)
    with pytest.raises(LeaseHeldError, match="never taken"):
        lease.check()
    with lease:
        lease.check()
    with pytest.raises(LeaseHeldError, match="released"):
        lease.check()


def test_exactly_one_of_many_gets_in(folder):
    start, decided, over = threading.Barrier(8), threading.Semaphore(0), threading.Event()
    held, refused = [], []

    def take():
        start.wait()
        try:
            with lease_on(folder, expiry_seconds=10) as lease:
                held.append(lease)
                decided.release()
                over.wait(30)
        except Exception as error:
            refused.append(error)
            decided.release()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert decided.acquire(timeout=30), "some neither got in nor were refused"
    assert len(held) == 1
    over.set()
    for thread in threads:
        thread.join()
    assert [type(error) for error in refused] == [LeaseHeldError] * 7
    assert not exists(folder.join("lease.json"))


def test_what_one_write_may_take(disk, bucket):
    with lease_on(disk, publish_seconds=1) as lease:
        assert lease.margin_seconds == lease_module.LOCKED_MARGIN_SECONDS
    with lease_on(bucket, publish_seconds=1, expiry_seconds=10) as lease:
        assert lease.margin_seconds == 9


def test_which_file_systems_are_local(tmp_path):
    assert is_on_local_disk(str(tmp_path))
    assert not is_on_local_disk("/proc")
    assert not is_on_local_disk(str(tmp_path / "nothing"))


class TestAnotherRun:
    """Where no kernel tells, a lease is watched."""

    def test_one_that_renews_is_respected(self, shared):
        said = []
        with lease_on(shared) as first:
            with pytest.raises(LeaseHeldError, match=rf"process {os.getpid()} on .* is writing this output") as caught:
                lease_on(shared, say=said.append, expiry_seconds=5).__enter__()
            assert caught.value.exit_code == 75
            first.check()
        assert len(said) == 1 and "watching whether it lives" in said[0]

    def test_one_that_stood_still_is_taken_over(self, shared):
        write_claim(shared)
        said, started = [], time.monotonic()
        with lease_on(shared, say=said.append, expiry_seconds=0.5) as lease:
            assert time.monotonic() - started >= 0.5
            assert read_claim(shared)["token"] == lease.claim.token
        assert "watching whether it lives" in said[0] and "took over" in said[1] and "not been renewed" in said[1]

    def test_one_that_is_released_meanwhile_is_taken(self, shared):
        write_claim(shared)
        place = shared.join("lease.json")

        def release(line):
            threading.Timer(0.3, lambda: place.fs.rm_file(place.path)).start()

        with lease_on(shared, say=release, expiry_seconds=5) as lease:
            assert read_claim(shared)["token"] == lease.claim.token

    @pytest.mark.parametrize("damaged", [b"", b"{", b"null", b'{"token": 1}', b'{"token": "t", "host": "h", "pid": "x"}'])
    def test_a_damaged_file_is_taken_over_once_it_stood_still(self, proved, clock, damaged):
        write_atomic(proved.join("lease.json"), damaged)
        with lease_on(proved, expiry_seconds=45) as lease:
            assert clock.now >= 1045
            lease.check()

    def test_a_damaged_file_on_a_share_is_taken_over_too(self, shared):
        """An empty one is what a full disk leaves."""
        write_atomic(shared.join("lease.json"), b"")
        with lease_on(shared, expiry_seconds=0.3) as lease:
            lease.check()

    def test_it_is_watched_from_its_own_beginning(self, proved, clock, monkeypatch):
        """The first owner leaves when it has been watched for long, and a second one is quicker to come."""
        claims = [Claim("first", "elsewhere", 1, 1)] * 40 + [None] + [Claim("second", "elsewhere", 2, 1)] * 20
        script = iter([*claims, Claim("second", "elsewhere", 2, 2)])

        def read(file):
            claim = next(script)
            return None if claim is None else (claim.encode(), claim)

        monkeypatch.setattr(lease_file.SharedObject, "read", read)
        monkeypatch.setattr(lease_file.SharedObject, "write", lambda *arguments: None)
        with pytest.raises(LeaseHeldError, match="process 2 on elsewhere is writing"):
            lease_on(proved, expiry_seconds=45).__enter__()

    def test_a_store_that_shows_nothing_and_lets_nothing_in(self, proved, clock, monkeypatch):
        monkeypatch.setattr(lease_file.SharedObject, "write", lambda *arguments: None)
        with pytest.raises(StorageError, match="neither shows a lease nor"):
            lease_on(proved, expiry_seconds=45).__enter__()


class TestOlderVersion:
    """Runs of versions that know no lock of the kernel's, on a local disk."""

    def test_a_living_one_is_respected(self, disk):
        over = threading.Event()

        def renew():
            for sequence in range(1000):
                write_claim(disk, sequence=sequence)
                if over.wait(0.2):
                    break

        write_claim(disk)
        older = threading.Thread(target=renew)
        older.start()
        try:
            with pytest.raises(LeaseHeldError, match="process 1 on elsewhere is writing this output"):
                lease_on(disk, expiry_seconds=5).__enter__()
        finally:
            over.set()
            older.join()
        assert read_claim(disk)["token"] == "another"

    def test_a_dead_one_is_taken_over_once_it_stood_still(self, disk):
        write_claim(disk)
        started = time.monotonic()
        with lease_on(disk, expiry_seconds=0.5) as lease:
            assert time.monotonic() - started >= 0.5
            lease.check()

    def test_it_understands_the_file(self, disk):
        with lease_on(disk):
            claim = read_claim(disk)
        assert set(claim) >= {"token", "host", "boot", "pid", "sequence"}
        assert claim["boot"] == "", "it says nothing of a process that such a version might take for dead"


class TestLosing:
    def test_one_taken_away_is_noticed_and_left_to_its_new_owner(self, folder):
        with lease_on(folder) as lease:
            write_claim(folder)
            assert "lost the lease on the output: it was taken by process 1 on elsewhere" in str(wait_until_lost(lease))
            with pytest.raises(LeaseHeldError, match="lost the lease"):
                lease.check()
        assert read_claim(folder) == OLDER

    def test_one_removed_is_noticed(self, folder):
        place = folder.join("lease.json")
        with lease_on(folder) as lease:
            place.fs.rm_file(place.path)
            assert "its file was removed" in str(wait_until_lost(lease))
        assert not exists(place)

    def test_a_check_long_after_the_last_renewal_renews_first(self, proved, clock):
        """A process that was frozen finds out before it writes."""
        with lease_on(proved, renew_seconds=60) as lease:
            sequence = read_claim(proved)["sequence"]
            begun = lease.check()
            assert read_claim(proved)["sequence"] == sequence, "a fresh lease needs no renewal"
            clock.now += 19
            assert lease.check() == begun + 19, "a write may take the margin from when the lease was seen to be held"
            clock.now += 2
            lease.check()
            assert read_claim(proved)["sequence"] > sequence
            write_claim(proved)
            clock.now += 21
            with pytest.raises(LeaseHeldError, match="it was taken by process 1 on elsewhere"):
                lease.check()


class TestProcesses:
    CONTENDER = """
import json, sys
from capray.captioning import lease as lease_module, lease_file
from capray.storage import locate

lease_file.SharedObject.probe = lambda self: None
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        if command == "take":
            lease_module.is_on_local_disk = lambda folder: arguments[2]
            lease = lease_module.Lease(locate(arguments[0]), **arguments[1])
            lease.__enter__()
        elif command == "check":
            lease.check()
        else:
            lease.__exit__(None, None, None)
        answer = "done"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(answer, flush=True)
"""

    @pytest.fixture
    def processes(self):
        """Two processes that take, check and leave a lease when told."""
        command = [sys.executable, "-c", self.CONTENDER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        started = [subprocess.Popen(command, **pipes) for _ in range(2)]
        yield started
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()

    def ask(self, process: subprocess.Popen, command: str, folder: Location | None = None, **settings) -> str:
        arguments = [] if folder is None else [folder.uri, {"renew_seconds": RENEW, **settings}]
        if folder is not None and folder.is_local:
            os.makedirs(folder.path, exist_ok=True)
            arguments.append(lease_module.is_on_local_disk(folder.path))
        process.stdin.write(json.dumps([command, *arguments]) + "\n")
        return process.stdout.readline().strip()

    def test_on_a_local_disk_a_stopped_owner_is_named_at_once_and_a_killed_one_replaced_at_once(self, disk, processes):
        owner, other = processes
        assert self.ask(owner, "take", disk) == "done"
        os.kill(owner.pid, signal.SIGSTOP)
        time.sleep(1)
        for steal in (False, True):
            answer = self.ask(other, "take", disk, expiry_seconds=0.5, steal=steal)
            assert answer.startswith(f"LeaseHeldError: process {owner.pid} on ")
            assert ("--steal-lease" in answer) == steal
        os.kill(owner.pid, signal.SIGCONT)
        assert self.ask(owner, "check") == "done"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        started = time.monotonic()
        assert self.ask(other, "take", disk, expiry_seconds=60) == "done"
        assert time.monotonic() - started < 10
        assert self.ask(other, "check") == "done"

    def test_elsewhere_a_frozen_owner_finds_its_lease_gone(self, shared, processes):
        owner, other = processes
        assert self.ask(owner, "take", shared, renew_seconds=60, publish_seconds=3) == "done"
        os.kill(owner.pid, signal.SIGSTOP)
        assert self.ask(other, "take", shared, expiry_seconds=4) == "done"
        os.kill(owner.pid, signal.SIGCONT)
        assert f"it was taken by process {other.pid} on" in self.ask(owner, "check")
        assert self.ask(owner, "leave") == "done"
        assert read_claim(shared)["pid"] == other.pid
        assert self.ask(other, "check") == "done"


class TestRay:
    def test_a_job_that_ended_is_replaced_at_once(self, proved):
        write_claim(proved, ray_job="raysubmit_1")
        asked, said = [], []

        def has_ended(job_id: str) -> bool:
            asked.append(job_id)
            return True

        with lease_on(proved, say=said.append, expiry_seconds=60, is_job_terminal=has_ended):
            assert asked == ["raysubmit_1"]
        assert said == ["took over the lease of process 1 on elsewhere (Ray job raysubmit_1): its Ray job has ended"]

    @pytest.mark.parametrize("metadata", [{"job_submission_id": "raysubmit_2"}, {}, None])
    def test_the_own_job_is_named(self, monkeypatch, proved, metadata):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": metadata}))
        with lease_on(proved):
            assert read_claim(proved)["ray_job"] == (metadata or {}).get("job_submission_id")

    def test_what_the_cluster_says(self, monkeypatch):
        answers = {"raysubmit_1": "STOPPED", "raysubmit_2": "RUNNING", "nightly": "SUCCEEDED", "raysubmit_3": "SILENCE"}

        class Client:
            def get_job_status(self, job_id):
                if answers[job_id] == "SILENCE":
                    time.sleep(1)
                return SimpleNamespace(is_terminal=lambda: answers[job_id] in ("STOPPED", "SUCCEEDED", "FAILED"))

        monkeypatch.setitem(sys.modules, "ray.job_submission", SimpleNamespace(JobSubmissionClient=Client))
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(lease_module, "RAY_SECONDS", 0.2)
        assert lease_module.ray_job_is_terminal("raysubmit_1")
        assert not lease_module.ray_job_is_terminal("raysubmit_2")
        assert not lease_module.ray_job_is_terminal("raysubmit_3")
        assert not lease_module.ray_job_is_terminal("raysubmit_4"), "no such job"
        assert not lease_module.ray_job_is_terminal("nightly"), "another cluster may run a job of that name"
        monkeypatch.delenv("RAY_ADDRESS")
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        assert not lease_module.ray_job_is_terminal("raysubmit_1"), "no cluster is at hand"


class TestSteal:
    def test_at_once_from_a_living_owner(self, shared):
        said = []
        with lease_on(shared) as owner:
            started = time.monotonic()
            with lease_on(shared, say=said.append, expiry_seconds=60, steal=True) as thief:
                assert time.monotonic() - started < 5
                assert f"took over the lease of {owner.claim.describe()}: told to (--steal-lease)" in said
                assert "taken by" in str(wait_until_lost(owner))
                owner.__exit__()
                thief.check()
                assert read_claim(shared)["token"] == thief.claim.token

    def test_from_an_owner_that_renews_in_between(self, proved, monkeypatch):
        with lease_on(proved, renew_seconds=60) as owner:
            thief = lease_on(proved, steal=True)
            look, looks = thief._look, []

            def renewed_meanwhile():
                seen = look()
                if not looks:
                    owner._renew()
                looks.append(seen)
                return seen

            monkeypatch.setattr(thief, "_look", renewed_meanwhile)
            with thief:
                assert read_claim(proved)["token"] == thief.claim.token
            assert len(looks) > 1


def test_without_a_lease_nothing_is_asked_of_the_store(model):
    said = []
    with lease_on(model, say=said.append, enforce=False) as first, lease_on(model, enforce=False) as second:
        first.check()
        second.check()
    assert ModelFileSystem.store.num_requests == 0
    assert said == ["warning: no lease: nothing keeps another run from writing model://bucket/out/_capray at the same time"]


class TestProbe:
    @pytest.mark.parametrize("honours", ["neither", "create", "racy"])
    def test_a_store_that_does_not_honour_conditions_is_refused(self, model, honours):
        store = ModelFileSystem.store = Store(honours)
        with pytest.raises(StorageError, match="does not honour conditional writes .* --unsafe-no-lease"):
            lease_on(model).__enter__()
        assert store.objects == {}

    def test_a_store_that_knows_no_conditions_is_refused(self, model, monkeypatch):
        def not_implemented(*arguments):
            raise refusal("NotImplemented")

        monkeypatch.setattr(ModelFileSystem.store, "put", not_implemented)
        with pytest.raises(StorageError, match="NotImplemented.* --unsafe-no-lease"):
            lease_on(model).__enter__()

    def test_a_filesystem_without_conditional_writes_is_refused(self):
        with pytest.raises(StorageError, match="memory://out.* --unsafe-no-lease"):
            lease_on(locate("memory://out/_capray")).__enter__()

    def test_once_per_process(self, model):
        for _ in range(2):
            with lease_on(model):
                pass
            assert len([path for path in ModelFileSystem.store.log if "/probe-" in path]) == 2
        assert ModelFileSystem.store.objects == {}

    @pytest.mark.parametrize("request_number", [0, NUM_PROBES])
    def test_an_answer_lost_is_no_reason_to_refuse(self, model, request_number):
        ModelFileSystem.store.faults = {request_number: Fault.ANSWER_LOST_AND_ASKED_AGAIN}
        with lease_on(model) as lease:
            lease.check()

    def test_refusals(self):
        """What says that a condition did not hold, unlike an error."""
        refusals = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "OperationAborted")
        errors = ("NoSuchBucket", "AccessDenied", "SlowDown", "InternalError", "NotImplemented")
        assert all(lease_file._is_refusal(refusal(code)) for code in refusals)
        assert not any(lease_file._is_refusal(refusal(code)) for code in errors)
        assert not lease_file._is_refusal(OSError(errno.EINVAL, "bad"))


class TestLostAnswers:
    """The store did what it was asked, the client did not learn of it and asked again: it is refused because of itself."""

    def next_write(self, fault: Fault, after: int = 0) -> None:
        store = ModelFileSystem.store
        store.faults = {store.num_requests + after: fault}

    def test_to_creating(self, proved, clock):
        self.next_write(Fault.ANSWER_LOST_AND_ASKED_AGAIN, after=1)
        with lease_on(proved, renew_seconds=60) as lease:
            assert clock.now < 1002, "it needs not wait for itself"
            lease.check()
        assert not exists(proved.join("lease.json"))

    def test_to_renewing(self, proved, clock):
        with lease_on(proved, renew_seconds=60) as lease:
            for _ in range(3):
                clock.now += 21
                self.next_write(Fault.ANSWER_LOST_AND_ASKED_AGAIN)
                lease.check()
                assert read_claim(proved)["sequence"] == lease.claim.sequence

    def test_an_earlier_renewal_that_got_through_is_none_of_now(self, proved, clock):
        """Contenders have watched the file since; only a new write makes them wait anew."""
        with lease_on(proved, renew_seconds=60) as lease:
            clock.now += 21
            self.next_write(Fault.ANSWER_LOST)
            with pytest.raises(WriteUnanswered):
                lease._renew()
            watched = read_claim(proved)
            clock.now += 40
            lease.check()
            assert read_claim(proved)["sequence"] > watched["sequence"]

    def test_a_renewal_counts_from_its_start(self, proved, clock, monkeypatch):
        with lease_on(proved, renew_seconds=60) as lease:
            put = ModelFileSystem.store.put

            def slow(*arguments):
                version = put(*arguments)
                clock.now += 15
                return version

            monkeypatch.setattr(ModelFileSystem.store, "put", slow)
            clock.now += 21
            lease.check()
            sequence = lease.claim.sequence
            clock.now += 6
            lease.check()
            assert lease.claim.sequence == sequence + 1


class TestSilence:
    """A store that takes requests and says nothing."""

    def test_a_check_waits_until_the_store_is_back(self, proved):
        store, said = ModelFileSystem.store, []
        with lease_on(proved, say=said.append, renew_seconds=60, publish_seconds=0.1) as lease:
            store.answers.clear()
            threading.Timer(0.6, store.answers.set).start()
            time.sleep(0.2)
            lease.check()
        assert len(said) == 1 and "no answer within 0.1 s" in said[0] and "trying again" in said[0]

    def test_a_check_waits_only_so_long(self, proved):
        store = ModelFileSystem.store
        with lease_on(proved, renew_seconds=60, publish_seconds=0.1, patience_seconds=0.5) as lease:
            store.answers.clear()
            time.sleep(0.2)
            with pytest.raises(WriteUnanswered, match=r"renewing the lease .*: no answer within 0\.1 s") as caught:
                lease.check()
            store.answers.set()
        assert caught.value.exit_code == 75

    def test_a_process_stopped_while_it_replaces_the_file_is_not_waited_for_forever(self, share, monkeypatch):
        monkeypatch.setattr(lease_file, "LOCK_SECONDS", 0.2)
        os.makedirs(share.path)
        with open(f"{share.path}/lease.json.lock", "w") as file:
            lease_file.fcntl.flock(file, lease_file.fcntl.LOCK_EX)
            with pytest.raises(WriteUnanswered, match=r"has held .*lease\.json\.lock for 0\.2 s.*unless it is stopped"):
                lease_on(share).__enter__()
        with lease_on(share):
            pass

    def test_leaving_does_not_wait(self, proved):
        store, said = ModelFileSystem.store, []
        with lease_on(proved, say=said.append):
            store.answers.clear()
            time.sleep(3 * RENEW)  # A renewal is on its way.
            started = time.monotonic()
        assert time.monotonic() - started < lease_module.EXIT_SECONDS + 0.5
        store.answers.set()
        assert len(said) == 1 and "left behind (the store does not answer)" in said[0]


class TestLeaving:
    def test_an_error_on_leaving_does_not_hide_the_jobs(self, proved):
        said = []

        def fail():
            ModelFileSystem.store.faults = dict.fromkeys(range(100), Fault.FAILS)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), lease_on(proved, say=said.append, renew_seconds=60):
            fail()
        assert len(said) == 1 and "reduce your request rate" in said[0]

    def test_a_store_without_conditional_deletes(self, proved):
        ModelFileSystem.store.has_conditional_delete = False
        with lease_on(proved):
            pass
        assert ModelFileSystem.store.objects == {}

    def test_a_lease_taken_while_it_leaves_stays(self, proved, monkeypatch):
        lease = lease_on(proved, renew_seconds=60)
        look = lease._look

        def taken_meanwhile():
            seen = look()
            write_claim(proved)
            return seen

        with lease:
            monkeypatch.setattr(lease, "_look", taken_meanwhile)
        assert read_claim(proved) == OLDER


def test_an_error_while_taking_it_frees_the_kernels_lock(disk):
    os.makedirs(disk.join("lease.json").path)
    with pytest.raises(CaprayError):
        lease_on(disk).__enter__()
    os.rmdir(disk.join("lease.json").path)
    with lease_on(disk) as lease:
        lease.check()


def test_the_clock_counts_time_asleep():
    assert abs(deadlines.now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
