"""Checkpoints of a phase: path/step-00000100/, complete or not there, with a checksum of every file.

Each rank writes its own parts, so that a run may go on with another number of ranks. state.json, which is written last,
holds the plain values and the checksums.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import tmd_minimal as tmd
from wan_scale.data.files import file_sha256
from wan_scale.training import dist, kept

UNASKED = 50e9  # bytes: checksums of larger parts, a minute's reading, are compared only where asked for
ASIDE = ".old.tmp"  # a checkpoint of the same name, until the new one has taken its place
OLDER = "delete that folder to go on from the one before it"


def complete(path) -> list[Path]:
    """Finished checkpoints of a phase, oldest first."""
    return sorted(
        folder for folder in Path(path).glob("step-*") if folder.suffix != ".tmp" and (folder / "state.json").exists()
    )


def sweep(path) -> None:
    """Remove what a kill left half-written, here and in the phase's folder above."""
    if dist.rank() == 0:
        for old in Path(path).glob(f"step-*{ASIDE}"):
            if not (final := old.with_name(old.name.removesuffix(ASIDE))).exists():
                os.replace(old, final)  # the kill came between the two moves
        for left in (*Path(path).glob("step-*.tmp"), *Path(path).parent.glob("*.tmp")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def drop(path) -> None:
    """Remove all checkpoints of a phase; a kill leaves all of them or, for `sweep`, a .tmp."""
    if dist.rank() == 0 and Path(path).exists():
        going = Path(path).with_suffix(".tmp")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going)


def check_room(path, size: int, keep: int, student: int = 0) -> None:
    """RuntimeError unless the disk takes what will lie there at once: `keep` checkpoints, the one in work, and the
    student in the end (bytes).
    """
    there = Path(path)
    while not there.exists():
        there = there.parent
    free, need = shutil.disk_usage(there).free, size * (keep + 1 - len(complete(path))) + student
    if need > free:
        needed = f"{need / 1e9:.3g} GB for {keep + 1} checkpoints and the student are needed"
        gb = f"{needed} and {free / 1e9:.3g} GB are free"
        raise RuntimeError(f"{path} has too little disk: {gb}; free some, or give --out on another disk.")


def save(path, name: str, tensors: dict[str, torch.Tensor], state: dict, keep: int, verify: bool = False) -> None:
    """Write path/name and drop all but the newest `keep`. All ranks call. verify: checksums beyond 50 GB a rank too.

    RuntimeError where that fails, as on a full disk: nothing half-written is left, older ones stay.
    """
    final = Path(path) / name
    temporary = final.with_suffix(".tmp")
    try:
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        dcp.save(tensors, checkpoint_id=temporary, process_group=dist.patient())
        mine = [file for file in temporary.iterdir() if writer(file) == dist.rank()]
        small = verify or sum(file.stat().st_size for file in mine) < UNASKED  # or the GPUs would wait a minute a save
        sums = {file.name: file_sha256(file) for file in mine if small}
        sums = {name: value for part in dist.gathered(sums) for name, value in part.items()}
        if dist.rank() == 0:
            kept.write(temporary / "state.json", {**state, "files": sums})
    except (CheckpointException, OSError, RuntimeError) as e:
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        stays = "the last one is kept; make room and give the same command"
        raise RuntimeError(f"checkpoint {final} could not be written ({cause(e)}); {stays}.") from e
    if dist.rank() == 0:
        aside = final.with_name(final.name + ASIDE)
        if final.exists():
            os.replace(final, aside)
        os.replace(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
        for old in complete(path)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def cause(e: BaseException) -> str:
    """The first reason behind an error of torch's, which reports those of all ranks."""
    failures = getattr(e, "failures", None) or {}
    inner = next((f[0] if isinstance(f, tuple) else f for f in failures.values()), e)
    return kept.reason(inner.__cause__ or inner)


def writer(file: Path) -> int:
    """The rank that wrote a file of a checkpoint: torch names them __RANK_NUMBER.distcp, the rest is of rank 0."""
    number = file.name.removeprefix("__").partition("_")[0]
    return int(number) if file.suffix == ".distcp" and number.isdigit() else 0


def read_state(folder: Path) -> dict:
    """Plain values of a checkpoint; CheckpointError if they are not readable."""
    try:
        return kept.read(folder / "state.json", OLDER)
    except RuntimeError as e:
        raise tmd.CheckpointError(str(e)) from e


def load(folder: Path, tensors: dict[str, torch.Tensor], sums: dict[str, str], verify: bool = False) -> None:
    """Read a checkpoint into `tensors`, its checksums compared first. All ranks call; CheckpointError in one sentence.

    Beyond 50 GB a rank checksums are compared only with `verify`.
    """
    sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in sums}
    if verify or sum(sizes.values()) < UNASKED * dist.world():
        mine = sorted(sums)[dist.rank() :: dist.world()]
        bad = [name for name in mine if not sizes[name] or file_sha256(folder / name) != sums[name]]
        if bad := [name for part in dist.gathered(bad) for name in part]:
            raise tmd.CheckpointError(f"{folder} is damaged (the checksum of {bad[0]} differs); {OLDER}.")
    try:
        dcp.load(tensors, checkpoint_id=folder, process_group=dist.patient())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError, EOFError) as e:
        raise tmd.CheckpointError(f"{folder} is damaged or of another shape; {OLDER}.") from e
