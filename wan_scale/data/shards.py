"""Training data: a teacher's latents (or encoded videos) and text embeddings, as safetensors shards with checksums.

    out/manifest.json              what every clip in the folder was made with; another one is refused
    out/negative.safetensors       `negative` (n, text_dim): embedding of the negative prompt
    out/shard-00000.safetensors    latent.<id> (C, T, H, W) fp16, text.<id> (n, text_dim) bf16 without padding,
                                   with kd noise.<id> fp32
    out/shard-00000.json           sidecar: sha256, size, clips (id, prompt, seed), dropped clips with reason,
                                   mean and std by channel
    out/parts/00000/               the finished parts of an unfinished shard: text.safetensors, clip-<id>.safetensors

A clip's id is its index in the prompt file. Shard k holds the ids from k * shard_size on and belongs to rank k % world.
Every file appears whole or not at all, a sidecar after its shard, and parts go last. So a kill at any moment costs the
clip in flight, and the same command goes on from there, also on another number of ranks.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from wan_scale.data.checks import Dropped, broken, channel_statistics, pooled_statistics
from wan_scale.data.files import HashedFile, atomic, file_sha256, write_json, write_safetensors
from wan_scale.data.folders import free_memory
from wan_scale.data.manifest import manifest_digest, open_out
from wan_scale.data.prompts import UNREADABLE
from wan_scale.data.sidecars import lacking, read_manifest, read_sidecar, read_sidecars
from wan_scale.data.text import encode_text, pad_text

DTYPES = {"latent": ("F16", torch.float16), "text": ("BF16", torch.bfloat16), "noise": ("F32", torch.float32)}


def whole(out: Path, k: int) -> dict | None:
    """The sidecar of shard k, if the shard is there in its full size."""
    sidecar, shard = out / f"shard-{k:05d}.json", out / f"shard-{k:05d}.safetensors"
    found = read_sidecar(sidecar) if sidecar.exists() and shard.exists() else {}
    return found if found.get("bytes") == (shard.stat().st_size if found else 0) else None


def finished(out: Path, k: int, clips: int) -> bool:
    """Whether shard k holds all its `clips`, those dropped included."""
    found = whole(out, k)
    return bool(found) and len(found["clips"]) + len(found["dropped"]) == clips


def check_disk(out: Path, manifest: dict, records: list[dict], world: int) -> None:
    """RuntimeError unless the disk has room for all clips that all ranks still make, and the parts of their shards."""
    size, latent = manifest["shard_size"], torch.Size(manifest["latent_shape"]).numel()

    def clip_bytes(record):  # English takes about four bytes a token, so three leave some room
        length = manifest["text_length"]
        tokens = min(length, len(record["prompt"].encode()) // 3 + 2) if record["prompt"] else length
        return latent * (6 if manifest["kd"] else 2) + tokens * manifest["text_dim"] * 2

    shards = [records[i : i + size] for i in range(0, len(records), size)]
    need = [sum(map(clip_bytes, shard)) for k, shard in enumerate(shards) if not finished(out, k, len(shard))]
    needed = sum(need) + sum(sorted(need)[-world:])  # a shard being packed lies there twice
    for path in out.glob("parts/*/*.safetensors"):  # of a run that was stopped
        with suppress(FileNotFoundError):  # or of another rank, which may just pack it
            needed -= path.stat().st_size
    there = out
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        gb = f"about {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free"
        raise RuntimeError(f"{out} has too little disk: {gb}; free some, or give a folder on another disk.")


def fill(folder: Path, out: str | Path, manifest: dict, records: list[dict], load, *, rank: int, world: int,
         device, text_of=None, grow=True) -> int:  # fmt: skip
    """Make this rank's unfinished shards; returns the number of clips made.

    load() -> make(record, text (text_length, text_dim)) -> {"latent": x, "noise": x_1}. `load` is called after the text
    encoder is gone; `make` may raise Dropped. text_of(record) -> (n, text_dim): a text that needs no text encoder.
    Shards of fewer clips than now asked for get the others, and keep what they have; without `grow` none are added.
    """
    if not grow and (Path(out) / "manifest.json").exists():
        records = records[: read_manifest(out)["prompts"]]
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks; give 0 <= rank < world.")
    size = manifest["shard_size"]
    if size < 1:
        raise ValueError(f"shard_size is {size}; give at least 1.")
    check_disk(Path(out), manifest, records, world)
    out = open_out(out, manifest, records)
    ids_of = lambda k: range(k * size, min((k + 1) * size, len(records)))
    shards = {k: ids_of(k) for k in range(rank, -(-len(records) // size), world)}
    texts = {out / "negative.safetensors": {"negative": manifest["negative_prompt"]}}
    for k in list(shards):
        folder_k = out / "parts" / f"{k:05d}"
        if finished(out, k, len(shards[k])):
            shutil.rmtree(folder_k, ignore_errors=True)  # a kill may have come between the sidecar and this
            del shards[k]
            continue
        folder_k.mkdir(parents=True, exist_ok=True)
        for stale in folder_k.glob("*.tmp"):
            stale.unlink()
        unpack(out, k, shards[k])
        if not text_of:
            texts[folder_k / "text.safetensors"] = {str(i): records[i]["prompt"] for i in shards[k]}
    encode_text(folder, texts, device=device, max_length=manifest["text_length"], progress=rank == 0)

    made, make = 0, None
    clips, quiet = sum(map(len, shards.values())), None if rank == 0 else True
    with tqdm(total=clips, desc="clips", disable=quiet, mininterval=0.5) as bar:
        for k, ids in shards.items():
            folder_k = out / "parts" / f"{k:05d}"
            if text_of and not (folder_k / "text.safetensors").exists():
                with atomic(folder_k / "text.safetensors") as file:
                    file.write(save({str(i): text_of(records[i]).to(torch.bfloat16) for i in ids}))
            for i in ids:
                part = folder_k / f"clip-{i}.safetensors"
                if not part.exists():
                    make = make or load()
                    with safe_open(folder_k / "text.safetensors", "pt") as file:
                        text = pad_text(file.get_tensor(str(i)), manifest["text_length"])
                    try:
                        tensors = make(records[i], text)
                        reason = broken(tensors["latent"])
                    except Dropped as e:
                        reason = str(e)
                    write_part(part, {} if reason else tensors, reason)
                    made += 1
                bar.update()
            pack(out, k, ids, manifest, records)
    del make
    free_memory()
    return made


def write_part(part: Path, tensors: dict, reason: str | None) -> None:
    """A finished clip, or why it was dropped."""
    kept = {key: x.to(DTYPES[key][1]).contiguous() for key, x in tensors.items()}
    with atomic(part) as file:
        file.write(save(kept, {"dropped": reason} if reason else None))


def unpack(out: Path, k: int, ids: range) -> None:
    """Parts of shard k from the shard itself, where it is whole but of fewer clips than `ids`; its text is made anew.

    The shard stays until the larger one takes its place.
    """
    folder_k, found = out / "parts" / f"{k:05d}", whole(out, k)
    if found and file_sha256(out / found["file"]) != found["sha256"]:
        found = None  # damaged: its clips are made again
    text = folder_k / "text.safetensors"
    if text.exists():
        with safe_open(text, "pt") as file:
            if set(file.keys()) != {str(i) for i in ids}:
                text.unlink()  # a stopped run was asked for fewer
    if not found:
        return
    with safe_open(out / found["file"], "pt") as shard:
        names = set(shard.keys())
        for clip in (*found["clips"], *found["dropped"]):
            i, part = clip["id"], folder_k / f"clip-{clip['id']}.safetensors"
            if not part.exists():
                kept = {key: shard.get_tensor(f"{key}.{i}") for key in ("latent", "noise") if f"{key}.{i}" in names}
                write_part(part, kept, clip.get("reason"))


def pack(out: Path, k: int, ids: range, manifest: dict, records: list[dict]) -> None:
    """Join the parts of shard k into its file, then write its sidecar, then remove the parts.

    One tensor is in memory at a time.
    """
    folder_k, shard = out / "parts" / f"{k:05d}", out / f"shard-{k:05d}.safetensors"
    handles = {"text": safe_open(folder_k / "text.safetensors", "pt")}
    clips, dropped, entries, statistics = [], [], [], []
    for i in ids:
        with safe_open(folder_k / f"clip-{i}.safetensors", "pt") as part:
            reason, names = (part.metadata() or {}).get("dropped"), sorted(part.keys())
        if reason:
            dropped.append({"id": i, **records[i], "reason": reason})
            continue
        shape = handles["text"].get_slice(str(i)).get_shape()
        clips.append({"id": i, **records[i], "tokens": shape[0]})
        entries += [(f"{name}.{i}", *DTYPES[name], manifest["latent_shape"]) for name in names]
        entries += [(f"text.{i}", *DTYPES["text"], shape)]

    def load(name):
        name, i = name.split(".")
        if name == "text":
            return handles["text"].get_tensor(i)
        with safe_open(folder_k / f"clip-{i}.safetensors", "pt") as part:
            x = part.get_tensor(name)
        if name == "latent":
            statistics.append({"clips": [i], **channel_statistics(x)})
        return x

    with atomic(shard, folder_k / "shard.tmp") as file:
        hashed = HashedFile(file)
        write_safetensors(hashed, entries, load)
    mean, std = pooled_statistics(statistics) if statistics else (torch.zeros(0), torch.zeros(0))
    sidecar = dict(file=shard.name, sha256=hashed.digest.hexdigest(), bytes=hashed.size,
                   manifest=manifest_digest(manifest), latent_shape=manifest["latent_shape"], mean=mean.tolist(),
                   std=std.tolist(), clips=clips, dropped=dropped)  # fmt: skip
    write_json(out / f"shard-{k:05d}.json", sidecar)
    shutil.rmtree(folder_k)


def complete(out: Path) -> bool:
    """Whether every shard of the manifest is finished; of published clips, whether every file is indexed."""
    manifest = read_manifest(out)
    if "format" in manifest:
        return bool(sidecars := read_sidecars(out)) and not lacking(out, manifest, sidecars)
    n, size = manifest["prompts"], manifest["shard_size"]
    return all(finished(out, k, min(size, n - k * size)) for k in range(-(-n // size)))


def captions(out: str | Path, n: int) -> list[str]:
    """The first n different prompts of a folder's clips, less those that no prompt file may hold."""
    found = {clip.get("prompt", ""): 0 for sidecar in read_sidecars(out) for clip in sidecar["clips"]}
    return [prompt for prompt in found if prompt and not UNREADABLE.search(prompt)][:n]


