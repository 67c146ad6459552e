"""What the toy rungs share around the method: settings, one run's ladder of phases, its folder, its command line.

A rung brings a dataclass of Settings and a Ladder (its data, its networks, its ruler). The algorithm itself is in tmd_minimal.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

import tmd_minimal as tmd

INK, GREY, BLUE, ORANGE = "#1b2a41", "#b8bfca", "#2c6fbb", "#d9722e"  # data and axes, teacher, students


def option(default, text):
    """A dataclass field with its help text, which argparse shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Base of a rung's settings: the rung lists the fields, this checks them and turns them into tmd_minimal's configs."""

    def __post_init__(self):
        if not 1 <= self.H < self.depth:
            raise ValueError(
                f"the flow head has H = {self.H} blocks of a network of {self.depth}; choose 1 <= H < depth."
            )
        least = {
            "batch": 1,
            "teacher_updates": 1,
            "iterations": 1,
            "samples": 1,
            "width": 2,
            "depth": 3,
            "stage1_updates": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        for name in ("teacher_lr", "stage1_lr", "stage2_lr", "outer_shift", "inner_shift", "s_shift", "dmd_shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        self.student_config(), self.stage1_config(), self.stage2_config()  # their own checks

    def without(self, *names: str) -> dict:
        """The settings as a dict, less the output folder (a machine's own) and `names`."""
        return {key: value for key, value in asdict(self).items() if key not in ("out", *names)}

    def student_config(self, **kw) -> tmd.StudentConfig:
        base = {key: getattr(self, key) for key in ("M", "N", "H", "outer_shift", "inner_shift", "outer")}
        return tmd.StudentConfig(**{**base, **kw})

    def stage1_config(self, **kw) -> tmd.Stage1Config:
        # choice: a shorter average than the paper-sized default, for a stage of a thousand updates
        base = {
            "updates": self.stage1_updates,
            "batch": self.batch,
            "lr": self.stage1_lr,
            "s_shift": self.s_shift,
            "ema": 0.995,
        }
        return tmd.Stage1Config(**{**base, "guidance": self.guidance, **kw})

    def stage2_config(self, **kw) -> tmd.Stage2Config:
        base = {"iterations": self.iterations, "batch": self.batch, "lr": self.stage2_lr, "dmd_shift": self.dmd_shift}
        return tmd.Stage2Config(**{**base, "guidance": self.guidance, "gan_weight": self.gan_weight, **kw})


# ---- The ladder: teacher -> stage 1 -> stage 2, and the baseline. A finished phase is not run again. ------------------


class Ladder:
    """One run's data, sampling noise, networks and ruler, so that every model is trained on and judged by the same things.

    A rung sets `c_neg`, `x_1` (n, *D) and `c` (n, *C) or None, `taps`, and writes `data(n, generator) -> x, c`, `network()`,
    `discriminator()` and `score(samples, c) -> {name: float}`.
    """

    settings = Settings  # the rung's dataclass
    of_teacher = ()  # the settings that a teacher depends on
    t_shift = 1.0  # timestep shift of the teacher's training
    save_every, curve_samples, kd_count, kd_steps = 500, 2048, 10_000, 50  # paper: 10k KD pairs, 50 steps
    kd_chunk = 10_000  # of them at once, so that memory stays bounded
    only_shown = ()  # settings that change pictures and logs, but no training
    device, precision = "cpu", nullcontext

    def __init__(self, cfg):
        self.cfg = cfg

    def conditions(self, n=None):
        return None if self.c is None else self.c[:n]

    def student_samples(self, student, how: tmd.StudentConfig, n=None, trace=None, **kw):
        """The student's samples from the run's own noise and conditions."""
        settings = {key: getattr(how, key) for key in ("outer_grid", "inner_grid", "target", "field", "outer")} | kw
        generator = torch.Generator(self.device).manual_seed(1)
        with self.precision():
            return tmd.sample(student, self.x_1[:n], self.conditions(n), generator=generator, trace=trace, **settings)

    def teacher_samples(self, teacher, steps, n=None, method="euler"):
        grid = tmd.make_grid(steps, 1.0)  # choice: an even grid; at toy size no part of the path is much more curved
        more = {"grid": grid, "guidance": self.cfg.guidance, "method": method}
        with self.precision():
            return tmd.sample_teacher(teacher, self.x_1[:n], self.conditions(n), self.c_neg, **more)

    def judge(self, sampler, **facts) -> tuple[dict, torch.Tensor]:
        """Sample, time it, measure: the record that metrics.json holds for a model, and the samples."""
        start = time.perf_counter()
        samples = sampler()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {**facts, **self.score(samples, self.c), "sample_seconds": seconds, "seed": self.cfg.seed}, samples

    def fit_teacher(self, folder: Path, **run):
        """Train the teacher, or load it: (EMA, phase)."""
        cfg = self.cfg
        tmd.seed_everything(cfg.seed)
        config = {key: getattr(cfg, key) for key in self.of_teacher}
        more = {
            "updates": cfg.teacher_updates,
            "batch": cfg.batch,
            "lr": cfg.teacher_lr,
            "t_shift": self.t_shift,
            "seed": cfg.seed,
        }
        with self.precision():
            return tmd.train_teacher(self.network(), self.data, c_neg=self.c_neg, config=config, path=str(folder / "teacher.pt"),
                                     **more, **run)  # fmt: skip

    def fit_student(self, teacher, name: str, how: tmd.StudentConfig, stage1: tmd.Stage1Config | None, stage2: tmd.Stage2Config | None,
                    folder: Path | None, kd_updates: int = 0, curve: int = 0, kind: dict | None = None, **run) -> dict:  # fmt: skip
        """Stage 1 (or KD warm-up) and stage 2 of one student; plain when how.H is 0. `kind` goes to discriminator().

        Returns {"student", "stage1" (the student after it, or None), "curve" (score against updates), "seconds", ...}.
        """
        cfg = self.cfg
        # by the name of the option, which the error of another run's checkpoint tells
        config = {f"--{key}": value for key, value in cfg.without("samples", *self.only_shown).items()}
        common = {"seed": cfg.seed, "config": config, **run}
        tmd.seed_everything(cfg.seed)  # choice: every phase starts from the run's one seed
        student = tmd.TMDStudent(teacher, how.H, how.fusion, how.gate_init) if how.H else tmd.PlainStudent(teacher)
        student.to(self.device).requires_grad_(True)
        seconds, stage1_seconds, updates, after_stage1, log = 0.0, 0.0, 0, None, []

        def path(phase):
            return str(folder / f"{name}.{phase}.pt") if folder else None

        if stage1:
            with self.precision():
                after_stage1, phase = tmd.train_stage1(
                    student, self.data, how, stage1, c_neg=self.c_neg, path=path("stage1"), **common
                )
            student.load_state_dict(after_stage1.state_dict())  # choice: stage 2 starts from the average of stage 1
            seconds, stage1_seconds, updates = phase.seconds, phase.seconds, stage1.updates
        if kd_updates:
            made = []

            def pairs(g):
                if not made:  # at the first update, so that a finished warm-up does not make them again and its seconds count them
                    made.extend(self.kd_pairs(teacher))
                noise, clean, c = made
                i = torch.randint(len(noise), (cfg.batch,), generator=g, device=g.device)
                return noise[i], clean[i], None if c is None else c[i]

            with self.precision():
                ema, phase = tmd.train_kd(
                    student, pairs, how, updates=kd_updates, lr=cfg.stage1_lr, path=path("kd"), **common
                )
            student.load_state_dict(ema.state_dict())
            seconds, updates = phase.seconds, kd_updates
        if stage2:
            discriminator = self.discriminator(**(kind or {}))
            every = max(1, stage2.iterations // curve) if curve else 0

            def on_step(phase, terms):
                if every and (phase.step % every == 0 or phase.step == 1):
                    n = min(self.curve_samples, len(self.x_1))
                    scores = self.score(self.student_samples(phase.ema, how, n=n), self.conditions(n))
                    phase.log.append({"updates": updates + phase.step, **scores})

            with self.precision():
                student, phase = tmd.train_stage2(student, teacher, discriminator, self.data, how, stage2, taps=self.taps,
                                                  c_neg=self.c_neg, path=path("stage2"), on_step=on_step, **common)  # fmt: skip
            seconds, updates, log = seconds + phase.seconds, updates + stage2.iterations, phase.log
        else:
            student = after_stage1
        return {"student": student, "stage1": after_stage1, "stage1_seconds": stage1_seconds, "seconds": seconds,
                "updates": updates, "curve": log}  # fmt: skip

    def fit_baseline(self, teacher, checkpoints: Path, **run) -> dict:
        """DMD2-v with TMD's budget."""
        kd, stage2 = baseline_budget(self.cfg, self.cfg.stage2_config())
        plain = self.cfg.student_config(H=0, N=1)
        return self.fit_student(teacher, "dmd2v", plain, None, stage2, checkpoints, kd_updates=kd, **run)

    def fit_both(self, teacher, checkpoints: Path, curve: int, progress: bool) -> tuple[dict, dict]:
        """TMD and its baseline: on a CPU each on a core of its own, DMD2-v in a process beside, on a GPU one after the other."""
        cfg, run = self.cfg, {"curve": curve, "save_every": self.save_every, "progress": progress}
        stage1 = cfg.stage1_config() if cfg.stage1_updates else None
        student = (teacher, "tmd", cfg.student_config(), stage1, cfg.stage2_config(), checkpoints)
        if self.device != "cpu":
            return self.fit_student(*student, **run), self.fit_baseline(teacher, checkpoints, **run)
        with workers(1) as pool:
            baseline = pool.submit(train_baseline, type(self), cfg, {**run, "progress": False})
            ours = self.fit_student(*student, **run)
            baseline.result()
        return ours, self.fit_baseline(teacher, checkpoints, **{**run, "progress": False})  # finished: loaded

    def kd_pairs(self, teacher):
        """KD pairs: noise, the teacher's sample from it, condition."""
        g = torch.Generator(self.device).manual_seed(self.cfg.seed + 20_000)
        _, c = self.data(self.kd_count, g)
        noise = torch.randn(self.kd_count, *self.x_1.shape[1:], generator=g, device=self.device)
        more = {"grid": tmd.make_grid(self.kd_steps, 1.0), "guidance": self.cfg.guidance}
        parts = zip(noise.split(self.kd_chunk), [None] * len(noise) if c is None else c.split(self.kd_chunk))
        return noise, torch.cat([tmd.sample_teacher(teacher, x_1, part, self.c_neg, **more) for x_1, part in parts]), c


def baseline_budget(cfg: Settings, stage2: tmd.Stage2Config) -> tuple[int, tmd.Stage2Config]:
    """DMD2-v gets the updates that TMD spends on stage 1: as KD warm-up at M = 1, else as more iterations (Table 4: KD hurts there)."""
    if cfg.M == 1:
        return cfg.stage1_updates, stage2
    return 0, replace(stage2, iterations=stage2.iterations + cfg.stage1_updates)


def train_baseline(ladder: type[Ladder], cfg, run: dict) -> None:
    """The baseline in a process of its own; what it finds and leaves are the checkpoints."""
    torch.set_num_threads(1)
    bench, checkpoints = ladder(cfg), Path(cfg.out) / "checkpoints"
    bench.fit_baseline(bench.fit_teacher(checkpoints, progress=False)[0], checkpoints, **run)


def workers(n: int) -> ProcessPoolExecutor:
    """n processes that end with this one; a worker that is killed is an error (BrokenProcessPool), not a wait for ever."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n, mp_context=context, initializer=leave_with_parent, initargs=(os.getpid(),))


def leave_with_parent(parent: int) -> None:
    """In a worker: end when the parent is gone, so that a killed run leaves nobody behind; Ctrl-C is the parent's to handle."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)  # checkpoints are atomic, so any moment will do

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


# ---- Files and the command line --------------------------------------------------------------------------------------


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_json(path: Path, value) -> None:
    """Atomically, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def open_folder(out: str, config: dict, resume: bool) -> Path:
    """Make the output folder, or enter it; RuntimeError in one sentence if it is unwritable or holds another run."""
    folder, old = Path(out), None
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            try:
                old = json.loads((folder / "config.json").read_text())
            except ValueError as e:
                raise RuntimeError(
                    f"{folder}/config.json is not readable JSON; choose another folder with --out."
                ) from e
            if not isinstance(old, dict):
                raise RuntimeError(f"{folder}/config.json is not a run's settings; choose another folder with --out.")
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise RuntimeError(f"cannot write to {folder} ({e.strerror}); choose another folder with --out.") from e
    if old is not None and old != config:
        changed = ", ".join(f"--{k.replace('_', '-')} {old.get(k)}" for k in sorted(config) if old.get(k) != config[k])
        raise RuntimeError(
            f"{folder} holds a run with {changed or 'other settings'}; give the same settings, or another folder with --out."
        )
    if old is not None and not resume:  # the same run from the start, which gives the same numbers again
        for file in (folder / "checkpoints").glob("*.pt"):
            file.unlink()
    write_json(folder / "config.json", config)
    return folder


def redraw(draw, folder: Path, *args) -> None:
    """Draw a run's pictures again; RuntimeError if its numbers are not there or not whole."""
    try:
        draw(folder, *args)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as e:
        raise RuntimeError(
            f"{folder} holds no whole run to draw ({type(e).__name__}); run the command without --redraw first."
        ) from e


def parser(settings: type, doc: str, **modes: str) -> argparse.ArgumentParser:
    """A command line with a switch per mode and an option per field of the settings, defaults shown."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in modes.items():
        p.add_argument(f"--{name}", action="store_true", help=text)
    for f in fields(settings):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type == "bool":
            p.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            kind, shown = {"int": int, "float": float, "str": str}[f.type], f.default if f.default != "" else "-"
            more = {"type": kind, "default": argparse.SUPPRESS, "metavar": f.type.upper()}
            p.add_argument(flag, help=f"{text} (default: {shown})", **more)
    return p


def command(name: str, work) -> int:
    """Run `work` as a command: its exit status; every error is one sentence on stderr."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command with --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, FloatingPointError, OSError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 1
    return 0
