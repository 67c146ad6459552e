"""One phase of training with its whole state in hand; under torchrun, what test_wan_train.py compares with one process.

torchrun --nproc-per-node 2 tests/wan_ranks.py ROOT        # ROOT holds tiny/ and data/; writes ROOT/two/*.pt
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan_scale import dist, sample, train
from wan_scale.config import preset

SETTINGS = {"M": 2, "global_batch": 2, "micro_batch": 1, "stage1_updates": 2, "stage2_iterations": 6, "stage1_lr": 1e-3, "stage2_lr": 1e-3}


class Stop(Exception):
    pass


def settings(root: Path, out: Path):
    more = {"model": str(root / "tiny"), "data": str(root / "data"), "prompts": str(root / "prompts.txt"), "samples_per_prompt": 1}
    return preset("tiny", out=str(out), checkpointing="full", save_every=100, **more, **SETTINGS)


def run(phase: str, root: Path, out: Path, stop: int | None = None) -> dict:
    """Train stage1 or stage2 (to a checkpoint at step `stop`, if given); every tensor of the phase, whole, and its step."""
    cfg = settings(root, out)
    kept, seen = {}, train.Training.on_step

    def on_step(job, how, phase, terms):
        kept["phase"] = phase
        if phase.step == stop:
            phase.save(job.folder / "checkpoints")
            raise Stop

    train.Training.on_step = on_step
    try:
        train.stage1(cfg) if phase == "stage1" else train.stage2(cfg)
    except Stop:
        pass
    finally:
        train.Training.on_step = seen
    whole = {name: dist.full(p).clone() for name, p in kept["phase"].tensors().items()}
    return {"step": kept["phase"].step, "world": dist.world(), "tensors": whole}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    dist.start("cpu")
    found = {phase: run(phase, root, root / "two") for phase in ("stage1", "stage2")}
    if dist.rank() == 0:
        shutil.copytree(root / "two" / "stage1", root / "moved" / "stage1")
        torch.save(found, root / "two" / "found.pt")
    dist.barrier()
    run("stage2", root, root / "moved", stop=3)
    sample.sample(settings(root, root / "two"))
    dist.stop()
