"""report.html while a phase trains. WHAT GOES WRONG HERE ENDS NO TRAINING."""

from __future__ import annotations

import time
from functools import wraps
from pathlib import Path

import torch

from wan_scale.config import Wan
from wan_scale.cost.plan import plan
from wan_scale.cost.sizes import GB
from wan_scale.cost.work import measured_rates
from wan_scale.data.files import read_json, write_json
from wan_scale.pages import run_page
from wan_scale.training import dist, kept

KINDS = {"stage1": ("stage1",), "stage2": ("student", "critic"), "dmd2v": ("student", "critic")}


class Watch:
    """Of rank 0: the plan of a phase beside its log, and the page at each checkpoint and preview.

    speed: how the blocks run (checkpointing, compiled). The page also comes after every save_minutes.
    """

    def __init__(self, cfg: Wan, name: str, device: torch.device, speed: dict | None, updates: int):
        self.cfg, self.name, self.written = cfg, name, None
        facts = {"updates": updates, "machine": machine(device)}
        trying(lambda: facts.update(planned(cfg, name, device, speed or {})), "the plan beside the log")
        trying(lambda: write_json(cfg.folder(name, "plan.json"), facts), "plan.json")

    def step(self, number: int) -> None:
        """After update `number`: the page, where one is due."""
        cfg, now = self.cfg, time.monotonic()
        due = number % cfg.save_every == 0 or (cfg.preview_every and number % cfg.preview_every == 0)
        if due or self.written is None or now - self.written > 60 * cfg.save_minutes:
            self.written = now
            show(cfg, self.name)


def watched(on_step):
    """Training.on_step(how, phase, terms), and after it, on rank 0, the page where one is due."""

    @wraps(on_step)
    def both(job, how, phase, terms):
        on_step(job, how, phase, terms)
        if dist.rank() == 0:
            if getattr(job, "watch", None) is None:
                job.watch = Watch(job.cfg, job.name, job.device, job.speed, phase.steps)
            job.watch.step(phase.step)

    return both


def shown_at_end(alone):
    """alone(cfg, name, work), which trains a phase, and the page when it is finished."""

    @wraps(alone)
    def both(cfg, name, work):
        facts = alone(cfg, name, work)
        if (cfg.folder(name) / "log.jsonl").exists():
            show(cfg, name)
        return facts

    return both


def show(cfg: Wan, name: str) -> None:
    """OUT/report.html, by rank 0."""
    if dist.rank() == 0:
        trying(lambda: run_page.write(cfg.folder(), name), "report.html")


def trying(work, what: str) -> None:
    """work(), or a line that says why not."""
    try:
        work()
    except Exception as e:  # of whatever kind: hours of training are worth more than a page
        print(f"\n{what} is left out ({kept.reason(e)}); the training goes on.", flush=True)


def machine(device: torch.device) -> str:
    n = dist.world()
    if device.type == "cuda":
        return f"{n} x {torch.cuda.get_device_name(device)}"
    return "a CPU" if n == 1 else f"{n} processes on CPUs"


def planned(cfg: Wan, name: str, device: torch.device, speed: dict) -> dict:
    """What `plan` says of this phase on these GPUs: seconds of an update, and the most that a GPU holds.

    Nothing on a CPU, of which it knows nothing, and of the phase `teacher`.
    """
    if device.type != "cuda" or name == "teacher":
        return {}
    config = read_json(Path(cfg.model) / "transformer" / "config.json")
    these = asked_of_plan(cfg, name, device, **speed_of(speed))
    rates = measured_rates(read_json(Path(cfg.rates)), cfg.tf32) if cfg.rates else None
    p = plan(config, rates=rates, **these)
    source = f"rates measured on {rates['on']}" if rates else f"{cfg.tflops:g} TFLOP/s (--tflops)"
    found = {"seconds": p["seconds"]["stage2" if name == "dmd2v" else name], "by": source}
    return found | ({"GB": max(p["peak"][kind] for kind in KINDS[name]) / GB} if name in KINDS else {})


def asked_of_plan(cfg: Wan, name: str, device: torch.device, **more) -> dict:
    """Arguments of plan.plan for these GPUs and this phase."""
    cuda, H = device.type == "cuda", 0 if name in ("kd", "dmd2v") else cfg.H
    size = torch.cuda.get_device_properties(device).total_memory / GB if cuda else cfg.card_gb
    return cfg.planned(gpus=dist.world(), card_gb=size, H=H, N=cfg.N if H else 1, **more)


def speed_of(speed: dict) -> dict:
    """Of how the blocks run, what `plan` asks for."""
    return {key: speed[key] for key in ("checkpointing", "compiled") if key in speed}
