"""One run at a time in a folder: the lock of wan_scale/data/lock.py."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress

import pytest

from wan_scale.data import lock
from wan_scale.data.lock import NAME, only_one


def held_elsewhere(folder):
    """A child process that holds the folder until it is killed; its number."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        with only_one(folder):
            os.write(done, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return child


@pytest.mark.parametrize("locks", [True, False])
def test_one_run_at_a_time(tmp_path, monkeypatch, locks):
    """A second run is told host and process of the first; after a kill, and after an end, the folder is free; also on a
    file system without locks.
    """
    if not locks:

        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
    folder = tmp_path / "out"
    child = held_elsewhere(folder)
    try:
        with pytest.raises(RuntimeError, match=f"in use by process {child} on {socket.gethostname()}; "):
            with only_one(folder):
                pass
        with only_one(folder, rank=1):  # rank 0 holds it for all
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (folder / NAME).exists()  # stale
    for _ in range(2):
        with only_one(folder):
            assert json.loads((folder / NAME).read_text())["process"] == os.getpid()
        assert not any(folder.iterdir())


def test_without_locks_another_host_is_believed(tmp_path, monkeypatch):
    """Where the file system has no locks, the file of a run on another host is believed, half a file is not."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / NAME).write_text('{"host": "elsewhere", "process": 1}')
    with pytest.raises(RuntimeError, match="process 1 on elsewhere"):
        with only_one(tmp_path):
            pass
    (tmp_path / NAME).write_text('{"ho')  # being written, or of a host that lost its power
    with pytest.raises(RuntimeError, match="in use by another process"):
        with only_one(tmp_path):
            pass
    os.utime(tmp_path / NAME, (0, 0))
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize("left", [None, '{"host": "here", "process": 0}'])
def test_without_locks_one_of_several_gets_it(tmp_path, monkeypatch, left):
    """Runs that start together, on an empty folder or on a stale file: one holds it, the others are refused."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(lock, "living", lambda who: who["process"] != 0)
    if left:
        (tmp_path / NAME).write_text(left)
    together, refused, got = threading.Barrier(2), threading.Event(), []

    def run():
        together.wait()
        with suppress(RuntimeError), only_one(tmp_path):
            got.append(1)
            refused.wait(60)  # a slow machine may stop the other thread for seconds
            return
        refused.set()

    threads = [threading.Thread(target=run) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == [1] and not any(tmp_path.iterdir())


def test_a_lock_that_was_deleted_and_taken_again_stays(tmp_path):
    """A run whose lock a person deleted does not remove that of the run which came after it."""
    with only_one(tmp_path):
        (tmp_path / NAME).unlink()
        with only_one(tmp_path):
            there = (tmp_path / NAME).stat().st_ino
            (tmp_path / NAME).rename(tmp_path / "theirs")
        (tmp_path / "theirs").rename(tmp_path / NAME)
    assert (tmp_path / NAME).stat().st_ino == there


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file in the folder's place is a sentence."""
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"\.lock could not be written: .*; see to it"):
        with only_one(tmp_path / "file"):
            pass


def test_a_folder_that_was_made_for_the_lock_alone_goes_again(tmp_path):
    """A run that is refused before it writes leaves no folder; one that wrote keeps its own."""
    with pytest.raises(ValueError), only_one(tmp_path / "a"):
        raise ValueError
    assert not (tmp_path / "a").exists()
    with only_one(tmp_path / "a"):
        (tmp_path / "a" / "x").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
