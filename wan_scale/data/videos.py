"""Clips from a folder of videos with captions, encoded by the folder's VAE."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from wan_scale.data.checks import Dropped
from wan_scale.data.folders import check_folder, fingerprint
from wan_scale.data.manifest import make_manifest
from wan_scale.data.prompts import CONTROL, decoded
from wan_scale.data.shards import fill

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def encode_videos(folder, videos_dir, out, *, rank=0, world=1, frames=81, height=480, width=832, fps=16.0,
                  shard_size=64, limit=None, device="cpu", dtype=torch.float32, grow=True) -> int:  # fmt: skip
    """Latents of the videos of a folder (VIDEOS); returns the number of clips made.

    Each has its caption in a .txt of the same name. A video is turned and stretched as players do, resampled to `fps`
    from its start (Wan's own is 16), scaled to cover height x width and cropped to its centre. Dropped with a reason:
    "no caption", "caption not UTF-8", "control character in caption", "unreadable", "too short". The latent is the
    posterior's mean, normalised as the transformer takes it. grow: of shards.fill.
    """
    folder, there = check_folder(folder), sorted(path for path in Path(videos_dir).glob("*") if path.is_file())
    videos = [path for path in there if path.suffix.lower() in VIDEOS][:limit]
    if not videos:
        raise ValueError(
            f"{videos_dir} holds no video ({', '.join(VIDEOS)}); give a folder of them with captions in .txt of the "
            "same names."
        )
    others = sorted({p.suffix.lower() or p.name for p in there if p.suffix.lower() not in (*VIDEOS, ".txt")})
    if others and rank == 0:
        print(f"{videos_dir}: files of other kinds are left out ({', '.join(others[:5])}).", flush=True)
    # by its size another video of the same name shows
    about = lambda path: {"video": path.name, "bytes": path.stat().st_size, "seed": 0}
    records = [{**caption(path.with_suffix(".txt")), **about(path)} for path in videos]
    manifest = make_manifest(
        folder, "videos", frames, height, width, fps=fps, kd=False, dtype=str(dtype).removeprefix("torch."),
        shard_size=shard_size, vae=fingerprint(folder, "vae"),
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
                raise Dropped(record.get("lacking", "no caption"))
            video = read_video(Path(videos_dir) / record["video"], frames, height, width, fps)
            z = vae.encode(video[None].to(device, dtype)).latent_dist.mode()[0].float()
            return {"latent": ((z - mean) / std).cpu()}  # the inverse of what WanPipeline does before it decodes

        return make

    return fill(folder, out, manifest, records, load, rank=rank, world=world, device=device, grow=grow)


def caption(path: Path) -> dict:
    """{"prompt"}: a video's caption, its white space cleaned; {"prompt": "", "lacking": why} where it has none."""
    try:
        prompt = " ".join(decoded(path.read_bytes()).split())
    except FileNotFoundError:
        prompt = ""
    except ValueError as e:
        return {"prompt": "", "lacking": f"caption {e}"}
    if CONTROL.search(prompt):
        return {"prompt": "", "lacking": "control character in caption"}
    return {"prompt": prompt}


def read_video(path: Path, frames: int, height: int, width: int, fps: float) -> torch.Tensor:
    """A video as (3, frames, height, width) in [-1, 1]; Dropped("unreadable") or Dropped("too short").

    A frame is sampled by its own time stamp, for the rate in a file's header may be a mean.
    """
    import imageio.v2 as imageio

    # the first frame at 0, then at each 1 / fps the last frame up to then, its time rounded; no second resampling;
    # pixels that are not square are made so
    resampled = ["-vf", f"setpts=PTS-STARTPTS,fps={fps},scale=iw*sar:ih,setsar=1", "-fps_mode", "passthrough"]
    found = []
    try:
        with imageio.get_reader(path, "ffmpeg", output_params=resampled) as video:
            for frame in video:
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
