"""Training data: a teacher's latents (or encoded videos) and text embeddings, as safetensors shards with checksums.

    out/manifest.json              what every clip in the folder was made with; another one is refused
    out/negative.safetensors       `negative` (n, text_dim): embedding of the negative prompt
    out/shard-00000.safetensors    latent.<id> (C, T, H, W) fp16, text.<id> (n, text_dim) bf16 without padding, noise.<id> fp32 with kd
    out/shard-00000.json           sidecar: sha256, size, clips (id, prompt, seed), dropped ones with reason, mean and std by channel
    out/parts/00000/               what is done of a shard that is not finished: text.safetensors, clip-<id>.safetensors

A clip's id is its index in the prompt file; shard k holds the ids from k * shard_size on and belongs to rank k % world. Every file appears
whole or not at all, a sidecar after its shard, and parts go last: a kill at any moment costs the clip in flight, and the same command
(also on another number of ranks) goes on from there.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import tmd_minimal as tmd
from wan_scale.data.prompts import NEGATIVE, read_prompts
from wan_scale.data.reader import LABELS, manifest_digest, pad_text, pooled_statistics, read_json

# diffusers and transformers are imported where a model is loaded: checking, counting and summing up must not wait for them

# A clip outside these is broken. Latents of a real clip have a standard deviation near 1 in most channels and a few percent to
# a hundred percent of change from one latent frame to the next.
HOT = 3.0  # standard deviation above this in half of the channels: guidance has blown up
FLAT = 0.1  # below this in half of the channels: one colour
STATIC = 0.02  # root mean square change between latent frames, relative to the clip's own spread: a still image
TEXT_BATCH = 8  # prompts encoded at once

# ---- A model folder ---------------------------------------------------------------------------------------------------

PARTS = {  # part of a Wan2.1 folder: (its config, its weights)
    "tokenizer": ("tokenizer_config.json", None),
    "text_encoder": ("config.json", "model.safetensors"),
    "transformer": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "scheduler": ("scheduler_config.json", None),
}


def check_folder(folder: str | Path, parts=tuple(PARTS)) -> Path:
    """The folder's path, if it is a diffusers Wan2.1 folder and `parts` of it are whole; else ValueError naming the first bad file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a Wan2.1 checkpoint folder in diffusers' layout.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} lacks model_index.json; give a folder in diffusers' layout (Wan2.1-T2V-...-Diffusers).")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "WanPipeline" or (index.get("transformer_2") or [None])[0]:
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')} that is not Wan2.1 text-to-video; give a WanPipeline of one transformer."
        )
    for part in parts:
        config, weights = PARTS[part]
        if not (folder / part / config).is_file():
            raise ValueError(f"{folder} lacks {part}/{config}; copy the missing file.")
        if part == "tokenizer" and not any((folder / part / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise ValueError(f"{folder} lacks {part}/tokenizer.json or spiece.model; copy the missing file.")
        for path in weight_files(folder, part) if weights else ():
            if not path.is_file():
                raise ValueError(f"{folder} lacks {part}/{path.name}; copy the missing file.")
            try:
                safe_open(path, "pt")  # reads the header and compares it with the size
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{folder / part / path.name} is truncated or not safetensors ({type(e).__name__}); copy it again.") from e
    return folder


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part, whether one or split under an index."""
    name = PARTS[part][1]
    index = folder / part / f"{name}.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
    return [folder / part / name for name in names]


def fingerprint(folder: Path, part: str) -> str:
    """sha256 of a part's config and the end of each weight file: tells two fine-tunings apart without reading the weights."""
    digest = hashlib.sha256((folder / part / PARTS[part][0]).read_bytes())
    for path in weight_files(folder, part):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def free_memory() -> None:
    """Give back what a model held; call it after dropping the last reference."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path, temporary: Path | None = None):
    """A binary file to write; it appears as `path` whole, when the block has ended."""
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


class HashedFile:
    """Counts and hashes what is written to a file, so that a shard is written once and never read back."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def write_safetensors(file, entries: list, load) -> None:
    """Write tensors one after another, holding one at a time; entries are (name, dtype name, dtype, shape), load(name) -> tensor."""
    header, end = {}, 0
    for name, code, dtype, shape in entries:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name, _, dtype, shape in entries:
        tensor = load(name)
        if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
            raise RuntimeError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}; delete out/parts and run again."
            )
        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def encode_text(
    folder: str | Path, files: dict[Path, dict[str, str]], *, device="cpu", max_length: int = 512, progress: bool = True
) -> None:
    """Embed prompts with the folder's text encoder: {path: {key: prompt}} -> one safetensors file a path, key -> (n, text_dim) bf16.

    Cleaning, tokens and truncation are the stock pipeline's; its zero padding is left out (pad_text puts it back). A file that exists
    is not made again. Only tokenizer and text encoder are loaded, and freed before this returns.
    """
    files = {path: texts for path, texts in files.items() if not path.exists()}
    if not files:
        return
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = check_folder(folder, ("tokenizer", "text_encoder"))
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, local_files_only=True).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None, transformer=None)
    with (
        tqdm(total=sum(map(len, files.values())), desc="text", disable=None if progress else True, mininterval=0.5) as bar,
        torch.no_grad(),
    ):
        for path, texts in files.items():
            keys, embedded = list(texts), {}
            for i in range(0, len(keys), TEXT_BATCH):
                batch = keys[i : i + TEXT_BATCH]
                prompts = [texts[key] for key in batch]
                padded, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=max_length, device=device)
                for key, rows in zip(batch, padded.to("cpu", torch.bfloat16)):
                    true = rows.ne(0).any(1).nonzero()  # padding is exactly zero
                    embedded[key] = rows[: int(true.max()) + 1 if len(true) else 1].clone()
                bar.update(len(batch))
            with atomic(path) as file:
                file.write(save(embedded))
    del pipe, encoder, tokenizer
    free_memory()


