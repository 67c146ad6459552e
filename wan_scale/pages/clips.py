"""Two folders of samples, clip by clip: the same prompts, seeds, sizes and lengths, or a sentence on which differ.

Folders are those of `sample`, or another method's mp4s under the same names, prompt-number.mp4.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from wan_scale.data.files import file_sha256, read_json
from wan_scale.data.prompts import read_prompts
from wan_scale.pictures import check_seal, comment_of, needs_ffmpeg
from wan_scale.sampling.sample import PROMPTS, file_name
from wan_scale.sampling.vbench import check_marks

PLAYED = ("h264", "vp8", "vp9", "av1")  # what every browser plays from an mp4, in 4:2:0


class Clip(NamedTuple):
    """What is compared of a clip; frames by its header."""

    path: Path
    seed: str  # "" where the file does not tell
    size: tuple[int, int]
    frames: int
    seconds: float
    sha256: str
    codec: str


class Pair(NamedTuple):
    """One prompt and seed, by both methods."""

    name: str  # of both files
    prompt: str
    seed: str
    a: Clip
    b: Clip


def pairs(a: str | Path, b: str | Path, prompts: str = "") -> list[Pair]:
    """The clips of two folders, in the order of their names.

    prompts: a prompt file, for folders that do not tell the prompts that were cut in their files' names.
    RAISES ValueError or RuntimeError, in one sentence, for folders that do not compare or clips that do not play.
    """
    a, b = Path(a), Path(b)
    if a.resolve() == b.resolve():
        raise ValueError(f"{a} and {b} are one folder; give the samples of two methods.")
    files = {folder: named(folder) for folder in (a, b)}
    for one, other in ((a, b), (b, a)):
        if lone := sorted(files[one].keys() - files[other].keys()):
            raise ValueError(
                f"{listed(lone)} of {one} {'is' if len(lone) == 1 else 'are'} not in {other}; "
                "sample both with the same prompts, or move the rest away."
            )
    needs_ffmpeg()
    for folder in (a, b):
        check_marks(folder)  # an mp4 of another maker would be judged as this one's
    words, found = told(a, b, prompts), []
    for name in sorted(files[a]):
        one, other = clip(files[a][name]), clip(files[b][name])
        if one.seed and other.seed and one.seed != other.seed:
            seeds = f"{one.seed} in {a} and {other.seed} in {b}"
            raise ValueError(f"{name} has seed {seeds}; sample both with the same --seed, so that they compare.")
        if one.size != other.size:
            raise ValueError(f"{name} is {by(one.size)} in {a} and {by(other.size)} in {b}; sample both at one size.")
        if one.frames != other.frames or abs(one.seconds - other.seconds) > 0.02:
            lengths = (f"{c.frames} frames in {c.seconds:.2f} s in {f}" for c, f in ((one, a), (other, b)))
            raise ValueError(f"{name} has {' and '.join(lengths)}; sample both with the same --frames and rate.")
        found.append(Pair(name, prompt_of(name, words, a), one.seed or other.seed, one, other))
    if all(pair.a.sha256 == pair.b.sha256 for pair in found):
        raise ValueError(f"{a} and {b} hold the same clips, byte by byte; give the samples of two methods.")
    return found


def named(folder: Path) -> dict[str, Path]:
    """The mp4s of a folder by name; ValueError if there are none or one is not named prompt-number.mp4."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a folder of mp4s, such as OUT/samples/tmd.")
    files = {f.name: f for f in folder.glob("*.mp4") if not f.name.startswith(".")}  # hidden: left by a kill
    if not files:
        raise ValueError(f"{folder} holds no mp4; sample some prompts into it first.")
    if odd := sorted(name for name in files if not re.fullmatch(r".+-\d+\.mp4", name, re.DOTALL)):
        raise ValueError(f"{listed(odd)} of {folder} should be named prompt-number.mp4; rename or move such files.")
    return files


def clip(path: Path) -> Clip:
    """A clip by its header; RuntimeError if it is damaged or no browser plays it."""
    from imageio_ffmpeg import read_frames

    comment = comment_of(path)
    if comment is None:
        raise RuntimeError(f"{path} is not a whole mp4; delete it and sample it again.")
    check_seal(path)
    try:
        reader = read_frames(str(path))
        about = next(reader)
        reader.close()
    except (OSError, RuntimeError, StopIteration) as e:
        raise RuntimeError(f"{path} is not a readable video; delete it and sample it again.") from e
    codec, pixels = about["codec"], about["pix_fmt"].split("(")[0]
    if codec not in PLAYED or pixels not in ("yuv420p", "yuvj420p"):
        convert = "`ffmpeg -i IN.mp4 -c:v libx264 -pix_fmt yuv420p OUT.mp4`"
        raise RuntimeError(f"{path} is {codec} in {pixels}, which browsers do not play; convert it with {convert}.")
    seed = re.match(r"seed (\d+)(?:,|$)", comment)  # marks may follow it (vbench.label)
    frames = round(about["fps"] * about["duration"])
    told = path, seed[1] if seed else "", about["source_size"], frames, about["duration"]
    return Clip(*told, file_sha256(path), codec)


def told(a: Path, b: Path, prompts: str) -> dict[str, str]:
    """{file name without its number: prompt}, from the folders and from a prompt file."""
    found = {}
    for folder in (b, a):
        if (path := folder / PROMPTS).exists():
            mine = {name.rpartition("-")[0]: str(prompt) for name, prompt in read_json(path).items()}
            # one name for two texts: VBench's, of which a model may have read another's words
            if other := sorted(stem for stem in mine.keys() & found.keys() if mine[stem] != found[stem]):
                raise ValueError(f"{listed(other)}: {a} was sampled with other words than {b}; sample both alike.")
            found |= mine
    if prompts:
        found |= {file_name(record["prompt"]): record["prompt"] for record in read_prompts(prompts, numbered=False)}
    return found


def prompt_of(name: str, words: dict[str, str], folder: Path) -> str:
    """The prompt of a file; ValueError where the name holds a part of it alone."""
    stem = name.rpartition("-")[0]
    if stem not in words and re.search(r"-[0-9a-f]{8}$", stem):  # file_name has cut it
        raise ValueError(f"the prompt of {name} in {folder} is not known whole; give the prompt file with --prompts.")
    return words.get(stem, stem)


def listed(names: list[str]) -> str:
    """The first names of many, in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
