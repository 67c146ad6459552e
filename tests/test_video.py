"""The video transformer, the same algorithm on clips (B, C, T, H, W), and toy_video.py as its users run it."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tmd_minimal as tmd
import toy_video
from settings import write_json
from toys import bench as toy_bench
from toys import (
    claims,
    claims_pictures,
    claims_video,
    claims_why,
    explore_video,
    tiny_video,
    verdicts,
    video_net,
    video_pictures,
)
from toys.moving_shapes import EMPTY, MOTIONS, World
from toys.variants import CorrectingStudent, deepened, thinned

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--own-teacher --frames 6 --pixels 12 --patch-frames 2 --patch-pixels 4 --width 16 --depth 3 --H 1 --heads 2 "
        "--taps 0,1 --teacher-updates 2 --stage1-updates 2 --iterations 5 --batch 4 --samples 120 --kd-count 8 "
        "--kd-steps 2 --N 2 --curve 1").split()  # fmt: skip


def network(**kw):
    return video_net.VideoDiT(
        **{"channels": 2, "width": 24, "depth": 4, "heads": 2, "patch": (2, 4, 4), "words": 5, **kw}
    ).double()


def as_trained(net):
    """With open gates, as a trained network has them: at first every block is the identity."""
    for part in net.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.1)
    return net


def clips(g, n=3):
    x = torch.randn(n, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.rand(n, generator=g, dtype=torch.float64), torch.randint(0, 5, (n, 3), generator=g)


# -- the network ------------------------------------------------------------------------------------------------------


def test_patches_go_back_where_they_came_from(g):
    """Unpatchify undoes the patch embedding: with one channel a pixel, the round trip is the identity."""
    net = video_net.VideoDiT(channels=2, width=64, depth=1, heads=1, patch=(2, 4, 4)).double()
    net.patch.weight.data = torch.eye(64, dtype=torch.float64).reshape(64, 2, 2, 4, 4)
    net.proj.weight.data = torch.eye(64, dtype=torch.float64)
    net.norm = torch.nn.Identity()
    for p in (net.patch.bias, net.proj.bias):
        torch.nn.init.zeros_(p)
    x, _, _ = clips(g)
    assert_close(net.output(net.embed(x), (None, torch.zeros(3, 2, 64, dtype=torch.float64))), x)


def test_rotary_positions_are_relative_in_three_axes(g):
    """Turned queries and keys give products that depend on the difference of their places alone, on every axis.

    The products are read off the attention: with values that name the key, a query's output is its row of weights.
    """
    attention = video_net.Attention(24, 1)
    cos, sin = (a.view(6, 5, 4, -1) for a in network(width=24, heads=1).rope([6, 5, 4], "cpu"))
    attention.kv.weight.data[24:] = torch.eye(24)
    attention.kv.bias.data.zero_()
    attention.out = torch.nn.Identity()
    query, keys = torch.randn(1, 1, 24, generator=g), torch.randn(1, 2, 24, generator=g)

    def mix(places):  # three tokens at three places: how the first looks at the other two
        rope = tuple(torch.stack([a[p] for p in places]) for a in (cos, sin))
        return attention(torch.cat([query, keys], 1), torch.cat([query, keys], 1), rope)[:, 0]

    base = mix([(0, 1, 2), (3, 2, 0), (1, 1, 1)])
    assert_close(mix([(2, 3, 3), (5, 4, 1), (3, 3, 2)]), base, atol=1e-5, rtol=1e-5)
    for axis in range(3):  # moving the second token along each axis counts
        place = [3, 2, 0]
        place[axis] += 1
        assert (mix([(0, 1, 2), tuple(place), (1, 1, 1)]) - base).abs().max() > 1e-5


def test_a_block_knows_places_by_its_rotary_positions_only(g):
    """Permuting the tokens of a block permutes its output without rotary positions, and not with them."""
    net = network()
    x, t, _ = clips(g)
    e = net.modulate(net.time(t), net.context(None, x))
    h, perm = net.embed(x), torch.tensor([1, 0])
    without = (*e[:2], (e[2][0], None))
    assert_close(net.blocks[0](h[:, perm], without), net.blocks[0](h, without)[:, perm])
    assert (net.blocks[0](h[:, perm], e) - net.blocks[0](h, e)[:, perm]).abs().max() > 1e-4


def test_no_prompt_is_the_empty_prompt(g):
    """c = None and three empty words are the same condition, and a word changes the output."""
    net = network()
    x, t, c = clips(g)
    assert_close(net(x, t), net(x, t, torch.full((3, 3), 5)))
    assert (net(x, t) - net(x, t, c)).abs().max() > 1e-4


@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_student_of_a_video_network_equals_its_teacher_while_the_gate_is_closed(fusion, g):
    """At s = t a new student predicts the teacher's velocity, to 1e-6 with a closed gate (concat: no y_s)."""
    net = network()
    x, t, c = clips(g)
    student = tmd.TMDStudent(net, 2, fusion, gate_init=-30.0).double()
    if fusion == "concat":
        student.fuse.weight.data[:, 24:] = 0
    assert_close(student.head(torch.randn_like(x), t, t, student.features(x, t, c)), net(x, t, c), atol=1e-6, rtol=1e-6)


def test_finite_difference_agrees_with_forward_mode_through_attention(g):
    """du/ds of a video head by finite difference equals the JVP to 1e-3: the head, attention too, is smooth in s."""
    student = tmd.TMDStudent(network(), 2).double()
    x, t, c = clips(g)
    m, v = student.features(x, t, c), torch.randn(x.shape, generator=g, dtype=torch.float64)
    f = lambda y, s: student.head(y, s, 0.3 * t, m)
    s = 0.1 + 0.8 * t
    exact = tmd.total_derivative(f, x, s, v, "jvp")
    assert_close(tmd.total_derivative(f, x, s, v, "fd", 1e-4), exact, atol=1e-3 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 4), (2, 3)])
