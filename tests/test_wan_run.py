"""The command line, from nothing to mp4s, an exported folder and a score sheet, on the tiny preset; and what it says
when it cannot.
"""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import WanPipeline

from wan_scale import run
from wan_scale.config import preset
from wan_scale.data.files import read_json
from wan_scale.data.prompts import NEGATIVE
from wan_scale.pictures import read_video, write_video
from wan_scale.pipeline import TMDWanPipeline
from wan_scale.sampling import sample
from wan_scale.sampling.vbench import label
from wan_scale.training import train

FEW = [
    "--sample-prompts",
    "2",
    "--clips",
    "2",
    "--stage1-updates",
    "2",
    "--stage2-iterations",
    "5",
    "--data-steps",
    "2",
    "--preview-every",
    "5",
    "--shard-size",
    "2",
]
SIZE = {"num_frames": 9, "height": 64, "width": 64}


def command(*args) -> int:
    return run.main([str(a) for a in args])


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """OUT of one whole ladder."""
    out = tmp_path_factory.mktemp("ladder") / "out"
    torch.set_num_threads(1)
    assert command("--preset", "tiny", "--out", out, *FEW) == 0
    return out


def settings(ladder, **more):
    names = {
        "clips": 2,
        "sample_prompts": 2,
        "stage1_updates": 2,
        "stage2_iterations": 5,
        "data_steps": 2,
        "preview_every": 5,
        "shard_size": 2,
    }
    more = {"out": str(ladder), **more}
    return preset("tiny", model=str(ladder / "tiny-wan"), prompts=str(ladder / "prompts.txt"), **{**names, **more})


def test_samples_compare_and_the_run_has_a_page(ladder, tmp_path):
    """What `sample` wrote of student and teacher makes a study of whole prompts; report.html shows both stages."""
    a, b = (ladder / "samples" / who for who in ("tmd", "teacher"))
    assert command("compare", a, b, "--out", tmp_path / "study") == 0
    rows = json.loads((tmp_path / "study" / "key.json").read_text(encoding="utf-8"))["pairs"]
    assert sorted({row["prompt"] for row in rows}) == ["a blue cube", "a red ball"] and all(row["seed"] for row in rows)
    told = json.loads((a / "prompts.json").read_text(encoding="utf-8"))
    assert told["a red ball-1.mp4"] == "a red ball" and len(told) == 4
    page = (ladder / "report.html").read_text(encoding="utf-8")
    assert "Stage 1" in page and "Stage 2" in page and "http-equiv" not in page


def test_ladder_from_nothing(ladder):
    """One command makes the folder, clips, both stages, mp4s of 9 frames for student and teacher, a picture and a score
    sheet.
    """
    for who in ("tmd", "teacher"):
        videos = sorted((ladder / "samples" / who).glob("*.mp4"))
        assert [v.name for v in videos] == [
            "a blue cube-0.mp4",
            "a blue cube-1.mp4",
            "a red ball-0.mp4",
            "a red ball-1.mp4",
        ]
        assert all(read_video(v).shape == (9, 64, 64, 3) for v in videos)
    timing = json.loads((ladder / "samples" / "tmd" / "timing.json").read_text())
    assert (timing["M"], timing["N"], timing["effective_nfe"]) == (2, 2, 3.0)
    assert set(timing["median_seconds"]) == {"text", "backbone", "head", "vae"}
    scores = json.loads((ladder / "scores.json").read_text())
    assert set(scores["cheap"]) == {"tmd", "teacher"} and scores["cheap"]["tmd"]["mean"]["diversity"] > 0
    assert (
        "VBench: not run" in (ladder / "scores.md").read_text()
        and (ladder / "samples" / "grid.png").stat().st_size > 10_000
    )


