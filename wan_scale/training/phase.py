"""tmd.Phase for many GPUs: gradient accumulation, sharded EMA, distributed checkpoints, steps that are not finite.

The training loops stay those of tmd_minimal: train_stage1(..., make=partial(WanPhase, feed=feed, ...)). Every
micro-batch has a global number G, which alone decides its samples and its noise. So one process that accumulates over 8
micro-batches does the same update as 8 ranks with one each. A resumed run repeats nothing and skips nothing, and no RNG
state has to be saved.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

import tmd_minimal as tmd
from wan_scale.seeds import mixed
from wan_scale.training import checkpoints, dist

# How long a phase is: a finished one may go on to more of them.
LENGTHS = {"updates", "iterations", "--teacher-updates", "--stage1-updates", "--stage2-iterations", "--kd-updates"}


class Feed:
    """data(n, generator) of tmd's loops: reads the samples of the micro-batch whose number the phase has set."""

    def __init__(self, read):
        self.read, self.number = read, 0  # read(position, n) -> batch, position counted in samples since the start

    def __call__(self, n: int, generator=None):
        return self.read(self.number * n, n)


class EMA:
    """The EMA: a copy of the net's own (sharded) parameters, in host memory where `device` says so."""

    def __init__(self, net: nn.Module, device: str | None = None):
        self.named = {name: p.detach().to(device, copy=True) for name, p in net.named_parameters()}

    def parameters(self):
        return [dist.local(p) for p in self.named.values()]


