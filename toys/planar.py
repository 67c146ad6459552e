"""Points in the plane: data with known supports, two distances that judge samples, the network for points.

Every set has classes (arm, moon, mode, half), zero mean and about unit scale. A set is a skeleton (curve, centres,
squares) with Gaussian or uniform width around it, so how far a point lies off the support is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import tmd_minimal as tmd


def _spiral(u):  # u (n,) in [0, 1] -> one arm (n, 2), thinner towards the centre
    angle = math.pi * (0.5 + 1.9 * u.sqrt())
    return 0.25 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], -1)


def _moon(u):
    return torch.stack([(math.pi * u).cos() - 0.5, (math.pi * u).sin() - 0.25], -1) * 1.2


_ANGLES = torch.arange(8) * math.pi / 4
_CENTRES = 1.5 * torch.stack([_ANGLES.cos(), _ANGLES.sin()], -1)
# lower left corners of squares of side 1
_CELLS = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]) - 2.0


def _two_arms(curve, sigma):
    def draw(n, g):
        label = torch.randint(2, (n,), generator=g)
        x = curve(torch.rand(n, generator=g)) * (1 - 2 * label[:, None])  # the second arm: the first, half a turn on
        return x + sigma * torch.randn(n, 2, generator=g), label

    def distance(x, label):
        line = curve(torch.linspace(0, 1, 1500))
        both = torch.stack([torch.cdist(x, line).amin(1), torch.cdist(x, -line).amin(1)])
        return both.amin(0) if label is None else both.gather(0, label[None])[0]

    return draw, distance


def _gaussians(n, g):
    label = torch.randint(8, (n,), generator=g)
    return _CENTRES[label] + 0.15 * torch.randn(n, 2, generator=g), label


def _gaussians_distance(x, label):
    d = torch.cdist(x, _CENTRES)
    return d.amin(1) if label is None else d.gather(1, label[:, None])[:, 0]


def _checkerboard(n, g):
    cell = _CELLS[torch.randint(8, (n,), generator=g)]
    return cell + torch.rand(n, 2, generator=g), (cell[:, 0] >= 0).long()


def _checkerboard_distance(x, label):
    outside = (x[:, None] - (_CELLS + 0.5)).abs() - 0.5  # (n, 8, 2)
    d = outside.clamp_min(0).norm(dim=-1)
    if label is not None:
        d = torch.where((_CELLS[None, :, 0] >= 0) == label[:, None].bool(), d, torch.inf)
    return d.amin(1)


@dataclass(frozen=True)
class PlanarData:
    """A set of points: how to draw them, and how far a point lies from the set.

    draw(n, generator) -> x (n, 2), label (n,). distance(x, label or None) -> (n,) to the skeleton, or to that of the
    class. A point farther than `width` is off the support.
    """

    draw: Callable
    distance: Callable
    width: float
    classes: int


DATA = {
    "spirals": PlanarData(*_two_arms(_spiral, 0.04), 0.12, 2),
    "moons": PlanarData(*_two_arms(_moon, 0.06), 0.18, 2),
    "gaussians": PlanarData(_gaussians, _gaussians_distance, 0.45, 8),
    "checkerboard": PlanarData(_checkerboard, _checkerboard_distance, 0.05, 2),
}


def dataset(name: str) -> PlanarData:
    """The data set called `name`; ValueError names the known ones."""
    if name not in DATA:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATA)}.")
    return DATA[name]


def off_support(data: PlanarData, x: torch.Tensor, label: torch.Tensor | None = None) -> float:
    """Share of samples x (n, 2) farther than `width` from the set (from their class of it, if label is given)."""
    return (data.distance(x, label) > data.width).float().mean().item()


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 256) -> float:
    """Sliced 1-Wasserstein distance of two samples (n, d): mean over directions of mean |sorted a - sorted b|.

    ValueError if they are not equally many.
    """
    if a.shape != b.shape:
        told = f"samples of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared"
        raise ValueError(f"{told}; draw as many of each.")
    g = torch.Generator().manual_seed(0)
    w = torch.randn(a.shape[1], directions, generator=g)
    w = (w / w.norm(dim=0)).to(a.dtype)
    return ((a @ w).sort(0).values - (b @ w).sort(0).values).abs().mean().item()


class PlanarNet(tmd.Network):
    """The network for points (B, dim): residual AdaLN blocks, with or without a class as condition.

    c (B,) int; the number `classes` is the empty class. ValueError for points or classes that do not fit.
    """

    def __init__(self, dim: int = 2, width: int = 64, depth: int = 6, classes: int = 0):
        super().__init__()
        self.dim, self.classes = dim, classes
        self.time = tmd.TimeEmbedding(width, max_freq=20.0)  # choice: Wan's 1000 makes a finite difference alias
        self.patch = nn.Linear(7 * dim, width)
        self.classes_table = nn.Embedding(classes + 1, width) if classes else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 5 * width))  # shared by all blocks, as in Wan
        self.blocks = nn.ModuleList(tmd.AdaMLP(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.proj = nn.Linear(width, dim)

    def embed(self, x):
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"points of shape {tuple(x.shape)} do not fit a network for (B, {self.dim}).")
        # a plain linear layer blurs a curve's edge
        waves = [f(k * x) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        return self.patch(torch.cat([x, *waves], -1))

    def context(self, c, x):
        if self.classes_table is None:
            if c is not None:
                raise ValueError("this network knows no classes; pass c=None or build it with classes > 0.")
            return 0.0
        return self.classes_table(torch.full((len(x),), self.classes, device=x.device) if c is None else c)

    def modulate(self, temb, ctx):
        return self.modulation(temb + ctx).unflatten(-1, (5, -1)).split((3, 2), 1)  # (B, 3, W), (B, 2, W)

    def output(self, h, e):
        scale, shift_ = e[1].unbind(1)
        return self.proj(self.norm(h) * (1 + scale) + shift_)


class PlanarDiscriminator(nn.Module):
    """One small MLP head for each tapped teacher block: list of (B, W) -> logits (B, heads)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        layers = lambda: (nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.heads = nn.ModuleList(nn.Sequential(*layers()) for _ in range(heads))

    def forward(self, features):
        return torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], -1)
