"""One writer per output: who gets the lease, who is turned away, and when a dead owner's is taken over."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from capray.captioning import lease as lease_module
from capray.captioning.lease import Claim, Lease
from capray.errors import CaprayError, OutputConflictError, StorageError
from capray.storage import Location, exists, locate, read_bytes, write_atomic
from tests.model_store import Fault, ModelFileSystem, Store, refusal

RENEW, EXPIRY = 0.1, 1.5


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> Location:
    if request.param == "local":
        return locate(str(tmp_path / "_capray"))
    return locate(f"{request.getfixturevalue('s3')}/{tmp_path.name}/_capray")


@pytest.fixture
def model(monkeypatch) -> Location:
    """A folder on a store that is not yet known to honour conditions."""
    monkeypatch.setattr(lease_module, "_proved", set())
    monkeypatch.setattr(ModelFileSystem, "store", Store())
    return locate("model://bucket/out/_capray")


@pytest.fixture
def proved(model) -> Location:
    """A folder on a store that is known to honour conditions: taking a lease there is its first request."""
    lease_module._proved.add((model.fs, "bucket"))
    return model


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The lease's clock, which stands still but while it sleeps."""
    clock = SimpleNamespace(now=1000.0, CLOCK_MONOTONIC=0)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep, clock.clock_gettime = sleep, lambda number: clock.now
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def lease_on(folder: Location, **settings) -> Lease:
    return Lease(folder, **{"renew_seconds": RENEW, "expiry_seconds": EXPIRY, **settings})


def write_claim(folder: Location, **values) -> None:
    """Leave a lease file as another run would."""
    claim = {"token": "another", "host": "elsewhere", "boot": "", "pid": 1, "sequence": 7, **values}
    write_atomic(folder.join("lease.json"), json.dumps(claim).encode())


def read_claim(folder: Location) -> dict:
    return json.loads(read_bytes(folder.join("lease.json")))


def here() -> dict[str, str]:
    return {"host": socket.gethostname(), "boot": lease_module._boot_id()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def contend(folder: Location, count: int) -> tuple[int, list[Exception]]:
    """``count`` threads take the lease at once, and who has it holds it until all are decided.

    How many held it together, and the others' errors.
    """
    start, decided = threading.Barrier(count), threading.Semaphore(0)
    over = threading.Event()
    held, refused = [], []

    def take():
        lease = lease_on(folder, expiry_seconds=10)
        start.wait()
        try:
            with lease:
                held.append(lease)
                decided.release()
                over.wait(30)
        except Exception as error:
            refused.append(error)
            decided.release()

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in range(count):
        assert decided.acquire(timeout=30), "some neither got in nor were refused"
    number = len(held)
    over.set()
    for thread in threads:
        thread.join()
    return number, refused


def test_taken_renewed_and_released(folder):
    with lease_on(folder) as lease:
        first = read_claim(folder)
        assert (first["token"], first["pid"], first["host"]) == (lease.claim.token, os.getpid(), here()["host"])
        deadline = time.monotonic() + 5
        while read_claim(folder)["sequence"] <= first["sequence"]:
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.02)
        lease.check()
    assert not exists(folder.join("lease.json"))
    with lease_on(folder):
        pass


def test_released_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), lease_on(folder):
        raise ZeroDivisionError
    assert not exists(folder.join("lease.json"))


def test_exactly_one_of_many_gets_in(folder):
    held, refused = contend(folder, 8)
    assert held == 1
    assert [type(error) for error in refused] == [OutputConflictError] * 7
    assert not exists(folder.join("lease.json"))


def test_a_second_run_is_turned_away(folder):
    said = []
    with lease_on(folder) as first:
        with pytest.raises(OutputConflictError, match=rf"process {os.getpid()} on .* is writing this output") as caught:
            lease_on(folder, say=said.append, expiry_seconds=5).__enter__()
        assert caught.value.exit_code == 2
        assert read_claim(folder)["token"] == first.claim.token
        first.check()
    assert len(said) == 1 and "watching whether it lives" in said[0]


