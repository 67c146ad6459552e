"""Transition Matching Distillation on tiny videos with prompts: at most 12 minutes on two CPU cores.

    python toy_video.py                  # moving shapes: stage 1, stage 2, the DMD2-v baseline, pictures
    python toy_video.py --size small     # sized for a GPU
    python toy_video.py --M 2 --out runs/toy_video/M2   # two transitions; other settings want a folder of their own
    python toy_video.py --prompts "bright ring circle, dim cross bounce"   # what the contact sheet shows
    python toy_video.py --quick          # under a minute, to see that it works
    python toy_video.py --claims         # what the paper claims, measured here (a night on two cores, resumable)
    python toy_video.py --bench          # seconds per update and per sample

The same command goes on where a killed run stopped; a finished phase is not run again. Everything lands in
runs/toy_video/<size>/: metrics.json and samples.npz first, then the pictures drawn from them.
This file is the story of one run. The method is in tmd_minimal.py; settings, clips and networks are in
toys/tiny_video.py, the ruler that judges clips in toys/ruler.py, the trainings one after the other in toys/ladder.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import settings
import tmd_minimal as tmd
from toys import bench, claims_video, explore_video, video_pictures
from toys.drawing import redraw
from toys.ladder import open_folder
from toys.record import Record
from toys.tiny_video import PROMPTS, QUICK, SIZES, ToyVideo, VideoLadder, default_size


def run(cfg: ToyVideo, resume: bool = True, progress: bool = True) -> dict:
    """Train teacher, TMD and DMD2-v on tiny videos and judge them; returns what metrics.json holds."""
    folder = open_folder(cfg.out, cfg.without(*VideoLadder.only_shown), resume)
    checkpoints = folder / "checkpoints"
    resumed = any(checkpoints.glob("*.pt"))
    ladder = VideoLadder(cfg)  # the renderer, the noise that every model starts from, the networks, the ruler
    scores = ("total", "quality", "semantic", "motion", "diversity")
    record = Record(ladder, lambda r: "   ".join(f"{key} {r[key]:.3f}" for key in scores))

    def save(curves: dict) -> dict:
        """Numbers first, then the pictures, which are drawn from the saved numbers alone."""
        arrays = {name: clips.cpu().half().numpy() for name, clips in record.samples.items()}
        facts = {"shown": cfg.shown(), "device": device_name(ladder.device), "resumed": resumed}
        arrays["c"] = ladder.c.cpu().numpy()
        metrics = record.save(folder, video_pictures.markdown, arrays, curves=curves, **facts)
        video_pictures.draw(folder)
        return metrics

    # ---- The data: clips rendered on the fly, so the ruler knows every valid clip.
    record.keep("data", "data", lambda: ladder.x, None)

    # ---- The teacher: flow matching with prompts (tmd.train_teacher), trained once and kept in results/video_teacher;
    # with --own-teacher it is trained here. Guidance runs the network twice a step.
    per_step = 1 if cfg.guidance == 1 else 2

    teacher, facts = ladder.fit_teacher(checkpoints, save_every=ladder.save_every, progress=progress)
    clips, rows = {"data": ladder.x[: len(PROMPTS)]}, [PROMPTS.index(prompt) for prompt in cfg.shown()]
    clips["teacher"] = ladder.teacher_samples(teacher, 50, len(PROMPTS))
    told = {"data": record.models["data"], "teacher": {"title": f"teacher, 50 x {per_step}", "effective_nfe": None}}
    clips = {name: x.cpu().numpy() for name, x in clips.items()}
    video_pictures.draw_sheet(clips, told, rows, cfg.shown(), folder / "preview.png")
    print(f"first picture after {record.seconds:.0f} s: {folder}/preview.png (data and teacher)", flush=True)
    for steps in (50, 4, 2, 1):
        record.teacher(teacher, facts, steps, f"teacher, {steps} x {per_step}", per_step)
    save({})
    told = f"{folder}/contact_sheet.png (data and teacher; the students follow)"
    print(f"after {record.seconds:.0f} s: {told}", flush=True)

    # ---- TMD: the teacher is cut into backbone and flow head (tmd.TMDStudent). Stage 1 teaches the head to carry noise
    # to a sample of the velocity y (TM-MF, tmd.train_stage1). Stage 2 distils the teacher into the whole student while
    # the head is rolled out (DMD2-v, tmd.train_stage2).
    # ---- The baseline: DMD2-v of the whole network in one piece, with as many updates, in a process beside this one.
    ours, base = ladder.fit_both(teacher, checkpoints, curve=cfg.curve, progress=progress)
    record.students(base, ours)
    metrics = save({"DMD2-v": base["curve"], "TMD": ours["curve"]})
    students = {"dmd2v": base["student"], "stage1": ours["stage1"], "tmd": ours["student"]}
    page = explore_video.write(folder, ladder, teacher, students, record.samples)  # more N at inference, in a browser
    told = f"{folder}/metrics.json, contact_sheet.png, clips.gif, quality_vs_nfe.png, curves.png"
    print(f"done in {record.seconds:.0f} s: {told}; open {page} in a browser")
    return metrics


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


# ---- The command -----------------------------------------------------------------------------------------------------

MODES = {
    "quick": "a small run in under a minute, to see that it works (its clips are noise)",
    "resume": "go on where a killed run stopped (the default; kept for symmetry with toy_2d.py)",
    "restart": "throw the folder's checkpoints away and start again",
    "redraw": "only draw the pictures again from the saved numbers",
    "claims": "measure the paper's claims on moving shapes (see toys/claims_video.py)",
    "sweep": "stage 2's rate and GAN weight, the same few values for both methods, on a seed of its own",
    "bench": "measure seconds per update and per sample (see toys/bench.py)",
}


def parser():
    p = settings.parser(ToyVideo, __doc__, **MODES)
    p.add_argument("--only", default="", metavar="JOBS", help="with --claims: these students only, separated by commas")
    threads = "CPU threads of the teacher and of TMD; the baseline trains beside it on one (default: 1)"
    p.add_argument("--threads", type=int, default=1, help=threads)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. Errors are one sentence on stderr."""
    args = vars(parser().parse_args(argv))
    mode = {key: args.pop(key) for key in (*MODES, "only", "threads")}

    def work():
        torch.set_num_threads(mode["threads"])
        if (mode["claims"] or mode["sweep"] or mode["bench"]) and (
            surplus := ", ".join(sorted(set(args) - {"out", "size"}))
        ):
            raise ValueError(f"--claims, --sweep and --bench have settings of their own; leave out {surplus}.")
        if mode["only"] and not mode["claims"]:
            raise ValueError("--only names students of --claims; give --claims as well.")
        size, quick = args.get("size") or default_size(), mode["quick"]
        tmd.choose("size", size, SIZES)
        small = {**QUICK, "out": "runs/toy_video/quick"} if quick else {}
        cfg = ToyVideo(**{**SIZES[size], **small, **args, "size": size})
        if mode["claims"]:
            only = tuple(name.strip() for name in mode["only"].split(",") if name.strip())
            out = cfg.out if "out" in args else f"runs/toy_video/claims-{size}{'-quick' * quick}"
            claims_video.run(out, size, quick=quick, only=only)
        elif mode["sweep"]:
            out = cfg.out if "out" in args else f"runs/toy_video/sweep-{size}{'-quick' * quick}"
            claims_video.run_sweep(out, size, quick)
        elif mode["bench"]:
            out, sampled = cfg.out if "out" in args else "runs/toy_video", [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
            bench.run(VideoLadder, cfg, out, sampled, n=32, repeats=3 if quick else 20)
        elif mode["redraw"]:
            redraw(video_pictures.draw, Path(cfg.out), cfg.shown() if cfg.prompts else None)
        else:
            try:
                run(cfg, not mode["restart"])
            except torch.OutOfMemoryError as e:
                told = f"try --batch {max(1, cfg.batch // 2)} with another --out, or --size tiny"
                raise RuntimeError(f"the GPU ran out of memory; {told}.") from e

    return settings.command("toy_video.py", work)


if __name__ == "__main__":
    sys.exit(main())
