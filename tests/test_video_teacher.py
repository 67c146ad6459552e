"""The teacher that is trained once: its world of few modes, the decay of its rate, its command."""

import json

import pytest
import torch

import tmd_minimal as tmd
from toys import video_teacher
from toys.moving_shapes import FIRST, MOTIONS, World
from toys.planar import PlanarNet


@pytest.mark.parametrize("motion, modes", list(zip(MOTIONS, (1, 4, 8, 8, 8))))
def test_a_motion_has_few_modes(motion, modes, g):
    """At one place a motion of World(modes="few") has 1, 4 or 8 paths, each drawn about equally often."""
    u = torch.cat([torch.full((4000, 2), 0.3), torch.rand(4000, 3, generator=g)], 1)
    token = torch.full((4000,), FIRST[2] + MOTIONS.index(motion))
    paths = World(8, 12, modes="few").trajectory(token, u)
    _, counts = (paths * 1e4).round().flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == modes and counts.min() > 0.7 * 4000 / modes
    free = World(8, 12).trajectory(token, u)
    assert motion == "still" or len((free * 1e4).round().flatten(1).unique(dim=0)) > 1000


def rates(tmp_path, name, decay, stop=None) -> tuple[list, dict]:
    """The rate of every one of 12 updates, and the last EMA; `stop`: killed there and resumed."""
    seen = []

    data = lambda n, g: (torch.randn(n, 2, generator=g), None)
    more = {"updates": 12, "batch": 4, "lr": 1e-2, "path": str(tmp_path / name), "progress": False, "save_every": 4}
    for kill in (stop, None):
        tmd.seed_everything(0)
        try:
            net = PlanarNet(2, 8, 3)

            def on_step(phase, terms, kill=kill):
                seen.append(phase.optimizers["teacher"].param_groups[0]["lr"])
                if phase.step == kill:
                    raise KeyboardInterrupt

            return seen, tmd.train_teacher(net, data, decay=decay, on_step=on_step, **more)[0].state_dict()
        except KeyboardInterrupt:
            del seen[4:]  # what the checkpoint at 4 knows


def test_the_rate_falls_at_the_end_and_resumes_exactly(tmp_path):
    """The rate is constant, then falls over the last third; a killed run goes on with the same rates and bits."""
    seen, whole = rates(tmp_path, "a.pt", 1 / 3)
    assert seen == pytest.approx([1e-2] * 9 + [0.75e-2, 0.5e-2, 0.25e-2])
    assert rates(tmp_path, "b.pt", 0.0)[0] == [1e-2] * 12
    again, resumed = rates(tmp_path, "c.pt", 1 / 3, stop=6)
    assert again == seen and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_command_writes_its_curve_and_goes_on(tmp_path, capsys, monkeypatch):
    """Scores against updates in curve.json; a longer run needs a folder of its own; bad numbers are one sentence."""
    score = dict.fromkeys(("total", "quality", "semantic", "motion", "diversity"), 0.5) | {"laws": {}}
    monkeypatch.setattr(video_teacher.Ruler, "score", lambda self, clips, c: score)
    monkeypatch.setattr(tmd, "sample_teacher", lambda net, x_1, *_, **__: x_1)
    command = ["--out", str(tmp_path), "--updates", "2", "--every", "1"]
    assert video_teacher.main(command) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())["curve"]
    assert [point["updates"] for point in curve] == [1, 2] and {"loss", "total", "laws"} <= curve[0].keys()
    assert video_teacher.main(command) == 0  # finished
    capsys.readouterr()
    assert video_teacher.main([*command[:2], "--updates", "3"]) == 1 and "updates" in capsys.readouterr().err
    assert video_teacher.main(["--out", str(tmp_path / "x"), "--every", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
