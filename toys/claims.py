"""The paper's claims, measured: every student of a rung's list on several seeds, one rule, one table.

A job trains one student from one seed's teacher and writes a JSON file, so a killed run goes on with the jobs that
are missing. Jobs run two at a time, one thread each. The table compares jobs by a rule stated here, before any run:

    A beats B on a score if it is better by more than 2 sqrt(se_A^2 + se_B^2) over seeds. A claim "A beats B" HOLDS if
    A beats B on one of the scores that the rung names and B beats A on none, DOES NOT HOLD the other way round, and
    is INCONCLUSIVE otherwise.

Every student gets the same number of updates. What TMD spends on stage 1, DMD2-v spends on KD warm-up (M = 1) or on
more iterations. The rungs list their jobs and claims in claims_2d.py and claims_video.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import tmd_minimal as tmd
from settings import write_json
from toys.ladder import Ladder, baseline_budget, workers

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Rung:
    """What a rung measures, and how it tells it."""

    ladder: type[Ladder]
    # {name: (settings, the student's or "plain ...", those of stage 1 or None, those of stage 2 with "kind")}
    jobs: dict
    claims: list  # (claim, setting, A, B, phase of A[/phase of B]): the claim is that A beats B
    size: dict  # settings of every job
    quick: dict  # and of its small sibling, for tests
    quick_jobs: tuple
    scores: dict  # {name: -1 if lower is better, 1 if higher}: those that the rule looks at
    labels: dict  # {name: words}: those that the table of students shows
    teacher_name: Callable  # settings -> name of the teacher's folder
    percent: tuple = ()  # scores shown in percent
    teacher_steps: tuple = (50, 4, 2, 1)
    extra: Callable | None = None  # (ladder, teacher, fit, how) -> more of a job's record
    table: Callable | None = None  # (jobs, numbers, judge, result): adds rows and keys to the result
    more_tables: Callable | None = None  # result -> list of Markdown tables
    draw: Callable | None = None  # (root, result) -> writes a picture

    def toy_of(self, name: str, seed: int, quick: bool):
        """The settings of a job."""
        size = self.size | (self.quick if quick else {})
        return self.ladder.settings(**{**size, **self.jobs[name][0], "seed": seed})

    def plan(self, name: str, seed: int, quick: bool):
        """A job, resolved: (settings, student, stage 1 or None, stage 2, KD updates, {} or {"kind": discriminator})."""
        cfg = self.toy_of(name, seed, quick)
        _, student, stage1, stage2 = self.jobs[name]
        plain = isinstance(student, str)
        how = cfg.student_config(**({"H": 0, "N": 1} if plain else student))
        two, kd = cfg.stage2_config(**{key: value for key, value in stage2.items() if key != "kind"}), 0
        if student == "plain":
            kd, two = baseline_budget(cfg, two)
        elif student == "plain kd":  # the warm-up whatever M is
            kd = cfg.stage1_updates
        elif plain or stage1 is None:  # the updates of the warm-up left out go to stage 2
            two = replace(two, iterations=two.iterations + cfg.stage1_updates)
        kind = {"kind": stage2["kind"]} if "kind" in stage2 else {}
        return cfg, how, None if plain or stage1 is None else cfg.stage1_config(**stage1), two, kd, kind


def settings_of(cfg, how, one, two, kd, kind) -> dict:
    """The whole of a job as plain values: a finished one is taken as it stands only if all of them are the same."""
    stages = {"student": asdict(how), "stage1": asdict(one) if one else None, "stage2": asdict(two), "kd_updates": kd}
    return {"toy": asdict(cfg) | {"out": None}, **stages, **kind, "torch": torch.__version__}


def run_teacher(args) -> None:
    """Train the teacher of a job's data and seed, and write its own scores. A finished one is not trained again."""
    rung, root, name, seed, quick = args
    torch.set_num_threads(1)
    cfg = rung.toy_of(name, seed, quick)
    folder = root / rung.teacher_name(cfg)
    if (folder / "teacher.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = rung.ladder(cfg)
    teacher, phase = bench.fit_teacher(folder, progress=False)
    record = {str(k): bench.score(bench.teacher_samples(teacher, k), bench.c) for k in rung.teacher_steps}
    write_json(folder / "teacher.json", {**record, "floor": bench.floor(), "seconds": phase.seconds})


def run_job(args) -> None:
    """Train one student and write its scores: after stage 1, after stage 2, and after stage 2 with one inner step.

    RuntimeError if the job was run before with other settings.
    """
    rung, root, name, seed, quick = args
    file = root / "jobs" / f"{name.replace(' ', '-')}-seed{seed}.json"
    torch.set_num_threads(1)
    cfg, how, one, two, kd, kind = rung.plan(name, seed, quick)
    settings = settings_of(cfg, how, one, two, kd, kind)
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            raise RuntimeError(f"{file} was made with other settings; delete it, or choose another folder with --out.")
        return
    bench = rung.ladder(cfg)
    teacher, _ = bench.fit_teacher(root / rung.teacher_name(cfg), progress=False)
    nfe = tmd.effective_nfe(how.M, how.N, how.H, cfg.depth)
    record = {"name": name, "seed": seed, "effective_nfe": nfe, "settings": settings}
    record["student_updates"] = kd + (one.updates if one else 0) + two.iterations // two.student_every
    try:
        more = {"kd_updates": kd, "kind": kind, "progress": False}
        fit = bench.fit_student(teacher, name.replace(" ", "-"), how, one, two, None, **more)
    except FloatingPointError as e:  # a diverged student is a result, not a crash of the table
        write_json(file, {**record, "diverged": str(e)})
        return
    sampled = lambda net, how: bench.score(bench.student_samples(net, how), bench.c)
    record |= {"seconds": fit["seconds"], "updates": fit["updates"], "end": sampled(fit["student"], how)}
    if one:
        record["stage1"] = sampled(fit["stage1"], how)
    if how.H and how.N > 1:
        record["one"] = sampled(fit["student"], replace(how, N=1))
    write_json(file, record | (rung.extra(bench, teacher, fit, how) if rung.extra else {}))


def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation and standard error."""
    n, mean = len(values), sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return {"mean": mean, "std": std, "se": std / math.sqrt(n), "n": n}


def beats(a: dict, b: dict, sign: int) -> bool:
    """The rule: better (lower for sign -1, higher for 1) by more than twice the pooled standard error."""
    return sign * (a["mean"] - b["mean"]) > 2 * math.sqrt(a["se"] ** 2 + b["se"] ** 2)


def verdict(a: dict, b: dict, scores: dict) -> str:
    """What the rule says of the claim that a beats b: "holds", "does not hold" or "inconclusive".

    a, b {score: summary}; scores {score: sign}: those that the rule looks at.
    """
    wins = any(beats(a[k], b[k], sign) for k, sign in scores.items() if k in a)
    losses = any(beats(b[k], a[k], sign) for k, sign in scores.items() if k in a)
    return "holds" if wins and not losses else "does not hold" if losses and not wins else "inconclusive"


def tabulate(rung: Rung, root: Path) -> dict:
    """Read every finished job and write claims.json and claims.md."""
    jobs = {}
    for file in sorted((root / "jobs").glob("*.json")):
        record = json.loads(file.read_text())
        jobs.setdefault(record["name"], []).append(record)

    def numbers(name, phase):
        rows = [r[phase] for r in jobs.get(name, []) if phase in r]
        return {k: summary([r[k] for r in rows]) for k in rung.labels} if len(rows) > 1 else None

    def judge(claim, setting, names, a, b):
        """One row. A diverged seed on either side leaves the claim undecided, and the row says so."""
        diverged = sum("diverged" in r for name in names for r in jobs.get(name, []))
        what = verdict(a, b, rung.scores) if a and b else "not run"
        what = f"inconclusive ({diverged} diverged)" if diverged else what
        return {"claim": claim, "setting": setting, "A": a, "B": b, "verdict": what}

    models, rows = {}, []
    for claim, setting, name_a, name_b, phase in rung.claims:
        phase_a, _, phase_b = phase.partition("/")
        a, b = numbers(name_a, phase_a), numbers(name_b, phase_b or phase_a)
        rows.append(judge(claim, setting, {name_a, name_b}, a, b))
    for name, records in jobs.items():
        done = [r for r in records if "end" in r]
        if len(done) > 1:
            facts = {"seeds": len(done), "seconds": summary([r["seconds"] for r in done]),
                     "diverged": len(records) - len(done)}  # fmt: skip
            models[name] = {"effective_nfe": done[0]["effective_nfe"], "updates": done[0]["updates"],
                            **numbers(name, "end"), "student_updates": done[0]["student_updates"], **facts}  # fmt: skip
    result = {"rule": "2 sqrt(se_A^2 + se_B^2), see toys/claims.py", "rows": rows, "models": models}
    if rung.table:
        rung.table(jobs, numbers, judge, result)
    write_json(root / "claims.json", result)
    (root / "claims.md").write_text(markdown(rung, result))
    return result


def show(s: dict, percent=False) -> str:
    """A summary as "mean ± standard deviation"."""
    scale, digits = (100, 1) if percent else (1, 3)
    return f"{scale * s['mean']:.{digits}f} ± {scale * s['std']:.{digits}f}"


def claims_table(rung: Rung, result: dict) -> str:
    """The claims: A and B by the scores that the rule looks at, mean ± standard deviation over seeds."""

    def cell(x):
        if x is None:
            return "-"
        return " / ".join(show(x[k], k in rung.percent) + " %" * (k in rung.percent) for k in rung.scores if k in x)

    lines = ["| claim | setting (A against B) | A | B | A beats B |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        lines.append(f"| {r['claim']} | {r['setting']} | {cell(r['A'])} | {cell(r['B'])} | {r['verdict']} |")
    return "\n".join(lines) + "\n"


def students_table(rung: Rung, result: dict) -> str:
    """Every student: cost, scores, seconds."""
    heads = [text + ", %" * (k in rung.percent) for k, text in rung.labels.items()]
    lines = [f"| student | effective NFE | updates (of the student) | {' | '.join(heads)} | training, s | seeds |"]
    lines += ["|---" * (len(heads) + 5) + "|"]
    for name, m in sorted(result["models"].items()):
        quality = " | ".join(show(m[k], k in rung.percent) for k in rung.labels)
        cost = f"{m['effective_nfe']:.2f} | {m['updates']} ({m['student_updates']})"
        lines.append(f"| {name} | {cost} | {quality} | {m['seconds']['mean']:.0f} | {m['seeds']} |")
    return "\n".join(lines) + "\n"


def markdown(rung: Rung, result: dict) -> str:
    """All tables of a rung."""
    more = rung.more_tables(result) if rung.more_tables else []
    return "\n".join([claims_table(rung, result), students_table(rung, result), *more])


def run(rung: Rung, out: str, quick: bool = False, processes: int = 2, seeds=SEEDS, only: tuple = ()) -> dict:
    """Run every missing job (or those named in `only`), then write claims.json, claims.md and the rung's picture.

    RuntimeError if the folder `out` holds jobs of another size.
    """
    root, first = Path(out), next(iter(rung.jobs))
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    stamp = {**asdict(rung.toy_of(first, 0, quick)), "out": None}
    if (root / "claims.config.json").exists() and json.loads((root / "claims.config.json").read_text()) != stamp:
        raise RuntimeError(f"{root} holds claims of another size; choose another folder with --out.")
    write_json(root / "claims.config.json", stamp)
    names, seeds = (rung.quick_jobs, seeds[:2]) if quick else (only or tuple(rung.jobs), seeds)
    jobs = [(rung, root, n, s, quick) for s in seeds for n in names]
    teachers = {rung.teacher_name(rung.toy_of(n, s, quick)): (rung, root, n, s, quick) for _, _, n, s, _ in jobs}
    with workers(processes) as pool:
        for todo, work, what in ((list(teachers.values()), run_teacher, "teachers"), (jobs, run_job, "students")):
            running = as_completed([pool.submit(work, job) for job in todo])
            for done in tqdm(running, total=len(todo), desc=what, disable=None):
                done.result()
    result = tabulate(rung, root)
    if rung.draw and not quick:
        rung.draw(root, result)
    print((root / "claims.md").read_text())
    return result