def summary(out: str | Path) -> str:
    """A folder's clips, what was dropped and why, its size and the statistics by channel, in a few lines."""
    out = Path(out)
    manifest, sidecars = read_manifest(out), read_sidecars(out)
    clips, reasons = sum(len(sidecar["clips"]) for sidecar in sidecars), {}
    for sidecar in sidecars:
        for clip in sidecar["dropped"]:
            reasons[clip["reason"]] = reasons.get(clip["reason"], 0) + 1
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    dropped = f"{sum(reasons.values())} dropped" + f" ({why})" * bool(why)
    if "format" in manifest:
        where = f"{clips} clips in {len(sidecars)} files, read in place"
    else:
        shards = -(-manifest["prompts"] // manifest["shard_size"])
        where = f"{clips} clips of {manifest['prompts']} in {len(sidecars)} of {shards} shards"
    shape = " x ".join(map(str, manifest["latent_shape"]))
    gb = sum(sidecar["bytes"] for sidecar in sidecars) / 1e9
    lines = [
        f"{out.name}: {where}, {dropped}, {gb:.3g} GB",
        f"latents {shape} from {manifest['model']} ({manifest['kind']}), normalised by the VAE",
    ]
    if clips:
        mean, std = pooled_statistics(sidecars)
        told = lambda values: " ".join(f"{v:.2f}" for v in values)
        lines += [f"mean by channel: {told(mean)}", f"std by channel: {told(std)}"]
    return "\n".join(lines)
