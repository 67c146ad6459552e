"""What a run costs: python toy_2d.py --bench, python toy_video.py --bench (make bench runs both).

- For every stage: median milliseconds per update, and the floor, its matrix products alone. They are recorded from
  one real update and replayed on ready-made tensors; attention counts as its two, convolutions are left out. The gap
  between the two is what everything else costs: elementwise work, launch overhead, AdamW.
- On one and on two CPU threads, each in a process of its own, one after the other, with its peak memory.
- Two calls of the teacher beside one call of twice the batch. Where one is faster, guidance and the discriminator's
  real and fake clips should share a call.
- Where a rung has --compile: the same updates compiled, in turns with uncompiled ones on one thread, and how many
  times as fast they are.
- The student update with N = 1 stands beside the one with N steps. Claim C12: rollout costs (N-1) H / L of a forward
  and backward.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import tmd_minimal as tmd
from settings import write_json
from toys.ladder import Ladder, workers

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Recorder(TorchDispatchMode):
    """Records the shapes and types of every matrix product, forward and backward."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            a, b = args[-2:]
            self.products.append((tuple(a.shape), tuple(b.shape), a.dtype))
        elif "scaled_dot_product" in func.__name__:
            backward = "backward" in func.__name__
            q, k = args[1:3] if backward else args[:2]
            n, m, d = q.shape[-2], k.shape[-2], q.shape[-1]
            lead = (q.shape[0] * q.shape[1],)
            pair = [((*lead, n, d), (*lead, d, m), q.dtype), ((*lead, n, m), (*lead, m, d), q.dtype)]
            self.products += pair * (2 if backward else 1)
        return func(*args, **(kwargs or {}))


