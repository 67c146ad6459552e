"""One phase of training with its whole state in hand, for tests that compare ranks with one process.

test_wan_train.py starts it under torchrun: torchrun --nproc-per-node 2 tests/wan_ranks.py ROOT, where ROOT holds tiny/
and data/; it writes ROOT/two/*.pt. Elsewhere worlds.launch calls `copies` (two copies of the weights, each sharded over
two ranks), `pair` (all-gathers, host memory), `offloads` (the teacher in host memory) and `adapters` (LoRA).
"""

import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan_scale.config import preset
from wan_scale.sampling import sample
from wan_scale.training import dist, train, weights

# of the two clips of stage 1's third update one needs the derivative, so the ranks call the head unequally often
SETTINGS = {
    "M": 2,
    "global_batch": 2,
    "micro_batch": 1,
    "stage1_updates": 3,
    "stage2_iterations": 6,
    "stage1_lr": 1e-3,
    "stage2_lr": 1e-3,
}


class Stop(Exception):
    pass


def settings(root: Path, out: Path, **given):
    more = {
        "model": str(root / "tiny"),
        "data": str(root / "data"),
        "prompts": str(root / "prompts.txt"),
        "samples_per_prompt": 1,
    }
    more |= {"checkpointing": "full", "save_every": 100}
    return preset("tiny", out=str(out), **{**more, **SETTINGS, **given})


def run(phase: str, root: Path, out: Path, stop: int | None = None, **given) -> dict:
    """Train stage1 or stage2 (to a checkpoint at step `stop`, if given); every tensor of the phase, whole, its step,
    and losses and all-gathers of every update."""
    cfg = settings(root, out, **given)
    kept, seen, losses, counts = {}, train.Training.on_step, [], []

    def on_step(job, how, phase, terms):
        kept["phase"] = phase
        losses.append(dict(terms))
        counts.append(dict(count))
        count.clear()
        if phase.step == stop:
            phase.save(job.folder / "checkpoints")
            raise Stop

    train.Training.on_step = on_step
    try:
        with gathers() as count:
            train.stage1(cfg) if phase == "stage1" else train.stage2(cfg)
    except Stop:
        pass
    finally:
        train.Training.on_step = seen
    whole = {name: dist.full(p).clone() for name, p in kept["phase"].tensors().items()}
    cut = next(kept["phase"].nets["student"].parameters())
    mesh = list(cut.device_mesh.shape) if isinstance(cut, DTensor) else []
    return {
        "step": kept["phase"].step,
        "world": dist.world(),
        "mesh": mesh,
        "tensors": whole,
        "losses": losses,
        "gathers": counts,
    }


@contextmanager
def gathers():
    """Counter of all-gathers: "student 0", "student rest", ...; teacher and fake score together are "other"."""
    count, unshard = Counter(), FSDPParamGroup.unshard

    def counted(group, *args):
        idle = group._all_gather_result is None
        unshard(group, *args)
        if idle and group._all_gather_result is not None:
            # "net.transformer.blocks.3", "transformer.blocks.3", or "" for what is in no block
            name = group._module_fqn
            who = "student" if name.startswith("net.") or hasattr(group.modules[0], "H") else "other"
            count[f"{who} {name.rpartition('blocks.')[2] or 'rest'}"] += 1

    FSDPParamGroup.unshard = counted
    try:
        yield count
    finally:
        FSDPParamGroup.unshard = unshard


def held(net) -> int:
    """Bytes of memory behind the parameters of a net on this rank."""
    return sum(dist.local(p).nbytes for p in net.parameters() if not p.is_meta)


def two(root: Path) -> None:
    found = {phase: run(phase, root, root / "two") for phase in ("stage1", "stage2")}
    if dist.rank() == 0:
        shutil.copytree(root / "two" / "stage1", root / "moved" / "stage1")
        torch.save(found, root / "two" / "found.pt")
    dist.barrier()
    run("stage2", root, root / "moved", stop=3)
    sample.sample(settings(root, root / "two"))


def copies(root: Path) -> None:
    """Both stages on 2 x 2 ranks, two micro-batches an update; from a checkpoint of theirs in the middle of stage 2 on
    as one row of 4.
    """
    out, four = root / "copies", {"global_batch": 8}
    found = {phase: run(phase, root, out, shard_over=2, save_every=3, **four) for phase in ("stage1", "stage2")}
    if dist.rank() == 0:  # as if it had been stopped after 3 of 6
        for begun in (root / "begun", root / "begun-for-one"):
            middle = Path("stage2", "checkpoints", "step-00000003")
            shutil.copytree(out / "stage1", begun / "stage1")
            shutil.copytree(out / middle, begun / middle)
    dist.barrier()
    found["row"] = run("stage2", root, root / "begun", **four)
    if dist.rank() == 0:
        torch.save(found, root / "copies.pt")


