"""The rule by which the claims are judged, and the tables it fills. It was stated before any run:

A and B meet on the same seeds: the same data in the same order, the same noise. On a score, take their differences,
seed by seed, and the 95 % interval of the mean (Student's t).

    LEVEL    the interval lies within the rung's margin, a difference too small to matter
    BETTER   else, the whole interval is on A's side of zero
    WORSE    else, it is on B's side

A claim "A beats B" HOLDS if A is better on one of the scores that the rung names and worse on none, DOES NOT HOLD the
other way round. It is LEVEL if A and B are level on every score, and INCONCLUSIVE otherwise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from settings import write_json

SEEDS = (0, 1, 2, 3, 4)
PILOT = SEEDS[:3]
# Student's t by degrees of freedom: 97.5 % for the interval, 80 % for the power of the pilot's smallest difference
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T_80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883}


def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation and standard error."""
    n, mean = len(values), sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return {"mean": mean, "std": std, "se": std / math.sqrt(n), "n": n}


def difference(a: dict, b: dict, score: str) -> dict | None:
    """A - B of a score over the seeds that {seed: {score: value}} share, with its 95 % interval; None if under two."""
    seeds = sorted(seed for seed in a.keys() & b.keys() if score in a[seed] and score in b[seed])
    if len(seeds) < 2:
        return None
    s = summary([a[seed][score] - b[seed][score] for seed in seeds])
    half = T_975[s["n"] - 1] * s["se"]
    return {**s, "low": s["mean"] - half, "high": s["mean"] + half}


def verdict(differences: dict, scores: dict, margins: dict) -> str:
    """What the rule says of "A beats B", from {score: difference}: one of the words of the page above."""
    found = []
    for score, d in differences.items():
        low, high = (d["low"], d["high"]) if scores[score] > 0 else (-d["high"], -d["low"])
        level = -margins[score] < low and high < margins[score]
        found.append("level" if level else "better" if low > 0 else "worse" if high < 0 else "open")
    if "better" in found and "worse" not in found:
        return "holds"
    if "worse" in found and "better" not in found:
        return "does not hold"
    return "level" if all(word == "level" for word in found) else "inconclusive"


def detectable(std: float, n: int) -> float:
    """The smallest difference that n seeds of this spread find in four cases of five: (t_975 + t_80) std / sqrt(n)."""
    return (T_975[n - 1] + T_80[n - 1]) * std / math.sqrt(n)


# ---- The tables ------------------------------------------------------------------------------------------------------


def job_file(root: Path, name: str, seed: int) -> Path:
    """Where a job's record lies."""
    return root / "jobs" / f"{name.replace(' ', '-')}-seed{seed}.json"


