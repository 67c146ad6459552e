"""What the paper claims, measured on points in the plane: python toy_2d.py --claims. The rule is in verdicts.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tqdm import tqdm

import tmd_minimal as tmd
from toys import claims
from toys.claims import Rung
from toys.drawing import BLUE, GREY, INK, ORANGE, pyplot
from toys.oracles import ExactStudent, GaussianMixture
from toys.planar import _CENTRES, sliced_wasserstein
from toys.plane import QUICK, PlanarLadder, Toy
from toys.verdicts import SEEDS, show, summary

SCORES = {"swd": -1, "off_support": -1}
# one job takes about a minute
SIZE = {"stage1_updates": 800, "iterations": 1600, "M": 1, "N": 4, "H": 2, "outer": "deterministic"}
M2 = {"M": 2, "outer_shift": 10.0}
EVEN = {"M": 2, "outer_shift": 1.0}

# name: (settings of the Toy, settings of the student, of stage 1, of stage 2). plain = DMD2-v.
JOBS = {
    "tmd": ({}, {}, {}, {}),
    "dmd2v": ({}, "plain", {}, {}),
    "dmd2v no kd": ({}, "plain no kd", {}, {}),
    "dmd2v deep": ({}, "plain deep", {}, {}),
    "dmd2v deep checkerboard": ({"data": "checkerboard"}, "plain deep", {}, {}),
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

# claim, setting, A, B, phase: the claim is that A beats B
CLAIMS = [
    ("C1", "M = 1, spirals; effective NFE 2 against 1", "tmd", "dmd2v", "end"),
    ("C1", "M = 1, spirals; DMD2-v without KD warm-up, as many updates", "tmd", "dmd2v no kd", "end"),
    ("C1", "M = 1, spirals, effective NFE 1.33 against 1", "tmd N2", "dmd2v", "end"),
    ("C1", "M = 2, outer shift 10; effective NFE 4 against 2", "tmd M2", "dmd2v M2", "end"),
    ("C1", "M = 2, even grid, deterministic; effective NFE 4 against 2", "tmd M2 even", "dmd2v M2 even", "end"),
    ("C1", "M = 2, even grid, re-noised; effective NFE 4 against 2", "tmd M2 even renoised", "dmd2v M2 even renoised",
     "end"),
    ("C1", "M = 1, neither warmed up: TMD without stage 1 against DMD2-v without KD", "tmd no stage 1", "dmd2v no kd",
     "end"),
    ("C1", "like NFE: TMD M1 N4 (2) against DMD2-v M2 (2)", "tmd", "dmd2v M2", "end"),
    ("C1", "M = 1, checkerboard", "tmd checkerboard", "dmd2v checkerboard", "end"),
    ("C1", "M = 1, eight Gaussians (separated modes)", "tmd gaussians", "dmd2v gaussians", "end"),
    ("C1", "M = 1, spirals, arm given as condition", "tmd conditional", "dmd2v conditional", "end"),
    ("C1", "M = 1, spirals, network of 3 blocks, H = 1", "tmd shallow", "dmd2v shallow", "end"),
    ("C1", "M = 1, spirals, three times the iterations", "tmd long", "dmd2v long", "end"),
    ("room", "teacher in 50 steps against DMD2-v, M = 1, spirals", "teacher 50", "dmd2v", "end"),
    ("room", "teacher in 50 steps against DMD2-v, M = 1, spirals, three times the iterations", "teacher 50",
     "dmd2v long", "end"),
    ("bound", "more depth, no recurrence: DMD2-v of 12 blocks against 6, spirals", "dmd2v deep", "dmd2v", "end"),
    ("bound", "more depth, no recurrence: DMD2-v of 12 blocks against 6, checkerboard", "dmd2v deep checkerboard",
     "dmd2v checkerboard", "end"),
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
    ("trap 5", "VSD gradient over mean abs(x_hat - g_teacher) against mean abs(g_fake - g_teacher)", "tmd",
     "tmd paper normalizer", "end"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, after stage 1", "tmd M2 even renoised",
     "tmd M2 even", "stage1"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, TMD", "tmd M2 even renoised", "tmd M2 even", "end"),
    ("trap 9", "re-noised against deterministic, M = 2 even grid, DMD2-v", "dmd2v M2 even renoised", "dmd2v M2 even",
     "end"),
]  # fmt: skip


def teacher_name(cfg: Toy) -> str:
    """The folder of the teacher that a job's student starts from."""
    return f"teacher-{cfg.data}-{'cond' if cfg.conditional else 'free'}-L{cfg.depth}-seed{cfg.seed}"


