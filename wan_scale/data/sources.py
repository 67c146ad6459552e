"""Clips that others have published, read where they lie: each tar or Parquet file by the places of its clips.

    rcm         *.tar with KEY.latent.pt, KEY.embed.pt, KEY.prompt.txt, or the same below a folder KEY/
    fastgen     *.tar with KEY.latent.pth, KEY.txt_emb.pth and, for pairs, KEY.noise.pth
    fastvideo   *.parquet with vae_latent_bytes, text_embedding_bytes, their shapes and dtypes, caption

A tensor's place is [offset, size] in a tar and [row group, row] in a Parquet file. Nothing here runs code from a file.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zlib
from pathlib import Path

import torch

KINDS = {  # a clip's tensors (and its prompt) by kind: members of a tar after the clip's key, columns of a Parquet file
    "rcm": {"latent": "latent.pt", "text": "embed.pt", "prompt": "prompt.txt"},
    "fastgen": {"latent": "latent.pth", "text": "txt_emb.pth", "noise": "noise.pth"},
    "fastvideo": {"latent": "vae_latent", "text": "text_embedding"},
}
COPY = "copy it again, or move it out of the folder"
ITEMS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def source_files(folder: str | Path, kind: str = "") -> tuple[str, list[Path]]:
    """(kind, its files in order of name) of a folder of published clips, at any depth.

    ValueError if there are none, if they are of several kinds and none is named, or if `data` made the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one of published clips with --from.")
    if (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} was made by `data`; give it with --data, not with --from.")
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # unfinished downloads
    found = {end: sorted(p for p in folder.rglob(f"*.{end}") if not hidden(p)) for end in ("tar", "parquet")}
    kinds = ["fastvideo"] * bool(found["parquet"])
    if found["tar"] and (kind != "fastvideo" or not kinds):
        kinds += [tar_kind(found["tar"][0])]
    if kind in kinds:
        kinds = [kind]
    if not kinds or (kind and kind not in kinds):
        what = f"{folder} holds no {'*.tar or *.parquet' if not kind else f'files of {kind}'}"
        raise ValueError(f"{what}; give a folder of rCM's or FastGen's tars or of FastVideo's Parquet files.")
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds clips of {' and '.join(kinds)}; say which with --from-kind.")
    return kinds[0], found["parquet" if kinds[0] == "fastvideo" else "tar"]


def tar_kind(path: Path) -> str:
    """Which kind of tar this is, by its first members."""
    with opened(path) as tar:
        for member in tar:
            for kind in ("fastgen", "rcm"):  # .pth first: it begins as .pt does
                if member.name.endswith("." + KINDS[kind]["latent"]):
                    return kind
    raise ValueError(f"{path} holds no clip of rCM or FastGen (*.latent.pt or *.latent.pth); {COPY}.")


def opened(path: Path) -> tarfile.TarFile:
    """An uncompressed tar, whose members can be read in place."""
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError) as e:
        raise ValueError(unreadable(path, e)) from e


def unreadable(path: Path, error: Exception) -> str:
    """Why a file is no tar or Parquet file."""
    try:
        with open(path, "rb") as file:
            if file.read(20).startswith(b"version https://git"):
                return f"{path} is a pointer of Git LFS, not the file; fetch it with `git lfs pull` or `hf download`."
    except FileNotFoundError:
        return f"{path} is gone; {COPY.replace('move it', 'leave it')}."
    except OSError:
        pass
    return f"{path} is truncated or no {path.suffix[1:]} file ({type(error).__name__}); {COPY}."


def plain(x: torch.Tensor, name: str) -> torch.Tensor:
    """Without a leading 1, and a text without its zero padding: (C, T, H, W) or (n, text_dim)."""
    x = x[0] if x.ndim == (3 if name == "text" else 5) and len(x) == 1 else x
    if name == "text" and x.ndim == 2:
        true = x.ne(0).any(1).nonzero()
        x = x[: int(true.max()) + 1 if len(true) else 1]
    return x


