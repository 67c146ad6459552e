"""The pages say what the code does: equation map, choices, commands, tables, links; and say it in plain words."""

import json
import re
import shlex
from pathlib import Path

import pytest

import settings

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "README.md",
    "REFERENCE.md",
    "RESULTS.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "toys/README.md",
    "wan_scale/README.md",
)
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README, REFERENCE, RESULTS = PAGES["README.md"], PAGES["REFERENCE.md"], PAGES["RESULTS.md"]
TOYS, WAN = PAGES["toys/README.md"], PAGES["wan_scale/README.md"]
CODE = (ROOT / "tmd_minimal.py").read_text()
every_page = pytest.mark.parametrize("name", NAMES)

RETIRED = {  # what these pages once said: what they say now
    r"(?<!model )(?<![-\w])cards?(?![-\w])": "GPU (a model card is diffusers' term)",
    r"\brecomput\w*|\bcomputed again\b": "activation checkpointing",
    r"\bthe derivative\b": "the finite difference, or du/ds",
    r"\bthe average's\b|\baveraged weights\b|\bsharded average\b": "EMA",
    r"\ba launch\b|\bone launch\b": "CUDA graph",
    r"\bevaluations a sample\b|\bonce a transition\b": "per",
    r"\bfor want of\b": "without",
}


def paper_to_code():
    return REFERENCE[REFERENCE.index("## Paper to code") : REFERENCE.index("## Differences from the paper")]


