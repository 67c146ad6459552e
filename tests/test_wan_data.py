"""Wan data: prompt files, folder checks, teacher clips, encoded videos, shards that survive a kill, the reader (tiny
folder, CPU).
"""

import inspect
import itertools
import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_data_help import contents, make_fake, says

import tmd_minimal as tmd
from wan_scale.data import shards, teacher
from wan_scale.data.checks import MEAN_BOUND, Dropped, broken, check_normalised
from wan_scale.data.files import HashedFile
from wan_scale.data.folders import check_folder
from wan_scale.data.prompts import NEGATIVE, read_prompts
from wan_scale.data.reader import Reader
from wan_scale.data.shards import summary
from wan_scale.data.teacher import generate
from wan_scale.data.text import encode_text, pad_text
from wan_scale.data.videos import encode_videos, read_video
from wan_scale.tiny import make_tiny

SMALL = dict(frames=9, height=32, width=48, steps=2, guidance=2.0, flow_shift=3.0, shard_size=2)
PROMPTS = ["a red ball runs", "the blue cat", "a dog jumps over snow", "a small cube", "the sea at night"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def made(tiny, prompts, tmp_path_factory):
    """Five clips of the tiny teacher, with their noise, in one uninterrupted run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("data") / "made"
    assert generate(tiny, prompts, out, kd=True, **SMALL) == len(PROMPTS)
    return out


@pytest.fixture
def fake(monkeypatch):
    make_fake(monkeypatch)


# ---- Prompt files ----------------------------------------------------------------------------------------------------


def test_prompt_files_give_prompts_and_seeds(tmp_path):
    """Blank lines are skipped, a missing seed is the prompt's index, odd separators stay inside their line."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\r\n\n  a dog\u2028runs \n红色的球\n".encode())
    assert read_prompts(path) == [
        {"prompt": p, "seed": i} for i, p in enumerate(["a cat", "a dog\u2028runs", "红色的球"])
    ]
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a cat", "seed": 7}\n\n{"prompt": "a dog"}\n')
    assert read_prompts(path) == [{"prompt": "a cat", "seed": 7}, {"prompt": "a dog", "seed": 1}]


BAD_LINES = [
    (b"{not json", "not JSON"),
    (b'["a"]', "no prompt"),
    (b'{"seed": 1}', "no prompt"),
    (b'{"prompt": " "}', "no prompt"),
    (b'{"prompt": 3}', "not a string"),
    (b'{"prompt": "a", "seed": "1"}', "seed"),
    (b'{"prompt": "a", "seed": true}', "seed"),
    (b'{"prompt": "a", "seed": -1}', "seed"),
    (b'{"prompt": "a\\u0000b"}', "control"),
    (b'{"prompt": "a\\ud800"}', "control"),
    (b'{"prompt": "\xff"}', "UTF-8"),
]


@pytest.mark.parametrize("line, why", BAD_LINES)
def test_bad_prompt_lines_are_named(tmp_path, line, why):
    """Each kind of bad line: its number, the reason, and how many there are."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b"\n\n" + line)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    says(error, "p.jsonl", "2 bad lines", "line 2", "line 4", why)


def test_a_useless_prompt_file_is_refused(tmp_path):
    """Missing, empty, of another kind, or with a NUL in plain text."""
    for name, content, word in (
        ("a.txt", None, "missing"),
        ("b.txt", b"\n \n", "no prompt"),
        ("c.csv", b"x", "no prompt file"),
        ("d.txt", b"a\0b", "line 1"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_prompts(tmp_path / name)
        says(error, name, word)


# ---- Model folders ---------------------------------------------------------------------------------------------------


NEEDED = [
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_of_the_model_is_named(tiny, tmp_path, name):
    """Every file that is needed is missed by name, unless its part is not asked for."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    assert check_folder(folder) == folder
    (folder / name).unlink()
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    says(error, name)
    if "vae" in name:
        check_folder(folder, ("transformer", "text_encoder"))


def test_split_truncated_and_foreign_weights(tiny, tmp_path):
    """Weights under an index need every piece, a cut file is noticed by its header, another pipeline's folder is
    refused.
    """
    folder = shutil.copytree(tiny, tmp_path / "m")
    part, name = folder / "transformer", "diffusion_pytorch_model.safetensors"
    (part / name).rename(part / "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    says(error, f"lacks transformer/{name}", f"{name}.index.json")
    weight_map = {
        "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    (part / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    says(error, weight_map["b"])
    whole = (folder / "vae" / name).read_bytes()
    (folder / "vae" / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError) as error:
        check_folder(folder, ("vae",))
    says(error, "vae", "truncated")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    says(error, "FluxPipeline")


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_text_is_the_stock_pipelines_and_its_encoder_is_freed(tiny, tmp_path, monkeypatch):
    """Padded again, the stored tokens are encode_prompt's to bfloat16; afterwards the encoder is gone; a second call
    loads nothing.
    """
    from diffusers import WanPipeline
    from transformers import UMT5EncoderModel

    stock, seen = UMT5EncoderModel.from_pretrained, []

    def watched(*a, **kw):
        model = stock(*a, **kw)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", watched)
    path = tmp_path / "t.safetensors"
    texts = {"0": "a  red ball &amp; cat", "1": "dog", "negative": NEGATIVE}
    for _ in range(2):
        encode_text(tiny, {path: texts})
    assert len(seen) == 1 and seen[0]() is None
    got = load_file(path)
    assert got["1"].shape == (2, 32) and got["1"].dtype == torch.bfloat16  # the word and the end
    pipe = WanPipeline.from_pretrained(tiny)
    with torch.no_grad():
        want, _ = pipe.encode_prompt(list(texts.values()), do_classifier_free_guidance=False, max_sequence_length=512)
    for row, key in zip(want, texts):
        assert torch.equal(pad_text(got[key], 512), row.bfloat16())


# ---- Clips of the teacher --------------------------------------------------------------------------------------------


def pipeline_inputs(out, i):
    """Padded text and negative text of clip i, as the pipeline takes them."""
    text = {k: v for path in out.glob("shard-*.safetensors") for k, v in load_file(path).items()}[f"text.{i}"]
    negative = load_file(out / "negative.safetensors")["negative"]
    return pad_text(text, 512)[None].float(), pad_text(negative, 512)[None].float()


def test_a_clip_is_the_stock_pipelines_from_its_seed(tiny, made):
    """Clip 3 equals WanPipeline called with a CPU generator of seed 3, and its noise is that generator's."""
    from diffusers import WanPipeline

    shard = load_file(made / "shard-00001.safetensors")
    text, negative = pipeline_inputs(made, 3)
    pipe = WanPipeline.from_pretrained(tiny)
    want = pipe(prompt_embeds=text, negative_prompt_embeds=negative, num_frames=9, height=32, width=48,
                num_inference_steps=2, guidance_scale=2.0, output_type="latent",
                generator=torch.Generator("cpu").manual_seed(3)).frames[0]  # fmt: skip
    assert shard["latent.3"].dtype == torch.float16 and torch.equal(shard["latent.3"], want.half())
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator("cpu").manual_seed(3))[0]
    assert torch.equal(shard["noise.3"], noise)


@pytest.mark.parametrize("skip_layer", [None, 1])
def test_euler_clips_are_sample_teachers(tiny, prompts, tmp_path, skip_layer):
    """Euler latents equal tmd.sample_teacher on the scheduler's grid; skip_layer takes that block out of the unguided
    pass alone.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    out = tmp_path / "out"
    generate(tiny, prompts, out, sampler="euler", kd=True, limit=1, skip_layer=skip_layer, **SMALL | {"steps": 3})
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(3)
    net, less = (WanTransformer3DModel.from_pretrained(tiny, subfolder="transformer").eval() for _ in range(2))
    del less.blocks[1]
    text, negative = pipeline_inputs(out, 0)

    def sampled(unguided):
        teacher = lambda x, t, c: (unguided if torch.equal(c, negative) else net)(x, 1000 * t, c, return_dict=False)[0]
        return tmd.sample_teacher(teacher, noise, text, negative, grid=scheduler.sigmas.flip(0), guidance=2.0)[0]

    shard = load_file(out / "shard-00000.safetensors")
    noise = shard["noise.0"][None]
    right, wrong = (net, less) if skip_layer is None else (less, net)
    rounding = dict(rtol=1e-3, atol=1e-3)  # to float16
    torch.testing.assert_close(shard["latent.0"].float(), sampled(right), **rounding)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shard["latent.0"].float(), sampled(wrong), **rounding)


def test_two_ranks_write_what_one_does(tiny, prompts, made, tmp_path):
    """Shards and sidecars of two ranks are those of one, byte for byte."""
    for rank in (1, 0):
        generate(tiny, prompts, tmp_path / "two", kd=True, rank=rank, world=2, **SMALL)
    assert contents(tmp_path / "two") == contents(made)


def killed(n: int, run) -> bool:
    """Run in a forked child, killed with SIGKILL at the n-th file it would finish, rename or delete; False if it ended
    before that.
    """
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def deadly(act):
            def wrapped(*a, **kw):
                if next(calls) == n:
                    if isinstance(a[0], int):  # fsync: half of the file is written
                        os.ftruncate(a[0], os.fstat(a[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*a, **kw)

            return wrapped

        os.fsync, os.replace, os.unlink = map(deadly, (os.fsync, os.replace, os.unlink))
        try:
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_loses_at_most_the_clip_in_flight(fake, tiny, prompts, tmp_path, monkeypatch):
    """Killed within every single write, before every rename and removal in turn, then run again: the same bytes, no
    clip made twice.
    """
    how = dict(kd=True, limit=2, **SMALL)
    log = tmp_path / "log"

    def logged(noise, text):
        with open(log, "a") as file:
            file.write("x")
        return noise

    monkeypatch.setattr(teacher, "load_teacher", lambda *_: logged)
    # a killed process loses no written page; the disk's time is most of the test's
    monkeypatch.setattr(os, "fsync", lambda file: None)
    generate(tiny, prompts, tmp_path / "whole", **how)
    want, was_killed, n = contents(tmp_path / "whole"), True, 0
    while was_killed:
        out, _ = tmp_path / str(n), log.write_text("")
        was_killed = killed(n, lambda out=out: generate(tiny, prompts, out, **how))
        before = len(log.read_text())
        again = generate(tiny, prompts, out, **how)
        assert before + again in (2, 3) and len(log.read_text()) == before + again
        # a temporary of the manifest or the negative prompt may stay behind; nothing reads it
        assert {name: b for name, b in contents(out).items() if not name.endswith(".tmp")} == want
        n += 1
    assert n > 20


def test_a_real_run_killed_half_way_ends_with_the_same_bytes(tiny, prompts, made, tmp_path):
    """The tiny teacher itself, killed in its third clip."""
    out = tmp_path / "out"
    assert killed(18, lambda: generate(tiny, prompts, out, kd=True, **SMALL))
    assert 0 < generate(tiny, prompts, out, kd=True, **SMALL) < len(PROMPTS)
    assert {name: b for name, b in contents(out).items() if not name.endswith(".tmp")} == contents(made)


def test_what_is_finished_is_not_made_again(tiny, prompts, made, tmp_path, monkeypatch):
    """A second call loads no model and leaves every file alone; without one shard only that shard is made."""
    out = shutil.copytree(made, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "load_teacher", None)
        assert generate(tiny, prompts, out, kd=True, **SMALL) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "shard-00001.safetensors").write_bytes(b"cut")
    assert generate(tiny, prompts, out, kd=True, **SMALL) == 2
    assert contents(out) == contents(made)


def test_other_settings_in_the_same_folder_are_refused(tiny, prompts, made, tmp_path):
    """Guidance, kd and the prompts are named when they differ."""
    other = tmp_path / "p.txt"
    other.write_text("\n".join(PROMPTS[::-1]))
    for file, change, word in (
        (prompts, {"guidance": 3.0}, "guidance"),
        (prompts, {"kd": False}, "kd"),
        (other, {}, "first 5"),
    ):
        with pytest.raises(ValueError) as error:
            generate(tiny, file, made, **{"kd": True, **SMALL, **change})
        says(error, word)


BAD_ARGUMENTS = [
    ({"frames": 10}, "frames"),
    ({"height": 40}, "height"),
    ({"steps": 0}, "steps"),
    ({"sampler": "ddim"}, "sampler"),
    ({"limit": 0}, "limit"),
    ({"skip_layer": 4}, "skip_layer"),
    ({"skip_layer": 1, "guidance": 1.0}, "guidance"),
    ({"shard_size": 0}, "shard_size"),
    ({"rank": 2, "world": 2}, "rank"),
]


@pytest.mark.parametrize("change, word", BAD_ARGUMENTS)
def test_bad_arguments_are_a_sentence_and_write_nothing(tiny, prompts, tmp_path, change, word):
    """Each is refused before the folder appears."""
    with pytest.raises(ValueError) as error:
        generate(tiny, prompts, tmp_path / "out", **{**SMALL, **change})
    says(error, word)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_told_before_anything_starts(tiny, prompts, tmp_path, monkeypatch):
    """The gigabytes needed and free; nothing is written."""
    stock = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: stock(path)._replace(free=1000))
    with pytest.raises(RuntimeError) as error:
        generate(tiny, prompts, tmp_path / "out", **SMALL)
    says(error, "disk", "GB are needed", "1e-06 GB are free")
    assert not (tmp_path / "out").exists()


def test_host_memory_does_not_grow_with_the_clips(fake, tiny, tmp_path, monkeypatch):
    """40 clips of 2 MB in one shard, with noise: the process grows by a few clips, not by the 120 MB that it writes."""
    path = tmp_path / "p.txt"
    path.write_text("a cat\n" * 40)
    page, sizes = os.sysconf("SC_PAGE_SIZE"), []

    def watch():
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    class Watched(HashedFile):
        def write(self, piece):
            super().write(piece)
            watch()

    monkeypatch.setattr(shards, "HashedFile", Watched)
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: lambda noise, text: watch() or noise)
    generate(tiny, path, tmp_path / "out", kd=True, frames=5, height=1024, width=1024, shard_size=40)
    assert len(sizes) > 100 and sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) > 120e6
    assert max(sizes) - sizes[0] < 40e6


# ---- The filter ------------------------------------------------------------------------------------------------------


def test_the_filter_names_what_is_broken(g):
    """Noise and a slow clip pass; one frame for ever, one colour, overflow and blown-up values do not."""
    x = torch.randn(16, 5, 8, 8, generator=g)
    still = x[:, :1].expand(-1, 5, -1, -1)
    assert broken(x) is None and broken(still + 0.1 * x) is None and broken(x[:, :1]) is None
    assert broken(torch.where(x > 3, torch.nan, x)) == broken(x * 1e6) == "non-finite"
    assert broken(4 * x) == "hot" and broken(0.05 * x) == "flat"
    assert broken(still + 0.005 * x) == broken(still[:, :2]) == "static"
    assert broken(torch.cat([x[:, 4:], still[:, 1:] + 0.005 * x[:, 1:]], 1)) == "static"
    assert broken(torch.cat([5 * x[:3], x[3:]])) is None  # a few odd channels are no reason


def test_dropped_clips_are_counted_with_their_reason(fake, tiny, prompts, tmp_path, monkeypatch):
    """A hot and a flat clip are left out of the shard, listed in the sidecar, counted in the summary, and never made
    again.
    """
    spoil = iter([1.0, 9.0, 0.01, 0.01, 1.0])
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: lambda noise, text: noise * next(spoil))
    out = tmp_path / "out"
    assert generate(tiny, prompts, out, **SMALL) == 5
    cards = [json.loads((out / f"shard-0000{k}.json").read_text()) for k in range(3)]
    assert [[clip["id"] for clip in card["clips"]] for card in cards] == [[0], [], [4]]
    assert [(c["id"], c["reason"]) for card in cards for c in card["dropped"]] == [(1, "hot"), (2, "flat"), (3, "flat")]
    assert "2 clips of 5 in 3 of 3 shards, 3 dropped (2 flat, 1 hot)" in summary(out)
    assert generate(tiny, prompts, out, **SMALL) == 0
    assert sorted(clip for _, clip in Reader(out).at(0, 2)) == [0, 4]


# ---- Videos ----------------------------------------------------------------------------------------------------------


def write_video(path, frames, fps=16):
    import imageio.v2 as imageio

    with imageio.get_writer(path, format="FFMPEG", fps=fps, macro_block_size=1, quality=10) as file:
        for frame in frames:
            file.append_data(frame)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two good clips, one too short, one that is no video, one without a caption."""
    folder = tmp_path_factory.mktemp("videos")
    x = torch.linspace(0, 255, 48)[None, None, :, None].expand(9, 32, 48, 3)
    for name, n in (("a", 9), ("b", 9), ("short", 5), ("uncaptioned", 9)):
        frames = torch.stack([x[i].roll(7 * i + 11 * (name == "b"), 1) for i in range(n)])
        write_video(folder / f"{name}.mp4", frames.to(torch.uint8).numpy())
    (folder / "unreadable.mp4").write_bytes(b"not a video")
    for name in ("a", "b", "short", "unreadable"):
        (folder / f"{name}.txt").write_text(f"a {name}\nball\n")
    return folder


@pytest.fixture(scope="module")
def fitted(tiny, videos, tmp_path_factory):
    """The tiny folder with statistics that fit its VAE: a random one does not have Wan's."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("fitted") / "tiny")
    with torch.no_grad():
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()
        z = vae.encode(read_video(videos / "a.mp4", 9, 32, 48, 16.0)[None]).latent_dist.mean[0].flatten(1)
    rewrite(folder / "vae" / "config.json", latents_mean=z.mean(1).tolist(), latents_std=z.std(1).tolist())
    return folder


def test_videos_become_latents_that_the_pipeline_decodes(fitted, videos, tmp_path):
    """The stored latent, decoded by the stock pipeline, reaches the VAE as the posterior's mean; useless videos are
    counted.
    """
    from diffusers import WanPipeline

    out = tmp_path / "out"
    encode_videos(fitted, videos, out, frames=9, height=32, width=48, shard_size=4)
    cards = [json.loads(path.read_text()) for path in sorted(out.glob("shard-*.json"))]
    assert [(c["video"], c["prompt"]) for card in cards for c in card["clips"]] == [
        ("a.mp4", "a a ball"),
        ("b.mp4", "a b ball"),
    ]
    reasons = {c["video"]: c["reason"] for card in cards for c in card["dropped"]}
    assert reasons == {"short.mp4": "too short", "uncaptioned.mp4": "no caption", "unreadable.mp4": "unreadable"}
    x, c = Reader(out).batch(0, 2)
    assert x.shape == (2, 16, 3, 4, 6) and c.shape == (2, 512, 32)
    latent = load_file(out / "shard-00000.safetensors")["latent.0"].float()
    vae = AutoencoderKLWan.from_pretrained(fitted, subfolder="vae").eval()
    with torch.no_grad():
        mean = vae.encode(read_video(videos / "a.mp4", 9, 32, 48, 16.0)[None]).latent_dist.mean
    pipe, seen = WanPipeline.from_pretrained(fitted, vae=vae), []
    stock = vae.decode
    vae.decode = lambda z, **kw: seen.append(z) or stock(z, **kw)
    pipe.scheduler.step = lambda v, t, x, **kw: (x,)  # no denoising: what goes in is decoded
    zeros = torch.zeros(1, 512, 32)
    pipe(
        prompt_embeds=zeros,
        latents=latent[None],
        num_frames=9,
        height=32,
        width=48,
        num_inference_steps=1,
        guidance_scale=1.0,
    )
    torch.testing.assert_close(seen[0], mean, rtol=1e-3, atol=5e-3)  # float16 in between


def test_a_video_is_resampled_in_time_and_cropped_to_its_centre(tmp_path):
    """From 32 frames a second every other is taken, from 8 each one twice; a wide video loses its sides, a narrow one
    is scaled up.
    """
    levels = (torch.arange(16)[:, None, None, None] * 16).expand(16, 32, 96, 3).clone()
    levels[:, :, :24], levels[:, :, 72:] = 255, 255  # the sides that the crop removes
    write_video(tmp_path / "fast.mp4", levels.to(torch.uint8).numpy(), fps=32)
    x = read_video(tmp_path / "fast.mp4", 5, 64, 64, 16.0)
    assert x.shape == (3, 5, 64, 64) and x.min() >= -1 and x.max() <= 1
    want = torch.arange(0, 10, 2) * 16 / 127.5 - 1
    torch.testing.assert_close(x[:, :, :, 8:-8].mean((0, 2, 3)), want, rtol=0, atol=0.05)
    assert x[:, 0].max() < 0 or x[:, 0, :, 4:-4].max() < 0  # nothing of the bright sides inside
    write_video(tmp_path / "slow.mp4", levels.to(torch.uint8).numpy(), fps=8)
    slow = read_video(tmp_path / "slow.mp4", 5, 64, 64, 16.0)[:, :, :, 8:-8].mean((0, 2, 3))
    torch.testing.assert_close(slow, torch.tensor([0, 0, 1, 1, 2]) * 16 / 127.5 - 1, rtol=0, atol=0.05)
    with pytest.raises(Dropped, match="too short"):
        read_video(tmp_path / "fast.mp4", 9, 64, 64, 16.0)


# ---- The reader ------------------------------------------------------------------------------------------------------


def test_every_epoch_holds_every_clip_once_in_an_order_of_its_own(made):
    """Three epochs, each another permutation of all clips; the same seed gives the same, another seed another."""
    reader = Reader(made)
    assert len(reader) == 5 and reader.latent_shape == (16, 3, 4, 6)
    epochs = [[clip for _, clip in reader.at(5 * e, 5)] for e in range(6)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert epochs == [[clip for _, clip in Reader(made).at(5 * e, 5)] for e in range(6)]
    assert reader.at(0, 30) != Reader(made, seed=1).at(0, 30)


def test_batches_are_the_shards_tensors(made):
    """A batch holds latents and zero-padded text of its clips, float32; pairs add the noise; the negative prompt is
    padded too.
    """
    reader, n = Reader(made), 7  # over the end of an epoch
    noise, x, c = reader.pairs(3, n)
    assert [t.dtype for t in (noise, x, c)] == [torch.float32] * 3
    for j, (shard, clip) in enumerate(reader.at(3, n)):
        with safe_open(made / f"shard-{shard:05d}.safetensors", "pt") as file:
            assert torch.equal(x[j], file.get_tensor(f"latent.{clip}").float())
            assert torch.equal(noise[j], file.get_tensor(f"noise.{clip}"))
            text = file.get_tensor(f"text.{clip}").float()
        assert torch.equal(c[j, : len(text)], text) and not c[j, len(text) :].any()
    assert all(torch.equal(a, b) for a, b in zip(reader.batch(3, n), (x, c)))
    negative = load_file(made / "negative.safetensors")["negative"].float()
    assert torch.equal(reader.negative, pad_text(negative, 512))


def test_ranks_and_resume_see_the_same_samples(made):
    """Any split of the global batch over ranks, and any start in the middle of an epoch, gives the samples of one
    process.
    """
    whole = Reader(made).batch(0, 12)
    for ranks in (1, 2, 3):
        n = 12 // ranks
        parts = [Reader(made).batch(rank * n, n) for rank in range(ranks)]
        assert all(torch.equal(torch.cat(part), want) for part, want in zip(zip(*parts), whole))


def changed(made, tmp_path, change):
    out = shutil.copytree(made, tmp_path / "copy")
    change(out)
    return out


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_corrupted_shard_is_named_and_not_read(made, tmp_path):
    """One flipped byte is found at the first use of its shard, a cut one at the start; the sentence says what to
    delete.
    """

    def flip(out):
        shard = bytearray((out / "shard-00001.safetensors").read_bytes())
        shard[-1] ^= 1
        (out / "shard-00001.safetensors").write_bytes(shard)

    out = changed(made, tmp_path, flip)
    lost = Reader(out)
    with pytest.raises(ValueError) as error:
        Reader(out).batch(0, 5)
    says(error, "shard-00001.safetensors", "corrupted", "delete it and its .json and run `data` again")
    Reader(out, verify=False).batch(0, 5)
    (out / "shard-00001.safetensors").write_bytes((made / "shard-00001.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        Reader(out)
    says(error, "shard-00001.safetensors", "truncated")
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        lost.batch(0, 5)
    says(error, "shard-00001.safetensors", "is gone")


class WAN:
    """Statistics of Wan2.1's VAE by channel: the defaults of AutoencoderKLWan."""

    mean, std = (
        inspect.signature(AutoencoderKLWan.__init__).parameters[f"latents_{name}"].default for name in ("mean", "std")
    )


def as_raw(out):
    """Sidecars with the statistics of the VAE."""
    vae = json.loads((out / "manifest.json").read_text())
    [rewrite(path, mean=vae["vae_mean"], std=vae["vae_std"]) for path in out.glob("shard-*.json")]


REFUSED = [
    (lambda out: [path.unlink() for path in out.glob("shard-*")], "no finished shard"),
    (lambda out: rewrite(out / "manifest.json", guidance=3.0), "another manifest"),
    (lambda out: rewrite(out / "shard-00002.json", manifest="0"), "another manifest"),
    (lambda out: rewrite(out / "shard-00002.json", latent_shape=[16, 2, 4, 6]), "another shape"),
    (lambda out: rewrite(out / "shard-00000.json", mean=[9.0] * 16), "normalised"),
    (lambda out: as_raw(out), "raw"),
    (lambda out: (out / "shard-00000.json").write_text("{}"), "lacks"),
    (lambda out: (out / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda out: (out / "shard-00001.json").unlink(), "lacks shard-00001.json, the index of a shard"),
]


@pytest.mark.parametrize("change, word", REFUSED)
def test_a_folder_that_does_not_belong_together_is_refused(made, tmp_path, change, word):
    """Empty, of two manifests, of two shapes, not normalised, with a broken sidecar or without its manifest."""
    with pytest.raises(ValueError) as error:
        Reader(changed(made, tmp_path, change))
    says(error, word)


def test_a_renamed_model_and_newer_libraries_are_the_same_data(made, tmp_path):
    """The manifest's labels may change, and the data's identity with them does not; another shard changes it."""
    out = changed(made, tmp_path, lambda out: rewrite(out / "manifest.json", model="renamed", versions={}))
    assert Reader(out).identity == Reader(made).identity
    rewrite(out / "shard-00000.json", sha256="0")
    assert Reader(out).identity != Reader(made).identity


def test_what_a_folder_cannot_give_is_a_sentence(fake, tiny, prompts, tmp_path):
    """Pairs without noise, text longer than the length, a position before the start."""
    generate(tiny, prompts, tmp_path / "out", **SMALL)
    reader = Reader(tmp_path / "out", text_length=2)
    for call, word in (
        (lambda: reader.pairs(0, 1), "noise"),
        (lambda: reader.batch(0, 1), "text_length"),
        (lambda: reader.at(-1, 1), "-1"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        says(error, word)


def test_latents_that_were_not_normalised_are_refused(g):
    """Latents with the spread of real clips pass; the same before normalisation by Wan's VAE do not, whatever their
    contrast.
    """
    m, s = (torch.tensor(value, dtype=torch.float64) for value in (WAN.mean, WAN.std))
    for _ in range(20):
        mean = 0.25 * torch.randn(16, generator=g, dtype=torch.float64)  # a folder's channels stray around (0, 1)
        std = (0.2 * torch.randn(16, generator=g, dtype=torch.float64)).exp()
        for contrast in (0.8, 1.0, 1.25):
            check_normalised(mean, contrast * std, m, s)
            with pytest.raises(ValueError) as error:
                check_normalised(mean * s + m, contrast * std * s, m, s)
            says(error, "raw")
    with pytest.raises(ValueError) as error:
        check_normalised((MEAN_BOUND + 0.1) * torch.eye(16)[0], torch.ones(16), m.float(), s.float())
    says(error, "channel 0")


def test_a_shard_is_a_plain_safetensors_file(made, tmp_path):
    """Written again by the safetensors library, the same tensors are read; statistics in the sidecar are those of the
    latents.
    """
    shard = load_file(made / "shard-00000.safetensors")
    save_file(shard, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert shard.keys() == again.keys() == {f"{name}.{i}" for name in ("latent", "text", "noise") for i in (0, 1)}
    assert all(torch.equal(shard[key], again[key]) for key in shard)
    card = json.loads((made / "shard-00000.json").read_text())
    x = torch.stack([shard["latent.0"], shard["latent.1"]]).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(card["mean"], dtype=torch.float64), x.mean(1))
    torch.testing.assert_close(torch.tensor(card["std"], dtype=torch.float64), x.std(1, correction=0))


def test_nothing_in_the_folder_names_the_machine(made):
    """Manifest and sidecars hold the model folder's name and no path."""
    for path in made.glob("*.json"):
        assert str(made.parent) not in path.read_text() and "/tmp" not in path.read_text()
    assert json.loads((made / "manifest.json").read_text())["model"] == "tiny"