def test_backbone_runs_m_times_and_head_m_n_times(M, N, g):
    """Sampling costs exactly M backbone and M N head evaluations: that is what effective NFE counts."""
    student = tmd.TMDStudent(network(), 1).double()
    calls = {0: 0, 3: 0}
    for i in calls:
        student.net.blocks[i].register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    x, _, c = clips(g)
    how = tmd.StudentConfig(M=M, N=N, H=1)
    tmd.sample(student, x, c, outer_grid=how.outer_grid.double(), inner_grid=how.inner_grid.double(), generator=g)
    assert calls == {0: M, 3: M * N}


@pytest.mark.parametrize(("kind", "far"), [("conv3d", False), ("conv1d2d", False), ("attention", True)])
def test_discriminator_heads_see_neighbours_or_all_tokens(kind, far, g):
    """A logit of convolutions depends on neighbours, one of attention on the farthest token too (no group norms)."""
    disc = video_net.VideoDiscriminator(24, 1, kind).double()
    for module in list(disc.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    h = torch.randn(1, 6, 6, 6, 24, generator=g, dtype=torch.float64, requires_grad=True)
    logits = disc([h])
    assert logits.shape == (1, 216)
    seen = torch.autograd.grad(logits[0, 0], h)[0].abs().sum(-1)[0]
    assert (seen[5, 5, 5] > 0) == far and seen[0, 0, 0] > 0
    for neighbour in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert seen[neighbour] > 0


def test_conv1d2d_separates_space_and_time(g):
    """The first convolution of conv1d2d mixes space only, conv3d's mixes time too."""
    x = torch.randn(1, 24, 4, 4, 4, generator=g)
    moved = x.clone()
    moved[:, :, 3] += 1
    for kind, mixes in (("conv3d", True), ("conv1d2d", False)):
        conv = video_net.VideoDiscriminator(24, 1, kind).heads[0][1]
        changed = (conv(x) - conv(moved)).abs().amax((0, 1, 3, 4)) > 1e-6
        assert bool(changed[2]) is mixes and bool(changed[3])


def test_both_stages_train_on_clips_and_reach_the_backbone(g):
    """Stage 1 with guidance and dropout and both losses of stage 2 run on clips; each reaches the backbone."""
    net = network().requires_grad_(False)
    student = tmd.TMDStudent(net, 2).double().requires_grad_(True)
    x, t, c = clips(g)
    how, neg = tmd.StudentConfig(M=2, N=2, H=2), torch.full((3,), 5)
    grids = {"outer_grid": how.outer_grid.double(), "inner_grid": how.inner_grid.double()}
    draws = tmd.stage1_draw(x, *grids.values(), flow_map_share=1.0, generator=g)
    tmd.tm_mf_loss(student, x, c, **draws, c_neg=neg, guidance=3.0).backward()
    assert student.net.blocks[0].attn.q.weight.grad.abs().sum() > 0 and student.net.text[1].weight.grad.abs().sum() > 0
    student.zero_grad()
    x_hat = tmd.generate(student, x, c, **grids, generator=g)
    disc = video_net.VideoDiscriminator(24, 2).double()
    more = {"t": t, "noise": torch.randn_like(x), "taps": (1, 2)}
    terms = tmd.stage2_student_loss(x_hat, net, network(), disc, c, neg, guidance=2.0, **more)
    sum(terms.values()).backward()
    assert student.net.blocks[0].attn.q.weight.grad.abs().sum() > 0 and all(p.grad is None for p in disc.parameters())
    critic = tmd.stage2_critic_loss(x_hat, x, net, network(), disc, c, noise_real=torch.randn_like(x), **more)
    assert set(critic) == {"fake", "disc"} and all(torch.isfinite(v) for v in critic.values())


def test_bf16_autocast_keeps_losses_and_derivatives_in_float32(g):
    """Under bf16 autocast on clips the loss is float32, finite, and within 2 % of the float32 loss."""
    net = video_net.VideoDiT(channels=2, width=24, depth=4, heads=2, words=5)
    student = tmd.TMDStudent(net, 2)
    x, _, c = clips(g)
    x, how = x.float(), tmd.StudentConfig(M=1, N=2, H=2)
    draws = tmd.stage1_draw(x, how.outer_grid, how.inner_grid, flow_map_share=1.0, generator=g)
    neg = torch.full((3,), 5)
    exact = tmd.tm_mf_loss(student, x, c, **draws, c_neg=neg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tmd.tm_mf_loss(student, x, c, **draws, c_neg=neg)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.02, atol=0)


def test_training_under_bf16_autocast_moves_the_weights_it_uses():
    """A training inside one autocast learns as fast as in float32: no cached casts of the first step's weights."""

    def data(n, generator):
        x = torch.randint(0, 2, (n, 1, 1, 1, 1), generator=generator) * 2.0 - 1
        return x.expand(n, 2, 2, 4, 4), None

    def last_losses(context):
        tmd.seed_everything(0)
        net, losses = video_net.VideoDiT(channels=2, width=24, depth=2, heads=2), []
        with context:
            tmd.train_teacher(
                net, data, updates=100, batch=16, lr=3e-3, seed=0, progress=False, on_step=lambda _, t: losses.append(t)
            )
        return sum(t["denoising"].item() for t in losses[-20:]) / 20

    bench = tiny_video.VideoLadder.precision_of("cuda")
    assert bench.keywords["cache_enabled"] is False
    exact = last_losses(contextlib.nullcontext())
    assert last_losses(torch.autocast("cpu", **bench.keywords)) == pytest.approx(exact, rel=0.1)
    assert last_losses(torch.autocast("cpu", dtype=torch.bfloat16)) > 1.3 * exact  # what the cache would do


@pytest.fixture
def eager_after(monkeypatch):
    """What --compile changes for the whole process is taken back."""
    for network_ in (video_net.DiTBlock, video_net.VideoDiscriminator):
        monkeypatch.setattr(network_, "forward", network_.forward)


def test_compile_is_for_those_who_ask_and_have_a_compiler(eager_after, monkeypatch):
    """Blocks and discriminator, once; without a C++ compiler a sentence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or (lambda *a: f(*a)))
    monkeypatch.setattr(tiny_video, "can_compile", lambda: True)
    few = {"own_teacher": True, "samples": 120}
    forwards = [video_net.DiTBlock.forward, video_net.VideoDiscriminator.forward]
    tiny_video.VideoLadder(tiny_video.ToyVideo(**few))
    assert not compiled
    for _ in range(2):
        tiny_video.VideoLadder(tiny_video.ToyVideo(compile=True, **few))
    assert compiled == forwards and video_net.DiTBlock.forward is not forwards[0]
    with tiny_video.uncompiled():
        assert [network_.forward for network_ in tiny_video.COMPILED] == forwards
    assert video_net.DiTBlock.forward is not forwards[0]
    monkeypatch.setattr(tiny_video, "can_compile", lambda: False)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler that works; install g\+\+, or"):
        tiny_video.VideoLadder(tiny_video.ToyVideo(compile=True, **few))


def test_whether_networks_can_be_compiled_is_tried(monkeypatch):
    """A compiler that is missing, or that gives something else, is none."""
    tried = tiny_video.can_compile.__wrapped__
    for compiled, works in ((lambda f: f, True), (lambda f: lambda x: x, False), (lambda f: 1 / 0, False)):
        monkeypatch.setattr(torch, "compile", compiled)
        assert tried() is works


def test_a_job_is_the_same_under_another_build_of_torch_and_compiled_or_not():
    """Both change rounding alone; a longer job is another."""
    job = {"toy": {"seed": 0, "compile": True}, "stage1": None, "torch": "2.13.0+cpu"}
    assert claims.counted(job) == claims.counted(job | {"toy": {"seed": 0}, "torch": "2.13.0"})
    for other in ({"torch": "2.12.0+cpu"}, {"toy": {"seed": 1}}, {"stage1": {}}):
        assert claims.counted(job) != claims.counted(job | other)


@pytest.mark.slow
def test_compiled_networks_train_alike(eager_after, tmp_path):
    """The first updates of every stage have the losses of the networks as they are, to rounding."""
    found, graphs = [], lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    before = graphs()
    for compiled in (False, True):
        assert graphs() == before
        cfg = tiny_video.ToyVideo(**tiny_video.QUICK | {"iterations": 4, "stage1_updates": 2, "compile": compiled})
        bench, seen = tiny_video.VideoLadder(cfg), []
        keep = lambda phase, terms, seen=seen: seen.append({k: v.item() for k, v in terms.items()})
        for how, stage1 in ((cfg.student_config(), cfg.stage1_config()), (cfg.student_config(H=0, N=1), None)):
            tmd.seed_everything(0)
            teacher = bench.network().requires_grad_(False)
            student = tmd.TMDStudent(teacher, how.H) if how.H else tmd.PlainStudent(teacher)
            student.requires_grad_(True)
            more = {"c_neg": bench.c_neg, "on_step": keep, "progress": False, "seed": 0}
            if stage1:
                tmd.train_stage1(student, bench.data, how, stage1, **more)
            disc = bench.discriminator()
            tmd.train_stage2(student, teacher, disc, bench.data, how, cfg.stage2_config(), taps=bench.taps, **more)
        found.append(seen)
    eager, compiled = found
    assert graphs() > before + 2  # the block and the discriminator, with and without gradients
    assert len(eager) == len(compiled) == 10
    for a, b in zip(eager, compiled):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_bench_takes_turns_and_does_without_a_compiler(tmp_path, monkeypatch, inline, capsys):
    """Compiled and other updates of one stage meet in turns; without a compiler all else is written, and it says so."""
    turns = []

    class Stub:
        def __init__(self, cfg):
            assert cfg.compile

        @contextlib.contextmanager
        def uncompiled(self):
            turns.append("as it is")
            yield
            turns.append("compiled")

    monkeypatch.setattr(toy_bench, "stages", lambda *_: {"a": lambda: None})
    monkeypatch.setattr(toy_bench, "workers", claims.workers)
    cfg = tiny_video.ToyVideo(own_teacher=True)
    found = toy_bench.compiled(Stub, cfg, [], 1, 3)
    assert turns == ["as it is", "compiled"] * 5 and found["a"].keys() == {"compiled_ms", "times_as_fast"}
    row = {"stage": "a", "ms": 40.0, "floor_ms": 10.0, "peak_mb": 1.0}
    monkeypatch.setattr(toy_bench, "measure", lambda *_: [row])
    monkeypatch.setattr(toy_bench, "rollout_cost", lambda _: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_compiler(*_):
        raise ValueError("--compile needs a compiler")

    monkeypatch.setattr(toy_bench, "compiled", no_compiler)
    toy_bench.run(Stub, cfg, str(tmp_path), [], 1, 3)
    assert "not measured: --compile needs" in capsys.readouterr().out and (tmp_path / "bench.json").exists()


def test_bench_says_how_many_times_as_fast_compiled_networks_are():
    """Two columns more, where they were measured; as many cells in every line."""
    row = {"stage": "teacher", "ms": 40.0, "floor_ms": 10.0, "peak_mb": 1.0}
    times = {"compiled_ms": 20.0, "times_as_fast": 1.5}  # of its own turns
    plain, both = (toy_bench.markdown([{**row, **more}, row]).splitlines() for more in ({}, times))
    assert "compiled" not in plain[0] and both[2].endswith("| 20.0 | 1.50 |")
    for lines in (plain, both):
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: network()(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1)), "multiples"),
        (lambda: network()(torch.zeros(1, 2, 8, 8), torch.zeros(1)), "multiples"),
        (
            lambda: network().taps(torch.zeros(1, 2, 4, 8, 8).double(), torch.zeros(1).double(), None, (1, 4)),
            "blocks 0 to 3",
        ),
        (lambda: video_net.VideoDiscriminator(24, 2, "conv4d"), "conv3d"),
        (lambda: tiny_video.ToyVideo(pixels=18), "multiple of patch_pixels"),
        (lambda: tiny_video.ToyVideo(width=60, heads=4), "twice the 4 heads"),
        (lambda: tiny_video.ToyVideo(taps="2,6"), "0 to 5"),
        (lambda: tiny_video.ToyVideo(samples=100), "at least 120"),
        (lambda: tiny_video.ToyVideo(prompts="bright blob circle"), "square | ring | cross"),
        (lambda: tiny_video.ToyVideo(prompts="bright any circle"), "leaves a word open"),
        (lambda: tiny_video.ToyVideo(size="large"), "tiny"),
        (lambda: tiny_video.ToyVideo(width=32, heads=8), "at least 6 a head"),
        (lambda: tiny_video.ToyVideo(discriminator="conv4d"), "conv1d2d"),
        (lambda: tiny_video.ToyVideo(kd_steps=0), "at least 1"),
        (
            lambda: network().taps(torch.zeros(1, 2, 4, 8, 8).double(), torch.zeros(1).double(), None, (2, 0)),
            "increasing",
        ),
        (lambda: tiny_video.ToyVideo(H=6), "1 <= H < depth"),
        (lambda: claims_video.run("x", "tiny", only=("tmd M3",)), "unknown job 'tmd M3'"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    """Every bad input is a ValueError of one sentence that says what to do."""
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# -- the command ------------------------------------------------------------------------------------------------------


def tiny(out, *more):
    return toy_video.main([*TINY, "--out", str(out), *more])


def test_a_run_writes_numbers_then_pictures_and_is_not_run_again(tmp_path, capsys, inline, monkeypatch):
    """Metrics, samples, pictures; the same command trains nothing again; other settings are refused; --restart does."""
    out = tmp_path / "v"
    monkeypatch.setattr(explore_video, "INNER", ())  # the page shows what the run sampled anyway
    assert tiny(out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["models"]) == [
        "data",
        "teacher_50",
        "teacher_4",
        "teacher_2",
        "teacher_1",
        "dmd2v",
        "stage1",
        "tmd",
    ]
    assert metrics["models"]["teacher_50"]["effective_nfe"] == 100 and metrics["models"]["data"]["total"] > 0.9
    assert metrics["models"]["tmd"]["effective_nfe"] == pytest.approx(1 + 1 / 3)
    for name in (
        "preview.png",
        "contact_sheet.png",
        "clips.gif",
        "quality_vs_nfe.png",
        "curves.png",
        "explore.html",
        "samples.npz",
        "metrics.md",
    ):
        assert (out / name).stat().st_size > 500, name
    stamps = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*.pt")}
    assert {p.name for p in stamps} == {
        "teacher.pt",
        "tmd.stage1.pt",
        "tmd.stage2.pt",
        "dmd2v.kd.pt",
        "dmd2v.stage2.pt",
    }
    saved = np.load(out / "samples.npz")
    known = {saved[name].tobytes(): record for name, record in metrics["models"].items()}
    monkeypatch.setattr(explore_video, "write", lambda *_: None)
    real = tiny_video.VideoLadder.score
    again = lambda self, clips, c: known.get(clips.half().numpy().tobytes()) or real(self, clips, c)
    monkeypatch.setattr(tiny_video.VideoLadder, "score", again)  # the same clips have the same scores
    with monkeypatch.context() as patch:
        patch.setattr(video_pictures, "draw", lambda *_: None)
        assert tiny(out) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*.pt")}
    contact_sheet = (out / "contact_sheet.png").read_bytes()
    assert tiny(out, "--prompts", "dim cross circle, bright ring still") == 0  # other pictures of the same run
    assert contact_sheet != (out / "contact_sheet.png").read_bytes()
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*.pt")}
    again = json.loads((out / "metrics.json").read_text())
    for name, record in metrics["models"].items():
        assert record["total"] == again["models"][name]["total"]
    (out / "samples.npz").write_bytes(b"broken")
    capsys.readouterr()
    assert tiny(out, "--redraw") == 1 and capsys.readouterr().err.count("\n") == 1
    assert tiny(out, "--seed", "1") == 1
    error = capsys.readouterr().err
    assert "--seed 0" in error and error.count("\n") == 1
    monkeypatch.setattr(tiny_video.VideoLadder, "score", lambda self, clips, c: metrics["models"]["tmd"])
    monkeypatch.setattr(video_pictures, "draw", lambda *_: None)
    assert tiny(out, "--restart") == 0
    assert stamps != {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*.pt")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "dim ring"], "three words"),
        (["--taps", "0,9"], "taps"),
        (["--claims", "--seed", "1"], "leave out seed"),
        (["--only", "tmd"], "--claims as well"),
    ],
)
def test_command_line_errors_are_one_sentence(arguments, words, tmp_path, capsys):
    """Unknown words, blocks and clashing switches end with status 1 and one line on stderr; nothing is written."""
    assert toy_video.main([*arguments, "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_out_of_memory_says_which_size_to_try(tmp_path, capsys, monkeypatch):
    """A GPU that runs out of memory is told in one sentence with a smaller batch."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nlong report")

    monkeypatch.setattr(toy_video, "run", full)
    assert tiny(tmp_path / "x") == 1
    assert "--batch 2" in capsys.readouterr().err