def pair(root: Path) -> None:
    """What two ranks gather and hold; and `offloads` in bf16."""
    found, four = {}, {"N": 4, "global_batch": 4, "stage2_iterations": 5}
    found["counts"] = {phase: run(phase, root, root / "counted", **four) for phase in ("stage1", "stage2")}
    found["agreed"] = dist.agreed(dist.rank())
    found["whole"] = dist.rank() == 0 or not dist.whole({"a": torch.ones(1)})
    found["held"], found["wiring"] = memory(root), [wiring(root, offload) for offload in (False, True)]
    found["taps"] = partial_calls(root)
    torch.save(found, root / f"pair-{dist.rank()}.pt")
    offloads(root, "bf16")


def offloads(root: Path, precision: str) -> None:
    """What two ranks lose in stage 2 with the teacher on the GPU ("here") and in host memory ("host")."""
    bare = {"stage1_updates": 0, "stage2_iterations": 5, "precision": precision}
    found = {
        where: run("stage2", root, root / f"{precision}-{where}", offload_teacher=where == "host", **bare)
        for where in ("here", "host")
    }
    torch.save(found, root / f"offloads-{precision}-{dist.rank()}.pt")


class Watched:
    """An open safetensors file, or a tensor in it, that notes the bytes of every read."""

    def __init__(self, inner, reads):
        self.inner, self.reads = inner, reads

    def get_slice(self, key):
        return Watched(self.inner.get_slice(key), self.reads)

    def __getitem__(self, rows):
        self.reads.append(self.inner[rows].nbytes)
        return self.inner[rows]


def memory(root: Path) -> dict:
    """Bytes on this rank of student and teacher before their sharding and when they are in place, and the most that was
    read at once.
    """
    cfg, bytes_, real = settings(root, root / "held"), {}, weights.safe_open
    job = train.Training(cfg, "stage2", cfg.shards)
    for who, net in (
        ("student", train.make_student(cfg, cfg.how())),
        ("teacher", train.network(cfg).requires_grad_(False)),
    ):
        before, reads = held(net), []
        weights.safe_open = lambda *args, reads=reads: Watched(real(*args), reads)
        bytes_[who] = before, held(job.place(net)), max(reads)
    weights.safe_open = real
    return bytes_


def wiring(root: Path, offload: bool) -> dict:
    """Of every block of the teacher: which blocks it fetches early, forward and backward, and whether its weights wait
    in host memory.
    """
    cfg = settings(root, root / "held", offload_teacher=offload)
    net = train.Training(cfg, "stage2", cfg.shards).place(train.network(cfg).requires_grad_(False))
    states = [block._get_fsdp_state() for block in net.blocks]
    found = {
        f"{way}s": [[states.index(s) for s in getattr(state, f"_states_to_{way}_prefetch")] for state in states]
        for way in ("forward", "backward")
    }
    return found | {"waits": [isinstance(state._fsdp_param_group.offload_policy, CPUOffloadPolicy) for state in states]}


def partial_calls(root: Path) -> dict:
    """All-gathers of taps that end at block 1 of 4, with gradient of the input, and what is under way afterwards."""
    cfg = settings(root, root / "held", taps="0,1")
    net = train.Training(cfg, "stage2", cfg.shards).place(train.network(cfg).requires_grad_(False))
    x, c = torch.ones(1, 16, 3, 8, 8, requires_grad=True), torch.ones(1, 20, 32)
    with gathers() as count:
        net.taps(x, torch.tensor([0.7], dtype=torch.float64), c, (0, 1))[1].sum().backward()
    pending = [
        i
        for i, block in enumerate(net.blocks)
        if block._get_fsdp_state()._fsdp_param_group._all_gather_result is not None
    ]
    return {"gathers": dict(count), "pending": pending, "gradient": x.grad}


def adapters(root: Path, out: Path, rank: int) -> None:
    """Stage 2 with adapters: a clip on each rank, then every clip on both."""
    more = {"lora": rank, "stage1_updates": 0, "stage2_iterations": 5}
    for name, gpus in (("two", 1), ("cut", 2)):
        found = run("stage2", root, out / name, **more, context_parallel=gpus)
        if dist.rank() == 0:
            torch.save(found, out / name / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start("cpu")
    two(Path(sys.argv[1]))
    dist.barrier()
    dist.stop()
