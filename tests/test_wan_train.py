"""Training on Wan: many ranks equal one, resume is exact, what breaks is said, and the log tells."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tmd_minimal as tmd

pytest.importorskip("diffusers")
import wan_ranks

from wan_scale.config import PRESETS, Wan, preset
from wan_scale.cost.plan import plan
from wan_scale.cost.report import report
from wan_scale.cost.sizes import GB
from wan_scale.data.teacher import generate
from wan_scale.model import WanDiscriminator
from wan_scale.tiny import make_tiny
from wan_scale.training import dist, logs, train
from wan_scale.training.checkpoints import complete
from wan_scale.training.phase import EMA, Feed, WanPhase, mixed

FAST = {
    "stage1_updates": 4,
    "stage2_iterations": 6,
    "kd_updates": 3,
    "save_every": 2,
    "preview_every": 3,
    "log_every": 2,
    "global_batch": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny folder and six teacher clips of two steps, with and without their noise."""
    root = tmp_path_factory.mktemp("wan")
    model = make_tiny(root / "tiny")
    (root / "prompts.txt").write_text(
        "a red ball\na blue cube\na green cat runs\na small dog\nthe ball up\nthe cat sits\n"
    )
    clip = {"frames": 9, "height": 64, "width": 64, "steps": 2, "shard_size": 3}
    generate(model, root / "prompts.txt", root / "data", **clip)
    generate(model, root / "prompts.txt", root / "pairs", kd=True, skip_layer=1, **clip)
    return root


def settings(world, out, **more) -> Wan:
    return preset("tiny", model=str(world / "tiny"), data=str(world / "data"), out=str(out), **{**FAST, **more})


def assert_same_run(a: dict, b: dict) -> None:
    """Every weight and EMA alike to the rounding of a sum's order. AdamW turns a rounding in a gradient near 0 into
    a step of its rate, so a few weights may differ by that; the first moments, which are gradients, may not."""
    assert a["step"] == b["step"] and a["tensors"].keys() == b["tensors"].keys()
    for name, x in a["tensors"].items():
        y = b["tensors"][name]
        if name.endswith(".exp_avg"):
            assert (x - y).abs().max() <= 1e-4 * x.abs().max() + 1e-7, name
        elif not name.endswith((".exp_avg_sq", ".step")):
            assert ((x - y).abs() > 1e-4).float().mean() < 0.05 and (x - y).abs().max() < 6e-3, name


def test_two_ranks_equal_one(world, tmp_path):
    """FSDP2 on two gloo ranks and one process with two micro-batches do the same stage 1 and stage 2: three nets,
    optimizers, EMA.

    A run begun on two ranks also goes on alone, to the same end; and two ranks sample every video between them.
    """
    for name in ("tiny", "data", "prompts.txt"):
        (tmp_path / name).symlink_to(world / name)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        wan_ranks.__file__,
        str(tmp_path),
    ]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two" / "found.pt", weights_only=True)
    seed = wan_ranks.settings(tmp_path, tmp_path).seed
    coins = [torch.Generator().manual_seed(mixed(seed, f"coin {step}")) for step in range(3)]
    flips = [bool(torch.rand(1, generator=coin) < 0.25) for coin in coins]
    assert flips == [False, False, True]  # an update has the finite difference
    for phase in ("stage1", "stage2"):
        one = wan_ranks.run(phase, tmp_path, tmp_path / "one")
        assert (one["world"], two[phase]["world"]) == (1, 2)
        assert_same_run(one, two[phase])
    assert {name.split(".")[0] for name in one["tensors"]} == {"student", "fake", "disc", "ema"}
    assert [f.name for f in complete(tmp_path / "moved" / "stage2" / "checkpoints")] == ["step-00000003"]
    assert_same_run(one, wan_ranks.run("stage2", tmp_path, tmp_path / "moved"))
    assert len(list((tmp_path / "two" / "samples" / "tmd").glob("*.mp4"))) == 6


