"""The teacher of the tiny videos, trained once, as a teacher is in real life: hours on a core, minutes on a GPU.

    python -m toys.video_teacher                  # goes on where it was stopped; runs/video_teacher/8-frames/
    python -m toys.video_teacher --frames 12      # the teacher of longer clips, from the one above
    python -m toys.video_teacher --blocks 3       # half the network, from the one above: where small students start
    python -m toys.video_teacher --updates 200 --every 100 --out runs/video_teacher-try    # to see that it works
    python -m toys.video_teacher --compare        # is the teacher trained here as good as the published one?

The world has a few modes a motion, World(modes="few"), so that a network of a million parameters can learn it.
Every so many updates the EMA is scored: curve.json holds the ruler's numbers against the updates. At the end the EMA
is written to teacher.safetensors, and teacher.json beside it holds recipe, curve and the hash of the weights. `make
publish` copies both to results/video_teacher/<name>, where toy_video.py and the claims find them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from tqdm import tqdm

import tmd_minimal as tmd
from settings import command, write_json
from toys import video_net
from toys.moving_shapes import EMPTY, MOTIONS, SHADES, SHAPES, World, encode
from toys.ruler import Ruler
from toys.variants import thinned
from toys.verdicts import difference, verdict

PUBLISHED = Path(__file__).resolve().parents[1] / "results/video_teacher"
# {name: recipe}. The rate is constant at first and falls to zero over `decay`, the last share of the updates.
RECIPES = {
    "8-frames": {"updates": 45_000, "batch": 32, "lr": 3e-3, "decay": 1 / 3, "ema": 0.999, "seed": 0},
    "12-frames": {"updates": 12_000, "batch": 32, "lr": 1e-3, "decay": 2 / 3, "ema": 0.999, "seed": 0},
    "8-frames-3-blocks": {"updates": 15_000, "batch": 32, "lr": 3e-3, "decay": 2 / 3, "ema": 0.999, "seed": 0},
}
NETWORK = {"width": 96, "depth": 6, "heads": 4, "patch": (2, 4, 4)}
PIXELS, GUIDANCE = 12, 2.0
SCORES = ("total", "quality", "semantic", "motion", "diversity")


def name_of(frames: int, blocks: int = NETWORK["depth"]) -> str:
    """The name of a teacher's recipe and folder."""
    return f"{frames}-frames" + (f"-{blocks}-blocks" if blocks != NETWORK["depth"] else "")


def network(blocks: int = NETWORK["depth"]):
    """A teacher's network, untrained."""
    return video_net.VideoDiT(1, NETWORK["width"], blocks, NETWORK["heads"], NETWORK["patch"], words=EMPTY)


def scored(net, ruler: Ruler, frames: int, seed: int = 10_000) -> dict:
    """The ruler's numbers of a teacher in 50 steps with guidance: eight clips a prompt, from the noise of `seed`."""
    c = torch.stack([encode(" ".join(words)) for words in itertools.product(SHADES, SHAPES, MOTIONS)]).repeat(8, 1)
    x_1 = torch.randn(len(c), 1, frames, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))
    c_neg = torch.full((3,), EMPTY)
    clips = tmd.sample_teacher(net, x_1, c, c_neg, grid=tmd.make_grid(50, 1.0), guidance=GUIDANCE)
    return {key: value for key, value in ruler.score(clips, c).items() if key not in ("clips", "prompts")}


def train(out: Path, frames: int, blocks: int, recipe: dict, every: int) -> None:
    """Train the teacher of `recipe`, or go on; writes checkpoint.pt, curve.json and the finished weights into `out`.

    RAISES ValueError if there is no update to make, or none between two scores.
    """
    if recipe["updates"] < 1 or every < 1:
        raise ValueError(f"updates is {recipe['updates']} and every {every}; both must be at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    world, c_neg = World(frames, PIXELS, modes="few"), torch.full((3,), EMPTY)
    ruler = Ruler(world)
    torch.manual_seed(recipe["seed"])
    net, losses = network(), []
    if name_of(frames, blocks) != "8-frames":  # the others go on from it
        net.load_state_dict(load_weights(8)[0])
        net = thinned(net, blocks)

    def on_step(phase, terms):
        losses.append(terms["denoising"].item())
        if phase.step % every == 0 or phase.step == recipe["updates"]:
            score = scored(phase.ema, ruler, frames)
            phase.log.append(
                {"updates": phase.step, "loss": sum(losses) / len(losses), "seconds": phase.seconds, **score}
            )
            losses.clear()
            write_json(
                out / "curve.json",
                {
                    "recipe": recipe,
                    "network": {**NETWORK, "depth": blocks, "patch": list(NETWORK["patch"])},
                    "curve": phase.log,
                },
            )
            shown = "  ".join(f"{key} {score[key]:.3f}" for key in SCORES)
            print(f"{phase.step} updates, {phase.seconds:.0f} s: loss {phase.log[-1]['loss']:.4f}  {shown}", flush=True)

    data = lambda n, generator: world.draw(n, generator)[:2]
    ema, _ = tmd.train_teacher(
        net, data, c_neg=c_neg, path=str(out / "checkpoint.pt"), save_every=500, on_step=on_step, **recipe
    )
    save_weights(ema, out, frames)


def save_weights(net, out: Path, frames: int) -> None:
    """teacher.safetensors, atomically, and teacher.json: curve.json and what the weights must fit, with their hash."""
    temporary = out / "teacher.tmp"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, temporary)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    os.replace(temporary, out / "teacher.safetensors")
    clips = {"frames": frames, "pixels": PIXELS, "modes": "few"}
    write_json(
        out / "teacher.json",
        {**json.loads((out / "curve.json").read_text(encoding="utf-8")), "clips": clips, "sha256": digest},
    )


