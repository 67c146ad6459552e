"""Files that a run leaves behind, damaged at random: each is told in a sentence or changes no result."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from wan_scale import run
from wan_scale.training.checkpoints import complete

FEW = (
    "--sample-prompts 1 --clips 2 --stage1-updates 2 --stage2-iterations 5 --data-steps 1 --preview-every 2 "
    "--shard-size 2 --samples-per-prompt 1 --save-every 2 --global-batch 2 --keep-checkpoints"
).split()
SAMPLE = "samples/tmd/a red ball-0.mp4"
# (files, what is taken away before, command, what must come out as before)
KINDS = [
    ("data/[mns]*", "stage1", "stage1", "stage1/student.safetensors"),
    ("stage1/checkpoints/*/*", "stage1/student.json", "stage1", "stage1/student.safetensors"),
    ("stage1/*.jsonl", "stage1/student.json", "stage1", "stage1/student.safetensors"),
    ("stage1/previews/*", "stage1/student.json", "stage1", "stage1/student.safetensors"),
    ("stage1/student.*", "stage2", "stage2", "stage2/student.safetensors"),
    ("stage2/checkpoints/step-00000004/*", "stage2/student.json stage2/checkpoints/step-00000005", "stage2",
     "stage2/student.safetensors"),
    ("stage2/student.*", "samples/tmd", "sample", SAMPLE),
    ("samples/tmd/*.json", SAMPLE, "sample", SAMPLE),
    ("tiny-wan/transformer/*", "stage2", "stage2", "stage2/student.safetensors"),
    ("tiny-wan/[tvs]*/*", "samples/tmd", "sample", None),  # weights of VAE and text encoder may be any
    ("prompts.txt", "stage1", "stage1", "stage1/student.safetensors"),
    ("samples/tmd/*.json", "scores.json", "eval", "scores.json"),
    ("samples/tmd/*.mp4", "scores.json", "eval", "scores.json"),
    ("samples/grid.*", "scores.json", "eval", "scores.json"),
    ("scores.*", "samples/grid.png", "eval", "scores.json"),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """OUT of one whole ladder of the tiny preset."""
    out = tmp_path_factory.mktemp("fuzz") / "out"
    torch.set_num_threads(1)
    for command in ([], ["eval"]):  # the ladder names its columns in another order
        assert run.main([*command, "--preset", "tiny", "--out", str(out), *FEW]) == 0
    return out


def mutate(draw: random.Random, file: Path, files: list[Path]) -> str:
    """Damage a file in one of five ways; what was done, in words."""
    how = draw.choice(["truncate", "flip", "empty", "swap", "dtype"])
    data = bytearray(file.read_bytes())
    if how == "swap" and (others := [f for f in files if f != file and f.suffix == file.suffix]):
        other = draw.choice(others)
        theirs = other.read_bytes()
        replace(other, data), replace(file, theirs)
        return f"{file.name} and {other.name} swapped"
    if how == "dtype" and file.suffix == ".safetensors":
        state = load_file(file)
        name = draw.choice(sorted(state))
        state[name] = state[name].to(draw.choice([torch.float64, torch.bfloat16, torch.float16, torch.int32]))
        file.unlink()
        save_file(state, file, {"format": "pt"})
        return f"{name} of {file.name} in {state[name].dtype}"
    if how == "truncate":
        cut = draw.randrange(len(data) or 1)
        replace(file, data[:cut])
        return f"{file.name} cut to {cut} of {len(data)} bytes"
    if how == "empty" or not data:
        replace(file, b"")
        return f"{file.name} emptied"
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    replace(file, data)
    return f"a bit of byte {at} of {len(data)} in {file.name}"


def replace(file: Path, data: bytes) -> None:
    """A new file in its place: the old one may be linked to the run that was copied."""
    file.unlink()
    file.write_bytes(data)


def copy(source: str, target: str) -> None:
    """Large files, which no command changes in place, are linked."""
    os.link(source, target) if os.path.getsize(source) > 1e6 else shutil.copy2(source, target)


def trial(number: int, finished: Path, work: Path, capsys) -> str:
    """One mutation and the command that meets it: "" or what is wrong about the answer, in words."""
    draw = random.Random(number)
    pattern, gone, command, result = KINDS[number % len(KINDS)]
    shutil.copytree(finished, work, copy_function=copy)
    try:
        files = sorted(f for f in work.glob(pattern) if f.is_file())
        done = mutate(draw, draw.choice(files), files)
        for name in [gone] if (work / gone).exists() else gone.split():
            shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink(missing_ok=True)
        capsys.readouterr()
        try:
            status = run.main([command, "--preset", "tiny", "--out", str(work), *FEW])
        except BaseException as e:  # what a person would see as a traceback
            return f"{number}: {command} after {done}: {type(e).__name__}: {str(e)[:200]}"
        told = capsys.readouterr().err
        if status == 0 and (not result or (work / result).read_bytes() == (finished / result).read_bytes()):
            return ""
        if status == 0:
            return f"{number}: {command} after {done}: another result in silence"
        *bars, last = told.strip().splitlines() or [""]  # progress of what was loaded before it failed
        one = last.startswith("wan_scale: ") and last.endswith(".") and all("Loading" in bar for bar in bars if bar)
        return "" if one else f"{number}: {command} after {done}: {told[-500:]}"
    finally:
        shutil.rmtree(work)


def faults(numbers, finished, tmp_path, capsys) -> list[str]:
    return [fault for n in numbers if (fault := trial(n, finished, tmp_path / "work", capsys))]


def test_some_mutations(finished, tmp_path, capsys):
    """The first of the 200: one of each kind."""
    assert not faults(range(len(KINDS)), finished, tmp_path, capsys)


def ladder(out: str) -> None:
    """The whole ladder of the tiny preset, in a process that may be killed."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(run.main(["--preset", "tiny", "--out", out, "--save-every", "2"]))


