"""One run at a time in a folder: two that write the same files would spoil them for each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from wan_scale.data.files import writing

NAME = ".lock"  # in the folder, while a run holds it
UNNAMED = 10.0  # seconds that a file may be there before its run has written its name into it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system that knows no flock


@contextmanager
def only_one(folder: str | Path, rank: int = 0):
    """Hold FOLDER/.lock within the block; RuntimeError naming host and process if another run holds it.

    Rank 0 holds it for all ranks of a run, so let them wait for a barrier after entering. The system frees the lock of
    a process that was killed, whatever its file says. Where the file system has no locks, the file itself is the lock:
    one that names a process of this host which no longer runs is stale, one that names another host's is believed. A
    lock that stops at its host keeps apart what runs there.
    """
    if rank:
        yield
        return
    folder = Path(folder)
    new, path = not folder.exists(), folder / NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        held = take(path)
    try:
        with writing(path):
            os.ftruncate(held, 0)
            os.write(held, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        yield
    finally:
        if same(held, path):  # or a person deleted it, and it is another run's by now
            path.unlink(missing_ok=True)  # before the lock is freed: who waits for this file notices that it is gone
        os.close(held)
        if new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


def take(path: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        held, mine = opened(path)
        if held is None:
            continue  # it went between two calls
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as e:
            free = e.errno in NO_LOCKS and (mine or stale(held))
            if free and not mine:  # of several that find it stale, one makes the next
                remove(held, path)
                os.close(held)
                continue
        if not free:
            who = holder(held)
            os.close(held)
            told = f"process {who['process']} on {who['host']}" if who else "another process"
            raise RuntimeError(
                f"{path.parent} is in use by {told}; wait for its end, or delete {path.name} there if it has ended."
            )
        if same(held, path):
            return held
        os.close(held)  # its holder ended, and removed the file, between the two calls above


def opened(path: Path) -> tuple[int | None, bool]:
    """Descriptor of the lock file, and whether this call made it."""
    with suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR), False
    return None, False


def same(held: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has this name now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(held), os.stat(path))
    return False


def stale(held: int) -> bool:
    """Whether the file of a run that ended lies there: it says nothing for a while, or its process is gone."""
    who = holder(held)
    return not living(who) if who else time.time() - os.fstat(held).st_mtime > UNNAMED


def remove(held: int, path: Path) -> None:
    """Remove a stale file, unless another run has put its own there."""
    aside = path.with_name(f"{path.name}-{os.getpid()}-{held}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if not same(held, aside):
            os.rename(aside, path)
        aside.unlink(missing_ok=True)


def holder(held: int) -> dict:
    """{"host", "process"} as the file says, {} if it says nothing."""
    with suppress(ValueError, OSError):
        who = json.loads(os.pread(held, 4096, 0))
        if isinstance(who, dict) and {"host", "process"} <= who.keys():
            return who
    return {}


def living(who: dict) -> bool:
    """Whether the holder may still run: processes of other hosts cannot be asked."""
    if who["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(who["process"]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # someone else's
        return True
    return True
