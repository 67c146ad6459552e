"""What the paper claims, measured on points in the plane: python toy_2d.py --claims.

Every job trains one student from one seed's teacher; jobs run two at a time (one thread each) and each writes a JSON file, so a
killed run goes on with the jobs that are missing. The table compares jobs by a rule stated here, before any run:

    A beats B on a distance if mean(B) - mean(A) > 2 sqrt(se_A^2 + se_B^2) over seeds. A claim "A beats B" HOLDS if A beats B on one of the
    two distances (sliced Wasserstein, share off the support) and B beats A on neither, DOES NOT HOLD the other way round, and is
    INCONCLUSIVE otherwise.

Every student gets the same number of updates: what TMD spends on stage 1, DMD2-v spends on KD warm-up (M = 1) or on more iterations.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import tmd_minimal as tmd
from oracles import ExactStudent, GaussianMixture
from planar import _CENTRES, sliced_wasserstein
from toy_2d import QUICK, Bench, Toy, baseline_budget, fit_student, fit_teacher, write_json

SIZE = {"stage1_updates": 800, "iterations": 1600, "M": 1, "N": 4, "H": 2, "outer": "deterministic"}  # one job takes about a minute
SEEDS = (0, 1, 2)
M2 = {"M": 2, "outer_shift": 10.0}
EVEN = {"M": 2, "outer_shift": 1.0}

# name: (settings of the Toy, settings of the student, of stage 1, of stage 2). plain = DMD2-v.
JOBS = {
    "tmd": ({}, {}, {}, {}),
    "dmd2v": ({}, "plain", {}, {}),
    "dmd2v no kd": ({}, "plain no kd", {}, {}),
    "tmd N1": ({}, {"N": 1}, {}, {}),
    "tmd N2": ({}, {"N": 2}, {}, {}),
    "tmd H1": ({}, {"H": 1}, {}, {}),
    "tmd last": ({}, {}, {}, {"rollout": "last"}),
    "tmd no rollout": ({}, {}, {}, {"rollout": "none"}),
    "tmd TM": ({}, {}, {"flow_map_share": 0.0}, {}),
    "tmd no stage 1": ({}, {}, None, {}),
    "tmd target x": ({}, {"target": "x"}, {}, {}),
    "tmd no gan": ({}, {}, {}, {"gan_weight": 0.0}),
    "dmd2v no gan": ({}, "plain", {}, {"gan_weight": 0.0}),
    "tmd dmd shift 5": ({}, {}, {}, {"dmd_shift": 5.0}),
    "dmd2v dmd shift 1": ({}, "plain", {}, {"dmd_shift": 1.0}),
    "dmd2v dmd shift 5": ({}, "plain", {}, {"dmd_shift": 5.0}),
    "tmd printed field": ({}, {"field": "printed"}, {}, {}),
    "tmd paper normalizer": ({}, {}, {}, {"normalizer": "paper"}),
    "tmd M2": (M2, {}, {}, {}),
    "dmd2v M2": (M2, "plain", {}, {}),
    "tmd M2 even": (EVEN, {}, {}, {}),
    "dmd2v M2 even": (EVEN, "plain", {}, {}),
    "tmd M2 even renoised": (EVEN, {"outer": "renoised"}, {}, {}),
    "dmd2v M2 even renoised": ({**EVEN, "outer": "renoised"}, "plain", {}, {}),
    "tmd M2 even printed clean": (EVEN, {"clean": "printed"}, {}, {}),
    # regimes for C1
    "tmd checkerboard": ({"data": "checkerboard"}, {}, {}, {}),
    "dmd2v checkerboard": ({"data": "checkerboard"}, "plain", {}, {}),
    "tmd gaussians": ({"data": "gaussians"}, {}, {}, {}),
    "dmd2v gaussians": ({"data": "gaussians"}, "plain", {}, {}),
    "tmd conditional": ({"conditional": True}, {}, {}, {}),
    "dmd2v conditional": ({"conditional": True}, "plain", {}, {}),
    "tmd shallow": ({"depth": 3, "H": 1}, {}, {}, {}),
    "dmd2v shallow": ({"depth": 3, "H": 1}, "plain", {}, {}),
    "tmd long": ({"iterations": 4800}, {}, {}, {}),
    "dmd2v long": ({"iterations": 4800}, "plain", {}, {}),
}
QUICK_JOBS = ("tmd", "dmd2v", "tmd TM")

# claim, setting, A, B, phase: the claim is that A beats B
CLAIMS = [
    ("C1", "M = 1, spirals; effective NFE 2 against 1", "tmd", "dmd2v", "end"),
    ("C1", "M = 1, spirals; DMD2-v without KD warm-up, as many updates", "tmd", "dmd2v no kd", "end"),
    ("C1", "M = 1, spirals, effective NFE 1.33 against 1", "tmd N2", "dmd2v", "end"),
    ("C1", "M = 2, outer shift 10; effective NFE 4 against 2", "tmd M2", "dmd2v M2", "end"),
    ("C1", "M = 2, even grid, deterministic; effective NFE 4 against 2", "tmd M2 even", "dmd2v M2 even", "end"),
    ("C1", "M = 2, even grid, re-noised; effective NFE 4 against 2", "tmd M2 even renoised", "dmd2v M2 even renoised", "end"),
    ("C1", "M = 1, neither warmed up: TMD without stage 1 against DMD2-v without KD", "tmd no stage 1", "dmd2v no kd", "end"),
    ("C1", "like NFE: TMD M1 N4 (2) against DMD2-v M2 (2)", "tmd", "dmd2v M2", "end"),
    ("C1", "M = 1, checkerboard", "tmd checkerboard", "dmd2v checkerboard", "end"),
    ("C1", "M = 1, eight Gaussians (separated modes)", "tmd gaussians", "dmd2v gaussians", "end"),
    ("C1", "M = 1, spirals, arm given as condition", "tmd conditional", "dmd2v conditional", "end"),
    ("C1", "M = 1, spirals, network of 3 blocks, H = 1", "tmd shallow", "dmd2v shallow", "end"),
    ("C1", "M = 1, spirals, three times the iterations", "tmd long", "dmd2v long", "end"),
    ("C2", "N = 4 against N = 2 (NFE 2 against 1.33)", "tmd", "tmd N2", "end"),
    ("C2", "N = 2 against N = 1 (NFE 1.33 against 1)", "tmd N2", "tmd N1", "end"),
    ("C2", "H = 2 against H = 1 (NFE 2 against 1.5)", "tmd", "tmd H1", "end"),
    ("C3", "rollout against gradient through the last inner step only", "tmd", "tmd last", "end"),
    ("C3", "rollout against single inner jumps", "tmd", "tmd no rollout", "end"),
    ("C4", "TM-MF against TM, after stage 1", "tmd", "tmd TM", "stage1"),
    ("C4", "TM-MF against TM, after stage 2", "tmd", "tmd TM", "end"),
    ("C4", "TM-MF against no stage 1 but more of stage 2, after stage 2", "tmd", "tmd no stage 1", "end"),
    ("C6", "y = x_1 - x against y = x, after stage 1", "tmd", "tmd target x", "stage1"),
    ("C6", "y = x_1 - x against y = x, after stage 2", "tmd", "tmd target x", "end"),
    ("C7", "N = 4 against the same student sampled with N = 1", "tmd", "tmd", "end/one"),
    ("C8", "GAN against none, TMD", "tmd", "tmd no gan", "end"),
    ("C8", "GAN against none, DMD2-v", "dmd2v", "dmd2v no gan", "end"),
    ("C10", "t_dmd shift 5 (paper's) against 0.25 (this rung's), TMD", "tmd dmd shift 5", "tmd", "end"),
    ("C10", "t_dmd shift 1 against 0.25 (this rung's), DMD2-v", "dmd2v dmd shift 1", "dmd2v", "end"),
    ("C10", "t_dmd shift 5 (paper's) against 1, DMD2-v", "dmd2v dmd shift 5", "dmd2v dmd shift 1", "end"),
    ("C10", "t_student shift 10 (paper's) against 1 at M = 2, TMD", "tmd M2", "tmd M2 even", "end"),
    ("C10", "t_student shift 10 (paper's) against 1 at M = 2, DMD2-v", "dmd2v M2", "dmd2v M2 even", "end"),
    ("trap 2", "Eq. 14 consistent against printed, after stage 1", "tmd", "tmd printed field", "stage1"),
    ("trap 2", "Eq. 14 consistent against printed, after stage 2", "tmd", "tmd printed field", "end"),
    ("trap 3", "Eq. 15 consistent against printed, M = 2 even grid", "tmd M2 even", "tmd M2 even printed clean", "end"),
    ("trap 5", "VSD gradient over mean abs(x_hat - g_teacher) against mean abs(g_fake - g_teacher)", "tmd", "tmd paper normalizer", "end"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, after stage 1", "tmd M2 even renoised", "tmd M2 even", "stage1"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, TMD", "tmd M2 even renoised", "tmd M2 even", "end"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, DMD2-v", "dmd2v M2 even renoised", "dmd2v M2 even", "end"),
]  # fmt: skip


def toy_of(name: str, seed: int, quick: bool) -> Toy:
    settings = JOBS[name][0]
    return Toy(
        **{**SIZE, **(QUICK | {"iterations": 40, "stage1_updates": 30, "teacher_updates": 60} if quick else {}), **settings, "seed": seed}
    )


def teacher_folder(root: Path, cfg: Toy) -> Path:
    return root / f"teacher-{cfg.data}-{'cond' if cfg.conditional else 'free'}-L{cfg.depth}-seed{cfg.seed}"


def run_teacher(args) -> None:
    """Train the teacher of a job's data and seed and write its own distances; a finished one is not trained again."""
    root, name, seed, quick = args
    torch.set_num_threads(1)
    cfg = toy_of(name, seed, quick)
    folder = teacher_folder(root, cfg)
    if (folder / "teacher.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(cfg)
    teacher, phase = fit_teacher(bench, folder, progress=False)
    record = {str(k): bench.distances(bench.teacher_samples(teacher, k), bench.c) for k in (50, 4, 2, 1)}
    record["floor"] = {**bench.distances(bench.other, None if bench.c is None else bench.other_label)}
    write_json(folder / "teacher.json", {**record, "seconds": phase.seconds})


def plan(name: str, seed: int, quick: bool):
    """What a job is, fully resolved: the Toy, the student, stage 1 or None, stage 2, KD updates."""
    cfg = toy_of(name, seed, quick)
    _, student, stage1, stage2 = JOBS[name]
    plain = isinstance(student, str)
    how = cfg.student_config(**({"H": 0, "N": 1} if plain else student))
    two, kd = cfg.stage2_config(**stage2), 0
    if student == "plain":
        kd, two = baseline_budget(cfg, two)
    elif plain or stage1 is None:  # the updates of the warm-up left out go to stage 2
        two = replace(two, iterations=two.iterations + cfg.stage1_updates)
    return cfg, how, None if plain or stage1 is None else cfg.stage1_config(**stage1), two, kd


def settings_of(cfg, how, one, two, kd) -> dict:
    """What a finished job is compared by before it is taken as it stands."""
    stages = {"student": asdict(how), "stage1": asdict(one) if one else None, "stage2": asdict(two), "kd_updates": kd}
    return {"toy": asdict(cfg) | {"out": None}, **stages, "torch": torch.__version__}


def run_job(args) -> None:
    """Train one student and write distances after stage 1, after stage 2, and of the latter with one inner step."""
    root, name, seed, quick = args
    file = root / "jobs" / f"{name.replace(' ', '-')}-seed{seed}.json"
    torch.set_num_threads(1)
    cfg, how, one, two, kd = plan(name, seed, quick)
    bench, settings = Bench(cfg), settings_of(cfg, how, one, two, kd)
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            raise RuntimeError(f"{file} was made with other settings; delete it, or choose another folder with --out.")
        return
    teacher, _ = fit_teacher(bench, teacher_folder(root, cfg), progress=False)
    student_updates = kd + (one.updates if one else 0) + two.iterations // two.student_every
    record = {"name": name, "seed": seed, "effective_nfe": tmd.effective_nfe(how.M, how.N, how.H, cfg.depth), "settings": settings}
    record["student_updates"] = student_updates
    try:
        fit = fit_student(bench, teacher, name.replace(" ", "-"), how, one, two, None, kd_updates=kd, progress=False)
    except FloatingPointError as e:  # a diverged student is a result, not a crash of the table
        write_json(file, {**record, "diverged": str(e)})
        return
    sampled = lambda net, how: bench.distances(bench.student_samples(net, how), bench.c)
    record |= {"seconds": fit["seconds"], "updates": fit["updates"], "end": sampled(fit["student"], how)}
    if one:
        record["stage1"] = sampled(fit["stage1"], how)
        few = tmd.sample_teacher(teacher, bench.x_1, bench.c, bench.c_neg, grid=how.outer_grid)  # C0: mean velocity on the same grid
        record["teacher"] = bench.distances(few, bench.c)
    if how.H and how.N > 1:
        record["one"] = sampled(fit["student"], replace(how, N=1))
    if how.M > 1:  # found here: the fake score sees the mixture over t_i, so each x_hat(t_i) may drift while the mixture fits
        record["per_t"] = x_hat_per_time(bench, fit["student"], how)
    write_json(file, record)


@torch.no_grad()
def x_hat_per_time(bench: Bench, student, how) -> dict:
    """Sliced Wasserstein of x_hat to the data at each outer time on its own, and of the equal mixture that the fake score sees."""
    g, n, found = torch.Generator().manual_seed(4), len(bench.x), []
    for t in how.outer_grid[1:]:
        t, x_1 = t.expand(n), tmd.randn_like(bench.x, g)
        x_t = tmd.interpolate(bench.x, x_1, t)
        y_hat = tmd.inner_flow(tmd.transition(student, x_t, t, bench.c, how.target), tmd.randn_like(x_t, g), how.inner_grid, how.field)
        found.append(tmd.clean_estimate(y_hat, x_t, t, how.target, how.clean, x_1))
    pick = torch.randint(len(found), (n,), generator=g)
    mixed = torch.stack(found)[pick, torch.arange(n)]
    return {"each": [sliced_wasserstein(x_hat, bench.x) for x_hat in found], "mixture": sliced_wasserstein(mixed, bench.x)}


def exact_c0(seeds=SEEDS, n: int = 5000) -> list[dict]:
    """C0 with nothing learnt: exact flow matching and exact transition matching on eight Gaussians, by mode width and steps."""
    rows = []
    for sigma in (0.02, 0.15, 0.5):
        data = GaussianMixture(_CENTRES, torch.full((8,), sigma))
        for M in (1, 2, 4):
            grid, found = tmd.make_grid(M, 1.0).double(), {"flow": [], "tm": [], "floor": []}
            for seed in seeds:
                g = torch.Generator().manual_seed(seed)
                x, other, x_1 = data.sample(n, g), data.sample(n, g), torch.randn(n, 2, generator=g, dtype=torch.float64)
                inner = tmd.make_grid(1, 1.0).double()
                exact = tmd.sample(ExactStudent(data, g), x_1, outer_grid=grid, inner_grid=inner, generator=g)
                flow = tmd.sample_teacher(data, x_1, grid=grid)
                for key, points in (("flow", flow), ("tm", exact), ("floor", other)):
                    found[key].append(sliced_wasserstein(points, x))
            rows.append({"sigma": sigma, "M": M, **{k: summary(v) for k, v in found.items()}})
    return rows


def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation and standard error."""
    n, mean = len(values), sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return {"mean": mean, "std": std, "se": std / math.sqrt(n), "n": n}


def beats(a: dict, b: dict) -> bool:
    """The rule: lower by more than twice the pooled standard error."""
    return b["mean"] - a["mean"] > 2 * math.sqrt(a["se"] ** 2 + b["se"] ** 2)


def verdict(a: dict, b: dict) -> str:
    """a, b: {"swd": summary, "off_support": summary}; the claim is that a beats b."""
    wins = any(beats(a[k], b[k]) for k in a)
    losses = any(beats(b[k], a[k]) for k in a)
    return "holds" if wins and not losses else "does not hold" if losses and not wins else "inconclusive"


def tabulate(root: Path) -> dict:
    """Read every finished job and write claims.json and claims.md."""
    jobs = {}
    for file in sorted((root / "jobs").glob("*.json")):
        record = json.loads(file.read_text())
        jobs.setdefault(record["name"], []).append(record)

    def numbers(name, phase):
        rows = [r[phase] for r in jobs.get(name, []) if phase in r]
        return {k: summary([r[k] for r in rows]) for k in ("swd", "off_support")} if len(rows) > 1 else None

    def judge(claim, setting, names, a, b):
        """One row; a diverged seed on either side leaves the claim undecided and is said."""
        diverged = sum("diverged" in r for name in names for r in jobs.get(name, []))
        what = f"inconclusive ({diverged} diverged)" if diverged else verdict(a, b) if a and b else "not run"
        return {"claim": claim, "setting": setting, "A": a, "B": b, "verdict": what}

    rows, c0 = [], exact_c0()
    for row in c0:
        a, b = ({"swd": row[k]} for k in ("tm", "flow"))
        setting = f"exact oracle, eight Gaussians of width {row['sigma']}, M = {row['M']}: transition against flow matching"
        rows.append({"claim": "C0", "setting": setting, "A": a, "B": b, "verdict": verdict(a, b)})
    for name, steps in (("tmd", "one step"), ("tmd M2", "two steps, grid 0.999, 0.909"), ("tmd M2 even", "two steps, grid 0.999, 0.5")):
        setting = f"after stage 1 (N = 4) against the teacher's mean velocity, {steps}"
        rows.append(judge("C0", setting, [name], numbers(name, "stage1"), numbers(name, "teacher")))
    for claim, setting, name_a, name_b, phase in CLAIMS:
        phase_a, _, phase_b = phase.partition("/")
        rows.append(judge(claim, setting, {name_a, name_b}, numbers(name_a, phase_a), numbers(name_b, phase_b or phase_a)))
    models = {}
    for name, records in jobs.items():
        done = [r for r in records if "end" in r]
        if len(done) > 1:
            models[name] = {"effective_nfe": done[0]["effective_nfe"], "updates": done[0]["updates"], **numbers(name, "end"),
                            "student_updates": done[0]["student_updates"], "seeds": len(done),
                            "seconds": summary([r["seconds"] for r in done]), "diverged": len(records) - len(done)}  # fmt: skip
    drift = {n: [r["per_t"] for r in rs if "per_t" in r] for n, rs in jobs.items() if any("per_t" in r for r in rs)}
    result = {"rule": "2 sqrt(se_A^2 + se_B^2), see toy_claims.py", "rows": rows, "models": models, "x_hat_per_time": drift}
    write_json(root / "claims.json", result)
    (root / "claims.md").write_text(markdown(result))
    return result


def show(s: dict, percent=False) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    return f"{scale * s['mean']:.{digits}f} ± {scale * s['std']:.{digits}f}"


def markdown(result: dict) -> str:
    """The claims table: A and B as sliced Wasserstein / percent off the support, mean ± standard deviation over seeds."""

    def both(x):
        return "-" if x is None else show(x["swd"]) + (f" / {show(x['off_support'], True)} %" if "off_support" in x else "")

    lines = ["| claim | setting (A against B) | A | B | A beats B |", "|---|---|---|---|---|"]
    lines += [f"| {r['claim']} | {r['setting']} | {both(r['A'])} | {both(r['B'])} | {r['verdict']} |" for r in result["rows"]]
    lines += ["", "| student | effective NFE | updates (of the student) | sliced Wasserstein | off support, % | training, s | seeds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, m in sorted(result["models"].items()):
        cost, quality = (
            f"{m['effective_nfe']:.2f} | {m['updates']} ({m['student_updates']})",
            f"{show(m['swd'])} | {show(m['off_support'], True)}",
        )
        lines.append(f"| {name} | {cost} | {quality} | {m['seconds']['mean']:.0f} | {m['seeds']} |")
    lines += ["", "| student, M = 2 | x_hat from t_1 | x_hat from t_2 | mixture (what the fake score sees) |", "|---|---|---|---|"]
    for name, rs in sorted(result["x_hat_per_time"].items()):
        cells = [show(summary([r["each"][i] for r in rs])) for i in (0, 1)] + [show(summary([r["mixture"] for r in rs]))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(root: Path, result: dict) -> None:
    """Quality against effective NFE (C1, C2), teachers beside the students."""
    from toy_2d import BLUE, GREY, INK, ORANGE, pyplot

    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    teachers = [json.loads(f.read_text()) for f in sorted(root.glob("teacher-spirals-free-L6-seed*/teacher.json"))]
    names = {
        "dmd2v": "DMD2-v M1",
        "dmd2v M2": "DMD2-v M2",
        "tmd N1": "N1 H2",
        "tmd N2": "N2 H2",
        "tmd H1": "N4 H1",
        "tmd": "N4 H2",
        "tmd M2": "M2 N4 H2",
    }
    for ax, key, label in zip(axes, ("swd", "off_support"), ("sliced Wasserstein", "share off the support")):
        for name, text in names.items():
            if name in result["models"]:
                m = result["models"][name]
                color = INK if "DMD2" in text else ORANGE
                ax.errorbar(
                    m["effective_nfe"], m[key]["mean"], m[key]["std"], fmt="s" if "DMD2" in text else "o", color=color, capsize=3, ms=5
                )
                ax.annotate(text, (m["effective_nfe"], m[key]["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7, color=color)
        for steps, style in (("50", "--"), ("4", ":")):
            ax.axhline(sum(t[steps][key] for t in teachers) / len(teachers), color=BLUE, lw=1, ls=style, label=f"teacher, {steps} steps")
        ax.axhline(sum(t["floor"][key] for t in teachers) / len(teachers), color=GREY, lw=1, label="two draws of the data")
        ax.set(xlabel="effective NFE", ylabel=label, yscale="log", xlim=(0.8, 4.6))
        ax.grid(alpha=0.2, which="both")
    axes[0].legend(fontsize=7)
    fig.savefig(root / "quality_vs_nfe.png", dpi=120)
    plt.close(fig)


def run(out: str, quick: bool = False, workers: int = 2) -> dict:
    """Run every missing job, then write claims.json, claims.md and quality_vs_nfe.png."""
    root = Path(out)
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    stamp = {**asdict(toy_of("tmd", 0, quick)), "out": None}
    if (root / "claims.config.json").exists() and json.loads((root / "claims.config.json").read_text()) != stamp:
        raise RuntimeError(f"{root} holds claims of another size; choose another folder with --out.")
    write_json(root / "claims.config.json", stamp)
    names, seeds = (QUICK_JOBS, SEEDS[:2]) if quick else (tuple(JOBS), SEEDS)
    teachers = {str(teacher_folder(root, toy_of(n, s, quick))): (root, n, s, quick) for s in seeds for n in names}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for todo, work, what in (
            (list(teachers.values()), run_teacher, "teachers"),
            ([(root, n, s, quick) for s in seeds for n in names], run_job, "students"),
        ):
            for _ in tqdm(pool.imap_unordered(work, todo), total=len(todo), desc=what, disable=None):
                pass
    result = tabulate(root)
    if not quick:
        draw(root, result)
    print((root / "claims.md").read_text())
    return result
