"""Default-sized runs, minutes each: make slow."""

import pytest

import toy_2d
import toy_video


@pytest.mark.slow
@pytest.mark.parametrize("data", ["spirals", "checkerboard"])
def test_default_run_draws_shapes_not_blobs(data, tmp_path):
    """In about three minutes teacher and students lie on the shape, and students beat the teacher of as few steps."""
    cfg = toy_2d.Toy(data=data, out=str(tmp_path))
    metrics = toy_2d.run(cfg)
    models = metrics["models"]
    # a Gaussian blob is over 40 % off the support
    assert models["teacher_50"]["off_support"] < 0.1 and models["teacher_50"]["swd"] < 0.06
    few = models[f"teacher_{cfg.M}"]
    for student in ("dmd2v", "tmd"):
        assert models[student]["off_support"] < 0.2 and models[student]["swd"] < 0.25
        assert models[student]["swd"] < few["swd"] and models[student]["off_support"] < few["off_support"]
    assert metrics["total_seconds"] < 300


@pytest.mark.slow
def test_default_video_run_names_shapes_and_motions(tmp_path):
    """In at most 12 minutes teacher and one-step students are far above chance (1/30) and the one-step teacher."""
    metrics = toy_video.run(toy_video.ToyVideo(size="tiny", out=str(tmp_path)))
    models = metrics["models"]
    for name in ("teacher_50", "dmd2v", "tmd"):
        assert models[name]["semantic"] > 0.25, name
        assert models[name]["total"] > models["teacher_1"]["total"] + 0.15, name
    assert metrics["total_seconds"] < 900
