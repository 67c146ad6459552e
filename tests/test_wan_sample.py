"""What sample, eval and export do with odd prompts, full disks, broken weights and folders of the user's own."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import tmd_minimal as tmd
from wan_scale import run
from wan_scale.config import preset
from wan_scale.data.files import write_json
from wan_scale.data.folders import checksums
from wan_scale.model import WanNetwork, load_transformer
from wan_scale.pictures import comment_of, read_video, write_video
from wan_scale.pipeline import TMDWanPipeline
from wan_scale.sampling import evaluate, sample
from wan_scale.tiny import make_tiny
from wan_scale.training import kept, lora, students, train, weights

CPU = torch.device("cpu")


def finish(cfg, phase="stage2"):
    """Leave what a phase leaves, of a student that has not been trained but is none of the teacher's either."""
    how = cfg.how(phase in ("kd", "dmd2v"))
    base = train.shared_base(cfg, how, CPU)
    student = weights.fill(train.make_student(cfg, how, base=base), CPU)
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.add_(0.02 * torch.randn_like(p) if name.endswith("B.weight") or not cfg.lora else 0)
    state = {name: p.detach().clone() for name, p in student.named_parameters()}
    cfg.folder(phase).mkdir(parents=True)
    weights.save(state, cfg.folder(phase, "student.safetensors"))
    facts = students.describe(cfg, how, len(student.net.blocks), phase=phase, updates=1, skipped=0)
    facts.pop("parts", None)  # as an older version: tests put other parts beside it
    students.describe_finished(cfg.folder(phase), facts)
    return student


