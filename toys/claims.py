"""The paper's claims, measured: every student of a rung's list on several seeds, one rule, one table.

A job trains one student on one seed and writes a JSON file, so a killed run goes on with the jobs that are missing.
Jobs run two at a time, one thread each. First comes the pilot: the first claim's two students on three seeds. Their
spread tells the smallest difference that all seeds can see, before anything else is trained.

Every student gets the same number of updates. What TMD spends on stage 1, DMD2-v spends on KD warm-up (M = 1) or on
more iterations. The rungs list their jobs and claims in claims_2d.py and claims_video.py; the rule is in verdicts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import tmd_minimal as tmd
from settings import write_json
from toys.ladder import Ladder, baseline_budget, workers
from toys.verdicts import PILOT, SEEDS, job_file, pilot, pilot_words, tabulate

EXTRA = ("kind", "curve", "blocks", "corrects")  # what fit_student takes beside the settings of a stage


@dataclass(frozen=True)
class Rung:
    """What a rung measures, and how it tells it."""

    ladder: type[Ladder]
    # {name: (settings, the student's or "plain ...", those of stage 1 or None, those of stage 2 and EXTRA)}
    jobs: dict
    # (claim, setting, A, B, phase of A[/phase of B], scores if it has its own): the claim is that A beats B
    claims: list
    size: dict  # settings of every job
    quick: dict  # and of its small sibling, for tests
    quick_jobs: tuple
    scores: dict  # {name: -1 if lower is better, 1 if higher}: those that the rule looks at
    margins: dict  # {name: a difference too small to matter}, of these and of a row's own
    labels: dict  # {name: words}: those that the table of students shows
    teacher_name: Callable  # settings -> name of the teacher's folder
    percent: tuple = ()  # scores shown in percent
    teacher_steps: tuple = (50, 8, 4, 2, 1)
    extra: Callable | None = None  # (ladder, teacher, fit, how) -> more of a job's record
    table: Callable | None = None  # (jobs, numbers, judge, result): adds rows and keys to the result
    more_tables: Callable | None = None  # result -> list of Markdown tables
    draw: Callable | None = None  # (root, result) -> writes a picture
    own_seeds: dict = field(default_factory=dict)  # {job: its seeds}, of jobs that do not take everyone's

    def seeds_of(self, name: str, seeds=SEEDS) -> tuple[int, ...]:
        """The seeds of a job."""
        return tuple(self.own_seeds.get(name, seeds))

    def toy_of(self, name: str, seed: int, quick: bool):
        """The settings of a job."""
        size = self.size | (self.quick if quick else {})
        return self.ladder.settings(**{**size, **self.jobs[name][0], "seed": seed})

    def plan(self, name: str, seed: int, quick: bool):
        """A job, resolved: (settings, student, stage 1 or None, stage 2, KD updates, what else fit_student takes)."""
        cfg = self.toy_of(name, seed, quick)
        _, student, stage1, stage2 = self.jobs[name]
        plain = isinstance(student, str)
        how = cfg.student_config(**({"H": 0, "N": 1} if plain else student))
        more = {key: stage2[key] for key in EXTRA if key in stage2}
        two, kd = cfg.stage2_config(**{key: value for key, value in stage2.items() if key not in more}), 0
        if student in ("plain", "plain deep"):
            kd, two = baseline_budget(cfg, two)
        elif student == "plain kd":  # the warm-up whatever M is
            kd = cfg.stage1_updates
        elif plain or stage1 is None:  # the updates of the warm-up left out go to stage 2
            two = replace(two, iterations=two.iterations + cfg.stage1_updates)
        if plain and "deep" in student:  # as many blocks as TMD's rollout runs
            more["deeper"] = (cfg.N - 1) * cfg.H
        return cfg, how, None if plain or stage1 is None else cfg.stage1_config(**stage1), two, kd, more


def nfe_of(cfg, how, more) -> float:
    """Effective NFE in whole teachers, Eq. (16), with the blocks that a student of the claims runs more, or fewer."""
    blocks = more.get("deeper", 0) + (how.H if "corrects" in more else 0) + more.get("blocks", cfg.depth) - cfg.depth
    return tmd.effective_nfe(how.M, how.N, how.H, cfg.depth) + how.M * blocks / cfg.depth


def settings_of(cfg, how, one, two, kd, more) -> dict:
    """The whole of a job as plain values: a finished one is taken as it stands only if all of them are the same."""
    stages = {"student": asdict(how), "stage1": asdict(one) if one else None, "stage2": asdict(two), "kd_updates": kd}
    return {"toy": asdict(cfg) | {"out": None}, **stages, **more, "torch": torch.__version__}


def counted(settings: dict) -> dict:
    """Of a job's settings those that make it another one: not the build of torch, nor whether networks were compiled,
    which change rounding alone.
    """
    toy = {key: value for key, value in settings["toy"].items() if key != "compile"}
    return settings | {"toy": toy, "torch": settings["torch"].split("+")[0]}


def run_teacher(args) -> None:
    """Train or load the teacher of a job's data and seed, and write its own scores, once. The tables read those of
    SEEDS alone.
    """
    rung, root, name, seed, quick = args
    torch.set_num_threads(1)
    cfg = rung.toy_of(name, seed, quick)
    folder = root / rung.teacher_name(cfg)
    if (folder / "teacher.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = rung.ladder(cfg)
    teacher, facts = bench.fit_teacher(folder, progress=False)
    if seed not in SEEDS:
        return
    record = {str(k): bench.score(bench.teacher_samples(teacher, k), bench.c) for k in rung.teacher_steps}
    write_json(folder / "teacher.json", {**record, "floor": bench.floor(), "seconds": facts["seconds"], "seed": seed})


def run_job(args) -> None:
    """Train one student and write its scores: after stage 1, after stage 2, and after stage 2 with one inner step.

    RuntimeError if the job was run before with other settings.
    """
    rung, root, name, seed, quick = args
    file = job_file(root, name, seed)
    torch.set_num_threads(1)
    cfg, how, one, two, kd, more = rung.plan(name, seed, quick)
    settings = settings_of(cfg, how, one, two, kd, more)
    if file.exists():
        if counted(json.loads(file.read_text(encoding="utf-8"))["settings"]) != counted(settings):
            raise RuntimeError(f"{file} was made with other settings; delete it, or choose another folder with --out.")
        return
    bench = rung.ladder(cfg)
    folder = root / rung.teacher_name(cfg)
    teacher, _ = bench.fit_teacher(folder, progress=False)
    record = {"name": name, "seed": seed, "effective_nfe": nfe_of(cfg, how, more), "settings": settings}
    record["student_updates"] = kd + (one.updates if one else 0) + two.iterations // two.student_every
    try:
        run = {"kd_updates": kd, "kept": folder / "kd_pairs.pt", "progress": False, **more}
        fit = bench.fit_student(teacher, name.replace(" ", "-"), how, one, two, None, **run)
    except FloatingPointError as e:  # a diverged student is a result, not a crash of the table
        write_json(file, {**record, "diverged": str(e)})
        return
    sampled = lambda net, how: bench.score(bench.student_samples(net, how), bench.c)
    record |= {"seconds": fit["seconds"], "updates": fit["updates"], "end": sampled(fit["student"], how)}
    if one:
        record["stage1"] = sampled(fit["stage1"], how)
    if how.H and how.N > 1:
        record["one"] = sampled(fit["student"], replace(how, N=1))
    if fit["curve"]:
        record["curve"] = fit["curve"]
    write_json(file, record | (rung.extra(bench, teacher, fit, how) if rung.extra else {}))


# ---- The run ---------------------------------------------------------------------------------------------------------


def run(rung: Rung, out: str, quick: bool = False, processes: int = 2, seeds=SEEDS, only: tuple = ()) -> dict:
    """Run every missing job (or those named in `only`), then write claims.json, claims.md and the rung's picture.

    The pilot's jobs come first; pilot.json is written once, before the others are trained.
    RuntimeError if the folder `out` holds jobs of another size.
    """
    root, first = Path(out), next(iter(rung.jobs))
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    stamp = {key: v for key, v in asdict(rung.toy_of(first, 0, quick)).items() if key not in ("out", "compile")}
    if (known := root / "claims.config.json").exists() and stamp != {
        key: v for key, v in json.loads(known.read_text(encoding="utf-8")).items() if key not in ("out", "compile")
    }:
        raise RuntimeError(f"{root} holds claims of another size; choose another folder with --out.")
    write_json(known, stamp)
    names, seeds = (rung.quick_jobs, seeds[:2]) if quick else (only or tuple(rung.jobs), seeds)
    pair = [name for name in rung.claims[0][2:4] if name in names] if rung.claims else []
    jobs = [(rung, root, n, s, quick) for n in names for s in rung.seeds_of(n, seeds)]
    pilots = [(rung, root, n, s, quick) for s in PILOT for n in pair if s in seeds]
    teachers = {rung.teacher_name(rung.toy_of(n, s, quick)): (rung, root, n, s, quick) for _, _, n, s, _ in jobs}

    def told() -> dict:
        result = tabulate(rung, root, len(seeds))
        if rung.draw and rung.claims and result["models"] and not quick:
            rung.draw(root, result)
        return result

    def work_off(todo, work, what):
        running = as_completed([pool.submit(work, job) for job in todo])
        for done in tqdm(running, total=len(todo), desc=what, disable=None):
            done.result()
            told()  # a killed run leaves tables and pictures of what it has

    with workers(processes) as pool:
        work_off(list(teachers.values()), run_teacher, "teachers")
        work_off(pilots, run_job, "pilot")
        if len(pair) == 2 and not quick and not (root / "pilot.json").exists():
            found = pilot(rung, root, len(seeds))
            write_json(root / "pilot.json", found)
            print(pilot_words(rung, found), flush=True)
        work_off(jobs, run_job, "students")
    result = told()
    print((root / "claims.md").read_text(encoding="utf-8"))
    return result
