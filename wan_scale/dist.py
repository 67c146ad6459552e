"""One process or many: `torchrun` sets the environment, everything else is the same code."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # of a collective in training
DAYS = timedelta(days=7)  # of a barrier: ranks may finish making data hours apart


def start(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started us; returns this process's device."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise ValueError("device is cuda, but this torch sees no card; install a CUDA build of torch, or take --device cpu.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        waiting_room()
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(words: str) -> None:
    """One line on the screen, from one rank."""
    if rank() == 0:
        print(words, flush=True)


@cache
def context_group(cards: int):
    """The `cards` neighbouring ranks that share this rank's clips; rank // cards numbers the groups. Every rank must call first."""
    if world() % cards:
        raise ValueError(f"context_parallel {cards} does not divide {world()} processes; start a multiple of {cards} with torchrun.")
    return dist.new_subgroups(cards, timeout=PATIENCE)[0] if cards > 1 else None


@cache
def waiting_room():
    """A group of its own for barriers, whose patience is long; over gloo, which waits on no card."""
    return dist.new_group(backend="gloo", timeout=DAYS)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier(group=waiting_room())


@cache
def all_ranks(kind: str):
    """The mesh to shard over, of the nets' own kind of device: torch's default would be the card, also for a run on the CPU."""
    return init_device_mesh(kind, (world(),))


def shard(net: nn.Module) -> nn.Module:
    """FSDP2: every block and then the net itself, which owns `features`, `head`, `taps`. One process: as it is."""
    if world() == 1:
        return net
    mesh = all_ranks(next(net.parameters()).device.type)
    for block in (net.net if hasattr(net, "net") else net).blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(
        net, mesh=mesh, reshard_after_forward=True
    )  # else the root stays whole after a call without gradient, and a save misses its state
    for entry in ("features", "head", "taps"):
        if hasattr(net, entry):
            register_fsdp_forward_method(net, entry)
    return net


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(net: nn.Module) -> None:
    """Mean over ranks of the gradients of a net that every rank holds whole (sharded gradients are averaged by FSDP)."""
    if world() > 1:
        for p in net.parameters():
            if p.grad is not None and not isinstance(p.grad, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= world()


def mean(values: list[torch.Tensor]) -> list[float]:
    """Means of scalars over the ranks, with one wait for the device."""
    stacked = torch.stack([v.detach().float() for v in values])
    if world() > 1:
        dist.all_reduce(stacked)
    return (stacked / world()).tolist()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors of all ranks, joined along the batch in the order of ranks."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def stop() -> None:
    for made in (context_group, waiting_room, all_ranks):
        made.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