def test_every_claim_names_jobs_that_exist():
    """Each row compares two known jobs, every job resolves, and the claims asked for are all there."""
    teachers = {f"teacher {steps}" for steps in claims_video.rung("tiny").teacher_steps}
    known = {
        *claims_video.JOBS,
        *teachers,
        *(f"{teacher} of {job}" for teacher in teachers for job in claims_video.JOBS),
    }
    for _, _, a, b, phase, *own in claims_video.CLAIMS:
        assert a in known and b in known and (a != b or "/" in phase)
        assert all({*scores} < {*claims_video.LABELS} for scores in own)
    assert len({str(row[2:]) for row in claims_video.CLAIMS}) == len(claims_video.CLAIMS), "no row twice"
    assert {"room", "bound", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10"} <= {
        row[0] for row in claims_video.CLAIMS
    }
    rung = claims_video.rung("tiny")
    budgets = {}
    for name in claims_video.JOBS:
        _, _, one, two, kd, _ = rung.plan(name, 0, False)
        table = "long" if "long" in name else "every 5" if "every 5" in name else ""
        if name == "dmd2v M2 longer again":  # as many updates of the weights as the students of "tmd M2 long again"
            _, _, tmd_one, tmd_two, _, _ = rung.plan("tmd M2 long again", 0, False)
            assert two.iterations // 2 == tmd_one.updates + tmd_two.iterations // 2 and not kd and not one
            continue
        budgets.setdefault(table, set()).add((one.updates if one else 0) + kd + two.iterations)
        assert two.student_every == (5 if table == "every 5" else 2)
    assert all(len(b) == 1 for b in budgets.values()), "students of one table make the same number of updates"
    short, long, slow = (max(budgets[table]) - 300 for table in ("", "long", "every 5"))
    assert long == 4 * short and slow / 5 == short / 2
    used = {name for row in claims_video.CLAIMS for name in row[2:4]}
    assert used >= set(claims_video.JOBS), "no job without a row"


