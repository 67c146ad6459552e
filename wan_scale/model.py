"""Wan2.1 as a network of tmd_minimal: the stock diffusers transformer, called part by part. No forward is copied.

    teacher = WanNetwork(load_transformer(folder, torch.bfloat16))       # tmd.Network: teacher(x_t, t, c), .taps(...)
    student = tmd.TMDStudent(WanNetwork(load_transformer(folder)), H=5)  # the student wrapper that the toys use

States x are latents (B, 16, T, H, W), conditions c are text embeddings (B, 512, 4096), times are (B,) in [0, 1] (Wan's
own: 1000 t).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmd_minimal as tmd
from wan_scale import speed
from wan_scale.cost.work import CHECKPOINTING
from wan_scale.data.folders import check_folder
from wan_scale.training import ulysses


class WanTime(nn.Module):
    """Times (B,) -> (B, D): Wan's sinusoids of 1000 t, then its two-layer MLP.

    Never in half precision, whatever autocast says.
    """

    def __init__(self, condition_embedder):
        super().__init__()
        embedder = condition_embedder.time_embedder
        self.sinusoids = condition_embedder.timesteps_proj
        self.mlp = nn.Sequential(embedder.linear_1, embedder.act, embedder.linear_2)

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(self.sinusoids(1000 * t.double()).to(self.mlp[0].weight.dtype))


class WanNetwork(tmd.Network):
    """A stock WanTransformer3DModel in the contract of tmd.Network.

    Hidden states are tokens (B, n, D); after ulysses.share(net, K) they are the n / K of this rank. ctx is (text
    tokens, rotary table, (T', H', W')), made once a sample. `checkpointing` is the activation checkpointing of each
    block: "none", "selective" (all but attention) or "full"; `outside` that of the output layer.
    Where the network is `frozen` (speed.prepare), each block's keys and values stand for the text tokens. They are made
    once for a tensor c, WHICH MUST NOT BE CHANGED IN PLACE.
    """

    def __init__(self, transformer, checkpointing: str = "none"):
        super().__init__()
        if transformer.config.image_dim is not None or transformer.config.added_kv_proj_dim is not None:
            other = "this is an image-to-video checkpoint"
            raise ValueError(f"{other}; give a text-to-video one (Wan2.1-T2V-1.3B or -14B).")
        tmd.choose("checkpointing", checkpointing, CHECKPOINTING)
        self.transformer, self.checkpointing, self.tables, self.ranks = transformer, checkpointing, {}, 1
        self.frozen, self.prompt, self.outside = False, (None, None), "none"

    # Properties, not registered again: each weight has one name.
    patch = property(lambda self: self.transformer.patch_embedding)
    blocks = property(lambda self: self.transformer.blocks)
    time = property(lambda self: WanTime(self.transformer.condition_embedder))

    def grid(self, x) -> tuple[int, int, int]:
        """Patches of latents (B, C, T, H, W) along T, H, W; RAISES ValueError if they do not fit."""
        channels, p = self.transformer.config.in_channels, self.transformer.config.patch_size
        if x.ndim != 5 or x.shape[1] != channels or any(n % k for n, k in zip(x.shape[2:], p)):
            shape = tuple(x.shape)
            raise ValueError(f"latents of shape {shape} do not fit {channels} channels in patches of {tuple(p)}.")
        return tuple(n // k for n, k in zip(x.shape[2:], p))

    def embed(self, x):
        tokens = self.patch(x.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # (B, n, D)
        return ulysses.split(tokens, self.ranks).contiguous()

    def context(self, c, x):
        if c is None:
            needed = "Wan needs text embeddings (B, n, text_dim) as its condition"
            raise ValueError(f"{needed}; for no prompt pass the negative one.")
        text, dtype, grid = self.transformer.condition_embedder.text_embedder, self.patch.weight.dtype, self.grid(x)
        if (grid, x.device) not in self.tables:  # rotary positions: once a shape
            self.tables = {(grid, x.device): self.transformer.rope(x)}
        if self.frozen and self.prompt[0] is c:
            words = self.prompt[1]
        else:
            words = text(c.to(dtype)).to(dtype)  # in the weights' dtype, also where autocast is switched off
            if self.frozen:
                words = [speed.keys_and_values(block.attn2, words) for block in self.blocks]
                self.prompt = c, words
        return words, self.tables[grid, x.device], grid

    def modulate(self, temb, ctx):
        embedder = self.transformer.condition_embedder
        with torch.autocast(temb.device.type, enabled=False):
            temb = temb.to(embedder.time_proj.weight.dtype)
            return embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1)), temb, ctx  # (B, 6, D), (B, D)

    def run(self, h, e, start: int = 0, stop: int | None = None):
        six, _, (text, rope, _) = e
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))  # the head's stream, too, which comes from a float32 gate
        texts = text[start:stop] if isinstance(text, list) else repeat(text)
        for block, text in zip(self.blocks[start:stop], texts):
            h = speed.checkpointed(block, self.checkpointing, h, text, six, rope)
        return h

    def last(self, h, temb):
        """Wan's output layer, before the tokens become a picture."""
        net = self.transformer
        shift_, scale = (net.scale_shift_table + temb[:, None]).chunk(2, 1)
        return net.proj_out((net.norm_out(h.float()) * (1 + scale) + shift_).type_as(h))

    def output(self, h, e):
        _, temb, (_, _, grid) = e
        tokens = ulysses.gather(speed.checkpointed(self.last, self.outside, h, temb), self.ranks)
        return tmd.at_least_fp32(self.unpatchify(tokens, grid, channels_last=True))

    def unpatchify(self, tokens, grid, channels_last: bool):
        """Tokens (B, n, p q r C) -> (B, C, T, H, W).

        Wan's output has the channels last in a token; for features we put them first.
        """
        p = self.transformer.config.patch_size
        if channels_last:
            cells = tokens.unflatten(2, (*p, -1)).movedim(-1, 2)
        else:
            cells = tokens.unflatten(2, (-1, *p))
        cells = cells.unflatten(1, grid)  # (B, T', H', W', C, p, q, r)
        return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def taps(self, x_t, t, c, blocks) -> list[torch.Tensor]:
        """Hidden states after `blocks`, unpatchified to (B, D / (p q r), T, H, W); stops at the last of them."""
        whole = (ulysses.gather(h, self.ranks) for h in super().taps(x_t, t, c, blocks))
        return [self.unpatchify(h, self.grid(x_t), channels_last=False) for h in whole]


class ScaleBranch(nn.Module):
    """Features (B, C, T, H, W) averaged over cells of `scale` -> (B, width): 1x1x1, pool, 3x3x3, global pool."""

    def __init__(self, channels: int, width: int, scale: int, checkpointing: bool = False):
        super().__init__()
        # groups of four channels and more: one cell must still have something to normalise
        groups = math.gcd(32, max(width // 4, 1))
        self.scale, self.checkpointing = scale, checkpointing
        self.into = nn.Sequential(nn.Conv3d(channels, width, 1), nn.GroupNorm(groups, width), nn.SiLU())
        self.over = nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.SiLU())

    def forward(self, h):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.pooled(h)
        # in the student's update tmd.frozen holds the weights still; so must the second forward of checkpointing
        trained = self.over[0].weight.requires_grad
        again = lambda: (nullcontext(), nullcontext() if trained else tmd.frozen(self))
        return checkpoint(self.pooled, h, use_reentrant=False, context_fn=again)

    def pooled(self, h):
        h = self.into(h)
        if self.scale > 1:
            h = F.avg_pool3d(h, [min(self.scale, n) for n in h.shape[2:]])
        return self.over(h).mean((2, 3, 4))


class Readers(torch.autograd.Function):
    """h for n readers: their gradients are summed in float32, whatever precision h has."""

    @staticmethod
    def forward(ctx, h, n: int):
        return tuple(h.view_as(h) for _ in range(n))

    @staticmethod
    def backward(ctx, *gradients):
        *others, last = gradients
        total = tmd.at_least_fp32(last)
        for gradient in reversed(others):  # as autograd would add them up
            total = total + gradient
        return total.to(last.dtype), None


class WanDiscriminator(nn.Module):
    """Conv3D heads on the teacher's tapped features at five scales: list of (B, C, T, H, W) -> logits (B, heads).

    At 1.3B (C = 384, width 384, 3 taps) 67.9 M parameters, the paper's 68 M. choice: width 608 at 14B gives 171 M of
    the paper's 172 M.
    """

    SCALES = (1, 2, 4, 8, 16)

    def __init__(self, channels: int, width: int, heads: int, hidden: int = 1024, checkpointing: bool = False):
        super().__init__()
        branches = lambda: nn.ModuleList(ScaleBranch(channels, width, scale, checkpointing) for scale in self.SCALES)
        self.heads = nn.ModuleList(branches() for _ in range(heads))
        into = len(self.SCALES) * width
        logit = lambda: nn.Sequential(nn.Linear(into, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.logits = nn.ModuleList(logit() for _ in range(heads))

    def forward(self, features):
        dtype = self.logits[0][0].weight.dtype
        # autocast's convolutions take half precision as it is; a float32 copy would be kept until the backward pass
        if not torch.is_autocast_enabled(features[0].device.type):
            features = [h.to(dtype) for h in features]
        scales = lambda head, h: torch.cat([b(h) for b, h in zip(head, Readers.apply(h, len(head)))], -1)
        joined = [scales(head, h) for head, h in zip(self.heads, features, strict=True)]
        return torch.cat([logit(z) for logit, z in zip(self.logits, joined)], -1)


def load_transformer(folder, dtype: torch.dtype = torch.float32):
    """The transformer of a Wan2.1 folder in the Hugging Face layout; every weight must be there, and no other.

    In bf16 diffusers keeps times, tables and norms in fp32.
    """
    from diffusers import WanTransformer3DModel

    check_folder(folder, ("transformer",))
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)


def feature_channels(network: WanNetwork) -> int:
    """Channels of the unpatchified features that taps() returns."""
    return network.patch.weight.shape[0] // math.prod(network.transformer.config.patch_size)
