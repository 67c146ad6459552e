"""`run.py compare`: a study that is blind and balanced, answered by keys in a browser, and tallied as by hand."""

import json
import math
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
from browser import needs_browser, opened

from wan_scale import run
from wan_scale.pages import clips, study, tally
from wan_scale.pictures import comment_of, read_video, write_video
from wan_scale.sampling import vbench
from wan_scale.sampling.sample import file_name

ODD = 'a "red" <b>ball</b></script> & more'
PROMPTS = ["a blue cube", "a cat sits", "a dog, fast", "the sea", "two balls", ODD]
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)


def video(path: Path, colour=RED, frames=33, width=64, comment="seed 7") -> Path:
    """A clip of one colour that slowly gets lighter."""
    light = np.linspace(0.6, 1, frames)[:, None, None, None]
    return write_video(np.ones((frames, 64, width, 3)) * np.array(colour) * light, path, comment=comment)


def facts_of(page: Path) -> dict:
    return json.loads(page.read_text(encoding="utf-8").split("const facts = ", 1)[1].split(";\n", 1)[0])


@dataclass
class World:
    a: Path  # red clips of six prompts
    b: Path  # blue ones
    out: Path  # their study

    @property
    def key(self) -> dict:
        return json.loads((self.out / study.KEY).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    found = World(root / "runs" / "tmd", root / "runs" / "dmd2v", root / "out")
    for folder, colour in ((found.a, RED), (found.b, BLUE)):
        folder.mkdir(parents=True)
        first = video(folder / f"{PROMPTS[0]}-0.mp4", colour)
        for prompt in PROMPTS[1:]:
            shutil.copy(first, folder / f"{file_name(prompt)}-0.mp4")
    told = {f"{file_name(prompt)}-0.mp4": prompt for prompt in PROMPTS}
    (found.a / "prompts.json").write_text(json.dumps(told), encoding="utf-8")
    study.write(found.a, found.b, found.out, seed=3)
    return found


def test_the_study_is_blind(world):
    """Nothing in the raters' folder tells whose a clip is but the picture: names, dates, comments, order, the page."""
    blind = world.out / "blind"
    files = sorted(str(f.relative_to(blind)) for f in blind.rglob("*") if f.is_file())
    assert len(files) == 13 and all(re.fullmatch(r"clips/[0-9a-f]{16}\.mp4|index\.html", f) for f in files)
    page = (blind / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"tmd|dmd2v|seed \d|\.\./|https?://|fetch\(|import\(", page.lower()) and "{{" not in page
    assert page.count("</script>") == 1  # the prompt with one in it did not end the script
    facts = facts_of(blind / "index.html")
    assert sorted(pair["prompt"] for pair in facts["pairs"]) == sorted(PROMPTS)
    assert sorted(clip for pair in facts["pairs"] for clip in pair["clips"]) == files[:12]
    clips = [blind / f for f in files[:12]]
    assert {comment_of(f) for f in clips} == {""} and len({f.stat().st_mtime for f in clips}) == 1
    encoder = b"x264"  # whose version and settings may differ by method
    assert encoder in next(world.a.glob("*.mp4")).read_bytes()
    assert not any(encoder in f.read_bytes() for f in clips)


def test_clips_of_sample_tell_their_seed_and_maker(tmp_path):
    """Seeds that differ are refused, as is a clip that another method made; alike, the pair knows its seed."""
    made = {who: {"student": who} for who in ("tmd", "dmd2v")}

    def labelled(who, seed, maker=None, colour=RED):
        (tmp_path / who).mkdir(exist_ok=True)
        (tmp_path / who / "made.json").write_text(json.dumps(made[who]), encoding="utf-8")
        label = vbench.label(vbench.Video("a", 0, "a-0.mp4", seed), made[maker or who])
        return video(tmp_path / who / "a-0.mp4", colour, frames=5, comment=label)

    labelled("tmd", 7), labelled("dmd2v", 7, colour=BLUE)
    (pair,) = clips.pairs(tmp_path / "tmd", tmp_path / "dmd2v")
    assert pair.seed == pair.a.seed == pair.b.seed == "7"
    labelled("dmd2v", 900)
    with pytest.raises(ValueError, match=r"has seed 7 in .*tmd and 900 in .*dmd2v"):
        clips.pairs(tmp_path / "tmd", tmp_path / "dmd2v")
    labelled("dmd2v", 7, maker="tmd")
    with pytest.raises(RuntimeError, match=r"was not made as .*made.json says"):
        clips.pairs(tmp_path / "tmd", tmp_path / "dmd2v")


def test_the_key_is_right_and_sides_are_balanced(world):
    """The key names the red clip A and the blue one B, wherever they stand; each is clip 1 in three pairs of six."""
    facts = facts_of(world.out / "blind" / "index.html")
    assert facts["study"] == world.key["study"] and world.key["names"] == ["tmd", "dmd2v"]
    pairs = list(zip(world.key["pairs"], facts["pairs"], strict=True))
    for row, pair in pairs:
        assert row["prompt"] == pair["prompt"] and pair["clips"][row["A is clip"] - 1] == row["A"]
    for row, _ in pairs[:3]:  # in three of six both sides would show a wrong one
        frame = {who: read_video(world.out / "blind" / row[who])[0].mean((0, 1)).argmax() for who in "AB"}
        assert frame == {"A": 0, "B": 2}
    assert Counter(row["A is clip"] for row in world.key["pairs"]) == {1: 3, 2: 3}


def test_sides_of_any_number_are_balanced_and_random():
    """A is clip 1 in half of the pairs; of an odd number one more or one less; every order comes up."""
    for n in range(1, 6):
        seen = [tuple(study.sides(n, random.Random(seed))) for seed in range(200)]
        assert {sum(first) for first in seen} == {n // 2, -(-n // 2)}
        assert len(set(seen)) == math.comb(n, n // 2) * (1 + n % 2)
    assert {study.sides(1, random.Random(seed))[0] for seed in range(20)} == {True, False}


def test_the_seed_decides_but_does_not_tell(tmp_path, monkeypatch):
    """The same seed makes the same study, another seed another; other clips under the same seed have other sides, so
    that who knows seed and code but not the clips learns nothing.
    """
    monkeypatch.setattr(study, "neutral", lambda source, target: target.write_bytes(b""))

    def order(name, seed=3, bytes_of=""):
        clip = lambda who, i: clips.Clip(Path(who), "7", (64, 64), 33, 2.06, f"{who}{i}{bytes_of}", "h264")
        pairs = [clips.Pair(f"{i}-0.mp4", str(i), "7", clip("a", i), clip("b", i)) for i in range(12)]
        monkeypatch.setattr(study.clips, "pairs", lambda *args: pairs)
        study.write("a", "b", tmp_path / name, seed=seed)
        rows = json.loads((tmp_path / name / study.KEY).read_text(encoding="utf-8"))["pairs"]
        return [row["prompt"] for row in rows], [row["A is clip"] for row in rows], [row["A"] for row in rows]

    first = order("one")
    assert order("again") == first
    for other in (order("seed", seed=4), order("clips", bytes_of="x")):
        assert all(now != before for now, before in zip(other, first))


def test_names_of_clips_are_none_of_the_draws_that_chose_the_sides(tmp_path, monkeypatch):
    """From some 150 names of 128 random bits on, the generator that made them could be wound back to the sides."""
    monkeypatch.setattr(study, "neutral", lambda source, target: target.write_bytes(b""))
    clip = lambda who, i: clips.Clip(Path(who), "7", (64, 64), 33, 2.06, f"{who}{i}", "h264")
    every = lambda *_: [clips.Pair(f"{i}-0.mp4", str(i), "7", clip("a", i), clip("b", i)) for i in range(12)]
    monkeypatch.setattr(study.clips, "pairs", every)
    sides, names = [], []
    for number in (0, 1):  # whatever the generator draws
        draw = random.Random(number)
        with monkeypatch.context() as patch:
            patch.setattr(study.random, "Random", lambda _, draw=draw: draw)
            study.write("a", "b", tmp_path / str(number))
        rows = json.loads((tmp_path / str(number) / study.KEY).read_text(encoding="utf-8"))["pairs"]
        sides.append([row["A is clip"] for row in rows])
        names.append([sorted((row["A"], row["B"])) for row in rows])
    assert sides[0] != sides[1] and names[0] == names[1]


# ---- in a browser ----


def rate(page, choices: list[tuple[int, int]]) -> None:
    """Answer pair after pair by keys: (visual quality, prompt alignment) each 1 or 2."""
    for quality, alignment in choices:
        for choice, keys in ((quality, "12"), (alignment, ("ArrowLeft", "ArrowRight"))):
            page.wait("player.ready()")
            page.press(keys[choice - 1])


def choices_of(world, quality: str, alignment: str) -> list[tuple[int, int]]:
    """What to press to choose the methods "AABB.." pair by pair."""
    side = lambda row, who: row["A is clip"] if who == "A" else 3 - row["A is clip"]
    return [(side(row, q), side(row, a)) for row, q, a in zip(world.key["pairs"], quality, alignment, strict=True)]


def answers(world, rater: str, quality: str, alignment: str, **more) -> dict:
    """A rater's file, as the page writes it."""
    found = []
    for pair, both in enumerate(choices_of(world, quality, alignment)):
        for (question, *_), choice in zip(study.QUESTIONS, both):
            found.append({"pair": pair, "question": question, "choice": choice, "seconds": 1.0})
    plain = {"study": world.key["study"], "rater": rater, "session": f"of {rater}", "pairs": 6, "answers": found}
    return {**plain, **more}


@needs_browser
def test_a_study_is_answered_by_keys_and_tallied(world, tmp_path, capsys):
    """Six pairs by keys, a reload and an answer taken back in between; two raters' files give the rates of a hand."""
    with opened(world.out / "blind" / "index.html") as page:
        page.click("#rater")
        page.press("A", "d", "a", "Enter")
        choices = choices_of(world, "AAAABB", "AAAAAB")
        rate(page, choices[:2])
        page.call("Page.reload")
        page.wait("document.readyState === 'complete' && typeof player === 'object' && player.ready()")
        assert page.js("document.getElementById('place').textContent") == "Pair 3 of 6, rated by Ada"
        page.press("1")
        page.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Backspace'}))")
        assert page.js("state.answers.length") == 4
        rate(page, choices[2:])
        assert page.js("[finished(), document.getElementById('end').hidden]") == [True, False]
        page.press("1")  # nothing is left to answer
        page.downloads(tmp_path)
        page.click("#end .saves")
        assert page.errors == [] and page.asked == []
        for _ in range(100):
            if (tmp_path / "answers-Ada.json").exists():
                break
            page.js("new Promise((done) => setTimeout(done, 100))")
    found = json.loads((tmp_path / "answers-Ada.json").read_text(encoding="utf-8"))
    assert [a["choice"] for a in found["answers"]] == [choice for both in choices for choice in both]
    (tmp_path / "bo.json").write_text(json.dumps(answers(world, "Bo", "AABBBB", "AAAAAA")), encoding="utf-8")
    shutil.copytree(world.out, tmp_path / "out")
    files = [str(tmp_path / name) for name in ("answers-Ada.json", "bo.json")]
    assert run.main(["compare", "--tally", *files, "--out", str(tmp_path / "out")]) == 0
    by_hand(json.loads((tmp_path / "out" / "tally.json").read_text(encoding="utf-8")))
    told = capsys.readouterr().out
    assert "| visual quality | 50% | 25 to 75% | 6 of 12 | 2 : 2 : 2 | 67% | 0.33 |" in told
    assert "| prompt alignment | 92% | 65 to 99% | 11 of 12 | 5 : 0 : 1 | 83% | -0.09 |" in told
    assert told.count("Fig. 5") == 1 and (tmp_path / "out" / "tally.md").read_text(encoding="utf-8") in told


def by_hand(numbers: dict) -> None:
    """Ada chose A in 4 and 5 pairs of 6, Bo in 2 and 6."""
    quality, alignment = numbers["visual quality"], numbers["prompt alignment"]
    assert (quality["rate"], alignment["rate"]) == (6 / 12, 11 / 12)
    # p = 1/2, n = 12, z = 1.96: 1/2 -+ z / (1 + z^2 / n) sqrt(1 / (4 n) + z^2 / (4 n^2))
    assert quality["interval"] == pytest.approx([0.25378, 0.74622], abs=1e-4)
    assert alignment["interval"] == pytest.approx([0.64612, 0.98513], abs=1e-4)
    assert [quality[k] for k in ("pairs to A", "pairs to B", "ties")] == [2, 2, 2]
    assert quality["agreement"]["alike"] == pytest.approx(4 / 6)
    assert quality["agreement"]["kappa"] == pytest.approx((4 / 6 - 1 / 2) / (1 / 2))
    chance = (11 / 12) ** 2 + (1 / 12) ** 2
    assert alignment["agreement"]["kappa"] == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert [r["rater"] for r in numbers["raters"]] == ["Ada", "Bo"]


@needs_browser
def test_clips_play_in_step(world):
    """Both mp4s play, pause together and begin again together; the page fits a phone; the odd prompt is shown as is."""
    with opened(world.out / "blind" / "index.html") as page:
        page.js("begin('x')")
        page.wait("clips.every((clip) => clip.currentTime > 0.2 && clip.videoWidth === 64)")
        page.press(" ")
        page.wait("clips.every((clip) => clip.paused)")
        before = page.js("clips.map((clip) => clip.currentTime)")
        assert abs(before[0] - before[1]) < 0.3
        page.press("r")
        page.wait("clips.every((clip) => !clip.paused && clip.currentTime > 0.3)")
        page.js("clips.forEach((clip) => { clip.currentTime = 1.9; })")
        page.wait("clips.every((clip) => !clip.paused && clip.currentTime < 1)")  # from its end it begins again
        while page.js("document.getElementById('prompt').textContent") != ODD:
            rate(page, [(1, 1)])
        for width in (1280, 390):
            page.size(width)
            assert page.fits()
        assert page.errors == [] and page.asked == []


@needs_browser
def test_a_clip_that_does_not_play_takes_no_answer(world, tmp_path):
    """A damaged copy is named on the page, and keys answer nothing."""
    shutil.copytree(world.out / "blind", tmp_path / "blind")
    for clip in (tmp_path / "blind" / "clips").glob("*.mp4"):
        clip.write_bytes(b"nothing")
    with opened(tmp_path / "blind" / "index.html") as page:
        page.js("begin('x')")
        page.wait("!document.getElementById('trouble').hidden")
        page.press("1")
        assert page.js("state.answers.length") == 0
        assert "does not play in this browser" in page.js("document.getElementById('trouble').textContent")


@needs_browser
def test_side_by_side(world):
    """The page that is not blind names both methods below each pair and plays the clips in view."""
    with opened(world.out / "side-by-side.html", 390) as page:
        page.wait("[...document.querySelectorAll('video')].slice(0, 2).every((clip) => clip.currentTime > 0.1)")
        assert page.js("[...document.querySelectorAll('figcaption')].map((e) => e.textContent)") == ["tmd", "dmd2v"] * 6
        assert page.fits() and page.errors == [] and page.asked == []


# ---- bad input ----


def other_codec(path: Path) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    made = path.with_suffix(".new.mp4")
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", path, "-c:v", "mpeg4", made], check=True)
    os.replace(made, path)


def copied(source: Path, target: Path) -> None:
    for file in target.glob("*.mp4"):
        shutil.copy(source / file.name, file)


CUBE = "a blue cube-0.mp4"
BAD = {
    "one folder": (lambda a, b: (a, Path(f"{b}/../tmd")), "are one folder; give the samples of two methods"),
    "missing": (lambda a, b: (b / CUBE).unlink(), f"{CUBE} of .*tmd is not in .*dmd2v; sample both"),
    "extra": (
        lambda a, b: [shutil.copy(b / CUBE, b / f"x{i}-0.mp4") for i in range(5)],
        "x0-0.mp4, x1-0.mp4, x2-0.mp4 and 2 more of .*dmd2v are not in .*tmd",
    ),
    "seed": (lambda a, b: video(b / CUBE, BLUE, comment="seed 8"), f"{CUBE} has seed 7 in .* and 8 in .*--seed"),
    "size": (lambda a, b: video(b / CUBE, BLUE, width=80), "is 64x64 in .* and 80x64 in .*; sample both at one size"),
    "length": (lambda a, b: video(b / CUBE, BLUE, frames=17), "has 33 frames in 2.06 s in .* and 17 frames in 1.06 s"),
    "codec": (lambda a, b: other_codec(b / CUBE), "is mpeg4 in yuv420p, which browsers do not play; convert it"),
    "cut": (lambda a, b: (b / CUBE).write_bytes((b / CUBE).read_bytes()[:900]), "is not a whole mp4; delete it"),
    "changed": (
        lambda a, b: (b / CUBE).write_bytes((b / CUBE).read_bytes().replace(b"mdat\0", b"mdat\1")),
        "is (damaged|not a readable video)",
    ),
    "copies": (lambda a, b: copied(a, b), "hold the same clips, byte by byte"),
    "name": (lambda a, b: (a / CUBE).rename(a / "cube.mp4"), "cube.mp4 of .* should be named prompt-number.mp4"),
    "empty": (lambda a, b: [f.unlink() for f in a.glob("*.mp4")], "holds no mp4"),
    "none": (lambda a, b: shutil.rmtree(a), "is no folder"),
    "words": (
        lambda a, b: (b / "prompts.json").write_text(json.dumps({CUBE: "a huge blue cube"}), encoding="utf-8"),
        "a blue cube: .*tmd was sampled with other words than .*dmd2v; sample both",
    ),
    "prompt": (lambda a, b: (a / "prompts.json").unlink(), "is not known whole; give the prompt file with --prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_do_not_compare(world, tmp_path, capsys, case):
    """One sentence says which folder or clip differs, and nothing is written."""
    a, b, out = tmp_path / "tmd", tmp_path / "dmd2v", tmp_path / "out"
    shutil.copytree(world.a, a), shutil.copytree(world.b, b)
    change, words = BAD[case]
    a, b = found if isinstance(found := change(a, b), tuple) and isinstance(found[0], Path) else (a, b)
    assert run.main(["compare", str(a), str(b), "--out", str(out)]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(words, told) and told.count("\n") == 0, told
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))


def test_a_study_is_not_overwritten(world, capsys):
    """OUT with a study in it, or with files of the user's own, stays as it is; so it does for wrong arguments."""
    before = {f: f.stat().st_mtime_ns for f in world.out.rglob("*")}
    assert run.main(["compare", str(world.a), str(world.b), "--out", str(world.out)]) == 1
    assert run.main(["compare", str(world.a), str(world.b), "--out", str(world.a)]) == 1
    assert run.main(["compare", str(world.a), "--out", str(world.out / "new")]) == 1
    told = capsys.readouterr().err
    assert "holds a study already" in told and "holds other files already" in told and "two folders" in told
    assert before == {f: f.stat().st_mtime_ns for f in world.out.rglob("*")}
    with pytest.raises(SystemExit):
        run.main(["stage1", "a", "b"])
    assert "stage1 takes no a" in capsys.readouterr().err


def changed(pair=0, question="visual quality", choice=1):
    return {"pair": pair, "question": question, "choice": choice, "seconds": 1}


BAD_ANSWERS = {
    "half": (lambda text: text[: len(text) // 2], "is not whole JSON; ask the rater for the file again"),
    "no file": (lambda text: None, "is missing"),
    "no answers": (lambda text: "{}", "holds no answers of a rater"),
    "other study": (lambda text: text.replace('"study": "', '"study": "0'), "answers another study"),
    "twice": (lambda text: json.dumps({**json.loads(text), "rater": "New"}), "are of one rater, 'New'; leave one"),
    "pair": (lambda text: json.dumps({**json.loads(text), "answers": [changed(6)]}), "answer 1 is none to this study"),
    "choice": (lambda text: json.dumps({**json.loads(text), "answers": [changed(choice=3)]}), "answer 1 is none"),
    "question": (lambda text: json.dumps({**json.loads(text), "answers": [changed(question=[])]}), "answer 1 is none"),
    "again": (lambda text: json.dumps({**json.loads(text), "answers": 2 * [changed()]}), "pair 1 is answered twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_do_not_count(world, tmp_path, capsys, case):
    """One sentence names the file, and no tally is written."""
    text = json.dumps(answers(world, "Ada", "AAAAAA", "AAAAAA"))
    change, words = BAD_ANSWERS[case]
    (tmp_path / "ada.json").write_text(text, encoding="utf-8")
    if (other := change(text)) is not None:
        (tmp_path / "other.json").write_text(other, encoding="utf-8")
    files = [str(tmp_path / name) for name in ("ada.json", "other.json")]
    assert run.main(["compare", "--tally", *files, "--out", str(world.out)]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(words, told) and "other.json" in told and "\n" not in told, told
    assert not (world.out / "tally.json").exists() and not (world.out / "tally.md").exists()


def test_a_tally_needs_a_study_and_answers(world, tmp_path, capsys):
    """Without files, or in a folder that holds no study, a sentence; a damaged key is noticed."""
    assert run.main(["compare", "--tally", "--out", str(world.out)]) == 1
    assert run.main(["compare", "--tally", "x.json", "--out", str(tmp_path)]) == 1
    key = (world.out / study.KEY).read_text(encoding="utf-8")
    (tmp_path / study.KEY).write_text(key.replace('"A is clip": 1', '"A is clip": 2', 1), encoding="utf-8")
    assert run.main(["compare", "--tally", "x.json", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "no answers were given" in told and "holds no study" in told and "its checksum differs" in told


def test_unfinished_raters_and_habits_are_told(world, tmp_path):
    """A rater who stopped counts as far as they came; who always takes the left clip is told of."""
    left = [{**a, "choice": 1} for a in answers(world, "x", "AAAAAA", "AAAAAA")["answers"]]
    for name, count in (("Left", 12), ("Also left", 10)):
        text = json.dumps(answers(world, "L", "AAAAAA", "AAAAAA", answers=left[:count], session=name))  # same initials
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    shutil.copytree(world.out, tmp_path / "out")
    told = tally.tally([str(f) for f in tmp_path.glob("*.json")], tmp_path / "out")
    assert "L 10 of 12" in told
    assert "visual quality: the clip on the left was chosen in 100% of answers, and tmd stood there in" in told
    numbers = json.loads((tmp_path / "out" / "tally.json").read_text(encoding="utf-8"))["visual quality"]
    assert numbers["answers"] == 11 and numbers["agreement"]["compared"] == 5
    left = [i for i, row in enumerate(world.key["pairs"]) if row["A is clip"] == 1]
    assert numbers["A on the left"] == sum(2 - (i == 5) for i in left)
    next(tmp_path.glob("Also left.json")).unlink()  # the other saw each method on the left in three pairs of six
    told = tally.tally([str(tmp_path / "Left.json")], tmp_path / "out")
    assert "in 100% of answers. Each method stood there equally often" in told


@pytest.mark.parametrize(("won", "n", "low", "high"), [(0, 0, 0, 1), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)])
def test_wilson_at_the_ends(won, n, low, high):
    """z^2 / (n + z^2) from the end where none or all was seen; all of [0, 1] where nothing was."""
    assert tally.wilson(won, n) == pytest.approx((low, high), abs=1e-4)