def test_the_rates_of_the_warm_ups_are_those_of_the_published_jobs():
    """`make video` warms up at another rate than the claims: a job's rate is 1e-4 unless its name says 1e-3."""
    rung, jobs = claims_video.rung("tiny"), sorted((ROOT / "results/toy_video/claims/jobs").glob("*.json"))
    for file in jobs:
        job = json.loads(file.read_text(encoding="utf-8"))
        rate = 1e-3 if "1e-3" in job["name"] or "every 5" in job["name"] else 1e-4
        resolved = claims.settings_of(*rung.plan(job["name"], job["seed"], False))
        assert resolved["toy"]["stage1_lr"] == job["settings"]["toy"]["stage1_lr"] == rate, file.name
        assert all(resolved[stage] == job["settings"][stage] for stage in ("stage1", "stage2")), file.name
    assert len(jobs) > 280


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_no_two_jobs_are_the_same_student(size):
    """At either size: a row whose two sides have the same settings would be level by construction."""
    rung = claims_video.rung(size)
    settings = {name: str(claims.settings_of(*rung.plan(name, 0, False))) for name in rung.jobs if "again" not in name}
    assert len({*settings.values()}) == len(settings)


def test_a_row_may_be_judged_by_a_score_of_its_own(tmp_path):
    """A is ahead in total and behind in diversity: each row is told by its own score and shows no other."""
    rung = replace(
        claims_video.rung("tiny"),
        claims=[("C1", "all", "tmd", "dmd2v", "end"), ("C1", "one", "tmd", "dmd2v", "end", {"diversity": 1})],
        teacher_steps=(),
        table=None,
    )
    rest = {"effective_nfe": 1, "updates": 1, "student_updates": 1, "seconds": 1}
    (tmp_path / "jobs").mkdir()
    for name, total, diversity in (("tmd", 0.7, 0.2), ("dmd2v", 0.6, 0.9)):
        for seed in verdicts.SEEDS:
            end = dict.fromkeys(claims_video.LABELS, 0.5) | {"total": total, "diversity": diversity}
            record = {"name": name, "seed": seed, "end": end, **rest}
            write_json(verdicts.job_file(tmp_path, name, seed), record)
    rows = verdicts.tabulate(rung, tmp_path)["rows"]
    assert [row["verdict"] for row in rows] == ["holds", "does not hold"]
    with pytest.raises(ValueError, match="no record of 'none' has a score of beauty"):
        verdicts.tabulate(replace(rung, claims=[("C1", "none", "tmd", "dmd2v", "end", {"beauty": 1})]), tmp_path)
    line = verdicts.claims_table(rung, {"rows": rows}).splitlines()[3]
    assert "0.200 ± 0.000 | 0.900 ± 0.000 | -0.700 to -0.700 | does not hold" in line


