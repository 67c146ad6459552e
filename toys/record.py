"""What a run measured: a record (scores, cost, title) and the samples of every model, printed and saved."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

import tmd_minimal as tmd
from settings import write_json
from toys.ladder import Ladder


class Record:
    """`models` {name: record} and `samples` {name: tensor} of one run; `say(record)` tells the scores in a line."""

    def __init__(self, bench: Ladder, say):
        self.bench, self.say, self.models, self.samples, self.started = bench, say, {}, {}, time.perf_counter()

    def keep(self, name: str, title: str, sampler, effective_nfe: float | None, **facts) -> None:
        """Sample a model, score it, print a line. effective_nfe is None for the data."""
        facts |= {"title": title, "effective_nfe": effective_nfe}
        self.models[name], self.samples[name] = self.bench.judge(sampler, **facts)
        cost = "-" if effective_nfe is None else f"{effective_nfe:.3g}"
        print(f"{title:<26} NFE {cost:<5} {self.say(self.models[name])}", flush=True)

    def teacher(self, teacher, facts: dict, steps: int, title: str, per_step: int) -> None:
        """The teacher in so many steps of `per_step` network evaluations each; `facts` as fit_teacher returns them."""
        sampler = lambda: self.bench.teacher_samples(teacher, steps)
        self.keep(f"teacher_{steps}", title, sampler, float(steps * per_step), **facts)

    def students(self, base: dict, ours: dict) -> None:
        """The baseline, TMD's student after stage 1 alone, and TMD, as Ladder.fit_both returns them."""
        bench, cfg = self.bench, self.bench.cfg
        how, plain = cfg.student_config(), cfg.student_config(H=0, N=1)
        sampler = lambda student, how: lambda: bench.student_samples(student, how)
        nfe, size = tmd.effective_nfe(cfg.M, cfg.N, cfg.H, cfg.depth), f"M={cfg.M} N={cfg.N}"
        cost = {"seconds": base["seconds"], "updates": base["updates"]}
        self.keep("dmd2v", f"DMD2-v, M={cfg.M}", sampler(base["student"], plain), float(cfg.M), **cost)
        if ours["stage1"]:
            cost = {"seconds": ours["stage1_seconds"], "updates": cfg.stage1_updates}
            self.keep("stage1", f"stage 1 alone, {size}", sampler(ours["stage1"], how), nfe, **cost)
        cost = {"seconds": ours["seconds"], "updates": ours["updates"]}
        self.keep("tmd", f"TMD, {size} H={cfg.H}", sampler(ours["student"], how), nfe, **cost)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    def save(self, folder: Path, table, arrays: dict, **more) -> dict:
        """Write metrics.json, metrics.md (by `table`) and samples.npz (`arrays`); returns what metrics.json holds."""
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        metrics = {"config": self.bench.cfg.without(), "models": self.models, **more, **facts}
        metrics["total_seconds"] = round(self.seconds, 1)
        write_json(folder / "metrics.json", metrics)
        (folder / "metrics.md").write_text(table(metrics), encoding="utf-8")
        with open(folder / "samples.npz.tmp", "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(folder / "samples.npz.tmp", folder / "samples.npz")
        return metrics