def wait(device: str) -> None:
    """Wait until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def once_ms(f, device: str = "cpu") -> float:
    """Wall-clock milliseconds of f()."""
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return 1000 * (time.perf_counter() - start)


def median_ms(f, repeats: int, device: str = "cpu") -> float:
    """Median wall-clock milliseconds of f(), after a warm-up."""
    for _ in range(3):
        f()
    return statistics.median(once_ms(f, device) for _ in range(repeats))


def stages(bench: Ladder, sampled: list[tuple[int, int]], n: int) -> dict:
    """One callable for each stage, which makes one update. `sampled` lists the (M, N) at which n samples are drawn.

    The networks have the run's size and are not trained: the cost does not depend on the weights.
    """
    cfg = bench.cfg
    teacher, how, plain = bench.network(), cfg.student_config(), cfg.student_config(H=0, N=1)
    updates = {}

    def one_step(train, *args, step=0, **kw):
        """The iteration that a training is about to repeat: an update is timed exactly as training makes it."""
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
            with bench.precision():
                caught["iterate"](caught["phase"])

        return update

    def kd_pairs(generator):
        x, c = bench.data(cfg.batch, generator)
        return tmd.randn_like(x, generator), x, c

    def made(student):
        return student.to(bench.device).requires_grad_(True)

    settings, neg = {"updates": 1, "batch": cfg.batch, "lr": 1e-4}, {"c_neg": bench.c_neg}
    updates["teacher"] = one_step(tmd.train_teacher, copy.deepcopy(teacher), bench.data, **settings, **neg)
    tmd_student, dmd_student = (lambda: made(tmd.TMDStudent(teacher, cfg.H))), (lambda: made(tmd.PlainStudent(teacher)))
    updates["stage 1 (TM-MF)"] = one_step(tmd.train_stage1, tmd_student(), bench.data, how, cfg.stage1_config(), **neg)
    updates["KD warm-up (DMD2-v)"] = one_step(tmd.train_kd, dmd_student(), kd_pairs, plain, updates=1, lr=1e-4)
    frozen = teacher.requires_grad_(False)
    one, two = cfg.student_config(N=1), cfg.stage2_config()
    rows = [(f"TMD N={how.N}", tmd_student, how, "student"), ("TMD N=1", tmd_student, one, "student"),
            (f"TMD N={how.N}", tmd_student, how, "critic"), ("DMD2-v", dmd_student, plain, "student"),
            ("DMD2-v", dmd_student, plain, "critic")]  # fmt: skip
    for name, make, h, kind in rows:
        step = two.student_every - 1 if kind == "student" else 0
        more = {"taps": bench.taps, "step": step, **neg}
        f = one_step(tmd.train_stage2, make(), frozen, bench.discriminator(), bench.data, h, two, **more)
        updates[f"stage 2, {name}, {kind} update"] = f
    x, c = bench.data(cfg.batch, torch.Generator(bench.device).manual_seed(0))
    t, twice = torch.full((len(x),), 0.5, device=bench.device), lambda z: None if z is None else torch.cat([z, z])
    calls = {"teacher's velocity": lambda x, t, c: frozen(x, t, c)}
    calls["teacher's features"] = lambda x, t, c: frozen.taps(x, t, c, bench.taps)
    for what, call in calls.items():  # guidance, and the real and fake clips of the discriminator, could share a call
        updates[f"{what}, two calls"] = torch.no_grad()(lambda call=call: (call(x, t, c), call(x, t, c)))
        updates[f"{what}, one of twice the batch"] = torch.no_grad()(lambda call=call: call(*map(twice, (x, t, c))))
    for name, M, N in [("DMD2-v", 1, 1)] + [("TMD", M, N) for M, N in sampled]:
        h, student = cfg.student_config(M=M, N=N), dmd_student() if name == "DMD2-v" else tmd_student()
        updates[f"sampling {n}, {name} M={M} N={N}"] = lambda s=student, h=h: bench.student_samples(s, h, n)
    updates[f"sampling {n}, teacher, one step"] = lambda: bench.teacher_samples(frozen, 1, n)
    return updates


def measure(ladder: type[Ladder], cfg, sampled, n: int, threads: int, repeats: int) -> list[dict]:
    """One row for each stage: milliseconds, milliseconds of its matrix products, their GFLOP, and the setting."""
    torch.set_num_threads(threads)
    bench = ladder(cfg)
    device = bench.device
    updates, recorders, times = stages(bench, sampled, n), {}, {}
    for name, update in tqdm(updates.items(), desc=f"{threads} thread{'s' * (threads > 1)}", disable=None):
        with Recorder() as recorders[name]:
            update()
        times[name] = median_ms(update, fewer(name, repeats), device)
    # before the replay, which needs tensors of its own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak
    rows = []
    for name, recorder in recorders.items():
        make = lambda shape, dtype: torch.randn(shape, device=device, dtype=dtype)
        pairs = [(make(a, dtype), make(b, dtype)) for a, b, dtype in recorder.products]
        flop = sum(2 * a.numel() * b.shape[-1] for a, b in pairs)
        floor = median_ms(lambda pairs=pairs: [torch.matmul(a, b) for a, b in pairs], max(3, repeats // 10), device)
        rows.append({"stage": name, "ms": times[name], "floor_ms": floor, "gflop": flop / 1e9})
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return [{**row, "threads": threads, "peak_mb": peak, "torch": torch.__version__, "device": name,
             "N, H, L": [cfg.N, cfg.H, cfg.depth]} for row in rows]  # fmt: skip


def fewer(name: str, repeats: int) -> int:
    """Sampling takes many steps."""
    return max(3, repeats // 10) if "sampling" in name else repeats


def compiled(ladder: type[Ladder], cfg, sampled, n: int, repeats: int) -> dict:
    """{stage: its compiled milliseconds, and how many times as fast that is}: medians of turns with uncompiled ones."""
    torch.set_num_threads(1)
    bench, found = ladder(replace(cfg, compile=True)), {}
    for name, update in tqdm(stages(bench, sampled, n).items(), desc="compiled", disable=None):
        turns = []
        for _ in range(2 + fewer(name, repeats)):
            with bench.uncompiled():
                plain = once_ms(update)
            turns.append((once_ms(update), plain))
        fast, times = zip(*((a, b / a) for a, b in turns[2:]))  # the first two compile
        found[name] = {"compiled_ms": statistics.median(fast), "times_as_fast": statistics.median(times)}
    return found


def rollout_cost(rows: list[dict]) -> str:
    """C12 in one sentence: what rollout adds to the student update, beside (N-1) H / L of a forward and backward."""
    ms, (N, H, L) = {r["stage"]: r["ms"] for r in rows if r["threads"] == 1}, rows[0]["N, H, L"]
    added = ms[f"stage 2, TMD N={N}, student update"] - ms["stage 2, TMD N=1, student update"]
    share, base = (N - 1) * H / L, ms["stage 2, TMD N=1, student update"]
    whole = "a teacher update (the whole network, forward and backward)"
    expected = f"(N-1) H / L = {share:.2f} of {whole} is {share * ms['teacher']:.1f} ms"
    return f"Rollout with N = {N} adds {added:.1f} ms to a student update of {base:.1f} ms; {expected}."


def markdown(rows: list[dict]) -> str:
    """One line a stage: one thread, two threads, and the floor of each; then compiled, where that was measured."""
    head = "| stage | ms, 1 thread | per second | matmuls alone, ms | share | ms, 2 threads | matmuls alone, ms |"
    both = "compiled_ms" in rows[0]
    lines, half = [head + " compiled, ms, 1 thread | times as fast |" * both], len(rows) // 2
    lines.append("|---" * (7 + 2 * both) + "|")
    for a, b in zip(rows[:half], rows[half:]):
        one = f"{a['ms']:.1f} | {1000 / a['ms']:.0f} | {a['floor_ms']:.1f} | {a['floor_ms'] / a['ms']:.0%}"
        more = f" {a['compiled_ms']:.1f} | {a['times_as_fast']:.2f} |" if both else ""
        lines.append(f"| {a['stage']} | {one} | {b['ms']:.1f} | {b['floor_ms']:.1f} |{more}")
    peaks = f"{rows[0]['peak_mb']:.0f} | | | | {rows[-1]['peak_mb']:.0f} | |"
    lines.append(f"| peak memory of the process, MB | {peaks}" + " | |" * both)
    return "\n".join(lines) + "\n"


def run(ladder: type[Ladder], cfg, out: str, sampled: list[tuple[int, int]], n: int, repeats: int) -> list[dict]:
    """Measure on one and on two threads, print the table and write bench.json into `out`."""
    rows = []
    for threads in (1, 2):
        with workers(1) as pool:
            rows += pool.submit(measure, ladder, cfg, sampled, n, threads, repeats).result()
    if hasattr(cfg, "compile") and not torch.cuda.is_available():  # a GPU compiles in any case
        try:
            with workers(1) as pool:
                found = pool.submit(compiled, ladder, cfg, sampled, n, repeats).result()
            rows = [{**row, **found[row["stage"]]} for row in rows]
        except ValueError as e:  # no compiler
            print(f"not measured: {e}")
    print(markdown(rows))
    print(rollout_cost(rows))
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "bench.json", rows)
    return rows
