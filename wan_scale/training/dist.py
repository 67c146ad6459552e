"""One process or many: `torchrun` sets the environment, everything else is the same code."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # of a collective in training
DAYS = timedelta(days=7)  # of a barrier: ranks may finish making data hours apart


def start(device: str = "auto", alone: bool = False) -> torch.device:
    """Join the process group if torchrun started us; returns this process's device.

    alone: without torchrun make a group of this one process.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        none = "device is cuda, but this torch sees no GPU"
        raise ValueError(f"{none}; install a CUDA build of torch, or take --device cpu.")
    many, mine = int(os.environ.get("WORLD_SIZE", 1)) > 1, torch.device("cpu")
    if cuda:
        # before the first allocation: segments that grow leave no gaps between tensors of many sizes
        if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(mine)  # before NCCL looks for a GPU, or all ranks would begin on the first
    if (many or alone) and not dist.is_initialized():
        here = {} if many else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        nccl = {"device_id": mine} if cuda else {}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, **nccl, **here)
        waiting_room()
    return mine


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(words: str) -> None:
    """One line on the screen, from one rank."""
    if rank() == 0:
        print(words, flush=True)


@cache
def context_group(K: int):
    """The K neighbouring ranks that share this rank's clips; rank // K numbers the groups. Every rank calls first."""
    if world() % K:
        uneven = f"context_parallel {K} does not divide {world()} processes"
        raise ValueError(f"{uneven}; start a multiple of {K} with torchrun.")
    return dist.new_subgroups(K, timeout=PATIENCE)[0] if K > 1 else None


@cache
def waiting_room():
    """A group of its own for barriers and files, whose patience is long; over gloo, which waits on no GPU."""
    return dist.new_group(backend="gloo", timeout=DAYS)


def patient():
    """The group for what may take long, such as a slow disk: not NCCL's, which would give up. None in one process."""
    return waiting_room() if dist.is_initialized() else None


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier(group=waiting_room())


@cache
def mesh(shard_over: int):
    """All ranks in one row that the weights are sharded over, or rows of `shard_over` neighbours with a copy each."""
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"  # torch would take the GPU, also for a run on the CPU
    if shard_over in (0, world()):
        return init_device_mesh(kind, (world(),))
    return init_device_mesh(kind, (world() // shard_over, shard_over), mesh_dim_names=("copies", "parts"))


def shard(net: nn.Module, shard_over: int = 0, offload: bool = False, last_tap: int = -1) -> nn.Module:
    """Shard a net with FSDP2: every block, then the net itself, which owns `features`, `head`, `taps`.

    The weights are sharded over all ranks, or (HSDP) over every `shard_over` neighbours. ValueError if these do not
    divide the ranks. offload: each rank's part waits in host memory; without it, one process leaves the net as it is.
    last_tap: the block that `taps` ends with.
    A STUDENT'S HEAD AND ROOT STAY GATHERED after a call, for the next of its N calls and its backward pass. Call
    reshard() before anything reads or writes its weights.
    """
    if shard_over and world() % shard_over:
        uneven = f"shard_over {shard_over} does not divide {world()} processes"
        raise ValueError(f"{uneven}; start a multiple of {shard_over}, or give 0.")
    if world() == 1 and not offload:
        return net
    of_student = hasattr(net, "net")
    blocks = list((net.net if of_student else net).blocks)
    kept = {net, *blocks[len(blocks) - net.H :]} if of_student else set()
    where = CPUOffloadPolicy(dist.get_backend() == "nccl") if offload else OffloadPolicy()
    how = {"mesh": mesh(shard_over), "offload_policy": where}
    for part in (*blocks, net):
        fully_shard(part, reshard_after_forward=part not in kept, **how)
        part.set_reshard_after_backward(part not in kept, recurse=False)
    for i, (block, after) in enumerate(pairwise(blocks)):  # the next gather runs beside the work of this block
        after.set_modules_to_backward_prefetch([block])
        # after the last tap the next block would be fetched for nobody; a student's features fetch it for the head
        if i != last_tap:
            block.set_modules_to_forward_prefetch([after])
    for entry in ("features", "head", "taps"):
        if hasattr(net, entry):
            register_fsdp_forward_method(net, entry)
    return net


def reshard(*nets: nn.Module) -> None:
    """Let go of all gathered weights.

    From here on parameters() are this rank's parts, which optimizers, EMA and files know.
    """
    for part in (module for net in nets for module in net.modules() if isinstance(module, FSDPModule)):
        part.reshard()


def reduce_over_copies(net: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over the copies of the weights (HSDP) too; else they wait here.

    Those of the root, a few layers, are always summed: each of a student's calls gives gradients to other parameters of
    it, and FSDP2 keeps what waits as one buffer, which it would add up as if they were the same.
    """
    for part in (module for module in net.modules() if isinstance(module, FSDPModule) and module is not net):
        part.set_requires_all_reduce(now, recurse=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sharded tensors by name, whole and in the first rank's host memory, empty on the others; every rank must call."""
    found = {}
    for name, tensor in named.items():
        gathered = full(tensor)  # every rank takes part, one keeps it
        if rank() == 0:
            found[name] = gathered.cpu().contiguous()
    return found


def average_gradients(net: nn.Module) -> None:
    """Mean over ranks of the gradients of a net that every rank holds whole (FSDP does it for sharded ones)."""
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


def agreed(value):
    """The first rank's value, on every rank; ALL MUST CALL, so not where a rank may have nothing to do."""
    held = [value]
    if world() > 1:
        dist.broadcast_object_list(held, group=waiting_room())
    return held[0]


def gathered(value) -> list:
    """Every rank's value, in the order of ranks; all must call."""
    if world() == 1:
        return [value]
    held = [None] * world()
    dist.all_gather_object(held, value, group=waiting_room())
    return held


def stop() -> None:
    for made in (context_group, waiting_room, mesh):
        made.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
