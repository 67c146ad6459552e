"""tmd.Phase for many GPUs: gradient accumulation, sharded EMA, distributed checkpoints, steps that are not finite.

The training loops stay those of tmd_minimal: train_stage1(..., make=partial(WanPhase, feed=feed, ...)). Every
micro-batch has a global number G, which alone decides its samples and its noise. So one process that accumulates over 8
micro-batches does the same update as 8 ranks with one each. A resumed run repeats nothing and skips nothing, and no RNG
state has to be saved.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import tmd_minimal as tmd
from wan_scale.seeds import mixed
from wan_scale.training import dist


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
    A step whose gradient is not finite is skipped and counted; `patience` of them in a row are a FloatingPointError.
    """

    KEPT = (*tmd.Phase.KEPT, "skipped", "in_a_row")

    def __init__(self, *args, feed: Feed, accumulate: int = 1, patience: int = 5, keep: int = 2, context: int = 1,
                 ema_on: str | None = None, **kw):  # fmt: skip
        self.average = partial(EMA, device=ema_on)
        super().__init__(*args, **kw)
        self.feed, self.accumulate, self.patience, self.keep = feed, accumulate, patience, keep
        # ranks that share a clip draw alike
        self.replica, self.replicas = dist.rank() // context, dist.world() // context
        self.seed = self.generator.initial_seed()
        self.micro, self.skipped, self.means = 0, 0, {}
        self.in_a_row = dict.fromkeys(self.nets, 0)  # by net: one of them may go on well

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
            self.in_a_row[name] = 0
        else:
            self.skipped, self.in_a_row[name] = self.skipped + 1, self.in_a_row[name] + 1
            if self.in_a_row[name] >= self.patience:
                times = f"{self.in_a_row[name]} times in a row, at step {self.step}"
                bad = f"{self.name}: the gradient of {name!r} was not finite {times}"
                raise FloatingPointError(f"{bad}; lower the rate, the last checkpoint is kept.")
        optimizer.zero_grad(set_to_none=True)
        return terms

    def run(self, iterate, steps, path=None, **kw):
        def accumulated(phase):
            self.means = {}
            for micro in range(self.accumulate):
                self.micro = micro
                self.feed.number = (self.step * self.accumulate + self.micro) * self.replicas + self.replica
                self.generator.manual_seed(mixed(self.seed, self.feed.number))
                iterate(phase)
            return dict(
                zip(
                    self.means,
                    dist.mean([torch.as_tensor(v, device=self.generator.device) for v in self.means.values()]),
                )
            )

        return super().run(accumulated, steps, path, progress=kw.pop("progress", True) and dist.rank() == 0, **kw)

    # ---- Checkpoints: path/step-00000100/, complete or not there ----

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
        final = Path(path) / f"step-{self.step:08d}"
        temporary = final.with_suffix(".tmp")
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        dcp.save(self.tensors(), checkpoint_id=temporary)
        if dist.rank() == 0:
            with open(temporary / "state.json", "w") as file:
                json.dump({key: getattr(self, key) for key in self.KEPT}, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in complete(path)[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, path):
        """The newest complete checkpoint of `path` (none: a fresh start); CheckpointError if it is of another run or
        cannot be read.
        """
        if not (steps := complete(path)):
            return
        try:
            state = json.loads((steps[-1] / "state.json").read_text())
        except ValueError as e:
            raise tmd.CheckpointError(
                f"{steps[-1]}/state.json is not readable; delete that folder to go on from the one before it."
            ) from e
        config = json.loads(json.dumps(self.config))
        if state.get("name") != self.name or state.get("config") != config:
            old = state.get("config", {})
            keys = sorted(k for k in {*old, *config} if old.get(k) != config.get(k)) or ["phase"]
            raise tmd.CheckpointError(
                f"{path} was made with another {', '.join(keys)}; give the same settings or another --out."
            )
        try:
            dcp.load(self.tensors(), checkpoint_id=steps[-1])
        except (CheckpointException, RuntimeError, ValueError, KeyError, OSError, EOFError) as e:
            found = f"{steps[-1]} is damaged or of another shape"
            raise tmd.CheckpointError(f"{found}; delete that folder to go on from the one before it.") from e
        for key in self.KEPT:
            setattr(self, key, state[key])


def complete(path) -> list[Path]:
    """Finished checkpoints of a phase, oldest first."""
    return sorted(
        folder for folder in Path(path).glob("step-*") if folder.suffix != ".tmp" and (folder / "state.json").exists()
    )
