"""Training batches from shards, read by position: any resume and any number of ranks see the same data."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from wan_scale.data.checks import check_normalised, pooled_statistics
from wan_scale.data.files import file_sha256, read_json
from wan_scale.data.manifest import manifest_digest
from wan_scale.data.sidecars import AGAIN, lacking, read_manifest, read_sidecar
from wan_scale.data.sources import COPY, InPlace
from wan_scale.data.text import pad_text, read_negative


class Reader:
    """Clips of a folder in an endless order that depends on (seed, epoch) alone; len() is the clips of one epoch.

    A position counts the samples since training began. Rank r of W with micro-batches of n reads
    batch(step * W * n + r * n, n): the global batch is the same for every W, and a resume needs nothing but the step.

    At the start sizes, manifest and channel statistics are checked. With `verify`, so is a shard's sha256 at its first
    use (about a second a GB). Published clips that were indexed in place (published.py) are read from their own files,
    and compared with their checksums each time. Raises ValueError in one sentence. `identity` names the exact data:
    keep it in checkpoints. size: the run's (frames, height, width), which must be the clips'.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0, device="cpu", text_length: int | None = None,
                 verify: bool = True, size: tuple[int, int, int] | None = None):  # fmt: skip
        self.folder, self.seed, self.device, self.verify = Path(folder), seed, device, verify
        paths = sorted(self.folder.glob("shard-*.json"))
        if not paths:
            raise ValueError(f"{self.folder} holds no finished shard; run `data` first.")
        self.manifest = read_manifest(self.folder)
        lost = {path.stem for path in self.folder.glob("shard-*.safetensors")} - {path.stem for path in paths}
        if lost:
            raise ValueError(f"{self.folder} lacks {min(lost)}.json, the index of a shard; run `data` again.")
        check_size(self.folder, self.manifest, size)
        self.in_place = "format" in self.manifest
        where = source_of(self.folder) if self.in_place else self.folder
        self.text_length = text_length or self.manifest["text_length"]
        digest, self.latent_shape = manifest_digest(self.manifest), tuple(self.manifest["latent_shape"])
        self.shards, self.clips = [], []  # sidecars less their clips; (shard, clip id) of every clip
        sidecars = []
        for path in paths:
            sidecar = read_sidecar(path)
            if tuple(sidecar["latent_shape"]) != self.latent_shape:
                shapes = f"{tuple(sidecar['latent_shape'])}, the manifest says {self.latent_shape}"
                raise ValueError(f"{path.name} holds latents of another shape ({shapes}); keep one shape a folder.")
            if sidecar["manifest"] != digest:
                other = f"{path.name} was made under another manifest than {self.folder / 'manifest.json'}"
                raise ValueError(f"{other}; keep one a folder.")
            shard = where / sidecar["file"]
            there = shard.stat().st_size if shard.exists() else 0
            if there != sidecar["bytes"]:
                again = f"{COPY} and run `data --from` again" if self.in_place else AGAIN
                raise ValueError(f"{shard} is truncated or missing ({there} of {sidecar['bytes']} bytes); {again}.")
            self.clips += [(len(self.shards), clip["id"]) for clip in sidecar["clips"]]
            places = places_of(path, sidecar["clips"], self.manifest["kd"]) if self.in_place else None
            self.shards.append({"path": shard, "sha256": sidecar["sha256"], "places": places})
            counts = {key: range(len(sidecar[key])) for key in ("clips", "dropped")}
            sidecars.append({key: sidecar.get(key) for key in ("file", "of", "mean", "std")} | counts)
        if left := lacking(self.folder, self.manifest, sidecars):
            raise ValueError(f"{self.folder} is unfinished ({left} are to be made); run the same `data` command again.")
        if not self.clips:
            raise ValueError(f"{self.folder} holds no clip that passed the filter; look at its summary.")
        self.mean, self.std = pooled_statistics(sidecars)
        check_normalised(self.mean, self.std, self.manifest["vae_mean"], self.manifest["vae_std"])
        digests = "".join([digest, *(shard["sha256"] for shard in self.shards)])
        self.identity = hashlib.sha256(digests.encode()).hexdigest()
        # open shards: a handle maps its file and reads only what is asked, but Parquet's keeps a whole row group
        self.handle = lru_cache(maxsize=1 if self.manifest.get("format") == "fastvideo" else 8)(self.open)
        self.verified: set[int] = set()
        self.order = lru_cache(maxsize=2)(self.permutation)  # a batch may straddle two epochs

    def __len__(self) -> int:
        return len(self.clips)

    def open(self, shard: int):
        """Handle of a shard, its checksum compared at the first use."""
        path, wanted, places = (self.shards[shard][key] for key in ("path", "sha256", "places"))
        if self.in_place:
            return InPlace(path, self.manifest, places)
        try:
            if self.verify and shard not in self.verified and file_sha256(path) != wanted:
                raise ValueError(f"{path} is corrupted (its checksum differs); {AGAIN}.")
            self.verified.add(shard)
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is gone or corrupted ({type(e).__name__}); {AGAIN}.") from e

    def permutation(self, epoch: int) -> torch.Tensor:
        """Order of the clips in an epoch: (len,)."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed},{epoch}".encode()).digest()[:7], "big")
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def at(self, position: int, n: int) -> list[tuple[int, int]]:
        """(shard, clip id) of the samples `position` to `position + n` since training began."""
        if position < 0 or n < 1:
            raise ValueError(
                f"position {position} and n {n} name no batch; give a position from 0 and at least one sample."
            )
        places = [divmod(p, len(self)) for p in range(position, position + n)]
        return [self.clips[int(self.order(epoch)[i])] for epoch, i in places]

    def tensor(self, name: str, shard: int, clip: int) -> torch.Tensor:
        """One tensor of a clip, float32; ValueError if it is not finite, which no learning rate would help."""
        try:
            x = self.handle(shard).get_tensor(f"{name}.{clip}").float()
        except SafetensorError as e:
            path = self.shards[shard]["path"]
            raise ValueError(f"{path} is corrupted ({name} of clip {clip}: {type(e).__name__}); {AGAIN}.") from e
        if not bool(x.isfinite().all()):
            again = COPY if self.in_place else AGAIN
            bad = f"{self.shards[shard]['path']} holds a {name} that is not finite (clip {clip})"
            raise ValueError(f"{bad}: the data are broken, not the training; {again}.")
        return pad_text(x, self.text_length) if name == "text" else x

    def read(self, names: tuple[str, ...], position: int, n: int, host: bool) -> list[torch.Tensor]:
        """Tensors of n samples from `position` on, float32: (n, ...) each, one for each name.

        On this reader's device; host: in host memory, pinned where the device is a GPU.
        """
        clips = [[self.tensor(name, *where) for name in names] for where in self.at(position, n)]
        found = [torch.stack(tensors) for tensors in zip(*clips)]
        if not host:
            return self.move(found)
        return [x.pin_memory() for x in found] if torch.device(self.device).type == "cuda" else found

    def move(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `read` left in host memory, on this reader's device."""
        return [x.to(self.device, non_blocking=True) for x in tensors]

    def batch(self, position: int, n: int, host: bool = False) -> list[torch.Tensor]:
        """Latents x (n, C, T, H, W) and text c (n, text_length, text_dim), float32, of n samples from `position` on."""
        return self.read(("latent", "text"), position, n, host)

    def pairs(self, position: int, n: int, host: bool = False) -> list[torch.Tensor]:
        """(noise, x, c) of the teacher's own trajectories: x is where the teacher's ODE takes the noise."""
        if not self.manifest["kd"]:
            raise ValueError(f"{self.folder} holds no noise; run `data` with kd into another folder.")
        return self.read(("noise", "latent", "text"), position, n, host)

    @property
    def negative(self) -> torch.Tensor:
        """Embedding of the negative prompt: (text_length, text_dim) float32."""
        return read_negative(self.folder, self.text_length).float().to(self.device)


