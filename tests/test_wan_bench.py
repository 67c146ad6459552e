"""The benchmark of wan_scale/: every case runs on the tiny size, and its tables say what was measured."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
from wan_scale import bench, run
from wan_scale.config import preset


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("bench")
    found = bench.run(preset("tiny"), run.size_of("tiny"), "tiny", out, repeats=1)
    assert json.loads(next(out.glob("tiny-*.json")).read_text()) == json.loads(json.dumps(found))
    return found


def test_every_case_is_measured(record):
    """Forward, both stages by their real loops, sampling at every (M, N), stock calls and the VAE: seconds, none failed."""
    cases = record["cases"]
    assert {"matmul", "forward", "stage 2", "stage 1", "sampling", "sampling, stock calls", "VAE decode"} == set(cases)
    assert not [name for name, found in cases.items() if "failed" in found]
    assert set(cases["stage 2"]["seconds"]) == {"student", "critic"}
    assert list(cases["sampling"]["seconds"]) == ["M1N1", "M1N2", "M1N4", "M2N2", "M4N1"]
    assert all(
        value > 0
        for found in cases.values()
        for value in (found["seconds"].values() if isinstance(found["seconds"], dict) else [found["seconds"]])
    )


def test_table(record):
    """A row a number, with the plan's seconds at the card's own matmul rate beside it."""
    table = bench.markdown([record])
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 1 + 1 + 2 + 1 + 5 + 5 + 1
    forward = next(row for row in rows if row[0].strip() == "forward")
    rate = record["cases"]["matmul"]["tflops"] * 1e12
    assert float(forward[2]) == pytest.approx(bench.plan.flops(record["config"], record["tokens"], H=2)["whole"]["total"] / rate, rel=1e-3)
    assert "Not measured yet" in bench.markdown([])


def test_a_case_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    """Out of memory in one case is a line of the record; the cases after it are measured."""
    monkeypatch.setattr(bench.Bench, "training", lambda self, kind: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    monkeypatch.setattr(bench, "GRIDS", ((1, 1),))
    found = bench.run(preset("tiny"), run.size_of("tiny"), "tiny", tmp_path, repeats=1)["cases"]
    assert found["stage 2"]["failed"] == found["stage 1"]["failed"] == "out of memory" and found["sampling"]["seconds"]["M1N1"] > 0


def test_published_benchmarks_are_the_files():
    """BENCHMARKS.md is what publish writes from bench_results/."""
    import publish

    assert (bench.RESULTS.parent / "BENCHMARKS.md").read_text() == publish.benchmarks()