def extra(bench: PlanarLadder, teacher, fit: dict, how) -> dict:
    """More of a job: the teacher's mean velocity on the same grid (C0), and x_hat by outer time."""
    found = {}
    if fit["stage1"]:
        few = tmd.sample_teacher(teacher, bench.x_1, bench.c, bench.c_neg, grid=how.outer_grid)
        found["teacher"] = bench.score(few, bench.c)
    # found here: the fake score sees the mixture over t_i, so each x_hat(t_i) may drift while the mixture fits
    if how.M > 1:
        found["per_t"] = x_hat_per_time(bench, fit["student"], how)
    return found


@torch.no_grad()
def x_hat_per_time(bench: PlanarLadder, student, how) -> dict:
    """Sliced Wasserstein of x_hat to the data at each outer time, and of the mixture that the fake score sees."""
    g, n, found = torch.Generator().manual_seed(4), len(bench.x), []
    for t in how.outer_grid[1:]:
        t, x_1 = t.expand(n), tmd.randn_like(bench.x, g)
        x_t = tmd.interpolate(bench.x, x_1, t)
        predict = tmd.transition(student, x_t, t, bench.c, how.target)
        y_hat = tmd.inner_flow(predict, tmd.randn_like(x_t, g), how.inner_grid, how.field)
        found.append(tmd.clean_estimate(y_hat, x_t, t, how.target, how.clean, x_1))
    pick = torch.randint(len(found), (n,), generator=g)
    mixed = torch.stack(found)[pick, torch.arange(n)]
    each = [sliced_wasserstein(x_hat, bench.x) for x_hat in found]
    return {"each": each, "mixture": sliced_wasserstein(mixed, bench.x)}


@functools.cache  # every job that ends rewrites the tables, and this takes a minute
def exact_c0(seeds=SEEDS, n: int = 5000) -> list[dict]:
    """C0 with nothing learnt: exact flow and transition matching on eight Gaussians, by mode width and steps."""
    rows = []
    for sigma in tqdm((0.02, 0.15, 0.5), desc="exact oracles", disable=None):
        data = GaussianMixture(_CENTRES, torch.full((8,), sigma))
        for M in (1, 2, 4):
            grid, inner = tmd.make_grid(M, 1.0).double(), tmd.make_grid(1, 1.0).double()
            found = {"flow": {}, "tm": {}, "floor": {}}
            for seed in seeds:
                g = torch.Generator().manual_seed(seed)
                x, other = data.sample(n, g), data.sample(n, g)
                x_1 = torch.randn(n, 2, generator=g, dtype=torch.float64)
                exact = tmd.sample(ExactStudent(data, g), x_1, outer_grid=grid, inner_grid=inner, generator=g)
                flow = tmd.sample_teacher(data, x_1, grid=grid)
                for key, points in (("flow", flow), ("tm", exact), ("floor", other)):
                    found[key][seed] = {"swd": sliced_wasserstein(points, x)}
            rows.append({"sigma": sigma, "M": M, **found})
    return rows