class Tar:
    """One tar of rCM or FastGen."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind, self.members = Path(path), kind, KINDS[kind]
        self.lock, self.file = threading.Lock(), None

    def scan(self) -> list[dict]:
        """Its clips in order: {"key", "prompt", "latent": place, "text": place[, "noise": place]}; reads headers only.

        ValueError if the tar is cut short, if it holds other things alone, or if a clip lacks its text or latent.
        """
        places = {}
        with opened(self.path) as tar:
            try:
                for member in tar:
                    if member.isfile() and member.name in places:
                        raise ValueError(f"{self.path} holds {member.name} twice; {COPY}.")
                    if member.isfile():
                        places[member.name] = [member.offset_data, member.size]
            except (tarfile.TarError, OSError) as e:
                raise ValueError(unreadable(self.path, e)) from e
            # tarfile takes a damaged header, or a cut between two members, for the end: the end is a block of zeros
            if self.bytes([tar.offset, tarfile.BLOCKSIZE]) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{self.path} is damaged at byte {tar.offset}; {COPY}.")
        end, clips = "." + self.members["latent"], []
        for name in places:
            if name.endswith(end):
                key = name.removesuffix(end)
                found = {part: places.get(f"{key}.{member}") for part, member in self.members.items()}
                if not found["text"]:
                    raise ValueError(f"{self.path} holds {name} without its {self.members['text']}; {COPY}.")
                prompt = self.bytes(found.pop("prompt")) if found.get("prompt") else b""
                words = " ".join(prompt.decode("utf-8-sig", "replace").split())
                found = {part: place for part, place in found.items() if place}
                clips.append({"key": key, "prompt": words, **found})
        end = "." + self.members["text"]
        keys = {clip["key"] for clip in clips}
        if alone := [name for name in places if name.endswith(end) and name.removesuffix(end) not in keys]:
            raise ValueError(f"{self.path} holds {alone[0]} without its {self.members['latent']}; {COPY}.")
        if places and not clips:
            raise ValueError(f"{self.path} holds no clip of {self.kind} (*.{self.members['latent']}); {COPY}.")
        return clips

    def bytes(self, place: list) -> bytes:
        """What lies at a place; ValueError if the file ends before."""
        offset, size = place[:2]
        try:
            with self.lock:  # or two threads open it, and the one that is let go closes under its reader
                self.file = self.file or open(self.path, "rb")
            there = 0 <= offset and 0 <= size <= os.fstat(self.file.fileno()).st_size - offset
            data = os.pread(self.file.fileno(), size, offset) if there else b""
            while data and len(data) < size:  # one call reads at most 2 GB
                more = os.pread(self.file.fileno(), size - len(data), offset + len(data))
                data = data + more if more else b""
        except OSError as e:
            raise ValueError(unreadable(self.path, e)) from e
        if len(data) != size:
            raise ValueError(f"{self.path} is truncated; {COPY}.")
        return data

    def read(self, name: str, place: list) -> tuple[torch.Tensor, int]:
        """A tensor as stored, less a leading 1 and padding, and the CRC-32 of its bytes."""
        data = self.bytes(place)
        try:
            x = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if not x.is_floating_point():
                raise TypeError(f"{x.dtype} is packed somehow")
            # a slice of a batch was saved with the whole batch under it; clone lets that go
            return plain(x, name).clone(), zlib.crc32(data)
        except Exception as e:  # unpickling raises nearly anything
            what = f"{self.path} holds no tensor at byte {place[0]}, where a {name} is due ({type(e).__name__})"
            raise ValueError(f"{what}; {COPY}.") from e


class Parquet:
    """One Parquet file of FastVideo.

    A row is read with its whole row group, and the last group is kept in memory: files with large groups are read
    faster after --convert.
    """

    def __init__(self, path: Path, kind: str = "fastvideo"):
        self.path, self.lock, self.file, self.group = Path(path), threading.Lock(), None, (None, None)

    def table(self, group: int | None, columns: list[str]):
        """Columns of a row group; of what the file has where `group` is None: its schema's names and group count."""
        try:
            import pyarrow.parquet
            from pyarrow.lib import ArrowException
        except ImportError:
            raise RuntimeError("Parquet files are read by pyarrow, which is missing; pip install pyarrow.") from None
        try:
            if self.file is None:
                self.file = pyarrow.parquet.ParquetFile(self.path, memory_map=True)
            if group is None:
                return self.file.schema_arrow.names, self.file.num_row_groups
            return self.file.read_row_group(group, columns=columns)
        except (ArrowException, OSError, IndexError) as e:
            raise ValueError(unreadable(self.path, e)) from e

    def scan(self) -> list[dict]:
        """As Tar.scan; reads the small columns only."""
        names, groups = self.table(None, [])
        needed = [f"{part}_{what}" for part in KINDS["fastvideo"].values() for what in ("bytes", "shape", "dtype")]
        if lacking := [name for name in needed if name not in names]:
            raise ValueError(f"{self.path} lacks the column {lacking[0]}; give FastVideo's Parquet files.")
        caption = next((name for name in ("caption", "prompt") if name in names), None)
        small = [name for name in ("id", caption) if name in names]
        clips = []
        for group in range(groups):
            table = self.table(group, [*small, "vae_latent_shape", "text_embedding_shape"])
            for row, clip in enumerate(table.to_pylist()):
                place = [group, row]
                key = str(clip.get("id") or f"{group}/{row}")
                if not clip["vae_latent_shape"]:
                    raise ValueError(f"{self.path} holds clip {key} without a latent; {COPY}.")
                if not clip["text_embedding_shape"]:
                    raise ValueError(f"{self.path} holds clip {key} without its text_embedding; {COPY}.")
                prompt = " ".join((clip.get(caption) or "").split())
                clips.append({"key": key, "prompt": prompt, "latent": place, "text": place})
        return clips

    def read(self, name: str, place: list) -> tuple[torch.Tensor, int]:
        """As Tar.read. Their dtype column may be wrong, so the number of bytes decides."""
        group, row = place[:2]
        column = KINDS["fastvideo"][name]
        with self.lock:  # one reader at a time decodes a group
            if self.group[0] != group:
                parts = [
                    f"{part}_{what}" for part in KINDS["fastvideo"].values() for what in ("bytes", "shape", "dtype")
                ]
                self.group = (None, None)  # not two in memory
                self.group = group, self.table(group, parts)
            if not 0 <= row < self.group[1].num_rows:
                raise ValueError(f"{self.path} has no row {row} in group {group}; {COPY} and run `data --from` again.")
            cell = {what: self.group[1].column(f"{column}_{what}")[row] for what in ("bytes", "shape", "dtype")}
        shape, told = cell["shape"].as_py() or [], str(cell["dtype"].as_py()).removeprefix("torch.")
        data = cell["bytes"].as_buffer() if cell["bytes"].is_valid else b""
        size, dtype = torch.Size(shape).numel(), ITEMS.get(told, torch.float16)
        if dtype.itemsize * size != len(data):
            dtype = next(
                (d for d in (torch.float32, torch.float16, torch.float64) if d.itemsize * size == len(data)), None
            )
        if not size or dtype is None:
            what = f"{self.path} holds a {column} of {len(data)} bytes that is not {tuple(shape)} of any float"
            raise ValueError(f"{what} (row {row} of group {group}); {COPY}.")
        x = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        return plain(x, name), zlib.crc32(data)