def records_of(root: Path) -> dict:
    """{name: records} of every finished job, and {"teacher 50": ...} of every teacher's own samples."""
    jobs = {}
    for file in sorted((root / "jobs").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        jobs.setdefault(record["name"], []).append(record)
    return jobs


def pilot(rung, root: Path, seeds: int) -> dict:
    """What the first pair of the list tells before the rest is run: its spread, and what `seeds` seeds can see.

    {score: {"std" of paired differences, "detectable", "headroom" between the teacher in most steps and B}}
    """
    _, _, a, b, _ = rung.claims[0]
    read = lambda name: {
        s: json.loads(job_file(root, name, s).read_text(encoding="utf-8"))["end"] for s in PILOT[:seeds]
    }
    a, b, found = read(a), read(b), {}
    teachers = [t for t in teachers_of(rung, root, next(iter(rung.jobs))) if t["seed"] in a]
    for score in rung.scores:
        d = difference(a, b, score)
        best = sum(t[str(rung.teacher_steps[0])][score] for t in teachers) / len(teachers)
        room = abs(best - sum(r[score] for r in b.values()) / len(b))
        found[score] = {"std": d["std"], "pilot_seeds": d["n"], "seeds": seeds, "headroom": room,
                        "detectable": detectable(d["std"], seeds)}  # fmt: skip
    return found


def teachers_of(rung, root: Path, name: str) -> list[dict]:
    """teacher.json of a job's teachers, by seed."""
    files = [root / rung.teacher_name(rung.toy_of(name, seed, False)) / "teacher.json" for seed in SEEDS]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def tabulate(rung, root: Path, seeds: int = len(SEEDS)) -> dict:
    """Read every finished job and write claims.json and claims.md. A row waits for all `seeds`, or its own."""
    jobs = records_of(root)

    def numbers(name, phase) -> dict:
        """{seed: scores} of a job, or in so many steps of the first job's teacher ("teacher 50") or another job's
        ("teacher 50 of tmd 12 frames").
        """
        if name.startswith("teacher "):
            steps, _, of = name.removeprefix("teacher ").partition(" of ")
            return {t["seed"]: t[steps] for t in teachers_of(rung, root, of or next(iter(rung.jobs)))}
        return {r["seed"]: r[phase] for r in jobs.get(name, []) if phase in r}

    def judge(claim, setting, names, a, b, scores=rung.scores):
        """One row. A diverged seed on either side leaves the claim undecided, and the row says so."""
        row = {"claim": claim, "setting": setting, "A": None, "B": None, "difference": None}
        diverged = sum("diverged" in r for name in names for r in jobs.get(name, []))
        shared = sorted(a.keys() & b.keys())
        if len(shared) < 2:
            return {**row, "seeds": len(shared), "verdict": f"{diverged} diverged" if diverged else "not run"}
        known = [k for k in scores if k in a[shared[0]] and k in b[shared[0]]]
        if not known:
            raise ValueError(f"no record of {setting!r} has a score of {', '.join(scores)}; correct the row.")
        for side, found in (("A", a), ("B", b)):
            row[side] = {k: summary([found[seed][k] for seed in shared]) for k in known}
        row["difference"] = {k: difference(a, b, k) for k in known}
        what = verdict(row["difference"], scores, rung.margins)
        wanted = max((len(rung.seeds_of(name, range(seeds))) for name in names), default=seeds)
        what = what if len(shared) >= wanted else f"{len(shared)} of {wanted} seeds"
        return {**row, "seeds": len(shared), "verdict": f"inconclusive ({diverged} diverged)" if diverged else what}

    models, rows = {}, []
    for claim, setting, name_a, name_b, phase, *own in rung.claims:
        phase_a, _, phase_b = phase.partition("/")
        a, b = numbers(name_a, phase_a), numbers(name_b, phase_b or phase_a)
        rows.append(judge(claim, setting, {name_a, name_b}, a, b, *own))
    for name, records in jobs.items():
        done = [r for r in records if "end" in r]
        if done:
            seconds = [r["seconds"] for r in done]  # the median knows nothing of pauses
            facts = {"seeds": len(done), "seconds": {**summary(seconds), "median": statistics.median(seconds)},
                     "diverged": len(records) - len(done)}  # fmt: skip
            models[name] = {"effective_nfe": done[0]["effective_nfe"], "updates": done[0]["updates"],
                            **{k: summary([r["end"][k] for r in done]) for k in rung.labels},
                            "student_updates": done[0]["student_updates"], **facts}  # fmt: skip
    rule = "95 % interval of paired differences, see toys/verdicts.py"
    result = {"rule": rule, "margins": rung.margins, "rows": rows, "models": models}
    if (root / "pilot.json").exists():
        result["pilot"] = json.loads((root / "pilot.json").read_text(encoding="utf-8"))
    if rung.table:
        rung.table(jobs, numbers, judge, result)
    write_json(root / "claims.json", result)
    (root / "claims.md").write_text(markdown(rung, result), encoding="utf-8")
    return result


def shown(value: float, percent: bool) -> str:
    """A score as the tables write it."""
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def show(s: dict, percent=False) -> str:
    """A summary as "mean ± standard deviation"."""
    return f"{shown(s['mean'], percent)} ± {shown(s['std'], percent)}"


def claims_table(rung, result: dict, claims: Callable = lambda claim: claim not in ("bound", "room")) -> str:
    """The claims that `claims` picks: A and B, mean ± standard deviation over seeds; the interval of A - B by seed."""

    def cell(x, text):
        if x is None:
            return "-"
        return " / ".join(text(x[k], k in rung.percent) + " %" * (k in rung.percent) for k in x)

    span = lambda d, percent: f"{shown(d['low'], percent)} to {shown(d['high'], percent)}"
    rows = [r for r in result["rows"] if claims(r["claim"])]
    paired = any(r.get("difference") for r in rows)
    heads = ["claim", "setting (A against B)", "A", "B", *["A - B, 95 %"] * paired, "A beats B"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        between = [cell(r.get("difference"), span)] * paired
        cells = [r["claim"], r["setting"], cell(r["A"], show), cell(r["B"], show), *between, r["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chance(result: dict) -> str:
    """How many verdicts chance would give if no two students differed.

    Rows C0 and "room" are left out: no student meets another there.
    """
    judged = [r for r in result["rows"] if r.get("difference") and "seeds" not in r["verdict"]]
    judged = [r for r in judged if r["claim"] not in ("C0", "room")]
    scores = sum(len(r["difference"]) for r in judged)
    told = sum(r["verdict"] in ("holds", "does not hold") for r in judged)
    missed = f"If no two of them differed, {0.05 * scores:.1f} of the intervals would miss zero by chance"
    rows = f"{len(judged)} rows compare two students, on {scores} scores in all"
    return f"{rows}. {missed}; {told} rows hold or do not hold.\n"


def pilot_words(rung, found: dict) -> str:
    """The pilot in a sentence a score."""
    lines = []
    for score, p in found.items():
        tell = lambda value, score=score: shown(value, score in rung.percent) + " %" * (score in rung.percent)
        lines.append(
            f"Pilot, {score}: paired differences spread by {tell(p['std'])} over {p['pilot_seeds']} seeds. So "
            f"{p['seeds']} seeds see a difference of {tell(p['detectable'])} in four cases of five. The teacher is "
            f"{tell(p['headroom'])} away from the one-step baseline.\n"
        )
    return "\n".join(lines)


def students_table(rung, result: dict) -> str:
    """Every student: cost, scores, seconds."""
    heads = [text + ", %" * (k in rung.percent) for k, text in rung.labels.items()]
    models = result["models"]
    kept = "median" if all("median" in m["seconds"] for m in models.values()) else "mean"  # of older lists
    head = f"| student | effective NFE | updates (of the student) | {' | '.join(heads)} "
    lines = [f"{head}| training, s{' (median)' * (kept == 'median')} | seeds |"]
    lines += ["|---" * (len(heads) + 5) + "|"]
    for name, m in sorted(models.items()):
        alone = m["seeds"] == 1  # has no spread
        told = lambda s, percent, alone=alone: shown(s["mean"], percent) if alone else show(s, percent)
        quality = " | ".join(told(m[k], k in rung.percent) for k in rung.labels)
        cost = f"{m['effective_nfe']:.2f} | {m['updates']} ({m['student_updates']})"
        lines.append(f"| {name} | {cost} | {quality} | {m['seconds'][kept]:.0f} | {m['seeds']} |")
    return "\n".join(lines) + "\n"


def bounds_table(rung, result: dict) -> str:
    """The rows that stand above the claims: what there is to win, and what more depth or more steps win of it."""
    return claims_table(rung, result, lambda claim: claim in ("bound", "room"))


def judged(rung, result: dict) -> str:
    """What the rule says: the rows that stand above the claims, the pilot, the claims, and what chance would give."""
    above = [bounds_table(rung, result)] if any(r["claim"] in ("bound", "room") for r in result["rows"]) else []
    above += [pilot_words(rung, result["pilot"])] if "pilot" in result else []
    above += [claims_table(rung, result)] if result["rows"] else []
    above += [chance(result)] if any(r.get("difference") for r in result["rows"]) else []
    return "\n".join(above)


def markdown(rung, result: dict) -> str:
    """All tables of a rung."""
    more = rung.more_tables(result) if rung.more_tables else []
    return "\n".join([*filter(None, [judged(rung, result)]), students_table(rung, result), *more])
