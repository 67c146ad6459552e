"""State: bitwise determinism, exact resume, atomic checkpoints, and what happens when something is wrong with them."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

import tmd_minimal as tmd
from toys.planar import PlanarDiscriminator, PlanarNet

ROOT = Path(__file__).resolve().parents[1]


def data(n, generator):
    label = torch.randint(2, (n,), generator=generator)
    return label[:, None] + 0.1 * torch.randn(n, 2, generator=generator), label


def flat(*modules):
    return torch.cat([p.detach().flatten() for m in modules for p in m.parameters()])


def train(which, steps, path=None, save_every=1000, **kw):
    """Run one of the four trainings on a tiny network; returns everything it trained, flattened, and the phase."""
    tmd.seed_everything(0)
    teacher = PlanarNet(2, 16, 3, 2)
    how = tmd.StudentConfig(M=2, N=2, H=1)
    common = {"seed": 3, "path": path and str(path), "save_every": save_every, "progress": False, **kw}
    if which == "teacher":
        ema, phase = tmd.train_teacher(teacher, data, updates=steps, batch=8, lr=1e-3, c_neg=2, **common)
    elif which == "stage1":
        cfg = tmd.Stage1Config(updates=steps, batch=8, lr=1e-3)
        ema, phase = tmd.train_stage1(tmd.TMDStudent(teacher, 1), data, how, cfg, c_neg=2, **common)
    elif which == "kd":
        pairs = lambda g: (torch.randn(8, 2, generator=g), *data(8, g))
        ema, phase = tmd.train_kd(tmd.TMDStudent(teacher, 1), pairs, how, updates=steps, lr=1e-3, **common)
    else:
        student, disc = tmd.TMDStudent(teacher, 1), PlanarDiscriminator(16, 2)
        cfg = tmd.Stage2Config(iterations=steps, batch=8, lr=1e-3)
        teacher.requires_grad_(False)
        ema, phase = tmd.train_stage2(student, teacher, disc, data, how, cfg, taps=(0, 2), c_neg=2, **common)
    return flat(ema, *phase.nets.values()), phase


KINDS = ["teacher", "stage1", "kd", "stage2"]


@pytest.mark.parametrize("which", KINDS)
def test_same_seed_same_bits(which):
    """Two runs with one seed agree bit for bit."""
    assert torch.equal(train(which, 7)[0], train(which, 7)[0])


@pytest.mark.parametrize("which", KINDS)
def test_resume_is_exact(which, tmp_path):
    """N steps = N/2 + resume + N/2, bit for bit: nets, optimizers, EMA, RNG, log and step."""
    straight, _ = train(which, 14)

    def stop_at_7(phase, terms):
        phase.log.append(phase.step)
        if phase.step == 7:
            phase.save(str(tmp_path / "c.pt"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(which, 14, tmp_path / "c.pt", on_step=stop_at_7)
    torch.manual_seed(999)  # whatever the resuming process did before
    resumed, phase = train(which, 14, tmp_path / "c.pt")
    assert torch.equal(straight, resumed)
    train(which, 14)
    after = torch.get_rng_state()
    torch.manual_seed(998)
    train(which, 14, tmp_path / "c.pt")  # the finished checkpoint restores torch's global generator too
    assert torch.equal(torch.get_rng_state(), after)
    assert phase.step == 14 and phase.log == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("which", ["stage1", "stage2"])
def test_every_setting_reaches_the_training(which, monkeypatch):
    """Each option of the config dataclasses changes what is trained: none is parsed and dropped."""
    teacher = lambda: (tmd.seed_everything(0), PlanarNet(2, 16, 3, 2))[1]

    def result(student={}, stage={}):  # noqa: B006
        how = tmd.StudentConfig(**{"M": 2, "N": 2, "H": 1, "outer_shift": 1.0, "inner_shift": 1.0, **student})
        net = teacher()
        for p in net.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        common = {"c_neg": 2, "seed": 3, "progress": False}
        pupil = tmd.TMDStudent(net, 1, how.fusion, how.gate_init)
        if which == "stage1":
            cfg = tmd.Stage1Config(**{"updates": 3, "batch": 32, "lr": 1e-3, "cond_drop": 0.3, **stage})
            return flat(tmd.train_stage1(pupil, data, how, cfg, **common)[0])
        disc = PlanarDiscriminator(16, 2)
        cfg = tmd.Stage2Config(**{"iterations": 10, "batch": 32, "lr": 1e-3, **stage})
        net.requires_grad_(False)
        ema, phase = tmd.train_stage2(pupil, net, disc, data, how, cfg, taps=(0, 2), **common)
        return torch.cat([flat(ema), flat(*phase.nets.values())])

    students = [{"target": "x"}, {"field": "printed"}, {"outer_shift": 5.0}, {"inner_shift": 5.0}, {"M": 3}, {"N": 3}]
    if which == "stage1":
        stages = [{"lr": 2e-3}, {"guidance": 1.0}, {"cond_drop": 0.0}, {"flow_map_share": 0.0}, {"s_shift": 1.0}]
        stages += [{"derivative": "jvp"}, {"fd_step": 0.02}, {"adaptive_c": 1e-5}, {"ema": 0.05}]
    else:
        students += [{"clean": "printed"}]
        stages = [{"lr": 2e-3}, {"student_every": 2}, {"dmd_shift": 1.0}, {"guidance": 1.0}, {"gan_weight": 0.3}]
        stages += [{"normalizer": "paper"}, {"rollout": "last"}, {"rollout": "none"}, {"ema": 0.05}]
    base = result()
    for change in students:
        assert not torch.equal(result(student=change), base), change
    for change in stages:
        assert not torch.equal(result(stage=change), base), change


def test_kd_brings_the_student_to_the_teacher_s_samples():
    """KD warm-up regresses x_hat onto the paired sample: on pairs x = 0.5 x_1 + 1 the error falls below a tenth."""
    tmd.seed_everything(0)
    student, how = tmd.PlainStudent(PlanarNet(2, 16, 3)), tmd.StudentConfig(M=1, N=1)

    def pairs(g):
        x_1 = torch.randn(64, 2, generator=g)
        return x_1, 0.5 * x_1 + 1, None

    seen = []
    note = lambda _, terms: seen.append(terms["kd"].item())
    tmd.train_kd(student, pairs, how, updates=300, lr=3e-3, progress=False, on_step=note)
    x_1 = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    x = tmd.sample(student, x_1, outer_grid=how.outer_grid, inner_grid=how.inner_grid)
    assert (x - (0.5 * x_1 + 1)).square().mean() < 0.1 * seen[0]


def test_fake_score_starts_as_the_teacher():
    """Section 6: the fake score starts as the teacher, so the first student gradient is guidance and rounding alone."""
    _, phase = train("stage2", 1, on_step=None)
    tmd.seed_everything(0)
    teacher = flat(PlanarNet(2, 16, 3, 2))
    assert (flat(phase.nets["fake"]) - teacher).abs().max() <= 1.1e-3  # one AdamW step of rate 1e-3 away


def test_a_finished_phase_is_not_run_again(tmp_path):
    """A checkpoint at the last step is loaded; no iteration happens."""
    first, _ = train("stage2", 6, tmp_path / "c.pt")
    stamp = os.stat(tmp_path / "c.pt").st_mtime_ns
    steps = []
    again, _ = train("stage2", 6, tmp_path / "c.pt", on_step=lambda *_: steps.append(1))
    assert torch.equal(first, again) and not steps and os.stat(tmp_path / "c.pt").st_mtime_ns == stamp


def test_student_moves_every_fifth_iteration_and_ema_follows_it():
    """Section 6: four critic updates, then one of the student; the EMA moves with the student only."""
    seen = []
    total = lambda net: flat(net).sum().item()
    note = lambda phase, terms: seen.append((sorted(terms), total(phase.nets["student"]), total(phase.ema)))
    train("stage2", 10, on_step=note)
    assert [names for names, *_ in seen] == ([["disc", "fake"]] * 4 + [["gan", "vsd"]]) * 2
    for value in (1, 2):
        moved = [seen[i][value] != seen[i - 1][value] for i in range(1, 10)]
        assert moved == [False] * 3 + [True] + [False] * 4 + [True]


def test_ema_is_the_stated_average():
    """After every update: ema <- d ema + (1-d) net, d = min(decay, n / (n + 10))."""
    history = []
    _, phase = train("teacher", 5, on_step=lambda phase, terms: history.append(flat(phase.nets["teacher"])))
    tmd.seed_everything(0)
    ema = flat(PlanarNet(2, 16, 3, 2))
    for n, net in enumerate(history, 1):
        ema = torch.lerp(ema, net, 1 - min(0.999, n / (n + 10)))
    torch.testing.assert_close(flat(phase.ema), ema)


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_config_is_refused(tmp_path):
    """A checkpoint made with other settings is an error that names them; the file stays as it was."""
    train("stage1", 3, tmp_path / "c.pt", config={"seed": 1})
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(tmd.CheckpointError, match="another seed"):
        train("stage1", 6, tmp_path / "c.pt", config={"seed": 2})
    with pytest.raises(tmd.CheckpointError):
        train("teacher", 6, tmp_path / "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == before


def test_settings_of_the_call_are_part_of_the_checkpoint(tmp_path):
    """Without any config handed in, another seed or rate is still another run."""
    train("teacher", 3, tmp_path / "c.pt")
    with pytest.raises(tmd.CheckpointError, match="another seed"):
        train("teacher", 6, tmp_path / "c.pt", seed=4)


@pytest.mark.parametrize("content", [[1, 2], {"x": 1}, {"phase": "stage1", "config": None, "step": 1}])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    """A readable file of another kind is an error of one sentence."""
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(tmd.CheckpointError) as error:
        train("stage1", 6, tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_networks_of_another_shape_are_refused(tmp_path):
    """A checkpoint of the same settings and another shape is an error of one sentence, not a page of names."""
    train("stage1", 3, tmp_path / "c.pt")
    state = tmd.safe_load(str(tmp_path / "c.pt"))
    state["parts"]["student"]["gate"] = torch.zeros(7)
    tmd.atomic_save(state, str(tmp_path / "c.pt"))
    with pytest.raises(tmd.CheckpointError, match="another shape") as error:
        train("stage1", 3, tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_a_gradient_that_is_not_finite_stops_before_the_weights():
    """A finite loss with an infinite gradient stops the run; no weight moves."""
    net = PlanarNet(2, 16, 3)
    phase = tmd.Phase("teacher", {"teacher": net}, "teacher", 1e-3, 0.9, 0, {})
    before = flat(net)
    loss = (net(torch.zeros(1, 2), torch.zeros(1)) - net(torch.zeros(1, 2), torch.zeros(1)).detach()).abs().sum().sqrt()
    with pytest.raises(FloatingPointError, match="gradient norm of 'teacher' is nan at step 0"):
        phase.update("teacher", {"root": loss})
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("cut", [0, 10, 500, -1])
def test_truncated_checkpoint_is_refused(cut, tmp_path):
    """Half a file is an error that says so, never a silent fresh start."""
    train("stage1", 3, tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[:cut])
    with pytest.raises(tmd.CheckpointError, match="truncated or not a checkpoint"):
        train("stage1", 6, tmp_path / "c.pt")


def test_nan_stops_with_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path):
    """A NaN loss stops the run before it reaches any weight; the checkpoint from before loads."""
    calls = []

    def poisoned(n, generator):
        calls.append(1)
        x, c = data(n, generator)
        return (x * float("nan") if len(calls) > 5 else x), c

    tmd.seed_everything(0)
    net, path = PlanarNet(2, 16, 3, 2), str(tmp_path / "c.pt")
    how = {"updates": 20, "batch": 8, "lr": 1e-3, "c_neg": 2, "seed": 3, "save_every": 2, "progress": False}
    with pytest.raises(FloatingPointError, match=r"'denoising' is nan at step 5"):
        tmd.train_teacher(net, poisoned, path=path, **how)
    assert torch.isfinite(flat(net)).all()
    state = tmd.safe_load(path)
    assert state["step"] == 4 and all(torch.isfinite(v).all() for v in state["parts"]["teacher"].values())


def save_for_ever(path: str, ready) -> None:
    i = 0
    while True:
        tmd.atomic_save({"step": i, "x": torch.zeros(300_000) + i}, path)
        i += 1
        if i == 1:
            ready.set()


def test_kill_9_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    """A process that does nothing but save is killed eight times; what it leaves always loads."""
    path, fork = str(tmp_path / "c.pt"), multiprocessing.get_context("fork")
    for attempt in range(8):
        ready = fork.Event()
        process = fork.Process(target=save_for_ever, args=(path, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.007 * attempt)
        process.kill()
        process.join()
        state = tmd.safe_load(path)
        assert (state["x"] == state["step"]).all()


def test_backward_is_outside_autocast():
    """In bf16 autocast a part kept in float32 gets the float32 gradient: Phase.update's backward leaves autocast."""
    net, x, seen = torch.nn.Linear(3, 3), torch.randn(5, 3), []
    phase = tmd.Phase("test", {"net": net}, "net", 1e-3, 0.9, 0, {})
    wanted = torch.autograd.grad(net(x).square().sum(), net.weight)[0]
    net.weight.register_hook(seen.append)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.autocast("cpu", enabled=False):
            loss = net(x).square().sum()
        phase.update("net", {"loss": loss})
    torch.testing.assert_close(seen[0], wanted, rtol=1e-6, atol=1e-7)


def test_no_derivative_where_no_sample_needs_it(monkeypatch):
    """du/ds is computed in updates whose batch has some r < s, in no others: there it would be multiplied by zero."""
    calls = []
    derivative, draw, needed = tmd.total_derivative, tmd.stage1_draw, []

    def drawn(*a):
        found = draw(*a)
        needed.append(bool((found["r"] < found["s"]).any()))
        return found

    monkeypatch.setattr(tmd, "total_derivative", lambda *a, **k: (calls.append(len(needed)), derivative(*a, **k))[1])
    monkeypatch.setattr(tmd, "stage1_draw", drawn)
    how = tmd.StudentConfig(M=2, N=2, H=1)
    for share, least, most in ((0.0, 0, 0), (0.25, 1, 7), (1.0, 8, 8)):
        calls.clear(), needed.clear()
        student = tmd.TMDStudent(PlanarNet(2, 8, 3, 0), 1)
        cfg = tmd.Stage1Config(updates=8, batch=2, guidance=1.0, flow_map_share=share)
        tmd.train_stage1(student, lambda n, g: (data(n, g)[0], None), how, cfg, progress=False)
        assert calls == [i + 1 for i, need in enumerate(needed) if need] and least <= len(calls) <= most
