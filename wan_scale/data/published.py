"""Published clips as a data folder: indexed where they lie, or rewritten into our own shards.

    out/manifest.json         as of any data folder; `format` says how the clips lie in their files, `stored` whether
                              their latents are raw (and are normalised on reading)
    out/source.json           where the files are, how many clips are wanted of each; `data --from` renews it
    out/negative.safetensors  embedding of the negative prompt, by the model folder's own text encoder
    out/shard-<file>.json     sidecar of one published file: its clips with the places and checksums of their tensors,
                              dropped clips with reason, mean and std by channel

A file is read once for its sidecar, by one rank; sidecars that are finished are not made again, so more files may come.
Converted, the clips are ordinary shards (shards.py), and the published files may go.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from wan_scale.data.checks import Dropped, broken, channel_statistics, look_raw, pooled_statistics
from wan_scale.data.files import read_json, write_json
from wan_scale.data.folders import check_folder
from wan_scale.data.manifest import make_manifest, manifest_digest, open_out
from wan_scale.data.shards import fill
from wan_scale.data.sidecars import read_sidecar
from wan_scale.data.sources import COPY, ready, source, source_files
from wan_scale.data.text import encode_text

LOOKED_AT = 16  # clips of the first file that tell raw latents from normalised ones; clips of a file with check "first"


def take(folder, published, out, *, kind="", convert=False, check="all", rank=0, world=1, frames=81, height=480,
         width=832, shard_size=64, limit=None, device="cpu", grow=True) -> int:  # fmt: skip
    """Make `out` a data folder of the clips in `published`; returns how many clips were read now.

    kind: one of sources.KINDS, if it cannot be seen. convert: rewrite them as our shards. check "all" reads every clip
    once: the filter, and a checksum that each later reading compares; "first" reads LOOKED_AT clips of each file.
    limit: only the first clips. Without `grow`, files and clips that came later are left out. Raises ValueError or
    RuntimeError in one sentence: a file cut short, a clip without its text, another shape than frames, height and width
    give.
    """
    folder, (kind, files) = check_folder(folder), source_files(published, kind)
    first = source(files[0], kind)
    clips = first.scan()[:LOOKED_AT]
    if not clips:
        raise ValueError(f"{files[0]} holds no clip; {COPY}.")
    stored = {"shard_size": shard_size} if convert else {"format": kind}
    # the text encoder and VAE of all Wan2.1 folders are the same, and the transformer did not make these clips
    none = {"transformer": None, "text_encoder": None}
    manifest = make_manifest(folder, "published", frames, height, width, **none, source=kind,
                             kd=all("noise" in clip for clip in clips), **stored)  # fmt: skip
    manifest["model"] = kind
    check_shape(first, clips[0], manifest)
    manifest["stored"] = "raw" if raw(head(first, clips, manifest), manifest) else "normalised"
    if rank == 0:
        told = "raw, normalised on reading" if manifest["stored"] == "raw" else "normalised"
        print(f"{published}: {len(files)} files of {kind}, latents {told}", flush=True)
    if convert:
        return converted(folder, files, out, manifest, limit, rank=rank, world=world, device=device, grow=grow)

    out = open_out(out, manifest)
    names = {name_of(path, published): path for path in files}
    before = None if grow else read_source(out).get("files")
    if before:
        names = {name: path for name, path in names.items() if name in before}
    strangers = {path.name for path in out.glob("shard-*.json")} - {sidecar_of(out, name).name for name in names}
    if strangers:
        gone = f"{out / min(strangers)} is the index of a file that {published} does not hold"
        raise ValueError(f"{gone}; bring the file back, or delete its index.")
    wanted = {path: before[name] for name, path in names.items()} if before else shares(files, kind, limit)
    if rank == 0:
        whole = {name: wanted.get(path) for name, path in names.items()}  # None: all clips of a file
        write_json(out / "source.json", {"folder": str(Path(published).resolve()), "files": whole})
        texts = {out / "negative.safetensors": {"negative": manifest["negative_prompt"]}}
        encode_text(folder, texts, device=device, max_length=manifest["text_length"], progress=False)
    digest, read = manifest_digest(manifest), 0
    mine = list(names.items())[rank::world]
    for name, path in tqdm(mine, desc="files", disable=None if rank == 0 else True, mininterval=0.5):
        n = wanted.get(path)
        if not indexed(out, name, path, digest, n, check):
            sidecar = index(path, name, manifest, n, check)
            write_json(sidecar_of(out, name), sidecar)
            read += len(sidecar["clips"]) + len(sidecar["dropped"])
    return read


def read_source(out: Path) -> dict:
    """source.json of a folder: {"folder", "files": {name: clips wanted, None for all}}; {} before it is there."""
    path = out / "source.json"
    return read_json(path) if path.exists() else {}


def name_of(path: Path, published) -> str:
    """A published file below its folder, as sidecars name it."""
    return path.relative_to(published).as_posix()


def sidecar_of(out: Path, name: str) -> Path:
    return out / f"shard-{name.replace('/', '--')}.json"


def head(file, clips: list[dict], manifest: dict) -> list[dict]:
    """Statistics of the latents of `clips`, of those that are finite and of the manifest's shape."""
    shape, found = tuple(manifest["latent_shape"]), (file.read("latent", clip["latent"])[0] for clip in clips)
    return [channel_statistics(x) | {"clips": [0]} for x in found if tuple(x.shape) == shape and x.isfinite().all()]


def check_stored(path: Path, statistics: list[dict], manifest: dict) -> None:
    """ValueError if the clips of a file are raw and those of the first file normalised, or the other way round."""
    if statistics and raw(statistics, manifest) != (manifest["stored"] == "raw"):
        other = "normalised" if manifest["stored"] == "raw" else "raw"
        raise ValueError(
            f"{path} holds latents that look {other}, those of the first file do not; keep one kind a folder."
        )


