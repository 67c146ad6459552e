"""What a finished phase leaves: OUT/<phase>/student.safetensors (the EMA) and student.json (what it is)."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

import tmd_minimal as tmd
from wan_scale.config import Wan, WanStudentConfig
from wan_scale.data.files import file_sha256
from wan_scale.data.folders import checksums, fingerprint
from wan_scale.training import checkpoints, dist, kept, weights
from wan_scale.training.phase import LENGTHS, WanPhase

AGAIN = "delete student.json and run that phase again: it goes on from its last checkpoint, where there is one"


def describe(cfg: Wan, how: WanStudentConfig, layers: int, **more) -> dict:
    """student.json: all that sampling needs to know."""
    nfe = tmd.effective_nfe(how.M, how.N, how.H, layers)
    clip = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    made = {"recipe": cfg.of_the_training(more["phase"]), "transformer": transformer_of(cfg)}
    if dist.rank() == 0:  # which writes student.json
        made |= {"parts": checksums(cfg.model), "transformer_sha256": bytes_of_transformer(cfg)}
    dist.barrier()  # minutes on a slow disk, for which NCCL would not wait
    return {**asdict(how), **clip, "effective_nfe": nfe, **made, **more}


def save_student(folder: Path, phase: WanPhase, facts: dict) -> None:
    """The EMA as safetensors, then its description, which says that the phase is finished.

    FloatingPointError where a weight is not finite, RuntimeError on a full disk: then nothing is written.
    """
    whole = dist.whole(phase.ema.named)
    if dist.rank() == 0:
        if bad := [name for name, p in whole.items() if not bool(torch.isfinite(p).all())]:
            raise FloatingPointError(
                f"{facts['phase']}: weights of the student are not finite ({bad[0]}); it is not saved, train it again."
            )
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(whole, folder / "student.safetensors")
        describe_finished(folder, facts)
    dist.say(f"{facts['phase']}: done, {folder / 'student.safetensors'}")
    dist.barrier()


def describe_finished(folder: Path, facts: dict) -> None:
    """student.json, whose existence says that the phase is finished; `facts` get the checksum of its weights."""
    if (path := folder / "student.safetensors").exists():
        facts["sha256"] = digest_of(path)
    kept.write(folder / "student.json", facts)


def described(folder: Path) -> dict:
    """student.json of a finished phase; RuntimeError in one sentence if it is damaged."""
    return kept.read(folder / "student.json", AGAIN)


def transformer_of(cfg: Wan) -> str:
    """Which transformer this is, wherever its folder lies."""
    return fingerprint(Path(cfg.model), "transformer")


def bytes_of_transformer(cfg: Wan) -> str:
    """Checksum of all of its bytes, which tells a flipped bit too: a second a GB, once a process."""
    return checksums(cfg.model, ("transformer",))["transformer"]


def other_bytes(facts: dict, cfg: Wan) -> bool:
    """Whether the transformer's bytes are not those that a student was trained on; older students do not know."""
    return facts.get("transformer_sha256", "") not in ("", bytes_of_transformer(cfg))


def start_of(folder: Path) -> dict:
    """What a phase is told of the finished one that it starts from."""
    return {"phase": folder.name, "sha256": described(folder)["sha256"]} if finished_there(folder) else {}


def finished_there(folder: Path) -> bool:
    return (folder / "student.json").exists()


def finished(folder: Path, cfg: Wan, told: bool = True, longer: bool = False) -> dict | None:
    """The description of a finished phase, told to the screen; RuntimeError if it is one of other settings.

    The teacher's weights are a setting, and so is the student that it started from. With `longer`, None as well where
    the settings ask for more updates and its checkpoints are there to go on from.
    """
    if not finished_there(folder):
        return None
    facts, mine = described(folder), cfg.of_the_training(folder.name)
    keys = {key for key, value in mine.items() if facts["recipe"].get(key) != value}
    keys -= {"--micro-batch"}  # how the batch was split is past
    more = keys and keys <= LENGTHS and all(mine[key] > facts["recipe"].get(key, mine[key]) for key in keys)
    same = facts.get("transformer") in (None, transformer_of(cfg))
    damaged = dist.agreed(dist.rank() == 0 and same and other_bytes(facts, cfg))  # all call, whatever their folders are
    if not same or damaged:
        keys.add("--model, or a damaged one" if damaged else "--model")
    before = facts.get("start") or {}
    if before and (now := start_of(folder.parent / before["phase"])) and now != before:
        keys.add(f"student of {before['phase']}")
    if longer and more and keys <= LENGTHS:
        if not checkpoints.complete(folder / "checkpoints"):
            gone = f"{folder} is finished at {facts['updates']} updates and its checkpoints are gone"
            raise RuntimeError(f"{gone}; give {' and '.join(keys)} as before, or another --out.")
        dist.say(f"{folder.name}: was finished at {facts['updates']} updates and goes on.")
        return None
    if keys:
        other = f"{folder} holds a student made with another {', '.join(sorted(keys))}"
        raise RuntimeError(f"{other}; give the same settings or another --out.")
    if "sha256" in facts and not (folder / "student.safetensors").exists():
        raise RuntimeError(f"{folder / 'student.safetensors'} is missing; {AGAIN}.")
    if told:
        dist.say(f"{folder.name}: finished, nothing to do.")
    return facts


def load_student(folder: Path, student) -> None:
    """What weights.fill will read, strictly: every weight and no other."""
    path = folder / "student.safetensors"
    if not path.exists():
        raise RuntimeError(f"{folder} holds no finished student; run the phase that makes it first.")
    stored = weights.files(path)
    weights.check(student, stored)
    student.stored = stored


def check_weights(folder: Path) -> dict:
    """The description of a student whose weights are the ones it was saved with; RuntimeError if not.

    A second a GB, once.
    """
    facts, path = described(folder), folder / "student.safetensors"
    if not path.exists() or digest_of(path) != facts["sha256"]:
        raise RuntimeError(f"{path} is missing or damaged (its checksum differs); {AGAIN}.")
    return facts


def digest_of(path: Path) -> str:
    """sha256 of a file, read once a process while its size and the time of its change stay."""
    return digest(path, path.stat().st_size, path.stat().st_mtime_ns)


@cache
def digest(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)
