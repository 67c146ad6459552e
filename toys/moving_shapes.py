"""Toy videos of one moving shape, rendered on the fly: the words of a prompt, the laws of motion, the renderer.

A prompt has three words: shade, shape and motion ("bright ring circle"). A clip has one channel, values in [-1, 1],
background -1. Lengths are fractions of the frame side and a motion fills the clip, so clips of any size and length
obey the same laws.

    world = World()                                         # 8 frames of 16 x 16
    clips, c, params = world.draw(500, torch.Generator())   # (500, 1, 8, 16, 16), (500, 3), (500, 5)

Because the renderer is known, the valid clip nearest to any clip can be searched for: ruler.py scores clips by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import tmd_minimal as tmd

SHADES = ("dim", "bright")
SHAPES = ("square", "ring", "cross")
MOTIONS = ("still", "straight", "bounce", "circle", "eight")
WORDS = (*SHADES, *SHAPES, *MOTIONS, "any")
# The id of "any". It takes a word's place where the condition is dropped; no clip is drawn for it.
EMPTY = len(WORDS) - 1
_SLOTS = (SHADES, SHAPES, MOTIONS)
FIRST = (0, len(SHADES), len(SHADES) + len(SHAPES))  # the id of the first word of each slot
_RADIUS, _MARGIN = 0.19, 0.21  # half a shape, and how near its centre comes to an edge: shapes never leave the frame


def encode(prompt: str) -> torch.Tensor:
    """Tokens (3,) int64 of "shade shape motion", any of which may be "any".

    ValueError lists the words if one is wrong or missing.
    """
    words = prompt.split()
    if len(words) != 3 or any(w not in (*slot, WORDS[EMPTY]) for w, slot in zip(words, _SLOTS)):
        known = "; ".join(" | ".join(slot) for slot in _SLOTS)
        told = f"cannot read the prompt {prompt!r}"
        raise ValueError(f"{told}; write three words, one each of {known} (or {WORDS[EMPTY]}).")
    return torch.tensor([WORDS.index(w) for w in words])


def decode(c: torch.Tensor) -> str:
    """The three words of tokens c (3,), the inverse of `encode`; ValueError if c does not hold three known tokens."""
    tokens = c.tolist()
    if c.shape != (3,) or not all(t in range(len(WORDS)) for t in tokens):
        raise ValueError(f"cannot read the tokens {tokens}; give three ids from 0 to {EMPTY}.")
    return " ".join(WORDS[t] for t in tokens)


def checked(c: torch.Tensor) -> torch.Tensor:
    """The prompts c (n, 3), if every word of them is named; ValueError otherwise."""
    if c.ndim != 2 or c.shape[1] != 3 or c.is_floating_point():
        told = f"prompts of shape {tuple(c.shape)} and type {c.dtype} do not fit"
        raise ValueError(f"{told}; give integer tokens (n, 3).")
    first = torch.tensor(FIRST, device=c.device)
    if ((c < first) | (c >= first + torch.tensor([len(s) for s in _SLOTS], device=c.device))).any():
        raise ValueError("a prompt has a wrong or empty word; use tokens of encode() with no word left as any.")
    return c


# ---------------------------------------------------------------- shapes and motions


def _fold(u):
    """Reflect any real number into [0, 1] (a triangle wave of period 2, the identity on [0, 1])."""
    return 1 - (1 - u.remainder(2)).abs()


def _between(low, high, u):
    return low + (high - low) * _fold(u)


def _along(angle):  # angle in turns -> unit vectors (..., 2)
    return torch.stack([(math.tau * angle).cos(), (math.tau * angle).sin()], -1)


# Each law takes params u (n, 5) and time (T,) from 0 to 1, and returns centres (n, T, 2) in a box of side `_SIDE`
# around 0. Uniform u gives the data distribution. Any real u is valid (place and size reflect at 0 and 1, angles
# wrap), so a fit needs no constraints.
_SIDE = 1 - 2 * _MARGIN


def _still(u, time):
    return (_SIDE * (_fold(u[:, :2]) - 0.5))[:, None].expand(-1, len(time), -1)


def _straight(u, time):
    way = _between(0.35, _SIDE, u[:, 2, None]) * _along(u[:, 3])
    middle = (_SIDE - way.abs()) * (_fold(u[:, :2]) - 0.5)
    return middle[:, None] + way[:, None] * (time - 0.5)[:, None]


def _bounce(u, time):
    """A straight path that one of four walls reflects in the middle of the clip.

    u: place along the wall, time of the hit, speed, wall and angle.
    """
    since_hit = time - _between(0.35, 0.65, u[:, 1, None])  # (n, T)
    quarter = (4 * u[:, 3, None]).floor()
    slope = _along((4 * u[:, 3] - quarter[:, 0] - 0.5) / 4)  # within 45 degrees of the normal, so the bounce is seen
    speed = _between(0.75, 1.1, u[:, 2, None])
    # depth is counted from the wall; the other walls reflect as well
    depth = _SIDE * _fold(speed * slope[:, :1] * since_hit.abs() / _SIDE)
    place = _SIDE * (_fold(_fold(u[:, :1]) + speed * slope[:, 1:] * since_hit / _SIDE) - 0.5)
    depth = (_SIDE / 2 - depth) * torch.where(quarter % 4 < 2, 1, -1)
    return torch.where((quarter % 2 == 0)[..., None], torch.stack([depth, place], -1), torch.stack([place, depth], -1))


def _circle(u, time):
    radius = _between(0.17, 0.26, u[:, 2, None])
    sense = torch.where(u[:, 4].remainder(1) < 0.5, 1, -1)
    turns = (sense * _between(0.75, 1.0, 4 * u[:, 4]))[:, None]
    middle = (_SIDE - 2 * radius) * (_fold(u[:, :2]) - 0.5)
    return middle[:, None] + radius[..., None] * _along(u[:, 3, None] + turns * time)


def _eight(u, time):
    """A figure-eight (sin a, sin 2a / 2), turned by u[4] and run through once. Turned by a half, it runs backwards."""
    length = _between(0.22, 0.28, u[:, 2, None])
    angle = math.tau * (u[:, 3, None] + time)
    p, q = angle.sin(), (2 * angle).sin() / 2
    e = _along(u[:, 4])[:, None]
    curve = torch.stack([p * e[..., 0] - q * e[..., 1], p * e[..., 1] + q * e[..., 0]], -1)
    middle = (_SIDE - 2 * length) * (_fold(u[:, :2]) - 0.5)
    return middle[:, None] + length[..., None] * curve


_LAWS = (_still, _straight, _bounce, _circle, _eight)


def _few(u, motion):
    """Params u (n, 5) of a law with few modes: 1 (still), 4, 8, 8 and 8.

    Size and speed are fixed; direction, phase and sense are rounded to a few values. What stays free is the place.
    The rounded values are the ends of equal steps of u, so uniform u hits every mode equally often.
    """
    step = lambda x, k: (k * x.remainder(1)).floor() / k
    half, law = torch.full_like(u[:, 0], 0.5), (motion - FIRST[2])[:, None]
    straight = (u[:, 0], u[:, 1], half, step(u[:, 3], 4), u[:, 4])  # along an axis, either way
    bounce = (u[:, 0], half, half, step(u[:, 3], 8) + 1 / 16, u[:, 4])  # four walls, two angles
    circle = (u[:, 0], u[:, 1], half, step(u[:, 3], 4), step(u[:, 4], 2) + 1 / 8)  # four starts, two senses
    eight = (u[:, 0], u[:, 1], half, step(u[:, 3], 4), step(u[:, 4], 2) / 2)  # four starts, lying or standing
    for i, columns in enumerate((straight, bounce, circle, eight), 1):
        u = torch.where(law == i, torch.stack(columns, 1), u)
    return u


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.16


def _ring(x, y):
    return (torch.hypot(x, y) - (_RADIUS - 0.04)).abs() - 0.04


def _cross(x, y):
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - _RADIUS, torch.minimum(x, y) - 0.05)


# Signed distances, negative inside. choice: of discs, rings, crosses, bars, filled and hollow squares, these three
# stay farthest apart at 16 x 16: at the best shift and shade, at least 7.8 squared grey levels a frame (a dim cross
# on its own has 12).
_OUTLINES = (_square, _ring, _cross)


@dataclass(frozen=True)
class World:
    """The renderer of clips (n, 1, T, H, W).

    `draw` gives data; `trajectory` and `render` are its two halves. All follow the device of their arguments.
    ValueError for a world too short or too small to tell motions and shapes apart.
    """

    frames: int = 8  # of a clip
    size: int = 16  # side of a frame in pixels
    # of a motion: "free" (any direction, phase, speed), or "few" (see _few), which a small network can learn
    modes: str = "free"

    def __post_init__(self):
        if self.frames < 6:
            raise ValueError(f"{self.frames} frames are too few to tell the motions apart; use frames of 6 or more.")
        tmd.choose("modes", self.modes, ("free", "few"))
        if self.size < 12:
            raise ValueError(f"{self.size} pixels are too few to tell the shapes apart; use a size of 12 or more.")

    def trajectory(self, motion, params):
        """Centres (n, T, 2) as (x, y) in [0, 1] of the frame side.

        motion (n,) holds tokens, params (n, 5) are uniform in [0, 1] for data.
        """
        time = torch.linspace(0, 1, self.frames, device=params.device, dtype=params.dtype)
        path = params.new_empty(len(params), self.frames, 2)
        if self.modes == "few":
            params = _few(params, motion)
        for i, law in enumerate(_LAWS):
            rows = (motion == FIRST[2] + i).nonzero()[:, 0]
            if len(rows):
                path[rows] = 0.5 + law(params[rows], time)
        return path

    def cover(self, shape, path):
        """Share of every pixel that the shape covers, smooth in the path.

        shape (n,) from 0 to 2, path (n, T, 2) -> (n, T, H, W).
        """
        pixels = (torch.arange(self.size, device=path.device, dtype=path.dtype) + 0.5) / self.size
        x, y = (pixels - path[..., :1])[..., None, :], (pixels - path[..., 1:])[..., None]
        cover = path.new_empty(*path.shape[:2], self.size, self.size)
        for i, outline in enumerate(_OUTLINES):
            rows = (shape == i).nonzero()[:, 0]
            if len(rows):
                cover[rows] = torch.sigmoid(-4 * self.size * outline(x[rows], y[rows]))  # an edge is one pixel wide
        return cover

    def render(self, shade, shape, path):
        """Clips (n, 1, T, H, W) in [-1, 1]: shade (n,) and shape (n,), as tokens, at the centres path (n, T, 2)."""
        return (shade + 1).to(path.dtype)[:, None, None, None, None] * self.cover(shape - FIRST[1], path)[:, None] - 1

    def draw(self, n: int, generator: torch.Generator, c: torch.Tensor | None = None):
        """n clips (n, 1, T, H, W) with prompts c (n, 3) and params (n, 5), on the generator's device.

        The prompts are those given, or uniform ones. ValueError if they are not n whole prompts.
        """
        device = generator.device
        if c is None:
            word = lambda slot: torch.randint(len(slot), (n,), generator=generator, device=device)
            c = torch.stack([first + word(slot) for first, slot in zip(FIRST, _SLOTS)], 1)
        elif len(checked(c)) != n:
            raise ValueError(f"{len(c)} prompts were given for {n} clips; give one prompt a clip.")
        c = c.to(device)
        params = torch.rand(n, 5, generator=generator, device=device)
        return self.render(c[:, 0], c[:, 1], self.trajectory(c[:, 2], params)), c, params