def test_long_clips_are_measured_against_their_own_teacher(tmp_path, inline, monkeypatch):
    """The row of 12 frames reads the scores of 12 frames, the others those of 8; no other seed is scored."""
    monkeypatch.setattr(tiny_video.VideoLadder, "fit_teacher", lambda *_, **__: (None, {"seconds": 1}))
    monkeypatch.setattr(tiny_video.VideoLadder, "teacher_samples", lambda self, teacher, steps: steps)
    monkeypatch.setattr(tiny_video.VideoLadder, "floor", lambda self: 0)
    monkeypatch.setattr(
        tiny_video.VideoLadder, "score", lambda self, steps, c: {"total": steps / 100 + self.cfg.frames}
    )
    rung = replace(claims_video.rung("tiny"), table=None, more_tables=None, draw=None)
    (tmp_path / "jobs").mkdir()
    for name in ("tmd", "dmd2v", "tmd 12 frames", "dmd2v 12 frames"):
        for seed in (0, 1, 7):
            claims.run_teacher((rung, tmp_path, name, seed, False))
            if "dmd2v" in name:
                scores = dict.fromkeys(claims_video.LABELS, 0.1 * seed)
                facts = dict.fromkeys(("effective_nfe", "updates", "student_updates", "seconds"), 1)
                file = claims.job_file(tmp_path, name, seed)
                claims.write_json(file, {"name": name, "seed": seed, "end": scores, **facts})
    assert {folder.parent.name for folder in tmp_path.glob("*/teacher.json")} == {
        f"teacher-{frames}x12-seed{seed}" for frames in (8, 12) for seed in (0, 1)
    }
    rows = {row["setting"]: row["A"] for row in claims.tabulate(rung, tmp_path)["rows"] if row["claim"] == "room"}
    best = "teacher in 50 steps against DMD2-v, M = 1"
    assert rows[best]["total"]["mean"] == 8.5 and rows[f"clips of 12 frames: {best}"]["total"]["mean"] == 12.5