@pytest.mark.parametrize("n", [64, 12, 2, 1])
def test_ranks_toss_the_coin_of_stage_1_alike(monkeypatch, n):
    """All ranks of a micro-step, and one process at the micro-batches that they would have, flip alike, in order and
    after a resume; a quarter of the flips takes the flow map. A lone micro-batch has no shared coin.
    """

    def flips(world, updates):
        found = {}
        for rank in range(world):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(dist, "world", lambda: world)
            net, feed = torch.nn.Linear(1, 1), Feed(None)
            ours = WanPhase("p", {"net": net}, "net", 1e-3, 0.9, 0, {}, feed=feed, accumulate=n // world)
            for ours.step in updates:
                for micro in range(n // world):
                    ours.begin(micro)
                    found[feed.number] = ours.coin and bool(torch.rand(1, generator=ours.coin) < 0.25)
        return found

    updates = range(-(-2000 // n)) if n > 1 else range(3)
    one = flips(1, updates)
    for world in (w for w in (2, 3, 4, 8, 12, 64) if n % w == 0):
        few = flips(world, updates[:8])
        assert sorted(few) == list(range(8 * n))
        for start in range(0, 8 * n, world):  # a micro-step of all ranks
            assert len({few[start + i] for i in range(world)}) == 1
        if world in (2, 4, 8):
            assert few == {number: one[number] for number in few} == flips(world, [3]) | few
    if n == 1:
        assert {*one.values()} == {None}
    else:
        assert 0.18 < sum(one.values()) / len(one) < 0.32


class Interrupted(Exception):
    pass


def stop_at(monkeypatch, step: int):
    """on_step that stops the run there, as a kill would, once."""
    seen = train.Training.on_step

    def on_step(self, how, phase, terms):
        seen(self, how, phase, terms)
        if phase.step == step:
            monkeypatch.setattr(train.Training, "on_step", seen)
            raise Interrupted

    monkeypatch.setattr(train.Training, "on_step", on_step)


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_resume_is_bitwise(world, tmp_path, monkeypatch):
    """Stopped between two checkpoints of stage 1 and of stage 2 and started again: the same bytes as a run in one
    piece, log included.
    """
    whole, parts = (settings(world, tmp_path / name) for name in ("whole", "parts"))
    train.stage1(whole), train.stage2(whole)
    for work, step in ((train.stage1, 3), (train.stage2, 5)):
        stop_at(monkeypatch, step)
        with pytest.raises(Interrupted):
            work(parts)
        work(parts)
    for phase in ("stage1", "stage2"):
        assert weights(whole.folder(phase)) == weights(parts.folder(phase))
        steps = [
            [json.loads(line)["step"] for line in (cfg.folder(phase) / "log.jsonl").read_text().splitlines()]
            for cfg in (whole, parts)
        ]
        assert steps[0] == steps[1]


def test_kill_while_a_checkpoint_is_written(world, tmp_path, monkeypatch):
    """A kill before the rename leaves the last checkpoint and a .tmp that nobody reads; the run goes on to the same
    bytes.
    """
    whole, killed = (settings(world, tmp_path / name) for name in ("whole", "killed"))
    train.stage1(whole)
    replace = os.replace

    def die(source, target):
        if str(target).endswith("step-00000004"):
            raise Interrupted
        replace(source, target)

    monkeypatch.setattr("wan_scale.training.checkpoints.os.replace", die)
    with pytest.raises(Interrupted):
        train.stage1(killed)
    left = sorted(f.name for f in (killed.folder("stage1", "checkpoints")).iterdir())
    assert left == ["step-00000002", "step-00000004.tmp"]
    monkeypatch.setattr("wan_scale.training.checkpoints.os.replace", replace)
    train.stage1(killed)
    assert weights(whole.folder("stage1")) == weights(killed.folder("stage1"))
    assert len(complete(killed.folder("stage1", "checkpoints"))) == 2


def test_damaged_and_foreign_checkpoints(world, tmp_path, monkeypatch):
    """A truncated checkpoint, an unreadable state and another run's settings are a sentence each; a finished phase is
    not run again.
    """
    cfg = settings(world, tmp_path)
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train.stage1(cfg)
    with pytest.raises(
        tmd.CheckpointError, match=r"made with another --stage1-lr, lr; give the same settings or another --out"
    ):
        train.stage1(settings(world, tmp_path, stage1_lr=2e-4))
    newest = complete(cfg.folder("stage1", "checkpoints"))[-1]
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state[:20])
    with pytest.raises(tmd.CheckpointError, match=r"state.json is not JSON; delete that folder"):
        train.stage1(cfg)
    (newest / "state.json").write_text(state)
    part = next(newest.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(tmd.CheckpointError, match=r"damaged \(the checksum of \S+ differs\); delete that folder"):
        train.stage1(cfg)
    shutil.rmtree(newest)
    first = train.stage1(cfg)
    bytes_ = weights(cfg.folder("stage1"))
    assert train.stage1(cfg) == first and weights(cfg.folder("stage1")) == bytes_
    with pytest.raises(RuntimeError, match="made with another --seed"):
        train.stage1(settings(world, tmp_path, seed=1))


def test_baseline_with_kd(world, tmp_path):
    """At M = 1 the baseline warms up on pairs and goes on with the whole network as its student; at M = 2 it starts
    from the teacher.
    """
    cfg = settings(world, tmp_path, M=1)
    shutil.copytree(world / "pairs", cfg.folder("kd-pairs"))
    assert train.kd(cfg)["updates"] == 3
    facts = train.stage2(cfg, plain=True)
    assert (facts["H"], facts["N"], facts["effective_nfe"]) == (0, 1, 1)
    with pytest.raises(RuntimeError, match="holds no finished student; run the phase"):
        train.stage2(cfg)  # stage 1 is missing
    two = settings(world, tmp_path / "two", M=2)
    assert train.stage2(two, plain=True)["effective_nfe"] == 2


def test_student_step_moves_only_the_student(world, tmp_path, monkeypatch):
    """In stage 2 each update moves one net: the fifth the student, the others fake score and discriminator; the teacher
    never.
    """
    cfg, moved, before = settings(world, tmp_path, stage1_updates=0, stage2_iterations=5), [], {}

    def on_step(job, how, phase, terms):
        now = {
            name: torch.cat([p.detach().flatten() for p in net.parameters()]).clone()
            for name, net in phase.nets.items()
        }
        moved.append({name for name in now if before and not torch.equal(now[name], before[name])})
        before.update(now)

    monkeypatch.setattr(train.Training, "on_step", on_step)
    train.stage2(cfg)
    assert moved[1:] == [{"fake", "disc"}] * 3 + [{"student"}]


def tiny_phase(feed=None, **kw) -> WanPhase:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    return WanPhase("test", {"student": net}, "student", 1e-2, 0.9, 0, {}, feed=feed or Feed(None), **kw)


def test_steps_that_are_not_finite(tmp_path):
    """A step with a NaN is skipped, counted and told; the weights stay as they were, and a row of them stops the run
    with a sentence.
    """
    phase, bad = tiny_phase(patience=3), {2, 3}
    net = phase.nets["student"]

    def iterate(phase):
        x = torch.full((1, 3), float("nan") if phase.step in bad else 1.0)
        return phase.update("student", {"loss": net(x).square().mean()})

    before = []
    phase.run(iterate, 6, on_step=lambda p, t: before.append(net.weight.detach().clone()))
    assert phase.skipped == 2 and torch.equal(before[1], before[3]) and not torch.equal(before[3], before[4])
    assert all(torch.isfinite(p).all() for p in [net.weight, *phase.ema.parameters()])
    bad.update(range(6, 20))
    with pytest.raises(
        FloatingPointError, match="'student' was not finite 3 times in a row, at step 8; lower the rate"
    ):
        phase.run(iterate, 20)


def test_one_bad_net_of_three_stops_the_run():
    """The count of a net goes on while another's steps are fine."""
    nets = {"student": torch.nn.Linear(3, 3), "disc": torch.nn.Linear(3, 3)}
    phase = WanPhase("test", nets, "student", 1e-2, 0.9, 0, {}, feed=Feed(None), patience=4)

    def iterate(phase):
        phase.update("student", {"loss": nets["student"](torch.full((1, 3), float("nan"))).sum()})
        return phase.update("disc", {"loss": nets["disc"](torch.ones(1, 3)).sum()})

    with pytest.raises(FloatingPointError, match="'student' was not finite 4 times in a row"):
        phase.run(iterate, 20, progress=False)


def test_accuracy_is_of_the_critics(g):
    """Accuracy is that of the last critic update, over all its micro-batches, and an alarm after a student's update
    still sees it.
    """
    net = torch.nn.Identity()
    accuracy = logs.Accuracy(net)
    for real, fake in ((2.0, -2.0), (2.0, 2.0)):
        net(torch.full((4, 2), real)), net(torch.full((4, 2), fake))
    assert accuracy.value(critic_update=True) == 0.75
    net(torch.full((4, 2), 9.0))
    assert accuracy.value(critic_update=False) == 0.75


def test_backward_is_outside_autocast():
    """Gradients of a float32 part inside bf16 autocast are those of float32 to its last digits."""
    phase, x = tiny_phase(), torch.randn(5, 3)
    net = phase.nets["student"]
    wanted = torch.autograd.grad(net(x).square().sum(), net.weight)[0]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.autocast("cpu", enabled=False):
            loss = net(x).square().sum()
        seen = []
        net.weight.register_hook(seen.append)
        phase.update("student", {"loss": loss})
    torch.testing.assert_close(seen[0], wanted, rtol=1e-6, atol=1e-7)


def test_log_survives_a_cut_line(tmp_path):
    """A line that a kill cut short, at whatever bracket, is dropped with the lines after the checkpoint."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "a": 2}\n{"step": 5}\n{"step": 2, "preview": {"motion": 1}\n')
    logs.Log(path, 3).write(4, {"b": 1})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]


def test_accumulation_is_the_mean(tmp_path):
    """Four micro-batches of one sample make the update of one batch of four."""
    x = torch.randn(8, 3)
    results = []
    for accumulate in (1, 4):
        feed = Feed(lambda position, n: x[position : position + n])
        phase = tiny_phase(feed, accumulate=accumulate)
        net, n = phase.nets["student"], 4 // accumulate
        phase.run(
            lambda p, net=net, n=n: p.update("student", {"loss": net(p.feed(n)).square().mean()}), 2, progress=False
        )
        results.append(net.weight.detach())
    torch.testing.assert_close(results[0], results[1])


def test_draws_depend_on_the_micro_batch_alone():
    """Other numbers and other seeds give other noise, on torch's CPU generator too, which looks at the low 32 bits of a
    seed.
    """
    seeds = {mixed(seed, number) & 0xFFFFFFFF for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500


def test_ema_weights_change_places():
    """Within, the net is its EMA; afterwards both are what they were."""
    phase = tiny_phase()
    with torch.no_grad():
        phase.nets["student"].weight.add_(1.0)
    mine, ema = phase.nets["student"].weight.clone(), phase.ema.named["weight"].clone()
    with phase.ema_weights() as net:
        assert torch.equal(net.weight, ema)
    assert torch.equal(phase.nets["student"].weight, mine) and torch.equal(phase.ema.named["weight"], ema)
    assert isinstance(phase.ema, EMA)


def test_batch_that_does_not_divide(world, tmp_path):
    """The global batch must be a whole number of micro-batches."""
    with pytest.raises(ValueError, match="global_batch 3 does not divide by micro_batch 2 x 1 GPUs"):
        train.stage1(settings(world, tmp_path, global_batch=3))
    with pytest.raises(ValueError, match="taps names block 9 of a network of 4"):
        train.stage1(settings(world, tmp_path, taps="1,9"))


def test_checkpointed_discriminator_has_the_same_gradients(g):
    """Recomputing its branches changes no gradient: of its weights in the critics' update, of its input in the
    student's.
    """
    plain = WanDiscriminator(6, 8, 2, hidden=8)
    lean = WanDiscriminator(6, 8, 2, hidden=8, checkpointing=True)
    lean.load_state_dict(plain.state_dict())
    found = []
    for net in (plain, lean):
        x = torch.randn(1, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with tmd.frozen(net):
            logits = net([x, x])
        logits.sum().backward()
        assert all(p.grad is None for p in net.parameters())
        net([x.detach(), x.detach()]).sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_float32_is_exact_unless_tf32_is_asked_for(world, tmp_path):
    """A phase sets TF32 for matmuls and for convolutions, whose default is on: else the finite difference would divide
    the patch embedding's rounding by its step.
    """
    for asked in (True, False):
        train.Training(settings(world, tmp_path, tf32=asked), "stage1", world / "data")
        assert torch.backends.cudnn.allow_tf32 == asked
        assert torch.get_float32_matmul_precision() == ("high" if asked else "highest")


def test_auto_checkpointing_is_what_plan_proposes(world, tmp_path, capsys):
    """The checkpointing that `plan` prints for this memory is the one a phase runs with, and the screen says so."""
    for gb in (8.0, 0.001):
        cfg = settings(world, tmp_path, checkpointing="auto", card_gb=gb, compile="off")
        job = train.Training(cfg, "stage1", world / "data")
        student = job.place(train.make_student(cfg, cfg.how()))
        config = dict(student.net.transformer.config)
        wanted = plan(config, **cfg.planned())["checkpointing"]
        assert student.net.checkpointing == wanted == {8.0: "none", 0.001: "full"}[gb]
        assert f"checkpointing {wanted}, chosen by `plan`" in capsys.readouterr().out
        assert f"checkpointing: {wanted}" in report(config, **cfg.planned())


def test_a_gpu_is_taken_before_its_group_is_joined(monkeypatch):
    """On GPUs: this rank's device first, then NCCL bound to it; the allocator's segments may grow, unless the user has
    said how it works. On the CPU nothing of this is touched.
    """
    did, name = [], "PYTORCH_CUDA_ALLOC_CONF"
    for key in (name, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(dist.dist, "init_process_group", lambda *a, **kw: did.append((a, kw.get("device_id"))))
    monkeypatch.setattr(dist, "waiting_room", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: did.append((device, os.environ.get(name))))
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.start("cpu") == torch.device("cpu") and did == [(("gloo",), None)] and name not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    one = torch.device("cuda", 1)
    assert dist.start() == one
    assert did[1:] == [(one, "expandable_segments:True"), (("nccl",), one)]
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    dist.start()
    assert did[3] == (one, "backend:cudaMallocAsync")
    monkeypatch.delenv(name), monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    dist.start()
    assert did[5] == (one, None)


def test_memory_is_told_beside_the_plan(monkeypatch):
    """After the first update of each net: what the allocator held at most in that update, and what `plan` said."""
    peak = {"allocated": 3 * GB, "reserved": 4 * GB}
    for key in peak:
        monkeypatch.setattr(torch.cuda, f"max_memory_{key}", lambda device, key=key: peak[key])
    lower = lambda device: peak.update(allocated=GB, reserved=2 * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lower)
    monkeypatch.setattr(logs.Memory, "most", {"allocated_gb": 0.0, "reserved_gb": 0.0})
    memory = logs.Memory(torch.device("cuda"), {"critic": 5 * GB, "student": 6 * GB})
    critic = {"update": "critic", "allocated_gb": 3, "reserved_gb": 4, "planned_gb": 5}
    assert memory.after({"fake": 1, "disc": 1}) == critic
    assert memory.after({"fake": 1, "disc": 1}) is None
    assert memory.after({"vsd": 1}) == {"update": "student", "allocated_gb": 1, "reserved_gb": 2, "planned_gb": 6}
    assert memory.after({"kd": 1}) == {"update": "kd", "allocated_gb": 1, "reserved_gb": 2}
    assert memory.most == {"allocated_gb": 3, "reserved_gb": 4}  # of all of them, for who asks at the end
    assert logs.Memory(torch.device("cpu"), {}).after({"vsd": 1}) is None


def test_memory_goes_to_the_log(world, tmp_path, monkeypatch, capsys):
    """A phase writes it once a kind of update, and says it."""
    seen = {"update": "stage1", "allocated_gb": 1.5, "planned_gb": 2.0}
    monkeypatch.setattr(logs.Memory, "after", lambda self, terms: None if self.seen else self.seen.add(1) or seen)
    cfg = settings(world, tmp_path, preview_every=0, stage1_updates=2)
    train.stage1(cfg)
    lines = [json.loads(line) for line in (cfg.folder("stage1") / "log.jsonl").read_text().splitlines()]
    assert [line["memory"] for line in lines if "memory" in line] == [seen]
    assert "stage1, first stage1 update, GB of memory: allocated 1.5, planned 2" in capsys.readouterr().out


def test_the_ema_may_wait_in_host_memory(world, tmp_path, monkeypatch):
    """On one GPU --ema-on-host keeps it there, as with adapters; where it is sharded already that is refused."""
    made, maker = [], train.Training.maker

    def seen(job, feed):
        make = maker(job, feed)
        made.append(make.keywords.get("ema_on"))
        return make

    monkeypatch.setattr(train.Training, "maker", seen)
    for asked in (False, True):
        train.stage1(settings(world, tmp_path / str(asked), preview_every=0, stage1_updates=1, ema_on_host=asked))
    assert made == [None, "cpu"]
    same = [weights(tmp_path / str(asked) / "stage1") for asked in (False, True)]
    assert same[0] == same[1]
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(train, "accumulation", lambda cfg: 1)
    with pytest.raises(ValueError, match="with 2 GPUs the EMA is sharded already; drop --ema-on-host"):
        train.Training(settings(world, tmp_path, ema_on_host=True), "stage1", world / "data")


def test_log_and_previews(world, tmp_path):
    """Every log_every updates a line of finite numbers, previews with their numbers and latents, and the
    discriminator's accuracy; the page of the run at the first update, each checkpoint and preview, and the end.
    """
    cfg, shown, show = settings(world, tmp_path, stage1_updates=0), [], train.watch.show
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.watch, "show", lambda *args: shown.append(show(*args)))
        train.stage2(cfg)
    lines = [json.loads(line) for line in (cfg.folder("stage2") / "log.jsonl").read_text().splitlines()]
    assert {"fake", "disc", "accuracy", "seconds", "skipped"} <= lines[0].keys() and 0 <= lines[0]["accuracy"] <= 1
    assert [line["step"] for line in lines if "preview" in line] == [3, 6]
    preview = next(line["preview"] for line in lines if "preview" in line)
    assert set(preview) == {"motion", "contrast", "peak", "diversity"} and all(v > 0 for v in preview.values())
    names = [f.name for f in sorted(cfg.folder("stage2", "previews").iterdir())]
    assert names == [f"step-0000000{step}.{kind}" for step in (3, 6) for kind in ("png", "safetensors")]
    page = cfg.folder("report.html").read_text(encoding="utf-8")
    assert len(shown) == 6  # updates 1, 2, 3, 4, 6 and the end
    assert json.loads(cfg.folder("stage2", "plan.json").read_text())["updates"] == 6
    assert all(f"stage2/previews/{name}" in page for name in names[::2]) and "http-equiv" not in page


def test_alarms_in_words(g):
    """Still, hot and washed-out clips, one clip for two seeds, and a discriminator that is always right are named; data
    are not.
    """
    data_ = torch.randn(4, 4, 5, 6, 6, generator=g)
    fine = torch.randn(4, 2, 4, 5, 6, 6, generator=g)
    say = lambda samples, **more: " ".join(logs.alarms({**logs.preview_numbers(samples, data_), **more}))
    assert say(fine) == ""
    assert "static collapse" in say(fine[:, :, :, :1].expand_as(fine))
    assert "over-saturated" in say(2.5 * fine) and "run hot" in say(2.5 * fine)
    assert "washed out" in say(0.2 * fine)
    assert "mode collapse" in say(fine[:, :1].expand_as(fine))
    assert "right in 99% of cases" in say(fine, accuracy=0.99) and "3 updates were skipped" in say(fine, skipped=3)


def test_presets_are_table_7():
    """The presets 1.3b and 14b carry the paper's numbers for both M."""
    small, big = preset("1.3b"), preset("14b")
    assert (small.stage1_lr, big.stage1_lr, small.adaptive_c, big.adaptive_c) == (3e-5, 1e-5, 1, 1e-5)
    assert [preset(name, M=m).stage2().iterations for name in ("1.3b", "14b") for m in (1, 2)] == [
        12000,
        4000,
        5000,
        1000,
    ]
    assert (small.tap_blocks, big.tap_blocks) == ((15, 22, 29), (19, 29, 39))
    for cfg in (small, big):
        one, two = cfg.stage1(), cfg.stage2()
        assert (one.updates, one.guidance, one.s_shift, one.fd_step, one.flow_map_share, one.cond_drop) == (
            3000,
            3,
            3,
            0.005,
            0.25,
            0.1,
        )
        assert (two.lr, two.guidance, two.gan_weight, two.student_every, two.dmd_shift) == (1e-5, 5, 0.03, 5, 5)
        assert (cfg.global_batch, cfg.frames, cfg.height, cfg.width, cfg.outer_shift, cfg.inner_shift, cfg.H) == (
            64,
            81,
            480,
            832,
            10,
            10,
            5,
        )
    assert set(PRESETS) == {"tiny", "1.3b", "14b"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"frames": 8}, "4 k"), ({"height": 100}, "multiples of 16"), ({"taps": "a"}, "block numbers"),
     ({"M": 0}, "M is 0"), ({"sampler": "x"}, "sampler is"), ({"micro_batch": 0}, "micro_batch is 0"),
     ({"stage2_lr": 0.0}, "stage2_lr is 0"), ({"precision": "fp8"}, "precision is")],
)  # fmt: skip
def test_settings_that_cannot_be(bad, words):
    """One sentence that names the setting."""
    with pytest.raises(ValueError, match=words):
        preset("tiny", **bad)
