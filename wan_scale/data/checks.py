"""Are these latents what a teacher can have made: each clip before it is kept, and the statistics of a whole folder."""

from __future__ import annotations

import torch

# A clip outside these is broken. Latents of a real clip have a standard deviation near 1 in most channels and a few
# percent to a hundred percent of change from one latent frame to the next.
HOT = 3.0  # standard deviation above this in half of the channels: guidance has blown up
FLAT = 0.1  # below this in half of the channels: one colour
STATIC = 0.02  # root mean square change between latent frames, relative to the clip's own spread: a still image


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
    # the first latent frame stands for one frame, the others for four: it may differ even when nothing moves
    moving = x[:, 1:] if x.shape[1] > 2 else x
    if moving.shape[1] > 1:
        change = moving.diff(dim=1).square().mean().sqrt()
        if change < STATIC * (x - x.mean((1, 2, 3), keepdim=True)).square().mean().sqrt():
            return "static"
    return None


# Statistics of latents over a whole folder, by channel. Normalised ones lie near (0, 1); the bounds leave room for few
# or odd clips.
MEAN_BOUND, STD_BOUNDS = 2.0, (0.02, 4.0)


def channel_statistics(x: torch.Tensor) -> dict:
    """{"mean", "std"} by channel of a latent x (C, T, H, W), as lists."""
    flat = x.double().flatten(1)
    return {"mean": flat.mean(1).tolist(), "std": flat.std(1, correction=0).tolist()}


def pooled_statistics(sidecars: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation by channel over all clips of the given sidecars: (C,), (C,) float64."""
    sidecars = [s for s in sidecars if s["clips"]]
    n = torch.tensor([len(s["clips"]) for s in sidecars], dtype=torch.float64)[:, None]
    by_shard = lambda key: torch.tensor([s[key] for s in sidecars], dtype=torch.float64)
    mean, std = by_shard("mean"), by_shard("std")  # (shards, C)
    total = (n * mean).sum(0) / n.sum()
    return total, ((n * (std**2 + mean**2)).sum(0) / n.sum() - total**2).clamp_min(0).sqrt()


def look_raw(mean: torch.Tensor, std: torch.Tensor, vae_mean, vae_std) -> bool:
    """Whether latents with these statistics (C,) are raw: they have the VAE's mean and std, normalised ones 0 and 1.

    What is nearer, over all channels, decides.
    """

    def distance(m, s):
        return (((mean - m) / s) ** 2 + (std.clamp_min(1e-6) / s).log() ** 2).mean()

    vae_mean, vae_std = torch.as_tensor(vae_mean, dtype=mean.dtype), torch.as_tensor(vae_std, dtype=mean.dtype)
    return bool(distance(vae_mean, vae_std) < min(1, distance(torch.zeros_like(mean), torch.ones_like(std))))


def check_normalised(mean: torch.Tensor, std: torch.Tensor, vae_mean, vae_std) -> None:
    """ValueError if latents with these statistics (C,) look raw, or like nothing that a teacher can have made."""
    fix = "store (z - latents_mean) / latents_std of the VAE"
    if look_raw(mean, std, vae_mean, vae_std):
        raise ValueError(f"the latents look raw: their channels have the VAE's own means and deviations; {fix}.")
    good = lambda m, s: abs(m) <= MEAN_BOUND and STD_BOUNDS[0] <= s <= STD_BOUNDS[1]  # False for NaN
    bad = [i for i, (m, s) in enumerate(zip(mean, std)) if not good(m, s)]
    if bad:
        worst = f"mean {mean[bad[0]]:.2f} and standard deviation {std[bad[0]]:.2f} in channel {bad[0]}"
        raise ValueError(f"the latents do not look normalised ({worst}, {len(bad)} such of {len(mean)}); {fix}.")
