"""Nothing that a training keeps is lost, half there or another's in silence: checkpoints, students, disks, signals."""

import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tmd_minimal as tmd

pytest.importorskip("diffusers")
import wan_data_help

from wan_scale import preflight
from wan_scale.config import preset
from wan_scale.data.lock import only_one
from wan_scale.data.teacher import generate
from wan_scale.tiny import make_tiny
from wan_scale.training import checkpoints, dist, kept, logs, previews, students, train
from wan_scale.training.phase import Feed, WanPhase


def phase_of(steps: int, path=None, config=None, rates=(1.0,), on_step=None, **kw) -> WanPhase:
    """A phase of a linear layer, run to `steps`; the loss is times rates[step], so that NaN and inf may be had."""
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 64)
    phase = WanPhase("test", {"student": net}, "student", 1e-2, 0.9, 0, config or {}, feed=Feed(None), **kw)

    def iterate(phase):
        rate = rates[min(phase.step, len(rates) - 1)]
        return phase.update("student", {"loss": net(torch.ones(1, 64)).square().mean() * rate})

    save_every = 2 if path else 1000
    phase.run(iterate, steps, path=str(path) if path else None, save_every=save_every, on_step=on_step, progress=False)
    return phase


@contextmanager
def disk_of(size: int):
    """Within, no file can grow beyond `size` bytes: a full disk, as far as a writer can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def test_no_byte_of_a_checkpoint_is_damaged_in_silence(tmp_path):
    """One bit in tensors, metadata or state is told with the checkpoint's name; without it the run goes on."""
    phase_of(4, tmp_path / "c")
    newest = checkpoints.complete(tmp_path / "c")[-1]
    for file in sorted(newest.iterdir()):
        size, whole = file.stat().st_size, file.read_bytes()
        for at in (0, size // 3, size // 2, size - 1):
            flip(file, at)
            if file.name == "state.json" and json.loads(whole) == parsed(file):
                continue  # white space
            with pytest.raises(tmd.CheckpointError, match=rf"{newest}.* is (damaged|not JSON).*; delete that folder"):
                phase_of(6, tmp_path / "c")
            file.write_bytes(whole)
    shutil.rmtree(newest)
    assert phase_of(4, tmp_path / "c").step == 4


def parsed(file):
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def test_huge_checkpoints_are_compared_where_asked_for(tmp_path, monkeypatch):
    """Beyond the size that is read in a minute, checksums are compared with --verify alone."""
    phase_of(2, tmp_path / "c")
    newest = checkpoints.complete(tmp_path / "c")[-1]
    file = next(newest.glob("*.distcp"))
    flip(file, file.stat().st_size // 2)  # in the numbers of a tensor
    monkeypatch.setattr(checkpoints, "UNASKED", 1)
    phase_of(2, tmp_path / "c")
    with pytest.raises(tmd.CheckpointError, match="checksum"):
        phase_of(2, tmp_path / "c", verify=True)


def test_a_full_disk_costs_the_save_alone(tmp_path):
    """A checkpoint that does not fit is a sentence and no file; the one before it stays, and the run goes on to the
    same weights once there is room.
    """
    whole = phase_of(6, tmp_path / "whole").nets["student"].weight
    phase_of(2, tmp_path / "c")
    with disk_of(20_000), pytest.raises(RuntimeError, match=r"step-00000004 could not be written \(File too large\); "):
        phase_of(6, tmp_path / "c")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-00000002"]
    assert torch.equal(phase_of(6, tmp_path / "c").nets["student"].weight, whole)


def test_room_is_checked_before_the_first_update(tmp_path, monkeypatch):
    """Three checkpoints and the student must fit; those that are there count, and none is too many. Of a phase that
    saves once, at its end, one must.
    """
    one, student = phase_of(0).size(), 4 * (64 * 64 + 64)
    need = 3 * one + student
    usage = lambda free: monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    usage(need - 1)
    with pytest.raises(RuntimeError, match=r"has too little disk: .* GB for 3 checkpoints and the student are needed"):
        phase_of(2, tmp_path / "c", minutes=30)
    assert not (tmp_path / "c").exists()
    usage(need)
    phase_of(4, tmp_path / "c", minutes=30)
    saved = sum(f.stat().st_size for f in checkpoints.complete(tmp_path / "c")[-1].iterdir())
    assert one < saved < one + 40_000  # the size from the parameters is that of the files
    usage(one + student)
    phase_of(6, tmp_path / "c", minutes=30)
    phase_of(2, tmp_path / "once")
    usage(one + student - 1)
    with pytest.raises(RuntimeError, match="for 1 checkpoints and the student"):
        phase_of(2, tmp_path / "twice")


def test_saving_the_same_step_again_is_atomic(tmp_path, monkeypatch):
    """A checkpoint of the same name is there until the new one has taken its place: a kill between the two moves
    leaves it, and the next start finds it.
    """
    phase = phase_of(2, tmp_path / "c")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-00000002"]
    replace, moves = os.replace, []

    def killed(old, new):
        if os.fspath(new).endswith("step-00000002"):
            moves.append(new)
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(checkpoints.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        phase.save(tmp_path / "c")
    monkeypatch.undo()
    assert moves and not checkpoints.complete(tmp_path / "c")
    trained = []
    phase_of(2, tmp_path / "c", on_step=lambda *_: trained.append(True))
    assert not trained  # it was loaded
    assert [f.name for f in checkpoints.complete(tmp_path / "c")] == ["step-00000002"]
    phase.save(tmp_path / "c")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-00000002"]


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    """Where the clock asks for a save at a step that is saved anyway, it is saved once."""
    saved, save = [], WanPhase.save
    monkeypatch.setattr(WanPhase, "save", lambda self, path: (saved.append(self.step), save(self, path)))
    phase_of(5, tmp_path / "c", minutes=0)
    assert saved == [1, 2, 3, 4, 5]


def test_files_wait_in_the_patient_group(tmp_path, monkeypatch):
    """Saving and loading meet in the gloo group of barriers, whose patience is days, not in the GPUs'."""
    groups = []
    for name in ("save", "load"):
        real = getattr(checkpoints.dcp, name)
        seen = lambda *a, real=real, **kw: (groups.append(kw["process_group"]), real(*a, **kw))[1]
        monkeypatch.setattr(checkpoints.dcp, name, seen)
    assert dist.patient() is None
    dist.start("cpu", alone=True)
    try:
        phase_of(1, tmp_path / "c")
        phase_of(2, tmp_path / "c")
        assert groups == [dist.waiting_room()] * 3 and groups[0] is not torch.distributed.group.WORLD
    finally:
        dist.stop()


def test_the_phase_before_gives_its_disk(world, begun):
    """With stage 2's first checkpoint stage 1's go, its student stays; --keep-checkpoints keeps them, and a kill while
    they go leaves nothing that is read.
    """
    first = begun / "stage1" / "checkpoints"
    train.stage2(settings(world, begun, keep_checkpoints=True))
    assert checkpoints.complete(first)
    shutil.rmtree(begun / "stage2")
    train.stage2(settings(world, begun))
    assert [f.name for f in (begun / "stage1").glob("*")].count("student.safetensors") == 1
    assert not first.exists() and checkpoints.complete(begun / "stage2" / "checkpoints")
    assert train.stage1(settings(world, begun))["updates"] == 2  # finished is finished
    first.with_suffix(".tmp").mkdir()
    checkpoints.sweep(first)
    assert not first.with_suffix(".tmp").exists()


def test_leavings_of_a_kill_go(tmp_path):
    """step-*.tmp of a kill is removed when the phase starts, whatever step it was of."""
    (tmp_path / "c" / "step-00000099.tmp").mkdir(parents=True)
    phase_of(2, tmp_path / "c")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-00000002"]


def test_saves_by_the_clock_and_on_sigterm(tmp_path):
    """Slow updates are saved by the clock; SIGTERM saves after the update in work, and the run goes on from there to
    the weights of one in one piece.
    """
    whole = phase_of(5, tmp_path / "whole").nets["student"].weight
    seen = []
    look = lambda phase, terms: seen.append([f.name for f in checkpoints.complete(tmp_path / "c")])
    phase_of(2, tmp_path / "c", on_step=look, minutes=0)
    assert seen == [[], ["step-00000001"]]
    handler = signal.getsignal(signal.SIGTERM)
    kill = lambda phase, terms: os.kill(os.getpid(), signal.SIGTERM) if phase.step == 3 else None
    with pytest.raises(RuntimeError, match="told to stop; saved at update 4, the same command goes on"):
        phase_of(5, tmp_path / "d", on_step=kill)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.equal(phase_of(5, tmp_path / "d").nets["student"].weight, whole)
    last = lambda phase, terms: os.kill(os.getpid(), signal.SIGTERM) if phase.step == 5 else None
    with pytest.raises(RuntimeError, match="told to stop; saved at its end"):
        phase_of(5, tmp_path / "e", on_step=last)
    assert torch.equal(phase_of(5, tmp_path / "e").nets["student"].weight, whole)


def test_checksums_of_huge_checkpoints_are_kept_where_asked_for(tmp_path, monkeypatch):
    """Beyond the limit a save waits for no checksum, unless --verify asks for it."""
    monkeypatch.setattr(checkpoints, "UNASKED", 10)
    files = lambda folder: json.loads((folder / "step-00000001" / "state.json").read_text())["files"]
    for verify in (False, True):
        phase_of(1, tmp_path / str(verify), verify=verify)
        assert bool(files(tmp_path / str(verify))) is verify


def test_a_longer_phase_is_the_same_run(tmp_path):
    """A finished phase goes on to more updates and notes where it ended; fewer, and other settings, are refused."""
    config = lambda n, rate=1: {"updates": n, "--stage1-updates": n, "rate": rate}
    phase_of(4, tmp_path / "c", config(4))
    longer = phase_of(6, tmp_path / "c", config(6))
    assert longer.ends == [4] and torch.equal(longer.nets["student"].weight, phase_of(6).nets["student"].weight)
    with pytest.raises(tmd.CheckpointError, match="made with another --stage1-updates, updates"):
        phase_of(4, tmp_path / "c", config(4))
    with pytest.raises(tmd.CheckpointError, match="made with another --stage1-updates, rate, updates"):
        phase_of(8, tmp_path / "c", config(8, rate=2))


# ---- Numbers that are not finite -------------------------------------------------------------------------------------


def test_a_phase_that_learnt_nothing_is_not_done(tmp_path):
    """Where every update was skipped, it ends in a sentence, also below `patience`; one good update is enough."""
    with pytest.raises(FloatingPointError, match="of 2 updates of 'student' no gradient was finite; lower the rate"):
        phase_of(2, rates=[float("inf")])
    assert phase_of(2, rates=[1.0, float("inf")]).skipped == 1


# ---- A whole phase ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny teachers of one shape and two clips, and stage 1 finished at two updates."""
    root = tmp_path_factory.mktemp("kept")
    torch.set_num_threads(1)
    model, _ = make_tiny(root / "tiny"), make_tiny(root / "other", seed=1)
    (root / "prompts.txt").write_text("a red ball\na blue cube\n", encoding="utf-8")
    generate(model, root / "prompts.txt", root / "data", frames=9, height=64, width=64, steps=1, shard_size=2)
    train.stage1(settings(root, root / "out"))
    return root


def settings(world, out, **more):
    few = dict(stage1_updates=2, stage2_iterations=5, save_every=2, preview_every=0, global_batch=1, micro_batch=1)
    return preset("tiny", **{"model": str(world / "tiny"), "data": str(world / "data"), "out": str(out), **few, **more})


@pytest.fixture
def begun(world, tmp_path):
    """A copy of the run whose stage 1 is finished."""
    shutil.copytree(world / "out", tmp_path / "out")
    return tmp_path / "out"


def test_another_teacher_is_refused(world, begun, monkeypatch):
    """Stage 2 takes the teacher that stage 1 took: the same weights under another name, no other weights under the
    same. A checkpoint of the one is not gone on with by the other.
    """
    (begun / "moved").symlink_to(world / "tiny")
    assert train.stage1(settings(world, begun, model=str(begun / "moved")))["updates"] == 2
    monkeypatch.setattr(train.Training, "run", lambda *a, **k: pytest.fail("trained"))
    for work in (train.stage1, train.stage2):
        with pytest.raises(RuntimeError, match="stage1 holds a student made with another --model; give the same"):
            work(settings(world, begun, model=str(world / "other")))
    (begun / "stage1" / "student.json").unlink()
    monkeypatch.undo()
    with pytest.raises(tmd.CheckpointError, match="made with another transformer; give the same settings"):
        train.stage1(settings(world, begun, model=str(world / "other")))


def test_a_flipped_bit_of_the_teacher_is_refused(world, begun, monkeypatch):
    """Also where the fingerprint does not look, far from the middle of a tensor; older students do not know it."""
    cfg = settings(world, begun, model=str(wan_data_help.with_a_flipped_bit(world / "tiny", begun / "copy")))
    assert students.transformer_of(cfg) == students.transformer_of(settings(world, begun))
    monkeypatch.setattr(train.Training, "run", lambda *a, **k: pytest.fail("trained"))
    for work in (train.stage1, train.stage2):
        with pytest.raises(RuntimeError, match="stage1 holds a student made with another --model, or a damaged one;"):
            work(cfg)
    monkeypatch.undo()
    facts = students.described(begun / "stage1")
    del facts["transformer_sha256"]
    kept.write(begun / "stage1" / "student.json", facts)
    assert train.stage1(cfg)["updates"] == 2


def test_more_updates_for_a_finished_stage(world, begun):
    """Two updates and two more are four in one piece, bit for bit, and the description says so; a student made from
    the shorter one is refused.
    """
    train.stage2(settings(world, begun, keep_checkpoints=True))
    longer, whole = (settings(world, out, stage1_updates=4) for out in (begun, begun.parent / "whole"))
    with pytest.raises(RuntimeError, match="stage1 holds a student made with another --stage1-updates"):
        train.stage2(settings(world, begun, stage1_updates=4, seed=0, stage2_iterations=6))
    facts = train.stage1(longer)
    assert (facts["updates"], facts["was_finished_at"], facts["recipe"]["--stage1-updates"]) == (4, [2], 4)
    assert train.stage1(whole)["was_finished_at"] == []
    mine, theirs = (load_file(cfg.folder("stage1", "student.safetensors")) for cfg in (longer, whole))
    assert all(torch.equal(mine[name], p) for name, p in theirs.items())
    with pytest.raises(RuntimeError, match="stage2 holds a student made with another student of stage1; give"):
        train.stage2(longer)
    shutil.rmtree(begun / "stage1" / "checkpoints")
    with pytest.raises(RuntimeError, match="finished at 4 updates and its checkpoints are gone; give --stage1-updates"):
        train.stage1(settings(world, begun, stage1_updates=6))


@pytest.mark.parametrize("file", ["student.json", "student.safetensors"])
def test_a_damaged_student_is_told_and_made_again(world, begun, file):
    """One bit of a finished student or of its description is a sentence; doing what it says gives the same bytes."""
    good = {name: (begun / "stage1" / name).read_bytes() for name in ("student.json", "student.safetensors")}
    flip(begun / "stage1" / file, len(good[file]) // 2)
    with pytest.raises(
        RuntimeError, match=rf"{file} is .*(damaged|not JSON).*; delete student.json and run that phase"
    ):
        train.stage2(settings(world, begun))
    (begun / "stage1" / "student.json").unlink()
    train.stage1(settings(world, begun))
    assert (begun / "stage1" / "student.safetensors").read_bytes() == good["student.safetensors"]
    (begun / "stage1" / "student.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"student.safetensors is missing; delete student.json"):
        train.stage1(settings(world, begun))


def test_weights_that_are_not_finite(world, begun):
    """NaN in the teacher is told before the first update; NaN in a student is not saved."""
    shutil.copytree(world / "tiny", begun / "tiny")
    path = begun / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["blocks.1.attn1.to_q.weight"][0, 0] = float("nan")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"weights that are not finite \(\S*blocks.1.attn1.to_q.weight\); make"):
        train.stage1(settings(world, begun / "new", model=str(begun / "tiny")))
    phase = phase_of(1)
    phase.ema.named["weight"][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite \(weight\); it is not saved"):
        students.save_student(begun / "bad", phase, {"phase": "bad"})
    assert not (begun / "bad").exists()


def test_one_training_at_a_time(world, begun):
    """A second run of a phase in one folder is told who has it, and changes nothing; a finished one needs no lock."""
    (begun / "stage1" / "student.json").unlink()
    with only_one(begun / "stage1"), pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on"):
        train.stage1(settings(world, begun))
    train.stage1(settings(world, begun))
    with only_one(begun / "stage1"):
        assert train.stage1(settings(world, begun))["updates"] == 2


# ---- Small files -----------------------------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path):
    """On a full disk a description, a student and a preview leave what was there, and no half file."""
    (tmp_path / "student.json").write_text("before", encoding="utf-8")
    with disk_of(100), pytest.raises(RuntimeError, match=r"student.json could not be written: File too large; see"):
        kept.write(tmp_path / "student.json", {"long": "x" * 1000})
    assert (tmp_path / "student.json").read_text(encoding="utf-8") == "before"
    phase = phase_of(1)
    with disk_of(100), pytest.raises(RuntimeError, match=r"student.safetensors could not be written"):
        students.save_student(tmp_path, phase, {"phase": "x"})
    assert [f.name for f in tmp_path.iterdir()] == ["student.json"]


def test_a_full_disk_ends_no_training_by_its_log(tmp_path, capsys):
    """Lines of the log and previews that cannot be written are told once, and the training goes on."""
    log = logs.Log(tmp_path / "log.jsonl")
    log.board = None
    with disk_of(10):
        for step in (1, 2):
            log.write(step, {"loss": 0.5})
        previews.keep(torch.zeros(1, 2, 16, 3, 8, 8), tmp_path / "p" / "step.safetensors", "", "cpu", torch.float32)
    told = capsys.readouterr().out
    assert told.count("log.jsonl cannot be written (File too large); the training goes on.") == 1
    assert "the preview step is left out" in told and not any((tmp_path / "p").iterdir())


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [("stage1", {"H": 4}, "H is 4; of 4 blocks the flow head may have 1 to 3"),
     (None, {"H": 0}, "H = 0 is the baseline: `dmd2v`"), ("stage2", {"taps": "1,4"}, "taps names block 4"),
     ("kd", {"skip_layer": 4}, "skip_layer is 4"), ("kd", {"data_guidance": 1.0}, "skip_layer is 1 at data_guidance 1"),
     ("stage2", {"context_parallel": 3}, "the 2 heads")],
)  # fmt: skip
def test_before_hours_of_data(world, command, given, words):
    """What the transformer's config shows to be impossible is refused before the first clip."""
    with pytest.raises(ValueError, match=words):
        preflight.check(settings(world, world / "x", **given), command)
    preflight.check(settings(world, world / "x"), command)


def test_a_package_that_is_missing(world, monkeypatch):
    """A package that a later step needs is named before the first one."""
    cfg, without = settings(world, world / "x", lora=2), []
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    monkeypatch.setattr(preflight, "needs_ffmpeg", lambda: without.append("ffmpeg"))
    with pytest.raises(RuntimeError, match="--lora needs peft; `pip install"):
        preflight.check(cfg, "stage2")
    for command in ("export", "sample", "eval", None):
        preflight.check(replace(cfg, lora=0), command)
    assert len(without) == 3


def test_gathered_alone():
    """One process gathers its own value."""
    assert dist.gathered([1]) == [[1]]