def said(file):
    """The text of a page, or of a notebook without code and outputs."""
    if file.suffix != ".ipynb":
        return file.read_text()
    cells = json.loads(file.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def bare(text):
    """A page without what is written by `make publish` and without code blocks."""
    text = re.sub(r"<!-- (\S+) -->\n.*?<!-- /\1 -->", "", text, flags=re.S)
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def equations(text):
    """Every equation number that a text cites: Eq. (10), Eq. 8-10, Eq. (8)-(10), Eq. 4, 18."""
    found = set()
    number = r"\(?(\d+)\)?"
    for match in re.finditer(rf"Eq\. ?{number}(?:(?:-| to ){number})?((?:, {number})*)", text):
        first, last, rest, _ = match.groups()
        found |= set(range(int(first), int(last or first) + 1)) | {int(n) for n in re.findall(r"\d+", rest)}
    return found


def algorithms(text):
    return set(re.findall(r"Alg(?:\.|orithm) (\d)", text))


def test_equation_map_code_and_tests_cite_the_same_equations():
    """REFERENCE.md's map, the code and the tests cite the same equations and algorithms; the map's functions exist."""
    table = paper_to_code()
    tests = "".join(f.read_text() for f in sorted((ROOT / "tests").glob("test_*.py")) if f.name != "test_docs.py")
    assert equations(table) == equations(CODE) == equations(tests)
    assert algorithms(table) == algorithms(CODE) == algorithms(tests) == {"1", "2"}
    for name in re.findall(r"`(\w+)`", "".join(row.split("|")[2] for row in table.splitlines() if row.count("|") == 3)):
        assert re.search(rf"(def|class) {name}\b", CODE), f"the map names {name}, which tmd_minimal.py does not define"


def test_equations_are_cited_on_the_line_that_implements_them():
    """Each equation of the map appears in the docstring, the body or a comment of the function that the map names."""
    for line in paper_to_code().splitlines():
        cells = line.split("|")
        cited, names = (equations(cells[1]), re.findall(r"`(\w+)`", cells[2])) if len(cells) == 4 else (None, None)
        if cited and names:
            bodies = "".join(
                re.search(rf"(?ms)^(def|class) {n}\b.*?(?=^(def|class|#) ?|\Z)", CODE).group() for n in names
            )
            assert cited <= equations(bodies), f"{names} do not cite {sorted(cited - equations(bodies))}"


def test_every_choice_is_listed():
    """Every `# choice:` tag has a row in "Differences from the paper", its key beside the tag; every row has a tag."""
    section = REFERENCE[REFERENCE.index("## Differences from the paper") : REFERENCE.index("## Traps")]
    rows = set(re.findall(r"^\| `([^`]+)` \|", section, re.M))
    used = set()
    toys = [f"toys/{file.name}" for file in sorted((ROOT / "toys").glob("*.py"))]
    assert len(toys) > 8
    for file in ("tmd_minimal.py", "settings.py", *toys, "toy_2d.py", "toy_video.py"):
        lines = (ROOT / file).read_text().splitlines()
        for i, line in enumerate(lines):
            if "choice:" in line:
                window = "\n".join(lines[max(i - 1, 0) : i + 4])
                keys = {key for key in rows if key in window}
                assert keys, f"{file}:{i + 1} is a choice without a row in REFERENCE.md: {line.strip()}"
                used |= keys
    assert rows == used, f"rows without a tag: {rows - used}"


def test_every_command_of_the_readme_parses():
    """Each `python toy_....py ...` is accepted by its command line and each make target exists, in text and blocks."""
    import toy_2d
    import toy_video

    parsers = {"toy_2d.py": toy_2d.parser(), "toy_video.py": toy_video.parser()}
    pages = "".join(PAGES.values())
    text = pages + CODE + "".join((ROOT / name).read_text() for name in parsers)
    lines = re.findall(r"^\s*(python toy_\w+\.py[^#\n]*|make [\w-]+)", text, re.M)
    assert len(lines) > 20
    lines += re.findall(r"`(python toy_\w+\.py[^`\n]*|make [\w-]+)`", pages)
    makefile = (ROOT / "Makefile").read_text()
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        elif "--help" not in words:
            parsers[words[1]].parse_args(words[2:])


def test_every_choice_of_wan_scale_is_listed():
    """The same for wan_scale/: each tag has a row in its README whose key stands beside the tag, and each row a tag."""
    rows = set(re.findall(r"^\| `([^`]+)` ", WAN[WAN.index("## Choices of this rung") :], re.M))
    used = set()
    for file in sorted((ROOT / "wan_scale").rglob("*.py")):
        for i, line in enumerate(file.read_text().splitlines()):
            if "choice:" in line:
                keys = {key for key in rows if key in line}
                assert keys, f"{file.name}:{i + 1} is a choice without a row in wan_scale/README.md: {line.strip()}"
                used |= keys
    assert rows == used, f"rows without a tag: {rows - used}"


def test_every_command_of_wan_scale_parses():
    """Each `run.py` line of its README, its help and the messages is accepted by its command line."""
    pytest.importorskip("diffusers")
    from wan_scale import run

    lines = re.findall(
        r"(?:python|torchrun --nproc-per-node 8) (wan_scale/run\.py[^#\n`]*)",
        "".join(PAGES.values()) + run.__doc__ + run.NEEDS,
    )
    assert len(lines) > 12
    for line in lines:
        run.parse(shlex.split(line)[1:])


def test_plan_of_the_readme_is_the_plan():
    """wan_scale/README.md shows what plan.py computes."""
    from results import publish

    assert publish.fill(WAN, publish.plans()) == WAN


def test_tables_are_the_measured_ones(monkeypatch):
    """The tables of the pages are what the commands write from the committed JSON files: no number is typed by hand."""
    from results import publish
    from toys import claims_2d, claims_video, verdicts

    monkeypatch.chdir(ROOT)
    for page, tables in ((README, publish.front()), (TOYS, publish.rungs()), (RESULTS, publish.tables())):
        assert publish.fill(page, tables) == page
    for name, rung in (("toy_2d", claims_2d.RUNG), ("toy_video", claims_video.rung("tiny"))):
        result = json.loads((ROOT / f"results/{name}/claims.json").read_text())
        own = {row[:2]: row[5] for row in rung.claims if len(row) > 5}
        assert (ROOT / f"results/{name}/claims.md").read_text() == verdicts.markdown(rung, result)
        for row in result["rows"]:  # and the verdicts follow from the numbers by the stated rule
            if row.get("difference") and "seeds" not in row["verdict"]:
                scores = own.get((row["claim"], row["setting"]), rung.scores)
                assert {*row["difference"]} <= {*scores}
                assert row["verdict"] == verdicts.verdict(row["difference"], scores, rung.margins)


def test_the_words_of_the_pages_rest_on_these_verdicts():
    """RESULTS.md, toys/README.md and the lessons tell these in words: when a verdict changes, rewrite them."""
    rows, told = json.loads((ROOT / "results/toy_video/claims.json").read_text())["rows"], {}
    for row in rows:
        told.setdefault(row["claim"], []).append(row["verdict"])
    of = lambda claim, i: [row["difference"]["total"] for row in rows if row["claim"] == claim][i]
    ahead = [("C3", 1), ("C5", 0), ("C8", 0), ("C8", 1)]  # "ahead on average"
    behind = [("C4", 1), ("C4", 2), ("C4", 5), ("C9", 0), ("C10", 2), ("C10", 3)]
    assert all(of(*row)["mean"] > 0.005 for row in ahead) and all(of(*row)["mean"] < -0.005 for row in behind)
    alike = (("C3", 0), ("C4", 4), ("C4", 6), ("C9", 1), ("C8", 3))  # "end alike on average"
    assert all(abs(of(*row)["mean"]) < 0.002 for row in alike)
    just = {("C2", 4): "low", ("C6", 0): "high", ("C10", 3): "high"}  # "only just leaves zero"
    close = next(row for row in rows if row["setting"] == "M = 2, N = 4, four times the iterations")
    assert -0.002 < close["difference"]["total"]["low"] < 0, "zero is only just inside"
    again = next(row for row in rows if row["setting"] == f"{close['setting']}, on ten other seeds")
    lead, five = again["difference"]["total"], close["difference"]["total"]["mean"]
    assert again["verdict"] == "holds" and lead["mean"] < 0.01 and lead["low"] < 0.002, "zero is only just outside"
    assert 0.5 < lead["mean"] / five < 0.6 and lead["n"] == 10, "about half of what five seeds show"
    assert_the_lead_at_two_steps_is_told_right(rows, again)
    assert told["C1 parts"] == ["holds", "inconclusive"] * 2, "in quality and motion, not in semantic and diversity"
    steps = [row["verdict"] for row in rows if "like NFE" in row["setting"] and "against DMD2-v at M" in row["setting"]]
    assert steps == ["does not hold"] * 5, "at like NFE DMD2-v with more steps is ahead"
    assert all(abs(of(*row)[side]) < 0.002 for row, side in just.items())
    assert {claim: told[claim] for claim in ("choice", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10")} == {
        "choice": ["does not hold", "does not hold", "holds", "inconclusive"],
        "C2": ["holds", "inconclusive", "inconclusive", "inconclusive", "holds"],
        "C3": ["inconclusive"] * 2,
        "C4": ["holds"] + ["inconclusive"] * 6,
        "C5": ["inconclusive"],
        "C6": ["does not hold"],
        "C7": ["holds"],
        "C8": ["inconclusive"] * 4,
        "C9": ["inconclusive"] * 2,
        "C10": ["does not hold"] * 2 + ["inconclusive", "does not hold"],
    }


def assert_the_lead_at_two_steps_is_told_right(rows, again):
    """As many updates of the weights, a correction for several looks, the single scores, the motion laws."""
    from toys.moving_shapes import MOTIONS
    from toys.verdicts import difference, records_of

    longer = next(row for row in rows if row["setting"].endswith("as many updates of both students' weights"))
    lead, A = longer["difference"]["total"], "tmd M2 long again"
    assert longer["verdict"] == "holds" and 0 < lead["low"] < 0.002 and lead["mean"] < 0.01 and lead["n"] == 10
    assert 0.01 < lead["high"] < 0.011, "all but the tip of the interval is within the margin"
    jobs = records_of(ROOT / "results/toy_video/claims")
    assert {r["student_updates"] for name in (A, "dmd2v M2 longer again") for r in jobs[name]} == {1500}
    assert {r["student_updates"] for r in jobs["dmd2v M2 long again"]} == {1350}, "a tenth fewer"
    ends = lambda name: {r["seed"]: r["end"] for r in jobs[name]}
    parts = {key: difference(ends(A), ends("dmd2v M2 longer again"), key) for key in ("quality", "motion")}
    assert parts["quality"]["low"] > 0.005 and -0.002 < parts["motion"]["low"] < 0, "clear; zero just inside"
    # Holm: the smallest p of n must be under 0.05 / n; Student's t of 9 degrees of freedom at 1 - 0.05 / 2n
    size = lambda d: d["mean"] / d["se"]
    ten = [row for row in rows if row["claim"] == "C1" and row.get("seeds") == 10]
    assert len(ten) == 4 and max(size(row["difference"]["total"]) for row in ten) < 3.111, "n = 4: neither total holds"
    looks = [row["difference"] for row in rows if row["claim"] == "C1 parts"]
    quality, motion = (next(d[key] for d in looks if key in d) for key in ("quality", "motion"))
    assert len(looks) == 4 and size(quality) > 3.250 and size(motion) > 3.111, "of five looks with the total"
    assert size(again["difference"]["total"]) < 2.933, "and the total is the third of them"
    law = lambda name, law: {r["seed"]: r["end"]["laws"][law] for r in jobs[name]}
    ahead = lambda a, b, of: difference(law(a, of), law(b, of), "total")["low"] > 0
    two, one = (A, "dmd2v M2 long again"), ("tmd long again", "dmd2v long again")
    assert ahead(*two, "straight") and ahead(*one, "straight") and ahead(*two, "still")
    assert not any(ahead(*pair, of) for pair in (two, one) for of in ("bounce", "circle", "eight"))
    short = (("tmd", "dmd2v"), ("tmd M2", "dmd2v M2"))
    assert not any(ahead(*pair, of) or ahead(*pair[::-1], of) for pair in short for of in MOTIONS)


@pytest.mark.parametrize("rung", ["toy_2d", "toy_video"])
def test_the_published_run_has_todays_settings(rung):
    """Table and pictures of a rung are of what its command runs today: a setting changed or added makes them old."""
    from toys.plane import PlanarLadder
    from toys.tiny_video import VideoLadder

    published = json.loads((ROOT / f"results/{rung}/metrics.json").read_text())["config"]
    assert published == {"toy_2d": PlanarLadder, "toy_video": VideoLadder}[rung].settings().without()


def test_the_words_on_the_plane_rest_on_these_verdicts():
    """RESULTS.md ("Reading it"), toys/README.md and lessons 1 to 4 tell these in words: rewrite them, too."""
    result = json.loads((ROOT / "results/toy_2d/claims.json").read_text())
    rows, told = result["rows"], {}
    for row in rows:
        told.setdefault(row["claim"], []).append(row["verdict"])
    no, open_ = "does not hold", "inconclusive"
    assert told == {
        "C0": ["holds"] * 12,
        "C1": [no] * 4 + [open_, no, open_, no, open_] + [no] * 4,
        "room": [open_, no],
        "bound": [open_] * 2,
        "C2": [open_] * 3,
        "C3": [open_, "holds"],
        "C4": ["holds", open_, no],
        "C6": [no, open_],
        "C7": ["holds"],
        "C8": ["holds"] * 2,
        "C10": [no] * 3 + [open_, "holds"],
        "trap 2": ["holds", open_],
        "trap 3": ["holds"],
        "trap 5": [no],
        "trap 9": [open_, open_, "holds"],
    }
    assert {row["seeds"] for row in rows} == {5}
    of = lambda claim, i, score: [r["difference"][score] for r in rows if r["claim"] == claim][i]
    torn = [(of(*row, "swd"), of(*row, "off_support")) for row in (("C10", 3), ("trap 9", 1))]
    assert all(swd["high"] < 0 < off["low"] for swd, off in torn), "the distances disagree"
    assert 0.005 < torn[1][1]["mean"] < 0.015, "a hundredth of the samples"
    checkerboard = next(r["difference"] for r in rows if r["setting"] == "M = 1, checkerboard")
    assert all(d["low"] < 0 < d["mean"] for d in checkerboard.values()), "behind on average, zero inside both"
    assert of("C6", 0, "off_support")["low"] > 0 and of("C4", 1, "swd")["mean"] > 0, "y = x ahead; TM on average"
    assert of("trap 5", 0, "swd")["low"] > 0 and of("C7", 0, "off_support")["high"] < 0
    longer = of("room", 1, "swd")
    assert of("room", 1, "off_support")["low"] > 0 > longer["low"], "longer training passes the teacher off the support"
    for name in ("tmd M2 even", "dmd2v M2 even"):
        found = result["x_hat_per_time"][name]
        mixture = sum(r["mixture"] for r in found)
        assert all(2.5 < sum(r["each"][i] for r in found) / mixture < 3.5 for i in (0, 1)), "about three times as far"


@pytest.mark.parametrize("run, result", [("toy_video/claims-tiny", "toy_video/claims"), ("toy_2d/claims",) * 2])
def test_finished_jobs_are_published_so_that_another_machine_goes_on(run, result, tmp_path, monkeypatch):
    """Records, scores of teachers, the pilot: no weights, no tables, which are written from them."""
    from results import publish

    monkeypatch.setattr(publish, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    kept = {"jobs/tmd-seed0.json", "teacher-8x12-seed0/teacher.json", "pilot.json", "claims.config.json"}
    for name in kept | {"teacher-8x12-seed0/teacher.pt", "jobs/tmd-seed1.tmp"}:
        file = tmp_path / "runs" / run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    publish.collect()
    found = tmp_path / "results" / result
    assert {str(f.relative_to(found)) for f in found.rglob("*") if f.is_file()} == kept


def test_a_teacher_trained_again_does_not_replace_the_published_one(tmp_path, monkeypatch):
    """Of a teacher that agrees with the published one (again.json) only the comparison is copied; another is copied
    whole.
    """
    from results import publish

    monkeypatch.setattr(publish, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    says = {"8-frames": {"same recipe": True, "agree": True}, "12-frames": {"same recipe": True, "agree": False},
            "8-frames-3-blocks": None}  # fmt: skip
    for teacher, compared in says.items():
        folder = tmp_path / "runs/video_teacher" / teacher
        folder.mkdir(parents=True)
        (folder / "teacher.json").write_text("{}")
        if compared:
            (folder / "again.json").write_text(json.dumps(compared))
    publish.collect()
    found = {str(f.relative_to(tmp_path / "results/video_teacher")) for f in tmp_path.rglob("results/*/*/*.*")}
    other = {"12-frames/teacher.json", "12-frames/again.json", "8-frames-3-blocks/teacher.json"}
    assert found == {"8-frames/again.json"} | other


def test_claims_of_a_part_of_the_jobs_are_not_published(tmp_path, monkeypatch):
    """A row that is published was not measured: kept. All were: copied. Pictures of other runs: copied."""
    from results import publish

    run, result = tmp_path / "runs/claims-tiny/claims.md", tmp_path / "results/claims.md"
    for folder, verdicts in ((run.parent, ["holds", "not run"]), (result.parent, ["holds", "inconclusive"])):
        folder.mkdir(parents=True)
        rows = [{"claim": "C1", "setting": i, "verdict": verdict} for i, verdict in enumerate(verdicts)]
        (folder / "claims.json").write_text(json.dumps({"rows": rows}))
    assert publish.poorer(run, result) and not publish.poorer(result, run)
    assert not publish.poorer(tmp_path / "runs/tiny/curves.png", result)
    copies = {
        "claims.md": "claims-tiny/claims.md",
        "claims.json": "claims-tiny/claims.json",
        "new/curves.png": "tiny/curves.png",
    }
    for name, value in {"RUNS": tmp_path / "runs", "RESULTS": tmp_path / "results", "COPIES": copies}.items():
        monkeypatch.setattr(publish, name, value)
    (tmp_path / "runs/tiny").mkdir()
    (tmp_path / "runs/tiny/curves.png").write_text("new")
    run.write_text("new"), result.write_text("old")
    publish.collect()
    assert result.read_text() == "old" and (tmp_path / "results/new/curves.png").read_text() == "new"


def test_results_name_no_machine():
    """No published file holds an absolute path."""
    for file in (ROOT / "results").rglob("*.*"):
        if file.suffix in (".json", ".md"):
            assert not re.search(r'["` ]/\w+/', file.read_text()), file


NOTEBOOKS = [f"tutorials/{path.name}" for path in sorted((ROOT / "tutorials").glob("*.ipynb"))]


@pytest.mark.parametrize("name", [*NAMES, *NOTEBOOKS])
def test_links_lead_somewhere(name):
    """Every relative link and picture exists, and where a link names a heading, that heading."""
    text = said(ROOT / name)
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            target = (ROOT / name).parent / link if link else ROOT / name
            assert target.exists(), link
            heads = re.findall(r"^#+ (.*)", said(target), re.M) if anchor else []
            assert not anchor or anchor in {
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads
            }, (link, anchor)


def test_traps_name_tests_that_exist():
    """Each test that a trap names is in tests/, and most traps name one."""
    traps = REFERENCE[REFERENCE.index("## Traps") : REFERENCE.index("## What each logged number means")]
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", traps)
    assert len(named) >= 9 and all(f"def {name}(" in tests for name in named)


def test_front_page_is_short():
    """README.md is read in a minute: at most 160 lines."""
    assert len(README.splitlines()) <= 160


@every_page
def test_pages_are_wrapped(name):
    """Prose wraps at about 100 columns, addresses of links aside; tables, pictures, code, published text excepted."""
    for line in bare(PAGES[name]).splitlines():
        if not line.startswith(("|", "![", "<")):
            shown = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(shown) <= 105, f"{name}: {len(shown)} columns: {line}"


@every_page
def test_table_cells_are_short(name):
    """No cell of a table has over 25 words."""
    for line in re.sub(r"^```.*?^```", "", PAGES[name], flags=re.S | re.M).splitlines():
        if line.startswith("|"):
            for cell in re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", line)).split("|"):
                assert len(cell.split()) <= 25, f"{name}: {len(cell.split())} words: {cell}"


def retired(text):
    """The retired words in a text, with what to write instead."""
    text = " ".join(text.split())
    return [f"{m.group()!r}: write {now}" for old, now in RETIRED.items() for m in re.finditer(old, text, re.I)]


@every_page
def test_pages_use_the_fields_words(name):
    """A page has one term per thing, the field's."""
    assert not retired(PAGES[name])


def test_help_uses_the_fields_words():
    """So do the three command lines; and the check finds such words, but neither --card-gb nor a model card."""
    import toy_2d
    import toy_video
    from wan_scale import run

    assert len(retired("on a card, by recomputation")) == 2 and not retired("--card-gb 80 in the model card")
    helps = {name: module.parser().format_help() for name, module in (("toy_2d", toy_2d), ("toy_video", toy_video))}
    helps["run"] = settings.parser(run.Wan, run.__doc__).format_help() + run.NEEDS
    for name, text in helps.items():
        assert not retired(text), f"{name} --help: {retired(text)}"


def test_folders_and_files_are_listed():
    """CONTRIBUTING.md has a row for each folder, toys/README.md for each file of toys/."""
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    listed = set(re.findall(r"^\| .*?`(\w+/)`", PAGES["CONTRIBUTING.md"], re.M))
    assert folders - {"runs/"} <= listed
    files = {path.name for path in (ROOT / "toys").glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"\[`(\w+\.py)`\]\(\1\)", TOYS[TOYS.index("## What is in the folder") :]))


def test_tmd_minimal_imports_torch_alone():
    """The one file needs torch and tqdm, nothing else, and stays readable in one sitting."""
    imported = set(re.findall(r"^(?:import|from) (\w+)", CODE, re.M))
    assert imported <= {
        "__future__",
        "copy",
        "math",
        "os",
        "pickle",
        "time",
        "zipfile",
        "contextlib",
        "dataclasses",
        "itertools",
        "torch",
        "tqdm",
    }
    assert len(CODE.splitlines()) <= 900