class WanPhase(tmd.Phase):
    """A Phase whose update is a mean over `accumulate` micro-batches on every rank.

    Its nets may be sharded (FSDP2) or whole on each rank. ema_on: the device of the EMA, if it is not the net's.
    A step whose gradient is not finite is skipped and counted; `patience` of them in a row are a FloatingPointError,
    and so is a phase without any other. Beside every save_every updates it saves every `minutes`, and on SIGTERM.
    verify: compare checksums of checkpoints of any size. before: a folder of checkpoints that go with the first save.
    """

    KEPT = (*tmd.Phase.KEPT, "skipped", "in_a_row", "made", "ends")

    def __init__(self, *args, feed: Feed, accumulate: int = 1, patience: int = 5, keep: int = 2, context: int = 1,
                 ema_on: str | None = None, minutes: float = math.inf, verify: bool = False, before=None,
                 **kw):  # fmt: skip
        self.average = partial(EMA, device=ema_on)
        super().__init__(*args, **kw)
        self.minutes, self.verify, self.saved, self.due = minutes, verify, time.monotonic(), [0.0, 0.0]
        self.before = before
        self.ends, self.steps = [], 0  # where it had been finished before it went on; where it ends now
        self.feed, self.accumulate, self.patience, self.keep = feed, accumulate, patience, keep
        # ranks that share a clip draw alike
        self.replica, self.replicas = dist.rank() // context, dist.world() // context
        self.seed = self.generator.initial_seed()
        self.micro, self.skipped, self.means = 0, 0, {}
        self.together = in_step(accumulate * self.replicas, self.replicas)
        self.coin = torch.Generator(self.generator.device) if self.together > 1 else None
        self.in_a_row = dict.fromkeys(self.nets, 0)  # by net: one of them may go on well
        self.made = dict.fromkeys(self.nets, 0)  # updates that were not skipped

    def follow(self, net):
        parts = lambda: [dist.local(p).to(e.device) for p, e in zip(net.parameters(), self.ema.parameters())]

        class Local:  # the same lines as on one GPU, on this rank's parts, where the EMA is
            parameters = staticmethod(parts)

        super().follow(Local)

    @contextmanager
    def ema_weights(self):
        """Within, the net carries its EMA. They change places, so this needs no memory."""

        def swap():
            dist.reshard(self.nets[self.averaged])
            with torch.no_grad():
                for p, ema in zip(self.nets[self.averaged].parameters(), self.ema.named.values(), strict=True):
                    p, ema = dist.local(p), dist.local(ema)
                    before = p.clone()
                    p.copy_(ema)
                    ema.copy_(before)

        swap()
        try:
            yield self.nets[self.averaged]
        finally:
            swap()

    def update(self, name, terms):
        """Backward through the mean of the micro-batches' terms; at the last of them clip, step and move the EMA."""
        net, optimizer = self.nets[name], self.optimizers[name]
        if self.micro == 0:
            optimizer.zero_grad(set_to_none=True)
        loss = sum(terms.values()) / self.accumulate
        dist.reduce_over_copies(net, self.micro == self.accumulate - 1)
        with torch.autocast(loss.device.type, enabled=False):  # as tmd.Phase: float32 parts have float32 gradients
            loss.backward()
        dist.reshard(*self.nets.values())  # what the micro-batch's calls left gathered
        for key, value in terms.items():
            self.means[key] = self.means.get(key, 0) + value.detach() / self.accumulate
        if self.micro < self.accumulate - 1:
            return terms
        dist.average_gradients(net)
        norm = dist.full(nn.utils.clip_grad_norm_(net.parameters(), self.clip))  # the same on every rank
        self.means[f"gradient norm {name}"] = norm
        if bool(torch.isfinite(norm)):
            optimizer.step()
            if name == self.averaged:
                self.follow(net)
            self.in_a_row[name], self.made[name] = 0, self.made[name] + 1
        else:
            self.skipped, self.in_a_row[name] = self.skipped + 1, self.in_a_row[name] + 1
            if self.in_a_row[name] >= self.patience:
                times = f"{self.in_a_row[name]} times in a row, at step {self.step}"
                bad = f"{self.name}: the gradient of {name!r} was not finite {times}"
                raise FloatingPointError(f"{bad}; lower the rate, the last checkpoint is kept.")
        optimizer.zero_grad(set_to_none=True)
        return terms

    def begin(self, micro: int) -> None:
        """Set the number of this rank's next micro-batch, and by it all that is drawn."""
        self.micro = micro
        self.feed.number = (self.step * self.accumulate + micro) * self.replicas + self.replica
        self.generator.manual_seed(mixed(self.seed, self.feed.number))
        if self.coin:
            self.coin.manual_seed(mixed(self.seed, f"coin {self.feed.number // self.together}"))

    def run(self, iterate, steps, path=None, on_step=None, **kw):
        def accumulated(phase):
            self.means = {}
            for micro in range(self.accumulate):
                self.begin(micro)
                iterate(phase)
            now = [float(bool(asked)), float(time.monotonic() - self.saved > 60 * self.minutes)]
            values = [torch.as_tensor(v, device=self.generator.device) for v in (*self.means.values(), *now)]
            *means, self.due[0], self.due[1] = dist.mean(values)  # above 0 where any rank says so
            return dict(zip(self.means, means))

        def stepped(phase, terms):
            if on_step:
                on_step(phase, terms)
            if path and any(self.due) and self.step < steps:
                if self.due[0] or self.step % every:  # else it is saved anyway
                    self.save(path)
                if self.due[0]:
                    saved = f"saved at update {self.step}, the same command goes on"
                    raise RuntimeError(f"{self.name}: told to stop; {saved}.")

        self.steps, progress, every = steps, kw.pop("progress", True) and dist.rank() == 0, kw.get("save_every", 1000)
        if path:
            checkpoints.sweep(path)
            if dist.rank() == 0:
                saves = math.ceil(steps / every) if self.minutes >= 1e6 else math.inf  # else the clock saves as well
                student = sum(map(size_of, self.ema.named.values()))
                there = len(checkpoints.complete(path))  # the first save here may stand beside them
                checkpoints.check_room(path, self.size(), min(self.keep, there + saves - 1), student)
        with told_to_stop(bool(path)) as asked:
            ema = super().run(accumulated, steps, path, on_step=stepped, progress=progress, **kw)
            if any(dist.gathered(bool(asked))):  # in the last update: what comes next must not begin
                raise RuntimeError(f"{self.name}: told to stop; saved at its end, the same command goes on.")
        for name in self.nets:
            if self.in_a_row[name] and not self.made[name]:
                none = f"{self.name}: of {self.in_a_row[name]} updates of {name!r} no gradient was finite"
                raise FloatingPointError(f"{none}; lower the rate and delete {path}, nothing was learnt.")
        return ema

    # ---- Checkpoints (checkpoints.py) ----

    def size(self) -> int:
        """Bytes of a checkpoint: of every net the weights and both moments, and the EMA."""
        trained = sum(size_of(p) for net in self.nets.values() for p in net.parameters())
        return 3 * trained + sum(map(size_of, self.ema.named.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight, both moments and the step count of its AdamW, and the EMA; sharing their memory."""
        found = {f"ema.{name}": p for name, p in self.ema.named.items()}
        for key, net in self.nets.items():
            for name, p in net.named_parameters():
                found[f"{key}.{name}"] = p.detach()
                state = self.optimizers[key].state[p]
                if not state:  # not stepped yet
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.detach()), torch.zeros_like(p.detach())
                found |= {f"{key}.{name}.{part}": value for part, value in state.items()}
        return found

    def save(self, path):
        state = {key: getattr(self, key) for key in self.KEPT}
        checkpoints.save(path, f"step-{self.step:08d}", self.tensors(), state, self.keep, self.verify)
        self.saved = time.monotonic()
        if self.before:
            checkpoints.drop(self.before)

    def load(self, path):
        """The newest complete checkpoint of `path` (none: a fresh start); CheckpointError if it is of another run or
        cannot be read. Another length of the phase is the same run, up to what was trained.
        """
        if not (steps := checkpoints.complete(path)):
            return
        state = checkpoints.read_state(steps[-1])
        old, config = state["config"], json.loads(json.dumps(self.config))
        keys = {k for k in {*old, *config} if old.get(k) != config.get(k)}
        longer = keys <= LENGTHS and state["step"] <= self.steps
        if state["name"] != self.name or (keys and not longer):
            other = f"{path} was made with another {', '.join(sorted(keys) or ['phase'])}"
            raise tmd.CheckpointError(f"{other}; give the same settings or another --out.")
        checkpoints.load(steps[-1], self.tensors(), state["files"], self.verify)
        for key in set(self.KEPT) - {"config"}:
            setattr(self, key, state[key])
        if keys and self.step in (old[k] for k in keys):  # it had come to its end
            self.ends = [*self.ends, self.step]


def size_of(p: torch.Tensor) -> int:
    """Bytes of a tensor, of a sharded one those of all ranks."""
    return p.numel() * p.element_size()


def in_step(micro_batches: int, ranks: int) -> int:
    """How many micro-batches in a row, of `micro_batches` an update, toss stage 1's coin for r < s alike.

    Those of all ranks at once, or most would wait for one that needs the finite difference. With 1, 2, 4 or 8 ranks it
    is the same number, and so the same update, where they divide the micro-batches.
    """
    eight = math.gcd(8, micro_batches)
    return ranks if eight % ranks else eight  # choice: ranks in step


@contextmanager
def told_to_stop(listen: bool):
    """A list that is no longer empty when SIGTERM has come, as schedulers send it before they kill."""
    asked = []
    if not listen or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