def raw(statistics: list[dict], manifest: dict) -> bool:
    """Whether latents with these statistics by clip are raw."""
    return bool(statistics) and look_raw(*pooled_statistics(statistics), manifest["vae_mean"], manifest["vae_std"])


def check_shape(first, clip: dict, manifest: dict) -> None:
    """ValueError with the settings that fit, if the first clip has another shape than the manifest's."""
    shape, wanted = tuple(first.read("latent", clip["latent"])[0].shape), tuple(manifest["latent_shape"])
    if shape != wanted:
        other = f"{first.path} holds latents of {shape}, not {wanted}"
        if len(shape) != 4 or shape[0] != wanted[0]:
            raise ValueError(f"{other}; give clips of Wan2.1's VAE, (C, T, H, W).")
        space = manifest["height"] // wanted[2]
        fits = f"--frames {4 * shape[1] - 3} --height {space * shape[2]} --width {space * shape[3]}"
        raise ValueError(f"{other}; give {fits}, or other clips.")


def shares(files: list[Path], kind: str, limit: int | None) -> dict[Path, int]:
    """How many clips to take of each file, where not all are wanted."""
    found = {}
    for path in files if limit else ():
        found[path] = min(limit, len(source(path, kind).scan())) if limit else 0
        limit -= found[path]
    return found


def indexed(out: Path, name: str, path: Path, digest: str, n: int | None, check: str) -> bool:
    """Whether a file has its sidecar, of its present size and of the n clips wanted; ValueError if it has more."""
    if not sidecar_of(out, name).exists():
        return n == 0
    sidecar = read_sidecar(sidecar_of(out, name))
    same = sidecar.get("manifest") == digest and sidecar.get("bytes") == path.stat().st_size
    if not same or (check == "all" and sidecar.get("check") != "all"):
        return False
    has = len(sidecar["clips"]) + len(sidecar["dropped"])
    if n is not None and has > n:
        raise ValueError(f"{out} holds more clips than asked for; give --clips as before, or another folder.")
    return has == (sidecar.get("of") if n is None else n)


def index(path: Path, name: str, manifest: dict, n: int | None, check: str) -> dict:
    """The sidecar of a published file: every clip's places and checksums, those dropped with reason, statistics."""
    file, clips, dropped, statistics, as_stored = source(path, manifest["format"]), [], [], [], []
    size, there = path.stat().st_size, file.scan()
    parts = ("latent", "text", "noise") if manifest["kd"] else ("latent", "text")
    for i, clip in enumerate(there[:n]):
        if lacking := [part for part in parts if part not in clip]:
            raise ValueError(f"{path} holds {clip['key']} without its {lacking[0]}, which others have; {COPY}.")
        entry = {"id": i, "key": clip["key"], "prompt": clip["prompt"]}
        if check == "first" and i >= LOOKED_AT and statistics:
            clips.append(entry | {part: [*clip[part], None] for part in parts})
            continue
        tensors = {}
        for part in parts:
            x, crc = file.read(part, clip[part])
            tensors[part] = ready(x, part, manifest, f"{path} (clip {clip['key']})")
            if part == "latent" and x.isfinite().all():
                as_stored.append(channel_statistics(x) | {"clips": [i]})
            entry[part] = [*clip[part], crc]
        if reason := broken(tensors["latent"]) or (None if tensors["text"].isfinite().all() else "non-finite text"):
            dropped.append({"id": i, "key": clip["key"], "prompt": clip["prompt"], "reason": reason})
            continue
        statistics.append(channel_statistics(tensors["latent"]) | {"clips": [i]})
        clips.append(entry | {"tokens": len(tensors["text"])})
    check_stored(path, as_stored, manifest)
    mean, std = pooled_statistics(statistics) if statistics else ([], [])
    told = json.dumps([name, size, clips, dropped]).encode()
    return dict(file=name, sha256=hashlib.sha256(told).hexdigest(), bytes=size, of=len(there), check=check,
                manifest=manifest_digest(manifest), latent_shape=manifest["latent_shape"],
                mean=torch.as_tensor(mean).tolist(), std=torch.as_tensor(std).tolist(), clips=clips,
                dropped=dropped)  # fmt: skip


def converted(folder, files: list[Path], out, manifest: dict, limit: int | None, **where) -> int:
    """Rewrite the clips into our own shards, as if `data` had made them."""
    kind = manifest["source"]
    opened = lru_cache(maxsize=2)(lambda path: source(path, kind))  # a shard's clips lie in one file or two
    records, places, seen = [], [], set()
    for path in files:
        for clip in source(path, kind).scan() if not limit or len(records) < limit else ():
            records.append({"prompt": clip["prompt"], "key": clip["key"], "file": path.name})
            places.append((path, clip))
    records = [{**record, "place": i} for i, record in enumerate(records[:limit])]

    def read(record: dict, part: str):
        path, clip = places[record["place"]]
        if path not in seen:
            check_stored(path, head(opened(path), [clip], manifest), manifest)
            seen.add(path)
        if part not in clip:
            raise ValueError(f"{path} holds {clip['key']} without its {part}, which others have; {COPY}.")
        return ready(opened(path).read(part, clip[part])[0], part, manifest, f"{path} (clip {clip['key']})")

    parts = ("latent", "noise") if manifest["kd"] else ("latent",)

    def make(record, text):
        if not text.isfinite().all():
            raise Dropped("non-finite text")
        return {part: read(record, part) for part in parts}

    return fill(folder, out, manifest, records, lambda: make, text_of=lambda record: read(record, "text"), **where)