def check_size(folder: Path, manifest: dict, size: tuple[int, int, int] | None) -> None:
    """ValueError if the clips are not of the run's (frames, height, width)."""
    has = tuple(manifest.get(key) for key in ("frames", "height", "width"))
    if size and None not in has and has != tuple(size):
        told = lambda size: "{} frames of {} x {}".format(*size)
        fits = "--frames {} --height {} --width {}".format(*has)
        raise ValueError(f"{folder} holds clips of {told(has)}, not of {told(size)}; give {fits}, or other data.")


def source_of(folder: Path) -> Path:
    """Where the published files of a folder are."""
    found = read_json(folder / "source.json").get("folder")
    if not isinstance(found, str):
        raise ValueError(f"{folder / 'source.json'} names no folder; run `data --from` again.")
    return Path(found)


def places_of(path: Path, clips: list[dict], kd: bool) -> dict[str, torch.Tensor]:
    """{name: (ids, 3)} of an index's clips: the place of a tensor and its CRC-32, -1 where it was not read."""
    last, found = max((clip["id"] for clip in clips), default=-1), {}
    try:
        for name in ("latent", "text", "noise") if kd else ("latent", "text"):
            rows = [[clip["id"], *clip[name][:2], -1 if clip[name][2] is None else clip[name][2]] for clip in clips]
            rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
            found[name] = torch.full((last + 1, 3), -1)
            found[name][rows[:, 0]] = rows[:, 1:]
        return found
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged (places of its clips); delete it and run `data --from` again.") from e
