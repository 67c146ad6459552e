"""Clips from a folder of videos with captions, encoded by the folder's VAE."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from wan_scale.data.checks import Dropped
from wan_scale.data.folders import check_folder, fingerprint
from wan_scale.data.manifest import make_manifest
from wan_scale.data.shards import fill


def encode_videos(folder, videos_dir, out, *, rank=0, world=1, frames=81, height=480, width=832, fps=16.0,
                  shard_size=64, limit=None, device="cpu", dtype=torch.float32) -> int:  # fmt: skip
    """Latents of the mp4 files of a folder; returns the number of clips made.

    Each has its caption in a .txt of the same name. A video is resampled to `fps` from its start (Wan's own is 16),
    scaled to cover height x width and cropped to its centre. Dropped with a reason: "no caption", "unreadable", "too
    short". The latent is the posterior's mean, normalised as the transformer takes it.
    """
    folder, videos = check_folder(folder), sorted(Path(videos_dir).glob("*.mp4"))[:limit]
    if not videos:
        raise ValueError(
            f"{videos_dir} holds no mp4; give a folder of mp4 files with captions in .txt of the same names."
        )
    records = []
    for path in videos:
        caption = path.with_suffix(".txt")
        prompt = " ".join(caption.read_text(errors="replace").split()) if caption.is_file() else ""
        records.append({"prompt": prompt, "video": path.name, "seed": 0})
    manifest = make_manifest(
        folder, "videos", frames, height, width, fps=fps, kd=False, dtype=str(dtype).removeprefix("torch."),
        shard_size=shard_size, vae=fingerprint(folder, "vae"), prompts=len(records),
        prompts_sha256=hashlib.sha256(json.dumps(records).encode()).hexdigest(),
    )  # fmt: skip

    def load():
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=dtype, local_files_only=True)
        vae = vae.to(device).eval()
        by_channel = lambda key: torch.tensor(vae.config[key], device=device)[:, None, None, None]
        mean, std = by_channel("latents_mean"), by_channel("latents_std")

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
