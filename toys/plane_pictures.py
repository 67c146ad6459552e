"""Pictures of the plane, drawn from a run's metrics.json and samples.npz alone, and the traces that they show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import tmd_minimal as tmd
from toys.drawing import BLUE, GREY, INK, ORANGE, pyplot
from toys.plane import PlanarLadder

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
    """A row per student and outer transition: y_s from noise to target, shown as x_t - t y_s, then the transition."""
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
        "inner flow, drawn as x_t - t y_s: star = x_t, dark = inner noise, orange = end of the rollout, grey = data",
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
    """The last outer transition: for every x_t the head carries x_t - t y_s from noise to a point of the data."""
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
    metrics, saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8")), np.load(folder / "samples.npz")
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
