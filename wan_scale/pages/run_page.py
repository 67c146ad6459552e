"""report.html of a run: curves, previews over time, plan and actual so far, alarms. It opens from disk, offline.

    python wan_scale/run.py report runs/wan-1.3b        # of any run, while it trains or later

Everything is read from the run's folder: OUT/<phase>/log.jsonl, previews/, plan.json and student.json. While a phase
trains, training/watch.py writes the page at each checkpoint and preview, and the page loads itself anew.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from wan_scale.data.files import atomic, read_json
from wan_scale.training import logs

TITLES = {
    "stage1": "Stage 1: TM-MF",
    "stage2": "Stage 2: DMD2-v with the head rolled out",
    "kd": "Baseline: KD warm-up",
    "dmd2v": "Baseline: DMD2-v",
    "teacher": "Teacher: flow matching",
}
NO_CURVES = ("step", "seconds", "skipped")
LINES, POINTS, PICTURES, ALARMS = 6_000, 300, 40, 100  # at most: lines read, points of a curve, previews, alarms
RELOAD = 30  # seconds
TEMPLATE = Path(__file__).with_suffix(".html")


def write(run: str | Path, by: str = "") -> Path:
    """RUN/report.html, whole or not at all; its path. by: the phase that writes it, while others may as well.

    ValueError where no phase has a log; RuntimeError where the disk does not take it.
    """
    run = Path(run)
    phases = [phase(run / name) for name in TITLES if (run / name / "log.jsonl").exists()]
    if not phases:
        raise ValueError(f"{run} holds no log of a training; give the folder that was its --out.")
    phases.sort(key=lambda p: p["finished"])  # what still trains stands first
    running = [p["name"] for p in phases if not p["finished"]]
    facts = {"run": run.resolve().name, "phases": phases, "running": running, "reload": RELOAD,
             "written": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip
    embedded = json.dumps(facts, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    anew = f'<meta http-equiv="refresh" content="{RELOAD}">' if running else ""
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{REFRESH}}", anew).replace("{{FACTS}}", embedded)
    path = run / "report.html"
    with atomic(path, path.with_name(f"report.html{by and '-' + by}.tmp")) as file:
        file.write(text.encode())
    return path


def phase(folder: Path) -> dict:
    """What the page shows of OUT/<phase>."""
    lines = read_log(folder / "log.jsonl")
    done, plan = folder / "student.json", folder / "plan.json"
    facts, planned = told(done), told(plan)
    target = planned.get("updates") or facts.get("updates")
    timed = [line for line in lines if finite(line.get("seconds"))]
    last = timed[-1] if timed else {"step": 0, "seconds": 0.0}
    recent = [pair for pair in zip(timed, timed[20:] or timed[-1:])][-1:]  # over the last twenty lines
    pace = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in recent if b["step"] > a["step"]]
    held = [line["memory"].get("allocated_gb") for line in lines if isinstance(line.get("memory"), dict)]
    alarms = [[line["step"], str(line["alarm"])] for line in lines if "alarm" in line]
    step = max([last["step"], facts.get("updates", 0)])
    return {
        "name": folder.name,
        "title": TITLES[folder.name],
        "finished": bool(facts) and step >= (target or 0) and facts.get("updates", 0) >= step,
        "updates": step,
        "target": target,
        "seconds": last["seconds"],
        "each": last["seconds"] / last["step"] if last["step"] else None,
        "pace": pace[0] if pace else None,
        "GB": max(filter(finite, held), default=None),
        "skipped": last.get("skipped", 0),
        "plan": planned,
        "curves": curves(lines, planned.get("seconds")),
        "previews": pictures(folder, lines),
        "alarms": alarms[-ALARMS:][::-1],
        "alarms left out": max(0, len(alarms) - ALARMS),
    }


def told(path: Path) -> dict:
    """What a file of the run says; nothing where it is missing or damaged: the page shows what there is."""
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}


def finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_log(path: Path) -> list[dict]:
    """The lines of a log in order; of a long one evenly picked neighbours, and all previews, alarms, memory.

    A line that a kill cut short is left out.
    """
    raw = path.read_bytes().splitlines()
    every = max(1, -(-len(raw) // LINES))
    rare = lambda line: any(word in line for word in (b'"preview"', b'"alarm"', b'"memory"'))
    # neighbours: in stage 2 the student's line and a critic's stand side by side
    chosen = (line for i, line in enumerate(raw) if i // 2 % every == 0 or rare(line))
    found = []
    for line in chosen:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            found.append(value)
    return found


def curves(lines: list[dict], planned: float | None) -> list[dict]:
    """Every logged number over the updates, and the seconds of an update; hints are those of training/logs.py."""
    series: dict[str, list] = {}
    for line in lines:
        values = {**{k: v for k, v in line.items() if k not in NO_CURVES}, **(line.get("preview") or {})}
        for key, value in values.items():
            if finite(value):
                series.setdefault(key, []).append((line["step"], value))
    timed = [line for line in lines if finite(line.get("seconds"))]
    paces = [
        (b["step"], (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]))
        for a, b in zip(timed, timed[2:])  # not neighbours: the student's update costs more than a critic's
        if b["step"] > a["step"]
    ]
    told, previews = hints(), {key for line in lines for key in line.get("preview") or {}}
    found = []
    for name, points in {**series, "seconds per update": paces}.items():
        if len(points) > 1:
            hint = next((text for key, text in told.items() if name == key or name.startswith(f"{key} ")), "")
            level = 1.0 if name in previews else planned if name == "seconds per update" else None
            found.append({"name": name, "hint": hint, "level": level, "points": thinned(points)})
    return sorted(found, key=lambda curve: curve["name"] not in previews)  # first what tells of quality


def hints() -> dict[str, str]:
    """{number: what it should do}, from the table at the top of training/logs.py."""
    rows = [line.strip("| ").split(" | ", 1) for line in logs.__doc__.splitlines() if line.startswith("| ")]
    return {name: text for names, text in rows for name in names.split(", ")}


def thinned(points: list[tuple[int, float]], most: int = POINTS) -> list[list[float]]:
    """At most `most` of [update, lowest, mean, highest], so that no spike is lost."""
    every, found = max(1, -(-len(points) // most)), []
    short = lambda value: float(f"{value:.4g}")
    for i in range(0, len(points), every):
        part = [value for _, value in points[i : i + every]]
        found.append([points[i + len(part) - 1][0], *map(short, (min(part), sum(part) / len(part), max(part)))])
    return found


def pictures(folder: Path, lines: list[dict]) -> list[dict]:
    """The previews' pictures, evenly picked, with their numbers; paths are relative to the page."""
    numbers = {line["step"]: line["preview"] for line in lines if isinstance(line.get("preview"), dict)}
    files = sorted((folder / "previews").glob("step-*.png"))
    if len(files) > PICTURES:
        files = [files[round(i * (len(files) - 1) / (PICTURES - 1))] for i in range(PICTURES)]
    found = []
    for file in files:
        step = int(file.stem.removeprefix("step-")) if file.stem.removeprefix("step-").isdecimal() else 0
        shown = {key: value for key, value in numbers.get(step, {}).items() if finite(value)}
        found.append({"step": step, "file": f"{folder.name}/previews/{file.name}", "numbers": shown})
    return found
