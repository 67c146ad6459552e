"""The page of tiny videos in a real browser: what is chosen is what plays, with the scores that the ruler gave."""

import re

import pytest
import torch
from browser import needs_browser, opened

import tmd_minimal as tmd
from toys import explore_video, pages
from toys.explore_video import SEEDS
from toys.tiny_video import PROMPTS, QUICK, ToyVideo, VideoLadder


class Ladder(VideoLadder):
    """Scores that cost nothing and tell clips apart; every fifth clip is read as another prompt."""

    def judged(self, clips):
        n, frames = len(clips), clips.shape[2]
        quality = (0.37 * torch.arange(n) + clips.std()) % 1
        read = self.c[:n].clone()
        read[::5] = self.c[0]
        semantic = (read == self.c[:n]).all(1).float()
        path = torch.rand(n, frames, 2, generator=torch.Generator().manual_seed(0))
        seen = torch.ones(n, frames)
        return {"quality": quality, "semantic": semantic, "motion": quality / 2, "prompt": read, "path": path,
                "seen": seen.mean(1)}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """explore.html of untrained networks, what it was made of, and the ladder and its student."""
    folder = tmp_path_factory.mktemp("explore_video")
    torch.manual_seed(0)
    ladder = Ladder(ToyVideo(**{**QUICK, "samples": 240}))
    teacher = ladder.network()
    student = tmd.TMDStudent(teacher, 1)
    for net in (teacher, student):  # an untrained network predicts zero, and every N would sample the same
        for part in net.modules():
            if isinstance(part, torch.nn.Linear):
                torch.nn.init.normal_(part.weight, std=0.2)
    students = {"dmd2v": tmd.PlainStudent(teacher), "stage1": tmd.TMDStudent(teacher, 1), "tmd": student}
    facts, clips = explore_video.measure(ladder, teacher, students, {"teacher_50": ladder.x.flip(3)})
    more, pack = explore_video.packed(clips, SEEDS, 1)
    path = pages.write(folder / "explore.html", explore_video.TEMPLATE, {**facts, **more}, pack.base64())
    return path, {**facts, **more}, pack, ladder, student


def test_the_page_stands_alone_and_is_small(page):
    """One file under 3 MB; nothing in it asks for another, nothing is left to fill."""
    text = page[0].read_text(encoding="utf-8")
    assert page[0].stat().st_size < 3e6 and not re.search(r"\{\{[A-Z]+\}\}", text)
    assert not re.search(r"(src|href)\s*=|https?:|import\(|fetch\(|url\(", text)


def test_its_clips_are_the_samplers(page):
    """Clips are the student's samples to the rounding of the greys; every N has its cost; a run's samples are used."""
    _, facts, pack, ladder, student = page
    views = facts["views"]
    assert [views[f"tmd/{N}"]["nfe"] for N in facts["N"]] == [tmd.effective_nfe(1, N, 1, 3) for N in (1, 2, 4, 8)]
    assert views["teacher/4"]["nfe"] == 8 and views["dmd2v"]["nfe"] == 1 and views["data"]["nfe"] is None

    def greys(key, i):
        size = ladder.x[0].numel()
        start = facts["starts"][key] + i * size
        return torch.from_numpy(pack.array()[start : start + size].astype("f4")).view(ladder.x.shape[1:]) / 127.5 - 1

    x = ladder.student_samples(student, ladder.cfg.student_config(N=8), SEEDS * len(PROMPTS))
    for i in (0, 31, 119):
        assert (greys("tmd/8", i) - x[i].clamp(-1, 1)).abs().max() < 0.02
        assert (greys("teacher/50", i) - ladder.x[i].flip(2)).abs().max() < 0.02
    assert not torch.equal(greys("tmd/1", 0), greys("tmd/8", 0))


