"""What a run keeps: files that appear whole or not at all, and JSON that knows when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole(path: str | Path):
    """A temporary path to write; when the block has ended, it is flushed and becomes `path`.

    RuntimeError where that fails, as on a full disk: then nothing is left of it, and what was at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise RuntimeError(f"{path} could not be written ({reason(e)}); make room and give the same command.") from e
    finally:
        temporary.unlink(missing_ok=True)


def reason(e: BaseException) -> str:
    """What went wrong, on one line: the system's words where there are any."""
    return getattr(e, "strerror", None) or " ".join(str(e).split())[:120] or type(e).__name__


def digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, value: dict) -> None:
    """A JSON object with the sha256 of its own content, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps({**value, "sha256": digest(value)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path, advice: str) -> dict:
    """What `write` wrote; RuntimeError, with `advice`, if it cannot be read or a byte of it is another."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sound = value.pop("sha256") == digest(value)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise RuntimeError(f"{path} is not readable; {advice}.") from e
    if not sound:
        raise RuntimeError(f"{path} is damaged (its checksum differs); {advice}.")
    return value
