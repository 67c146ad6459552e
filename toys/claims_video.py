"""What the paper claims, measured on moving shapes: python toy_video.py --claims. The rule is in claims.py.

Scores are the ruler's (ruler.py); higher is better. The rule looks at their mean, `total`. Static collapse would show
in motion, mode collapse in diversity, a forgotten prompt in semantic: all are in the table of students. --only runs
some of the jobs, so that the table can be filled row by row.
"""

from __future__ import annotations

import json
from pathlib import Path

from toys import claims
from toys.claims import Rung, show, summary
from toys.drawing import BLUE, INK, ORANGE, pyplot
from toys.moving_shapes import MOTIONS
from toys.tiny_video import QUICK, SIZES, ToyVideo, VideoLadder

M2 = {"M": 2}

# name: (settings, settings of the student or "plain ...", of stage 1 or None, of stage 2). plain = DMD2-v.
JOBS = {
    "tmd": ({}, {}, {}, {}),
    "dmd2v": ({}, "plain", {}, {}),
    "tmd no stage 1": ({}, {}, None, {}),
    "tmd TM": ({}, {}, {"flow_map_share": 0.0}, {}),
    "dmd2v no kd": ({}, "plain no kd", {}, {}),
    "tmd M2": (M2, {}, {}, {}),
    "dmd2v M2": (M2, "plain", {}, {}),
    "dmd2v M2 kd": (M2, "plain kd", {}, {}),
    "tmd N2": ({}, {"N": 2}, {}, {}),
    "tmd N1": ({}, {"N": 1}, {}, {}),
    "tmd H1": ({}, {"H": 1}, {}, {}),
    "tmd last": ({}, {}, {}, {"rollout": "last"}),
    "tmd no rollout": ({}, {}, {}, {"rollout": "none"}),
    "tmd concat": ({}, {"fusion": "concat"}, {}, {}),
    "tmd target x": ({}, {"target": "x"}, {}, {}),
    "tmd no gan": ({}, {}, {}, {"gan_weight": 0.0}),
    "dmd2v no gan": ({}, "plain", {}, {"gan_weight": 0.0}),
    "dmd2v conv1d2d": ({}, "plain", {}, {"kind": "conv1d2d"}),
    "dmd2v attention": ({}, "plain", {}, {"kind": "attention"}),
    "tmd dmd shift 5": ({}, {}, {}, {"dmd_shift": 5.0}),
    "dmd2v dmd shift 5": ({}, "plain", {}, {"dmd_shift": 5.0}),
    "tmd M2 even": ({**M2, "outer_shift": 1.0}, {}, {}, {}),
    "dmd2v M2 even": ({**M2, "outer_shift": 1.0}, "plain", {}, {}),
    "tmd long clips": ({}, {}, {}, {}),  # half as long again as the size's, see rung()
    "dmd2v long clips": ({}, "plain", {}, {}),
}

# claim, setting, A, B, phase: the claim is that A beats B
CLAIMS = [
    ("C1", "M = 1, N = 4", "tmd", "dmd2v", "end"),
    ("C1", "M = 1, N = 2", "tmd N2", "dmd2v", "end"),
    ("C1", "M = 1, neither warmed up: TMD without stage 1 against DMD2-v without KD", "tmd no stage 1", "dmd2v no kd",
     "end"),
    ("C1", "M = 2, N = 4", "tmd M2", "dmd2v M2", "end"),
    ("C1", "like NFE: TMD at M = 1, N = 4 against DMD2-v at M = 2", "tmd", "dmd2v M2", "end"),
    ("C2", "M = 2 against M = 1, N = 4", "tmd M2", "tmd", "end"),
    ("C2", "N = 4 against N = 2", "tmd", "tmd N2", "end"),
    ("C2", "N = 2 against N = 1", "tmd N2", "tmd N1", "end"),
    ("C2", "H of the run against H = 1", "tmd", "tmd H1", "end"),
    ("C3", "rollout against gradient through the last inner step only", "tmd", "tmd last", "end"),
    ("C3", "rollout against single inner jumps", "tmd", "tmd no rollout", "end"),
    ("C4", "TM-MF against TM, after stage 1", "tmd", "tmd TM", "stage1"),
    ("C4", "TM-MF against TM, after stage 2", "tmd", "tmd TM", "end"),
    ("C4", "TM-MF against no stage 1 but more of stage 2, after stage 2", "tmd", "tmd no stage 1", "end"),
    ("C5", "gated against concat fusion", "tmd", "tmd concat", "end"),
    ("C6", "y = x_1 - x against y = x", "tmd", "tmd target x", "end"),
    ("C7", "N = 4 against the same student sampled with N = 1", "tmd", "tmd", "end/one"),
    ("C8", "GAN against none, TMD", "tmd", "tmd no gan", "end"),
    ("C8", "GAN against none, DMD2-v", "dmd2v", "dmd2v no gan", "end"),
    ("C8", "Conv3D against Conv1D-2D heads, DMD2-v", "dmd2v", "dmd2v conv1d2d", "end"),
    ("C8", "Conv3D against attention heads, DMD2-v", "dmd2v", "dmd2v attention", "end"),
    ("C9", "KD warm-up against more of stage 2, M = 1", "dmd2v", "dmd2v no kd", "end"),
    ("C9", "no KD warm-up but more of stage 2 against KD warm-up, M = 2", "dmd2v M2", "dmd2v M2 kd", "end"),
    ("C10", "t_dmd shift 5 (paper's) against 1 (this rung's), TMD", "tmd dmd shift 5", "tmd", "end"),
    ("C10", "t_dmd shift 5 (paper's) against 1 (this rung's), DMD2-v", "dmd2v dmd shift 5", "dmd2v", "end"),
    ("C10", "t_student shift 10 (paper's) against 1 at M = 2, TMD", "tmd M2", "tmd M2 even", "end"),
    ("C10", "t_student shift 10 (paper's) against 1 at M = 2, DMD2-v", "dmd2v M2", "dmd2v M2 even", "end"),
    ("(a)", "clips half as long again: TMD against DMD2-v", "tmd long clips", "dmd2v long clips", "end"),
]  # fmt: skip

