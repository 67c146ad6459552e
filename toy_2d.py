"""Transition Matching Distillation on points in the plane, end to end in about three minutes on a laptop.

    python toy_2d.py                        # two spirals: teacher, stage 1, stage 2, the DMD2-v baseline, pictures
    python toy_2d.py --data checkerboard    # or gaussians, moons
    python toy_2d.py --resume               # go on where a killed run stopped, exactly
    python toy_2d.py --quick                # under 30 seconds, to see that it works
    python toy_2d.py --claims               # what the paper claims, measured here (up to an hour, resumable)
    python toy_2d.py --bench                # steps per second of every stage, against their matmuls alone

Everything lands in runs/toy_2d/<data>/: metrics.json and samples.npz first, then the pictures drawn from them.
The algorithm itself is in tmd_minimal.py; here are only data, sizes, distances and drawing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import tmd_minimal as tmd
from toys import ladder
from toys.ladder import BLUE, GREY, INK, ORANGE, Ladder, Settings, open_folder, option, pyplot, write_json
from toys.planar import DATA, PlanarDiscriminator, PlanarNet, dataset, off_support, sliced_wasserstein


@dataclass
class Toy(Settings):
    """One run of the plane. Where a value differs from the paper's, the README's "Differences from the paper" says why."""

    data: str = option("spirals", f"data set: {', '.join(DATA)}")
    out: str = option("", "output folder; default runs/toy_2d/<data>")
    seed: int = option(0, "seed of weights, data and draws")
    M: int = option(2, "outer transitions; paper: 1 or 2")
    N: int = option(4, "inner steps of the flow head; paper: 2 or 4")
    H: int = option(2, "blocks in the flow head; paper: 5 of 30")
    depth: int = option(6, "blocks of the network")
    width: int = option(64, "channels of the network")
    batch: int = option(256, "points per update")
    conditional: bool = option(False, "tell the networks the class (arm, moon, mode, half) of each point")
    guidance: float = option(1.0, "teacher's guidance in both stages, with --conditional; 1 is none")
    teacher_updates: int = option(2500, "updates of the teacher")
    stage1_updates: int = option(1000, "updates of stage 1 (TM-MF)")
    iterations: int = option(2400, "iterations of stage 2, every 5th of the student")
    # choice: learning rates for a network of 0.1 M parameters; the paper's are for 1.3 B
    teacher_lr: float = option(2e-3, "learning rate of the teacher")
    stage1_lr: float = option(1e-3, "learning rate of stage 1; paper: 3e-5")
    stage2_lr: float = option(1e-3, "learning rate of stage 2; paper: 1e-5")
    # choice: timestep shifts grow with dimension; the paper's are for two million numbers, these for two
    outer_shift: float = option(1.0, "timestep shift of the outer grid; paper: 10")
    inner_shift: float = option(1.0, "timestep shift of the inner grid; paper: 10")
    s_shift: float = option(1.0, "timestep shift of s in stage 1; paper: 3")
    dmd_shift: float = option(0.25, "timestep shift of t in VSD, fake score and GAN; paper: 5")
    gan_weight: float = option(0.3, "weight of the GAN loss; paper: 0.03")  # choice: the heads are tiny
    # choice: re-noising keeps the marginals on a spread grid (trap 9 and its rows in the claims table)
    outer: str = option("renoised", "outer transition: deterministic (Eq. 18, paper) or renoised (Eq. 19)")
    samples: int = option(10000, "points per model in distances and pictures")

    def __post_init__(self):
        dataset(self.data)
        self.out = self.out or f"runs/toy_2d/{self.data}"
        super().__post_init__()


QUICK = {
    "teacher_updates": 500,
    "stage1_updates": 150,
    "iterations": 250,
    "samples": 2000,
    "width": 48,
    "depth": 4,
    "batch": 192,
}


class PlanarLadder(Ladder):
    """The ladder in the plane: points, classes, planar networks, two distances."""

    settings = Toy
    of_teacher = ("data", "seed", "width", "depth", "batch", "conditional", "teacher_updates", "teacher_lr")
    t_shift = 0.5  # choice: more time near the data, where a curve's edge is decided

    def __init__(self, cfg: Toy):
        super().__init__(cfg)
        self.set = dataset(cfg.data)
        self.c_neg = self.set.classes if cfg.conditional else None
        g = torch.Generator().manual_seed(cfg.seed + 10_000)
        self.x, self.label = self.set.draw(cfg.samples, g)
        self.c = self.label if cfg.conditional else None
        self.x_1 = torch.randn(cfg.samples, 2, generator=g)
        self.other, self.other_label = self.set.draw(cfg.samples, g)
        self.taps = (cfg.depth // 2 - 1, cfg.depth - 2)  # choice: middle and last but one, as (15, 22, 29) of 30

    def data(self, n, generator):
        """What the trainings draw from: x (n, 2) and class (n,) or None."""
        x, label = self.set.draw(n, generator)
        return x, (label if self.cfg.conditional else None)

    def network(self):
        return PlanarNet(2, self.cfg.width, self.cfg.depth, self.set.classes if self.cfg.conditional else 0)

    def discriminator(self):
        return PlanarDiscriminator(self.cfg.width, len(self.taps))

    def floor(self) -> dict:
        """The score of a second draw of the data."""
        return self.score(self.other, None if self.c is None else self.other_label)

    def score(self, points, c=None) -> dict:
        """{"swd", "off_support"} of samples against the data; off the support of their own class, if they were told one."""
        return {
            "swd": sliced_wasserstein(points, self.x[: len(points)]),
            "off_support": off_support(self.set, points, c),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, drawn from the saved numbers
# ---------------------------------------------------------------------------------------------------------------------

LIMIT = 2.3


def plane(ax, title=""):
    """Equal aspect, fixed limits, no ticks: every panel shows the same window."""
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=8.5)


def draw_samples(points: dict, records: dict, path: Path):
    """One panel a model, same noise in each, with effective NFE and distances in its title."""
    plt = pyplot()
    columns = (len(points) + 1) // 2 if len(points) > 4 else len(points)
    rows = -(-len(points) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.75 * columns, 3.15 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, p) in zip(axes.flat, points.items()):
        ax.axis("on")
        r, p = records[name], p[:5000]
        cost = f"   NFE {r['effective_nfe']:.3g}" if r.get("effective_nfe") else ""
        plane(ax, f"{r['title']}{cost}\nSW {r['swd']:.3f}   off support {r['off_support']:.1%}")
        ax.scatter(
            p[:, 0],
            p[:, 1],
            s=1.2,
            lw=0,
            alpha=0.55,
            color=GREY if name == "data" else BLUE if "teacher" in name else ORANGE,
        )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_inner_flow(data_points, traces: dict, path: Path):
    """A row per student and outer transition: y_s from noise to target for several x_t, shown as x_t - t y_s, and the outer transition."""
    plt = pyplot()
    rows = [(name, found, i) for name, found in traces.items() for i in range(len(found["t"]))]
    fig, axes = plt.subplots(len(rows), 5, figsize=(13.5, 2.95 * len(rows)), squeeze=False, layout="constrained")
    for panels, (name, found, i) in zip(axes, rows):
        t, t_next = found["t"][i], found["t"][i + 1] if i + 1 < len(found["t"]) else 0.0
        x_t, per = found["x_t"][i], int(found["per"])
        x_next = found["x_t"][i + 1] if i + 1 < len(found["t"]) else found["x"]
        paths = x_t[None] - t * found["y"][i]  # (N+1, B, 2)
        for ax in panels:
            ax.scatter(*data_points.T, s=0.6, lw=0, color=GREY, alpha=0.5)
        for k, ax in enumerate(panels[:4]):
            these = slice(k * per, (k + 1) * per)
            ax.plot(paths[:, these, 0], paths[:, these, 1], color=BLUE, lw=0.4, alpha=0.3)
            ax.scatter(*paths[0, these].T, s=4, lw=0, color=INK, alpha=0.5)
            ax.scatter(*paths[-1, these].T, s=7, lw=0, color=ORANGE, zorder=3)
            ax.plot(*x_t[k * per], marker="*", ms=11, color="black", mec="white", mew=0.8, zorder=4)
            plane(ax, f"t = {t:.3g}: one x_t, {per} inner noises")
        panels[0].set_ylabel(name, fontsize=10)
        some = slice(4 * per, 4 * per + 250)
        panels[4].plot(
            np.stack([x_t[some, 0], x_next[some, 0]]),
            np.stack([x_t[some, 1], x_next[some, 1]]),
            color=BLUE,
            lw=0.3,
            alpha=0.5,
        )
        panels[4].scatter(*x_t[some].T, s=4, lw=0, color=INK, alpha=0.5)
        panels[4].scatter(*x_next[some].T, s=5, lw=0, color=ORANGE)
        plane(panels[4], f"outer transition {t:.3g} to {t_next:.3g}")
    fig.suptitle(
        "inner flow, drawn as x_t - t y_s: star = x_t, dark = inner noise, orange = where the rollout ends, grey = data",
        fontsize=9,
    )
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_curves(curves: dict, floors: dict, teacher: dict, path: Path):
    """Distance against updates for stage 2, both distances, floor and teacher beside them."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for ax, key, name in zip(axes, ("swd", "off_support"), ("sliced Wasserstein", "share off the support")):
        for (label, curve), color in zip(curves.items(), (GREY, ORANGE)):
            ax.plot(
                [p["updates"] for p in curve],
                [p[key] for p in curve],
                color=INK if color == GREY else color,
                marker=".",
                label=label,
            )
        ax.axhline(teacher[key], color=BLUE, lw=1, ls="--", label="teacher, 50 steps")
        ax.axhline(floors[key], color=GREY, lw=1, ls=":", label="two draws of the data")
        ax.set(xlabel="updates (before stage 2: TM-MF or KD warm-up)", ylabel=name, yscale="log")
        ax.grid(alpha=0.2, which="both")
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw_gif(data_points, traces: dict, path: Path):
    """The last outer transition unrolling: for every x_t the head carries x_t - t y_s from noise to a point of the data."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    row = len(traces["t"]) - 1 if len(traces["t"]) > 1 else 0  # the last transition shows sharp targets
    t, x_t, y = traces["t"][row], traces["x_t"][row], traces["y"][row]
    first = 4 * traces["per"]
    paths = (x_t[None] - t * y)[:, first : first + 1200]
    steps, between = len(paths) - 1, 10
    fig, ax = plt.subplots(figsize=(3.6, 3.8), layout="constrained")
    ax.scatter(*data_points.T, s=0.6, lw=0, color=GREY, alpha=0.5)
    dots = ax.scatter(*paths[0].T, s=4, lw=0, color=ORANGE)
    plane(ax)

    def frame(i):
        i = min(i, steps * between)
        j, w = min(i // between, steps - 1), (i - between * min(i // between, steps - 1)) / between
        dots.set_offsets((1 - w) * paths[j] + w * paths[j + 1])
        ax.set_title(f"t = {t:.3g}: inner step {min(j + 1, steps)} of {steps}", fontsize=9)
        return (dots,)

    FuncAnimation(fig, frame, frames=steps * between + 12).save(path, PillowWriter(fps=12), dpi=90)
    plt.close(fig)


def trace_transitions(bench: PlanarLadder, student, how, per: int = 200) -> dict:
    """Trajectories for the pictures: 4 points with `per` inner noises each, then 1200 points with one each."""
    g = torch.Generator().manual_seed(3)
    four = torch.tensor([[1.2, 0.6], [-1.0, 0.9], [-0.8, -1.1], [0.9, -0.9]]).repeat_interleave(per, 0)
    x_1 = torch.cat([four, torch.randn(1200, 2, generator=g)])
    c = (
        None
        if bench.c is None
        else bench.label[torch.cat([torch.arange(4).repeat_interleave(per), torch.arange(1200)]) % len(bench.label)]
    )
    trace = []
    kw = {"target": how.target, "field": how.field, "outer": how.outer}
    x = tmd.sample(
        student, x_1, c, outer_grid=how.outer_grid, inner_grid=how.inner_grid, generator=g, trace=trace, **kw
    )
    # the later transitions start each group from one point too, so that a panel shows one x_t and many inner noises
    for i in range(1, len(trace)):
        t = torch.full((len(x_1),), trace[i]["t"])
        x_t = trace[i]["x_t"].clone()
        for k in range(4):
            x_t[k * per : (k + 1) * per] = x_t[k * per]
        predict = tmd.transition(student, x_t, t, c, how.target)
        inner = []
        with torch.no_grad():
            tmd.inner_flow(predict, tmd.randn_like(x_t, g), how.inner_grid, how.field, trace=inner)
        trace[i].update(x_t=x_t, y=inner)
    return {
        "t": np.array([r["t"] for r in trace]),
        "x_t": np.stack([r["x_t"].numpy() for r in trace]),
        "y": np.stack([torch.stack(r["y"]).numpy() for r in trace]),
        "x": x.numpy(),
        "per": np.array(per),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def run(cfg: Toy, resume: bool = False, progress: bool = True) -> dict:
    """The whole ladder; returns what metrics.json holds."""
    started = time.perf_counter()
    folder = open_folder(cfg.out, cfg.without(), resume)
    checkpoints, bench = folder / "checkpoints", PlanarLadder(cfg)
    records, points, curves = {}, {}, {}

    def keep(name, title, sampler, **facts):
        records[name], points[name] = bench.judge(sampler, title=title, **facts)
        r = records[name]
        print(
            f"{title:<24} NFE {r['effective_nfe']:<5.3g} sliced Wasserstein {r['swd']:.4f}   off support {r['off_support']:.2%}"
        )

    floors = bench.floor()
    records["data"], points["data"] = {"title": "data (floor: two draws)", "effective_nfe": None, **floors}, bench.x
    teacher, phase = bench.fit_teacher(checkpoints, save_every=bench.save_every, progress=progress)
    per_step = 2 if cfg.guidance != 1 and cfg.conditional else 1
    for steps in (50, 4, 2, 1):
        facts = {"effective_nfe": float(steps * per_step), "seconds": phase.seconds, "updates": cfg.teacher_updates}
        keep(
            f"teacher_{steps}",
            f"teacher, {steps} step{'s' * (steps > 1)}",
            lambda k=steps: bench.teacher_samples(teacher, k),
            **facts,
        )
    draw_samples(points, records, folder / "samples.png")
    print(
        f"first picture after {time.perf_counter() - started:.0f} s: {folder / 'samples.png'} (data and teacher; the students follow)"
    )

    how, plain = cfg.student_config(), cfg.student_config(H=0, N=1)
    ours, base = bench.fit_both(teacher, checkpoints, curve=12, progress=progress)
    facts = {"effective_nfe": float(cfg.M), "seconds": base["seconds"], "updates": base["updates"]}
    keep("dmd2v", f"DMD2-v, M={cfg.M}", lambda: bench.student_samples(base["student"], plain), **facts)
    facts = {"effective_nfe": tmd.effective_nfe(cfg.M, cfg.N, cfg.H, cfg.depth)}
    if ours["stage1"]:
        facts |= {"seconds": ours["stage1_seconds"], "updates": cfg.stage1_updates}
        keep(
            "stage1", f"stage 1 alone, M={cfg.M} N={cfg.N}", lambda: bench.student_samples(ours["stage1"], how), **facts
        )
    facts |= {"seconds": ours["seconds"], "updates": ours["updates"]}
    keep("tmd", f"TMD, M={cfg.M} N={cfg.N} H={cfg.H}", lambda: bench.student_samples(ours["student"], how), **facts)

    curves = {"DMD2-v": base["curve"], "TMD": ours["curve"]}
    traces = {"stage 1": trace_transitions(bench, ours["stage1"], how)} if ours["stage1"] else {}
    traces["stage 2"] = trace_transitions(bench, ours["student"], how)
    flat = {f"trace {name} {key}": value for name, found in traces.items() for key, value in found.items()}
    metrics = {"config": cfg.without(), "floors": floors, "models": records, "curves": curves, "torch": torch.__version__,
               "threads": torch.get_num_threads(), "total_seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    (folder / "metrics.md").write_text(markdown(metrics))
    with open(folder / "samples.npz.tmp", "wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in points.items()}, **flat)
    os.replace(folder / "samples.npz.tmp", folder / "samples.npz")
    draw(folder)
    print(
        f"done in {time.perf_counter() - started:.0f} s: {folder}/metrics.json, samples.png, inner_flow.png, curves.png, transition.gif"
    )
    return metrics


def markdown(metrics: dict) -> str:
    """The models of metrics.json as a Markdown table."""
    lines = [
        "| model | effective NFE | sliced Wasserstein | off support | updates | training, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in metrics["models"].values():
        cost = "| - | - |" if r["effective_nfe"] is None else f"| {r['updates']} | {r['seconds']:.0f} |"
        nfe = "-" if r["effective_nfe"] is None else f"{r['effective_nfe']:.3g}"
        lines.append(f"| {r['title']} | {nfe} | {r['swd']:.3f} | {r['off_support']:.1%} {cost}")
    return "\n".join(lines) + "\n"


def draw(folder: Path) -> None:
    """All pictures, from metrics.json and samples.npz alone."""
    metrics, saved = json.loads((folder / "metrics.json").read_text()), np.load(folder / "samples.npz")
    points = {name: saved[name] for name in metrics["models"]}
    traces = {}
    for key in saved.files:
        if key.startswith("trace "):
            _, name, number, what = key.split()
            traces.setdefault(f"{name} {number}", {})[what] = saved[key]
    draw_samples(points, metrics["models"], folder / "samples.png")
    draw_inner_flow(points["data"][:2500], traces, folder / "inner_flow.png")
    draw_curves(metrics["curves"], metrics["floors"], metrics["models"]["teacher_50"], folder / "curves.png")
    draw_gif(points["data"][:2500], traces["stage 2"], folder / "transition.gif")


MODES = {
    "quick": "a small run in under 30 seconds: " + ", ".join(f"{k} {v}" for k, v in QUICK.items()),
    "resume": "go on where a killed run stopped; finished phases are loaded",
    "redraw": "only draw the pictures again from the saved numbers",
    "claims": "measure the paper's claims in the plane (see toy_claims.py)",
    "bench": "measure steps per second of every stage (see bench.py)",
}


def parser():
    p = ladder.parser(Toy, __doc__, **MODES)
    p.add_argument("--threads", type=int, default=1, help="CPU threads; these networks are fastest on one (default: 1)")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. Errors are one sentence on stderr."""
    args = vars(parser().parse_args(argv))
    mode = {key: args.pop(key) for key in (*MODES, "threads")}

    def work():
        torch.set_num_threads(mode["threads"])
        if (mode["claims"] or mode["bench"]) and set(args) - {"out"}:
            raise ValueError(
                f"--claims and --bench have settings of their own; leave out {', '.join(sorted(set(args) - {'out'}))}."
            )
        quick = (
            {**QUICK, "out": f"runs/toy_2d/{args.get('data', Toy.data)}-quick"} if mode["quick"] else {}
        )  # a folder of its own
        cfg = Toy(**{**quick, **args})
        if mode["claims"]:
            from toys import claims_2d

            claims_2d.run(
                cfg.out if "out" in args else f"runs/toy_2d/claims{'-quick' * mode['quick']}", quick=mode["quick"]
            )
        elif mode["bench"]:
            from toys import bench

            out = cfg.out if "out" in args else "runs/toy_2d"
            bench.run(PlanarLadder, Toy(), out, [(cfg.M, cfg.N)], n=Toy.samples, repeats=5 if mode["quick"] else 100)
        elif mode["redraw"]:
            ladder.redraw(draw, Path(cfg.out))
        else:
            run(cfg, mode["resume"])

    return ladder.command("toy_2d.py", work)


if __name__ == "__main__":
    sys.exit(main())
