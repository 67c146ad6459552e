"""Published clips as data folders: rCM's tars, FastVideo's Parquet files, FastGen's tars, in exactly their layouts."""

import io
import json
import shutil
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save
from wan_data_help import contents, says

from wan_scale import run
from wan_scale.data import published, shards, sources
from wan_scale.data.files import atomic
from wan_scale.data.manifest import make_manifest
from wan_scale.data.reader import Reader
from wan_scale.data.shards import captions, summary
from wan_scale.data.text import pad_text
from wan_scale.tiny import make_tiny

SIZE = dict(frames=9, height=32, width=48)
SHAPE, CLIPS = (16, 3, 4, 6), 6
PROMPTS = ["a red ball runs", "Süßes 红色的球", "a dog", "a small cube", "the sea", "a cat"]
SETTINGS = "--frames 9 --height 32 --width 48".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def fake(request, monkeypatch):
    """A text encoder that writes ones, but for tests marked `real`: the negative prompt alone is encoded here."""

    def encode(folder, files, **_):
        for path, texts in files.items():
            if not path.exists():
                with atomic(path) as file:
                    file.write(save({key: torch.ones(3, 32, dtype=torch.bfloat16) for key in texts}))

    for module in (published, shards):
        monkeypatch.setattr(module, "encode_text", encode)


def clips(n=CLIPS):
    """Normalised latents and texts of n clips, exact in bf16."""
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(SHAPE, generator=g).bfloat16(), torch.randn(3 + i, 32, generator=g).bfloat16()) for i in range(n)
    ]