def test_a_dead_process_of_this_host_is_replaced_at_once(folder):
    write_claim(folder, **here(), pid=dead_pid())
    said = []
    started = time.monotonic()
    with lease_on(folder, say=said.append, expiry_seconds=60) as lease:
        assert time.monotonic() - started < 5
        assert read_claim(folder)["token"] == lease.claim.token
        lease.check()
    assert len(said) == 1 and "took over the lease of process" in said[0]


def test_only_one_takes_over_from_a_dead_process(folder):
    write_claim(folder, **here(), pid=dead_pid())
    held, refused = contend(folder, 8)
    assert held == 1
    assert [type(error) for error in refused] == [OutputConflictError] * 7


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "before the last start"}])
def test_another_hosts_lease_is_replaced_once_it_stood_still(folder, elsewhere):
    write_claim(folder, **{**here(), "pid": dead_pid(), **elsewhere})
    said = []
    started = time.monotonic()
    with lease_on(folder, say=said.append, expiry_seconds=0.5) as lease:
        assert time.monotonic() - started >= 0.5
        assert read_claim(folder)["token"] == lease.claim.token
    assert "watching whether it lives" in said[0] and "took over" in said[1] and "not been renewed" in said[1]


def test_another_hosts_lease_that_moves_is_respected(folder):
    write_claim(folder, sequence=7)

    def renew(line):
        threading.Timer(0.3, lambda: write_claim(folder, sequence=8)).start()

    with pytest.raises(OutputConflictError, match="process 1 on elsewhere is writing"):
        lease_on(folder, say=renew, expiry_seconds=5).__enter__()
    assert read_claim(folder)["token"] == "another"


def test_a_lease_released_while_one_waits_is_taken(folder):
    write_claim(folder)
    place = folder.join("lease.json")

    def release(line):
        threading.Timer(0.3, lambda: place.fs.rm_file(place.path)).start()

    with lease_on(folder, say=release, expiry_seconds=30) as lease:
        assert read_claim(folder)["token"] == lease.claim.token


def wait_until_lost(lease: Lease) -> CaprayError:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            lease.check()
        except CaprayError as error:
            return error
        time.sleep(0.02)
    raise AssertionError("the loss was never noticed")


def test_a_lease_taken_away_is_noticed_and_left_to_its_new_owner(folder):
    with lease_on(folder) as lease:
        write_claim(folder)
        error = wait_until_lost(lease)
        assert "lost the lease on the output: it was taken by process 1 on elsewhere" in str(error)
        with pytest.raises(CaprayError, match="lost the lease"):
            lease.check()
    assert read_claim(folder) == {"token": "another", "host": "elsewhere", "boot": "", "pid": 1, "sequence": 7}


def test_a_lease_taken_away_unnoticed_is_left_to_its_new_owner(folder):
    with lease_on(folder, renew_seconds=30):
        write_claim(folder)
    assert read_claim(folder)["token"] == "another"


def test_a_lease_removed_is_noticed(folder):
    place = folder.join("lease.json")
    with lease_on(folder) as lease:
        place.fs.rm_file(place.path)
        assert "lost the lease on the output" in str(wait_until_lost(lease))
    assert not exists(place)


def test_a_check_long_after_the_last_renewal_renews_first(folder, monkeypatch):
    """A process that was frozen finds out before it publishes."""
    with lease_on(folder, renew_seconds=30) as lease:
        sequence = read_claim(folder)["sequence"]
        lease.check()
        assert read_claim(folder)["sequence"] == sequence, "a fresh lease needs no renewal"
        monkeypatch.setattr(lease, "_confirmed", lease_module.now() - lease_module.PUBLISH_SECONDS - 1)
        lease.check()
        assert read_claim(folder)["sequence"] > sequence
        write_claim(folder)
        monkeypatch.setattr(lease, "_confirmed", lease_module.now() - lease_module.PUBLISH_SECONDS - 1)
        with pytest.raises(CaprayError, match="lost the lease on the output: it was taken by process 1 on elsewhere"):
            lease.check()