def saved(out: Path) -> tuple[set[str], dict[str, int]]:
    """What must not be lost: names of finished files, and the newest checkpoint of each phase."""
    clips = {f"clip {p.stem[5:]}" for p in out.glob("data/parts/*/clip-*.safetensors")}
    for path in out.glob("data/shard-*.json"):
        clips |= {f"clip {clip['id']}" for clip in json.loads(path.read_text(encoding="utf-8"))["clips"]}
    done = [*out.glob("stage?/student.json"), *out.glob("samples/*/*.mp4")]
    names = {str(p.relative_to(out)) for p in done if not p.name.startswith(".")}  # .NAME.tmp.mp4 is in work
    newest = lambda phase: [int(p.name[5:]) for p in complete(out / phase / "checkpoints")][-1:] or [0]
    return clips | names, {phase: newest(phase)[0] for phase in ("stage1", "stage2")}


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    """kill -9 at 30 random moments of `make wan`: what was saved is there, and the run goes on to the same bytes."""
    processes, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["wan_scale.run", "wan_scale.training.train", "wan_scale.sampling.sample"])

    def run_for(out: Path, seconds: float | None) -> int | None:
        process = processes.Process(target=ladder, args=(str(out),))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    assert run_for(tmp_path / "whole", None) == 0
    begun = time.monotonic()
    assert run_for(tmp_path / "whole", None) == 0  # imports apart, what a finished ladder takes
    least, kills, rounds = 0.5 * (time.monotonic() - begun), 0, 0
    result = lambda out: {str(p.relative_to(out)): p.read_bytes() for kind in ("student.safetensors", "*.mp4")
                          for p in out.rglob(kind) if p.name != "grid.mp4"}  # fmt: skip
    wanted = result(tmp_path / "whole")
    while kills < 30:
        out, before = tmp_path / f"killed-{rounds}", (set(), {"stage1": 0, "stage2": 0})
        while (status := run_for(out, least + draw.uniform(0, 3) if kills < 30 else None)) == -signal.SIGKILL:
            kills += 1
            names, steps = saved(out)
            assert names >= before[0], (kills, before)
            for phase, step in steps.items():  # stage 1's checkpoints go when stage 2 has its own
                assert step >= before[1][phase] or f"{phase}/student.json" in names, (kills, phase, steps, before)
            before = names, steps
        assert status == 0 and result(out) == wanted, (rounds, status)
        rounds += 1
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.slow
def test_two_hundred_mutations(finished, tmp_path, capsys):
    """200 random mutations of every kind of file that a run leaves: a sentence or the same result, no traceback."""
    found = faults(range(200), finished, tmp_path, capsys)
    assert not found, "\n".join(found)
