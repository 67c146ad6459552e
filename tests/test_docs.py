"""The README says what the code does: equation map, commands, choices, tables, links."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
WAN = (ROOT / "wan_scale" / "README.md").read_text()
CODE = (ROOT / "tmd_minimal.py").read_text()


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
    """The README's map, tmd_minimal.py and the tests cite the same equations and algorithms, and each function of the map exists."""
    start, end = README.index("## Paper to code"), README.index("## Differences from the paper")
    table = README[start:end]
    tests = "".join(f.read_text() for f in sorted((ROOT / "tests").glob("test_*.py")) if f.name != "test_docs.py")
    assert equations(table) == equations(CODE) == equations(tests)
    assert algorithms(table) == algorithms(CODE) == algorithms(tests) == {"1", "2"}
    for name in re.findall(r"`(\w+)`", "".join(row.split("|")[2] for row in table.splitlines() if row.count("|") == 3)):
        assert re.search(rf"(def|class) {name}\b", CODE), f"the map names {name}, which tmd_minimal.py does not define"


def test_equations_are_cited_on_the_line_that_implements_them():
    """Each equation of the map appears in the docstring, the body or a comment of the function that the map names."""
    for line in README[README.index("## Paper to code") : README.index("## Differences from the paper")].splitlines():
        cells = line.split("|")
        cited, names = (equations(cells[1]), re.findall(r"`(\w+)`", cells[2])) if len(cells) == 4 else (None, None)
        if cited and names:
            bodies = "".join(re.search(rf"(?ms)^(def|class) {n}\b.*?(?=^(def|class|#) ?|\Z)", CODE).group() for n in names)
            assert cited <= equations(bodies), f"{names} do not cite {sorted(cited - equations(bodies))}"


def test_every_choice_is_listed():
    """Every `# choice:` tag has a row in "Differences from the paper" whose key stands beside the tag, and every row has a tag."""
    section = README[README.index("## Differences from the paper") : README.index("## Traps")]
    rows = set(re.findall(r"^\| `([^`]+)` \|", section, re.M))
    used = set()
    for file in ("tmd_minimal.py", "ladder.py", "planar.py", "toy_2d.py", "toy_video.py"):
        lines = (ROOT / file).read_text().splitlines()
        for i, line in enumerate(lines):
            if "choice:" in line:
                window = "\n".join(lines[max(i - 1, 0) : i + 4])
                keys = {key for key in rows if key in window}
                assert keys, f"{file}:{i + 1} is a choice without a row in the README: {line.strip()}"
                used |= keys
    assert rows == used, f"rows without a tag: {rows - used}"


def test_every_command_of_the_readme_parses():
    """Each `python toy_....py ...` line is accepted by its command line, and each make target exists."""
    import toy_2d
    import toy_video

    parsers = {"toy_2d.py": toy_2d.parser(), "toy_video.py": toy_video.parser()}
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    text = README + RESULTS + contributing + CODE + "".join((ROOT / name).read_text() for name in parsers)
    lines = re.findall(r"^\s*(python toy_\w+\.py[^#\n]*|make [\w-]+)", text, re.M)
    assert len(lines) > 6
    makefile = (ROOT / "Makefile").read_text()
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        else:
            parsers[words[1]].parse_args(words[2:])


def test_every_choice_of_wan_scale_is_listed():
    """The same for wan_scale/: each tag has a row in its README whose key stands beside the tag, and each row a tag."""
    rows = set(re.findall(r"^\| `([^`]+)` ", WAN[WAN.index("## Choices of this rung") :], re.M))
    used = set()
    for file in sorted((ROOT / "wan_scale").glob("*.py")):
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

    lines = re.findall(r"(?:python|torchrun --nproc-per-node 8) (wan_scale/run\.py[^#\n`]*)", WAN + README + run.__doc__ + run.NEEDS)
    assert len(lines) > 12
    for line in lines:
        run.parse(shlex.split(line)[1:])


def test_plan_of_the_readme_is_the_plan():
    """wan_scale/README.md shows what plan.py computes."""
    from results import publish

    assert publish.fill(WAN, publish.plans()) == WAN


def test_tables_are_the_measured_ones(monkeypatch):
    """The tables of README.md and RESULTS.md are what the commands write from the committed JSON files: no number is typed by hand."""
    from results import publish
    from toys import claims, claims_2d, claims_video

    monkeypatch.chdir(ROOT)
    assert publish.fill(README, publish.front()) == README and publish.fill(RESULTS, publish.tables()) == RESULTS
    for name, rung in (("toy_2d", claims_2d.RUNG), ("toy_video", claims_video.rung("tiny"))):
        result = json.loads((ROOT / f"results/{name}/claims.json").read_text())
        assert (ROOT / f"results/{name}/claims.md").read_text() == claims.markdown(rung, result)
        for row in result["rows"]:  # and the verdicts follow from the numbers by the stated rule
            if row["A"] and row["B"]:
                assert row["verdict"] == claims.verdict(row["A"], row["B"], rung.scores)


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
    copies = {"claims.md": "claims-tiny/claims.md", "claims.json": "claims-tiny/claims.json", "new/curves.png": "tiny/curves.png"}
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


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "wan_scale/README.md"])
def test_links_lead_somewhere(name):
    """Every relative link and picture exists, and where a link names a heading, that heading."""
    text = (ROOT / name).read_text()
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            target = (ROOT / name).parent / link if link else ROOT / name
            assert target.exists(), link
            heads = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, (link, anchor)


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
