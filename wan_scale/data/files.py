"""Files of a data folder: they appear whole or not at all, and each error in reading one is a sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError


def read_json(path: Path) -> dict:
    """A JSON object; ValueError in one sentence if the file is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; give a folder that `data` has made.") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; copy or make it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; copy or make it again.")
    return value


@contextmanager
def writing(path: Path):
    """Within, `path` is written; RuntimeError in one sentence where the disk does not take it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e)
        why = "the disk is full; free some" if full else f"{getattr(e, 'strerror', None) or e}; see to it"
        raise RuntimeError(f"{path} could not be written: {why}, then run the same command again.") from e


@contextmanager
def atomic(path: Path, temporary: Path | None = None):
    """A binary file to write; it appears as `path` whole at the end of the block. RuntimeError if the disk is full.

    Ranks may write the same file at once: each has a temporary of its own. It is the same each time, so a kill leaves
    one at most.
    """
    rank = f".{os.environ['RANK']}" if "RANK" in os.environ else ""  # set by torchrun
    temporary = temporary or path.with_name(f"{path.name}{rank}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """file_sha256, read once a process while the file's size and the time of its change stay."""
    stat = path.stat()
    return remembered(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def remembered(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


class HashedFile:
    """Counts and hashes what is written to a file, so that a shard is written once and never read back."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def write_safetensors(file, entries: list, load) -> None:
    """Write a safetensors file, holding one tensor at a time.

    entries: (name, dtype's name, dtype, shape) in the order of the file; load(name) -> tensor.
    """
    header, end = {}, 0
    for name, code, dtype, shape in entries:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name, _, dtype, shape in entries:
        tensor = load(name)
        if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
            found = f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}"
            raise RuntimeError(f"{found}; delete out/parts and run again.")
        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