def sign(cfg, phase="stage2"):
    """student.json says which weights it belongs to."""
    students.describe_finished(cfg.folder(phase), students.described(cfg.folder(phase)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """OUT with a finished student."""
    out = tmp_path_factory.mktemp("made") / "out"
    finish(preset("tiny", model=str(tiny), out=str(out)))
    return out


@pytest.fixture
def cfg(tiny, made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "p.txt").write_text("a red ball\na blue cube\n")
    given = {"model": str(tiny), "out": str(tmp_path / "out"), "prompts": str(tmp_path / "p.txt")}
    return preset("tiny", **given, frames=5, height=32, width=32, samples_per_prompt=1)


def command(cfg, name, *more):
    same = ("model", "out", "prompts", "frames", "height", "width", "samples_per_prompt")
    given = [x for key in same for x in (f"--{key.replace('_', '-')}", str(getattr(cfg, key)))]
    return run.main([name, "--preset", "tiny", *given, *map(str, more)])


def clip(value, frames=5, side=32):
    moving = np.linspace(value, value / 2, frames)[:, None, None, None]
    return np.broadcast_to(moving, (frames, side, side, 3))


@cache
def mp4(value, frames=5, side=32):
    """The bytes of a clip: ffmpeg starts once for each."""
    with tempfile.TemporaryDirectory() as folder:
        return write_video(clip(value, frames, side), Path(folder) / "a.mp4").read_bytes()


def fill_folder(cfg, who, clips):
    """OUT/samples/who with {name: what mp4() takes}."""
    folder = cfg.folder("samples", who)
    folder.mkdir(parents=True, exist_ok=True)
    for name, how in clips.items():
        (folder / f"{name}.mp4").write_bytes(mp4(*how))
    return folder


@contextmanager
def small_disk(size):
    """No file grows beyond `size` bytes, ffmpeg's neither."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def videos(cfg, prompts, **more):
    """{name: seed} of what would be sampled from a prompt file of these lines."""
    path = cfg.folder("lines.jsonl" if prompts[0].startswith("{") else "lines.txt")
    path.write_text("\n".join(prompts) + "\n")
    return {v.name: v.seed for v in sample.planned(replace(cfg, prompts=str(path), sample_prompts=0, **more))}


# ---- Which videos ----------------------------------------------------------------------------------------------------


def test_noise_depends_on_prompt_and_number(cfg):
    """The order of the lines and new ones change no seed; --seed changes all; a seed in the file stands, and two that
    differ by 2^32 are two.
    """
    few = videos(cfg, ["a cat", "a dog"], samples_per_prompt=2)
    more = videos(cfg, ["a new one", "a dog", "a cat"], samples_per_prompt=2)
    assert len({*few.values()}) == 4 and few.items() < more.items()
    other = videos(cfg, ["a cat", "a dog"], samples_per_prompt=2, seed=1)
    assert few.keys() == other.keys() and not {*few.values()} & {*other.values()}
    lines = [json.dumps({"prompt": f"cat {seed}", "seed": seed}) for seed in (1, 2**32 + 1)]
    given = videos(cfg, lines, samples_per_prompt=2, seed=9)
    assert given["cat 1-0.mp4"] == 1 and len(given) == 4
    draws = [torch.randn(1, generator=torch.Generator().manual_seed(seed)).item() for seed in given.values()]
    assert len({*draws}) == 4


def test_every_prompt_has_a_name_of_its_own(cfg):
    """Prompts that are no file names, are long, or begin alike get a digest; others are their own name."""
    long = "a very long prompt of a ball " * 20
    prompts = ["a cat!", "a cat?", "a cat", f"{long} left", f"{long} right", "../up", ".hidden", "猫" * 100, "a\tb"]
    names = [*videos(cfg, prompts)]
    assert len({*names}) == len(prompts) and names[2] == "a cat-0.mp4"
    assert names[0].startswith("a cat_-") and not any(name.startswith(".") or "/" in name for name in names)
    assert max(len(name.encode()) for name in names) < 200


def test_the_longest_name_is_written(tmp_path):
    """A name of 255 bytes, as VBench's longest prompts may have, is written and read back."""
    path = tmp_path / f"{'x' * 249}-0.mp4"
    assert read_video(write_video(np.zeros((5, 32, 32, 3)), path)).shape == (5, 32, 32, 3)


def test_videos_are_made_anew_where_they_must(cfg, monkeypatch):
    """A whole video of its seed stays; a cut one, and one of another --seed, are sampled again and say so in their
    header.
    """
    folder = sample.sample(cfg)
    before = {path.name: path.read_bytes() for path in folder.glob("*.mp4")}
    cut = folder / "a red ball-0.mp4"
    cut.write_bytes(before[cut.name][:-100])
    assert sample.sample(cfg) == folder and cut.read_bytes() == before[cut.name]
    sample.sample(replace(cfg, seed=3))
    after = {path.name: path.read_bytes() for path in folder.glob("*.mp4")}
    assert before.keys() == after.keys() and all(before[name] != after[name] for name in before)
    assert comment_of(cut).startswith(f"seed {sample.planned(replace(cfg, seed=3))[0].seed}, ")


@pytest.mark.parametrize("given", [("--samples-per-prompt", 0), ("--sample-prompts", -1), ("--preview-prompts", 0)])
def test_counts_that_make_nothing(cfg, capsys, given):
    """None of a prompt, fewer than no prompts, a preview of nothing: refused by name."""
    assert command(cfg, "sample", *given) == 1
    assert f"{given[0][2:].replace('-', '_')} is {given[1]}; it must be at least" in capsys.readouterr().err


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full(cfg, capsys):
    """While a video, an export, a student or its description is written: a sentence, and no file that is half there."""
    with small_disk(2000):
        assert command(cfg, "sample") == 1
        error = capsys.readouterr().err
        assert "a red ball-0.mp4 could not be written" in error and "MB are free" in error
        assert not [*cfg.folder("samples").rglob("*.mp4"), *cfg.folder("samples").rglob("*.tmp*")]
        assert command(cfg, "export") == 1
        error = capsys.readouterr().err
        assert "export could not be written" in error.splitlines()[-1] and "Traceback" not in error
        assert not cfg.folder("export").exists() and not cfg.folder("export.tmp").exists()
        for work in (
            lambda: weights.save({"a": torch.zeros(9999)}, cfg.folder("student.safetensors")),
            lambda: students.describe_finished(cfg.folder(), {"a": "b" * 9999}),
        ):
            with pytest.raises(RuntimeError, match="could not be written"):
                work()
        assert not [*cfg.folder().glob("student*")]
    assert command(cfg, "sample") == 0  # and the same command goes on
    assert len([*cfg.folder("samples").rglob("*.mp4")]) == 2


def test_no_ffmpeg_is_said_first(cfg, monkeypatch):
    """Without imageio-ffmpeg nothing is sampled, and the sentence says what brings it."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RuntimeError, match="imageio-ffmpeg is missing"):
        sample.planned(cfg)


@pytest.mark.parametrize("name", ["net.transformer.proj_out.weight", "gate"])
def test_weights_that_are_not_finite(cfg, capsys, name):
    """A student with one NaN is refused by sample and export, by the weight's name, and no mp4 is written."""
    file = cfg.folder("stage2", "student.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    sign(cfg)
    for work in ("sample", "export"):
        assert command(cfg, work) == 1
        error = capsys.readouterr().err
        assert "stage2 holds weights that are not finite" in error and name in error and error.count("\n") == 1
    assert not [*cfg.folder().rglob("*.mp4")] and not cfg.folder("export").exists()


@pytest.mark.parametrize("student", ["tmd", "teacher"])
def test_frames_that_are_not_finite(cfg, student, monkeypatch, tmp_path):
    """A VAE with NaN in it, or latents that are: `sample` names the part or the prompt and writes nothing."""
    wan = shutil.copytree(cfg.model, tmp_path / "wan")
    file = wan / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = float("nan")
    save_file(tensors, file)
    how = {"student": student, "data_steps": 1}
    with pytest.raises(RuntimeError, match=rf"the {student}'s vae holds weights that are not finite \(decoder.conv_ou"):
        sample.sample(replace(cfg, model=str(wan), **how))
    shutil.rmtree(cfg.folder("samples"))
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **kw: draw(*a, **kw) * float("nan"))
    with pytest.raises(RuntimeError, match=f"the {student}'s frames for 'a red ball' are not finite"):
        sample.sample(replace(cfg, **how))
    assert not [*cfg.folder("samples").rglob("*.mp4")]


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_parts_that_changed_since_the_training(cfg, tmp_path, capsys, part):
    """A bit of the text encoder or VAE that flipped since, or another of them: `sample` and `export` say so, and so
    does `sample` where the folder holds videos made with the other.
    """
    facts = students.described(cfg.folder("stage2"))
    students.describe_finished(cfg.folder("stage2"), facts | {"parts": checksums(cfg.model)})
    cfg.model = str(shutil.copytree(cfg.model, tmp_path / "wan"))
    made = sample.stamp(cfg.folder(), cfg, False, {"M": 2, "N": 2})
    (path,) = (tmp_path / "wan" / part).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for work in ("sample", "export"):
        assert command(cfg, work) == 1
        assert f"wan has another {part} than when the student was trained" in capsys.readouterr().err
    students.describe_finished(cfg.folder("stage2"), facts)  # of an older version, which did not note them
    with pytest.raises(RuntimeError, match="holds videos made with another parts"):
        sample.stamp(cfg.folder(), cfg, False, {"M": 2, "N": 2})
    del made["parts"]
    write_json(cfg.folder("made.json"), made)
    with pytest.raises(RuntimeError, match="an older version made, which did not note their parts"):
        sample.stamp(cfg.folder(), cfg, False, {"M": 2, "N": 2})


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a flipped bit": lambda content: content[:-9] + bytes([content[-9] ^ 64]) + content[-8:],
    "of another kind": lambda content: b"[1, 2]",
    "an object of nothing": lambda content: b"{}",
    "other types": lambda content: re.sub(rb'("[MN]"|"student"|"device"): ', rb'\1: null, "x": ', content),
}


@pytest.mark.parametrize("name", ["stage2/student.json", "stage2/student.safetensors", "made.json", "timing.json"])
def test_a_damaged_file(cfg, capsys, monkeypatch, name):
    """Empty, cut, flipped or of another kind: what a run leaves behind is named in one sentence, or gives the same."""
    monkeypatch.setattr(sample.vbench, "missing", lambda *_: [])
    assert command(cfg, "sample") == 0
    folder = fill_folder(cfg, "tmd", {"a-0": (0.5,)})
    times = {"M": 2, "N": 2, "effective_nfe": 3.0, "device": "cpu", "median_seconds": {}}
    kept.write(folder / "timing.json", times)
    file = cfg.folder(name) if "/" in name else folder / name
    whole = file.read_bytes()
    capsys.readouterr()
    for what, change in DAMAGE.items():
        file.write_bytes(changed := change(whole))
        status = command(cfg, "eval" if "timing" in name else "sample")
        error = capsys.readouterr().err
        told = status == 1 and file.stem in error and error.count("\n") == 1 and "Traceback" not in error
        same = status == 0 and changed == whole
        assert told or same or "holds videos made with another" in error, (what, status, error)


# ---- What it holds while it loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_is_read_once_in_its_precision(cfg, tmp_path, monkeypatch, dtype, rank):
    """Sampling and export begin without memory: no transformer is loaded beside the student, with LoRA neither, and
    the weights are bit for bit those of the sum made in float32.
    """
    cfg = replace(cfg, out=str(tmp_path / "own"), lora=rank)
    trained = finish(cfg)
    base = dict(load_transformer(cfg.model).named_parameters())
    wanted = dict(trained.named_parameters())
    if rank:
        whole = tmd.TMDStudent(WanNetwork(load_transformer(cfg.model)), cfg.H)
        adapters = {name: p for name, p in wanted.items() if ".adapter." in name}
        own = {name: p for name, p in wanted.items() if name not in adapters}
        wanted = {**dict(whole.named_parameters()), **own}
        for name in (name for name in adapters if name.endswith("B.weight")):
            weight = name.replace(".adapter.", ".").replace("/", ".").replace(".B.weight", ".weight")
            B, A = adapters[name], adapters[name.replace(".B.", ".A.")]
            wanted[weight] = torch.addmm(base[weight.removeprefix("net.transformer.")], B, A, alpha=cfg.lora_scale)
    seen, fill = [], weights.fill

    def look(module, *rest):
        seen.append({p.is_meta for p in module.parameters()})
        return fill(module, *rest)

    monkeypatch.setattr(weights, "fill", look)
    monkeypatch.setattr(lora.weights, "fill", look)
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    found = dict(sample.make_model(cfg, dtype).student.named_parameters())
    assert seen == [{True}] and found.keys() == wanted.keys()
    for name, p in found.items():
        assert torch.equal(p, wanted[name].to(p.dtype)), name
    assert found["net.transformer.blocks.0.attn1.to_q.weight"].dtype == dtype and found["gate"].dtype == torch.float32


# ---- Export ----------------------------------------------------------------------------------------------------------


def test_export_touches_its_own_files_alone(cfg, capsys):
    """A user's notes, .git and an edited card outlive the next export; what an export no longer writes goes."""
    final = sample.export(cfg)
    for name in (".git/HEAD", "notes.md", "vae/mine.txt"):
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("mine")
    piece = final / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    piece.write_bytes(b"of an earlier export")
    listed = json.loads((final / "export.json").read_text())
    (final / "export.json").write_text(json.dumps({**listed, str(piece.relative_to(final)): "", "../beside": ""}))
    (final.parent / "beside").write_text("mine")
    assert sample.export(cfg) == final and not piece.exists() and (final.parent / "beside").exists()
    assert "edited" not in capsys.readouterr().out
    (final / "README.md").write_text("mine")
    assert sample.export(cfg) == final and "README.md was edited and stays" in capsys.readouterr().out
    assert {(final / name).read_text() for name in (".git/HEAD", "notes.md", "vae/mine.txt", "README.md")} == {"mine"}
    TMDWanPipeline.from_pretrained(final)
    (final / "export.json").unlink()  # of a version that kept no list
    piece.write_bytes(b"of an earlier export")
    sample.export(cfg)
    assert not piece.exists() and (final / "notes.md").exists()


def test_what_cannot_be_exported(cfg, tmp_path, capsys):
    """The teacher is no student, and adapters are not merged into weights that they were not trained on."""
    assert command(cfg, "export", "--student", "teacher") == 1
    assert "choose a student" in capsys.readouterr().err
    cfg = replace(cfg, out=str(tmp_path / "own"), lora=4)
    finish(cfg)
    other = replace(cfg, model=str(make_tiny(tmp_path / "other", seed=1)))
    for work in ("sample", "export"):
        assert command(other, work) == 1
        assert "adapters of another transformer" in capsys.readouterr().err
    assert not cfg.folder("export").exists()
    assert command(cfg, "export") == 0


# ---- Score sheet -----------------------------------------------------------------------------------------------------


def test_means_are_over_the_prompts_that_all_have(cfg):
    """Two folders of different prompts are compared over the shared ones, each prompt once, and the sheet counts."""
    few = {"a-0": (0.4,), "a-1": (0.8,), "b-0": (0.8,)}
    folders = {
        "tmd": fill_folder(cfg, "tmd", few),
        "teacher": fill_folder(cfg, "teacher", {**few, "c-0": (0.1,), "c-1": (0.9,)}),
    }
    text = evaluate.sheet(cfg, folders)
    found = json.loads(cfg.folder("scores.json").read_text())
    means = [found["cheap"][who]["mean"] for who in folders]
    assert means[0] == means[1] and found["compared"] == ["a", "b"] and means[0]["diversity"] > 0
    assert "| clips | 3 | 3 | of the 2 prompts that all have; left out: 1 of teacher |" in text
    folders["other"] = fill_folder(cfg, "other", {"d-0": (0.5,)})
    assert "no prompt is in every folder" in evaluate.sheet(cfg, folders)


def test_videos_of_an_earlier_student_are_told(cfg):
    """Where a phase was trained on after its videos were made, the sheet says of which student they are."""
    folder = fill_folder(cfg, "tmd", {"a-0": (0.4,)})
    made = {"student": students.described(cfg.folder("stage2"))["sha256"]}
    write_json(folder / "made.json", made)
    assert "earlier student" not in evaluate.sheet(cfg, {"tmd": folder})
    write_json(folder / "made.json", {"student": "another"})
    assert "tmd: these videos are of an earlier student; move" in evaluate.sheet(cfg, {"tmd": folder})


def test_one_frame_is_a_clip(cfg):
    """Of one frame everything but motion is scored; the picture is drawn as well."""
    folders = {"tmd": fill_folder(cfg, "tmd", {"a-0": (0.4, 1), "a-1": (0.8, 1)})}
    text = evaluate.sheet(cfg, folders)
    mean = json.loads(cfg.folder("scores.json").read_text())["cheap"]["tmd"]["mean"]
    assert mean["motion"] is None and mean["diversity"] > 0.1 and "motion" in text
    assert sample.grid(cfg, folders).endswith("grid.png")


def test_sizes_that_differ(cfg, capsys):
    """Two models' videos of two sizes are scored without a picture; two sizes of one prompt are a sentence."""
    fill_folder(cfg, "tmd", {"a-0": (0.4,)})
    fill_folder(cfg, "teacher", {"a-0": (0.4, 5, 64)})
    assert command(cfg, "eval") == 0
    assert "no picture: the videos are of 2 sizes" in capsys.readouterr().out
    fill_folder(cfg, "tmd", {"a-1": (0.4, 5, 64)})
    assert command(cfg, "eval") == 1
    assert "samples/tmd, 'a': clips of shapes" in capsys.readouterr().err


def test_the_readmes_vbench_pair(cfg, tmp_path, capsys):
    """sample --vbench-info, then eval without it and with any prompt file: scores and picture, status 0."""
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": "a red ball", "dimension": ["color"]}]))
    (tmp_path / "any.txt").write_text("something else\n")
    cfg.prompts = str(tmp_path / "any.txt")
    assert command(cfg, "sample", "--vbench-info", info) == 0
    assert command(cfg, "eval") == 0
    assert "grid.png" in capsys.readouterr().out


def test_a_killed_sampling_leaves_no_clip(cfg):
    """The temporary file of a kill is no video to score."""
    folder = fill_folder(cfg, "tmd", {"a-0": (0.4,)})
    (folder / ".77.tmp.mp4").write_bytes(b"half")
    assert "| clips | 1 |" in evaluate.sheet(cfg, {"tmd": folder})


@pytest.mark.slow  # starts Python twice
def test_a_locale_without_letters(cfg):
    """Under LC_ALL=C with UTF-8 mode off, a prompt with an umlaut is sampled and scored, and Süsstrunk is spelled."""
    Path(cfg.prompts).write_text("ein süßer Ball\n", encoding="utf-8")
    given = ["--preset", "tiny", "--model", cfg.model, "--out", cfg.out, "--prompts", cfg.prompts, "--frames", "5"]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in ("sample", "eval"):
        line = [sys.executable, run.__file__, command, *given, "--height", "32", "--width", "32"]
        done = subprocess.run(line, env=env, capture_output=True, check=True)
    assert "Süsstrunk" in done.stdout.decode() and cfg.folder("samples/tmd/ein süßer Ball-0.mp4").exists()


def test_a_changed_bit_of_a_video_is_noticed(tmp_path):
    """write_video seals its mp4: every byte of the frames counts. An mp4 without a seal, as others write it, passes."""
    frames = np.random.default_rng(0).random((5, 32, 32, 3))
    path = write_video(frames, tmp_path / "a cat-0.mp4")
    assert read_video(path).shape == (5, 32, 32, 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 200
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"its checksum differs|not a readable video"):
        read_video(path)
    data[at] ^= 1
    path.write_bytes(data[:-46])
    assert read_video(path).shape == (5, 32, 32, 3)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the seal itself
    with pytest.raises(RuntimeError, match="its checksum differs"):
        read_video(path)
