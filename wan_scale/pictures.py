"""From latents to frames, and frames on a contact sheet or in an mp4."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch


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
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def write_video(frames: np.ndarray, path: Path, fps: int = 16) -> Path:
    """Frames (T, H, W, 3) in [0, 1] to mp4, atomically."""
    from diffusers.utils import export_to_video

    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    export_to_video(list(frames), str(temporary), fps=fps)
    os.replace(temporary, path)
    return path
