"""From latents to frames, and frames on a contact sheet or in an mp4."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from wan_scale.data.files import atomic, writing


def decode(vae, video_processor, latents, output_type: str = "np"):
    """Normalised latents (B, 16, T, H, W) -> video, one clip at a time, by the VAE's own mean and deviation."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device)
    std = torch.tensor(vae.config.latents_std).view(shape).to(latents.device)
    raw = (latents.float() * std + mean).to(vae.dtype)
    frames = torch.cat([vae.decode(clip[None], return_dict=False)[0] for clip in raw])
    return video_processor.postprocess_video(frames, output_type=output_type)


def contact_sheet(rows: list[tuple[str, str, np.ndarray]], path: Path, columns: int = 6) -> Path:
    """A row of frames for each (title or "", label, frames (T, H, W, 3) in [0, 1]), evenly picked."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files alone, so that no screen is needed
    from matplotlib import pyplot as plt

    tall = rows[0][2].shape[1] / rows[0][2].shape[2]
    size = (1.9 * columns, (1.9 * tall + 0.25) * len(rows))
    fig, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained", figsize=size)
    for row, (title, label, frames) in zip(axes, rows):
        for ax, i in zip(row, np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            ax.imshow(np.asarray(frames[i]).clip(0, 1))
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8)
        row[0].set_title(title[:60], fontsize=8, loc="left")
        if row[0] is axes[0, 0]:
            for ax, i in zip(row[1:], np.linspace(0, len(frames) - 1, columns).round().astype(int)[1:]):
                ax.set_title(f"frame {i}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        fig.savefig(file, dpi=110, format="png")
    plt.close(fig)
    return path


def needs_ffmpeg() -> None:
    """RuntimeError in a sentence where no video could be written: said before the first one is made."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        get_ffmpeg_exe()
    except (ImportError, RuntimeError, OSError) as e:
        raise RuntimeError(
            "imageio-ffmpeg is missing; `pip install -r wan_scale/requirements.txt` brings it with its ffmpeg."
        ) from e


def write_video(frames: np.ndarray, path: Path, fps: int = 16, comment: str = "") -> Path:
    """Frames (T, H, W, 3) in [0, 1] to an mp4 with a comment in its header; there whole, decoded once, or not at all.

    RuntimeError if the disk does not take it.
    """
    import imageio.v2 as imageio

    # of its own on every host, and short: path.name may be as long as a name can be
    temporary = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-{os.getpid()}.tmp.mp4")
    # as diffusers' export_to_video, which takes no comment
    how = {"fps": fps, "quality": 5.0, "macro_block_size": 16, "ffmpeg_log_level": "quiet"}
    how["output_params"] = ["-metadata", f"comment={comment}"]
    try:
        with writing(path):
            with imageio.get_writer(temporary, format="ffmpeg", **how) as video:
                for frame in frames:
                    video.append_data((frame * 255).astype(np.uint8))
            # ffmpeg may fail without a word: the file says whether it did
            if (whole := len(decoded(temporary))) != len(frames):
                raise OSError(f"{whole} of {len(frames)} frames arrived")
            seal(temporary)
            os.replace(temporary, path)
    except RuntimeError as e:
        room = f"{shutil.disk_usage(path.parent).free / 1e6:.3g} MB are free"
        why = str(e.__cause__ or e).split("\n")[0]
        raise RuntimeError(f"{path} could not be written ({why}; {room}); free some disk and run again.") from e
    finally:
        temporary.unlink(missing_ok=True)
    return path


SEAL = (46).to_bytes(4, "big") + b"freesha256"  # a box that players skip; the digest of all before it follows


def seal(path: Path) -> None:
    """Append the sha256 of an mp4 to it, so that a byte that changes later is noticed."""
    with open(path, "rb+") as file:
        file.write(SEAL + hashlib.sha256(file.read()).digest())
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: Path) -> None:
    """RuntimeError if a byte of a sealed mp4 is another. Other mp4s (VBench's, say) pass."""
    data = path.read_bytes()
    body, tail = data[:-46], data[-46:]
    if tail.startswith(SEAL) and hashlib.sha256(body).digest() != tail[len(SEAL) :]:
        raise RuntimeError(f"{path} is damaged (its checksum differs); delete it and sample it again.")


def decoded(path: str | Path) -> list[np.ndarray]:
    """The frames of an mp4, (H, W, 3) uint8 each. RuntimeError if it cannot be decoded to its end."""
    import imageio.v2 as imageio

    try:
        with imageio.get_reader(path, "ffmpeg") as reader:
            meta = reader.get_meta_data()
            frames = [frame for frame in reader]  # not list(reader): its length is infinite
    except (OSError, RuntimeError, ValueError, IndexError, KeyError) as error:  # the plugin raises any of them
        raise RuntimeError(
            f"{path} is not a readable video ({type(error).__name__}); delete it and sample it again."
        ) from error
    announced = round(meta["fps"] * meta["duration"])
    # a cut file can decode without a word; durations are rounded to 10 ms
    if len(frames) < max(min(announced, 2), announced - 1):
        raise RuntimeError(f"{path} decodes to {len(frames)} frames of {announced}; delete it and sample it again.")
    return frames


def read_video(path: str | Path) -> torch.Tensor:
    """The frames of an mp4, (T, H, W, 3) float32 in [0, 1]. RuntimeError if it cannot be decoded to its end."""
    frames = decoded(path)
    check_seal(Path(path))
    return torch.from_numpy(np.stack(frames)).float().div_(255)


def comment_of(path: Path) -> str | None:
    """The comment that write_video put into an mp4's header; None where there is no whole mp4.

    Reads the boxes' headers and the index, not the frames: a cut file's boxes do not end where it does.
    """
    if not path.is_file():
        return None
    size, at, index = path.stat().st_size, 0, b""
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8 or at + length > size:
                return None
            if head[4:8] == b"moov":
                file.seek(at)
                index = file.read(length)
            at += length
    if not index:
        return None
    found = index.find(b"\xa9cmt")
    if found < 0:
        return ""
    box = index[found + 4 :]  # length, "data", type, language, text
    return box[16 : int.from_bytes(box[:4], "big")].decode(errors="replace")
