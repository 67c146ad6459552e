"""One run at a time in a folder: the lock of wan_scale/data/lock.py."""

import errno
import fcntl
import json
import os
import signal
import socket
import time

import pytest

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
    (tmp_path / NAME).write_text('{"ho')
    with only_one(tmp_path):
        pass


def test_a_folder_that_was_made_for_the_lock_alone_goes_again(tmp_path):
    """A run that is refused before it writes leaves no folder; one that wrote keeps its own."""
    with pytest.raises(ValueError), only_one(tmp_path / "a"):
        raise ValueError
    assert not (tmp_path / "a").exists()
    with only_one(tmp_path / "a"):
        (tmp_path / "a" / "x").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
