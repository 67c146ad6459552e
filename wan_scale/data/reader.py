"""Training batches from shards, read by position: any resume and any number of ranks see the same data."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from wan_scale.data.checks import check_normalised, pooled_statistics
from wan_scale.data.files import file_sha256, read_json
from wan_scale.data.manifest import manifest_digest
from wan_scale.data.text import pad_text

AGAIN = "delete it and its .json and run `data` again"


class Reader:
    """Clips of a folder in an endless order that depends on (seed, epoch) alone; len() is the clips of one epoch.

    A position counts the samples since training began. Rank r of W with micro-batches of n reads
    batch(step * W * n + r * n, n): the global batch is the same for every W, and a resume needs nothing but the step.

    At the start sizes, manifest and channel statistics are checked. With `verify`, so is a shard's sha256 at its first
    use (about a second a GB). Raises ValueError in one sentence. `identity` names the exact data: keep it in
    checkpoints.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0, device="cpu", text_length: int | None = None,
                 verify: bool = True):  # fmt: skip
        self.folder, self.seed, self.device, self.verify = Path(folder), seed, device, verify
        paths = sorted(self.folder.glob("shard-*.json"))
        if not paths:
            raise ValueError(f"{self.folder} holds no finished shard; run `data` first.")
        self.manifest = read_json(self.folder / "manifest.json")
        self.text_length = text_length or self.manifest["text_length"]
        digest, self.latent_shape = manifest_digest(self.manifest), tuple(self.manifest["latent_shape"])
        self.shards, self.clips = [], []  # sidecars less their clips; (shard, clip id) of every clip
        sidecars = []
        for path in paths:
            sidecar = read_json(path)
            missing = {"file", "bytes", "sha256", "manifest", "latent_shape", "clips", "mean", "std"} - sidecar.keys()
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(sorted(missing))}; delete it and its shard and run `data` again."
                )
            if tuple(sidecar["latent_shape"]) != self.latent_shape:
                shapes = f"{tuple(sidecar['latent_shape'])}, the manifest says {self.latent_shape}"
                raise ValueError(f"{path.name} holds latents of another shape ({shapes}); keep one shape a folder.")
            if sidecar["manifest"] != digest:
                other = f"{path.name} was made under another manifest than {self.folder / 'manifest.json'}"
                raise ValueError(f"{other}; keep one a folder.")
            shard = self.folder / sidecar["file"]
            size = shard.stat().st_size if shard.exists() else 0
            if size != sidecar["bytes"]:
                raise ValueError(f"{shard} is truncated or missing ({size} of {sidecar['bytes']} bytes); {AGAIN}.")
            self.clips += [(len(self.shards), clip["id"]) for clip in sidecar["clips"]]
            self.shards.append({key: sidecar[key] for key in ("file", "sha256")})
            sidecars.append({key: sidecar[key] for key in ("mean", "std")} | {"clips": range(len(sidecar["clips"]))})
        if not self.clips:
            raise ValueError(f"{self.folder} holds no clip that passed the filter; look at its summary.")
        self.mean, self.std = pooled_statistics(sidecars)
        check_normalised(self.mean, self.std, self.manifest["vae_mean"], self.manifest["vae_std"])
        digests = "".join([digest, *(shard["sha256"] for shard in self.shards)])
        self.identity = hashlib.sha256(digests.encode()).hexdigest()
        self.handle = lru_cache(maxsize=8)(self.open)  # open shards; a handle maps its file, reads only what is asked
        self.verified: set[int] = set()
        self.order = lru_cache(maxsize=2)(self.permutation)  # a batch may straddle two epochs

    def __len__(self) -> int:
        return len(self.clips)

    def open(self, shard: int):
        """Handle of a shard, its checksum compared at the first use."""
        path, wanted = self.folder / self.shards[shard]["file"], self.shards[shard]["sha256"]
        if self.verify and shard not in self.verified and file_sha256(path) != wanted:
            raise ValueError(f"{path} is corrupted (its checksum differs); {AGAIN}.")
        self.verified.add(shard)
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is corrupted ({type(e).__name__}); {AGAIN}.") from e

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

    def tensor(self, name: str, shard: int, clip) -> torch.Tensor:
        """One tensor of a clip, float32."""
        return self.handle(shard).get_tensor(f"{name}.{clip}").float()

    def read(self, name: str, where: list) -> torch.Tensor:
        """Tensors `name` of the given clips, float32: (n, ...)."""
        tensors = (self.tensor(name, shard, clip) for shard, clip in where)
        return torch.stack([pad_text(t, self.text_length) if name == "text" else t for t in tensors]).to(self.device)

    def batch(self, position: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents x (n, C, T, H, W) and text c (n, text_length, text_dim), float32, of n samples from `position` on."""
        where = self.at(position, n)
        return self.read("latent", where), self.read("text", where)

    def pairs(self, position: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(noise, x, c) of the teacher's own trajectories: x is where the teacher's ODE takes the noise."""
        if not self.manifest["kd"]:
            raise ValueError(f"{self.folder} holds no noise; run `data` with kd into another folder.")
        where = self.at(position, n)
        return self.read("noise", where), self.read("latent", where), self.read("text", where)

    @property
    def negative(self) -> torch.Tensor:
        """Embedding of the negative prompt: (text_length, text_dim) float32."""
        path = self.folder / "negative.safetensors"
        try:
            with safe_open(path, "pt") as file:
                text = file.get_tensor("negative")
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{path} is missing or corrupted ({type(e).__name__}); delete it and run `data` again."
            ) from e
        return pad_text(text.float(), self.text_length).to(self.device)


