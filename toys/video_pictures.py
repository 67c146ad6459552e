"""Pictures of the tiny videos, drawn from a run's metrics.json and samples.npz alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from toys.drawing import BLUE, GREY, INK, ORANGE, pyplot
from toys.moving_shapes import encode


def mosaic(images: np.ndarray) -> np.ndarray:
    """Images (rows, columns, H, W) side by side, one pixel of nan (drawn white) between them."""
    framed = np.pad(images.astype(np.float32), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return np.block([list(row) for row in framed])[:-1, :-1]


def show(ax, image, labels, height):
    """A mosaic in grey, a label beside every row of it."""
    shown = ax.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[(height + 1) * k + height / 2 - 0.5 for k in range(len(labels))])
    ax.set_yticklabels(labels, fontsize=7.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return shown


def centres(clip: np.ndarray) -> np.ndarray:
    """Where the brightness of each frame of a clip (T, H, W) in [-1, 1] lies: (T, 2), x and y in pixels.

    The mean place, weighted by (value + 1) / 2; weights under 0.1, the noise of a background, do not count.
    """
    weight = (clip.astype(np.float64) + 1) / 2
    weight[weight < 0.1] = 0
    total = weight.sum((1, 2)).clip(min=1e-9)
    along = lambda axis: (weight.sum(3 - axis) * np.arange(clip.shape[axis])).sum(1) / total
    return np.stack([along(2), along(1)], 1)


def draw_sheet(clips: dict, records: dict, rows: list[int], prompts: list[str], path: Path):
    """Contact sheet: for each prompt a block of rows, one per model, the same noise in each; columns are frames.

    The last column is the path of the centre of brightness, from the large dot on.
    """
    plt = pyplot()
    _, frames, height, width = next(iter(clips.values()))[0].shape
    costs = [f"\nNFE {records[name]['effective_nfe']:.3g}" if records[name]["effective_nfe"] else "" for name in clips]
    labels = [records[name]["title"] + cost for name, cost in zip(clips, costs)]
    size = (2.2 + 0.78 * (frames + 1), (0.8 * len(clips) + 0.3) * len(rows))
    fig, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, row, prompt in zip(axes[:, 0], rows, prompts):
        shown = np.stack([x[row, 0] for x in clips.values()]).astype(np.float32)
        show(ax, mosaic(np.concatenate([shown, np.full_like(shown[:, :1], -1)], 1)), labels, height)
        for k, clip in enumerate(shown):
            corner = np.array([(width + 1) * frames, (height + 1) * k])
            x, y = (centres(clip) + corner).T
            ax.plot(x, y, ".-", color=ORANGE, lw=1, ms=3, clip_on=False)
            ax.plot(x[0], y[0], "o", color=ORANGE, ms=5)
        ax.text((width + 1) * frames + width / 2, -1, "path", fontsize=7.5, ha="center", va="bottom")
        ax.set_title(prompt, fontsize=10, loc="left", weight="bold")
    fig.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(fig)


def draw_gif(clips: dict, records: dict, rows: list[int], prompts: list[str], path: Path):
    """The same clips moving: a row per model, a column per prompt."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    stacked = np.stack([x[rows, 0] for x in clips.values()])  # (models, prompts, T, H, W)
    frames, height, width = stacked.shape[2:]
    size = (1.4 + 1.15 * len(rows), 1.15 * len(clips) + 0.5)
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    image = show(ax, mosaic(stacked[:, :, 0]), [records[name]["title"].replace(", ", "\n") for name in clips], height)
    for k, prompt in enumerate(prompts):
        ax.text((width + 1) * k + width / 2, -1.5, prompt.replace(" ", "\n", 1), fontsize=7, ha="center", va="bottom")

    def frame(i):
        image.set_data(mosaic(stacked[:, :, min(i, frames - 1)]))
        return (image,)

    FuncAnimation(fig, frame, frames=frames + 2).save(path, PillowWriter(fps=5), dpi=90)
    plt.close(fig)


def draw_quality(records: dict, path: Path):
    """Scores against effective NFE."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for ax, key in zip(axes, ("total", "quality", "semantic", "motion")):
        ax.axhline(records["data"][key], color=GREY, lw=1, ls=":", label="data")
        for name, r in records.items():
            if name != "data":
                color = BLUE if "teacher" in name else INK if "dmd2v" in name else ORANGE
                place = {"teacher": (4, -10), "dmd2v": (-4, 7), "stage1": (6, -2), "tmd": (4, 7)}[name.split("_")[0]]
                ax.plot(r["effective_nfe"], r[key], "o", color=color, ms=5)
                text = {"dmd2v": "DMD2-v", "stage1": "stage 1", "tmd": "TMD"}.get(
                    name, r["title"].replace("teacher, ", "")
                )
                ax.annotate(
                    text,
                    (r["effective_nfe"], r[key]),
                    xytext=place,
                    textcoords="offset points",
                    fontsize=7,
                    color=color,
                )
        ax.set(
            xscale="log",
            xlabel="effective NFE (blue: teacher, steps x 2)",
            title=key,
            ylim=(-0.04, 1.05),
            xlim=(0.7, 220),
        )
        ax.grid(alpha=0.2)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_curves(curves: dict, records: dict, path: Path):
    """Scores against updates of stage 2."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for ax, key in zip(axes, ("total", "semantic", "motion", "diversity")):
        for (label, curve), color in zip(curves.items(), (INK, ORANGE)):
            ax.plot([p["updates"] for p in curve], [p[key] for p in curve], marker=".", color=color, label=label)
        ax.axhline(records["teacher_50"][key], color=BLUE, lw=1, ls="--", label="teacher, 50 steps")
        ax.axhline(records["data"][key], color=GREY, lw=1, ls=":", label="data")
        ax.set(xlabel="updates (before stage 2: TM-MF or KD)", title=key, ylim=(0, 1.05))
        ax.grid(alpha=0.2)
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw(folder: Path, prompts: list[str] | None = None) -> None:
    """All pictures, from metrics.json and samples.npz alone; of other prompts than the run's, if given."""
    metrics, saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8")), np.load(folder / "samples.npz")
    records, prompts = metrics["models"], prompts or metrics["shown"]
    rows = [int((saved["c"] == encode(prompt).numpy()).all(1).nonzero()[0][0]) for prompt in prompts]
    clips = {name: saved[name] for name in ("data", "teacher_50", "dmd2v", "tmd") if name in saved}
    draw_sheet(clips, records, rows, prompts, folder / "contact_sheet.png")
    draw_gif(clips, records, rows, prompts, folder / "clips.gif")
    if metrics["curves"]:
        draw_quality(records, folder / "quality_vs_nfe.png")
        draw_curves(metrics["curves"], records, folder / "curves.png")


def markdown(metrics: dict) -> str:
    """The models of metrics.json as a Markdown table."""
    keys = ("total", "quality", "semantic", "motion", "diversity")
    lines = [
        f"| model | effective NFE | {' | '.join(keys)} | updates | training, s | sampling, s |",
        "|---" * (len(keys) + 5) + "|",
    ]
    for r in metrics["models"].values():
        nfe = "-" if r["effective_nfe"] is None else f"{r['effective_nfe']:.3g}"
        cost = (
            "- | - | -"
            if r["effective_nfe"] is None
            else f"{r['updates']} | {r['seconds']:.0f} | {r['sample_seconds']:.1f}"
        )
        lines.append(f"| {r['title']} | {nfe} | {' | '.join(f'{r[key]:.3f}' for key in keys)} | {cost} |")
    return "\n".join(lines) + "\n"
