"""Transition Matching Distillation on tiny videos with prompts: at most 25 minutes on two CPU cores; sized for a GPU with --size small.

    python toy_video.py                  # moving shapes: teacher, stage 1, stage 2, the DMD2-v baseline, pictures
    python toy_video.py --M 2 --out runs/toy_video/M2   # two transitions; other settings want a folder of their own
    python toy_video.py --prompts "bright ring circle, dim cross bounce"   # what the contact sheet shows
    python toy_video.py --quick          # under a minute, to see that it works
    python toy_video.py --claims         # what the paper claims, measured here (a night on two cores, resumable)
    python toy_video.py --bench          # seconds per update and per sample

The same command goes on where a killed run stopped; a finished phase is not run again. Everything lands in runs/toy_video/:
metrics.json and samples.npz first, then the pictures drawn from them. The algorithm is in tmd_minimal.py, the data and the
ruler that judges clips in moving_shapes.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import tmd_minimal as tmd
from toys import ladder, video_net
from toys.ladder import BLUE, GREY, INK, ORANGE, Ladder, Settings, open_folder, option, pyplot, write_json
from toys.moving_shapes import EMPTY, MOTIONS, SHADES, SHAPES, Ruler, World, encode

PROMPTS = [" ".join(words) for words in itertools.product(SHADES, SHAPES, MOTIONS)]


@dataclass
class ToyVideo(Settings):
    """One run of the moving shapes, sized for two CPU cores. Where a value differs from the paper's, the README says why."""

    size: str = option("", "tiny (default on a CPU) or small (default on a GPU); sets the other defaults")
    out: str = option("", "output folder; default runs/toy_video/<size>")
    seed: int = option(0, "seed of weights, data and draws")
    frames: int = option(8, "frames of a clip")
    pixels: int = option(12, "side of a frame in pixels")
    patch_frames: int = option(2, "frames of a patch")
    patch_pixels: int = option(4, "side of a patch in pixels")
    M: int = option(1, "outer transitions; paper: 1 or 2")
    N: int = option(4, "inner steps of the flow head; paper: 2 or 4")
    H: int = option(2, "blocks in the flow head; paper: 5 of 30")
    depth: int = option(6, "blocks of the network")
    width: int = option(64, "channels of the network")
    heads: int = option(4, "attention heads")
    batch: int = option(32, "clips per update; paper: 64")
    # choice: a weaker guidance than the paper's, which saturates shapes this small
    guidance: float = option(2.0, "teacher's guidance in stage 2 and in its own samples; paper: 5")
    stage1_guidance: float = option(2.0, "guidance of stage 1; paper: 3")
    teacher_updates: int = option(8000, "updates of the teacher")
    stage1_updates: int = option(300, "updates of stage 1 (TM-MF), or of the baseline's KD warm-up; paper: 3000")
    iterations: int = option(1200, "iterations of stage 2, every 5th of the student; paper: 4000 to 12000")
    # choice: learning rates for a network of half a million parameters; the paper's are for 1.3 B
    teacher_lr: float = option(3e-3, "learning rate of the teacher")
    stage1_lr: float = option(1e-4, "learning rate of stage 1 and of the KD warm-up; paper: 3e-5")
    stage2_lr: float = option(1e-3, "learning rate of stage 2; paper: 1e-5")
    # choice: timestep shifts for a thousand numbers; the paper's are for two million
    outer_shift: float = option(10.0, "timestep shift of the outer grid; paper: 10")
    inner_shift: float = option(1.0, "timestep shift of the inner grid; paper: 10")
    s_shift: float = option(1.0, "timestep shift of s in stage 1; paper: 3")
    dmd_shift: float = option(1.0, "timestep shift of t in VSD, fake score and GAN; paper: 5")
    gan_weight: float = option(0.03, "weight of the GAN loss; paper: 0.03")
    outer: str = option("deterministic", "outer transition: deterministic (Eq. 18, paper) or renoised (Eq. 19)")
    discriminator: str = option("conv3d", "discriminator heads: conv3d (paper), conv1d2d or attention")
    taps: str = option("2,4", "teacher blocks that the discriminator reads, counted from 0; paper: 15,22,29 of 30")
    curve: int = option(8, "scores taken during stage 2")
    samples: int = option(240, "clips per model in scores and pictures, spread over the 30 prompts")
    # choice: fewer and shorter trajectories of the KD warm-up, made anew in every run
    kd_count: int = option(1000, "teacher trajectories of the KD warm-up; paper: 10000")
    kd_steps: int = option(25, "steps of each of them; paper: 50")
    prompts: str = option("", "prompts of the contact sheet, separated by commas; default one per motion")

    def __post_init__(self):
        tmd.choose("size", self.size, ("", *SIZES))
        self.size = self.size or ("small" if torch.cuda.is_available() else "tiny")
        self.out = self.out or f"runs/toy_video/{self.size}"
        for name, size, patch in (
            ("frames", self.frames, self.patch_frames),
            ("pixels", self.pixels, self.patch_pixels),
        ):
            if patch < 1 or size % patch:
                raise ValueError(
                    f"{name} is {size} and the patch {patch}; choose {name} as a multiple of patch_{name}."
                )
        if self.heads < 1 or self.width % (2 * self.heads) or self.width < 6 * self.heads or self.width % 4:
            raise ValueError(
                f"width is {self.width}; it must be a multiple of 4 and of twice the {self.heads} heads, at least 6 a head (rope)."
            )
        tmd.choose("discriminator", self.discriminator, ("conv3d", "conv1d2d", "attention"))
        for name, low in (("kd_count", 1), ("kd_steps", 1), ("curve", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not all(block.strip().isdigit() and int(block) < self.depth for block in self.taps.split(",")):
            raise ValueError(f"taps is {self.taps!r}; give block numbers from 0 to {self.depth - 1}, as in 2,4.")
        if self.samples < 4 * len(PROMPTS):
            raise ValueError(
                f"samples is {self.samples}; the ruler needs at least {4 * len(PROMPTS)}, four clips for each prompt."
            )
        World(self.frames, self.pixels), [encode(prompt) for prompt in self.shown()]  # their own checks
        unnamed = [prompt for prompt in self.shown() if prompt not in PROMPTS]
        if unnamed:
            raise ValueError(f"the prompt {unnamed[0]!r} leaves a word open; name shade, shape and motion.")
        super().__post_init__()

    def shown(self) -> list[str]:
        """Prompts of the contact sheet."""
        if self.prompts:
            return [prompt.strip() for prompt in self.prompts.split(",")]
        return [f"{SHADES[(i + 1) % 2]} {SHAPES[i % 3]} {motion}" for i, motion in enumerate(MOTIONS)]

    def stage1_config(self, **kw) -> tmd.Stage1Config:
        return super().stage1_config(**{"guidance": self.stage1_guidance, **kw})


SIZES = {
    "tiny": {},
    "small": {"frames": 16, "pixels": 32, "width": 256, "depth": 10, "heads": 8, "batch": 64, "teacher_updates": 8000, "kd_count": 4000,
              "taps": "4,7,9", "H": 3, "stage1_updates": 1500, "iterations": 5000, "teacher_lr": 1e-3, "samples": 960},
}  # fmt: skip
QUICK = {"frames": 6, "pixels": 12, "width": 32, "heads": 4, "depth": 3, "H": 1, "taps": "0,1", "teacher_updates": 60, "stage1_updates": 10,
         "iterations": 30, "batch": 16, "samples": 120, "kd_count": 32, "kd_steps": 4}  # fmt: skip


class VideoLadder(Ladder):
    """The ladder of moving shapes: clips, prompts, video transformers, the ruler."""

    settings = ToyVideo
    of_teacher = ("seed", "frames", "pixels", "patch_frames", "patch_pixels", "width", "depth", "heads", "batch", "teacher_updates",
                  "teacher_lr")  # fmt: skip
    only_shown, kd_chunk, curve_samples = ("prompts", "curve"), 1000, 10_000

    def __init__(self, cfg: ToyVideo):
        super().__init__(cfg)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            self.precision = self.precision_of("cuda")
            compile_blocks()
        self.world = World(cfg.frames, cfg.pixels)
        self.ruler = Ruler(self.world)
        self.kd_count, self.kd_steps = cfg.kd_count, cfg.kd_steps
        self.taps = tuple(sorted({int(block) for block in cfg.taps.split(",")}))
        self.c_neg = torch.full((3,), EMPTY, device=self.device)
        every = torch.stack([encode(prompt) for prompt in PROMPTS]).to(self.device)
        self.c = every.repeat(-(-cfg.samples // len(PROMPTS)), 1)  # every prompt equally often
        g = torch.Generator(self.device).manual_seed(cfg.seed + 10_000)
        self.x = self.world.draw(len(self.c), g, self.c)[0]
        self.x_1 = torch.randn(self.x.shape, generator=g, device=self.device)

    @staticmethod
    def precision_of(device: str):
        """bf16 products under fp32 master weights; tmd_minimal keeps states and losses in fp32.

        NO CACHE: the context spans a whole training, and cached casts would stay the weights of its first step.
        """
        return partial(torch.autocast, device, dtype=torch.bfloat16, cache_enabled=False)

    def data(self, n, generator):
        """What the trainings draw from: clips (n, 1, T, H, W) and prompts (n, 3)."""
        return self.world.draw(n, generator)[:2]

    def network(self):
        cfg = self.cfg
        patch = (cfg.patch_frames, cfg.patch_pixels, cfg.patch_pixels)
        return video_net.VideoDiT(1, cfg.width, cfg.depth, cfg.heads, patch, words=EMPTY).to(self.device)

    def discriminator(self, kind: str | None = None):
        return video_net.VideoDiscriminator(self.cfg.width, len(self.taps), kind or self.cfg.discriminator).to(
            self.device
        )

    def floor(self) -> dict:
        """The score of the data itself."""
        return self.score(self.x, self.c)

    def score(self, clips, c) -> dict:
        """The ruler's means, and those of each motion law under "laws"."""
        with torch.autocast(self.device, enabled=False):  # the ruler measures in fp32, also in the middle of a training
            return {k: v for k, v in self.ruler.score(clips, c).items() if k not in ("clips", "prompts")}


def published() -> tuple[VideoLadder, dict]:
    """The run that results/ shows: its ladder, and the networks "teacher", "stage1", "tmd", "dmd2v" of results/toy_video/weights.pt."""
    results = Path(__file__).parent / "results/toy_video"
    cfg = ToyVideo(**json.loads((results / "metrics.json").read_text())["config"])
    bench, how, found = VideoLadder(cfg), cfg.student_config(), {}
    for name, state in tmd.safe_load(results / "weights.pt").items():
        net = bench.network()
        net = {"teacher": net, "dmd2v": tmd.PlainStudent(net)}.get(name) or tmd.TMDStudent(net, how.H, how.fusion)
        net.load_state_dict(state)
        found[name] = net.requires_grad_(False)
    return bench, found


def compile_blocks() -> None:
    """Compile the forward of a transformer block, once for all networks and their copies (a GPU's elementwise passes fuse)."""
    if not hasattr(video_net.DiTBlock, "eager"):
        torch._dynamo.config.recompile_limit = (
            64  # with and without gradient, autocast (du/ds runs without), and by batch size
        )
        video_net.DiTBlock.eager, video_net.DiTBlock.forward = (
            video_net.DiTBlock.forward,
            torch.compile(video_net.DiTBlock.forward),
        )


# ---- Pictures, drawn from the saved numbers --------------------------------------------------------------------------


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


def draw_sheet(clips: dict, records: dict, rows: list[int], prompts: list[str], path: Path):
    """Contact sheet: for each prompt a block of rows, one per model, the same noise in each; columns are frames."""
    plt = pyplot()
    _, frames, height, _ = next(iter(clips.values()))[0].shape
    costs = [f"\nNFE {records[name]['effective_nfe']:.3g}" if records[name]["effective_nfe"] else "" for name in clips]
    labels = [records[name]["title"] + cost for name, cost in zip(clips, costs)]
    size = (2.2 + 0.78 * frames, (0.8 * len(clips) + 0.3) * len(rows))
    fig, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, row, prompt in zip(axes[:, 0], rows, prompts):
        show(ax, mosaic(np.stack([x[row, 0] for x in clips.values()])), labels, height)
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
    metrics, saved = json.loads((folder / "metrics.json").read_text()), np.load(folder / "samples.npz")
    records, prompts = metrics["models"], prompts or metrics["shown"]
    rows = [int((saved["c"] == encode(prompt).numpy()).all(1).nonzero()[0][0]) for prompt in prompts]
    clips = {name: saved[name] for name in ("data", "teacher_50", "dmd2v", "tmd") if name in saved}
    draw_sheet(clips, records, rows, prompts, folder / "contact_sheet.png")
    draw_gif(clips, records, rows, prompts, folder / "clips.gif")
    if metrics["curves"]:
        draw_quality(records, folder / "quality_vs_nfe.png")
        draw_curves(metrics["curves"], records, folder / "curves.png")


# ---- The command -----------------------------------------------------------------------------------------------------


def run(cfg: ToyVideo, resume: bool = True, progress: bool = True) -> dict:
    """The whole ladder; returns what metrics.json holds."""
    started = time.perf_counter()
    folder = open_folder(cfg.out, cfg.without(*VideoLadder.only_shown), resume)
    checkpoints, bench = folder / "checkpoints", VideoLadder(cfg)
    records, clips, resumed = {}, {}, any(checkpoints.glob("*.pt"))

    def keep(name, title, sampler, **facts):
        records[name], clips[name] = bench.judge(sampler, title=title, **facts)
        r = records[name]
        scores = "   ".join(f"{key} {r[key]:.3f}" for key in ("total", "quality", "semantic", "motion", "diversity"))
        print(
            f"{title:<26} NFE {'-' if r['effective_nfe'] is None else format(r['effective_nfe'], '.3g'):<5} {scores}",
            flush=True,
        )

    def save(curves):
        metrics = {"config": cfg.without(), "models": records, "curves": curves, "shown": cfg.shown(), "torch": torch.__version__,
                   "threads": torch.get_num_threads(), "device": device_name(bench.device),
                   "resumed": resumed, "total_seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
        write_json(folder / "metrics.json", metrics)
        (folder / "metrics.md").write_text(markdown(metrics))
        with open(folder / "samples.npz.tmp", "wb") as file:
            np.savez_compressed(file, c=bench.c.cpu().numpy(), **{k: v.cpu().half().numpy() for k, v in clips.items()})
        os.replace(folder / "samples.npz.tmp", folder / "samples.npz")
        draw(folder)
        return metrics

    keep("data", "data", lambda: bench.x, effective_nfe=None)

    def preview(phase, terms):
        """A first picture a third of the way through the teacher's training."""
        if phase.step == -(-cfg.teacher_updates // 3):
            n, title = len(PROMPTS), f"teacher at {phase.step} updates, 50 x {per_step}"
            early = {
                "data": clips["data"][:n].cpu().numpy(),
                "teacher": bench.teacher_samples(phase.ema, 50, n).cpu().numpy(),
            }
            facts = {"data": records["data"], "teacher": {"title": title, "effective_nfe": 50.0 * per_step}}
            draw_sheet(
                early, facts, [PROMPTS.index(prompt) for prompt in cfg.shown()], cfg.shown(), folder / "preview.png"
            )
            print(
                f"first picture after {time.perf_counter() - started:.0f} s: {folder}/preview.png (the teacher, a third of the way)",
                flush=True,
            )

    per_step = 1 if cfg.guidance == 1 else 2
    teacher, phase = bench.fit_teacher(checkpoints, save_every=bench.save_every, on_step=preview, progress=progress)
    for steps in (50, 4, 2, 1):
        facts = {"effective_nfe": float(steps * per_step), "seconds": phase.seconds, "updates": cfg.teacher_updates}
        title = f"teacher, {steps} x {per_step}"
        keep(f"teacher_{steps}", title, lambda k=steps: bench.teacher_samples(teacher, k), **facts)
    save({})
    print(
        f"after {time.perf_counter() - started:.0f} s: {folder}/contact_sheet.png (data and teacher; the students follow)",
        flush=True,
    )

    how, plain = cfg.student_config(), cfg.student_config(H=0, N=1)
    ours, base = bench.fit_both(teacher, checkpoints, curve=cfg.curve, progress=progress)
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
    metrics = save({"DMD2-v": base["curve"], "TMD": ours["curve"]})
    seconds = time.perf_counter() - started
    print(
        f"done in {seconds:.0f} s: {folder}/metrics.json, contact_sheet.png, clips.gif, quality_vs_nfe.png, curves.png"
    )
    return metrics


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


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


MODES = {
    "quick": "a small run in under a minute, to see that it works (its clips are noise)",
    "resume": "go on where a killed run stopped (the default; kept for symmetry with toy_2d.py)",
    "restart": "throw the folder's checkpoints away and start again",
    "redraw": "only draw the pictures again from the saved numbers",
    "claims": "measure the paper's claims on moving shapes (see video_claims.py)",
    "bench": "measure seconds per update and per sample (see bench.py)",
}


def parser():
    p = ladder.parser(ToyVideo, __doc__, **MODES)
    p.add_argument(
        "--only", default="", metavar="JOBS", help="with --claims: run these students only, separated by commas"
    )
    p.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of the teacher and of TMD; the baseline trains beside it on one (default: 1)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. Errors are one sentence on stderr."""
    args = vars(parser().parse_args(argv))
    mode = {key: args.pop(key) for key in (*MODES, "only", "threads")}

    def work():
        torch.set_num_threads(mode["threads"])
        if (mode["claims"] or mode["bench"]) and set(args) - {"out", "size"}:
            raise ValueError(
                f"--claims and --bench have settings of their own; leave out {', '.join(sorted(set(args) - {'out', 'size'}))}."
            )
        if mode["only"] and not mode["claims"]:
            raise ValueError("--only names students of --claims; give --claims as well.")
        size = args.get("size") or ("small" if torch.cuda.is_available() else "tiny")
        tmd.choose("size", size, SIZES)
        quick = {**QUICK, "out": "runs/toy_video/quick"} if mode["quick"] else {}
        cfg = ToyVideo(**{**SIZES[size], **quick, **args, "size": size})
        if mode["claims"]:
            from toys import claims_video

            only = tuple(name.strip() for name in mode["only"].split(",") if name.strip())
            claims_video.run(
                cfg.out if "out" in args else f"runs/toy_video/claims-{size}{'-quick' * mode['quick']}",
                size,
                quick=mode["quick"],
                only=only,
            )
        elif mode["bench"]:
            from toys import bench

            out, sampled = cfg.out if "out" in args else "runs/toy_video", [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
            bench.run(VideoLadder, cfg, out, sampled, n=32, repeats=3 if mode["quick"] else 20)
        elif mode["redraw"]:
            ladder.redraw(draw, Path(cfg.out), cfg.shown() if cfg.prompts else None)
        else:
            try:
                run(cfg, not mode["restart"])
            except torch.OutOfMemoryError as e:
                raise RuntimeError(
                    f"the GPU ran out of memory; try --batch {max(1, cfg.batch // 2)} with another --out, or --size tiny."
                ) from e

    return ladder.command("toy_video.py", work)


if __name__ == "__main__":
    sys.exit(main())