def test_finished_steps_are_skipped(ladder, monkeypatch):
    """The same command again trains and samples nothing and changes no byte; other settings are refused by name."""
    files = {f: f.read_bytes() for f in ladder.rglob("*") if f.is_file() and f.suffix in (".mp4", ".safetensors")}
    monkeypatch.setattr(train.Training, "run", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(sample, "make_pipeline", lambda *a, **k: pytest.fail("sampled again"))
    assert command("--preset", "tiny", "--out", ladder, *FEW) == 0
    assert all(f.read_bytes() == content for f, content in files.items())


def test_other_settings_are_refused(ladder, capsys):
    """Another rate for a finished stage, and another sampler for finished data, end in a sentence that names it."""
    assert command("stage1", "--preset", "tiny", "--out", ladder, *FEW, "--stage1-lr", "1e-3") == 1
    assert "made with another --stage1-lr; give the same settings or another --out" in capsys.readouterr().err
    assert command("data", "--preset", "tiny", "--out", ladder, *FEW, "--sampler", "euler") == 1
    assert "sampler" in capsys.readouterr().err


def test_a_video_depends_on_its_name_alone(ladder):
    """A deleted video comes back byte for byte, though it is sampled alone."""
    video = ladder / "samples" / "tmd" / "a blue cube-1.mp4"
    before = video.read_bytes()
    video.unlink()
    assert command("sample", "--preset", "tiny", "--out", ladder, *FEW) == 0
    assert video.read_bytes() == before


def test_other_grids_than_trained(ladder):
    """--M and --N on the command line of `sample` go into a folder of their own, with their own effective NFE."""
    assert command("sample", "--preset", "tiny", "--out", ladder, *FEW, "--M", "1", "--N", "4") == 0
    timing = json.loads((ladder / "samples" / "tmd-M1N4" / "timing.json").read_text())
    assert (timing["M"], timing["N"], timing["effective_nfe"]) == (1, 4, 2.5)


def test_export_round_trip(ladder):
    """The exported folder loads with one call, strictly, and gives the same latents and frames as the student that was
    trained.
    """
    assert command("export", "--preset", "tiny", "--out", ladder, *FEW) == 0
    cfg = settings(ladder)
    ours = sample.make_pipeline(cfg, torch.device("cpu"))
    pipe = TMDWanPipeline.from_pretrained(ladder / "export")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, WanPipeline)
    for kind in ("latent", "np"):
        mine, theirs = (
            p("a red ball", generator=torch.Generator().manual_seed(3), output_type=kind, **SIZE).frames
            for p in (ours, pipe)
        )
        assert np.array_equal(np.asarray(mine), np.asarray(theirs)) and np.isfinite(np.asarray(mine)).all()
    assert theirs.shape == (1, 9, 64, 64, 3) and 0 <= theirs.min() and theirs.max() <= 1
    card = (ladder / "export" / "README.md").read_text()
    assert "effective NFE 3.00" in card and "--stage2-lr" in card and str(ladder) not in card
    weights = ladder / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    trained = cfg.folder("stage2", "student.safetensors")
    from safetensors.torch import load_file

    exported, wanted = load_file(weights), load_file(trained)
    assert {f"student.{name}" for name in wanted} == set(exported)
    assert all(torch.equal(exported[f"student.{name}"], value) for name, value in wanted.items())


def test_pipeline_is_called_like_wans(ladder):
    """A list of prompts, a generator for each, several videos a prompt; a video does not depend on its neighbours; bad
    sizes are named.
    """
    pipe = sample.make_pipeline(settings(ladder), torch.device("cpu"))
    g = lambda seed: torch.Generator().manual_seed(seed)
    both = pipe(["a red ball", "a blue cube"], generator=[g(1), g(2)], output_type="latent", **SIZE).frames
    alone = pipe("a blue cube", generator=g(2), output_type="latent", **SIZE).frames
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    assert (
        pipe("a red ball", num_videos_per_prompt=2, generator=g(0), output_type="latent", return_dict=False, **SIZE)[
            0
        ].shape[0]
        == 2
    )
    for other in ({"N": 1}, {"M": 1}):
        assert not torch.equal(pipe("a blue cube", generator=g(2), output_type="latent", **other, **SIZE).frames, alone)
    with pytest.raises(ValueError, match=r"4 k \+ 1 frames"):
        pipe("a red ball", num_frames=8, height=64, width=64)
    with pytest.raises(ValueError, match="Provide either"):
        pipe(**SIZE)


