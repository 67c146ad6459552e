"""VBench 1.0 around the student: which videos to sample, under which names, and its 16 results as three numbers.

VBench itself runs elsewhere: its networks are large. The way there and back, where `folder` holds all clips:

    # each dimension of QUALITY and SEMANTIC but temporal_flickering
    vbench evaluate --videos_path folder --dimension subject_consistency
    # from VBench's repository: keeps clips that stand still
    python static_filter.py --videos_path folder
    vbench evaluate --videos_path filter_results/filtered_videos --dimension temporal_flickering

Every run leaves a `*_eval_results.json`; `aggregate(read_results("evaluation_results"))` gives quality, semantic and
total. Three traps:

- Results from `--mode=custom_input` are for other prompts and do not compare.
- The paper's models, like Wan2.1 itself, read rewritten, longer prompts (A.4: by Qwen2.5-7B-Instruct), while files keep
  the short names: see read_rewritten.
- VBench's README asks for VBench-Long on clips of 5.0 s and more. Wan's 81 frames at 16 fps last 5.06 s; the paper
  names VBench.
"""

from __future__ import annotations

import hashlib
import json
import math
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from wan_scale.data.files import read_json
from wan_scale.pictures import comment_of

# dimension: (min, max, weight). A raw score in [0, 1] counts as (score - min) / (max - min), not clamped, so it may
# leave [0, 1].
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = QUALITY | SEMANTIC
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1

# The paper's Tables 1 and 2: method, effective NFE, total, quality, semantic. One row is misprinted there: (4 quality +
# semantic) / 5 of DMD2-v at 4 on 1.3B is 84.80, not 84.60.
PAPER = {
    "1.3B": [
        ("Wan2.1, 50 steps, guided", 100, 84.26, 85.30, 80.09),
        ("rCM", 4, 84.43, 85.38, 80.63),
        ("DMD2-v", 4, 84.60, 86.03, 79.87),
        ("DMD2-v", 3, 84.48, 85.71, 79.58),
        ("TMD N4H5", 3.00, 84.67, 85.72, 80.47),
        ("TMD N2H5", 2.33, 84.68, 85.71, 80.55),
        ("rCM", 2, 84.09, 84.90, 80.86),
        ("DMD2-v", 2, 84.39, 85.65, 79.32),
        ("TMD N4H5", 1.50, 83.79, 85.03, 78.83),
        ("TMD N2H5", 1.17, 83.80, 85.07, 78.69),
        ("rCM", 1, 82.65, 83.60, 78.82),
        ("DMD2-v", 1, 83.24, 84.28, 79.10),
    ],
    "14B": [
        ("Wan2.1, 50 steps, guided", 100, 86.22, 86.67, 84.44),
        ("rCM", 4, 84.92, 85.43, 82.88),
        ("DMD2-v", 4, 84.52, 85.37, 81.11),
        ("TMD N4H5", 2.75, 84.62, 85.09, 82.72),
        ("rCM", 2, 85.05, 85.57, 82.95),
        ("DMD2-v", 2, 84.79, 85.78, 80.83),
        ("TMD N4H5", 1.38, 84.24, 84.89, 81.65),
        ("rCM", 1, 83.02, 83.57, 80.81),
        ("DMD2-v", 1, 83.69, 84.46, 80.61),
    ],
}


# ---------------------------------------------------------------- what to sample


class Video(NamedTuple):
    """One clip to sample: the text the model reads, its number, its file name and its seed."""

    prompt: str
    index: int
    name: str
    seed: int


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a UTF-8 file that exists.") from error


def _load(path: Path):
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or compute it again.") from error


def read_prompts(full_info_json: str | Path) -> list[dict]:
    """VBench's `VBench_full_info.json` as it is: a list of {"prompt_en", "dimension": [names], ...}.

    The official file has 946 rows and 944 different prompts. ValueError on another layout or an unknown dimension.
    """
    path = Path(full_info_json)
    records = _load(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} is not a list of prompts; use VBench's VBench_full_info.json.")
    for i, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        prompt, dimensions = record.get("prompt_en"), record.get("dimension")
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(dimensions, list) or not dimensions:
            lacks = f'row {i} of {path} has no "prompt_en" text or no "dimension" list'
            raise ValueError(f"{lacks}; use VBench's VBench_full_info.json.")
        if unknown := [d for d in dimensions if d not in DIMENSIONS]:
            raise ValueError(
                f"row {i} of {path} names {unknown[0]!r}, which VBench 1.0 does not have; use the file of version 1.0."
            )
    return records


