"""Scores of generated clips that need no network and no download.

They see collapse early; they do not judge beauty or the prompt. The paper met a mode collapse that VBench's scores did
not show (note at Table 5), so look at these as well as at VBench. `MEANING` says what each should do.

Only temporal_flickering is VBench's, computed as VBench does: (255 - mean |frame difference|) / 255 on 8-bit frames.
But VBench reads it on its 75 static prompts, after a filter that drops clips which move. On any other folder it is not
that dimension's score. The decoder may also differ from VBench's by a grey level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from wan_scale.pictures import read_video

# score: (unit, what it should do)
MEANING = {
    "temporal_flickering": (
        "0 to 1",
        "near the teacher's on static prompts; 1 is no change at all, so on other prompts a high value is no merit",
    ),
    "motion": (
        "0 to 1",
        "near the teacher's; mean |frame difference| = 1 - temporal_flickering; falls towards 0 when clips freeze",
    ),
    "still": (
        "share of frame pairs",
        "near the teacher's; pairs that differ by under half a grey level; towards 1 is static collapse",
    ),
    "clipped": (
        "share of values",
        "near the teacher's; values at black or white; a rise is over-saturation, the usual sign of too much guidance",
    ),
    "colourfulness": (
        "0 grey, 109 extreme",
        "near the teacher's; Hasler and Süsstrunk (2003); a steady rise over training is over-saturation",
    ),
    "diversity": (
        "0 to 1",
        "near the teacher's; root mean square distance between the seeds of a prompt; a fall is mode collapse",
    ),
}
HALF_LEVEL = 0.5 / 255
END = 2.5 / 255  # chroma subsampling and limited range move black and white by a level or two


def _check(video: torch.Tensor) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or not video.numel() or not video.is_floating_point():
        raise ValueError(
            f"a clip is floats of shape (frames, height, width, 3), not {video.dtype} of {tuple(video.shape)}."
        )
    low, high = video.aminmax()
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(
            f"a clip's values must lie in [0, 1], these go from {low.item():.3g} to {high.item():.3g}; rescale it."
        )


def score_clip(video: torch.Tensor) -> dict[str, float | None]:
    """All scores of one clip, video (T, H, W, 3) in [0, 1]; see MEANING. Those of motion are None for one frame.

    Frame by frame, so that a long clip needs no second copy.
    """
    _check(video)
    changes = [(after.float() - before.float()).abs().mean() for before, after in pairwise(video)]
    change = torch.stack(changes).double() if changes else None  # (T - 1,)
    clipped = torch.stack([((frame < END) | (frame > 1 - END)).float().mean() for frame in video])
    return {
        "temporal_flickering": 1 - change.mean().item() if changes else None,
        "motion": change.mean().item() if changes else None,
        "still": (change < HALF_LEVEL).double().mean().item() if changes else None,
        "clipped": clipped.mean().item(),
        "colourfulness": float(np.mean([colourfulness(frame) for frame in video])),
    }


def colourfulness(frame: torch.Tensor) -> float:
    """Hasler and Süsstrunk's measure of a frame (H, W, 3) in [0, 1].

    0 is grey, 15 slightly, 45 averagely, 109 extremely colourful.
    """
    r, g, b = (255 * frame.float()).unbind(-1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var(correction=0) + yb.var(correction=0)).sqrt()
    return (spread + 0.3 * (rg.mean().square() + yb.mean().square()).sqrt()).item()


def diversity(clips: Iterable[torch.Tensor]) -> float | None:
    """Root mean square distance a value between two of the clips (T, H, W, 3) in [0, 1], over all pairs.

    None for fewer than two clips.

    Pixels, not meaning: a mirrored copy counts as different. One pass (Welford), so the clips may come from a
    generator.
    """
    n, mean, squares = 0, None, 0.0
    for n, clip in enumerate(clips, 1):
        _check(clip)
        if mean is None:
            mean = torch.zeros_like(clip, dtype=torch.float32)
        if clip.shape != mean.shape:
            shapes = f"{tuple(mean.shape)} and {tuple(clip.shape)}"
            raise ValueError(f"clips of shapes {shapes} have no distance; sample all seeds at one size.")
        for frame, average in zip(clip.float(), mean):
            off = frame - average
            average += off / n  # a view: this updates `mean`
            squares += (off * (frame - average)).mean().item() / len(clip)
    return (2 * squares / (n - 1)) ** 0.5 if n > 1 else None  # the mean over pairs of |a - b|^2 is twice the variance


def score_folder(folder: str | Path) -> dict:
    """Scores of all `{prompt}-{index}.mp4` of a folder; each is decoded once, one clip in memory at a time.

    Returns {"videos": {name: scores}, "prompts": {prompt: {"samples", "diversity"}}, "mean": means(...)}, ready for
    JSON. ValueError for no clip or a wrong name, RuntimeError for a broken one or seeds of different sizes.
    """
    folder, prompts = Path(folder), {}
    for path in sorted(folder.glob("*.mp4")):
        if path.name.startswith(".") and path.name.endswith(".tmp.mp4"):  # left by a kill
            continue
        named = re.fullmatch(r"(.+)-(\d+)\.mp4", path.name, re.DOTALL)
        if not named:
            raise ValueError(f"{path} is not named prompt-index.mp4, as VBench wants it; rename it or move it away.")
        prompts.setdefault(named[1], []).append(path)
    if not prompts:
        raise ValueError(f"{folder} holds no mp4; sample some prompts into it first.")
    videos, diversities = {}, {}

    def decoded(paths):
        """Clips for diversity(), each scored on its way."""
        for path in paths:
            clip = read_video(path)
            videos[path.name] = score_clip(clip)
            yield clip

    for prompt, paths in prompts.items():
        try:
            diversities[prompt] = diversity(decoded(paths))
        except ValueError as e:
            raise RuntimeError(f"{folder}, {prompt!r}: {e}") from e
    found = {
        "videos": videos,
        "prompts": {prompt: {"samples": len(prompts[prompt]), "diversity": d} for prompt, d in diversities.items()},
    }
    return {**found, "mean": means(found, list(prompts))}


def means(found: dict, prompts: list[str], diverse: list[str] | None = None) -> dict[str, float | None]:
    """Each score's mean over `prompts`, of each its clips' mean; None where no clip has it.

    Diversity is averaged over `diverse` (default: those of `prompts` with two samples or more).
    """
    clips = {}
    for name, scores in found["videos"].items():
        clips.setdefault(name.rpartition("-")[0], []).append(scores)
    mean = lambda values: float(np.mean(known)) if (known := [v for v in values if v is not None]) else None
    of_clips = [score for score in MEANING if score != "diversity"]
    result = {score: mean(mean(clip[score] for clip in clips[p]) for p in prompts) for score in of_clips}
    diverse = prompts if diverse is None else diverse
    return {**result, "diversity": mean(found["prompts"][p]["diversity"] for p in diverse)}