def test_claims_run_and_resume(tmp_path, inline, monkeypatch):
    """A second call runs no finished job and writes the same table; rows whose jobs are missing say so."""
    keys = ("total", "quality", "semantic", "motion", "diversity")

    def score(self, clips, c):  # the ruler has tests of its own
        one = dict.fromkeys(keys, clips.mean().item())
        return {**one, "laws": {law: one for law in MOTIONS}}

    monkeypatch.setattr(tiny_video.VideoLadder, "score", score)
    rung = claims_video.rung("tiny")
    claims.run(rung, str(tmp_path), quick=True)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").glob("*.json")}
    table = (tmp_path / "claims.md").read_text()
    assert len(stamps) == 4 and "not run" in table and "bounce" in table and "share of y_1 after stage 2" in table
    claims.run(rung, str(tmp_path), quick=True)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").glob("*.json")}
    assert table == (tmp_path / "claims.md").read_text()
    result = json.loads((tmp_path / "claims.json").read_text())
    assert {*result["head"]} == {"tmd"}
    teacher = {steps: result["models"]["tmd"] for steps in ("50", "8", "4", "2", "1", "floor")}  # a quick run has none
    rung.draw(tmp_path, result | {"teacher": teacher})
    for name in ("quality_vs_nfe.png", "why.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_killed_run_of_claims_leaves_tables_and_pictures(tmp_path, monkeypatch, inline):
    """After every teacher and every job, of what there is by then."""
    done, drawn = [], []

    def job(args):
        if len(done) == 3:  # the pilot's
            raise KeyboardInterrupt
        done.append(args)

    monkeypatch.setattr(claims, "run_teacher", lambda args: None)
    monkeypatch.setattr(claims, "run_job", job)
    monkeypatch.setattr(claims, "tabulate", lambda *_: {"models": {"tmd": {}} if done else {}})
    rung = replace(claims_video.rung("tiny"), draw=lambda root, result: drawn.append(root))
    with pytest.raises(KeyboardInterrupt):
        claims.run(rung, str(tmp_path), only=("tmd",))
    assert drawn == [tmp_path] * 3


def test_the_confirming_row_has_ten_seeds_of_its_own(tmp_path, monkeypatch, inline):
    """No other row uses them, and they are judged when all ten are there."""
    names, asked = ("tmd long again", "dmd2v long again"), []

    def job(args):
        _, root, name, seed, _ = args
        asked.append((name, seed))
        scores = dict.fromkeys(claims_video.LABELS, 0.5 + 0.05 * (name == names[0]) + 0.001 * seed)
        facts = dict.fromkeys(("effective_nfe", "updates", "student_updates", "seconds"), 1)
        claims.write_json(claims.job_file(root, name, seed), {"name": name, "seed": seed, "end": scores, **facts})

    monkeypatch.setattr(claims, "run_teacher", lambda args: None)
    monkeypatch.setattr(claims, "run_job", job)
    rung = replace(claims_video.rung("tiny"), table=None, more_tables=None, draw=None)
    found = claims.run(rung, str(tmp_path), only=names)
    assert sorted(asked) == sorted((name, seed) for name in names for seed in range(5, 15))
    assert not {*range(5, 15)} & {*claims.SEEDS, *claims_video.SWEEP_SEEDS}
    (row,) = [row for row in found["rows"] if row["seeds"]]
    assert "ten other seeds" in row["setting"] and (row["seeds"], row["verdict"]) == (10, "holds")
    claims.job_file(tmp_path, names[1], 14).unlink()
    rows = claims.tabulate(rung, tmp_path)["rows"]
    assert "9 of 10 seeds" in [row["verdict"] for row in rows]


def test_what_explains_the_rows_is_read_from_the_right_places():
    """N of the training, 1 and the others at sampling; the gate by phase, None where there is none; shared updates."""
    total = lambda value: {"total": value}

    def record(seed, N, gate):
        head = {"stage1": {"gate": gate, "y_1 share": 0.5}, "end": {"gate": gate, "y_1 share": 0.2 + seed}}
        curve = [{"updates": u, "total": u + seed} for u in (1, 10, *[20] * seed)]
        return {"settings": {"student": {"N": N}}, "end": total(0.7 + seed), "one": total(0.1), "head": head,
                "stage1": total(0.3), "other N": {"2": total(0.6), "8": total(0.8)}, "curve": curve}  # fmt: skip

    jobs = {"a": [record(0, 4, 0.05), record(1, 4, 0.07)], "b": [record(0, 1, None)], "plain": [{"end": total(1.0)}]}
    found = claims_why.heads(jobs)
    assert {*found} == {"a", "b"} and {k: v["mean"] for k, v in found["a"]["N"].items()} == pytest.approx(
        {"1": 0.1, "2": 0.6, "4": 1.2, "8": 0.8}
    )
    assert [*found["b"]["N"]] == ["1", "2", "8"] and found["b"]["N"]["1"]["mean"] == 0.7, "its own N is 1"
    assert found["a"]["gate"]["end"]["mean"] == pytest.approx(0.06) and found["b"]["gate"]["end"] is None
    assert found["a"]["y_1"]["end"]["mean"] == pytest.approx(0.7) and found["a"]["stage 1"]["mean"] == 0.3
    lines = claims_why.heads_table({"head": found})[0].splitlines()
    assert lines[2].startswith("| a | 0.300 ± 0.000 | 0.100") and "| - |" in lines[3] and "0.700 |" in lines[3]
    curve = claims_why.curves(jobs)
    assert {*curve} == {"a", "b"} and [(p["updates"], p["total"]["mean"]) for p in curve["a"]] == [(1, 1.5), (10, 10.5)]


def test_leads_are_paired_by_seed_at_the_updates_that_all_have():
    """A seed of one side alone and updates that one seed lacks are left out; a pair that was not run has no column."""
    points = lambda start, *more: [{"updates": u, "total": start + u} for u in (1, 9, *more)]
    run = lambda seed, *how: {"seed": seed, "curve": points(*how)}
    early = {"seed": 2, "curve": points(9.0)[:1]}  # a seed of one side, which lacks an update that the pairs share
    jobs = {"tmd long": [run(0, 0.1), run(1, 0.3, 20)], "dmd2v long": [run(1, 0.2, 20), run(0, 0.05), early]}
    found = claims_why.leads({**jobs, "dmd2v deep long": [run(0, 0.0)], "tmd M2 long": [{"diverged": "at 3"}]})
    assert list(found) == ["TMD less DMD2-v, M = 1"]
    (rows,) = found.values()
    assert [(row["updates"], row["difference"]["n"]) for row in rows] == [(1, 2), (9, 2)]
    assert all(row["difference"]["mean"] == pytest.approx(0.075) for row in rows)
    (page,) = claims_why.leads_table({"leads": found})
    assert page.splitlines()[2].startswith("| 1 | +0.075, ") and not claims_why.leads_table({})


def test_dropped_words_are_the_empty_word():
    """The run's negative prompt is three empty words, which no clip is drawn for."""
    bench = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120))
    assert bench.c_neg.tolist() == [EMPTY] * 3
    c = World(6, 12).draw(200, torch.Generator().manual_seed(0))[1]
    assert not (c == EMPTY).any()