def read_rewritten(plain_txt: str | Path, rewritten_txt: str | Path) -> dict[str, str]:
    """Prompt -> the longer text the model reads instead, from two files with a prompt a line in the same order.

    VBench's pair for Wan2.1 is `prompts/all_dimension.txt` and, by Qwen2.5-3B-Instruct,
    `prompts/augmented_prompts/Wan2.1-T2V-1.3B/all_dimension_aug_wanx_seed42.txt`. ValueError if they do not pair up.
    """
    # split at "\n" alone: splitlines() would also cut at the rarer line separators inside a text
    plain, rewritten = (_text(p).strip("\n").split("\n") for p in (plain_txt, rewritten_txt))
    if len(plain) != len(rewritten):
        lines = f"{plain_txt} has {len(plain)} lines and {rewritten_txt} has {len(rewritten)}"
        raise ValueError(f"{lines}; they must pair up line by line.")
    if empty := [i for i, (a, b) in enumerate(zip(plain, rewritten), 1) if not a.strip() or not b.strip()]:
        raise ValueError(f"line {empty[0]} of {plain_txt} or {rewritten_txt} is empty; every prompt needs its text.")
    return {a.strip(): b.strip() for a, b in zip(plain, rewritten)}


def plan_videos(
    records: list[dict], samples: int = 5, flickering_samples: int = 25, rewritten: dict[str, str] | None = None
) -> list[Video]:
    """Every clip VBench wants, in the order of the records, rows of the same prompt merged.

    The name is the literal prompt, `{prompt}-{index}.mp4`: VBench finds clips by it. The seed depends on that name
    alone, so any rank, any order and any later run draw the same noise. Prompts of temporal_flickering get more
    samples, for VBench's filter to find five that stand still. Two of VBench's prompts differ in a capital letter
    alone; where file names ignore case one is left, which VBench accepts. ValueError for a prompt that cannot be a file
    name (none of VBench's is one) or that has no rewritten text.
    """
    if samples < 1 or flickering_samples < 1:
        raise ValueError(
            f"samples is {samples} and flickering_samples is {flickering_samples}; both must be at least 1."
        )
    wanted = {}
    for record in records:
        n = flickering_samples if "temporal_flickering" in record["dimension"] else samples
        wanted[record["prompt_en"]] = max(n, wanted.get(record["prompt_en"], 0))
    if rewritten is not None and (absent := [p for p in wanted if p.strip() not in rewritten]):
        none = f"{len(absent)} of {len(wanted)} prompts have no rewritten text, the first is {absent[0]!r}"
        raise ValueError(f"{none}; pair the right files.")
    videos = []
    for prompt, n in wanted.items():
        for index in range(n):
            name = f"{prompt}-{index}.mp4"
            if "/" in name or "\0" in name or len(name.encode()) > 255:
                no_file = f"the prompt {prompt!r} cannot be a file name, and VBench finds clips by it"
                raise ValueError(f"{no_file}; take it out of the list.")
            # 48 bits: exact in JSON, no two alike in practice
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
            videos.append(Video(prompt if rewritten is None else rewritten[prompt.strip()], index, name, seed))
    return videos


def missing(folder: str | Path, planned: list[Video], made: dict) -> list[Video]:
    """The planned clips that `folder` does not hold whole, or holds from another seed, text or maker."""
    return [video for video in planned if comment_of(Path(folder) / video.name) != label(video, made)]


def label(video: Video, made: dict) -> str:
    """An mp4's comment: its seed, and marks of the text it was made of, of what made it (made.json) and of its name."""
    text = hashlib.sha256(video.prompt.encode()).hexdigest()[:8]
    return f"seed {video.seed}, text {text}, made {mark(video.name, made)}"


def mark(name: str, made: dict) -> str:
    """What binds an mp4 to its name and to made.json of its folder."""
    return hashlib.sha256(json.dumps([name, made], sort_keys=True).encode()).hexdigest()[:16]


