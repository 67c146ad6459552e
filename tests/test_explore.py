"""The page of the plane in a real browser: no network, no console error, and what is clicked is what is drawn."""

import re

import pytest
import torch
from browser import needs_browser, opened

import tmd_minimal as tmd
from results import publish
from toys import explore_plane, pages
from toys.plane import PlanarLadder, Toy

# Runs in the page: what a person would do, and what the page then shows.
DRIVE = """
(() => {
const out = {}, seen = () => canvas.toDataURL().length + ":" + canvas.toDataURL().slice(-4000);
const choose = (name, value) => document.querySelector(`input[name="${name}"][value="${value}"]`).click();
const slide = (to) => { const at = element("at"); at.value = to; at.dispatchEvent(new Event("input")); };
const pictures = [];
for (const to of [0, 2, 4]) { slide(to); pictures.push(seen()); }
out.slides = new Set(pictures).size;
out.models = {};
for (const model of ["teacher", "dmd2v", "stage1", "tmd"]) {
  choose("model", model); slide(999);
  out.models[model] = [element("nfe").textContent, element("swd").textContent, seen()];
}
choose("M", "2"); choose("N", "4"); choose("outer", "renoised"); slide(0);
const calm = seen(), box = canvas.getBoundingClientRect();
canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2}));
out.fan = [seen() !== calm, element("caption").textContent];
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
out.closed = seen() === calm;
const before = element("at").value;
document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
out.keys = [before, element("at").value];
choose("field", "printed"); out.printed = [element("swd").textContent, element("hint").textContent];
choose("show", "printed"); out.stage2 = element("caption").textContent;
choose("show", "sampling"); choose("field", "consistent"); choose("M", "1");
out.disabled = document.querySelector('input[name="outer"][value="renoised"]').disabled;
return out;
})()
"""


class Ladder(PlanarLadder):
    """Scores that cost nothing."""

    def score(self, points, c=None):
        return {"swd": points.abs().mean().item(), "off_support": 0.5}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """explore.html of untrained networks, what it was made of, and the samplers' side."""
    folder = tmp_path_factory.mktemp("explore")
    torch.manual_seed(0)
    ladder = Ladder(Toy(width=16, depth=3, H=1, samples=2000))
    teacher = ladder.network()
    tmd_student = tmd.TMDStudent(teacher, 1)
    students = {"dmd2v": tmd.PlainStudent(teacher), "stage1": tmd_student, "tmd": tmd_student}
    facts, pack = explore_plane.measure(ladder, teacher, students)
    path = pages.write(folder / "explore.html", explore_plane.TEMPLATE, facts, pack.base64())
    return path, facts, pack, ladder, students["tmd"]


def test_the_page_stands_alone_and_is_small(page):
    """One file under 3 MB; nothing in it asks for another; every view has as many frames as its steps give."""
    text = page[0].read_text(encoding="utf-8")
    assert page[0].stat().st_size < 3e6 and "{{" not in text
    assert not re.search(r"(src|href)\s*=|https?://|import\(|fetch\(", text)
    facts = pages.read(page[0])[0]
    assert len(facts["views"]["tmd/2/4/renoised/consistent"]["frames"]) == 2 * (1 + 5) + 1
    assert (
        len(facts["views"]["teacher/4"]["frames"]) == 5
        and facts["views"]["tmd/1/1/deterministic/consistent"]["nfe"] == 1
    )


@pytest.mark.parametrize("name", publish.PAGES)
def test_the_published_pages_are_made_of_the_templates(name):
    """results/ shows pages of today's templates, style and script; `make publish` renews them from their numbers."""
    path, template = publish.RESULTS / name, publish.PAGES[name]
    assert path.read_text(encoding="utf-8") == pages.fill(template, *pages.read(path)), "run `make publish`"
    assert path.stat().st_size < pages.LIMIT and path.with_suffix(".png").exists()


def test_its_points_are_the_samplers(page):
    """The last frame of a view holds the student's samples, to the rounding of 16 bits."""
    _, facts, pack, ladder, student = page
    x = ladder.student_samples(student, ladder.cfg.student_config(M=2, N=4, outer="renoised"), explore_plane.SCORED)
    start = facts["views"]["tmd/2/4/renoised/consistent"]["frames"][-1][2]
    found = torch.from_numpy(pack.array()[start : start + 2 * facts["points"]].astype("f4")).view(-1, 2) * (
        explore_plane.LIMIT / 32767
    )
    wanted = x[: facts["points"]].clamp(-explore_plane.LIMIT, explore_plane.LIMIT)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [1280, 390])
@needs_browser
def test_what_is_chosen_is_what_is_drawn(page, width):
    """Slider, models, fan, keys and the readings of the equations; no error, nothing beside the window."""
    with opened(page[0], width) as shown:
        shown.wait("document.body.dataset.ready")
        found = shown.js(DRIVE)
        assert shown.errors == [] and shown.asked == [] and shown.fits()
    assert found["slides"] == 3
    assert len({tuple(shown) for shown in found["models"].values()}) >= 3  # untrained stage 1 and TMD are one network
    assert found["models"]["teacher"][0] == "50.00" and found["models"]["dmd2v"][0] != found["models"]["tmd"][0]
    assert found["fan"][0] and "inner noises" in found["fan"][1] and found["closed"]
    assert found["keys"] == ["0", "1"] and "biased" in found["printed"][1] and "stage 2" in found["stage2"]
    assert found["disabled"]
