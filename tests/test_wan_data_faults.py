"""Data as it really comes: frames at odd times, captions in other encodings, full disks, folders that grow, locales."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_wan_data import PROMPTS, SMALL, write_video
from wan_data_help import contents, make_fake, says

from wan_scale import run
from wan_scale.data import files, teacher, videos
from wan_scale.data.ahead import Ahead
from wan_scale.data.lock import only_one
from wan_scale.data.prompts import NEGATIVE, read_prompts
from wan_scale.data.reader import Reader
from wan_scale.data.teacher import generate
from wan_scale.data.text import digest, encode_text, read_negative
from wan_scale.data.videos import encode_videos, read_video
from wan_scale.seeds import generator
from wan_scale.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def fake(monkeypatch):
    make_fake(monkeypatch)


def written(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---- Folders that grow -----------------------------------------------------------------------------------------------


def test_data_may_grow(fake, tiny, tmp_path, monkeypatch):
    """Two clips, then five, then a sixth prompt at the end of the file: no clip is made twice, and the folder is that
    of one call, byte for byte; fewer clips, or other first prompts, are refused.
    """
    made = []
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: lambda noise, text: made.append(1) or noise)
    how, file = dict(kd=True, **SMALL | {"shard_size": 4}), written(tmp_path / "p.txt", PROMPTS)
    for limit, new in ((2, 2), (5, 3)):
        assert generate(tiny, file, tmp_path / "out", limit=limit, **how) == new
    longer = written(tmp_path / "longer.txt", [*PROMPTS, "one more"])
    assert generate(tiny, longer, tmp_path / "out", limit=5, **how) == 0  # a line that is not asked for
    assert generate(tiny, longer, tmp_path / "out", **how) == 1 and len(made) == 6
    generate(tiny, longer, tmp_path / "once", **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "once")
    for prompts, limit, words in ((longer, 4, "was made for 6 clips, now 4"), (file, None, "now 5")):
        with pytest.raises(ValueError) as error:
            generate(tiny, prompts, tmp_path / "out", limit=limit, **how)
        says(error, words)
    with pytest.raises(ValueError) as error:
        generate(tiny, written(tmp_path / "o.txt", ["x", *PROMPTS, "y"]), tmp_path / "out", **how)
    says(error, "the first 6")


def test_data_does_not_grow_by_another_text_encoder(fake, tiny, tmp_path):
    """Clips are not mixed whose texts two text encoders embedded; a folder of an older version does not say which."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    make = lambda model, n: generate(model, tmp_path / "p.txt", tmp_path / "out", limit=n, **SMALL)
    make(tiny, 1)
    other = shutil.copytree(tiny, tmp_path / "other")
    shutil.copy(make_tiny(tmp_path / "seed", seed=1) / TEXT, other / TEXT)
    with pytest.raises(ValueError) as error:
        make(other, 2)
    says(error, "made with another text_encoder")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["text_encoder"]
    path.write_text(json.dumps(manifest))
    assert make(other, 2) == 1


def test_a_damaged_shard_does_not_grow(fake, tiny, tmp_path):
    """Clips of a shard whose checksum differs are made again, not handed on."""
    how, file = SMALL | {"shard_size": 4}, written(tmp_path / "p.txt", PROMPTS)
    generate(tiny, file, tmp_path / "out", limit=2, **how)
    shard = tmp_path / "out" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert generate(tiny, file, tmp_path / "out", limit=3, **how) == 3
    Reader(tmp_path / "out").batch(0, 3)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_seeds_beyond_32_bits_have_noise_of_their_own(fake, tiny, tmp_path):
    """Seeds 1, 2^32 + 1 and 2^33 + 1 give three clips; a seed below gives the noise that torch gives it."""
    lines = [json.dumps({"prompt": "a cat", "seed": seed}) for seed in (1, 2**32 + 1, 2**33 + 1)]
    generate(tiny, written(tmp_path / "p.jsonl", lines), tmp_path / "out", **SMALL | {"shard_size": 3})
    clips = load_file(tmp_path / "out" / "shard-00000.safetensors")
    first, second, third = (clips[f"latent.{i}"] for i in range(3))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    wanted = torch.randn(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.randn(3, generator=generator(7)), wanted)


