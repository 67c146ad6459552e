"""`eval`: a score sheet of what was sampled: cheap scores beside the teacher's, and VBench's where they are given."""

from __future__ import annotations

import json
import os
from pathlib import Path

from wan_scale.config import Wan
from wan_scale.sampling import vbench
from wan_scale.sampling.cheap_metrics import MEANING, score_folder


def sheet(cfg: Wan, folders: dict[str, Path]) -> str:
    """OUT/scores.json and OUT/scores.md from {name: folder of mp4s}; returns the text."""
    found = {name: score_folder(folder) for name, folder in folders.items()}
    timed = {name: folder / "timing.json" for name, folder in folders.items()}
    timing = {name: json.loads(file.read_text()) for name, file in timed.items() if file.exists()}
    lines = [f"| score | {' | '.join(found)} | what it should do |", "|---" * (len(found) + 2) + "|"]
    for score, (unit, meaning) in MEANING.items():
        values = [scores["mean"][score] for scores in found.values()]
        lines.append(
            f"| {score} ({unit}) | "
            + " | ".join("-" if v is None else f"{v:.4f}" for v in values)
            + f" | {meaning.replace('|', chr(92) + '|')} |"
        )
    for name, t in timing.items():
        seconds = ", ".join(f"{part} {s:.3g} s" for part, s in t["median_seconds"].items())
        lines.append(
            f"\n{name}: M = {t['M']}, N = {t['N']}, effective NFE {t['effective_nfe']:.2f}; "
            f"median a video on {t['device']}: {seconds}."
        )
    result = {"cheap": found, "timing": timing}
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
    for name, content in (("scores.json", json.dumps(result, indent=1) + "\n"), ("scores.md", text)):
        temporary = cfg.folder(name + ".tmp")
        temporary.write_text(content)
        os.replace(temporary, cfg.folder(name))
    return text
