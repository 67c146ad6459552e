"""explore.html: tiny videos as a page that one plays with, in a browser, without a network or a server.

For each of the 30 prompts every model makes the same few samples, from the same noise; the page plays them in step and
shows what the ruler says of each clip. `measure` samples and judges, `write` packs the clips, as grey values of 8 bits,
into the template explore_video.html.

    python -m toys.explore_video    # the page of the run that results/ shows, from its weights (under a minute)
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import tmd_minimal as tmd
from settings import command
from toys import pages
from toys.moving_shapes import MOTIONS, SHADES, SHAPES, decode
from toys.tiny_video import PROMPTS, VideoLadder, published

SEEDS = 4  # samples of a prompt; the ruler needs four to judge diversity
TEACHER_STEPS, INNER = (50, 4, 1), (1, 2, 4, 8)
LEVELS = 4  # grey values are rounded to multiples of it: unseen, and packs twice as small
PUBLISHED = Path(__file__).resolve().parents[1] / "results/toy_video"
TEMPLATE = Path(__file__).with_suffix(".html")


def measure(ladder: VideoLadder, teacher, students: dict, samples: dict | None = None) -> tuple[dict, dict]:
    """What the page shows, {"views": {key: cost, scores of each clip, means}, ...}, and {key: clips (n, 1, T, H, W)}.

    students: {"dmd2v": ..., "stage1": ... or None, "tmd": ...}; samples: what the run has sampled already, as
    Record.samples holds it. Clip i has the prompt i % 30 and the noise i // 30.
    """
    cfg, n, samples, views, clips = ladder.cfg, SEEDS * len(PROMPTS), samples or {}, {}, {}
    calls = 1 if cfg.guidance == 1 else 2  # guidance runs the teacher twice a step
    inner = pages.possible({*INNER, cfg.N}, cfg.inner_shift)
    rows = [("data", None, "data", lambda: ladder.x)]  # key, cost, name in samples, how to sample
    for steps in TEACHER_STEPS:
        sampler = partial(ladder.teacher_samples, teacher, steps, n)
        rows.append((f"teacher/{steps}", float(calls * steps), f"teacher_{steps}", sampler))
    for name, student in students.items():
        plain = name == "dmd2v"
        for N in () if student is None else (1,) if plain else inner:
            how = cfg.student_config(N=1, H=0) if plain else cfg.student_config(N=N)
            nfe, sampler = (
                tmd.effective_nfe(cfg.M, N, how.H, cfg.depth),
                partial(ladder.student_samples, student, how, n),
            )
            # at M > 1 the noise of a later transition depends on how many samples are drawn at once
            drawn = name if (plain or N == cfg.N) and cfg.M == 1 else ""
            rows.append((name if plain else f"{name}/{N}", nfe, drawn, sampler))
    for key, nfe, name, sampler in tqdm(rows, desc="explore.html", disable=None):
        x = samples[name] if name in samples else sampler()
        views[key] = {"nfe": nfe, **scored(ladder, x, n)}
        clips[key] = x[:n].float().cpu()
    trained = {name: getattr(cfg, name) for name in ("M", "N", "frames", "pixels")}
    words = {"shade": SHADES, "shape": SHAPES, "motion": MOTIONS}
    return {"words": words, "prompts": PROMPTS, "N": inner, "trained": trained, "views": views}, clips


def scored(ladder: VideoLadder, x: torch.Tensor, n: int) -> dict:
    """The ruler on the first n clips: {"clips": [quality, semantic, motion, the prompt read] of each, "means"}."""
    c = ladder.c[:n]
    each = {name: v[:n] for name, v in ladder.judged(x).items()}
    diversity = ladder.ruler.diversity(each, c).values()
    keys = ("quality", "semantic", "motion")
    read = [PROMPTS.index(decode(prompt)) for prompt in each["prompt"].cpu()]
    rows = [[*(round(v, 3) for v in row), i] for row, i in zip(torch.stack([each[k] for k in keys], 1).tolist(), read)]
    means = {key: each[key].mean().item() for key in keys} | {"diversity": sum(diversity) / len(diversity)}
    return {"clips": rows, "means": means}


def packed(clips: dict[str, torch.Tensor], seeds: int, shrink: int) -> tuple[dict, pages.Pack]:
    """{"seeds", "pixels", "starts": {key: where its clips begin}} and the clips, as grey values from 0 to 255."""
    pack, starts, side = pages.Pack("u1"), {}, 0
    for key, x in clips.items():
        x = x[: seeds * len(PROMPTS), 0]
        x = F.avg_pool2d(x, shrink) if shrink > 1 else x
        grey = ((x.clamp(-1, 1) + 1) * 127.5 / LEVELS).round() * LEVELS
        starts[key], side = pack.add(grey.clamp_max(255)), x.shape[-1]
    return {"seeds": seeds, "pixels": side, "starts": starts}, pack


def write(folder: Path, ladder: VideoLadder, teacher, students: dict, samples: dict | None = None) -> Path:
    """Measure and write folder/explore.html, one file of at most 3 MB; returns its path.

    Clips too large for that are shown for fewer noises, then with fewer pixels.
    """
    facts, clips = measure(ladder, teacher, students, samples)
    side, least = facts["trained"]["pixels"], 8
    ways = [(seeds, 1) for seeds in (SEEDS, 2, 1)] + [(1, k) for k in (2, 4, 8, 16) if side // k >= least]
    for seeds, shrink in ways:
        more, pack = packed(clips, seeds, shrink)
        if len(text := pack.base64()) < 0.93 * pages.LIMIT:
            break
    return pages.write(folder / "explore.html", TEMPLATE, {**facts, **more}, text)


def main() -> None:
    """The page of the run that results/ shows."""
    torch.set_num_threads(1)
    ladder, found = published()
    print(write(PUBLISHED, ladder, found.pop("teacher"), found))


if __name__ == "__main__":
    sys.exit(command("toys.explore_video", main))
