"""One writer per output: who gets the lease, who is turned away, and when a dead owner's is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from capray.captioning import lease as lease_module
from capray.captioning.lease import Lease
from capray.errors import CaprayError, OutputConflictError
from capray.storage import Location, exists, locate, read_bytes, write_atomic

RENEW, EXPIRY = 0.1, 1.5


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> Location:
    if request.param == "local":
        return locate(str(tmp_path / "_capray"))
    return locate(f"{request.getfixturevalue('s3')}/{tmp_path.name}/_capray")


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
    assert "watching whether it lives" in said[0] and "took over" in said[1]


def test_another_hosts_lease_that_moves_is_respected(folder):
    write_claim(folder, sequence=7)
    threading.Timer(0.3, lambda: write_claim(folder, sequence=8)).start()
    with pytest.raises(OutputConflictError, match="process 1 on elsewhere is writing"):
        lease_on(folder, expiry_seconds=5).__enter__()
    assert read_claim(folder)["token"] == "another"


def test_a_lease_released_while_one_waits_is_taken(folder):
    write_claim(folder)
    place = folder.join("lease.json")
    threading.Timer(0.3, lambda: place.fs.rm_file(place.path)).start()
    with lease_on(folder, expiry_seconds=3) as lease:
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
        monkeypatch.setattr(lease, "_confirmed", time.monotonic() - lease_module.PUBLISH_SECONDS - 1)
        lease.check()
        assert read_claim(folder)["sequence"] > sequence
        write_claim(folder)
        monkeypatch.setattr(lease, "_confirmed", time.monotonic() - lease_module.PUBLISH_SECONDS - 1)
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