def check_marks(folder: str | Path) -> dict:
    """made.json of a folder ({} if there is none), if it made the mp4s that bear a mark; others' mp4s pass.

    RuntimeError naming an mp4 that was made by another, or under another name.
    """
    path = Path(folder) / "made.json"
    made = read_json(path) if path.exists() else {}
    for video in sorted(Path(folder).glob("*.mp4")):
        _, marked, found = (comment_of(video) or "").partition(", made ")
        if marked and found != mark(video.name, made):
            other = f"{video} was not made as {path} says, or under another name"
            raise RuntimeError(f"{other}; put it back where it was made, or delete it and sample it again.")
    return made


# ---------------------------------------------------------------- what came back


def read_results(folder: str | Path) -> dict[str, float]:
    """Dimension -> raw score, from all `*_eval_results.json` of a folder.

    A file is {dimension: [score, videos]} of one dimension or more. ValueError if there is no such file, if one has
    another layout, or if two give different scores for a dimension.
    """
    folder, found, source = Path(folder), {}, {}
    files = sorted(folder.glob("*_eval_results.json"))
    if not files:
        raise ValueError(f"{folder} holds no *_eval_results.json; give the folder that VBench wrote its results to.")
    for path in files:
        content = _load(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a VBench result (an object from dimension to [score, videos]); remove it.")
        for name, value in content.items():
            if not isinstance(value, list) or not value or not isinstance(value[0], Real):
                raise ValueError(f"{name!r} in {path} is not [score, videos]; evaluate that dimension again.")
            name, score = name.replace(" ", "_"), float(value[0])
            if name in found and found[name] != score:
                both = f"{source[name]} says {name} = {found[name]:g} and {path} says {score:g}"
                raise ValueError(f"{both}; remove the one that is out of date.")
            found[name], source[name] = score, path
    return found


def aggregate(results: dict[str, float]) -> dict:
    """VBench's three numbers, on the paper's scale of 0 to 100, from the 16 raw scores in [0, 1].

    quality and semantic are weighted means of the normalised scores, total = (4 quality + semantic) / 5; names may have
    underscores or spaces. Returns {"total", "quality", "semantic", "normalised": {dimension: value}}. ValueError names
    every score that is wrong.
    """
    scores = {name.replace(" ", "_"): value for name, value in results.items()}
    wrong = [f"{name} (missing)" for name in DIMENSIONS if name not in scores]
    wrong += [f"{name} (unknown)" for name in scores if name not in DIMENSIONS]
    wrong += [f"{name} = {scores[name]}" for name in DIMENSIONS if name in scores and not _is_score(scores[name])]
    if len(scores) < len(results):
        wrong.append("a dimension spelled in two ways")
    if wrong:
        raise ValueError(
            f"VBench's total needs its 16 dimensions, each once and in [0, 1]; put right: {', '.join(wrong)}."
        )
    normal = {name: 100 * (scores[name] - low) / (high - low) for name, (low, high, _) in DIMENSIONS.items()}
    quality, semantic = (
        sum(w * normal[name] for name, (_, _, w) in group.items()) / sum(w for _, _, w in group.values())
        for group in (QUALITY, SEMANTIC)
    )
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"total": total, "quality": quality, "semantic": semantic, "normalised": normal}


def _is_score(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1


def compare(scores: dict, method: str = "this run", nfe: float | None = None, size: str | None = None) -> str:
    """Markdown tables of the paper's numbers, most evaluations first, with `scores` (from aggregate) in bold.

    `size` "1.3B" or "14B" shows that table alone; without it both. Without `nfe` the row stands last. ValueError for
    another size.
    """
    if size is not None and size.upper() not in PAPER:
        raise ValueError(f"size is {size!r}; the paper has tables for {' and '.join(PAPER)}.")
    own = (method, nfe, scores["total"], scores["quality"], scores["semantic"])
    text = []
    for name in PAPER if size is None else [size.upper()]:
        # stable: ours after its equals
        rows = sorted([*PAPER[name], own], key=lambda row: math.inf if row[1] is None else -row[1])
        text += [f"Wan2.1 {name}, VBench", "", "| method | NFE | total | quality | semantic |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [row[0], "–" if row[1] is None else f"{row[1]:.4g}", *(f"{x:.2f}" for x in row[2:])]
            text.append(f"| {' | '.join(f'**{cell}**' for cell in cells) if row is own else ' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)