def test_broken_numbers_are_told_as_broken_data(fake, tiny, tmp_path):
    """NaN in a shard ends in a sentence about the data."""
    file = written(tmp_path / "p.txt", PROMPTS[:2])
    generate(tiny, file, tmp_path / "out", **SMALL)
    shard = tmp_path / "out" / "shard-00000.safetensors"
    clips = load_file(shard)
    clips["latent.1"][0, 0, 0, 0] = torch.nan
    save_file(clips, shard)
    files.write_json(shard.with_suffix(".json"), files.read_json(shard.with_suffix(".json")) | {
        "bytes": shard.stat().st_size, "sha256": files.file_sha256(shard)})  # fmt: skip
    with pytest.raises(ValueError) as error:
        Reader(tmp_path / "out").batch(0, 2)
    says(error, "shard-00000.safetensors holds a latent that is not finite", "the data are broken, not the training")


def test_a_broken_text_encoder_is_told(tiny, tmp_path):
    """Weights of NaN give no embedding."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    path = folder / "text_encoder" / "model.safetensors"
    save_file({k: torch.full_like(v, torch.nan) for k, v in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(RuntimeError) as error:
        encode_text(folder, {tmp_path / "t.safetensors": {"0": "a cat"}})
    says(error, "text encoder", "not finite")


# ---- Videos ----------------------------------------------------------------------------------------------------------


def clip_of(path, levels, *output):
    """A video of grey frames by ffmpeg, with the given options."""
    levels = np.asarray(levels, np.uint8)
    levels = levels.reshape(len(levels), -1)  # a grey a frame, or all its values
    frames = np.broadcast_to(levels, (len(levels), 32 * 48 * 3)).tobytes()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x32", "-r", "60", "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *output, str(path)]
    subprocess.run(command, input=frames, check=True)


def test_pixels_that_are_not_square(tmp_path):
    """A video whose pixels are twice as wide as high is stretched, as a player shows it, before it is cropped."""
    stripes = np.zeros((9, 32, 48, 3), np.uint8)
    stripes[:, :8] = stripes[:, -8:] = 255
    clip_of(tmp_path / "a.mp4", stripes, "-vf", "setsar=2/1", "-pix_fmt", "yuv444p", "-qp", "0")
    x = read_video(tmp_path / "a.mp4", 9, 32, 96, 60.0).mean((0, 1, 3))
    assert x[:8].min() > 0.9 and x[-8:].min() > 0.9 and x[9:-9].max() < -0.9


def test_another_video_of_the_same_name_is_noticed(fake, tiny, tmp_path, monkeypatch):
    """The folder that holds the latents of a video is not taken for those of its replacement."""
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "a.txt").write_text("a cat")
    monkeypatch.setattr(videos, "read_video", lambda *_: torch.rand(3, 9, 32, 48) * 2 - 1)
    encode = lambda: encode_videos(tiny, tmp_path, tmp_path / "out", frames=9, height=32, width=48)
    assert (encode(), encode()) == (1, 0)
    (tmp_path / "a.mp4").write_bytes(b"12")
    with pytest.raises(ValueError) as error:
        encode()
    says(error, "its 1 prompts or videos are not the first 1 of these")


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.MKV"])
def test_frames_are_sampled_by_their_own_times(tmp_path, name):
    """60 frames in the first second, then 6 a second: sampled at 12 a second the clip keeps the pace of the video,
    though the header's mean rate says otherwise.
    """
    slow_down = "setpts='if(lt(N,60),N/60,1+(N-60)/6)/TB'"
    clip_of(tmp_path / name, range(72), "-vf", slow_down, "-fps_mode", "vfr", "-pix_fmt", "yuv444p", "-qp", "0")
    x = read_video(tmp_path / name, 24, 32, 48, 12.0)
    levels = (x.mean((0, 2, 3)) + 1) * 127.5
    times = torch.arange(24) / 12
    wanted = torch.where(times < 1, times * 60, 60 + (times - 1) * 6)
    assert (levels - wanted).abs().max() < 5  # a frame of 1 / 12 s holds five levels, and rounding shows one of them


def test_webm_and_mov_are_taken_and_others_named(fake, tiny, tmp_path, monkeypatch, capsys):
    """.mov and .webm beside .mp4 become records; a .gif is named. Captions: a BOM goes, UTF-16 is read by its mark, and
    GBK, NUL and no caption are dropped with a reason of their own.
    """
    captions = {
        "a.mp4": "\ufeffa cat".encode(),
        "b.mov": "a dog\n".encode("utf-16"),
        "c.webm": "红色的球".encode("gbk"),
        "d.MP4": b"a\0cat",
        "e.mp4": None,
        "f.gif": b"x",
    }
    for name, caption in captions.items():
        (tmp_path / name).touch()
        if caption is not None and name != "f.gif":
            (tmp_path / name).with_suffix(".txt").write_bytes(caption)
    monkeypatch.setattr(videos, "read_video", lambda *_: torch.rand(3, 9, 32, 48) * 2 - 1)
    encode_videos(tiny, tmp_path, tmp_path / "out", frames=9, height=32, width=48)
    sidecar = files.read_json(tmp_path / "out" / "shard-00000.json")
    assert [(clip["video"], clip["prompt"]) for clip in sidecar["clips"]] == [("a.mp4", "a cat"), ("b.mov", "a dog")]
    why = {clip["video"]: clip["reason"] for clip in sidecar["dropped"]}
    assert why == {"c.webm": "caption not UTF-8", "d.MP4": "control character in caption", "e.mp4": "no caption"}
    assert "other kinds are left out (.gif)" in capsys.readouterr().out


def test_prompt_files_of_other_encodings(tmp_path):
    """UTF-16 is read by its mark; GBK is refused by line; half a UTF-16 file is a sentence."""
    (tmp_path / "p.txt").write_bytes("a cat\n红色的球".encode("utf-16"))
    assert [record["prompt"] for record in read_prompts(tmp_path / "p.txt")] == ["a cat", "红色的球"]
    (tmp_path / "p.txt").write_bytes("a cat\n红色的球".encode("gbk"))
    with pytest.raises(ValueError) as error:
        read_prompts(tmp_path / "p.txt")
    says(error, "line 2: not UTF-8")
    (tmp_path / "p.txt").write_bytes("a cat".encode("utf-16")[:-1])
    with pytest.raises(ValueError) as error:
        read_prompts(tmp_path / "p.txt")
    says(error, "not UTF-16", "save it as UTF-8")


def test_many_prompts_are_read_at_once(tmp_path):
    """20,000 long prompts take well under a second (500,000: some three), for no character is looked at by Python."""
    import time

    written(tmp_path / "p.txt", ["a small red cube jumps over the sea " * 14] * 20_000)
    began = time.process_time()
    assert len(read_prompts(tmp_path / "p.txt")) == 20_000
    assert time.process_time() - began < 0.6


# ---- Disks and locales -----------------------------------------------------------------------------------------------


def test_ranks_may_write_one_file_at_once(tmp_path, monkeypatch):
    """Every rank of `data` writes the manifest: one that is in the middle of it takes no other's file away."""
    path = tmp_path / "manifest.json"
    monkeypatch.setenv("RANK", "0")
    with files.atomic(path) as one:
        one.write(b"{}")
        monkeypatch.setenv("RANK", "1")
        with files.atomic(path) as other:
            other.write(b"{}")
    assert contents(tmp_path) == {"manifest.json": b"{}"}