def test_half_precision_export(ladder):
    """In bf16 the pipeline runs, keeps times, tables and fusion in float32, and stays near the float32 latents."""
    if not (ladder / "export").exists():
        command("export", "--preset", "tiny", "--out", ladder, *FEW)
    pipe, half = (
        TMDWanPipeline.from_pretrained(ladder / "export", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    student = half.transformer.student
    assert {student.gate.dtype, student.fuse.table.dtype, student.net.transformer.scale_shift_table.dtype} == {
        torch.float32
    }
    assert student.net.patch.weight.dtype == torch.bfloat16
    a, b = (
        p("a red ball", generator=torch.Generator().manual_seed(0), output_type="latent", **SIZE).frames.float()
        for p in (pipe, half)
    )
    assert (a - b).norm() / a.norm() < 0.05


def test_teacher_is_the_stock_pipeline(ladder, tmp_path):
    """A video of `--student teacher` is what diffusers' WanPipeline gives from its seed, guidance, shift and the
    negative prompt.
    """
    cfg = settings(ladder, student="teacher", flow_shift=5.0, out=str(tmp_path))
    folder = sample.sample(cfg)
    stock = WanPipeline.from_pretrained(ladder / "tiny-wan")
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, flow_shift=5.0)
    how = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": 2}
    (video,) = (v for v in sample.planned(cfg) if v.name == "a blue cube-0.mp4")
    frames = stock("a blue cube", generator=torch.Generator().manual_seed(video.seed), **how, **SIZE).frames[0]
    write_video(frames, tmp_path / "stock.mp4", comment=label(video, read_json(folder / "made.json")))
    assert (tmp_path / "stock.mp4").read_bytes() == (folder / "a blue cube-0.mp4").read_bytes()


def test_plan_and_dry_run_start_nothing(tmp_path, capsys):
    """plan prints its table for both sizes; --dry-run prints every resolved setting as JSON; neither makes a folder."""
    for name, words in (("1.3b", "1,419.0 M"), ("14b", "14,288.5 M")):
        assert command("plan", "--preset", name, "--gpus", "8", "--out", tmp_path / "x") == 0
        text = capsys.readouterr().out
        assert words in text and "not measured" in text and "fits" in text
    assert command("--preset", "14b", "--out", tmp_path / "x", "--M", "1", "--dry-run") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["stage2_iterations"], shown["taps"], shown["M"], shown["stage1_lr"]) == (5000, "19,29,39", 1, 1e-5)
    assert not (tmp_path / "x").exists()


def test_bare_command_says_what_is_needed(capsys):
    """With no weights and no prompts it explains what the reproduction needs and what the tiny preset would do, and
    stops with status 1.
    """
    assert command() == 1
    shown = capsys.readouterr()
    assert (
        "weights" in shown.out and "--preset tiny" in shown.out and "wan_scale: give --model and --prompts" in shown.err
    )


@pytest.mark.parametrize(
    "missing", ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae"]
)
def test_a_folder_that_lacks_something(ladder, tmp_path, capsys, missing):
    """A wrong layout or a missing weight file is named before anything starts."""
    shutil.copytree(ladder / "tiny-wan", tmp_path / "wan")
    gone = tmp_path / "wan" / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert (
        command(
            "--preset",
            "1.3b",
            "--model",
            tmp_path / "wan",
            "--prompts",
            ladder / "prompts.txt",
            "--out",
            tmp_path / "out",
        )
        == 1
    )
    error = capsys.readouterr().err
    assert missing.split("/")[-1] in error and error.count("\n") == 1 and not (tmp_path / "out" / "data").exists()


def test_eval_without_videos_and_with_vbench(ladder, tmp_path, capsys):
    """Nothing sampled is a sentence; VBench's 16 results give its three numbers beside the paper's."""
    assert command("eval", "--preset", "tiny", "--out", tmp_path / "none") == 1
    assert "run `sample` first" in capsys.readouterr().err
    from wan_scale.sampling.vbench import DIMENSIONS

    (tmp_path / "results").mkdir()
    for name, (_, high, _) in DIMENSIONS.items():
        (tmp_path / "results" / f"{name}_eval_results.json").write_text(json.dumps({name: [high, []]}))
    assert command("eval", "--preset", "tiny", "--out", ladder, *FEW, "--vbench-results", tmp_path / "results") == 0
    shown = capsys.readouterr().out
    assert "**100.00**" in shown and "rCM" in shown


def test_where_samples_go(ladder):
    """Only a grid other than the trained one gets a folder of its own; the teacher has no grid."""
    cfg = settings(ladder)
    names = [sample.folder_of(cfg, m, n).name for m, n in ((None, None), (2, 2), (2, None), (1, None), (None, 4))]
    assert names == ["tmd", "tmd", "tmd", "tmd-M1N2", "tmd-M2N4"]
    assert sample.folder_of(settings(ladder, student="teacher"), 1, 4).name == "teacher"