def test_blocks_added_to_a_baseline_change_nothing_at_first_and_then_learn(g):
    """The depth control starts as the teacher, bit for bit, with as many blocks as asked for; its new blocks train."""
    net, (x, t, c) = as_trained(network()), clips(g)
    deep = deepened(net, 3)
    assert len(deep.blocks) == len(net.blocks) + 3 and len(net.blocks) == 4
    assert torch.equal(deep(x, t, c), net(x, t, c))
    deep.requires_grad_(True)(x, t, c).square().mean().backward()
    assert all(deep.blocks[-1].get_parameter(name).grad.abs().sum() > 0 for name in ("mlp.2.weight", "attn.out.weight"))


def test_a_thinned_network_keeps_first_last_and_evenly_spaced_blocks(g):
    """Of six blocks three are 0, 2 (or 3) and 5; the network it came from is left as it was, and all of it trains."""
    net, (x, t, c) = as_trained(network(depth=6)), clips(g)
    for number, block in enumerate(net.blocks):
        block.number = number
    thin = thinned(net, 3)
    assert [block.number for block in thin.blocks] == [0, 2, 5] and len(net.blocks) == 6
    assert [block.number for block in thinned(net, 2).blocks] == [0, 5]
    e = net.modulate(net.time(t), net.context(c, x))
    h = net.blocks[5](net.blocks[2](net.blocks[0](net.embed(x), e), e), e)
    assert_close(thin(x, t, c), net.output(h, e))
    thin.requires_grad_(True)(x, t, c).square().mean().backward()
    assert all(block.mlp[2].weight.grad.abs().sum() > 0 for block in thin.blocks)


def test_a_head_that_corrects_starts_as_one_step_of_the_teacher_for_every_N_and_then_learns(g):
    """x_hat of every N is x_t - t v(x_t, t) at first; of L + N H blocks; its head gets a gradient."""
    net, (x, t, c) = as_trained(network()), clips(g)
    student = CorrectingStudent(net, 2).double()
    predict = tmd.transition(student, x, t, c)
    for N in (1, 2, 4):
        assert_close(tmd.inner_flow(predict, torch.randn_like(x), tmd.make_grid(N, 1.0)), net(x, t, c))
    ran = []
    for block in [*student.net.blocks, *student.part.net.blocks]:
        block.register_forward_hook(lambda *_: ran.append(1))
    tmd.inner_flow(tmd.transition(student, x, t, c), x, tmd.make_grid(4, 1.0))
    assert len(ran) == len(net.blocks) + 4 * 2
    student.requires_grad_(True)
    predict(x, t, t).square().mean().backward()
    assert student.part.net.proj.weight.grad.abs().sum() > 0


def test_students_of_the_claims_are_the_networks_that_their_rows_say():
    """Blocks run a sample over the teacher's six are the effective NFE told, for every student that is not Eq. (16)'s.

    All of a student moves in its stages. Those of three blocks start from the published network of that size.
    """
    size = {"size": "tiny", "samples": 120, "batch": 2, "kd_count": 2, "student_every": 2}
    rung = replace(claims_video.rung("tiny"), size=size)
    for name in ("tmd corrects", "dmd2v deep", "tmd small", "dmd2v small", "dmd2v deep no kd small", "dmd2v M2 small"):
        cfg, how, one, two, kd, more = rung.plan(name, 0, quick=False)
        assert (kd == 0) == ("tmd" in name or "no kd" in name or "M2" in name), name
        new = (cfg.N - 1) * cfg.H if "deep" in name else 0  # as many blocks as TMD's rollout runs
        assert more.get("deeper", 0) == new, name
        ladder = rung.ladder(cfg)
        ladder.kd_steps = 1
        one, two = one and replace(one, updates=1), replace(two, iterations=2)  # the second is the student's
        fit = lambda run, more=more, kd=kd, how=how, one=one, ladder=ladder: ladder.fit_student(
            ladder.fit_teacher(None)[0], "x", how, one, run, None, kd_updates=min(kd, 1), progress=False, **more
        )
        student = fit(two)["student"]
        start = ladder.smaller(3) if "small" in name else ladder.fit_teacher(None)[0]
        state, begin = student.state_dict(), start.state_dict()
        for key in ("patch.weight", "blocks.0.mlp.0.weight", "proj.weight"):
            assert not torch.equal(state[f"net.{key}"], begin[key]), (name, key)
        assert "corrects" not in more or state["part.net.proj.weight"].abs().sum() > 0  # it starts at zero
        ran = []
        for block in (part for part in student.modules() if isinstance(part, video_net.DiTBlock)):
            block.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        ladder.student_samples(student, how, n=2)
        assert len(ran) / cfg.depth == pytest.approx(claims.nfe_of(cfg, how, more)), name
    small, (published, facts) = ladder.smaller(3).state_dict(), tiny_video.video_teacher.load_weights(8, 3)
    assert all(torch.equal(small[key], value) for key, value in published.items()) and small.keys() == published.keys()
    recipe = tiny_video.video_teacher.RECIPES["8-frames-3-blocks"]
    assert facts["recipe"] == recipe and facts["curve"][-1]["updates"] == recipe["updates"]


