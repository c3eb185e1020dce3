"""Leases: one process has what it works on, until it lets go or dies, on whatever machine and file system."""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.running import exit_code_of

from gist_train.data import leases
from gist_train.data.leases import Holder, Lease, held, locked


def try_lock(folder):
    with held(Path(folder) / ".lock") as other:
        return other is None


def test_the_lock_keeps_another_process_out(tmp_path):
    """Two runs that start together would embed every text twice, and write into one file."""
    folder = tmp_path / "made" / "by it"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with locked(folder):
            assert pool.apply(try_lock, (str(folder),)) is False
        assert pool.apply(try_lock, (str(folder),)) is True
        with pytest.raises(RuntimeError), locked(folder):
            raise RuntimeError
        assert pool.apply(try_lock, (str(folder),)) is True
    assert list(folder.iterdir()) == []


def count_up(folder, times):
    counter = folder / "counter"
    for turn in range(times):
        with locked(folder):
            number = int(counter.read_text())
            if turn == times // 2:
                time.sleep(0.02)
            counter.write_text(str(number + 1))
            if turn == times - 1 and os.getpid() % 2:
                os.kill(os.getpid(), signal.SIGKILL)  # which leaves its lease


def test_many_processes_take_turns_and_some_die(tmp_path):
    """Of several that find a dead process' lease one gets it; if two did, a count would be lost."""
    (tmp_path / "counter").write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=count_up, args=(tmp_path, 25)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} <= {0, -signal.SIGKILL}
    with locked(tmp_path):
        assert int((tmp_path / "counter").read_text()) == 6 * 25
    assert [entry.name for entry in tmp_path.iterdir()] == ["counter"]


def take_and_die(path):
    Lease(path)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_lease_of_the_dead_is_taken_over_at_once(tmp_path):
    """After a kill the same command is typed again: it must not wait, nor tell the user to remove a file."""
    path = tmp_path / "lock"
    assert exit_code_of(take_and_die, path) == -signal.SIGKILL
    assert path.exists()
    began = time.monotonic()
    with held(path) as other:
        assert other is None
    assert time.monotonic() - began < leases.STALE / 2  # what it would wait for a lease of another machine
    assert not path.exists()


def test_a_living_lease_is_never_away(tmp_path, monkeypatch):
    """Two see that a process died, and the slower one still thinks so when the other has taken its place. Were the new lease
    moved away, if only for a moment, a third process would find none there, and two would work."""
    path = tmp_path / "lock"
    assert exit_code_of(take_and_die, path) == -signal.SIGKILL
    is_dead, faster, there = leases._Watch.is_dead, [], []

    def is_dead_but_taken_over(watch, seen, look):
        dead = is_dead(watch, seen, look)
        if not faster:
            faster.append(None)
            faster[0] = leases._taken(path, leases._Watch())
        return dead

    def watched(call):
        def called(*args):
            done = call(*args)
            there.append(path.exists())
            return done

        return called

    monkeypatch.setattr(leases._Watch, "is_dead", is_dead_but_taken_over)
    for name in ("rename", "unlink", "link"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    assert not isinstance(leases._taken(path, leases._Watch()), Lease)
    assert isinstance(faster[0], Lease)
    assert there
    assert all(there)
    faster[0].release()
    assert list(tmp_path.iterdir()) == []


def take_over_and_die(path):
    """Dies as the heir of a dead process, before its lease is in that one's place."""
    Lease.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    leases._taken(path, leases._Watch())


def test_an_heir_may_die_too(tmp_path):
    """The machine's power fails again while the job starts anew."""
    path = tmp_path / "lock"
    for death in (take_and_die, take_over_and_die, take_over_and_die):
        assert exit_code_of(death, path) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    with held(path) as other:
        assert other is None
    assert list(tmp_path.iterdir()) == []


def elsewhere(path, renewals=0):
    """A lease as a process of another machine writes it; here a process of that number may well live."""
    holder = Holder("host-b", "another machine", os.getpid(), leases.born(os.getpid()), 1.8e9, renewals)
    path.write_bytes(json.dumps(asdict(holder)).encode().ljust(leases.HEADER - 1) + b"\n")
    return holder


def test_another_machine_that_renews_its_lease_has_it(tmp_path, monkeypatch):
    """Its number says nothing here: it lives as long as it says so."""
    path = tmp_path / "lock"
    holder, sleep = elsewhere(path), time.sleep

    def sleep_and_renew(seconds):
        sleep(seconds)
        elsewhere(path, renewals=1)

    monkeypatch.setattr(time, "sleep", sleep_and_renew)
    with held(path) as other:
        assert other == replace(holder, renewals=1)
        assert "on host-b, since 20" in str(other)
    assert path.exists()


def test_another_machine_that_is_silent_is_dead(tmp_path, monkeypatch):
    """A host that lost its power lets go of nothing: its run could never be resumed."""
    monkeypatch.setattr(leases, "STALE", 0.5)
    path = tmp_path / "lock"
    elsewhere(path)
    began = time.monotonic()
    with held(path) as other:
        assert other is None
    assert time.monotonic() - began > 0.5


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    monkeypatch.setattr(leases, "_RENEWER", leases._Renewer())
    lease = Lease(tmp_path / "lock")
    ends = time.monotonic() + 10
    while leases._read((tmp_path / "lock").read_bytes()).renewals < 2 and time.monotonic() < ends:
        time.sleep(0.05)
    assert leases._read((tmp_path / "lock").read_bytes()).renewals >= 2
    lease.release()


def test_the_thread_that_renews_ends_with_the_last_lease(tmp_path, monkeypatch):
    """A notebook that trained once must not have a thread of ours for ever; the next lease has one again."""
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    monkeypatch.setattr(leases, "_RENEWER", leases._Renewer())
    before = {*threading.enumerate()}
    for _ in range(2):
        lease = Lease(tmp_path / "lock")
        (thread,) = [one for one in threading.enumerate() if one.name == "leases" and one not in before]
        lease.release()
        thread.join(10)
        assert not thread.is_alive()


def test_who_was_taken_over_leaves_the_new_lease_alone(tmp_path):
    """A machine that was cut off for a minute comes back, and lets go of what another one has by now."""
    path = tmp_path / "lock"
    old = Lease(path)
    path.rename(tmp_path / "aside")
    new = Lease(path)
    old.renew()
    old.release()
    assert leases._read(path.read_bytes()).since == new._holder.since
    new.release()
    assert not path.exists()


def test_a_file_that_says_nothing_is_taken_over(tmp_path, monkeypatch):
    """A process that was killed between the making of the file and the first word in it, or a version before leases."""
    monkeypatch.setattr(leases, "UNREAD", 0.5)
    (tmp_path / "lock").touch()
    with held(tmp_path / "lock") as other:
        assert other is None


def test_a_watcher_that_stood_still_takes_nobody_for_dead(tmp_path, monkeypatch):
    """A disk that answers no one for a minute: the other machine's renewals could not be seen."""
    path = tmp_path / "lock"
    elsewhere(path)
    watch = leases._Watch()
    began = time.monotonic()
    dead = []
    for seconds in (0, 60, 61, *range(64, 104, 4)):
        monkeypatch.setattr(time, "monotonic", lambda now=began + seconds: now)
        dead.append(watch.is_dead(path, watch.look(path)))
    assert dead[:4] == [False] * 4
    assert dead[-1]
