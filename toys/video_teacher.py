"""The teacher of the tiny videos, trained once, as a teacher is in real life: hours on a core, minutes on a GPU.

    python -m toys.video_teacher                  # goes on where it was stopped; runs/video_teacher/
    python -m toys.video_teacher --updates 200 --every 100 --out runs/video_teacher-try    # to see that it works

The world has a few modes a motion, World(modes="few"), so that a network of a million parameters can learn it.
Every so many updates the EMA is scored: curve.json holds the ruler's numbers against the updates.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

import tmd_minimal as tmd
from settings import command, write_json
from toys import video_net
from toys.moving_shapes import EMPTY, MOTIONS, SHADES, SHAPES, World, encode
from toys.ruler import Ruler

# The rate is constant for two thirds of the updates and falls to zero in the last third.
RECIPE = {"updates": 45_000, "batch": 32, "lr": 3e-3, "decay": 1 / 3, "ema": 0.999, "seed": 0}
NETWORK = {"width": 96, "depth": 6, "heads": 4, "patch": (2, 4, 4)}
FRAMES, PIXELS, GUIDANCE = 8, 12, 2.0


def train(out: Path, recipe: dict, every: int) -> None:
    """Train the teacher of `recipe`, or go on; writes checkpoint.pt and curve.json into `out`.

    RAISES ValueError if there is no update to make, or none between two scores.
    """
    if recipe["updates"] < 1 or every < 1:
        raise ValueError(f"updates is {recipe['updates']} and every {every}; both must be at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    world, c_neg = World(FRAMES, PIXELS, modes="few"), torch.full((3,), EMPTY)
    ruler = Ruler(world)
    c = torch.stack([encode(" ".join(words)) for words in itertools.product(SHADES, SHAPES, MOTIONS)]).repeat(8, 1)
    x_1 = torch.randn(len(c), 1, FRAMES, PIXELS, PIXELS, generator=torch.Generator().manual_seed(10_000))
    torch.manual_seed(recipe["seed"])
    net = video_net.VideoDiT(1, NETWORK["width"], NETWORK["depth"], NETWORK["heads"], NETWORK["patch"], words=EMPTY)
    losses = []

    def on_step(phase, terms):
        losses.append(terms["denoising"].item())
        if phase.step % every == 0 or phase.step == recipe["updates"]:
            clips = tmd.sample_teacher(phase.ema, x_1, c, c_neg, grid=tmd.make_grid(50, 1.0), guidance=GUIDANCE)
            score = {key: value for key, value in ruler.score(clips, c).items() if key not in ("clips", "prompts")}
            phase.log.append(
                {"updates": phase.step, "loss": sum(losses) / len(losses), "seconds": phase.seconds, **score}
            )
            losses.clear()
            write_json(
                out / "curve.json",
                {"recipe": recipe, "network": {**NETWORK, "patch": list(NETWORK["patch"])}, "curve": phase.log},
            )
            shown = "  ".join(
                f"{key} {score[key]:.3f}" for key in ("total", "quality", "semantic", "motion", "diversity")
            )
            print(f"{phase.step} updates, {phase.seconds:.0f} s: loss {phase.log[-1]['loss']:.4f}  {shown}", flush=True)

    data = lambda n, generator: world.draw(n, generator)[:2]
    tmd.train_teacher(
        net, data, c_neg=c_neg, path=str(out / "checkpoint.pt"), save_every=500, on_step=on_step, **recipe
    )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/video_teacher", help="output folder (default: runs/video_teacher)")
    p.add_argument("--updates", type=int, default=RECIPE["updates"], help=f"updates (default: {RECIPE['updates']})")
    p.add_argument("--every", type=int, default=2500, help="updates between two scores (default: 2500)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    return command("video_teacher", lambda: train(Path(args.out), {**RECIPE, "updates": args.updates}, args.every))


if __name__ == "__main__":
    sys.exit(main())