def table(jobs: dict, numbers, judge, result: dict) -> None:
    """C0 above the other rows, and the drift of x_hat by outer time."""
    rows = []
    for row in exact_c0():
        where = f"exact oracle, eight Gaussians of width {row['sigma']}, M = {row['M']}"
        rows.append(judge("C0", f"{where}: transition against flow matching", [], row["tm"], row["flow"]))
    grids = {"tmd": "one step", "tmd M2": "two steps, grid 0.999, 0.909", "tmd M2 even": "two steps, grid 0.999, 0.5"}
    for name, steps in grids.items():
        setting = f"after stage 1 (N = 4) against the teacher's mean velocity, {steps}"
        rows.append(judge("C0", setting, [name], numbers(name, "stage1"), numbers(name, "teacher")))
    result["rows"] = rows + result["rows"]
    drift = {name: [r["per_t"] for r in records if "per_t" in r] for name, records in jobs.items()}
    result["x_hat_per_time"] = {name: found for name, found in drift.items() if found}


def drift_table(result: dict) -> list[str]:
    """Distance of x_hat to the data by outer time, for the students with M = 2."""
    head = "| student, M = 2 | x_hat from t_1 | x_hat from t_2 | mixture (what the fake score sees) |"
    lines = [head, "|---|---|---|---|"]
    for name, rs in sorted(result["x_hat_per_time"].items()):
        columns = [*([r["each"][i] for r in rs] for i in (0, 1)), [r["mixture"] for r in rs]]
        lines.append(f"| {name} | " + " | ".join(show(summary(column)) for column in columns) + " |")
    return ["\n".join(lines) + "\n"]


def draw(root: Path, result: dict) -> None:
    """Quality against effective NFE (C1, C2), teachers beside the students."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    teachers = [
        json.loads(f.read_text(encoding="utf-8"))
        for f in sorted(root.glob("teacher-spirals-free-L6-seed*/teacher.json"))
    ]
    mean = lambda steps, key: sum(t[steps][key] for t in teachers) / len(teachers)
    names = {"dmd2v": "DMD2-v M1", "dmd2v M2": "DMD2-v M2", "tmd N1": "N1 H2", "tmd N2": "N2 H2", "tmd H1": "N4 H1",
             "tmd": "N4 H2", "tmd M2": "M2 N4 H2"}  # fmt: skip
    for ax, key, label in zip(axes, ("swd", "off_support"), ("sliced Wasserstein", "share off the support")):
        for name, text in ((name, text) for name, text in names.items() if name in result["models"]):
            m = result["models"][name]
            at, (color, mark) = (m["effective_nfe"], m[key]["mean"]), (INK, "s") if "DMD2" in text else (ORANGE, "o")
            ax.errorbar(*at, m[key]["std"], fmt=mark, color=color, capsize=3, ms=5)
            ax.annotate(text, at, xytext=(5, 4), textcoords="offset points", fontsize=7, color=color)
        for steps, style in (("50", "--"), ("4", ":")):
            ax.axhline(mean(steps, key), color=BLUE, lw=1, ls=style, label=f"teacher, {steps} steps")
        ax.axhline(mean("floor", key), color=GREY, lw=1, label="two draws of the data")
        ax.set(xlabel="effective NFE", ylabel=label, yscale="log", xlim=(0.8, 4.6))
        ax.grid(alpha=0.2, which="both")
    axes[0].legend(fontsize=7)
    fig.savefig(root / "quality_vs_nfe.png", dpi=120)
    plt.close(fig)


RUNG = Rung(
    ladder=PlanarLadder,
    jobs=JOBS,
    claims=CLAIMS,
    size=SIZE,
    quick=QUICK | {"iterations": 40, "stage1_updates": 30, "teacher_updates": 60},
    quick_jobs=("tmd", "dmd2v", "tmd TM"),
    scores=SCORES,
    margins={"swd": 0.002, "off_support": 0.005},
    labels={"swd": "sliced Wasserstein", "off_support": "off support"},
    teacher_name=teacher_name,
    percent=("off_support",),
    extra=extra,
    table=table,
    more_tables=drift_table,
    draw=draw,
)


def run(out: str, quick: bool = False, processes: int = 2) -> dict:
    """Run every missing job, then write claims.json, claims.md and quality_vs_nfe.png."""
    return claims.run(RUNG, out, quick, processes)
