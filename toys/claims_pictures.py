"""The pictures of the claims on moving shapes, from the numbers of claims.json alone."""

from __future__ import annotations

from pathlib import Path

from toys.drawing import BLUE, GREY, INK, ORANGE, pyplot

STUDENTS = ("dmd2v", "dmd2v no kd", "dmd2v M2", "tmd", "tmd N1", "tmd N2", "tmd H1", "tmd M2", "tmd no stage 1")
# the left panel of why.png, by groups: the teacher; more steps; six blocks; three blocks
ROOM = (
    {"teacher 50": "teacher, 50 x 2", "teacher 4": "teacher, 4 x 2", "teacher 2": "teacher, 2 x 2",
     "teacher 1": "teacher, 1 x 2"},
    {"dmd2v M4": "DMD2-v, M = 4", "dmd2v M2": "DMD2-v, M = 2", "tmd M2": "TMD, M = 2, N = 4"},
    {"dmd2v": "DMD2-v", "dmd2v deep": "DMD2-v, 6 blocks more", "tmd": "TMD, N = 4",
     "tmd corrects": "TMD, head corrects", "dmd2v no kd": "no warm-up: DMD2-v",
     "dmd2v deep no kd": "no warm-up: DMD2-v, 6 blocks more", "tmd no stage 1": "no warm-up: TMD, N = 4",
     "dmd2v warm-up 1e-3": "warm-up at 1e-3: DMD2-v", "tmd warm-up 1e-3": "warm-up at 1e-3: TMD, N = 4"},
    {"dmd2v M2 small": "3 blocks: DMD2-v, M = 2", "dmd2v small": "3 blocks: DMD2-v",
     "dmd2v deep small": "3 blocks: DMD2-v, 3 blocks more", "tmd small": "3 blocks: TMD, N = 4",
     "dmd2v no kd small": "3 blocks, no warm-up: DMD2-v",
     "dmd2v deep no kd small": "3 blocks, no warm-up: DMD2-v, 3 more",
     "tmd no stage 1 small": "3 blocks, no warm-up: TMD, N = 4"},
)  # fmt: skip
WORDS = {name: words for group in ROOM for name, words in group.items()}
LONG = {"tmd long": (ORANGE, "-"), "dmd2v long": (INK, "-"), "dmd2v deep long": (GREY, "-"),
        "tmd no stage 1 long": (ORANGE, ":"), "dmd2v no kd long": (INK, ":"),
        "tmd warm-up 1e-3 long": (ORANGE, "-."), "dmd2v warm-up 1e-3 long": (INK, "-."),
        "tmd M2 long": (ORANGE, "--"), "dmd2v M2 long": (INK, "--"), "dmd2v M4 long": (GREY, "--")}  # fmt: skip

TRAINED = {"tmd": ("TMD, trained with N = 4", ORANGE, "-"), "tmd N2": ("TMD, trained with N = 2", ORANGE, "--"),
           "tmd N1": ("TMD, trained with N = 1", ORANGE, ":"),
           "tmd no rollout": ("TMD, trained without rollout", GREY, "--")}  # fmt: skip


def draw(root: Path, result: dict) -> None:
    """quality_vs_nfe.png, and why.png where the jobs that explain the rows were run."""
    quality(root, result)
    if "dmd2v" in result["models"] and "tmd" in result["head"]:
        why(root, result)


def colour(name: str) -> tuple[str, str]:
    """Colour and mark of a student, or of the teacher."""
    return (BLUE, "D") if name.startswith("teacher") else (INK, "s") if "dmd2v" in name else (ORANGE, "o")


