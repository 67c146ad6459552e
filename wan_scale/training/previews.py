"""A preview's files: latents, and the first seed of each prompt as frames. WHAT GOES WRONG HERE ENDS NO TRAINING."""

from __future__ import annotations

from pathlib import Path

import torch

from wan_scale.pictures import contact_sheet, decode
from wan_scale.training import kept, weights


def keep(samples, path: Path, model: str, device, dtype) -> None:
    """Samples (P, 2, C, T, H, W) to `path` and, decoded by the folder's VAE, to a picture beside it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights.save({"latents": samples.half().cpu()}, path)
        picture(samples, path.with_suffix(".png"), model, device, dtype)
    except torch.OutOfMemoryError:
        left_out = f"{path.stem}.png is left out, its latents are kept"
        print(f"\nno room for the VAE beside the training: {left_out}.", flush=True)
    except (OSError, RuntimeError, ValueError) as e:
        print(f"\nthe preview {path.stem} is left out: {kept.reason(e)}", flush=True)


def picture(samples, path: Path, model: str, device, dtype) -> None:
    """The VAE is loaded for this and let go."""
    from diffusers import AutoencoderKLWan
    from diffusers.video_processor import VideoProcessor

    if (Path(model) / "vae").exists():
        vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=dtype)
        frames = decode(vae.to(device), VideoProcessor(vae_scale_factor=8), samples[:, 0])
        contact_sheet([("", f"prompt {i}", clip) for i, clip in enumerate(frames)], path)
