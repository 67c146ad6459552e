"""What a finished phase leaves: OUT/<phase>/student.safetensors (the EMA) and student.json (what it is)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import tmd_minimal as tmd
from wan_scale.config import Wan, WanStudentConfig
from wan_scale.data.files import file_sha256, read_json, write_json
from wan_scale.data.folders import fingerprint
from wan_scale.training import dist, weights
from wan_scale.training.phase import WanPhase


def describe(cfg: Wan, how: WanStudentConfig, layers: int, **more) -> dict:
    """student.json: all that sampling needs to know."""
    nfe = tmd.effective_nfe(how.M, how.N, how.H, layers)
    clip = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width}
    made = {"recipe": cfg.of_the_training(more["phase"]), "transformer": fingerprint(Path(cfg.model), "transformer")}
    return {**asdict(how), **clip, "effective_nfe": nfe, **made, **more}


def save_student(folder: Path, phase: WanPhase, facts: dict) -> None:
    """The EMA as safetensors, then its description, which says that the phase is finished; adds "sha256" to `facts`."""
    whole = dist.whole(phase.ema.named)
    dist.say(f"{facts['phase']}: done, {folder / 'student.safetensors'}")
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(whole, folder / "student.safetensors")
        facts["sha256"] = file_sha256(folder / "student.safetensors")
        describe_finished(folder, facts)
    dist.barrier()


def describe_finished(folder: Path, facts: dict) -> None:
    """student.json, whose existence says that the phase is finished."""
    write_json(folder / "student.json", facts)


def finished(folder: Path, cfg: Wan, told: bool = True) -> dict | None:
    """The description of a finished phase, told to the screen; RuntimeError if it is one of other settings."""
    if not (folder / "student.json").exists():
        return None
    facts, mine = read_json(folder / "student.json"), cfg.of_the_training(folder.name)
    if not isinstance(recipe := facts.get("recipe"), dict):
        raise RuntimeError(f"{folder / 'student.json'} does not say recipe; copy it again, or delete it to train anew.")
    keys = [key for key, value in mine.items() if recipe.get(key) != value]
    keys = [key for key in keys if key != "--micro-batch"]  # how the batch was split is past
    if keys:
        other = f"{folder} holds a student made with another {', '.join(keys)}"
        raise RuntimeError(f"{other}; give the same settings or another --out.")
    if told:
        dist.say(f"{folder.name}: finished, nothing to do.")
    return facts


def load_student(folder: Path, student) -> None:
    """What weights.fill will read, strictly: every weight and no other."""
    if not (folder / "student.safetensors").exists():
        raise RuntimeError(f"{folder} holds no finished student; run the phase that makes it first.")
    stored = weights.files(folder / "student.safetensors")
    weights.check(student, stored)
    student.stored = stored