def test_small_students_are_refused_where_their_network_does_not_fit():
    """Other clips or another width: one sentence, no silent start of another size; other sizes have no such rows."""
    for more, words in (
        ({"frames": 12}, "results/video_teacher has 12-frames, 8-frames, "),
        ({"width": 48}, "is for --width 96"),
    ):
        ladder = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120, own_teacher=True, **more))
        with pytest.raises(ValueError, match=words):
            ladder.smaller(3)
    other = claims_video.rung("small")
    assert "tmd" in other.jobs and not [name for name in other.jobs if "small" in name or "frames" in name]
    assert {name for row in other.claims for name in row[2:4]} <= {*other.jobs, *map("teacher {}".format, (50, 4, 1))}


def test_the_path_in_the_contact_sheet_is_that_of_the_shape(g):
    """Centres of brightness lie within a quarter of a pixel of the rendered path, also on a noisy background; none at
    all is no error.
    """
    world = World(8, 12, modes="few")
    x, c, params = world.draw(200, g)
    path = world.trajectory(c[:, 2], params) * 12 - 0.5
    noise = 0.15 * torch.rand(x.shape, generator=g)  # under a tenth of the way from black to white
    for clips in (x, torch.where(x > -1, x, x + noise)):
        found = np.stack([video_pictures.centres(clip) for clip in clips[:, 0].numpy()])
        assert np.abs(found - path.numpy()).max() < 0.25
    assert np.isfinite(video_pictures.centres(np.full((8, 12, 12), -1.0))).all()


def test_the_pictures_of_the_claims_name_students_that_there_are(tmp_path, monkeypatch):
    """No name that the list lacks; one of fewer seeds than the rest says so; every name is drawn."""
    names = {name for name in claims_pictures.WORDS if not name.startswith("teacher")}
    assert names | {*claims_pictures.LONG, *claims_pictures.TRAINED, *claims_pictures.STUDENTS} <= {*claims_video.JOBS}
    s = {"mean": 0.5, "std": 0.1, "n": 5}
    every = names | {*claims_pictures.LONG}
    models = {name: {"total": s, "semantic": s, "effective_nfe": 2.0, "seeds": 5} for name in every}
    models["tmd M2"]["seeds"] = 3
    head = {name: {"N": {"1": s, "4": s}} for name in claims_pictures.TRAINED}
    head["tmd N2"]["N"] = {"1": {**s, "n": 2}}
    curves = {name: [{"updates": 1, "total": s}, {"updates": 2, "total": s}] for name in claims_pictures.LONG}
    teacher = {k: {"total": s, "semantic": s} for k in ("50", "4", "2", "1", "floor")}
    told, pyplot = [], claims_pictures.pyplot()
    legend = lambda fig, panel: (fig.axes[panel].get_legend() or fig.legends[0]).get_texts()
    texts = lambda fig: [fig.axes[0].get_yticklabels(), legend(fig, -1), legend(fig, 1)]
    monkeypatch.setattr(pyplot, "close", lambda fig: told.append([[t.get_text() for t in part] for part in texts(fig)]))
    claims_pictures.draw(tmp_path, {"models": models, "head": head, "curves": curves, "teacher": teacher})
    assert (tmp_path / "why.png").stat().st_size > 10_000 and len(told[1][0]) == len(claims_pictures.WORDS)
    assert "TMD, M = 2, N = 4  (2, 3 seeds)" in told[1][0] and "DMD2-v  (2)" in told[1][0]
    assert {"TMD, trained with N = 2 (2 seeds)", "TMD, trained with N = 1"} <= {*told[1][1]}
    assert len(told[1][2]) == len(claims_pictures.LONG) and "DMD2-v, M = 4  (2)" in told[1][2]


def test_kept_kd_pairs_give_the_same_student_and_count_their_seconds(tmp_path, monkeypatch):
    """A run that reads the pairs of another ends with the same bits, samples no teacher, and counts their seconds.

    Another teacher, or another number of steps, has pairs of its own.
    """
    ladder = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120, batch=2, kd_count=4, kd_steps=2))
    teacher, kept, how = ladder.fit_teacher(None)[0], tmp_path / "pairs.pt", ladder.cfg.student_config(H=0, N=1)
    two = ladder.cfg.stage2_config(iterations=2)
    fit = lambda **more: ladder.fit_student(teacher, "x", how, None, two, None, kd_updates=2, progress=False, **more)
    sampled, sample = [], tmd.sample_teacher
    monkeypatch.setattr(tmd, "sample_teacher", lambda *a, **kw: (sampled.append(1), sample(*a, **kw))[1])
    fits = [fit(), fit(kept=kept), fit(kept=kept)]
    assert len(sampled) == 2 and [path.name for path in tmp_path.iterdir()] == ["pairs.pt"]
    one, *others = (run["student"].state_dict() for run in fits)
    assert all(torch.equal(one[key], other[key]) for other in others for key in one)
    found = tmd.safe_load(str(kept))
    tmd.atomic_save(found | {"seconds": 1000.0}, str(kept))
    assert fit(kept=kept)["seconds"] > 1000 > fits[0]["seconds"]
    made = lambda: ladder.trajectories(teacher, kept)["pairs"][1]
    ladder.kd_steps = 3
    assert not torch.equal(made(), found["pairs"][1])
    ladder.kd_steps = 2
    assert torch.equal(made(), found["pairs"][1])
    teacher.proj.weight.mul_(0.5)
    assert not torch.equal(made(), found["pairs"][1])


def test_the_share_of_y_1_tells_a_sampler_from_a_map():
    """A student that ignores y_1 has share 0, one that is only y_1 has share 1, half and half is half."""
    ladder = tiny_video.VideoLadder(tiny_video.ToyVideo(samples=120))

    class Mixed(torch.nn.Module):
        def __init__(self, share):
            super().__init__()
            self.share = share

        def features(self, x_t, t, c):
            return x_t

        def head(self, y_s, s, r, m):  # y_hat = y_s - s u, so that x_hat = x_1 - y_hat mixes x_1 and y_1
            return m - (1 - self.share) ** 0.5 * m - self.share**0.5 * y_s

    how = ladder.cfg.student_config(N=1)
    for share in (0.0, 0.5, 1.0):
        assert claims_video.share_of_y_1(ladder, Mixed(share), how) == pytest.approx(share, abs=0.03)