LABELS = {"total": "total", "quality": "quality", "semantic": "semantic", "motion": "motion", "diversity": "diversity"}


def teacher_name(cfg: ToyVideo) -> str:
    """The folder of the teacher that a job's student starts from."""
    return f"teacher-{cfg.frames}x{cfg.pixels}-seed{cfg.seed}"


def base_teachers(root: Path) -> list[dict]:
    """Scores of the teachers of the shorter clips, which most students make."""
    files = sorted(root.glob("teacher-*/teacher.json"))
    frames = [int(f.parent.name.split("-")[1].split("x")[0]) for f in files]
    return [json.loads(f.read_text()) for f, n in zip(files, frames) if n == min(frames)]


def table(jobs: dict, numbers, judge, result: dict) -> None:
    """Adds the scores by motion law: which motions suffer, and which shift suits which motion?"""
    result["laws"] = {
        name: {law: summary([r["end"]["laws"][law]["total"] for r in rs]) for law in MOTIONS}
        for name, rs in jobs.items()
        if len(rs) > 1 and all("end" in r for r in rs)
    }


def laws_table(result: dict) -> list[str]:
    """Total score of each student by motion law."""
    lines = [f"| total score by motion law | {' | '.join(MOTIONS)} |", "|---" * (len(MOTIONS) + 1) + "|"]
    for name, laws in sorted(result["laws"].items()):
        lines.append(f"| {name} | " + " | ".join(show(laws[law]) for law in MOTIONS) + " |")
    return ["\n".join(lines) + "\n"]


def measured(result: dict) -> list[str]:
    """The tables of students and of motion laws, for the students that were run."""
    return [claims.students_table(rung("tiny"), result), *laws_table(result)]


def draw(root: Path, result: dict) -> None:
    """Total and semantic score of the students, a row each by effective NFE, teachers as lines."""
    plt = pyplot()
    teachers, models = base_teachers(root), result["models"]
    mean = lambda steps, key: sum(t[steps][key] for t in teachers) / len(teachers)
    names = ("dmd2v", "dmd2v no kd", "dmd2v M2", "tmd", "tmd N1", "tmd N2", "tmd H1", "tmd M2", "tmd no stage 1")
    shown = sorted((name for name in names if name in models), key=lambda name: (models[name]["effective_nfe"], name))
    fig, axes = plt.subplots(1, 2, figsize=(10, 1.3 + 0.3 * len(shown)), layout="constrained", sharey=True)
    for ax, key in zip(axes, ("total", "semantic")):
        for row, name in enumerate(shown):
            m, (color, mark) = models[name], (INK, "s") if "dmd2v" in name else (ORANGE, "o")
            ax.errorbar(m[key]["mean"], row, xerr=m[key]["std"], fmt=mark, color=color, capsize=3, ms=5)
        for steps, style in (("50", "--"), ("4", ":")):
            ax.axvline(mean(steps, key), color=BLUE, lw=1, ls=style, label=f"teacher, {steps} x 2")
        ax.set(title=f"{key} (data: {mean('floor', key):.2f})")
        ax.grid(alpha=0.2)
    axes[0].set_yticks(range(len(shown)), [f"{name}, NFE {models[name]['effective_nfe']:.2f}" for name in shown])
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    fig.savefig(root / "quality_vs_nfe.png", dpi=120)
    plt.close(fig)


def rung(size: str) -> Rung:
    """The rung at a size of toy_video.py."""
    shorter = {"iterations": 800} if size == "tiny" else {}  # two thirds of the default run: about five minutes a job
    settings = {**SIZES[size], "size": size, **shorter}
    longer = {"frames": 3 * SIZES[size].get("frames", ToyVideo.frames) // 2}
    jobs = {name: (cfg | longer, *job) if "long clips" in name else (cfg, *job) for name, (cfg, *job) in JOBS.items()}
    return Rung(
        ladder=VideoLadder,
        jobs=jobs,
        claims=CLAIMS,
        size=settings,
        quick={**QUICK, "teacher_updates": 10, "stage1_updates": 4, "iterations": 10},
        quick_jobs=("tmd", "dmd2v"),
        scores={"total": 1},
        labels=LABELS,
        teacher_name=teacher_name,
        table=table,
        more_tables=laws_table,
        draw=draw,
    )


def run(out: str, size: str, quick: bool = False, processes: int = 2, only: tuple = ()) -> dict:
    """Run every missing job (or those named in `only`), then write claims.json, claims.md and quality_vs_nfe.png.

    ValueError names the known jobs if one of `only` is not among them.
    """
    unknown = [name for name in only if name not in JOBS]
    if unknown:
        raise ValueError(f"unknown job {unknown[0]!r}; choose from {', '.join(JOBS)}.")
    return claims.run(rung(size), out, quick, processes, only=only)