def test_large_clips_still_fit(tmp_path, page, monkeypatch):
    """Clips too large for a page lose noises, then pixels, and the page stays below the limit."""
    _, facts, _, ladder, _ = page
    noise = torch.rand(SEEDS * len(PROMPTS), 1, 6, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    few = {"views": {key: facts["views"][key] for key in ("data", "tmd/4")}}
    monkeypatch.setattr(explore_video, "measure", lambda *_: ({**facts, **few}, {"data": noise, "tmd/4": noise}))
    for limit, seeds in ((300_000, 4), (150_000, 2), (60_000, 1)):
        monkeypatch.setattr(pages, "LIMIT", limit)
        path = explore_video.write(tmp_path, ladder, None, {})
        told = pages.read(path)[0]
        assert (told["seeds"], told["pixels"]) == (seeds, 12)
    shrunk, pack = explore_video.packed({"data": noise}, 1, 2)
    assert shrunk["pixels"] == 6 and pack.size == noise[:30].numel() // 4


SEEN = "[...document.querySelectorAll('canvas')].map((c) => c.toDataURL())"
TOLD = "[...document.querySelectorAll('.row')].filter((r) => r.offsetParent).map((r) => r.innerText)"


@pytest.mark.parametrize("width", [1280, 390])
@needs_browser
def test_what_is_chosen_is_what_plays(page, width):
    """Frames, prompts, N, models and keys; no error, no request, nothing beside the window."""
    path, facts, *_ = page
    with opened(path, width) as shown:
        assert shown.wait("document.body.dataset.ready && player.timer"), "it plays by itself"
        shown.wait("player.frame > 0")
        shown.press(" ")
        assert shown.js("player.timer") is None
        # the slider and the keys move every clip to the same frame
        shown.choose("#at", "0")
        start = shown.js(SEEN)
        assert len(start) == 7 * SEEDS and len(set(start[-SEEDS:])) == SEEDS  # noises of TMD differ
        shown.choose("#at", "3")
        later = shown.js(SEEN)
        assert all(a != b for a, b in zip(start, later)) and "4 of 6" in shown.js("element('frame').textContent")
        shown.js("document.activeElement.blur()")
        shown.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
        assert shown.js(SEEN) == start
        shown.click("#on")
        assert shown.js("element('at').value") == "1"
        shown.choose("#at", "0")
        # N changes the students with a head, and nothing else
        told = shown.js(TOLD)
        shown.press("1")
        dropped = shown.js(SEEN)
        changed = [a != b for a, b in zip(start, dropped)]
        assert changed == [False] * 5 * SEEDS + [True] * 2 * SEEDS and "recurrence" in shown.js("hint()")
        nfe = facts["views"]["tmd/1"]["nfe"]
        assert f"N = 1, effective NFE {nfe:.2f}" in shown.js(TOLD)[-1] != told[-1]
        shown.press("8")
        assert shown.js("state.N") == "8" and shown.js(SEEN)[-1] not in (start[-1], dropped[-1])
        # menus change the prompt of every model; the scores are those of its clips
        for slot, word in (("shade", "dim"), ("shape", "cross"), ("motion", "eight")):
            before = shown.js(SEEN)
            shown.choose(f"#{slot}", word)
            assert all(a != b for a, b in zip(before, shown.js(SEEN)))
        row = facts["views"]["tmd/8"]["clips"][PROMPTS.index("dim cross eight") + len(PROMPTS)]
        scores = shown.js("document.querySelectorAll('#row-tmd .scores')[1].textContent")
        assert scores == f"Q {row[0]:.2f}S {row[1]:.0f}M {row[2]:.2f}".replace(" 0.", " .")
        # a clip that is read as another prompt says so
        i = next(i for i, row in enumerate(facts["views"]["tmd/8"]["clips"][: len(PROMPTS)]) if row[3] != i)
        for slot, word in zip(("shade", "shape", "motion"), PROMPTS[i].split()):
            shown.choose(f"#{slot}", word)
        assert shown.js("document.querySelector('#row-tmd .clip').className") == "clip wrong"
        wrong = [word for word, asked in zip(PROMPTS[0].split(), PROMPTS[i].split()) if word != asked]
        assert shown.js("document.querySelector('#row-tmd .read').textContent") == "read as: " + " ".join(wrong)
        # models are hidden and shown
        shown.click('#models input[value="teacher/1"]')
        left = shown.js(TOLD)
        assert len(told) == 7 and len(left) == 6 and not any(row.startswith("teacher, 1 step") for row in left)
        assert shown.errors == [] and shown.asked == [] and shown.fits()


@needs_browser
def test_the_address_opens_a_view(page, tmp_path):
    """explore.html#N=1&motion=eight&frame=2&models=tmd shows that, and stands still."""
    path = tmp_path / "explore.html"
    path.write_text(
        page[0]
        .read_text(encoding="utf-8")
        .replace("location.hash", "'#N=1&motion=eight&frame=2&shade=no&models=dmd2v,tmd'")
    )
    with opened(path) as shown:
        shown.wait("document.body.dataset.ready")
        assert [row.split("\n")[0] for row in shown.js(TOLD)] == ["DMD2-v", "TMD"]
        found = shown.js("[state.N, state.motion, state.shade, player.frame, player.timer, element('motion').value]")
    assert found == ["1", "eight", "bright", 2, None, "eight"]
