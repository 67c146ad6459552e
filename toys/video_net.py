"""Wan in small, for clips (B, C, T, H, W).

`VideoDiT` is the network of the tiny-video rung, a tmd.Network: 3-D patches, 3-D rotary positions, self-attention,
cross-attention to the prompt, adaptive norm. `VideoDiscriminator` reads the teacher's features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tmd_minimal import AdaMLP, Network, TimeEmbedding, at_least_fp32, choose


class Attention(nn.Module):
    """Multi-head attention of x (B, n, W) to ctx (B, k, W), queries and keys RMS-normed -> (B, n, W).

    `rope` = (cos, sin), each (n, d/2), turns queries and keys by their positions.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, ctx, rope=None):
        k, v = self.kv(ctx).chunk(2, -1)
        split = lambda a: a.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, n, W) -> (B, heads, n, d)
        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(k)), split(v)
        if rope is not None:  # pairs of channels (a, b) turn by the position's angle
            cos, sin = (a.to(q.dtype) for a in rope)
            turn = lambda z: torch.cat([z[0] * cos - z[1] * sin, z[0] * sin + z[1] * cos], -1)
            q, k = turn(q.chunk(2, -1)), turn(k.chunk(2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2))


class DiTBlock(AdaMLP):
    """Wan's block on h (B, T', H', W', W): self-attention, cross-attention to the prompt, MLP.

    Adaptive norm and gates modulate self-attention and MLP.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, expand=4)
        self.attn_table = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.attn, self.cross, self.cross_norm = Attention(width, heads), Attention(width, heads), nn.LayerNorm(width)

    def forward(self, h, e):
        text, rope = e[-1]
        shift_, scale, gate = (e[0][:, :3] + self.attn_table)[:, :, None].unbind(1)  # (B, 1, W) each
        tokens = h.flatten(1, -2)  # (B, n, W)
        z = self.norm(tokens) * (1 + scale) + shift_
        tokens = tokens + gate * self.attn(z, z, rope)
        tokens = tokens + self.cross(self.cross_norm(tokens), text)
        return super().forward(tokens.view_as(h), e)


class VideoDiT(Network):
    """Wan in small, for clips (B, C, T, H, W) with prompts c (B, K) of word numbers; `words` is the empty word.

    ValueError for clips that do not split into whole patches.
    """

    def __init__(self, channels=1, width=64, depth=6, heads=4, patch=(2, 4, 4), words=1):
        super().__init__()
        self.patch_size, self.heads, self.words = tuple(patch), heads, words
        self.time = TimeEmbedding(width, max_freq=20.0)
        self.patch = nn.Conv3d(channels, width, self.patch_size, self.patch_size)
        layers = nn.Linear(width, width), nn.GELU("tanh"), nn.Linear(width, width)
        # choice: prompts at the tokens' scale
        self.text = nn.Sequential(nn.Embedding(words + 1, width), *layers, nn.LayerNorm(width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 8 * width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.proj = nn.Linear(width, channels * math.prod(self.patch_size))

    def embed(self, x):
        if x.ndim != 5 or any(n % p for n, p in zip(x.shape[2:], self.patch_size)):
            told = f"clips {tuple(x.shape)} do not split into patches of {self.patch_size}"
            raise ValueError(f"{told}; sizes must be multiples.")
        return at_least_fp32(self.patch(x).movedim(1, -1))  # (B, T', H', W', width), one dtype for all blocks

    def context(self, c, x):
        c = torch.full((len(x), 1), self.words, device=x.device) if c is None else c
        return at_least_fp32(self.text(c)), self.rope([n // p for n, p in zip(x.shape[2:], self.patch_size)], x.device)

    def rope(self, grid, device):
        """3-D rotary positions as (cos, sin), each (n, d/2): time, height and width share the pairs of a head."""
        half = self.patch.weight.shape[0] // self.heads // 2
        share = (half - 2 * (half // 3), half // 3, half // 3)
        freqs = [10000.0 ** -(torch.arange(k, device=device) / max(k, 1)) for k in share]
        places = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        angles = torch.cat([place.flatten()[:, None] * f for place, f in zip(places, freqs)], -1)
        return angles.cos(), angles.sin()

    def modulate(self, temb, ctx):
        return *self.modulation(temb).unflatten(-1, (8, -1)).split((6, 2), 1), ctx  # (B, 6, W), (B, 2, W), ctx

    def output(self, h, e):
        scale, shift_ = e[1][:, :, None, None, None].unbind(1)
        patches = self.proj(self.norm(h) * (1 + scale) + shift_)
        patches = patches.unflatten(-1, (-1, *self.patch_size))  # (B, T', H', W', C, p, q, r)
        return at_least_fp32(patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3))


class VideoDiscriminator(nn.Module):
    """One head for each tapped teacher block (Table 3).

    A list of features (B, T', H', W', width) -> logits (B, any number), over which gan_loss takes the mean.
    """

    def __init__(self, width: int, heads: int, kind: str = "conv3d"):
        super().__init__()
        kernels = {"conv3d": [(3, 3, 3), (3, 3, 3)], "conv1d2d": [(1, 3, 3), (3, 1, 1)], "attention": []}
        choose("discriminator", kind, kernels)
        conv = lambda k: (nn.Conv3d(width, width, k, padding=[n // 2 for n in k]), nn.GroupNorm(1, width), nn.SiLU())
        layers = lambda: [layer for k in kernels[kind] for layer in conv(k)]
        head = lambda: nn.Sequential(nn.GroupNorm(1, width), *layers(), nn.Conv3d(width, 1, 1))
        self.heads = nn.ModuleList(head() for _ in range(heads))
        self.attn = nn.ModuleList(Attention(width, 4) for _ in range(heads if kind == "attention" else 0))

    def forward(self, features):
        for i, attn in enumerate(self.attn):
            tokens = F.layer_norm(features[i], features[i].shape[-1:]).flatten(1, -2)
            features = [*features[:i], features[i] + attn(tokens, tokens).view_as(features[i]), *features[i + 1 :]]
        return torch.cat([head(h.movedim(-1, 1)).flatten(1) for head, h in zip(self.heads, features, strict=True)], -1)
