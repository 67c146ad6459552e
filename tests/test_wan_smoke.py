"""The first minutes on a GPU, rehearsed on a CPU: `smoke` runs every step of a run at the tiny size, and names them."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from wan_scale import run
from wan_scale.training import train

STEPS = ["random weights", "data", "stage 1", "stage 1, resumed", "stage 2", "sample", "export"]


def smoke(out, *more) -> int:
    return run.main(["smoke", "--preset", "tiny", "--out", str(out), *more])


def test_every_step_of_a_run_is_smoked(tmp_path, capsys, monkeypatch):
    """Weights, data, two updates of stage 1 and one more from its checkpoint, ten iterations of stage 2, a video, an
    export: each is named before it starts, and its seconds are written. A step that fails is named, and what it
    was; the next smoke begins anew. Nothing that another command made is touched.
    """
    out = tmp_path / "smoke"
    with monkeypatch.context() as patch:
        patch.setattr(train, "stage1", lambda cfg: (_ for _ in ()).throw(RuntimeError("no kernel\nand its trace")))
        assert smoke(out) == 1
    steps = json.loads((out / "smoke.json").read_text())["steps"]
    assert list(steps) == STEPS[:3] and steps["stage 1"] == {"failed": "RuntimeError: no kernel"}
    weights = (out / "wan" / "model_index.json").stat().st_mtime_ns
    assert smoke(out) == 0
    said, steps = capsys.readouterr().out, json.loads((out / "smoke.json").read_text())["steps"]
    assert list(steps) == STEPS and all(step["seconds"] >= 0 for step in steps.values())
    places = [said.rindex(f"smoke {i}/7: {name} ...") for i, name in enumerate(STEPS, 1)]
    assert places == sorted(places) and "every step ran" in said[places[-1] :]
    facts = [json.loads((out / phase / "student.json").read_text()) for phase in ("stage1", "stage2")]
    assert (facts[0]["updates"], facts[0]["was_finished_at"], facts[1]["updates"]) == (3, [2], 10)
    lines = [json.loads(line) for line in (out / "stage2" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "vsd" in line] == [5, 10]
    assert not (out / "stage1" / "checkpoints").exists() and len(list((out / "samples" / "tmd").glob("*.mp4"))) == 1
    assert (out / "export" / "model_index.json").exists()
    assert (out / "wan" / "model_index.json").stat().st_mtime_ns == weights
    (out / "smoke.json").unlink()
    assert smoke(out) == 1 and (out / "stage2" / "student.json").exists()
    assert "was not made by smoke, which begins anew each time; give another --out" in capsys.readouterr().err


def test_given_settings_stand():
    """What the command line gives is not made small."""
    from wan_scale import smoke
    from wan_scale.config import preset

    given = {"stage1_updates": 5, "frames": 17, "out": "runs/x"}
    cfg = smoke.settings(preset("1.3b", **given), "1.3b", given)
    assert (cfg.stage1_updates, cfg.frames, cfg.stage2_iterations, cfg.global_batch) == (5, 17, 10, 1)
    assert cfg.model == str(cfg.folder("wan").resolve()) and cfg.H == preset("1.3b").H and cfg.width == 832
    assert cfg.prompts.endswith("x/smoke-prompts.txt"), "not the file of a run"
    given |= {"model": "Wan", "prompts": "mine.txt"}
    with pytest.raises(ValueError, match="smoke makes its own model and prompts; leave --model and --prompts away"):
        smoke.settings(preset("1.3b", **given), "1.3b", given)