def test_a_file_still_empty_is_a_living_owners(tmp_path):
    """Its owner is between creating and writing it."""
    folder = locate(str(tmp_path))
    write_atomic(folder.join("lease.json"), b"")
    threading.Timer(0.3, lambda: write_claim(folder)).start()
    with pytest.raises(OutputConflictError, match="process 1 on elsewhere"):
        lease_on(folder, expiry_seconds=5).__enter__()


def test_a_file_left_empty_is_taken_over(tmp_path):
    folder = locate(str(tmp_path))
    write_atomic(folder.join("lease.json"), b"")
    with lease_on(folder, expiry_seconds=0.5) as lease:
        assert read_claim(folder)["token"] == lease.claim.token


def test_nothing_may_be_published_before_and_after(folder):
    lease = lease_on(folder)
    with pytest.raises(CaprayError, match="never taken"):
        lease.check()
    with lease:
        lease.check()
    with pytest.raises(CaprayError, match="released"):
        lease.check()


class TestProcesses:
    CONTENDER = """
import json, sys
from capray.captioning import lease as lease_module
from capray.storage import locate

lease_module.NUM_PROBES = 2
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        if command == "take":
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
        started = [
            subprocess.Popen(
                [sys.executable, "-c", self.CONTENDER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for _ in range(2)
        ]
        yield started
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()

    def tell(self, process: subprocess.Popen, command: str, folder: Location | None = None, **settings) -> None:
        arguments = [] if folder is None else [folder.uri, {"renew_seconds": RENEW, "expiry_seconds": 4, **settings}]
        process.stdin.write(json.dumps([command, *arguments]) + "\n")

    def ask(self, process: subprocess.Popen, command: str, folder: Location | None = None, **settings) -> str:
        self.tell(process, command, folder, **settings)
        return process.stdout.readline().strip()

    @pytest.mark.parametrize("is_left", [False, True], ids=["fresh", "left by a dead process"])
    def test_exactly_one_of_two_started_at_once_wins(self, folder, processes, is_left):
        dead = dead_pid()
        for _ in range(5):
            if is_left:
                write_claim(folder, **here(), pid=dead)
            for process in processes:
                self.tell(process, "take", folder)
            answers = {process: process.stdout.readline().strip() for process in processes}
            winners = [process for process, answer in answers.items() if answer == "done"]
            assert len(winners) == 1, answers
            (loser,) = set(processes) - set(winners)
            assert answers[loser].startswith(f"OutputConflictError: process {winners[0].pid} on ")
            assert self.ask(winners[0], "check") == "done"
            assert self.ask(loser, "check").startswith("CaprayError")
            assert self.ask(winners[0], "leave") == "done"
            assert not exists(folder.join("lease.json"))

    def test_a_frozen_owner_finds_its_lease_gone(self, folder, processes):
        owner, other = processes
        assert self.ask(owner, "take", folder, renew_seconds=60, publish_seconds=0.5) == "done"
        os.kill(owner.pid, signal.SIGSTOP)
        assert self.ask(other, "take", folder, expiry_seconds=1) == "done"
        os.kill(owner.pid, signal.SIGCONT)
        assert f"it was taken by process {other.pid} on" in self.ask(owner, "check")
        assert self.ask(owner, "leave") == "done"
        assert read_claim(folder)["pid"] == other.pid
        assert self.ask(other, "check") == "done"

    def test_a_frozen_owner_that_is_back_in_time_keeps_it(self, folder, processes):
        owner, other = processes
        assert self.ask(owner, "take", folder) == "done"
        os.kill(owner.pid, signal.SIGSTOP)
        self.tell(other, "take", folder, expiry_seconds=10)
        time.sleep(0.7)
        os.kill(owner.pid, signal.SIGCONT)
        assert f"OutputConflictError: process {owner.pid} on" in other.stdout.readline()
        assert self.ask(owner, "check") == "done"

    def test_a_killed_owner_is_replaced_at_once_even_as_a_zombie(self, folder, processes):
        owner, other = processes
        assert self.ask(owner, "take", folder) == "done"
        os.kill(owner.pid, signal.SIGKILL)
        started = time.monotonic()
        assert self.ask(other, "take", folder, expiry_seconds=60) == "done"
        assert time.monotonic() - started < 10
        assert self.ask(other, "check") == "done"


class TestIsDead:
    def claim(self, **values) -> Claim:
        started = lease_module._process(os.getpid()).started
        return Claim(**{"token": "t", **here(), "pid": os.getpid(), "sequence": 1, "started": started, **values})

    def test_a_process_that_lives_or_may_live(self):
        assert not lease_module._is_dead(self.claim())
        assert not lease_module._is_dead(self.claim(started=None))
        assert not lease_module._is_dead(self.claim(pid=1, started=None)), "another user's process, maybe"
        assert not lease_module._is_dead(self.claim(pid=dead_pid(), host="elsewhere"))
        assert not lease_module._is_dead(self.claim(pid=dead_pid(), boot="")), "ids of another boot say nothing"

    def test_a_process_that_is_gone(self):
        assert lease_module._is_dead(self.claim(pid=dead_pid()))

    def test_a_process_id_that_went_to_another_process(self):
        assert lease_module._is_dead(self.claim(started=1))

    def test_a_zombie(self):
        process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
        process.stdout.read()
        deadline = time.monotonic() + 10
        while not lease_module._is_dead(self.claim(pid=process.pid, started=None)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.wait()


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

    def test_a_job_that_may_run_is_watched(self, proved, clock):
        write_claim(proved, ray_job="raysubmit_1")
        with lease_on(proved, expiry_seconds=45):
            assert clock.now >= 1045

    def test_the_own_job_is_named(self, monkeypatch, proved):
        config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_2", "job_name": "raysubmit_2"}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
        with lease_on(proved):
            assert read_claim(proved)["ray_job"] == "raysubmit_2"

    @pytest.mark.parametrize("value", [None, "", "{}", "[]", '{"metadata": null}'])
    def test_no_job(self, monkeypatch, value):
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
        if value is not None:
            monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", value)
        assert lease_module.own_ray_job() is None

    @pytest.fixture
    def cluster(self, monkeypatch) -> dict:
        """What stands in for a cluster's answers: a job's status, or an error."""
        answers: dict = {}

        class Client:
            def get_job_status(self, job_id):
                if job_id not in answers:
                    raise RuntimeError("no such job")
                if answers[job_id] == "SILENCE":
                    time.sleep(1)
                return SimpleNamespace(is_terminal=lambda: answers[job_id] in ("STOPPED", "SUCCEEDED", "FAILED"))

        monkeypatch.setitem(sys.modules, "ray.job_submission", SimpleNamespace(JobSubmissionClient=Client))
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(lease_module, "RAY_SECONDS", 0.2)
        return answers

    def test_what_the_cluster_says(self, cluster, monkeypatch):
        cluster |= {
            "raysubmit_1": "STOPPED",
            "raysubmit_2": "RUNNING",
            "nightly": "SUCCEEDED",
            "raysubmit_3": "SILENCE",
        }
        assert lease_module.ray_job_is_terminal("raysubmit_1")
        assert not lease_module.ray_job_is_terminal("raysubmit_2")
        assert not lease_module.ray_job_is_terminal("raysubmit_3")
        assert not lease_module.ray_job_is_terminal("raysubmit_4"), "no such job"
        assert not lease_module.ray_job_is_terminal("nightly"), "another cluster may run a job of that name"
        monkeypatch.delenv("RAY_ADDRESS")
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        assert not lease_module.ray_job_is_terminal("raysubmit_1"), "no cluster is at hand"


class TestSteal:
    def test_at_once_from_a_living_owner(self, folder):
        said = []
        with lease_on(folder) as owner:
            started = time.monotonic()
            with lease_on(folder, say=said.append, expiry_seconds=60, steal=True) as thief:
                assert time.monotonic() - started < 5
                assert f"took over the lease of {owner.claim.describe()}: told to (--steal-lease)" in said
                assert "taken by" in str(wait_until_lost(owner))
                owner.__exit__()
                thief.check()
                assert read_claim(folder)["token"] == thief.claim.token

    def test_with_nothing_to_steal(self, folder):
        with lease_on(folder, steal=True) as lease:
            lease.check()

    def test_an_owner_that_renews_in_between(self, proved, monkeypatch):
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


class TestNoLease:
    def test_nothing_is_asked_of_the_store(self, model):
        ModelFileSystem.store = Store(honours="neither")
        said = []
        with lease_on(model, say=said.append, enforce=False) as first, lease_on(model, enforce=False) as second:
            first.check()
            second.check()
        assert ModelFileSystem.store.num_requests == 0
        assert said == [
            "warning: no lease: nothing keeps another run from writing model://bucket/out/_capray at the same time"
        ]


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
        for expected in (2, 2):
            with lease_on(model):
                pass
            probes = [path for path in ModelFileSystem.store.log if "/probe-" in path]
            assert len(probes) == expected
        assert ModelFileSystem.store.objects == {}

    @pytest.mark.parametrize("request_number", [0, lease_module.NUM_PROBES])
    def test_an_answer_lost_is_no_reason_to_refuse(self, model, request_number):
        ModelFileSystem.store.faults = {request_number: Fault.ANSWER_LOST_AND_ASKED_AGAIN}
        with lease_on(model) as lease:
            lease.check()

    def test_a_real_store(self, s3, monkeypatch):
        monkeypatch.setattr(lease_module, "_proved", set())
        folder = locate(f"{s3}/a-real-store/_capray")
        with lease_on(folder):
            pass
        assert lease_module._proved
        assert [path for path in folder.fs.find(folder.path) if "probe" in path] == []


class TestLostAnswers:
    """The store did what it was asked, the client did not learn of it and asked again: it is refused because of itself."""

    def next_request(self, fault: Fault) -> None:
        store = ModelFileSystem.store
        store.faults = {store.num_requests: fault}

    def test_to_creating(self, proved, clock):
        self.next_request(Fault.ANSWER_LOST_AND_ASKED_AGAIN)
        with lease_on(proved, renew_seconds=60) as lease:
            assert clock.now == 1000, "it needs not wait for itself"
            lease.check()
        assert not exists(proved.join("lease.json"))

    def test_to_taking_over(self, proved):
        write_claim(proved, **here(), pid=dead_pid())
        store = ModelFileSystem.store
        store.faults = {store.num_requests + 3: Fault.ANSWER_LOST_AND_ASKED_AGAIN}  # After creating and looking (2).
        with lease_on(proved, renew_seconds=60, expiry_seconds=60) as lease:
            assert store.num_requests > 4
            lease.check()
            assert read_claim(proved)["token"] == lease.claim.token

    def test_to_renewing(self, proved, clock):
        with lease_on(proved, renew_seconds=60) as lease:
            for _ in range(3):
                clock.now += 21
                self.next_request(Fault.ANSWER_LOST_AND_ASKED_AGAIN)
                lease.check()
                assert read_claim(proved) == vars(lease.claim)

    def test_an_earlier_renewal_that_got_through_is_none_of_now(self, proved, clock):
        """Contenders have watched the file since; only a new write makes them wait anew."""
        with lease_on(proved, renew_seconds=60) as lease:
            clock.now += 21
            self.next_request(Fault.ANSWER_LOST)
            with pytest.raises(StorageError, match="renewing the lease"):
                lease.check()
            watched = read_claim(proved)
            clock.now += 40
            lease.check()
            assert read_claim(proved)["sequence"] > watched["sequence"]
            assert not exists(proved.join("lease.json.lock"))

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

    def test_a_store_too_slow_to_renew_in_time(self, proved, clock, monkeypatch):
        with lease_on(proved, renew_seconds=60) as lease:
            put = ModelFileSystem.store.put

            def slow(*arguments):
                clock.now += 21
                return put(*arguments)

            monkeypatch.setattr(ModelFileSystem.store, "put", slow)
            clock.now += 21
            with pytest.raises(CaprayError, match="takes too long"):
                lease.check()

    @pytest.mark.parametrize(
        "code", ["PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "OperationAborted"]
    )
    def test_refusals(self, code):
        assert lease_module._is_refusal(refusal(code))

    @pytest.mark.parametrize("code", ["NoSuchBucket", "AccessDenied", "SlowDown", "InternalError", "NotImplemented"])
    def test_errors(self, code):
        assert not lease_module._is_refusal(refusal(code))
        assert not lease_module._is_refusal(OSError(errno.EINVAL, "bad"))


class TestLeaving:
    def test_a_store_that_does_not_answer_is_not_waited_for(self, proved):
        store, said = ModelFileSystem.store, []
        with lease_on(proved, say=said.append):
            store.answers.clear()
            time.sleep(3 * RENEW)  # A renewal is on its way.
            started = time.monotonic()
        assert time.monotonic() - started < lease_module.EXIT_SECONDS + 0.5
        store.answers.set()
        assert len(said) == 1 and "left behind (the store does not answer)" in said[0]

    def test_an_answering_one_is_left_at_once(self, folder):
        with lease_on(folder, renew_seconds=60):
            started = time.monotonic()
        assert time.monotonic() - started < 1

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
        assert read_claim(proved)["token"] == "another"


class Script:
    """A store where others come and go: what stands there at each look, the last one for ever."""

    def __init__(self, *claims: Claim | None):
        self.claims = list(claims)

    def probe(self):
        pass

    def read(self):
        claim = self.claims.pop(0) if len(self.claims) > 1 else self.claims[0]
        return None if claim is None else (json.dumps(vars(claim)).encode(), (claim.token, claim.sequence))

    def create(self, data):
        return None

    def replace(self, data, version):
        raise AssertionError(f"{version} was taken")


def test_another_lease_is_watched_from_its_own_beginning(clock, monkeypatch, tmp_path):
    """The first owner leaves when it has been watched for long, and a second one is quicker to come."""
    first = Claim("first", "elsewhere", "", 1, 1)
    second = Claim("second", "elsewhere", "", 2, 1)
    script = Script(*[first] * 40, None, *[second] * 20, Claim("second", "elsewhere", "", 2, 2))
    monkeypatch.setattr(lease_module, "_store_of", lambda folder: script)
    with pytest.raises(OutputConflictError, match="process 2 on elsewhere is writing"):
        lease_on(locate(str(tmp_path)), expiry_seconds=45).__enter__()


def test_a_store_that_shows_nothing_and_lets_nothing_in(clock, monkeypatch, tmp_path):
    script = Script(None)
    monkeypatch.setattr(lease_module, "_store_of", lambda folder: script)
    monkeypatch.setattr(script, "create", lambda data: clock.sleep(1))
    with pytest.raises(StorageError, match="neither shows a lease nor"):
        lease_on(locate(str(tmp_path)), expiry_seconds=45).__enter__()


@pytest.mark.parametrize(
    "damaged",
    [b"{", b"[]", b"null", b'{"token": 1}', b'{"token": "t", "host": "h", "boot": "", "pid": "x", "sequence": 1}'],
)
def test_a_damaged_file_is_taken_over_once_it_stood_still(proved, clock, damaged):
    write_atomic(proved.join("lease.json"), damaged)
    with lease_on(proved, expiry_seconds=45) as lease:
        assert clock.now >= 1045
        lease.check()


def test_a_file_of_a_later_version_is_understood(proved, clock):
    write_claim(proved, **here(), pid=dead_pid(), something="new")
    with lease_on(proved, expiry_seconds=45):
        assert clock.now == 1000


def test_a_process_stopped_inside_the_lock_is_not_waited_for_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LOCK_SECONDS", 0.2)
    folder = locate(str(tmp_path))
    with lease_on(folder, renew_seconds=60), open(tmp_path / "lease.json.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process holds"):
            lease_on(folder, steal=True).__enter__()


def test_the_clock_counts_time_asleep():
    assert abs(lease_module.now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
