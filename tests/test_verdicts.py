"""The rule of the claims tables: paired intervals, margins, what chance does to it, and what the pilot promises."""

import json
import math
from pathlib import Path

import pytest
import torch

from toys import claims_2d, claims_video, verdicts

ROOT = Path(__file__).resolve().parents[1]

SCORES, MARGINS = {"total": 1, "swd": -1}, {"total": 0.01, "swd": 0.01}


def seeds(*values, score="total") -> dict:
    """{seed: {score: value}}"""
    return {seed: {score: value} for seed, value in enumerate(values)}


def test_t_is_students():
    """The table of t agrees with Student's density, integrated."""
    for n, t, share in [(k, v, 0.975) for k, v in verdicts.T_975.items()] + [
        (k, v, 0.8) for k, v in verdicts.T_80.items()
    ]:
        x = torch.linspace(0, t, 20001, dtype=torch.float64)
        density = (
            math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi) * (1 + x * x / n) ** (-(n + 1) / 2)
        )
        assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(share, abs=2e-4)


def test_a_difference_is_paired_by_seed():
    """Seeds that differ by ten times the effect cancel; a seed that only one side has is left out."""
    a, b = seeds(0.1, 0.5, 0.9), seeds(0.08, 0.49, 0.87, 0.2)
    d = verdicts.difference(a, b, "total")
    assert d["mean"] == pytest.approx(0.02) and d["n"] == 3 and d["std"] == pytest.approx(0.01)
    half = 4.303 * 0.01 / 3**0.5
    assert d["low"] == pytest.approx(0.02 - half) and d["high"] == pytest.approx(0.02 + half)
    assert verdicts.difference(seeds(0.1), seeds(0.1), "total") is None


@pytest.mark.parametrize(
    "total, swd, word",
    [
        ((0.02, 0.04), (-0.02, 0.02), "holds"),
        ((0.02, 0.04), (0.02, 0.04), "inconclusive"),  # better on one, worse on the other (swd: lower is better)
        ((-0.04, -0.02), (-0.02, 0.02), "does not hold"),
        ((-0.02, 0.02), (-0.04, -0.02), "holds"),
        ((-0.02, 0.02), (-0.005, 0.005), "inconclusive"),
        ((-0.005, 0.009), (-0.005, 0.005), "level"),
        ((0.001, 0.009), (-0.005, 0.005), "level"),  # surely better, by too little to matter
    ],
)
def test_a_verdict_follows_from_the_intervals(total, swd, word):
    """One case for each word of the rule."""
    found = {"total": {"low": total[0], "high": total[1]}, "swd": {"low": swd[0], "high": swd[1]}}
    assert verdicts.verdict(found, SCORES, MARGINS) == word


def verdict_of(a: torch.Tensor, b: torch.Tensor) -> str:
    found = {"total": verdicts.difference(seeds(*a.tolist()), seeds(*b.tolist()), "total")}
    return verdicts.verdict(found, {"total": 1}, {"total": 1e-9})


def test_chance_gives_as_many_verdicts_as_the_table_says(g):
    """Equal methods, five seeds: one interval in twenty misses zero. Unequal ones: the pilot's promise is kept."""
    noise = torch.randn(4000, 2, 5, generator=g)
    found = [verdict_of(a, b) for a, b in noise]
    assert 1 - found.count("inconclusive") / len(found) == pytest.approx(0.05, abs=0.012)
    apart = verdicts.detectable(math.sqrt(2), 5)  # two spreads of one give paired differences of sqrt(2)
    seen = [verdict_of(a + apart, b) for a, b in noise]
    assert seen.count("holds") / len(seen) == pytest.approx(0.8, abs=0.05)


def test_the_line_on_chance_counts_rows_of_two_students_alone():
    """Exact or teachers' rows (C0, room), rows still being run and rows without a difference are left out."""
    row = lambda claim, verdict, scores=("total", "swd"): {
        "claim": claim,
        "verdict": verdict,
        "difference": {score: {} for score in scores},
    }
    rows = [row("C1", "holds"), row("bound", "inconclusive"), row("C2", "does not hold", ("total",))]
    rows += [row("C0", "holds"), row("room", "holds"), row("C1", "3 of 5 seeds"), row("C1", "not run", ())]
    said = verdicts.chance({"rows": rows})
    assert said.startswith("3 rows compare two students, on 5 scores in all. ")
    assert "0.2 of the intervals" in said and said.endswith("2 rows hold or do not hold.\n")


def test_the_pilot_compares_with_the_teachers_of_its_own_seeds(tmp_path):
    """Headroom is that of three seeds on both sides; teachers of other seeds, however good, change nothing."""
    rung = claims_2d.RUNG
    _, _, a, b, _ = rung.claims[0]
    for seed in verdicts.SEEDS:
        for name, of in ((a, 0.3), (b, 0.2)):
            (tmp_path / "jobs").mkdir(exist_ok=True)
            end = {"swd": of + seed / 100, "off_support": of}
            verdicts.job_file(tmp_path, name, seed).write_text(json.dumps({"name": name, "seed": seed, "end": end}))
        folder = tmp_path / rung.teacher_name(rung.toy_of(a, seed, False))
        folder.mkdir()
        best = {"swd": 0.1 + seed / 100 if seed < 3 else 9.0, "off_support": 0.1}
        (folder / "teacher.json").write_text(json.dumps({"seed": seed, str(rung.teacher_steps[0]): best}))
    found = verdicts.pilot(rung, tmp_path, 5)
    assert found["swd"]["headroom"] == pytest.approx(0.1) and found["off_support"]["headroom"] == pytest.approx(0.1)


@pytest.mark.parametrize("rung, folder", [(claims_2d.RUNG, "toy_2d"), (claims_video.rung("tiny"), "toy_video")])
def test_the_published_pilot_is_that_of_the_published_jobs(rung, folder):
    """The smallest difference and the headroom above the claims follow from the records beside them."""
    root = ROOT / "results" / folder / "claims"
    told, found = json.loads((root / "pilot.json").read_text()), verdicts.pilot(rung, root, 5)
    assert told.keys() == found.keys()
    assert all(told[score] == pytest.approx(found[score]) for score in found)
