"""What the stages cost in the plane: python toy_2d.py --bench (make bench).

For every stage: milliseconds per update (median), and the floor: the update's matrix products alone, recorded from one real update and
replayed on ready-made tensors. The gap between the two is what everything else costs (elementwise work, launch overhead, AdamW). On one
and on two threads, each in a process of its own, one after the other; peak memory of the process beside it.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import tmd_minimal as tmd
from toy_2d import Bench, Toy, write_json

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Recorder(TorchDispatchMode):
    """Records the shapes of every matrix product, forward and backward."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            a, b = args[-2:]
            self.products.append((tuple(a.shape), tuple(b.shape)))
        return func(*args, **(kwargs or {}))


def median_ms(f, repeats: int) -> float:
    """Median wall-clock milliseconds of f(), after a warm-up."""
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def stages(cfg: Toy) -> dict:
    """One callable per stage that makes one update, on untrained networks of the run's size: the cost does not depend on the weights."""
    bench, g = Bench(cfg), torch.Generator().manual_seed(0)
    teacher = tmd.PlanarNet(2, cfg.width, cfg.depth)
    how, plain = cfg.student_config(), cfg.student_config(H=0, N=1)
    taps = (cfg.depth // 2 - 1, cfg.depth - 2)
    updates = {}

    def one_step(train, *args, step=0, **kw):
        """Catch the iteration that a training is about to repeat, so that an update is timed exactly as training makes it."""
        caught = {}

        def catch(phase, iterate, *_, **__):
            caught.update(phase=phase, iterate=iterate)

        original, tmd.Phase.run = tmd.Phase.run, catch
        try:
            train(*args, **kw)
        finally:
            tmd.Phase.run = original

        def update():
            caught["phase"].step = step
            caught["iterate"](caught["phase"])

        return update

    def kd_pairs(generator):
        x, _ = bench.data(cfg.batch, generator)
        return tmd.randn_like(x, generator), x, None

    settings = {"updates": 1, "batch": cfg.batch, "lr": 1e-4}
    updates["teacher"] = one_step(tmd.train_teacher, copy.deepcopy(teacher), bench.data, **settings)
    updates["stage 1 (TM-MF)"] = one_step(tmd.train_stage1, tmd.TMDStudent(teacher, cfg.H), bench.data, how, cfg.stage1_config())
    updates["KD warm-up (DMD2-v)"] = one_step(tmd.train_kd, tmd.PlainStudent(teacher), kd_pairs, plain, updates=1, lr=1e-4)
    frozen = teacher.requires_grad_(False)
    for name, student, h in (("TMD", tmd.TMDStudent(teacher, cfg.H), how), ("DMD2-v", tmd.PlainStudent(teacher), plain)):
        student.requires_grad_(True)
        for kind, step in (("student update", cfg.stage2_config().student_every - 1), ("critic update", 0)):
            disc, net = tmd.PlanarDiscriminator(cfg.width, len(taps)), copy.deepcopy(student)
            f = one_step(tmd.train_stage2, net, frozen, disc, bench.data, h, cfg.stage2_config(), taps=taps, step=step)
            updates[f"stage 2, {name}, {kind}"] = f
        x_1 = torch.randn(cfg.samples, 2, generator=g)
        updates[f"sampling {cfg.samples} points, {name} M={h.M} N={h.N}"] = lambda s=student, h=h, x=x_1: tmd.sample(
            s, x, outer_grid=h.outer_grid, inner_grid=h.inner_grid, generator=g
        )
    return updates


def measure(threads: int, repeats: int) -> list[dict]:
    """One row per stage: milliseconds, matmul floor, matmul GFLOP."""
    torch.set_num_threads(threads)
    updates, recorders, times = stages(Toy()), {}, {}
    repeat = lambda name: max(3, repeats // 10) if "sampling" in name else repeats
    for name, update in tqdm(updates.items(), desc=f"{threads} thread{'s' * (threads > 1)}", disable=None):
        with Recorder() as recorders[name]:
            update()
        times[name] = median_ms(update, repeat(name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before the replay, which needs tensors of its own
    rows = []
    for name, recorder in recorders.items():
        pairs = [(torch.randn(a), torch.randn(b)) for a, b in recorder.products]
        flop = sum(2 * a.numel() * b.shape[-1] for a, b in pairs)
        floor = median_ms(lambda pairs=pairs: [torch.matmul(a, b) for a, b in pairs], repeat(name))
        rows.append({"stage": name, "ms": times[name], "floor_ms": floor, "gflop": flop / 1e9})
    return [{**row, "threads": threads, "peak_mb": peak, "torch": torch.__version__} for row in rows]


def markdown(rows: list[dict]) -> str:
    """One line a stage: one thread, two threads, and the floor of each."""
    head = "| stage | ms, 1 thread | per second | matmuls alone, ms | share | ms, 2 threads | matmuls alone, ms |"
    lines, half = [head, "|---|---|---|---|---|---|---|"], len(rows) // 2
    for a, b in zip(rows[:half], rows[half:]):
        one = f"{a['ms']:.1f} | {1000 / a['ms']:.0f} | {a['floor_ms']:.1f} | {a['floor_ms'] / a['ms']:.0%}"
        lines.append(f"| {a['stage']} | {one} | {b['ms']:.1f} | {b['floor_ms']:.1f} |")
    lines.append(f"| peak memory of the process, MB | {rows[0]['peak_mb']:.0f} | | | | {rows[-1]['peak_mb']:.0f} | |")
    return "\n".join(lines) + "\n"


def run(out: str, quick: bool = False) -> list[dict]:
    """Measure on one and on two threads, each in a process of its own; print the table and write bench.json into `out`."""
    rows = []
    for threads in (1, 2):
        pool = multiprocessing.get_context("spawn").Pool(1)
        rows += pool.apply(measure, (threads, 5 if quick else 100))
        pool.close()  # and join, so that the child ends by itself and leaves nothing behind
        pool.join()
    print(markdown(rows))
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "bench.json", rows)
    return rows