def quality(root: Path, result: dict) -> None:
    """Total and semantic score of the students, a row each by effective NFE, teachers as lines."""
    plt, models, teacher = pyplot(), result["models"], result["teacher"]
    shown = sorted(
        (name for name in STUDENTS if name in models), key=lambda name: (models[name]["effective_nfe"], name)
    )
    fig, axes = plt.subplots(1, 2, figsize=(10, 1.3 + 0.3 * len(shown)), layout="constrained", sharey=True)
    for ax, key in zip(axes, ("total", "semantic")):
        for row, name in enumerate(shown):
            m, (color, mark) = models[name], colour(name)
            ax.errorbar(m[key]["mean"], row, xerr=m[key]["std"], fmt=mark, color=color, capsize=3, ms=5)
        for steps, style in (("50", "--"), ("4", ":")):
            ax.axvline(teacher[steps][key]["mean"], color=BLUE, lw=1, ls=style, label=f"teacher, {steps} x 2")
        ax.set(title=f"{key} (data: {teacher['floor'][key]['mean']:.2f})")
        ax.grid(alpha=0.2)
    axes[0].set_yticks(range(len(shown)), [f"{name}, NFE {models[name]['effective_nfe']:.2f}" for name in shown])
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    fig.savefig(root / "quality_vs_nfe.png", dpi=120)
    plt.close(fig)


def why(root: Path, result: dict) -> None:
    """why.png: the room there is; score against updates; score against N at sampling."""
    plt, models, teacher = pyplot(), result["models"], result["teacher"]
    longer = bool(result["curves"])  # the long runs may be missing
    fig, panels = plt.subplots(1, 2 + longer, figsize=(9.6 + 4.3 * longer, 5.4), layout="constrained")
    room, updates, steps = panels if longer else (panels[0], None, panels[1])

    row, ticks = 0.0, {}
    for group in ROOM:
        for name in (name for name in group if name in models or name.startswith("teacher")):
            s = teacher[name.split()[1]]["total"] if name.startswith("teacher") else models[name]["total"]
            color, mark = colour(name)
            room.errorbar(s["mean"], row, xerr=s["std"], fmt=mark, color=color, capsize=3, ms=5)
            told = [] if name.startswith("teacher") else [f"{models[name]['effective_nfe']:.3g}"]
            if told and models[name]["seeds"] < models["dmd2v"]["seeds"]:
                told.append(f"{models[name]['seeds']} seeds")
            ticks[row], row = WORDS[name] + (f"  ({', '.join(told)})" if told else ""), row + 1
        row += 0.6  # a gap between groups
    room.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    room.invert_yaxis()
    room.set(title="What steps, depth and a head win", xlabel="total, over seeds (in brackets: effective NFE)")

    for name, (color, style) in LONG.items():
        if points := result["curves"].get(name):
            mean = [p["total"]["mean"] for p in points]
            std = [p["total"]["std"] for p in points]
            x = [p["updates"] for p in points]
            cost = f"({models[name]['effective_nfe']:.3g})"
            updates.plot(x, mean, style, color=color, label=f"{WORDS[name.removesuffix(' long')]}  {cost}")
            updates.fill_between(x, [m - d for m, d in zip(mean, std)], [m + d for m, d in zip(mean, std)],
                                 color=color, alpha=0.12, lw=0)  # fmt: skip
    if longer:
        # the first point may be stage 1's end, far below
        second = [points[:2][-1]["total"]["mean"] for points in result["curves"].values() if points]
        updates.set(title="More updates", xlabel="updates of stages 1 and 2", ylabel="total")
        updates.set_ylim(bottom=min(second) - 0.13)  # room for the legend
        updates.legend(fontsize=8)

    for name, (label, color, style) in TRAINED.items():
        if row := result["head"].get(name):
            n = sorted(row["N"], key=int)
            mean, std = ([row["N"][k][what] for k in n] for what in ("mean", "std"))
            seeds = row["N"][n[0]]["n"]
            label += f" ({seeds} seeds)" * (seeds < models["dmd2v"]["seeds"])
            steps.errorbar(n, mean, yerr=std, ls=style, marker="o", ms=4, color=color, capsize=3, label=label)
    steps.axhline(models["dmd2v"]["total"]["mean"], color=INK, lw=1, label=WORDS["dmd2v"])
    steps.set(title="More steps of the head at sampling", xlabel="N", ylabel="total")
    steps.legend(fontsize=8)
    for ax in panels:
        ax.grid(alpha=0.2)
    fig.savefig(root / "why.png", dpi=120)
    plt.close(fig)