def source(path: Path, kind: str) -> Tar | Parquet:
    """The reader of one file."""
    return Parquet(path) if kind == "fastvideo" else Tar(path, kind)


def ready(x: torch.Tensor, name: str, manifest: dict, where: str) -> torch.Tensor:
    """A tensor as stored, normalised and rounded as our own shards hold it, so that both train alike.

    ValueError, beginning with `where`, if its shape is not the manifest's.
    """
    shape, length, width = tuple(x.shape), manifest["text_length"], manifest["text_dim"]
    if name == "text":
        if len(shape) != 2 or shape[1] != width or shape[0] > length:
            raise ValueError(f"{where} holds a text of {shape}, not of up to ({length}, {width}); {COPY}.")
        return x.bfloat16()
    if shape != tuple(manifest["latent_shape"]):
        other = f"{where} holds a {name} of {shape}, others {tuple(manifest['latent_shape'])}"
        raise ValueError(f"{other}; keep one shape a folder.")
    if name == "noise":
        return x.float()
    if manifest["stored"] == "raw":
        by_channel = lambda key: torch.tensor(manifest[key])[:, None, None, None]
        x = (x.float() - by_channel("vae_mean")) / by_channel("vae_std")
    return x.half()


class InPlace:
    """The clips of one published file as a shard's handle gives them; ValueError if a checksum differs.

    places: {name: (ids, 3) int64}, a place and its CRC-32 (-1: never read) for every clip's id.
    """

    def __init__(self, path: Path, manifest: dict, places: dict[str, torch.Tensor]):
        self.file, self.manifest, self.places = source(path, manifest["format"]), manifest, places

    def get_tensor(self, name: str) -> torch.Tensor:
        part, clip = name.split(".")
        *place, wanted = self.places[part][int(clip)].tolist()
        x, found = self.file.read(part, place)
        if wanted not in (-1, found):
            raise ValueError(f"{self.file.path} is corrupted (a checksum of clip {clip} differs); {COPY}.")
        return ready(x, part, self.manifest, f"{self.file.path} (clip {clip})")
