"""The teacher that is trained once: its world of few modes, the decay of its rate, its command."""

import json

import pytest
import torch

import tmd_minimal as tmd
from settings import write_json
from toys import tiny_video, verdicts, video_teacher
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
    stamp = (tmp_path / "teacher.safetensors").read_bytes()
    assert video_teacher.main(command) == 0  # finished
    assert (tmp_path / "teacher.safetensors").read_bytes() == stamp
    capsys.readouterr()
    assert video_teacher.main([*command[:2], "--updates", "3"]) == 1 and "updates" in capsys.readouterr().err
    assert video_teacher.main(["--out", str(tmp_path / "x"), "--every", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_finished_teacher_is_the_ema_and_a_changed_byte_is_refused(tmp_path):
    """teacher.safetensors holds the weights given, teacher.json their hash; other bytes are one sentence."""
    net, folder = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120)).network(), tmp_path / "8-frames"
    folder.mkdir()
    write_json(folder / "curve.json", {"recipe": {}, "curve": []})
    video_teacher.save_weights(net, folder, 8)
    loaded, facts = video_teacher.load_weights(8, root=tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())
    assert facts["clips"]["frames"] == 8
    data = bytearray((folder / "teacher.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "teacher.safetensors").write_bytes(data)
    with pytest.raises(RuntimeError, match="is not the file"):
        video_teacher.load_weights(8, root=tmp_path)


def test_the_published_teacher_is_worth_distilling():
    """It meets the bar that room to fail needs, at the last update of its recipe."""
    facts = video_teacher.load_weights(8)[1]
    recipe, score = video_teacher.RECIPES["8-frames"], facts["curve"][-1]
    assert facts["recipe"] == recipe and score["updates"] == recipe["updates"]
    assert score["total"] >= 0.85 and min(score[key] for key in ("quality", "semantic", "motion")) >= 0.8
    assert score["diversity"] >= 0.9


def test_the_published_teacher_was_reproduced_by_its_command():
    """again.json: trained a second time by the recipe, its total agrees draw by draw, by the rule of compare()."""
    found = json.loads((video_teacher.PUBLISHED / "8-frames/again.json").read_text())
    assert found["same recipe"] and found["agree"]
    if not found["same weights"]:
        total = verdicts.difference(found["here"], found["published"], "total")
        assert total["n"] == 5 and total == found["here - published"]["total"]
        assert total["low"] < 0 < total["high"] or max(-total["low"], total["high"]) < 0.01
        page = (video_teacher.PUBLISHED / "README.md").read_text()
        assert f"one of {verdicts.detectable(total['std'], 5):.3f} in the total" in page, "what five noises would show"


def test_the_published_teacher_starts_every_run(tmp_path):
    """The default run trains no teacher: same weights whatever the seed, and the ruler finds what it was asked for."""
    draws = []
    for seed in (0, 1):
        ladder = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120, seed=seed))
        teacher, facts = ladder.fit_teacher(tmp_path)
        draws.append(teacher.patch.weight)
    assert (
        torch.equal(*draws)
        and facts["updates"] == video_teacher.RECIPES["8-frames"]["updates"]
        and not list(tmp_path.iterdir())
    )
    c = ladder.c[:120]
    clips = tmd.sample_teacher(teacher, ladder.x_1[:120], c, ladder.c_neg, grid=tmd.make_grid(4, 1.0), guidance=2.0)
    assert ladder.ruler.score(clips, c)["semantic"] > 0.8


@pytest.mark.parametrize(
    "other, words",
    [
        ({"width": 64}, "--width 96"),
        ({"frames": 10}, "frames is 10"),
        ({"modes": "free"}, "--modes few"),
        ({"patch_frames": 4}, "patch-frames 2"),
    ],
)
def test_other_clips_want_an_own_teacher(other, words):
    """Settings that the published teacher does not fit are one sentence that names them and the way out."""
    with pytest.raises(ValueError) as error:
        tiny_video.ToyVideo(**other)
    assert words in str(error.value) and "--own-teacher" in str(error.value)
    tiny_video.ToyVideo(own_teacher=True, **other)


def finished(folder, seed: int) -> float:
    """A folder with a finished teacher of random weights; the mean of some, which tells them from others."""
    torch.manual_seed(seed)
    net = video_teacher.network()
    folder.mkdir(parents=True)
    write_json(folder / "curve.json", {"recipe": {"updates": 1}, "curve": []})
    video_teacher.save_weights(net, folder, 8)
    return net.patch.weight.mean().item()


@pytest.mark.parametrize("apart, agree", [(0.002, True), (0.05, False)])
def test_a_teacher_trained_again_is_compared_by_its_score(tmp_path, capsys, monkeypatch, apart, agree):
    """Equal weights agree unscored; others by the interval of the total, draw by draw; no teacher is one sentence."""
    monkeypatch.setattr(video_teacher.load_weights, "__defaults__", (6, tmp_path, None))
    mark, asked = finished(tmp_path / "8-frames", 0), []

    def scored(net, ruler, frames, seed):
        asked.append(seed)
        mine = net.patch.weight.mean().item() != mark
        return dict.fromkeys(video_teacher.SCORES, 0.9 - apart * mine + seed % 5 / 1000 + mine * (seed % 2) / 1e4)

    monkeypatch.setattr(video_teacher, "scored", scored)
    assert video_teacher.main(["--compare", "--out", str(tmp_path / "8-frames")]) == 0 and not asked
    found = json.loads((tmp_path / "8-frames/again.json").read_text())
    assert found == {"same recipe": True, "same weights": True, "agree": True}
    finished(tmp_path / "other", 1)
    assert video_teacher.main(["--compare", "--out", str(tmp_path / "other")]) == 0
    found = json.loads((tmp_path / "other/again.json").read_text())
    assert len(asked) == 10 and len(set(asked)) == 5, "the same five noises for both"
    assert found["same weights"] is False and found["agree"] is agree
    assert found["here - published"]["total"]["mean"] == pytest.approx(-apart, abs=1e-4)
    capsys.readouterr()
    assert video_teacher.main(["--compare", "--out", str(tmp_path / "none")]) == 1
    assert "train it first" in capsys.readouterr().err
