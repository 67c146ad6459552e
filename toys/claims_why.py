"""What explains the rows of the claims on moving shapes: what a head does, scores against updates, scores by law.

From the records of jobs to numbers, and from numbers to tables.
"""

from __future__ import annotations

from toys.moving_shapes import MOTIONS
from toys.verdicts import difference, show, summary

# long runs whose difference is shown against updates
LEADS = (("TMD less DMD2-v, M = 1", "tmd long", "dmd2v long"),
         ("TMD less DMD2-v of 6 more blocks, M = 1", "tmd long", "dmd2v deep long"),
         ("neither warmed up, M = 1", "tmd no stage 1 long", "dmd2v no kd long"),
         ("both warmed up at 1e-3, M = 1", "tmd warm-up 1e-3 long", "dmd2v warm-up 1e-3 long"),
         ("TMD less DMD2-v, M = 2", "tmd M2 long", "dmd2v M2 long"),
         ("every second less every fifth, at 1e-3, TMD", "tmd warm-up 1e-3 long", "tmd every 5"),
         ("the same, DMD2-v", "dmd2v warm-up 1e-3 long", "dmd2v every 5"))  # fmt: skip


def heads(jobs: dict) -> dict:
    """{TMD student: {"stage 1": total after it, "gate" and "y_1" by phase, "N": {N at sampling: total}}}, summaries."""
    found = {}
    for name, records in jobs.items():
        mine = [r for r in records if "head" in r]
        if not mine:
            continue
        student = mine[0]["settings"]["student"]
        by_N = {steps: [r["other N"][steps]["total"] for r in mine] for steps in mine[0]["other N"]}
        by_N[str(student["N"])] = [r["end"]["total"] for r in mine]
        if student["N"] > 1:
            by_N["1"] = [r["one"]["total"] for r in mine]
        of = lambda phase, key, mine=mine: [r["head"][phase][key] for r in mine if phase in r["head"]]
        parts = {"gate": "gate", "y_1": "y_1 share"}
        phases = {part: {phase: of(phase, key) for phase in ("stage1", "end")} for part, key in parts.items()}
        known = lambda values: summary(values) if values and None not in values else None
        found[name] = {part: {phase: known(values) for phase, values in p.items()} for part, p in phases.items()}
        found[name]["stage 1"] = known([r["stage1"]["total"] for r in mine if "stage1" in r])
        found[name]["N"] = {steps: summary(by_N[steps]) for steps in sorted(by_N, key=int)}
    return found


def curves(jobs: dict) -> dict:
    """{student of the long runs: [{"updates", "total": its summary over seeds}]}."""
    found = {}
    for name, records in jobs.items():
        mine = [r["curve"] for r in records if r.get("curve")]
        if mine:
            points = [{point["updates"]: point["total"] for point in curve} for curve in mine]
            shared = sorted(set.intersection(*map(set, points)))
            found[name] = [{"updates": u, "total": summary([p[u] for p in points])} for u in shared]
    return found


def leads(jobs: dict) -> dict:
    """{pair of long runs, in words: [{"updates", "difference": A - B of total by seed, with its interval}]}.

    At the updates that all seeds of a pair share; of a student without a curve those at its end.
    """
    found = {}
    points = lambda r: r.get("curve") or ([{"updates": r["updates"], **r["end"]}] if "end" in r else [])
    for words, *pair in LEADS:
        a, b = ({r["seed"]: {p["updates"]: {"total": p["total"]} for p in points(r)} for r in jobs.get(name, [])
                 if points(r)} for name in pair)  # fmt: skip
        both = a.keys() & b.keys()
        shared = set.intersection(*(set(side[seed]) for side in (a, b) for seed in both)) if both else ()
        of = lambda side, updates, seeds=both: {seed: side[seed][updates] for seed in seeds}
        rows = [{"updates": u, "difference": difference(of(a, u), of(b, u), "total")} for u in sorted(shared)]
        if all(row["difference"] for row in rows) and rows:
            found[words] = rows
    return found


def leads_table(result: dict) -> list[str]:
    """The paired differences of the long runs against updates."""
    pairs = result.get("leads")
    if not pairs:
        return []
    heads = [f"{words} ({rows[0]['difference']['n']} seeds): mean, 95 %" for words, rows in pairs.items()]
    lines = [f"| updates | {' | '.join(heads)} |", "|---" * (len(pairs) + 1) + "|"]
    told = {words: {row["updates"]: row["difference"] for row in rows} for words, rows in pairs.items()}
    cell = lambda d: f"{d['mean']:+.3f}, {d['low']:.3f} to {d['high']:.3f}" if d else "-"
    for updates in sorted({u for rows in told.values() for u in rows}):
        lines.append(f"| {updates} | {' | '.join(cell(rows.get(updates)) for rows in told.values())} |")
    return ["\n".join(lines) + "\n"]


def laws_table(result: dict) -> list[str]:
    """Total score of each student by motion law."""
    if not result.get("laws"):
        return []
    lines = [f"| total score by motion law | {' | '.join(MOTIONS)} |", "|---" * (len(MOTIONS) + 1) + "|"]
    for name, laws in sorted(result["laws"].items()):
        lines.append(f"| {name} | " + " | ".join(show(laws[law]) for law in MOTIONS) + " |")
    return ["\n".join(lines) + "\n"]


def heads_table(result: dict) -> list[str]:
    """Of each TMD student: total after stage 1 and by N at sampling, the gate, the share of y_1."""
    rows = result.get("head")
    if not rows:
        return []
    steps = sorted({n for row in rows.values() for n in row["N"]}, key=int)
    cell = lambda s: "-" if s is None else show(s) if s["n"] > 1 else f"{s['mean']:.3f}"
    columns = ["student", "total after stage 1", *(f"N = {n}" for n in steps)]
    columns += [f"{part} after {phase}" for part in ("gate", "share of y_1") for phase in ("stage 1", "stage 2")]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in sorted(rows.items()):
        cells = [row["stage 1"], *(row["N"].get(n) for n in steps)]
        cells += [row[part][phase] for part in ("gate", "y_1") for phase in ("stage1", "end")]
        lines.append(f"| {name} | {' | '.join(map(cell, cells))} |")
    return ["\n".join(lines) + "\n"]
