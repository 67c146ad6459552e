"""toy_2d.py as its users run it, and the data and distances it judges by."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Inline

import toy_2d
from toys import claims_2d, ladder, plane_pictures
from toys.planar import DATA, dataset, off_support, sliced_wasserstein

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--teacher-updates 30 --stage1-updates 12 --iterations 20 --samples 200 --width 16 --depth 3 --H 1 --N 2 "
        "--batch 16").split()  # fmt: skip


def tiny(out, *more):
    return toy_2d.main([*TINY, "--out", str(out), *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One tiny run, made once; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "workers", Inline)
        assert tiny(folder) == 0
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


# -- data and distances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_data_lie_on_their_own_support(name, g):
    """Less than 2 % of the data is off its support and its class's; a blob of the data's own moments mostly is."""
    data = dataset(name)
    x, label = data.draw(5000, g)
    assert off_support(data, x) < 0.02 and off_support(data, x, label) < 0.02
    blob = x.mean(0) + torch.randn(5000, 2, generator=g) @ torch.linalg.cholesky(torch.cov(x.T)).T
    assert off_support(data, blob) > 0.4
    assert off_support(data, x, (label + 1) % data.classes) > 0.9  # another class's support is another place
    assert x.mean(0).norm() < 0.15 and 0.7 < x.std() < 1.3 and label.unique().numel() == data.classes


def test_support_metric_sees_bridges_that_sliced_wasserstein_hides(g):
    """Samples between the modes, a tenth of all, show in off_support, not in sliced Wasserstein."""
    data = dataset("gaussians")
    x, _ = data.draw(5000, g)
    other, _ = data.draw(5000, g)
    bridged = other.clone()
    angle = torch.rand(500, generator=g) * 2 * torch.pi
    bridged[:500] = 1.45 * torch.stack([angle.cos(), angle.sin()], -1)
    floor = sliced_wasserstein(other, x)
    assert off_support(data, bridged) > off_support(data, other) + 0.02
    assert sliced_wasserstein(bridged, x) < 4 * floor


def test_sliced_wasserstein_against_closed_forms(g):
    """A shift by d costs d E|cos| = 2 d / pi in the plane; equal samples cost nothing; unequal sizes are refused."""
    x = torch.randn(4000, 2, generator=g)
    assert sliced_wasserstein(x, x[torch.randperm(4000, generator=g)]) < 1e-6
    assert sliced_wasserstein(x, x + torch.tensor([3.0, 0.0])) == pytest.approx(6 / torch.pi, rel=0.05)
    with pytest.raises(ValueError, match="draw as many"):
        sliced_wasserstein(x, x[:10])


# -- the command ------------------------------------------------------------------------------------------------------


def test_quick_run_visibly_works(tmp_path):
    """--quick: in so many seconds of a core, with all files and facts, and students clearly nearer the data than the
    teacher in one step.
    """
    start = os.times()
    assert toy_2d.main(["--quick", "--out", str(tmp_path)]) == 0
    assert sum(os.times()[:4]) - sum(start[:4]) < 90  # of a core, workers too: the machine may be busy
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("teacher_50", "teacher_4", "teacher_2", "teacher_1", "dmd2v", "stage1", "tmd"):
        record = metrics["models"][name]
        assert {"effective_nfe", "swd", "off_support", "seconds", "updates", "seed"} <= set(record)
    models, floors = metrics["models"], metrics["floors"]
    assert 0 < floors["swd"] < 0.1 and 0 <= floors["off_support"] < 0.02
    assert models["teacher_50"]["swd"] < 0.15
    for student in ("dmd2v", "stage1", "tmd"):
        assert models[student]["swd"] < 0.5 * models["teacher_1"]["swd"]
    assert models["tmd"]["updates"] == models["dmd2v"]["updates"]  # the baseline is trained as long
    for name in ("samples.png", "inner_flow.png", "curves.png", "transition.gif", "explore.html"):
        assert (tmp_path / name).stat().st_size > 5000
    saved = np.load(tmp_path / "samples.npz")
    assert saved["tmd"].shape == (2000, 2) and np.isfinite(saved["tmd"]).all()


def strip(value):
    """Metrics without what a clock says."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if "seconds" not in k and k != "out"}
    return [strip(v) for v in value] if isinstance(value, list) else value


OTHER = ["--M", "2", "--outer", "renoised"], ["--conditional", "--guidance", "1.5", "--data", "moons"]


