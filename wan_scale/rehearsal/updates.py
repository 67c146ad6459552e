"""One update of each phase on a fake card: training/train.py's own code, with weights and clips that are shapes alone.

    rehearse(preset("1.3b", gpus=8), WAN["1.3b"], "selective")["stage1"]["memory"]    # {"weights": bytes, ...}
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

from wan_scale.config import Wan
from wan_scale.cost.memory import PROMPT as TEXT
from wan_scale.cost.sizes import latent
from wan_scale.rehearsal.card import card
from wan_scale.rehearsal.ledger import CARD, Ledger
from wan_scale.training import dist, train, weights
from wan_scale.training.phase import Feed, WanPhase

PHASES = {"stage1": ("stage1",), "stage2": ("critic", "student")}  # phase: its kinds of update, as `plan` calls them


def replaced(module: nn.Module, new) -> nn.Module:
    """The module with new(p) in the place of every parameter p."""
    for owner in module.modules():
        for name, p in list(owner._parameters.items()):
            if p is not None:
                owner._parameters[name] = nn.Parameter(new(p), requires_grad=p.requires_grad)
    return module


def fill(ledger: Ledger, module: nn.Module, device, *_) -> nn.Module:
    """weights.fill without files: what has no memory yet gets its place on the device."""
    module = replaced(module, lambda p: torch.empty_like(p, device=device) if p.is_meta else p)
    ledger.name(module.parameters(), "weights")
    return module


def shard(net: nn.Module, shard_over: int, offload: bool, last_tap: int) -> nn.Module:
    """dist.shard of a net that lies nowhere yet: FSDP would move real tensors to the card, and cannot to a fake one."""
    if dist.world() == 1 and not offload:
        return net
    for owner in net.modules():
        owner._buffers = {name: b if b is None else b.to(CARD) for name, b in owner._buffers.items()}
    return sharded(replaced(net, lambda p: torch.empty_like(p, device="meta")), shard_over, offload, last_tap)


sharded = dist.shard


class Last(WanPhase):
    """A phase at the last of several micro-batches: the gradients of the earlier ones are there.

    accumulate: as the settings have it. One micro-batch runs.
    """

    def __init__(self, *args, accumulate: int, **kw):
        super().__init__(*args, accumulate=1, **kw)
        self.several = min(2, accumulate)

    def ready(self, *names: str) -> None:
        """What the next update of these nets finds."""
        for p in (p for name in names for p in self.nets[name].parameters() if self.several > 1):
            p.grad = torch.zeros_like(p)

    def update(self, name, terms):
        self.accumulate, self.micro = self.several, self.several - 1
        try:
            return super().update(name, terms)
        finally:
            self.accumulate, self.micro = 1, 0


class Job(train.Training):
    """Training with clips that are shapes alone, no files, and a ledger that is told what the phase holds."""

    def __init__(self, cfg: Wan, name: str, ledger: Ledger, config: dict):
        self.cfg, self.name, self.device, self.ledger = cfg, name, CARD, ledger
        size = latent(cfg.frames, cfg.height, cfg.width)
        self.clip = [(config["in_channels"], *size), (TEXT, config["text_dim"])]
        self.c_neg = torch.zeros(self.clip[1], device=CARD)
        self.accumulate = train.accumulation(cfg)
        self.accuracy, self.speed, self.before, self.found = None, None, None, {}
        ledger.name([self.c_neg], "activations")

    def batch(self, n: int, generator=None):
        return tuple(torch.empty(n, *size, device=CARD) for size in self.clip)

    def student(self, loop, how, student, **_) -> dict:
        """An update of each kind, counted."""
        feed = Feed(lambda position, n: self.batch(n))
        make = partial(self.begun, self.maker(feed, Last))
        with train.compute(self.cfg, self.device):
            loop(feed, seed=self.cfg.seed, make=make, on_step=self.on_step, progress=False)
        return self.found

    def begun(self, make, name, nets, *args, **kw) -> WanPhase:
        """A phase whose optimizers have their states, as from the second update on."""
        phase = make(name, nets, *args, **kw)
        self.ledger.name((p for net in nets.values() for p in net.parameters()), "weights")
        states = phase.tensors()
        self.ledger.name((t for key, t in states.items() if ".exp_avg" in key or key.endswith(".step")), "optimizer")
        self.ledger.name(phase.ema.named.values(), "EMA")
        for optimizer in phase.optimizers.values():
            optimizer.register_step_pre_hook(self.gradients)
        self.mark(phase, "student" if name == "stage1" else "fake", *["disc"] * (name != "stage1"))
        return phase

    def gradients(self, optimizer, *_) -> None:
        every = (p.grad for group in optimizer.param_groups for p in group["params"])
        self.ledger.name([g for g in every if g is not None], "gradients")

    def mark(self, phase: Last, *nets: str) -> None:
        """An update of these nets begins."""
        phase.ready(*nets)
        self.begin, self.ledger.flops = len(self.ledger.events), Counter()
        self.clock = time.perf_counter()

    def on_step(self, phase: WanPhase, terms: dict) -> None:
        kind = "stage1" if "tm_mf" in terms else "student" if "vsd" in terms else "critic"
        found = {"memory": self.ledger.peak(self.begin), "flops": dict(self.ledger.flops)}
        self.found[kind] = found | {"seconds": round(time.perf_counter() - self.clock, 1)}
        if kind == "critic":  # on to the student's turn
            phase.step = self.cfg.stage2().student_every - 1
            self.mark(phase, "student")


def rehearse(cfg: Wan, config: dict, checkpointing: str, phases=tuple(PHASES)) -> dict:
    """{kind of update: {"memory" (bytes by term), "flops" (of a micro-batch, by sort), "seconds" that it took}}."""
    steps = {"stage1_updates": 1, "stage2_iterations": cfg.stage2().student_every}
    cfg = replace(cfg, precision="bf16", attn="native", compile="off", checkpointing=checkpointing, **steps)
    found = {}
    for phase in phases:
        with tqdm(desc=phase, unit=" operations", mininterval=0.5) as bar, ExitStack() as stack:
            ledger = stack.enter_context(card(cfg.gpus, bar.update))
            places = {
                (train, "check_folder"): lambda *_, **__: None,
                (train, "transformer_of"): lambda _: "",
                (weights, "files"): lambda *_, **__: {},
                (weights, "check_finite"): lambda *_: None,  # host memory that nothing was written to
                (weights, "skeleton"): lambda folder, dtype: weights.empty(config, dtype).eval(),
                (weights, "fill"): partial(fill, ledger),
                (dist, "shard"): shard,
            }
            for (owner, name), value in places.items():
                stack.enter_context(patch.object(owner, name, value))
            job = Job(cfg, phase, ledger, config)
            found |= {"stage1": train.of_stage1, "stage2": train.of_stage2}[phase](job)
        gc.collect()
    return found
