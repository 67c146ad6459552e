"""JSON that knows when it was damaged, and reasons in words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from wan_scale.data.files import read_json, write_json

SEAL = "seal"  # the key of a JSON object's own checksum


def reason(e: BaseException) -> str:
    """What went wrong, on one line: the system's words where there are any."""
    return getattr(e, "strerror", None) or " ".join(str(e).split())[:120] or type(e).__name__


def digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, value: dict) -> None:
    """A JSON object with the sha256 of its own content, whole or not at all."""
    write_json(path, {**value, SEAL: digest(value)})


def read(path: Path, advice: str) -> dict:
    """What `write` wrote; RuntimeError, with `advice`, if it cannot be read or a byte of it is another."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as e:
        raise RuntimeError(f"{path} is not JSON; {advice}.") from e
    if SEAL not in value:
        raise RuntimeError(f"{path} has no checksum: an older version wrote it, or it is damaged; {advice}.")
    if value.pop(SEAL) != digest(value):
        raise RuntimeError(f"{path} is damaged (its checksum differs); {advice}.")
    return value