@pytest.mark.parametrize("more", [[], *(pytest.param(more, marks=pytest.mark.slow) for more in OTHER)])
def test_same_seed_same_numbers_and_resume_after_kill(more, tmp_path, monkeypatch):
    """Killed with -9 in the middle and resumed, a run gives the numbers of an undisturbed one, bit for bit."""
    monkeypatch.setattr(plane_pictures, "draw", lambda folder: None)  # the quick run draws
    workers = ladder.workers
    monkeypatch.setattr(ladder, "workers", Inline)
    assert tiny(tmp_path / "a", *more) == 0
    command = [sys.executable, str(ROOT / "toy_2d.py"), *TINY, *more, "--out", str(tmp_path / "b"), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (tmp_path / "b/checkpoints/teacher.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b/metrics.json").exists()
    if not more:  # the plain run resumes with a real worker
        monkeypatch.setattr(ladder, "workers", workers)
    assert tiny(tmp_path / "b", *more, "--resume") == 0
    monkeypatch.setattr(ladder, "workers", Inline)
    a, b = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in "ab")
    assert strip(a) == strip(b)
    assert np.array_equal(np.load(tmp_path / "a/samples.npz")["tmd"], np.load(tmp_path / "b/samples.npz")["tmd"])
    if not more:
        assert tiny(tmp_path / "c", "--seed", "1") == 0
        assert strip(a)["models"] != strip(json.loads((tmp_path / "c/metrics.json").read_text()))["models"]


def test_redraw_uses_saved_numbers_alone(copy):
    """--redraw makes the pictures again from metrics.json and samples.npz."""
    shutil.rmtree(copy / "checkpoints")
    for name in ("samples.png", "curves.png"):
        (copy / name).unlink()
    assert tiny(copy, "--redraw") == 0
    assert (copy / "samples.png").exists() and (copy / "curves.png").exists()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--data", "swiss"], "choose one of spirals"),
        (["--H", "3", "--depth", "3"], "1 <= H < depth"),
        (["--N", "0"], "N is 0"),
        (["--M", "0"], "M is 0"),
        (["--samples", "0"], "samples is 0"),
        (["--outer-shift", "-1"], "must be positive"),
        (["--dmd-shift", "0"], "must be positive"),
        (["--depth", "2", "--H", "1"], "depth is 2"),
        (["--stage1-updates", "-5"], "stage1_updates is -5"),
        (["--threads", "0"], "positive"),
        (["--claims", "--seed", "3"], "leave out seed"),
        (["--outer", "sideways"], "choose one of"),
        (["--out", "/proc/nowhere"], "cannot write"),
        (["--redraw", "--out", "/nonexistent"], "holds no whole run"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr(arguments, words, capsys):
    """Exit status 1, one line that says what is wrong, no traceback."""
    assert toy_2d.main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_another_run_s_folder_is_refused_and_left_alone(copy, capsys):
    """A folder that holds a run with other settings is refused, naming the difference; nothing in it changes."""
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert tiny(copy, "--seed", "5") == 1
    assert "--seed 0" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def test_truncated_checkpoint_is_refused_by_the_command(copy, capsys, inline):
    """--resume onto half a checkpoint: one sentence, nothing overwritten."""
    file = copy / "checkpoints/tmd.stage2.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert tiny(copy, "--resume") == 1
    assert "truncated" in capsys.readouterr().err and len(file.read_bytes()) == 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_read_only_folder(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert tiny(tmp_path / "x") == 1 and "cannot write" in capsys.readouterr().err


# -- claims -----------------------------------------------------------------------------------------------------------


def test_every_claim_names_jobs_that_exist_and_differ():
    """Each row compares two known jobs (or one job with itself at N = 1, or with a teacher), and the claims asked for
    are all there.
    """
    known = {*claims_2d.JOBS, *(f"teacher {steps}" for steps in claims_2d.RUNG.teacher_steps)}
    for claim, _, a, b, phase in claims_2d.CLAIMS:
        assert a in known and b in known and (a != b or "/" in phase)
        assert a.startswith("teacher") == (claim == "room")
    asked = {"room", "bound", "C1", "C2", "C3", "C4", "C6", "C7", "C8", "C10", "trap 2", "trap 3", "trap 5", "trap 9"}
    assert asked <= {row[0] for row in claims_2d.CLAIMS}
    for name in claims_2d.JOBS:
        claims_2d.RUNG.toy_of(name, 0, False)


def test_claims_resume_and_tabulate(tmp_path, monkeypatch, inline):
    """A second call runs no finished job and writes the same table, whose exact rows have verdicts, too."""
    exact = {key: {seed: {"swd": swd + 0.01 * seed} for seed in (0, 1)} for key, swd in (("tm", 0.1), ("flow", 0.5))}
    monkeypatch.setattr(claims_2d, "exact_c0", lambda: [{"sigma": 0.02, "M": 1, **exact}])
    result = claims_2d.run(str(tmp_path), quick=True)
    assert [row["verdict"] for row in result["rows"] if "exact oracle" in row["setting"]] == ["holds"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").glob("*.json")}
    first = (tmp_path / "claims.md").read_text()
    assert len(stamps) == 6 and "C4" in first
    claims_2d.run(str(tmp_path), quick=True)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").glob("*.json")}
    assert first == (tmp_path / "claims.md").read_text()


def test_the_exact_rows_are_computed_once():
    """The tables are written after every job; the nine exact settings, which take a minute, are not drawn again."""
    rows = claims_2d.exact_c0((0, 1), 40)
    assert len({(row["sigma"], row["M"]) for row in rows}) == 9
    assert all(set(row["tm"]) == set(row["flow"]) == {0, 1} for row in rows)
    assert claims_2d.exact_c0((0, 1), 40) is rows