FASTGEN = {"latent": "latent.pth", "text": "txt_emb.pth", "noise": "noise.pth"}  # members of a clip, after its key


class FastGenShards(Reader):
    """FastGen's WebDataset shards through the same batches.

    They are *.tar with <key>.latent.pth, <key>.txt_emb.pth and, for pairs, <key>.noise.pth. `negative` is a file with
    the negative prompt's embedding (.pth or .npy). `vae_mean` and `vae_std` (C,) are those of the VAE that made the
    latents: the statistics of the first 64 clips are checked by them. There are no checksums to verify.
    """

    def __init__(self, folder: str | Path, negative: str | Path, *, vae_mean, vae_std, seed: int = 0, device="cpu",
                 text_length: int = 512):  # fmt: skip
        self.folder, self.seed, self.device, self.text_length = Path(folder), seed, device, text_length
        self.paths, self.clips, self.members, digest = sorted(self.folder.glob("*.tar")), [], {}, hashlib.sha256()
        for shard, path in enumerate(self.paths):
            try:
                with tarfile.open(path, "r:") as tar:  # r: is uncompressed, whose members can be read in place
                    members = {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
            except (tarfile.TarError, OSError) as e:
                raise ValueError(f"{path} is truncated or no tar ({type(e).__name__}); copy it again.") from e
            end = "." + FASTGEN["latent"]
            keys = [name.removesuffix(end) for name in members if name.endswith(end)]
            for key in keys:
                if f"{key}.{FASTGEN['text']}" not in members:
                    raise ValueError(
                        f"{path} holds {key}.{FASTGEN['latent']} without its {FASTGEN['text']}; copy it again."
                    )
                self.clips.append((shard, key))
            self.members |= {(shard, name): place for name, place in members.items()}
            digest.update(json.dumps([path.name, members]).encode())
        if not self.clips:
            raise ValueError(
                f"{self.folder} holds no tar with {FASTGEN['latent']}; give a folder of FastGen's video latents."
            )
        self.manifest = {"kd": all((shard, f"{key}.{FASTGEN['noise']}") in self.members for shard, key in self.clips)}
        self.identity, self.order = digest.hexdigest(), lru_cache(maxsize=2)(self.permutation)
        self.empty = self.decode(Path(negative).read_bytes(), str(negative))
        first = torch.stack([self.tensor("latent", *clip) for clip in self.clips[:64]])
        channels = first.double().transpose(0, 1).flatten(1)
        self.latent_shape, self.mean, self.std = tuple(first[0].shape), channels.mean(1), channels.std(1)
        check_normalised(self.mean, self.std, vae_mean, vae_std)

    def decode(self, data: bytes, name: str) -> torch.Tensor:
        """A tensor from the bytes of a .pth or .npy file, float32 without a leading 1; never runs code from it."""
        try:
            if name.endswith(".npy"):
                x = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            else:
                x = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            x = x.float()
        except Exception as e:  # unpickling raises nearly anything
            raise ValueError(f"{name} of {self.folder} holds no tensor ({type(e).__name__}); copy it again.") from e
        return x[0] if len(x) == 1 and x.ndim in (3, 5) else x

    def tensor(self, name: str, shard: int, key: str) -> torch.Tensor:
        """One tensor of a clip, read from its place in the tar."""
        member = f"{key}.{FASTGEN[name]}"
        offset, size = self.members[shard, member]
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return self.decode(file.read(size), member)

    @property
    def negative(self) -> torch.Tensor:
        return pad_text(self.empty, self.text_length).to(self.device)
