"""One run's ladder: teacher, stage 1, stage 2 and the DMD2-v baseline, trained on one data set and judged by one ruler.

A rung brings a dataclass of ToySettings and a Ladder (its data, networks and ruler). The method is in tmd_minimal.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import tmd_minimal as tmd
from settings import Settings, option, write_json
from toys.variants import CorrectingStudent, deepened


@dataclass
class ToySettings(Settings):
    """What the toy rungs have in common. A rung adds its data and restates the defaults that fit it."""

    H: int = 2
    depth: int = option(6, "blocks of the network", "network", least=3)
    width: int = option(64, "channels of the network", "network", least=2)
    outer: str = option("deterministic", "outer transition: deterministic (Eq. 18, paper) or renoised (19)", "student")
    inner_shift: float = 1.0
    teacher_updates: int = option(2500, "updates of the teacher", "teacher", least=1)
    batch: int = option(64, "samples per update; paper: 64", "training", least=1)
    guidance: float = option(1.0, "teacher's guidance in both stages; 1 is none; paper: 3, then 5", "training")
    s_shift: float = option(1.0, "timestep shift of s in stage 1; paper: 3", "stage 1", above=0)
    iterations: int = option(2400, "iterations of stage 2; paper: 4000 to 12000", "stage 2", least=1)
    student_every: int = option(5, "stage 2: one update of the student in so many iterations; paper: 5", "stage 2", 2)
    samples: int = option(10000, "samples per model in scores and pictures", "run", least=1)

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.H < self.depth:
            told = f"the flow head has H = {self.H} blocks of a network of {self.depth}"
            raise ValueError(f"{told}; choose 1 <= H < depth.")
        self.student_config(), self.stage1_config(), self.stage2_config()  # their own checks

    def student_config(self, **kw) -> tmd.StudentConfig:
        base = {key: getattr(self, key) for key in ("M", "N", "H", "outer_shift", "inner_shift", "outer")}
        return tmd.StudentConfig(**{**base, **kw})

    def stage1_config(self, **kw) -> tmd.Stage1Config:
        # choice: a shorter EMA than the paper-sized default, for a stage of a thousand updates
        base = {"updates": self.stage1_updates, "lr": self.stage1_lr, "s_shift": self.s_shift, "ema": 0.995}
        return tmd.Stage1Config(**{**base, "batch": self.batch, "guidance": self.guidance, **kw})

    def stage2_config(self, **kw) -> tmd.Stage2Config:
        shared = ("iterations", "batch", "student_every", "dmd_shift", "guidance", "gan_weight")
        base = {"lr": self.stage2_lr, **{key: getattr(self, key) for key in shared}}
        return tmd.Stage2Config(**{**base, **kw})


# ---- The ladder. A finished phase is not run again. ------------------------------------------------------------------


class Ladder:
    """One run's data, sampling noise, networks and ruler: every model is trained on and judged by the same things.

    A rung sets `c_neg`, `x_1` (n, *D), `c` (n, *C) or None and `taps`, and writes `data(n, generator) -> x, c`,
    `network()`, `discriminator()` and `score(samples, c) -> {name: float}`.
    """

    settings = ToySettings  # the rung's dataclass
    of_teacher = ()  # the settings that a teacher depends on
    t_shift = 1.0  # timestep shift of the teacher's training
    teacher_decay = 0.0  # share of its updates over which its rate falls to zero
    save_every, curve_samples, kd_count, kd_steps = 500, 2048, 10_000, 50  # paper: 10k KD pairs, 50 steps
    kd_chunk = 10_000  # of them at once, so that memory stays bounded
    only_shown = ()  # settings that change pictures and logs, but no training
    device, precision = "cpu", nullcontext

    def __init__(self, cfg):
        self.cfg = cfg

    def conditions(self, n=None):
        return None if self.c is None else self.c[:n]

    # -- sampling and judging

    def student_samples(self, student, how: tmd.StudentConfig, n=None, trace=None, y_seed=1, **kw):
        """The student's samples from the run's own noise and conditions; `y_seed` draws the inner noise y_1."""
        settings = {key: getattr(how, key) for key in ("outer_grid", "inner_grid", "target", "field", "outer")} | kw
        generator = torch.Generator(self.device).manual_seed(y_seed)
        with self.precision():
            return tmd.sample(student, self.x_1[:n], self.conditions(n), generator=generator, trace=trace, **settings)

    def teacher_samples(self, teacher, steps, n=None, method="euler"):
        """The teacher's samples from the same noise and conditions, in so many steps."""
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

    # -- training

    def fit_teacher(self, folder: Path, **run):
        """Train the teacher, or load it: its EMA and {"seconds", "updates"} of its training."""
        cfg = self.cfg
        tmd.seed_everything(cfg.seed)
        config = {key: getattr(cfg, key) for key in self.of_teacher}
        more = {"updates": cfg.teacher_updates, "batch": cfg.batch, "lr": cfg.teacher_lr, "t_shift": self.t_shift}
        how = {"c_neg": self.c_neg, "config": config, "path": str(folder / "teacher.pt"), "seed": cfg.seed}
        how["decay"] = self.teacher_decay
        with self.precision():
            ema, phase = tmd.train_teacher(self.network(), self.data, **more, **how, **run)
        return ema, {"seconds": phase.seconds, "updates": cfg.teacher_updates}

    def fit_student(self, teacher, name: str, how: tmd.StudentConfig, stage1: tmd.Stage1Config | None,
                    stage2: tmd.Stage2Config | None, folder: Path | None, kd_updates: int = 0, curve: int = 0,
                    kind: str | None = None, deeper: int = 0, blocks: int = 0, corrects: bool = False,
                    kept: Path | None = None, **run) -> dict:  # fmt: skip
        """Stage 1 (or KD warm-up) and stage 2 of one student; plain when how.H is 0. `kind` goes to discriminator().

        `deeper`: blocks that a plain student has more than the teacher; `blocks`: a student of so few in all, which
        starts from smaller(blocks); `corrects`: a head that corrects the backbone's velocity (variants.py). `kept`: a
        file for the KD pairs, which runs of one teacher and seed can share.

        `curve` scores are taken during stage 2. Returns {"student", "stage1" (the student after it, or None),
        "curve" (score against updates), "seconds", "stage1_seconds", "updates"}.
        """
        cfg = self.cfg
        # by the name of the option, which the error of another run's checkpoint tells
        config = {f"--{key}": value for key, value in cfg.without("samples", *self.only_shown).items()}
        common = {"seed": cfg.seed, "config": config, **run}
        path = lambda phase: str(folder / f"{name}.{phase}.pt") if folder else None
        found = {"stage1": None, "stage1_seconds": 0.0, "seconds": 0.0, "updates": 0, "curve": []}

        tmd.seed_everything(cfg.seed)  # choice: every phase starts from the run's one seed
        start = deepened(self.smaller(blocks) if blocks else teacher, deeper)
        cut = CorrectingStudent if corrects else tmd.TMDStudent
        student = cut(start, how.H, how.fusion, how.gate_init) if how.H else tmd.PlainStudent(start)
        student.to(self.device).requires_grad_(True)

        if stage1:  # TM-MF: the head learns the inner flow as a flow map
            settings = {"c_neg": self.c_neg, "path": path("stage1"), **common}
            with self.precision():
                found["stage1"], phase = tmd.train_stage1(student, self.data, how, stage1, **settings)
            student.load_state_dict(found["stage1"].state_dict())  # choice: stage 2 starts from the EMA of stage 1
            found |= {"seconds": phase.seconds, "stage1_seconds": phase.seconds, "updates": stage1.updates}
        if kd_updates:  # the baseline's warm-up on the teacher's samples
            pairs, made = self.kd_pairs(teacher, kept)
            settings = {"updates": kd_updates, "lr": cfg.stage1_lr, "path": path("kd")}
            with self.precision():
                ema, phase = tmd.train_kd(student, pairs, how, **settings, **common)
            student.load_state_dict(ema.state_dict())
            found |= {"seconds": phase.seconds + made.get("seconds before", 0.0), "updates": kd_updates}
        if not stage2:
            return {"student": found["stage1"], **found}

        every, before = (max(1, stage2.iterations // curve) if curve else 0), found["updates"]

        def on_step(phase, terms):
            if every and (phase.step % every == 0 or phase.step == 1):
                n = min(self.curve_samples, len(self.x_1))
                scores = self.score(self.student_samples(phase.ema, how, n=n), self.conditions(n))
                phase.log.append({"updates": before + phase.step, **scores})

        # DMD2-v: the student's samples are matched to the teacher's distribution while the head is rolled out
        settings = {"taps": self.taps, "c_neg": self.c_neg, "path": path("stage2"), "on_step": on_step, **common}
        discriminator = self.discriminator(kind) if kind else self.discriminator()
        with self.precision():
            student, phase = tmd.train_stage2(student, teacher, discriminator, self.data, how, stage2, **settings)
        found |= {"seconds": found["seconds"] + phase.seconds, "updates": before + stage2.iterations}
        return {**found, "student": student, "curve": phase.log}

    def fit_baseline(self, teacher, checkpoints: Path, **run) -> dict:
        """DMD2-v with TMD's budget."""
        kd, stage2 = baseline_budget(self.cfg, self.cfg.stage2_config())
        plain = self.cfg.student_config(H=0, N=1)
        return self.fit_student(teacher, "dmd2v", plain, None, stage2, checkpoints, kd_updates=kd, **run)

    def fit_both(self, teacher, checkpoints: Path, curve: int, progress: bool) -> tuple[dict, dict]:
        """TMD and its baseline. On a CPU each has a core, DMD2-v in a second process; on a GPU they take turns."""
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

    def kd_pairs(self, teacher, kept: Path | None = None):
        """What the KD warm-up draws from: pairs(generator) -> noise, the teacher's sample from it, condition.

        And the dict that they are in once a first update has asked: a finished warm-up does not make them again.
        """
        made = {}

        def pairs(generator):
            if not made:
                made.update(self.trajectories(teacher, kept))
            noise, clean, c = made["pairs"]
            i = torch.randint(len(noise), (self.cfg.batch,), generator=generator, device=generator.device)
            return noise[i], clean[i], None if c is None else c[i]

        return pairs, made

    def trajectories(self, teacher, kept: Path | None = None) -> dict:
        """All KD pairs of a run, {"pairs": (noise, the teacher's sample from it, condition)}.

        Written to the file `kept`, or read from it; then "seconds before" are those that they took.
        """
        facts = [self.cfg.seed, self.kd_count, self.kd_steps, self.cfg.guidance, hash_of(teacher)]
        if kept and kept.exists() and (found := tmd.safe_load(str(kept)))["facts"] == facts:
            pairs = [part if part is None else part.to(self.device) for part in found["pairs"]]
            return {"pairs": pairs, "seconds before": found["seconds"]}
        g, start = torch.Generator(self.device).manual_seed(self.cfg.seed + 20_000), time.perf_counter()
        _, c = self.data(self.kd_count, g)
        noise = torch.randn(self.kd_count, *self.x_1.shape[1:], generator=g, device=self.device)
        more = {"grid": tmd.make_grid(self.kd_steps, 1.0), "guidance": self.cfg.guidance}
        parts = zip(noise.split(self.kd_chunk), [None] * len(noise) if c is None else c.split(self.kd_chunk))
        clean = torch.cat([tmd.sample_teacher(teacher, x_1, part, self.c_neg, **more) for x_1, part in parts])
        found = {"pairs": (noise, clean, c), "facts": facts, "seconds": time.perf_counter() - start}
        if kept:
            own = kept.with_suffix(f".{os.getpid()}")  # two jobs may make the same pairs at once
            tmd.atomic_save(found, str(own))
            os.replace(own, kept)
        return {"pairs": found["pairs"]}


def hash_of(net) -> str:
    """The hash of a network's weights."""
    return hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def baseline_budget(cfg: ToySettings, stage2: tmd.Stage2Config) -> tuple[int, tmd.Stage2Config]:
    """DMD2-v gets the updates that TMD spends on stage 1.

    At M = 1 it gets them as KD warm-up, else as more iterations, for KD hurts there (Table 4).
    """
    if cfg.M == 1:
        return cfg.stage1_updates, stage2
    return 0, replace(stage2, iterations=stage2.iterations + cfg.stage1_updates)


def train_baseline(ladder: type[Ladder], cfg, run: dict) -> None:
    """The baseline in a process of its own; what it finds and leaves are the checkpoints."""
    torch.set_num_threads(1)
    bench, checkpoints = ladder(cfg), Path(cfg.out) / "checkpoints"
    bench.fit_baseline(bench.fit_teacher(checkpoints, progress=False)[0], checkpoints, **run)


def workers(n: int) -> ProcessPoolExecutor:
    """n processes that end with this one. A killed worker is an error (BrokenProcessPool), not an endless wait."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n, mp_context=context, initializer=leave_with_parent, initargs=(os.getpid(),))


def leave_with_parent(parent: int) -> None:
    """In a worker: end when the parent is gone, so that a killed run leaves nobody behind. Ctrl-C is the parent's."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)  # checkpoints are atomic, so any moment will do

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


# ---- The output folder -----------------------------------------------------------------------------------------------


def open_folder(out: str, config: dict, resume: bool) -> Path:
    """Make the output folder, or enter it; RuntimeError in one sentence if it is unwritable or holds another run."""
    folder, old, another = Path(out), None, "another folder with --out"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            try:
                old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            except ValueError as e:
                raise RuntimeError(f"{folder}/config.json is not readable JSON; choose {another}.") from e
            if not isinstance(old, dict):
                raise RuntimeError(f"{folder}/config.json is not a run's settings; choose {another}.")
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise RuntimeError(f"cannot write to {folder} ({e.strerror}); choose {another}.") from e
    if old is not None and old != config:
        changed = ", ".join(f"--{k.replace('_', '-')} {old.get(k)}" for k in sorted(config) if old.get(k) != config[k])
        told = f"{folder} holds a run with {changed or 'other settings'}"
        raise RuntimeError(f"{told}; give the same settings, or {another}.")
    if old is not None and not resume:  # the same run from the start, which gives the same numbers again
        for file in (folder / "checkpoints").glob("*.pt"):
            file.unlink()
    write_json(folder / "config.json", config)
    return folder