# ---- Clips to shards -------------------------------------------------------------------------------------------------

DTYPES = {"latent": ("F16", torch.float16), "text": ("BF16", torch.bfloat16), "noise": ("F32", torch.float32)}


class Dropped(Exception):
    """This clip cannot be used; the message is the reason that the sidecar counts."""


def broken(x: torch.Tensor) -> str | None:
    """Why a normalised latent x (C, T, H, W) is no good clip: non-finite, hot, flat or static; None if it is good."""
    x = x.float()
    if not bool(torch.isfinite(x.half()).all()):
        return "non-finite"
    std = x.flatten(1).std(1)
    if std.median() > HOT:
        return "hot"
    if std.median() < FLAT:
        return "flat"
    # the first latent frame stands for one frame, the others for four each: it may differ from them even when nothing moves
    moving = x[:, 1:] if x.shape[1] > 2 else x
    if moving.shape[1] > 1:
        change = moving.diff(dim=1).square().mean().sqrt()
        if change < STATIC * (x - x.mean((1, 2, 3), keepdim=True)).square().mean().sqrt():
            return "static"
    return None


def open_out(out: str | Path, manifest: dict) -> Path:
    """Make the folder and its manifest; ValueError naming what differs if it holds another."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    if path.exists():
        old = read_json(path)
        differs = sorted(key for key in {*old, *manifest} - LABELS if old.get(key) != manifest.get(key))
        if differs:
            told = ", ".join(f"{key} ({str(old.get(key))[:40]}, now {str(manifest.get(key))[:40]})" for key in differs)
            raise ValueError(f"{out} was made with another {told}; give the same settings or another folder.")
    else:
        write_json(path, manifest)
    return out


def finished(out: Path, k: int) -> bool:
    """Whether shard k has its sidecar and its full size."""
    sidecar, shard = out / f"shard-{k:05d}.json", out / f"shard-{k:05d}.safetensors"
    return sidecar.exists() and shard.exists() and shard.stat().st_size == read_json(sidecar).get("bytes")


def check_disk(out: Path, manifest: dict, records: list[dict], world: int) -> None:
    """RuntimeError unless the disk has room for all clips still to be made, by all ranks, and the parts of the shards in work."""
    size, latent = manifest["shard_size"], torch.Size(manifest["latent_shape"]).numel()

    def clip_bytes(record):  # English takes about four bytes a token, so three leave some room
        tokens = min(manifest["text_length"], len(record["prompt"].encode()) // 3 + 2)
        return latent * (6 if manifest["kd"] else 2) + tokens * manifest["text_dim"] * 2

    todo = [k for k in range(-(-len(records) // size)) if not finished(out, k)]
    need = [sum(clip_bytes(record) for record in records[k * size : (k + 1) * size]) for k in todo]
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


def fill(folder: Path, out: str | Path, manifest: dict, records: list[dict], load, *, rank: int, world: int, device) -> int:
    """Make this rank's unfinished shards; load() -> make(record, text (text_length, text_dim)) -> {"latent": x, "noise": x_1}.

    `make` may raise Dropped. `load` is called after the text encoder is gone. Returns the number of clips this call made.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks; give 0 <= rank < world.")
    size = manifest["shard_size"]
    if size < 1:
        raise ValueError(f"shard_size is {size}; give at least 1.")
    check_disk(Path(out), manifest, records, world)
    out = open_out(out, manifest)
    shards = {k: range(k * size, min((k + 1) * size, len(records))) for k in range(rank, -(-len(records) // size), world)}
    texts = {out / "negative.safetensors": {"negative": manifest["negative_prompt"]}}
    for k in list(shards):
        folder_k = out / "parts" / f"{k:05d}"
        if finished(out, k):
            shutil.rmtree(folder_k, ignore_errors=True)  # a kill may have come between the sidecar and this
            del shards[k]
            continue
        folder_k.mkdir(parents=True, exist_ok=True)
        for stale in folder_k.glob("*.tmp"):
            stale.unlink()
        texts[folder_k / "text.safetensors"] = {str(i): records[i]["prompt"] for i in shards[k]}
    encode_text(folder, texts, device=device, max_length=manifest["text_length"], progress=rank == 0)

    made, make = 0, None
    with tqdm(total=sum(map(len, shards.values())), desc="clips", disable=None if rank == 0 else True, mininterval=0.5) as bar:
        for k, ids in shards.items():
            folder_k = out / "parts" / f"{k:05d}"
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
                    kept = {} if reason else {key: x.to(DTYPES[key][1]).contiguous() for key, x in tensors.items()}
                    with atomic(part) as file:
                        file.write(save(kept, {"dropped": reason} if reason else None))
                    made += 1
                bar.update()
            pack(out, k, ids, manifest, records)
    del make
    free_memory()
    return made


def pack(out: Path, k: int, ids: range, manifest: dict, records: list[dict]) -> None:
    """Join the parts of shard k into its file, then write its sidecar, then remove the parts. One tensor is in memory at a time."""
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
        entries += [(f"{name}.{i}", *DTYPES[name], manifest["latent_shape"]) for name in names] + [(f"text.{i}", *DTYPES["text"], shape)]

    def load(name):
        name, i = name.split(".")
        if name == "text":
            return handles["text"].get_tensor(i)
        with safe_open(folder_k / f"clip-{i}.safetensors", "pt") as part:
            x = part.get_tensor(name)
        if name == "latent":
            flat = x.double().flatten(1)
            statistics.append({"clips": [i], "mean": flat.mean(1).tolist(), "std": flat.std(1, correction=0).tolist()})
        return x

    with atomic(shard, folder_k / "shard.tmp") as file:
        hashed = HashedFile(file)
        write_safetensors(hashed, entries, load)
    mean, std = pooled_statistics(statistics) if statistics else (torch.zeros(0), torch.zeros(0))
    card = {"file": shard.name, "sha256": hashed.digest.hexdigest(), "bytes": hashed.size, "manifest": manifest_digest(manifest)}
    card |= {"latent_shape": manifest["latent_shape"], "mean": mean.tolist(), "std": std.tolist(), "clips": clips, "dropped": dropped}
    write_json(out / f"shard-{k:05d}.json", card)
    shutil.rmtree(folder_k)


def make_manifest(folder: Path, kind: str, frames: int, height: int, width: int, **rest) -> dict:
    """What a folder of clips is made with; ValueError if frames, height or width do not fit the model."""
    import diffusers
    import transformers

    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    time, space, patch = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8), transformer["patch_size"]
    if frames < 1 or frames % time != 1:
        raise ValueError(f"frames is {frames}; the VAE takes {time}k + 1 (81, say).")
    for name, value, step in (("height", height, space * patch[1]), ("width", width, space * patch[2])):
        if value < step or value % step:
            raise ValueError(f"{name} is {value}; give a multiple of {step}.")
    return {
        "kind": kind,
        "model": folder.resolve().name,
        "transformer": fingerprint(folder, "transformer"),
        "negative_prompt": NEGATIVE,
        "text_length": 512,
        "text_dim": transformer["text_dim"],
        "frames": frames,
        "height": height,
        "width": width,
        "latent_shape": [transformer["in_channels"], (frames - 1) // time + 1, height // space, width // space],
        "normalisation": "vae",  # latents are (z - vae_mean) / vae_std, as the transformer takes them
        "vae_mean": vae["latents_mean"],
        "vae_std": vae["latents_std"],
        **rest,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


# ---- From the teacher ------------------------------------------------------------------------------------------------


def generate(folder, prompts_file, out, *, rank=0, world=1, steps=50, guidance=5.0, flow_shift=3.0, sampler="unipc", frames=81, height=480,
             width=832, shard_size=64, seed_offset=0, kd=False, skip_layer=None, limit=None, device="cpu", dtype=None,
             fast=None) -> int:  # fmt: skip
    """Latents of the teacher for every prompt (the first `limit`), by the stock pipeline; returns the number of clips made.

    A clip depends on its prompt and seed (+ seed_offset) alone, not on rank or order. `kd` keeps its noise as well. `skip_layer` leaves
    that block out of the unguided pass (skip-layer guidance; the paper's pairs: 10). dtype: bfloat16 on a GPU, float32 on a CPU.
    fast(transformer) may set it up for this machine (speed.stock).
    Raises ValueError or RuntimeError in one sentence before anything is loaded.
    """
    folder = check_folder(folder)
    records = read_prompts(prompts_file)[:limit]
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    tmd.choose("sampler", sampler, ("unipc", "euler"))
    layers = read_json(folder / "transformer" / "config.json")["num_layers"]
    if steps < 1 or flow_shift <= 0 or (limit is not None and limit < 1):
        raise ValueError(f"steps is {steps}, flow_shift {flow_shift}, limit {limit}; all must be positive.")
    if skip_layer is not None and not (0 <= skip_layer < layers and guidance > 1):
        raise ValueError(f"skip_layer is {skip_layer} at guidance {guidance}; give a block from 0 to {layers - 1} and guidance above 1.")
    manifest = make_manifest(
        folder, "teacher", frames, height, width, sampler=sampler, steps=steps, guidance=guidance, flow_shift=flow_shift,
        skip_layer=skip_layer, seed_offset=seed_offset, kd=kd, dtype=str(dtype).removeprefix("torch."), shard_size=shard_size,
        prompts=len(records), prompts_sha256=hashlib.sha256(Path(prompts_file).read_bytes()).hexdigest(),
    )  # fmt: skip

    def load():
        with safe_open(Path(out) / "negative.safetensors", "pt") as file:
            negative = pad_text(file.get_tensor("negative"), manifest["text_length"])
        sample = load_teacher(folder, manifest, negative, device, dtype, fast)

        def make(record, text):
            g = torch.Generator("cpu").manual_seed(record["seed"] + seed_offset)  # as WanPipeline draws it from a CPU generator
            noise = torch.randn(1, *manifest["latent_shape"], generator=g)
            x = sample(noise, text)[0].float().cpu()
            return {"latent": x, "noise": noise[0]} if kd else {"latent": x}

        return make

    return fill(folder, out, manifest, records, load, rank=rank, world=world, device=device)


def load_teacher(folder: Path, manifest: dict, negative: torch.Tensor, device, dtype, fast=None):
    """The stock WanPipeline without VAE and text encoder as sample(noise (1, C, T, H, W), text) -> normalised latent, of that shape."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    if manifest["sampler"] == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=manifest["flow_shift"])
    else:
        config = UniPCMultistepScheduler.load_config(folder, subfolder="scheduler")
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # whatever scheduler the folder names
        scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=manifest["flow_shift"], **flow)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype, local_files_only=True)
    transformer = transformer.to(device).eval()
    if fast:
        fast(transformer)
    if manifest["skip_layer"] is not None:
        skip_in_unguided(transformer, manifest["skip_layer"])
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    shape = {"num_frames": manifest["frames"], "height": manifest["height"], "width": manifest["width"]}
    how = {"num_inference_steps": manifest["steps"], "guidance_scale": manifest["guidance"], "output_type": "latent", **shape}
    negative = negative[None].to(device)
    return lambda noise, text: pipe(latents=noise, prompt_embeds=text[None].to(device), negative_prompt_embeds=negative, **how).frames


def skip_in_unguided(transformer, layer: int) -> None:
    """Make block `layer` pass its input on in the pipeline's unguided calls, which it names by transformer.cache_context("uncond")."""
    stock, calls = transformer.cache_context, []

    @contextmanager
    def named(name, **kw):
        calls.append(name)
        with stock(name, **kw):
            yield
        calls.pop()

    transformer.cache_context = named
    transformer.blocks[layer].register_forward_hook(lambda block, args, output: args[0] if calls[-1:] == ["uncond"] else None)


# ---- From videos -----------------------------------------------------------------------------------------------------


def encode_videos(folder, videos_dir, out, *, rank=0, world=1, frames=81, height=480, width=832, fps=16.0, shard_size=64, limit=None,
                  device="cpu", dtype=torch.float32) -> int:  # fmt: skip
    """Latents of the mp4 files of a folder, each with its caption in a .txt of the same name; returns the number of clips made.

    A video is resampled to `fps` from its start (Wan's own is 16), scaled to cover height x width and cropped to its centre. Dropped with
    a reason: "no caption", "unreadable", "too short". The latent is the posterior's mean, normalised as the transformer takes it.
    """
    folder, videos = check_folder(folder), sorted(Path(videos_dir).glob("*.mp4"))[:limit]
    if not videos:
        raise ValueError(f"{videos_dir} holds no mp4; give a folder of mp4 files with captions in .txt of the same names.")
    records = []
    for path in videos:
        caption = path.with_suffix(".txt")
        prompt = " ".join(caption.read_text(errors="replace").split()) if caption.is_file() else ""
        records.append({"prompt": prompt, "video": path.name, "seed": 0})
    manifest = make_manifest(
        folder, "videos", frames, height, width, fps=fps, kd=False, dtype=str(dtype).removeprefix("torch."), shard_size=shard_size,
        vae=fingerprint(folder, "vae"), prompts=len(records), prompts_sha256=hashlib.sha256(json.dumps(records).encode()).hexdigest(),
    )  # fmt: skip

    def load():
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=dtype, local_files_only=True).to(device).eval()
        mean, std = (torch.tensor(vae.config[key], device=device)[:, None, None, None] for key in ("latents_mean", "latents_std"))

        @torch.no_grad()
        def make(record, text):
            if not record["prompt"]:
                raise Dropped("no caption")
            video = read_video(Path(videos_dir) / record["video"], frames, height, width, fps)
            z = vae.encode(video[None].to(device, dtype)).latent_dist.mode()[0].float()
            return {"latent": ((z - mean) / std).cpu()}  # the inverse of what WanPipeline does before it decodes

        return make

    return fill(folder, out, manifest, records, load, rank=rank, world=world, device=device)


def read_video(path: Path, frames: int, height: int, width: int, fps: float) -> torch.Tensor:
    """A video as (3, frames, height, width) in [-1, 1]; Dropped("unreadable") or Dropped("too short")."""
    import imageio.v2 as imageio

    found = []
    try:
        with imageio.get_reader(path, "ffmpeg") as video:
            rate = video.get_meta_data()["fps"] / fps
            for i, frame in enumerate(video):
                while len(found) < frames and round(len(found) * rate) == i:  # twice where the source is slower
                    x = torch.from_numpy(frame).permute(2, 0, 1)[None].float()  # (1, 3, h, w)
                    scale = max(height / x.shape[2], width / x.shape[3])
                    size = [max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))]
                    x = F.interpolate(x, size, mode="bilinear", antialias=True)[0]
                    top, left = (size[0] - height) // 2, (size[1] - width) // 2
                    found.append((x[:, top : top + height, left : left + width] / 127.5 - 1).clamp(-1, 1))
                if len(found) == frames:
                    return torch.stack(found, 1)
    except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
        raise Dropped("unreadable") from e
    raise Dropped("too short")


# ---- In words --------------------------------------------------------------------------------------------------------


def summary(out: str | Path) -> str:
    """A folder's clips, what was dropped and why, its size and the statistics by channel, in a few lines."""
    out = Path(out)
    manifest, cards = read_json(out / "manifest.json"), [read_json(path) for path in sorted(out.glob("shard-*.json"))]
    clips, reasons = sum(len(card["clips"]) for card in cards), {}
    for card in cards:
        for clip in card["dropped"]:
            reasons[clip["reason"]] = reasons.get(clip["reason"], 0) + 1
    dropped = f"{sum(reasons.values())} dropped" + (f" ({', '.join(f'{n} {why}' for why, n in sorted(reasons.items()))})" * bool(reasons))
    shards = -(-manifest["prompts"] // manifest["shard_size"])
    shape = " x ".join(map(str, manifest["latent_shape"]))
    lines = [
        f"{out.name}: {clips} clips of {manifest['prompts']} in {len(cards)} of {shards} shards, {dropped}, "
        f"{sum(card['bytes'] for card in cards) / 1e9:.3g} GB",
        f"latents {shape} from {manifest['model']} ({manifest['kind']}), normalised by the VAE",
    ]
    if clips:
        mean, std = pooled_statistics(cards)
        lines += [f"{name} by channel: {' '.join(f'{v:.2f}' for v in value)}" for name, value in (("mean", mean), ("std", std))]
    return "\n".join(lines)