def load_weights(
    frames: int, blocks: int = NETWORK["depth"], root: Path = PUBLISHED, folder: Path | None = None
) -> tuple[dict, dict]:
    """Weights by name and facts (teacher.json) of the published teacher of so many frames and blocks, or of `folder`.

    RuntimeError if the weights are not those that the facts tell of.
    """
    folder = folder or root / name_of(frames, blocks)
    facts, data = (
        json.loads((folder / "teacher.json").read_text(encoding="utf-8")),
        (folder / "teacher.safetensors").read_bytes(),
    )
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        told = f"{folder / 'teacher.safetensors'} is not the file that teacher.json tells of"
        raise RuntimeError(f"{told}; get it again from the repository, or give --own-teacher.")
    return load(data), facts


def compare(out: Path, frames: int, blocks: int, draws: int = 5) -> dict:
    """Whether the teacher of `out` is as good as the published one; writes again.json into `out`.

    Both are scored from the same noises, `draws` times, where their weights differ. They agree if the 95 % interval
    of the paired differences of the total has zero in it or lies within 0.01. RuntimeError if `out` has no teacher.
    """
    if not (out / "teacher.safetensors").exists():
        raise RuntimeError(f"{out} holds no finished teacher; train it first, by the same command without --compare.")
    (mine, here), (theirs, there) = load_weights(frames, blocks, folder=out), load_weights(frames, blocks)
    same = all(torch.equal(mine[name], value) for name, value in theirs.items())
    found = {"same recipe": here["recipe"] == there["recipe"], "same weights": same, "agree": same}
    if not same:
        ruler, scores = Ruler(World(frames, PIXELS, modes="few")), {"here": {}, "published": {}}
        for seed in tqdm(range(20_000, 20_000 + draws), desc="draws", disable=None):
            for name, weights in (("here", mine), ("published", theirs)):
                net = network(blocks)
                net.load_state_dict(weights)
                score = scored(net, ruler, frames, seed)
                scores[name][seed] = {key: score[key] for key in SCORES}
        apart = {key: difference(scores["here"], scores["published"], key) for key in SCORES}
        says = verdict({"total": apart["total"]}, {"total": 1}, {"total": 0.01})
        found |= {"agree": says in ("level", "inconclusive"), "here - published": apart, **scores}
    write_json(out / "again.json", found)
    print(json.dumps({key: value for key, value in found.items() if key not in ("here", "published")}, indent=1))
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--frames", type=int, default=8, help="frames of a clip: 8 (default) or 12")
    p.add_argument("--blocks", type=int, default=NETWORK["depth"], help="blocks of the network: 6 (default) or 3")
    p.add_argument("--out", default="", help="output folder (default: runs/video_teacher/<name>)")
    p.add_argument("--updates", type=int, default=0, help="updates (default: the recipe's)")
    p.add_argument("--compare", action="store_true", help="score the finished teacher of --out and the published one")
    p.add_argument("--every", type=int, default=2500, help="updates between two scores (default: 2500)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    name = name_of(args.frames, args.blocks)
    if name not in RECIPES:
        p.error(f"there is no recipe {name}; choose one of {', '.join(RECIPES)}.")
    recipe, out = RECIPES[name], Path(args.out or f"runs/video_teacher/{name}")
    recipe = {**recipe, "updates": args.updates or recipe["updates"]}
    run = compare if args.compare else lambda *of: train(*of, recipe, args.every)
    return command("video_teacher", lambda: run(out, args.frames, args.blocks))


if __name__ == "__main__":
    sys.exit(main())
