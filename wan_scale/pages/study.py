"""`compare A B`: a blind two-alternative forced choice over the clips of two folders, as pages that open from disk.

    OUT/blind/               hand this folder to the raters: index.html and clips under neutral names, no key
    OUT/side-by-side.html    the same clips with the methods' names: not for raters
    OUT/key.json             which clip is whose; tally.py needs it

The raters send back answers-NAME.json, and `compare --tally` joins them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

from wan_scale.data.files import atomic, writing
from wan_scale.pages import clips
from wan_scale.training import kept

HERE = Path(__file__).parent
# The paper's two questions: name, what is asked, what to look at.
QUESTIONS = (
    ("visual quality", "Which clip looks better?", "Sharpness, natural motion, no artefacts. Never mind the prompt."),
    ("prompt alignment", "Which clip shows the prompt better?", "What it names, how it looks and what it does."),
)
KEY = "key.json"


def write(a: str | Path, b: str | Path, out: str | Path, seed: int = 0, prompts: str = "") -> str:
    """Make OUT from two folders of samples; returns what to do with it.

    Order, sides and names come from the seed and from the clips' own bytes, which the raters do not have: so who
    knows the seed and this code cannot tell the sides from the page. Each method stands first in half of the pairs
    (one more of one of them where their number is odd).
    RAISES ValueError or RuntimeError, in one sentence; then nothing is written, and an OUT that holds files stays.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        holds = "a study" if (out / KEY).exists() else "other files"
        raise RuntimeError(f"{out} holds {holds} already; give another --out, or move it away.")
    found = clips.pairs(a, b, prompts)
    a_name, b_name = names(Path(a), Path(b))
    digests = [(pair.name, pair.prompt, pair.a.sha256, pair.b.sha256) for pair in found]
    secret = hashlib.sha256(json.dumps([seed, digests]).encode()).hexdigest()
    draw = random.Random(secret)
    draw.shuffle(found)
    first = sides(len(found), draw)
    study = hashlib.sha256(f"study {secret}".encode()).hexdigest()[:12]
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            (temporary / "blind" / "clips").mkdir(parents=True)
            shown, key = [], []
            for i, (pair, a_first) in enumerate(zip(found, first)):
                # not of `draw`: many of its numbers would tell the others
                places = [f"clips/{neutral_name(secret, i, n)}.mp4" for n in (1, 2)]
                of_a, of_b = places if a_first else places[::-1]
                # copied by side, so that not even the order of writing tells
                for place in places:
                    neutral(pair.a if place == of_a else pair.b, temporary / "blind" / place)
                shown.append({"prompt": pair.prompt, "clips": places})
                told = {"file": pair.name, "prompt": pair.prompt, "seed": pair.seed}
                key.append({"pair": i, "A is clip": 1 if a_first else 2, **told, "A": of_a, "B": of_b})
            facts = {"study": study, "pairs": shown, "questions": QUESTIONS}
            page("blind.html", temporary / "blind" / "index.html", facts)
            named = {"names": [a_name, b_name], "folders": [str(a), str(b)]}
            rows = [{**row, "A": f"blind/{row['A']}", "B": f"blind/{row['B']}"} for row in key]
            rows.sort(key=lambda row: row["file"])
            page("side_by_side.html", temporary / "side-by-side.html", {**named, "pairs": rows})
            kept.write(temporary / KEY, {"study": study, **named, "random seed": seed, "pairs": key})
            os.rename(temporary, out)  # onto an empty folder at most
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return (
        f"{len(found)} pairs of {a_name} and {b_name} in {out}\n"
        f"  {out / 'blind'}: hand this folder to the raters; they open index.html and send back answers-NAME.json\n"
        f"  {out / 'side-by-side.html'}: the same clips with names, for you\n"
        f"  {out / KEY}: keep it from the raters\n"
        f"then: python wan_scale/run.py compare --tally answers-*.json --out {out}"
    )


def sides(n: int, draw: random.Random) -> list[bool]:
    """Whether A is clip 1 of each of n pairs: in half of them, or by chance one more or less."""
    more = draw.random() < 0.5  # matters where n is odd
    first = [(i % 2 == 0) == more for i in range(n)]
    draw.shuffle(first)
    return first


def names(a: Path, b: Path) -> tuple[str, str]:
    """What to call the methods: the ends of their paths, as long as it takes to tell them apart."""
    one, other = a.resolve().parts[1:], b.resolve().parts[1:]
    n = next((n for n in range(1, max(len(one), len(other))) if one[-n:] != other[-n:]), 99)
    return "/".join(one[-n:]), "/".join(other[-n:])


def neutral_name(secret: str, pair: int, clip: int) -> str:
    """Of a file, which tells nothing of the sides."""
    return hashlib.sha256(f"name {secret} {pair} {clip}".encode()).hexdigest()[:16]


def neutral(clip: clips.Clip, target: Path) -> None:
    """The pictures of an mp4, bit for bit, without comment, title, sound, date or its encoder's settings."""
    from imageio_ffmpeg import get_ffmpeg_exe

    bare = ["-map", "0:v:0", "-c", "copy", "-map_metadata", "-1", "-fflags", "+bitexact", "-movflags", "+faststart"]
    if clip.codec == "h264":
        bare += ["-bsf:v", "filter_units=remove_types=6"]  # SEI, where x264 writes its version and settings
    source = clip.path
    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(source.resolve()), *bare, str(target.resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = " ".join(done.stderr.split())[-160:] or f"ffmpeg ended with {done.returncode}"
        raise RuntimeError(f"{source} could not be copied ({why}); see to it, then run the same command again.")
    os.utime(target, (0, 0))  # all alike


def page(template: str, path: Path, facts: dict) -> None:
    """A page from a template of this folder: FACTS as JSON, and the player that both pages use."""
    text = (HERE / template).read_text(encoding="utf-8")
    embedded = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")  # a prompt may hold </script>
    text = text.replace("{{PLAYER}}", (HERE / "player.js").read_text(encoding="utf-8"))
    with atomic(path) as file:
        file.write(text.replace("{{FACTS}}", embedded).encode())