def raw(model, found=None, back=False):
    """The clips with raw latents, by the VAE's config; `back`: normalised again, with the rounding of both ways."""
    config = json.loads((model / "vae" / "config.json").read_text())
    mean, std = (torch.tensor(config[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
    latent = lambda x: x.float() * std + mean
    return [((latent(x) - mean) / std if back else latent(x), text) for x, text in found or clips()]


def saved(x) -> bytes:
    torch.save(x, file := io.BytesIO())
    return file.getvalue()


def write_tar(path, members: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_rcm(folder, model, found=None, below=False):
    """Two tars, as the builder names them or, `below`, the merger. A latent is saved as a slice of its batch."""
    found = found or clips()
    for shard in range(2):
        members = {}
        some = list(enumerate(found))[3 * shard : 3 * shard + 3]
        batch = torch.stack([x for _, (x, _) in some])
        for j, (i, (_, text)) in enumerate(some):
            key = f"{i:09d}/{i:09d}" if below else f"{i:09d}"
            members[f"{key}.latent.pt"] = saved(batch[j])
            members[f"{key}.embed.pt"] = saved(pad_text(text, 512))
            members[f"{key}.prompt.txt"] = PROMPTS[i].encode()
        write_tar(folder / (f"shard-{shard:05d}.tar" if below else f"shard{shard:05d}.tar"), members)


def write_fastgen(folder, model, found=None, noise=True):
    for shard in range(2):
        members = {}
        for i, (x, text) in list(enumerate(found or clips()))[3 * shard : 3 * shard + 3]:
            members |= {f"{i}.latent.pth": saved(x.float()), f"{i}.txt_emb.pth": saved(text[None])}
            if noise:
                members[f"{i}.noise.pth"] = saved(torch.full(SHAPE, float(i)))
        write_tar(folder / f"{shard:06d}.tar", members)


def write_fastvideo(folder, model, found=None, caption="caption", **change):
    """Two Parquet files of raw latents in float32, whatever their dtype column says, in row groups of two."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        rows = []
        for i, (x, text) in list(enumerate(raw(model, found)))[3 * shard : 3 * shard + 3]:
            text = text.float()[None] if i % 2 else text.float()
            row = {"id": f"clip{i}", "vae_latent_bytes": x.numpy().tobytes(), "vae_latent_shape": list(x.shape),
                   "vae_latent_dtype": "bfloat16", "text_embedding_bytes": text.numpy().tobytes(),
                   "text_embedding_shape": list(text.shape), "text_embedding_dtype": "float32",
                   "file_name": f"{i}.mp4", caption: PROMPTS[i], "media_type": "video", "width": 48, "height": 32,
                   "num_frames": 9, "duration_sec": 0.5, "fps": 16.0}  # fmt: skip
            rows.append(row | change)
        table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if v != "left out"} for row in rows])
        parquet.write_table(table, folder / f"data_{shard}.parquet", row_group_size=2, compression="zstd")


WRITERS = {"rcm": write_rcm, "fastvideo": write_fastvideo, "fastgen": write_fastgen}
every_kind = pytest.mark.parametrize("kind", WRITERS)


def own(tiny, out, found=None, n=CLIPS, **more):
    """Shards of the same clips as `data` makes them."""
    found, manifest = found or clips(), make_manifest(tiny, "teacher", **SIZE, kd=False, shard_size=4)
    records = [{"prompt": PROMPTS[i], "seed": i} for i in range(n)]
    load = lambda: lambda record, text: {"latent": found[record["seed"]][0].float()}
    where = dict(rank=0, world=1, device="cpu", text_of=lambda record: found[record["seed"]][1], **more)
    shards.fill(tiny, out, manifest, records, load, **where)
    return out


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(a: Reader, b: Reader) -> bool:
    return all(torch.equal(x, y) for i in (0, 5) for x, y in zip(a.batch(i, 4), b.batch(i, 4), strict=True))


# ---- The same batches ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("convert", [False, True])
def test_published_clips_give_the_batches_of_our_own_shards(tiny, tmp_path, capsys, kind, convert):
    """In place and converted, every batch is that of shards that `data` made of the same clips, bit for bit. Raw
    latents are normalised, texts padded, prompts and noise kept; the kind and what it found are told.
    """
    WRITERS[kind](tmp_path / "from", tiny)
    out = tmp_path / "out"
    assert published.take(tiny, tmp_path / "from", out, convert=convert, shard_size=4, **SIZE) == CLIPS
    latents = "raw, normalised on reading" if kind == "fastvideo" else "normalised"
    assert f"2 files of {kind}, latents {latents}" in capsys.readouterr().out
    reader = Reader(out, size=(9, 32, 48))
    same_clips = raw(tiny, back=True) if kind == "fastvideo" else clips()
    assert len(reader) == CLIPS and same(reader, Reader(own(tiny, tmp_path / "own", same_clips)))
    assert captions(out, 9) == ([] if kind == "fastgen" else PROMPTS)
    assert "6 clips" in summary(out) and f"from {kind} (published)" in summary(out)
    if kind == "fastgen":
        noise, _, _ = reader.pairs(0, 6)
        assert sorted(noise[:, 0, 0, 0, 0].tolist()) == list(range(6))
    shutil.rmtree(tmp_path / "from")
    if convert:
        Reader(out).batch(0, 6)
    else:  # nothing was copied
        assert sum(path.stat().st_size for path in out.iterdir()) < 20_000
        with pytest.raises(ValueError) as error:
            Reader(out)
        says(error, "truncated or missing", "--from")


def test_the_merged_tars_of_rcm_and_the_older_prompt_column_are_read(tiny, tmp_path):
    """Members below a folder per clip are the same clips; so are rows with `prompt` for `caption`."""
    write_rcm(tmp_path / "a", tiny, below=True)
    published.take(tiny, tmp_path / "a", tmp_path / "out-a", **SIZE)
    reader = Reader(own(tiny, tmp_path / "own"))
    assert same(Reader(tmp_path / "out-a"), reader) and captions(tmp_path / "out-a", 2) == PROMPTS[:2]
    write_fastvideo(tmp_path / "b", tiny, caption="prompt")
    published.take(tiny, tmp_path / "b", tmp_path / "out-b", **SIZE)
    assert captions(tmp_path / "out-b", 9) == PROMPTS


@every_kind
def test_two_ranks_a_stop_and_more_files_give_the_same_index(tiny, tmp_path, kind):
    """Indexed by two ranks, or with a file that came later, the folder is that of one call; what is done is not read
    again; clips may grow by --clips and not shrink.
    """
    source = tmp_path / "from"
    WRITERS[kind](source, tiny)
    take = lambda out, **how: published.take(tiny, source, tmp_path / out, **SIZE, **how)
    assert take("one") == 6 and take("one") == 0
    assert [take("two", rank=rank, world=2) for rank in (1, 0)] == [3, 3]
    late = max(path for path in source.iterdir())
    late.rename(tmp_path / "late")
    assert take("grown") == 3
    (tmp_path / "late").rename(late)
    assert take("grown") == 3
    assert [take("clips", limit=n) for n in (2, 4)] == [2, 4]
    assert len(Reader(tmp_path / "clips")) == 4
    with pytest.raises(ValueError) as error:
        take("clips", limit=3)
    says(error, "--clips")
    assert take("clips") == 3  # the second file anew
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "grown")
    assert contents(tmp_path / "one") == contents(tmp_path / "clips")


@pytest.mark.parametrize("convert", [False, True])
def test_a_folder_that_is_half_made_is_not_trained_on(tiny, tmp_path, convert):
    """What one of two ranks has made, the other's part missing, is refused by the reader and is not complete."""
    write_rcm(tmp_path / "from", tiny)
    how = dict(world=2, convert=convert, shard_size=2, **SIZE)
    published.take(tiny, tmp_path / "from", tmp_path / "out", rank=0, **how)
    assert not shards.complete(tmp_path / "out")
    with pytest.raises(ValueError) as error:
        Reader(tmp_path / "out")
    says(error, "out is unfinished (2 of 6 clips" if convert else "out is unfinished (1 of 2 files", "`data`")
    published.take(tiny, tmp_path / "from", tmp_path / "out", rank=1, **how)
    assert shards.complete(tmp_path / "out") and len(Reader(tmp_path / "out")) == CLIPS


def test_captions_can_be_read_as_prompts(tiny, tmp_path, monkeypatch):
    """A published prompt with a control character, or not in UTF-8, is trained on by its text and not sampled."""
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", ["a\0b", "a \ufffd", *PROMPTS[2:]])
    write_rcm(tmp_path / "from", tiny)
    published.take(tiny, tmp_path / "from", tmp_path / "out", **SIZE)
    assert captions(tmp_path / "out", 2) == ["a dog", "a small cube"] and len(Reader(tmp_path / "out")) == CLIPS


def test_two_threads_open_a_tar_once(tmp_path, monkeypatch):
    """A preview reads beside the thread that reads ahead: neither closes the file under the other."""
    write_tar(tmp_path / "a.tar", {"a": b"1"})
    tar, opened, both = sources.Tar(tmp_path / "a.tar", "rcm"), [], threading.Barrier(2, timeout=0.3)

    def slowly(*args):
        with suppress(threading.BrokenBarrierError):
            both.wait()
        opened.append(args)
        return open(*args)

    monkeypatch.setattr(sources, "open", slowly, raising=False)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda _: tar.bytes([512, 1]), range(2))] == [b"1", b"1"]
    assert len(opened) == 1


def test_the_filter_counts_what_it_drops(tiny, tmp_path):
    """A clip with NaN, a still one and a text with inf are left out with their reasons, in place and converted."""
    found = clips()
    found[0][0][0, 0, 0, 0] = torch.nan
    found[5][1][0, 0] = torch.inf
    found[3] = (found[3][0][:, :1].expand(SHAPE).contiguous(), found[3][1])
    write_rcm(tmp_path / "from", tiny, found)
    for convert in (False, True):
        out = tmp_path / f"out{convert}"
        published.take(tiny, tmp_path / "from", out, convert=convert, **SIZE)
        assert len(Reader(out)) == 3
        assert "3 dropped (1 non-finite, 1 non-finite text, 1 static)" in summary(out)


def test_raw_and_normalised_are_told_apart(tiny, tmp_path):
    """Raw latents in tars are normalised too; a file of the other kind among the rest is named."""
    write_fastgen(tmp_path / "raw", tiny, raw(tiny))
    published.take(tiny, tmp_path / "raw", tmp_path / "out", **SIZE)
    assert same(Reader(tmp_path / "out"), Reader(own(tiny, tmp_path / "own", raw(tiny, back=True))))
    write_fastgen(tmp_path / "mixed", tiny, raw(tiny)[:3] + clips()[3:])
    for convert in (False, True):
        with pytest.raises(ValueError) as error:
            published.take(tiny, tmp_path / "mixed", tmp_path / f"mixed{convert}", convert=convert, **SIZE)
        says(error, "000001.tar", "look normalised")


def test_the_first_clips_alone_may_be_checked(tiny, tmp_path, monkeypatch):
    """With check "first" only these are read, the others have no checksum; a check of all comes later."""
    monkeypatch.setattr(published, "LOOKED_AT", 1)
    found = clips()
    found[1][0][0, 0, 0, 0] = torch.nan
    write_rcm(tmp_path / "from", tiny, found)
    out = tmp_path / "out"
    published.take(tiny, tmp_path / "from", out, check="first", **SIZE)
    with pytest.raises(ValueError) as error:
        Reader(out).batch(0, 6)
    says(error, "not finite", "the data are broken, not the training")
    published.take(tiny, tmp_path / "from", out, **SIZE)
    assert len(Reader(out)) == 5
    Reader(out).batch(0, 5)


# ---- What is wrong with a folder -------------------------------------------------------------------------------------


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def header(folder):
    """Where the header of the second tar's fourth member begins."""
    with tarfile.open(folder / "shard00001.tar") as tar:
        return tar.getmembers()[3].offset


def without(path, end):
    """The tar less its first member of that kind."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    members.pop(next(name for name in members if name.endswith(end)))
    write_tar(path, members)


BAD = {  # kind, what happens to its folder, words of the sentence
    "cut in a clip": ("rcm", lambda f, m: cut(f / "shard00001.tar", 9000), ("shard00001.tar", "truncated")),
    "cut between members": ("rcm", lambda f, m: cut(f / "shard00001.tar", -10240), ("shard00001.tar",)),
    "no tar": ("rcm", lambda f, m: (f / "shard00001.tar").write_bytes(b"x" * 3000), ("shard00001.tar", "no tar file")),
    "empty tar": ("rcm", lambda f, m: (f / "shard00000.tar").write_bytes(b""), ("shard00000.tar", "truncated")),
    "a damaged header": ("rcm", lambda f, m: flip(f / "shard00001.tar", header(f)), ("shard00001.tar", "damaged")),
    "no text": ("rcm", lambda f, m: without(f / "shard00001.tar", "embed.pt"), ("000000003.latent.pt without its",)),
    "no latent": ("rcm", lambda f, m: without(f / "shard00001.tar", "latent.pt"), ("000000003.embed.pt without its",)),
    "a tar of something": ("rcm", lambda f, m: write_tar(f / "z.tar", {"a.txt": b"1"}), ("z.tar", "no clip of rcm")),
    "a tar of another kind": ("rcm", lambda f, m: [write_fastgen(f / "z", m)], ("000000.tar", "no clip of rcm")),
    "whole numbers": ("rcm", lambda f, m: write_rcm(f, m, [(x.to(torch.int8), t) for x, t in clips()]),
                      ("no tensor", "TypeError")),
    "no pickle": ("rcm", lambda f, m: write_tar(f / "shard00001.tar", {"1.latent.pt": b"cos\nsystem\n(S'true'\ntR.",
                  "1.embed.pt": b"1"}), ("shard00001.tar", "no tensor")),
    "another shape": ("rcm", lambda f, m: write_rcm(f, m, [(x if i != 4 else x[:, :2], t) for i, (x, t)
                      in enumerate(clips())][:3] + [(x[:, :2], t) for x, t in clips()[3:]]), ("one shape a folder",)),
    "a wide text": ("rcm", lambda f, m: write_rcm(f, m, [(x, t[:, :8]) for x, t in clips()]), ("text of", "(512, 32)")),
    "noise of some": ("fastgen", lambda f, m: without(f / "000001.tar", "noise.pth"), ("without its noise",)),
    "LFS": ("rcm", lambda f, m: (f / "shard00000.tar").write_text("version https://git-lfs.github.com/spec/v1\n"),
            ("Git LFS", "hf download")),
    "two kinds": ("rcm", lambda f, m: write_fastvideo(f, m), ("rcm", "fastvideo", "--from-kind")),
    "neither kind": ("rcm", lambda f, m: [p.unlink() for p in f.iterdir()], ("no *.tar or *.parquet",)),
    "other tars": ("rcm", lambda f, m: [write_tar(p, {"a.txt": b"1"}) for p in f.iterdir()], ("no clip of rCM",)),
    "Parquet cut short": ("fastvideo", lambda f, m: cut(f / "data_1.parquet", -9), ("data_1.parquet", "truncated")),
    "Parquet without text": ("fastvideo", lambda f, m: write_fastvideo(f, m, text_embedding_shape=[]),
                             ("clip0 without its text_embedding",)),
    "Parquet of other columns": ("fastvideo", lambda f, m: write_fastvideo(f, m, vae_latent_shape="left out"),
                                 ("lacks the column vae_latent_shape",)),
    "Parquet of other bytes": ("fastvideo", lambda f, m: write_fastvideo(f, m, text_embedding_bytes=b"12345"),
                               ("text_embedding of 5 bytes",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_a_sentence(tiny, tmp_path, case):
    """Each names the file, or what to do."""
    kind, change, words = BAD[case]
    WRITERS[kind](tmp_path / "from", tiny)
    change(tmp_path / "from", tiny)
    with pytest.raises(ValueError) as error:
        published.take(tiny, tmp_path / "from", tmp_path / "out", **SIZE)
        Reader(tmp_path / "out")
    says(error, *words)


def test_settings_that_fit_the_clips_are_named(tiny, tmp_path):
    """Clips of another size than the settings say: which settings to give; a run of another size is refused later."""
    write_rcm(tmp_path / "from", tiny)
    with pytest.raises(ValueError) as error:
        published.take(tiny, tmp_path / "from", tmp_path / "out", frames=81, height=480, width=832)
    says(error, "(16, 3, 4, 6), not (16, 21, 60, 104)", "--frames 9 --height 32 --width 48")
    published.take(tiny, tmp_path / "from", tmp_path / "out", **SIZE)
    with pytest.raises(ValueError) as error:
        Reader(tmp_path / "out", size=(81, 480, 832))
    says(error, "9 frames of 32 x 48", "--frames 9 --height 32 --width 48")


@every_kind
def test_a_file_that_changes_or_goes_is_told(tiny, tmp_path, kind):
    """A flipped byte is found by the clip's checksum when it is read; a file that goes at the start, while reading and
    by `data`; one that is back, or moved with its folder, is taken again.
    """
    source, out = tmp_path / "from", tmp_path / "out"
    WRITERS[kind](source, tiny)
    published.take(tiny, source, out, **SIZE)
    path, reader = sorted(source.iterdir())[1], Reader(out)
    kept = path.read_bytes()
    flip(path, kept.index(b"data/0") + 3000 if kind != "fastvideo" else 300)
    with pytest.raises(ValueError) as error:
        Reader(out).batch(0, 6)
    says(error, path.name)
    path.unlink()
    for call in (lambda: reader.batch(0, 6), lambda: Reader(out), lambda: published.take(tiny, source, out, **SIZE)):
        with pytest.raises(ValueError) as error:
            call()
        says(error, path.name)
    path.write_bytes(kept)
    source.rename(tmp_path / "moved")
    assert published.take(tiny, tmp_path / "moved", out, **SIZE) == 0
    Reader(out).batch(0, 6)


DAMAGED = [  # file, what is written there by key, or None: the key is gone; words
    ("manifest.json", {"latent_shape": "x"}, "latent_shape"),
    ("manifest.json", {"kd": None}, "kd"),
    ("source.json", {"folder": 3}, "names no folder"),
    ("shard-shard00000.tar.json", {"mean": [[]]}, "mean"),
    ("shard-shard00000.tar.json", {"of": 1, "clips": [{"id": 0}]}, "places of its clips"),
    ("shard-shard00000.tar.json", {"of": 1, "clips": [{"id": 0, "latent": 3, "text": [0, 1, 2]}]}, "places of its"),
    ("shard-shard00000.tar.json", {"of": 1, "clips": [{"id": 0, "latent": [0, 10**12, 2], "text": [0, 1, 2]}]},
     "truncated"),
    ("shard-shard00000.tar.json", {"clips": []}, "unfinished (1 of 2 files are to be made)"),
    ("shard-shard00000.tar.json", {"dropped": [{"id": "x"}]}, "dropped"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, words", DAMAGED)
def test_a_damaged_index_is_a_sentence(tiny, tmp_path, name, changes, words):
    """Fields of another type, or gone, and places that cannot be."""
    write_rcm(tmp_path / "from", tiny)
    published.take(tiny, tmp_path / "from", tmp_path / "out", **SIZE)
    rewrite(tmp_path / "out" / name, **changes)
    with pytest.raises(ValueError) as error:
        Reader(tmp_path / "out").batch(0, 6)
    says(error, words)


def test_without_pyarrow_it_is_asked_for(tiny, tmp_path, monkeypatch):
    """A sentence, and only where Parquet files are read."""
    write_rcm(tmp_path / "from", tiny)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    published.take(tiny, tmp_path / "from", tmp_path / "out", **SIZE)
    with pytest.raises(RuntimeError) as error:
        published.take(tiny, tmp_path / "parquet", tmp_path / "out2", **SIZE)
    says(error, "pip install pyarrow")


# ---- The command -----------------------------------------------------------------------------------------------------


def command(*args) -> int:
    return run.main(["--preset", "tiny", *map(str, args)])


def published_command(tiny, *args) -> int:
    size = ("--height", 32, "--width", 48, "--model", tiny, "--global-batch", 2, "--micro-batch", 1)
    return command(*args, *size, "--preview-every", 0)


def test_a_training_on_published_clips_is_that_on_our_own_shards(tiny, tmp_path, capsys):
    """`data --from`, then stage 1: the student is that of a training on shards of the same clips, bit for bit; without
    --from the folder is taken as it is; a run of another clip size is refused.
    """
    write_rcm(tmp_path / "from", tiny)
    own(tiny, tmp_path / "own")
    few = ("--stage1-updates", 3, "--read-ahead")
    assert published_command(tiny, "data", "--from", tmp_path / "from", "--out", tmp_path / "a") == 0
    assert "6 clips in 2 files, read in place, 0 dropped" in capsys.readouterr().out
    assert published_command(tiny, "stage1", "--out", tmp_path / "a", *few, 3) == 0
    assert published_command(tiny, "stage1", "--out", tmp_path / "b", "--data", tmp_path / "own", *few, 0) == 0
    student = lambda out: load_file(tmp_path / out / "stage1" / "student.safetensors")
    assert all(torch.equal(x, student("b")[name]) for name, x in student("a").items())
    assert published_command(tiny, "data", "--out", tmp_path / "a") == 0
    assert "its clips are taken as they are" in capsys.readouterr().out
    assert command("stage2", "--model", tiny, "--out", tmp_path / "a", "--stage1-updates", 0) == 1
    assert "holds clips of 9 frames of 32 x 48, not of 9 frames of 64 x 64" in capsys.readouterr().err


@pytest.fixture
def ladder(tiny, monkeypatch):
    """Calls the whole ladder without training and sampling: [(step, prompts)]."""
    from wan_scale.sampling import sample
    from wan_scale.training import train

    def call(*args):
        steps = []
        for module, name in ((train, "stage1"), (train, "stage2"), (sample, "sample")):
            monkeypatch.setattr(module, name, lambda cfg, *_, name=name: steps.append((name, cfg.prompts)))
        monkeypatch.setattr(run, "evaluate", lambda *_: None)
        monkeypatch.setattr(sample, "planned", lambda cfg: steps.append(("planned", cfg.prompts)))
        size = ("--frames", 9, "--height", 32, "--width", 48, "--H", 2, "--taps", "1,2,3")
        more = ("--device", "cpu", "--sample-prompts", 2)
        status = run.main([str(arg) for arg in ("--model", tiny, *size, *more, *args)])
        return status, [step for step, _ in steps], {prompts for _, prompts in steps}

    return call


def test_the_ladder_samples_the_captions_of_its_clips(tiny, tmp_path, capsys, ladder):
    """With --from and no --prompts the first captions are sampled, from a file that is kept; clips without captions end
    in a sentence before any training; what was made is taken up again without --from.
    """
    write_rcm(tmp_path / "from", tiny)
    write_fastgen(tmp_path / "bare", tiny)
    out, file = tmp_path / "out", str(tmp_path / "out" / "captions.jsonl")
    for given in (("--from", tmp_path / "from"), ()):
        steps = ["planned", "stage1", "stage2", "sample", "sample"]
        assert ladder("--out", out, *given) == (0, steps, {file})
        assert [json.loads(line)["prompt"] for line in open(file, encoding="utf-8")] == PROMPTS[:2]
    capsys.readouterr()
    status, steps, _ = ladder("--out", tmp_path / "out2", "--from", tmp_path / "bare")
    assert (
        status == 1 and not steps and "have no prompts; give some to sample with --prompts" in capsys.readouterr().err
    )
    status, steps, _ = ladder("--out", tmp_path / "out3")
    assert status == 1 and not steps and "give --model and --prompts (or --from FOLDER)" in capsys.readouterr().err


def test_a_phase_that_was_stopped_keeps_its_clips(tiny, tmp_path, capsys, ladder):
    """While a phase is unfinished, files that came since are left out by the same command, or it could not go on; once
    it has ended they are taken. A folder of our own shards does not grow either.
    """
    write_rcm(tmp_path / "from", tiny)
    (tmp_path / "from" / "shard00001.tar").rename(tmp_path / "late")
    given = ("--out", tmp_path / "out", "--from", tmp_path / "from")
    assert ladder(*given)[0] == 0
    before = Reader(tmp_path / "out" / "data").identity
    (tmp_path / "late").rename(tmp_path / "from" / "shard00001.tar")
    state = tmp_path / "out" / "stage1" / "checkpoints" / "step-00000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    assert ladder(*given)[0] == 0 and Reader(tmp_path / "out" / "data").identity == before
    assert "stage1 was stopped midway" in capsys.readouterr().out
    (tmp_path / "out" / "stage1" / "student.json").touch()
    assert ladder(*given)[0] == 0 and len(Reader(tmp_path / "out" / "data")) == CLIPS
    held = contents(own(tiny, tmp_path / "own", n=3))
    own(tiny, tmp_path / "own", grow=False)
    assert contents(tmp_path / "own") == held


def test_prompts_that_were_not_given_are_the_captions(tiny, tmp_path, monkeypatch, capsys):
    """`sample` and `kd` after `data --from` take the first captions, more of them when more are asked for; a file that
    was edited stays.
    """
    from wan_scale.sampling import sample
    from wan_scale.training import train

    write_rcm(tmp_path / "from", tiny)
    published.take(tiny, tmp_path / "from", tmp_path / "out" / "data", **SIZE)
    asked = []
    monkeypatch.setattr(sample, "sample", lambda cfg, *_: asked.append(cfg.prompts))
    monkeypatch.setattr(run, "make_data", lambda cfg, kd=False: asked.append(cfg.prompts))
    monkeypatch.setattr(train, "kd", lambda cfg: None)

    def call(*args):
        size = ("--frames", 9, "--height", 32, "--width", 48, "--H", 2, "--taps", "1,2,3", "--device", "cpu")
        given = ("--model", tiny, "--out", tmp_path / "out", "--skip-layer", 1, *size, *args)
        assert run.main([str(arg) for arg in given]) == 0
        return [json.loads(line)["prompt"] for line in open(asked.pop(), encoding="utf-8")]

    assert call("sample", "--sample-prompts", 1) == PROMPTS[:1]
    assert call("sample", "--sample-prompts", 4) == PROMPTS[:4]
    (tmp_path / "out" / "captions.jsonl").write_text('{"prompt": "mine"}\n')
    assert call("sample", "--sample-prompts", 2) == ["mine"]
    assert call("kd", "--kd-clips", 5) == PROMPTS[:5] and call("kd", "--kd-clips", 0) == PROMPTS


def test_the_ladder_takes_shards_of_another_model(tiny, tmp_path, capsys, ladder):
    """Shards that another transformer made, named by --data, are trained on as they are, if they are complete."""
    other = own(tiny, tmp_path / "own")
    digest = lambda: shards.manifest_digest(json.loads((other / "manifest.json").read_text()))
    rewrite(other / "manifest.json", transformer="another")
    for path in other.glob("shard-*.json"):
        rewrite(path, manifest=digest())
    (tmp_path / "p.txt").write_text("a cat")
    given = ("--out", tmp_path / "out", "--data", other, "--prompts", tmp_path / "p.txt")
    before = contents(other)
    assert ladder(*given)[1] == ["planned", "stage1", "stage2", "sample", "sample"]
    assert "its clips are taken as they are" in capsys.readouterr().out and contents(other) == before
    (other / "shard-00001.json").unlink()
    assert ladder(*given)[:2] == (1, ["planned"]) and "is unfinished" in capsys.readouterr().err
