"""explore.html: the plane as a page that one plays with, in a browser, without a network or a server.

`measure` samples every combination that the page offers and packs the points as 16-bit integers; `write` puts them
into the template explore_plane.html. The page only draws: no line of the method is in it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import tmd_minimal as tmd
from toys import pages
from toys.plane import PlanarLadder

POINTS, FAN, SCORED = 240, 32, 1000  # points that are drawn, inner noises of a fan, points that are scored
LIMIT = 4.0  # the largest coordinate that 16 bits stand for
TEACHER_STEPS, STEPS, INNER = (1, 2, 4, 8, 50), (1, 2, 4), (1, 2, 4, 8)
TEMPLATE = Path(__file__).with_suffix(".html")


def packed(pack: pages.Pack, points: torch.Tensor) -> int:
    """Where these points (n, 2) begin in the pack, as 16-bit integers."""
    return pack.add((points.clamp(-LIMIT, LIMIT) * (32767 / LIMIT)).round())


def measure(ladder: PlanarLadder, teacher, students: dict) -> tuple[dict, pages.Pack]:
    """What the page shows: {"views": {key: frames, scores, cost}, "fans", ...} and the points it refers to.

    students: {"dmd2v": ..., "stage1": ... or None, "tmd": ...}.
    """
    cfg, pack, views, fans = ladder.cfg, pages.Pack("<i2"), {}, {}
    calls = 2 if cfg.conditional and cfg.guidance != 1 else 1  # guidance runs the teacher twice a step
    outer, inner = pages.possible({*STEPS, cfg.M}, cfg.outer_shift), pages.possible({*INNER, cfg.N}, cfg.inner_shift)
    for steps in TEACHER_STEPS:
        path, grid = [], tmd.make_grid(steps, 1.0)

        def watched(x_t, t, c, path=path):
            path.append(x_t)
            return tmd.guided(teacher, x_t, t, c, ladder.c_neg, cfg.guidance)

        x_1, c = ladder.x_1[:SCORED], ladder.conditions(SCORED)
        x = tmd.sample_teacher(watched, x_1, c, grid=grid)
        times = [*grid.flip(0).tolist()]
        kept = range(0, steps + 1, max(1, steps // 25))  # at most some 25 frames
        frames = [[times[i], None, packed(pack, (*path, x)[i][:POINTS])] for i in kept]
        views[f"teacher/{steps}"] = {"nfe": calls * steps, "frames": frames, **ladder.score(x, c)}
    for name, student in tqdm(students.items(), desc="explore.html", disable=None):
        if student is None:
            continue
        plain = name == "dmd2v"
        for M in outer:
            how = cfg.student_config(M=M, H=0, N=1) if plain else cfg.student_config(M=M)
            ways = [("deterministic", "renoised")[: 1 + (M > 1)], ("consistent", "printed")[: 2 - plain]]
            for N, way, field in itertools.product((1,) if plain else inner, *ways):
                view = sampled(ladder, student, replace(how, N=N, outer=way, field=field), pack, plain)
                views["/".join(map(str, (name, M, N, way, field)))] = view
            if not plain and M < 4:
                fans[f"{name}/{M}"] = fanned(ladder, student, replace(how, N=4), pack)
        if not plain:
            for clean in ("consistent", "printed"):
                views[f"{name}/stage2/{clean}"] = in_training(ladder, student, cfg.student_config(clean=clean), pack)
    data = ladder.x[:1500]
    facts = {"points": min(POINTS, len(ladder.x_1)), "fan": FAN, "limit": LIMIT}
    facts |= {"data": packed(pack, data), "data points": len(data), "M": outer, "N": inner}
    trained = {"M": cfg.M, "N": cfg.N, "outer": cfg.outer, "name": cfg.data}
    return {
        **facts,
        "trained": trained,
        "floor": ladder.score(ladder.other[:SCORED], None if ladder.c is None else ladder.other_label[:SCORED]),
        "views": views,
        "fans": fans,
    }, pack


def sampled(ladder: PlanarLadder, student, how, pack: pages.Pack, plain: bool) -> dict:
    """Algorithm 1 frame by frame: x_t, then y_s of each inner step, seen as the point x_t - t y_s it stands for."""
    trace, n = [], SCORED
    x = ladder.student_samples(student, how, n, trace=trace)
    frames, inner = [], how.inner_grid.flip(0).tolist()
    for step in trace:
        t, x_t = step["t"], step["x_t"]
        frames.append([t, None, packed(pack, x_t[:POINTS])])
        states = [] if plain else list(zip(inner, step["y"]))
        frames += [[t, s, packed(pack, (x_t - t * y_s)[:POINTS])] for s, y_s in states]
        if plain:
            frames.append([t, 0.0, packed(pack, step["x_hat"][:POINTS])])
    frames.append([0.0, None, packed(pack, x[:POINTS])])
    nfe = tmd.effective_nfe(how.M, how.N, how.H, ladder.cfg.depth)
    return {"nfe": nfe, "frames": frames, **ladder.score(x, ladder.conditions(n))}


def fanned(ladder: PlanarLadder, student, how, pack: pages.Pack) -> list:
    """[t, where x_t lie, where their fans begin] of each transition: FAN inner noises a point, carried to x_hat."""
    trace, found = [], []
    ladder.student_samples(student, how, POINTS, trace=trace)
    for step in trace:
        x_t, c = (None if z is None else z.repeat_interleave(FAN, 0) for z in (step["x_t"], ladder.conditions(POINTS)))
        t = torch.full((len(x_t),), step["t"])
        with torch.no_grad():
            predict = tmd.transition(student, x_t, t, c, how.target)
            y_1 = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
            x_hat = tmd.clean_estimate(tmd.inner_flow(predict, y_1, how.inner_grid, how.field), x_t, t, how.target)
        found.append([step["t"], packed(pack, step["x_t"]), packed(pack, x_hat)])
    return found


def in_training(ladder: PlanarLadder, student, how, pack: pages.Pack) -> dict:
    """x_hat as stage 2 sees it: from real data, noised to a random t_i, by Eq. 15 in the reading of how.clean."""
    x, c, g = ladder.x[:SCORED], ladder.conditions(SCORED), torch.Generator().manual_seed(5)
    grids = {"outer_grid": how.outer_grid, "inner_grid": how.inner_grid}
    with torch.no_grad():
        x_hat = tmd.generate(student, x, c, **grids, generator=g, target=how.target, field=how.field, clean=how.clean)
    frames = [[0.0, None, packed(pack, x_hat[:POINTS])]]
    return {"nfe": tmd.effective_nfe(1, how.N, how.H, ladder.cfg.depth), "frames": frames, **ladder.score(x_hat, c)}


def write(folder: Path, ladder: PlanarLadder, teacher, students: dict) -> Path:
    """Measure and write folder/explore.html, one file of at most 3 MB; returns its path."""
    facts, pack = measure(ladder, teacher, students)
    return pages.write(folder / "explore.html", TEMPLATE, facts, pack.base64())
