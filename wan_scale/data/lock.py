"""One run at a time in a folder: two that write the same files would spoil them for each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = ".lock"  # in the folder, while a run holds it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system that knows no flock


@contextmanager
def only_one(folder: str | Path, rank: int = 0):
    """Hold FOLDER/.lock within the block; RuntimeError naming host and process if another run holds it.

    Rank 0 holds it for all ranks of a run, so let them wait for a barrier after entering. The system frees the lock of
    a process that was killed, whatever its file says. Where the file system has no locks, a file that names a process
    of this host which no longer runs is stale as well. A lock that stops at its host keeps apart what runs there.
    """
    if rank:
        yield
        return
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, held = folder / NAME, take(folder / NAME)
    try:
        os.ftruncate(held, 0)
        os.write(held, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is freed: who waits for this file notices that it is gone
        os.close(held)
        if new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


def take(path: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as e:
            free = e.errno in NO_LOCKS and not living(holder(held))
        if not free:
            who = holder(held)
            os.close(held)
            told = f"process {who['process']} on {who['host']}" if who else "another process"
            raise RuntimeError(
                f"{path.parent} is in use by {told}; wait for its end, or delete {path.name} there if it has ended."
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return held
        os.close(held)  # its holder ended, and removed the file, between the two calls above


def holder(held: int) -> dict:
    """{"host", "process"} as the file says, {} if it says nothing."""
    with suppress(ValueError, OSError):
        who = json.loads(os.pread(held, 4096, 0))
        if isinstance(who, dict) and {"host", "process"} <= who.keys():
            return who
    return {}


def living(who: dict) -> bool:
    """Whether the holder may still run: processes of other hosts cannot be asked."""
    if not who or who["host"] != socket.gethostname():
        return bool(who)
    try:
        os.kill(int(who["process"]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # someone else's
        return True
    return True
