"""Transition Matching Distillation on points in the plane, end to end in about three minutes on a laptop.

    python toy_2d.py                        # two spirals: teacher, stage 1, stage 2, the DMD2-v baseline, pictures
    python toy_2d.py --data checkerboard    # or gaussians, moons
    python toy_2d.py --resume               # go on where a killed run stopped, exactly
    python toy_2d.py --quick                # under 30 seconds, to see that it works
    python toy_2d.py --claims               # what the paper claims, measured here (an hour or two, resumable)
    python toy_2d.py --bench                # steps per second of every stage, against their matmuls alone

Everything lands in runs/toy_2d/<data>/: metrics.json and samples.npz, then the pictures drawn from them.
This file is the story of one run. The method is in tmd_minimal.py; the run's settings, data and networks are in
toys/plane.py, the trainings one after the other in toys/ladder.py, the pictures in toys/plane_pictures.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import settings
from toys import bench, claims_2d, explore_plane, plane_pictures
from toys.drawing import redraw
from toys.ladder import open_folder
from toys.plane import QUICK, PlanarLadder, Toy
from toys.record import Record


def run(cfg: Toy, resume: bool = False, progress: bool = True) -> dict:
    """Train teacher, TMD and DMD2-v on one data set and judge them; returns what metrics.json holds."""
    folder = open_folder(cfg.out, cfg.without(), resume)
    checkpoints = folder / "checkpoints"
    ladder = PlanarLadder(cfg)  # the data, the noise that every model starts from, the networks, the two distances
    words = lambda r: f"sliced Wasserstein {r['swd']:.4f}   off support {r['off_support']:.2%}"
    record = Record(ladder, words)

    # ---- The data. Two draws of them differ by the floor: a model that comes so close cannot be told from the data.
    floors = ladder.floor()
    record.models["data"] = {"title": "data (floor: two draws)", "effective_nfe": None, **floors}
    record.samples["data"] = ladder.x

    # ---- The teacher: flow matching (tmd.train_teacher). In 50 steps it draws the data, in one a blob at their mean.
    teacher, facts = ladder.fit_teacher(checkpoints, save_every=ladder.save_every, progress=progress)
    per_step = 2 if cfg.guidance != 1 and cfg.conditional else 1  # guidance runs the network twice a step
    for steps in (50, 4, 2, 1):
        record.teacher(teacher, facts, steps, f"teacher, {steps} step{'s' * (steps > 1)}", per_step)
    plane_pictures.draw_samples(record.samples, record.models, folder / "samples.png")
    print(f"first picture after {record.seconds:.0f} s: {folder}/samples.png (data and teacher; the students follow)")

    # ---- TMD: the teacher is cut into backbone and flow head (tmd.TMDStudent). Stage 1 teaches the head to carry noise
    # to a sample of the velocity y (TM-MF, tmd.train_stage1). Stage 2 distils the teacher into the whole student while
    # the head is rolled out (DMD2-v, tmd.train_stage2).
    # ---- The baseline: DMD2-v of the whole network in one piece, with as many updates. It trains at the same time, in
    # a process beside this one. Both are scored 12 times on the way (Ladder.fit_both in toys/ladder.py).
    ours, base = ladder.fit_both(teacher, checkpoints, curve=12, progress=progress)
    record.students(base, ours)

    # ---- Numbers first, then the pictures, which are drawn from the saved numbers alone.
    how, traces = cfg.student_config(), {}
    for name, student in (("stage 1", ours["stage1"]), ("stage 2", ours["student"])):
        if student:
            traces[name] = plane_pictures.trace_transitions(ladder, student, how)
    arrays = {name: points.numpy() for name, points in record.samples.items()}
    arrays |= {f"trace {name} {key}": value for name, found in traces.items() for key, value in found.items()}
    curves = {"DMD2-v": base["curve"], "TMD": ours["curve"]}
    metrics = record.save(folder, plane_pictures.markdown, arrays, floors=floors, curves=curves)
    plane_pictures.draw(folder)
    # ---- And a page to play with: every model, every number of steps, in a browser.
    students = {"dmd2v": base["student"], "stage1": ours["stage1"], "tmd": ours["student"]}
    page = explore_plane.write(folder, ladder, teacher, students)
    pictures = "samples.png, inner_flow.png, curves.png, transition.gif"
    print(f"done in {record.seconds:.0f} s: {folder}/metrics.json, {pictures}; open {page} in a browser")
    return metrics


# ---- The command -----------------------------------------------------------------------------------------------------

MODES = {
    "quick": "a small run in under 30 seconds: " + ", ".join(f"{k} {v}" for k, v in QUICK.items()),
    "resume": "go on where a killed run stopped; finished phases are loaded",
    "redraw": "only draw the pictures again from the saved numbers",
    "claims": "measure the paper's claims in the plane (see toys/claims_2d.py)",
    "bench": "measure steps per second of every stage (see toys/bench.py)",
}


def parser():
    p = settings.parser(Toy, __doc__, **MODES)
    p.add_argument("--threads", type=int, default=1, help="CPU threads; these networks are fastest on one (default: 1)")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. Errors are one sentence on stderr."""
    args = vars(parser().parse_args(argv))
    mode = {key: args.pop(key) for key in (*MODES, "threads")}

    def work():
        torch.set_num_threads(mode["threads"])
        if (mode["claims"] or mode["bench"]) and (surplus := ", ".join(sorted(set(args) - {"out"}))):
            raise ValueError(f"--claims and --bench have settings of their own; leave out {surplus}.")
        quick = {**QUICK, "out": f"runs/toy_2d/{args.get('data', Toy.data)}-quick"} if mode["quick"] else {}
        cfg = Toy(**{**quick, **args})
        if mode["claims"]:
            out = cfg.out if "out" in args else f"runs/toy_2d/claims{'-quick' * mode['quick']}"
            claims_2d.run(out, quick=mode["quick"])
        elif mode["bench"]:
            out = cfg.out if "out" in args else "runs/toy_2d"
            bench.run(PlanarLadder, Toy(), out, [(cfg.M, cfg.N)], n=Toy.samples, repeats=5 if mode["quick"] else 100)
        elif mode["redraw"]:
            redraw(plane_pictures.draw, Path(cfg.out))
        else:
            run(cfg, mode["resume"])

    return settings.command("toy_2d.py", work, again="the same command with --resume")


if __name__ == "__main__":
    sys.exit(main())