def test_a_full_disk_is_a_sentence_and_costs_nothing(fake, tiny, tmp_path, monkeypatch):
    """Full at any file that is written: one sentence, no half file under a final name; with room again the same command
    ends with the bytes of an undisturbed run.
    """
    file, stock = written(tmp_path / "p.txt", PROMPTS[:3]), lambda descriptor: None
    generate(tiny, file, tmp_path / "whole", kd=True, **SMALL)
    want, n = contents(tmp_path / "whole"), 0
    while True:
        left = iter([*[True] * n, False])

        def full(descriptor, left=left):
            if not next(left, True):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        out = tmp_path / str(n)
        try:
            generate(tiny, file, out, kd=True, **SMALL)
            break
        except RuntimeError as error:
            says(type("", (), {"value": error}), "the disk is full; free some")
        monkeypatch.setattr(os, "fsync", stock)
        generate(tiny, file, out, kd=True, **SMALL)
        assert contents(out) == want
        n += 1
    assert n > 8


LOCALE = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from wan_scale.data import files, prompts, videos
folder = Path({folder!r})
files.write_json(folder / "a.json", dict(prompt="Süßes 红色的球", negative=prompts.NEGATIVE))
assert files.read_json(folder / "a.json")["prompt"] == "Süßes 红色的球"
assert videos.caption(folder / "c.txt") == dict(prompt="红色的球")
assert prompts.read_prompts(folder / "c.txt")[0]["prompt"] == "红色的球"
assert open(folder / "c.txt").encoding.lower() not in ("utf-8", "utf8")
"""


def test_files_are_utf8_in_every_locale(tmp_path):
    """With LC_ALL=C and UTF-8 mode off, what is written and read is UTF-8 all the same."""
    (tmp_path / "c.txt").write_bytes("红色的球".encode())
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = LOCALE.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    (tmp_path / "code.py").write_bytes(code.encode())
    subprocess.run([sys.executable, str(tmp_path / "code.py")], env=environment, check=True)
    assert NEGATIVE in (tmp_path / "a.json").read_text(encoding="utf-8")


# ---- Reading ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_reading_ahead_changes_no_batch(fake, tiny, tmp_path, depth):
    """Whatever is asked for comes, in order, after a jump and by another size; no more than `depth` calls are ahead."""
    generate(tiny, written(tmp_path / "p.txt", PROMPTS), tmp_path / "out", kd=True, **SMALL)
    reader, asked = Reader(tmp_path / "out"), []

    def read(position, n, host=False):
        asked.append(position)
        return reader.pairs(position, n, host)

    ahead = Ahead(reader, read, stride=2, depth=depth)
    for position, n in ((0, 1), (2, 1), (4, 1), (40, 1), (42, 1), (42, 2), (0, 1)):
        assert all(map(torch.equal, ahead(position, n), reader.pairs(position, n)))
        assert len(ahead.waiting) == depth
    assert asked[: 2 + depth] == [2 * i for i in range(2 + depth)] if depth else len(asked) == 7
    assert ahead.calls == 7 and ahead.waited > 0


def test_an_error_ahead_is_raised_by_the_call_that_needs_it(fake, tiny, tmp_path):
    """A sample that cannot be read ends the call that asks for it, not an earlier one."""
    generate(tiny, written(tmp_path / "p.txt", PROMPTS), tmp_path / "out", **SMALL)
    reader = Reader(tmp_path / "out")

    def read(position, n, host=False):
        if position == 2:
            raise ValueError("broken")
        return reader.batch(position, n, host)

    ahead = Ahead(reader, read, stride=1, depth=4)
    ahead(0, 1), ahead(1, 1)
    with pytest.raises(ValueError, match="broken"):
        ahead(2, 1)
    ahead(3, 1)


# ---- The command -----------------------------------------------------------------------------------------------------


def command(*args) -> int:
    return run.main([str(a) for a in args])


def test_two_data_commands_in_one_folder(tiny, tmp_path, capsys):
    """The second is told who is at work there, and leaves everything alone."""
    with only_one(tmp_path / "out" / "data"):
        assert command("data", "--preset", "tiny", "--out", tmp_path / "out", "--model", tiny) == 1
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


def test_videos_of_the_tiny_preset_pass_the_filter(tmp_path, capsys):
    """A random VAE's latents are normalised by its own statistics, so that clips are neither flat nor hot."""
    frames = torch.linspace(0, 255, 64)[None, None, :, None].expand(9, 64, 64, 3)
    frames = torch.stack([frame.roll(7 * i, 1) for i, frame in enumerate(frames)])
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "a.mp4", frames.to(torch.uint8).numpy())
    (tmp_path / "v" / "a.txt").write_text("a ball")
    assert command("data", "--preset", "tiny", "--out", tmp_path / "out", "--videos", tmp_path / "v") == 0
    assert "1 clips of 1" in capsys.readouterr().out
    assert command("data", "--preset", "tiny", "--frames", "1", "--out", tmp_path / "x") == 1
    assert "frames is 1; it must be at least 5" in capsys.readouterr().err


def test_a_model_folder_is_the_same_by_every_path(tiny, tmp_path, monkeypatch):
    """Samples of the teacher in "." are taken up when its folder is given by its absolute path."""
    from wan_scale.sampling import sample

    monkeypatch.chdir(tiny)
    for model in (".", str(tiny), f"../{tiny.name}"):
        sample.stamp(tmp_path, run.preset("tiny", model=model), True, {})
    other = make_tiny(tmp_path / tiny.name, seed=1)  # its folder is called alike
    with pytest.raises(RuntimeError, match="another transformer"):
        sample.stamp(tmp_path, run.preset("tiny", model=str(other)), True, {})


def test_a_changed_bit_of_the_negative_embedding_is_noticed(tmp_path):
    """It trains as the empty prompt: a bit of its tensor that was flipped later is a sentence, not another student."""
    text = {"negative": torch.randn(3, 32).bfloat16()}
    path = tmp_path / "negative.safetensors"
    path.write_bytes(save(text, {"sha256": digest(text)}))
    assert torch.equal(read_negative(tmp_path, 3), text["negative"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_negative(tmp_path, 3)
    says(error, "its checksum differs", "run `data` again")
