"""`smoke`: every step of a run once, at full size with random weights: does it run on this GPU, and where does it stop?

    python wan_scale/run.py smoke --preset 1.3b     # minutes on one GPU of 80 GB; 65 GB of disk; nothing to download
    python wan_scale/run.py smoke --preset tiny     # the same lines on a laptop

Folder of weights, two clips of the teacher, two updates of stage 1, a resume with one more, ten iterations of stage 2
(two of them the student's), a video and an export. Every step is named before it starts, with its seconds and memory
when it ends, on the screen and in OUT/smoke.json. The numbers are not a benchmark, and the videos are noise.
"""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from wan_scale.config import Wan
from wan_scale.cost.sizes import GB
from wan_scale.data import teacher
from wan_scale.data.files import atomic, write_json
from wan_scale.data.folders import free_memory
from wan_scale.sampling import sample
from wan_scale.tiny import make_tiny
from wan_scale.training import checkpoints, dist, logs, train

# Few of everything. One checkpoint a phase, at its end: at 1.3B it is 40 GB of disk.
FEW = dict(
    clips=2, shard_size=2, data_steps=2, stage1_updates=2, stage2_iterations=10, micro_batch=1, sample_prompts=1,
    samples_per_prompt=1, save_every=1000, save_minutes=1e6, preview_every=0, log_every=1, M=2, N=2,
)  # fmt: skip
RECORD = "smoke.json"
PROMPTS = "a red ball\na blue cube\n"


def settings(cfg: Wan, name: str, given: dict) -> Wan:
    """A preset's settings made small, but for what was given on the command line; its own folder and random weights.

    ValueError if the weights, prompts or clips of a run are given.
    """
    if own := [key for key in ("model", "prompts", "data") if given.get(key)]:
        raise ValueError(f"smoke makes its own {' and '.join(own)}; leave --{' and --'.join(own)} away.")
    few = {"out": f"runs/smoke-{name}", "global_batch": dist.world(), **FEW}
    cfg = replace(cfg, **{key: value for key, value in few.items() if key not in given})
    return replace(cfg, model=str(cfg.folder("wan")), prompts=str(cfg.folder("smoke-prompts.txt")), data="")


def begin_anew(cfg: Wan) -> None:
    """Remove what an earlier smoke made, but for the weights; ValueError if another command made something there."""
    made = [cfg.folder(name) for name in ("data", "stage1", "stage2", "samples", "export")]
    there = [folder for folder in made if folder.exists()]
    if there and not cfg.folder(RECORD).exists():
        raise ValueError(f"{there[0]} was not made by smoke, which begins anew each time; give another --out.")
    dist.barrier()  # all have looked
    if dist.rank() == 0:
        cfg.folder().mkdir(parents=True, exist_ok=True)
        for folder in there:
            shutil.rmtree(folder)
    dist.barrier()


class Steps:
    """Names each step, runs it, and writes what it took; the step that fails is named in the file as well."""

    def __init__(self, path: Path, device: torch.device, of: int):
        self.path, self.device, self.of, self.cuda = path, device, of, device.type == "cuda"
        card = torch.cuda.get_device_name(device) if self.cuda else f"{platform.machine()} CPU"
        self.record = {"card": card, "torch": torch.__version__, "ranks": dist.world(), "steps": {}}

    def __call__(self, name: str, work) -> None:
        number = len(self.record["steps"]) + 1
        dist.say(f"smoke {number}/{self.of}: {name} ...")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            logs.Memory.most.update(allocated_gb=0.0, reserved_gb=0.0)
        begun, found = time.perf_counter(), {"failed": "it did not end"}
        try:
            work()
            found = {"seconds": round(time.perf_counter() - begun, 2)}
        except Exception as e:
            found = {"failed": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"}
            raise
        finally:
            if self.cuda:
                most = logs.Memory.most  # a training has set the counters back at each update
                found["peak_gb"] = max(most["allocated_gb"], torch.cuda.max_memory_allocated(self.device) / GB)
                found["reserved_gb"] = max(most["reserved_gb"], torch.cuda.max_memory_reserved(self.device) / GB)
            self.record["steps"][name] = found
            if dist.rank() == 0:
                write_json(self.path, self.record)
            dist.say(f"smoke {number}/{self.of}: {name}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
        free_memory()


def run(cfg: Wan, config: dict) -> dict:
    """Every step, in the order of a run. Returns the record; what a step raises ends it."""
    device = dist.start(cfg.device)
    begin_anew(cfg)
    clip = {"frames": cfg.frames, "height": cfg.height, "width": cfg.width, "shard_size": cfg.shard_size}
    ours = {"rank": dist.rank(), "world": dist.world(), "device": device}
    more = replace(cfg, stage1_updates=cfg.stage1_updates + 1)  # a finished phase that goes on from its checkpoint

    def folder():
        if dist.rank() == 0:
            make_tiny(cfg.model, cfg.seed, **config)  # with a small text encoder and VAE
            with atomic(Path(cfg.prompts)) as file:
                file.write(PROMPTS.encode())
        dist.barrier()

    def resumed():
        train.stage1(more)
        checkpoints.drop(cfg.folder("stage1", "checkpoints"))  # its disk is stage 2's
        dist.barrier()

    steps = {
        "random weights": folder,
        "data": lambda: teacher.generate(cfg.model, cfg.prompts, cfg.shards, steps=cfg.data_steps, limit=cfg.clips,
                                         **clip, **ours),
        "stage 1": lambda: train.stage1(cfg),
        "stage 1, resumed": resumed,
        "stage 2": lambda: train.stage2(more),
        "sample": lambda: sample.sample(more),
        "export": lambda: sample.export(more) if dist.rank() == 0 else None,
    }  # fmt: skip
    step = Steps(cfg.folder(RECORD), device, len(steps))
    for name, work in steps.items():
        step(name, work)
    dist.barrier()
    dist.say(f"smoke: every step ran; {step.path}")
    return step.record