def test_a_prompt_with_two_seeds(ladder, tmp_path):
    """A JSONL prompt that comes twice makes two videos, numbered, each from its own seed."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a ball", "seed": 5}\n{"prompt": "a ball", "seed": 9}\n')
    cfg = settings(ladder, samples_per_prompt=1)
    cfg.prompts = str(tmp_path / "p.jsonl")
    assert [(v.name, v.seed) for v in sample.planned(cfg)] == [("a ball-0.mp4", 5), ("a ball-1.mp4", 9)]


def test_what_can_be_known_before_the_data(tmp_path, capsys):
    """A batch that does not divide, and a GPU that is not there, stop the ladder before it makes anything but the tiny
    folder.
    """
    assert command("--preset", "tiny", "--out", tmp_path / "x", "--micro-batch", "3") == 1
    assert (
        "global_batch 4 does not divide by micro_batch 3" in capsys.readouterr().err
        and not (tmp_path / "x" / "data").exists()
    )
    if not torch.cuda.is_available():
        assert command("--preset", "tiny", "--out", tmp_path / "y", "--device", "cuda") == 1
        assert "this torch sees no GPU" in capsys.readouterr().err


def test_settings_of_another_phase_do_not_matter(ladder, capsys):
    """A finished stage 1 is kept when a setting of stage 2, or how the batch is cut, changes."""
    assert command("stage1", "--preset", "tiny", "--out", ladder, *FEW, "--dmd-shift", "2", "--micro-batch", "1") == 0
    assert "stage1: finished" in capsys.readouterr().out


def test_videos_of_another_student_are_not_mixed(ladder, tmp_path, capsys):
    """A samples folder knows whose videos it holds; another student or size is refused, not scored as this one."""
    shutil.copytree(ladder, tmp_path / "out")
    made = tmp_path / "out" / "samples" / "tmd" / "made.json"
    made.write_text(made.read_text().replace('"student": "', '"student": "0'))
    arguments = ("sample", "--preset", "tiny", "--out", tmp_path / "out", *FEW)
    assert command(*arguments) == 1
    assert "holds videos made with another student; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(("graph", "wanted"), [("off", False), ("auto", True)])
def test_graph_reaches_the_pipeline(ladder, monkeypatch, graph, wanted):
    """--graph says whether sampling asks for the head as a CUDA graph."""

    def fast(self, attn, compiled, graphed):
        raise RuntimeError(f"graphed is {graphed}")

    monkeypatch.setattr(sample.TMDWanPipeline, "fast", fast)
    with pytest.raises(RuntimeError, match=f"graphed is {wanted}"):
        sample.sample(settings(ladder, graph=graph), M=3, N=1)


def test_bf16_sampling_computes_in_bf16(ladder):
    """With --precision bf16 the student's large weights and its samples are half precision, the VAE's and the exported
    ones float32.
    """
    pipe = sample.make_pipeline(settings(ladder, precision="bf16"), torch.device("cpu"))
    student = pipe.transformer.student
    assert student.net.patch.weight.dtype == torch.bfloat16 and student.gate.dtype == pipe.vae.dtype == torch.float32
    seen = []
    student.net.blocks[0].attn1.to_q.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    pipe("a red ball", generator=torch.Generator().manual_seed(0), **SIZE)
    assert set(seen) == {torch.bfloat16}


def test_inner_noise_and_decoding(ladder):
    """From one outer noise another generator gives another clip: the head's noise is its own; latents are un-normalised
    for the VAE.
    """
    pipe = sample.make_pipeline(settings(ladder), torch.device("cpu"))
    x_1 = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    clips = [
        pipe("a ball", latents=x_1, generator=torch.Generator().manual_seed(s), output_type="latent", **SIZE).frames
        for s in (1, 2, 1)
    ]
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])
    wide = lambda values: torch.tensor(values).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        raw = clips[0] * wide(pipe.vae.config.latents_std) + wide(pipe.vae.config.latents_mean)
        wanted = pipe.video_processor.postprocess_video(pipe.vae.decode(raw, return_dict=False)[0], output_type="np")
        assert np.allclose(pipe.decode(clips[0]), wanted, atol=1e-6)
