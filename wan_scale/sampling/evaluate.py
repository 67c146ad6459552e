"""`eval`: a score sheet of what was sampled: cheap scores beside the teacher's, and VBench's where they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wan_scale.config import Wan
from wan_scale.data.files import atomic, write_json
from wan_scale.sampling import sample, vbench
from wan_scale.sampling.cheap_metrics import MEANING, means, score_folder
from wan_scale.training import kept


def compared(found: dict[str, dict]) -> list[str]:
    """The prompts of which every folder has a video; sets each folder's "mean" to that over them.

    Where there are none, each folder keeps the mean over its own.
    """
    of_all = [set(scores["prompts"]) for scores in found.values()]
    shared = sorted(set.intersection(*of_all))
    several = lambda p: all(scores["prompts"][p]["diversity"] is not None for scores in found.values())
    if shared:
        for scores in found.values():
            scores["mean"] = means(scores, shared, [p for p in shared if several(p)])
    return shared


def sheet(cfg: Wan, folders: dict[str, Path]) -> str:
    """OUT/scores.json and OUT/scores.md from {name: folder of mp4s}; returns the text."""
    made = {name: vbench.check_marks(folder) for name, folder in folders.items()}
    found = {name: score_folder(folder) for name, folder in folders.items()}
    shared = compared(found)
    timed = {name: folder / "timing.json" for name, folder in folders.items()}
    again = "delete it, new videos bring another"
    timing = {name: kept.read(file, again) for name, file in timed.items() if file.exists()}
    over = shared or "their own"
    count = lambda scores: sum(scores["prompts"][p]["samples"] for p in shared or scores["prompts"])
    lines = [f"| score | {' | '.join(found)} | what it should do |", "|---" * (len(found) + 2) + "|"]
    lines.append(f"| clips | {' | '.join(str(count(scores)) for scores in found.values())} | {told(found, shared)} |")
    for score, (unit, meaning) in MEANING.items():
        values = [scores["mean"][score] for scores in found.values()]
        lines.append(
            f"| {score} ({unit}) | "
            + " | ".join("-" if v is None else f"{v:.4f}" for v in values)
            + f" | {meaning.replace('|', chr(92) + '|')} |"
        )
    for name in folders:
        if made[name].get("student", now := newest(cfg, name)) != now and now:
            lines.append(f"\n{name}: these videos are of an earlier student; move {folders[name]} away to sample anew.")
    for name, t in timing.items():
        seconds = ", ".join(f"{part} {s:.3g} s" for part, s in t["median_seconds"].items())
        lines.append(
            f"\n{name}: M = {t['M']}, N = {t['N']}, effective NFE {t['effective_nfe']:.2f}; "
            f"median a video on {t['device']}: {seconds}."
        )
    result = {"cheap": found, "compared": over, "timing": timing}
    if cfg.vbench_results:
        result["vbench"] = vbench.aggregate(vbench.read_results(cfg.vbench_results))
        nfe = timing[cfg.student]["effective_nfe"] if cfg.student in timing else None
        lines += ["", vbench.compare(result["vbench"], nfe=nfe)]
    else:
        lines.append(
            "\nVBench: not run. Its networks are a download of their own; "
            "wan_scale/README.md has the commands, then --vbench-results."
        )
    text = "\n".join(lines) + "\n"
    write_json(cfg.folder("scores.json"), result)
    with atomic(cfg.folder("scores.md")) as file:
        file.write(text.encode())
    return text


def newest(cfg: Wan, name: str) -> str:
    """The sha256 of the newest finished student whose videos lie in samples/NAME; "" if there is none."""
    kind = name.partition("-")[0]
    if kind not in sample.PHASES:
        return ""
    try:
        return sample.finished_student(replace(cfg, student=kind))[1]["sha256"]
    except RuntimeError:  # none, or one that `sample` would name
        return ""


def told(found: dict[str, dict], shared: list[str]) -> str:
    """Which clips the means are over, in words."""
    if not shared:
        return "no prompt is in every folder: each column is over its own clips, and they do not compare"
    left = {name: len(scores["prompts"]) - len(shared) for name, scores in found.items()}
    out = ", ".join(f"{n} of {name}" for name, n in left.items() if n)
    return f"of the {len(shared)} prompts that all have" + f"; left out: {out}" * bool(out)
